"""The answer to a ``usage_request``: what a kernel uses, for JupyterLab's panel.

The names are ipykernel's.  Its *host* is the machine that the kernel runs in: here the VM.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel.errors import VmError

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest
    from vmkernel.protocol import messages

log = logging.getLogger("vmkernel")

PATIENCE = 5.0
"""Seconds; the server gives up after 10."""


async def usage(guest: Guest | None, memory: int, vcpus: int) -> dict[str, Any]:
    """The content of a ``usage_reply``; ``memory`` (MiB) and ``vcpus`` are those of the VM.

    A VM that is not there (yet), or does not answer, uses nothing, and its name says so: the panel
    needs every field.
    """
    from vmkernel.protocol import messages

    hostname = "no VM yet"
    if guest is not None:
        hostname = guest.vm.machine.vm_id
        try:
            result = await guest.vm.agent.call(messages.Stats(), timeout=PATIENCE)
            return _content(hostname, msgspec.convert(result, messages.Usage))
        except (VmError, msgspec.ValidationError) as error:
            log.warning("what the guest uses is not known: %s", error)
            hostname += " (does not answer)"
    total = memory << 20
    nothing = messages.Memory(total, total, 0.0, 0, total, 0, 0, 0, 0, 0, 0)
    return _content(hostname, messages.Usage(0, 0.0, 0, None, vcpus, nothing))


def _content(hostname: str, used: messages.Usage) -> dict[str, Any]:
    content = {
        "hostname": hostname,
        "pid": used.pid,
        "kernel_cpu": used.kernel_cpu,
        "kernel_memory": used.kernel_memory,
        "cpu_count": used.cpu_count,
        "host_virtual_memory": msgspec.structs.asdict(used.memory),
    }
    if used.machine_cpu is not None:  # not known at the first question, as with ipykernel
        content["host_cpu_percent"] = used.machine_cpu
    return content
