"""The end of a VM, whatever it is at: waiting, starting, running, a notebook's, an orphan.

What is on record is asked again after each step, since others may be ending it, too, or starting
it: so ending a VM twice, or from two processes, is one end.  Floor 4, under ``host.manager``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

from vmkernel.errors import VmError, VmNotFoundError, VmStateError
from vmkernel.host import reaper, running, wire
from vmkernel.host.client import Connection
from vmkernel.host.handle import VmHandle
from vmkernel.host.processes import ProcessIdentity, arguments, is_alive, kill
from vmkernel.host.registry import Registry, VmRecord, VmStatus
from vmkernel.host.runner_start import STOP_SECONDS, see_off
from vmkernel.models import ENDED, VmState
from vmkernel.settings import Settings

_MOMENT = 0.02
_KILL_SECONDS = 10.0


async def end_vm(
    registry: Registry, settings: Settings, vm_id: str, handle: VmHandle | None, timeout: float
) -> None:
    """End the VM; when this returns, nothing of it lives.

    Asks politely for ``timeout`` seconds, then kills its runner and QEMU.  Raises VmError when even
    that does not help.
    """
    deadline = time.monotonic() + timeout
    runner: ProcessIdentity | None = None
    while True:
        try:
            found = await asyncio.to_thread(registry.status, vm_id)
        except VmNotFoundError:
            break
        if found.record.state in ENDED or _never_started(found):
            break
        if _is_runner(found.record):
            runner = found.record.runner
        late = time.monotonic() > deadline
        if late and time.monotonic() > deadline + _KILL_SECONDS:
            record = found.record
            raise VmError(
                f"{vm_id} does not end: it is {found.state}, runner {record.runner_pid}, "
                f"QEMU {record.qemu_pid}",
                hint="a process in uninterruptible sleep cannot be killed; does a disk hang?",
            )
        await _push(registry, settings, found, handle, late=late)
    if handle is not None:
        await handle.close()
        if handle.runner is not None:
            await see_off(handle.runner)
    # The record comes before the runner's last instant
    while is_alive(runner) and time.monotonic() < deadline + _KILL_SECONDS:  # noqa: ASYNC110
        await asyncio.sleep(_MOMENT / 4)
    # And what dies with the runner has an instant more
    while await asyncio.to_thread(_lives, settings, vm_id):
        if time.monotonic() > deadline + _KILL_SECONDS:
            break
        await asyncio.sleep(_MOMENT / 4)


def _lives(settings: Settings, vm_id: str) -> bool:
    return vm_id in running.find_qemus(settings, enclosing=True).values()


def _never_started(found: VmStatus) -> bool:
    return found.record.state is VmState.CREATED and not found.runner_alive


async def _push(
    registry: Registry, settings: Settings, found: VmStatus, handle: VmHandle | None, *, late: bool
) -> None:
    """One step towards the VM's end."""
    record = found.record
    if not found.runner_alive:
        await asyncio.to_thread(reaper.settle, settings, record.vm_id)
        await asyncio.sleep(_MOMENT)
    elif record.kernel_id:  # a wrapper kernel lives on, and is told by QEMU's death
        await _kill(record.qemu)
        await _wait_until_changed(registry, record)
    elif late and _is_runner(record):
        await _kill(record.runner)
    elif record.state is VmState.CREATED:
        with contextlib.suppress(VmStateError, VmNotFoundError):  # it has gone on meanwhile
            await asyncio.to_thread(  # who waits for its slot finds this
                lambda: registry.update(
                    record.vm_id, expected=record, state=VmState.STOPPED, ended=time.time()
                )
            )
    elif record.state is VmState.STARTING and _is_runner(record):
        assert record.runner is not None
        with contextlib.suppress(OSError):
            _terminate(record.runner)
        await _wait_until_changed(registry, record)
    elif record.state is VmState.STARTING:  # between the slot and the runner
        await asyncio.sleep(_MOMENT)
    else:
        await _ask(record, handle)


async def _ask(record: VmRecord, handle: VmHandle | None) -> None:
    own: Connection | None = None
    try:
        async with asyncio.timeout(STOP_SECONDS):
            connection = handle.connection if handle is not None else None
            if connection is None or not connection.connected:
                connection = own = await Connection.reach(Path(record.directory))
            await connection.call(wire.Stop("it was asked to"))
    except (VmError, OSError, TimeoutError):
        await asyncio.sleep(_MOMENT)  # it is ending by itself, or is looked at again
    finally:
        if own is not None:
            own.close()


async def _wait_until_changed(registry: Registry, record: VmRecord) -> None:
    for _ in range(50):
        await asyncio.sleep(_MOMENT)
        try:
            found = await asyncio.to_thread(registry.status, record.vm_id)
        except VmNotFoundError:
            return
        if found.record.state != record.state or not found.runner_alive:
            return


async def _kill(process: ProcessIdentity | None) -> None:
    if process is not None:
        await asyncio.to_thread(kill, process)


def _terminate(process: ProcessIdentity) -> None:
    """SIGTERM to this very process.  Raises OSError."""
    pidfd = os.pidfd_open(process.pid)
    try:
        if is_alive(process):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    finally:
        os.close(pidfd)


def _is_runner(record: VmRecord) -> bool:
    """Whether the process on record is the VM's runner, and not who is about to start it."""
    words = arguments(record.runner_pid)
    return record.vm_id in words and any(word.endswith("run_vm.py") for word in words)
