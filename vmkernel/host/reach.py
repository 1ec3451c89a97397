"""A VM that runs, found by whatever people call it, and a connection to whoever owns it.

Where it stands: over ``host.registry`` and ``host.client``; a VM's owner is a runner or a
notebook's kernel, whose socket lets in files only.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from vmkernel.errors import VmGuestError, VmNotFoundError, VmStateError
from vmkernel.host.client import Connection
from vmkernel.host.registry import Registry, VmStatus, vm_dir
from vmkernel.models import VmState
from vmkernel.settings import Settings

DOOR_SECONDS = 3.0
"""How long a kernel's socket is waited for: it comes a moment after the first cell."""


def find(vm: str, settings: Settings) -> tuple[VmStatus, Path]:
    """The VM that runs and has this name, or this id or that of its kernel, or a beginning of one.

    With it the directory that its socket lies in.  Raises VmNotFoundError, VmStateError.
    """
    with Registry(settings) as registry:
        try:
            record = registry.get(vm)
        except VmNotFoundError:
            of_kernels = [
                status.record
                for status in registry.list()
                if len(vm) > 3 and status.record.kernel_id.startswith(vm)
            ]
            if len(of_kernels) != 1:
                raise
            record = of_kernels[0]
        status = registry.status(record.vm_id)
    if status.state is not VmState.RUNNING:
        raise VmStateError(
            f"{record.vm_id} does not run: it is {status.state}"
            + (f" ({record.exit_cause})" if record.exit_cause else ""),
            hint="a notebook's next cell starts another VM"
            if record.kernel_id
            else f"vmkernel start {record.name or record.vm_id}",
        )
    return status, Path(record.directory) if record.directory else vm_dir(settings, record.vm_id)


async def reach(found: tuple[VmStatus, Path]) -> Connection:
    """A connection to the owner of a VM that `find` found.  Raises VmGuestError."""
    status, directory = found
    record = status.record
    loop = asyncio.get_running_loop()
    deadline = loop.time() + (DOOR_SECONDS if record.kernel_id else 0.0)
    while True:
        try:
            return await Connection.reach(directory)
        except OSError as error:
            if loop.time() > deadline:
                raise VmGuestError(
                    f"{record.vm_id} cannot be reached: {error.strerror or error}",
                    hint="its notebook has run no cell in it yet: run one"
                    if record.kernel_id
                    else "is its runner ending? `vmkernel ps`",
                ) from error
        await asyncio.sleep(0.1)
