"""What is known of the VMs on this host: for ``ps`` and ``top``. Floor 5.

The record says which VMs there are; what lives of them and what they cost is read from /proc.
VMs of other users have their records out of reach: they show as the slots that they hold.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import time
from typing import TYPE_CHECKING, Any

import psutil

from vmkernel.host.openings import NAMES, in_short

if TYPE_CHECKING:
    from vmkernel.host.registry import Registry, VmStatus
    from vmkernel.settings import Settings


def vms_on_host(
    settings: Settings, registry: Registry, *, ended: bool = False
) -> list[dict[str, Any]]:
    """What is known of each VM, the oldest first; None for what cannot be known.

    With *ended* also of those that have ended and are on record.  Raises VmError when the record
    cannot be read.
    """
    from vmkernel.host.capacity import vm_slots

    holders = vm_slots(settings).holders()  # before the record, which then knows them all
    statuses = registry.list(ended=ended)
    living = [status.record for status in statuses if status.runner_alive or status.qemu_alive]
    pids = {pid for record in living for pid in (record.runner_pid, record.qemu_pid)}
    slots = {record.slot for record in living}  # the pid is that of who took it for a runner
    return [_describe(status) for status in statuses] + [
        _describe_stranger(pid, index)
        for index, pid, _ in holders
        if pid and pid not in pids and index not in slots
    ]


def slots(settings: Settings) -> dict[str, Any]:
    """The slots of the host: limit, used, free, waiting; and this user's, where he has a limit."""
    from vmkernel.host.capacity import vm_slots

    semaphore = vm_slots(settings)
    own = semaphore.within.statistics()._asdict() if semaphore.within is not None else None
    return {**semaphore.statistics()._asdict(), "user": own}


def slots_line(slots: dict[str, Any]) -> str:
    """The same in words."""
    waiting = f", {slots['waiting']} waiting" if slots["waiting"] else ""
    own = slots["user"]
    yours = f", {own['used']} of your {own['limit']} (max_vms_per_user)" if own else ""
    return f"{slots['used']} of {slots['limit']} VM slots in use{yours}{waiting}"


def purpose(vm: dict[str, Any]) -> str:
    """What the VM is for: its notebook, its kernel, or the tags that it was given."""
    tags = "/".join(tag for tag in (vm["tenant_id"], vm["task_id"]) if tag)
    return str(vm["notebook"] or vm["kernel_id"] or tags or "-")


def open_to(vm: dict[str, Any]) -> str:
    """What the VM is let see or reach, in short."""
    return in_short(vm)


def state_word(vm: dict[str, Any]) -> str:
    """The state as people are told it."""
    return "waiting" if vm["waiting"] else str(vm["state"])


def _describe(status: VmStatus) -> dict[str, Any]:
    record = status.record
    pid = record.qemu_pid if status.qemu_alive else None
    state = str(status.state)
    return {
        "id": record.vm_id,
        "name": record.name,
        "owner": _user(record.owner),
        "kernel_id": record.kernel_id,
        "notebook": record.notebook
        or (_notebook(record.runner_pid) if status.runner_alive and record.kernel_id else ""),
        "connection_file": record.connection_file,
        "tenant_id": record.tenant_id,
        "task_id": record.task_id,
        "state": state,
        # On record before it has a slot, by a process that lives: it is in the queue
        "waiting": state == "created" and status.runner_alive,
        "kept": record.kept,
        "pid": pid,
        "runner_pid": record.runner_pid if status.runner_alive else None,
        "slot": record.slot if status.qemu_alive else None,
        "recipe": record.recipe,
        "language": record.language,
        "accelerator": record.accelerator,
        "template": record.template,
        "vcpus": record.vcpus,
        "memory_limit": record.memory * 1024**2,
        **_memory(pid),
        "created": record.created,
        "started": record.started,
        "ended": record.ended,
        "age": time.time() - record.created,
        "exit_cause": record.exit_cause,
        **{name: getattr(record, name) for name in NAMES},
        "log_dir": record.log_dir,
    }


def _describe_stranger(pid: int, slot: int) -> dict[str, Any]:
    """A slot's holder without a record of ours: another user's VM."""
    owner, created = "?", None
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        owner, created = process.username(), process.create_time()
    unknown = dict.fromkeys(
        "id name kernel_id notebook connection_file tenant_id task_id recipe language accelerator "
        "template exit_cause log_dir".split(), ""
    ) | dict.fromkeys(NAMES, "")  # fmt: skip
    nothing = dict.fromkeys(["runner_pid", "vcpus", "memory_limit", "started", "ended"])
    return {
        **unknown,
        **nothing,
        "owner": owner,
        "state": "unknown",
        "waiting": False,
        "kept": False,
        "pid": pid,
        "slot": slot,
        **_memory(pid),
        "created": created,
        "age": None if created is None else time.time() - created,
    }


def _memory(pid: int | None) -> dict[str, int | None]:
    private = shared = proportional = None
    if pid is not None:
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or another user's
            full = psutil.Process(pid).memory_full_info()
            private, shared, proportional = full.uss, full.rss - full.uss, full.pss
    return {"memory_private": private, "memory_shared": shared, "memory_pss": proportional}


def _notebook(runner_pid: int) -> str:
    """The notebook's path, which Jupyter Server gives each kernel in its environment."""
    with contextlib.suppress(psutil.Error):
        path = psutil.Process(runner_pid).environ().get("JPY_SESSION_NAME", "")
        return os.path.relpath(path) if path.startswith("/") else path
    return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
