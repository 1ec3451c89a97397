"""The start of a VM by a runner: lock, slot, runner, and the wait until the guest is awake.

The order is SEEDS' A2.  Start lock and slot are taken by the process that wants the VM, where a
wait costs no process, and go over to the runner by inheritance; so each is free again when the last
of the two has closed it or died.

Where it stands: under ``host.manager``, over ``host.client``; ``host.start`` is what the runner
itself does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from vmkernel import trace
from vmkernel.errors import (
    RegistryError,
    VmBootError,
    VmError,
    VmGuestError,
    VmNotFoundError,
    VmStateError,
)
from vmkernel.host import reaper, wire
from vmkernel.host.client import Connection, RunnerProcess, spawn_runner
from vmkernel.host.handle import VmHandle
from vmkernel.host.processes import ProcessIdentity, boot_id, identify_self
from vmkernel.host.registry import Registry, VmRecord
from vmkernel.host.shielded import to_its_end
from vmkernel.host.start import log_dir, remove_logs, shared_slots
from vmkernel.host.startlock import StartLock
from vmkernel.host.waking import given_environment
from vmkernel.models import VmState
from vmkernel.settings import Settings, dump_settings

if TYPE_CHECKING:
    from vmkernel.host.capacity import Slot

log = logging.getLogger("vmkernel")

OnProgress = Callable[[str], None]
"""on_progress(one line for a person: what is being waited for)"""
TakeSlot = Callable[[], Awaitable["Slot"]]
SILENCE = 30.0
"""Seconds in which a runner that starts a VM must say something; it does so each second."""
LOOK_SECONDS = 0.5
"""How often one that waits for a slot looks whether it is still wanted."""
STOP_SECONDS = 10.0
"""How long a VM may take to end before its runner is killed."""


async def start_vm(
    registry: Registry,
    record: VmRecord,
    settings: Settings,
    env: Mapping[str, str],
    take_slot: TakeSlot,
    on_progress: OnProgress | None,
) -> VmHandle:
    """Start a VM that is on record; cancelling it, as any failure, leaves nothing that runs.

    Raises VmAlreadyStartingError, VmStateError (it runs), VmNotFoundError (it was destroyed
    meanwhile), VmCapacityError, and what a start may fail of (``host.start``).
    """
    vm_id = record.vm_id
    # The runner has none of our environment to find them in
    env = {**given_environment(settings), **env}
    with await StartLock.take_beside(settings, vm_id) as lock:
        state = await _make_startable(registry, settings, vm_id)
        # Lock and slot are closed at the end of this; by then the runner has its own
        with await _slot_while_wanted(registry, vm_id, state, take_slot) as slot:
            starting = asyncio.ensure_future(
                update(
                    registry,
                    vm_id,
                    state=VmState.STARTING,
                    started=None,
                    ended=None,
                    exit_cause="",
                    qemu_pid=0,
                    qemu_start=0,
                    slot=slot.index,
                    slot_lease=slot.lease,
                    **as_runner(identify_self()),
                )
            )
            try:
                await asyncio.shield(starting)
                trace.mark("slot taken")
                start = wire.Start(
                    dump_settings(settings), slot.index, slot.lease, dict(env), record.kept
                )
                runner, sock = spawn_runner(settings, vm_id, log_dir(settings, vm_id), slot, lock)
            except BaseException as error:  # nothing else would say on record that it is over
                await to_its_end(_give_up(registry, vm_id, starting, error))
                raise
    connection: Connection | None = None
    try:
        connection = await Connection.open(sock)
        await update(registry, vm_id, **as_runner(runner.identity))
        await _follow(runner, connection, start, on_progress)
        record = await update(registry, vm_id)
    except BaseException as error:
        if connection is None:
            sock.close()
        else:
            connection.tell(wire.Stop("its start was given up"))
            connection.close()
        await to_its_end(see_off(runner))
        if isinstance(error, VmError):
            error.code_ran = "no"  # there was nothing yet that could run any
            error.log_path = error.log_path or runner.log_path
            await _mark_failed(registry, vm_id, error)
        raise
    return VmHandle(record, connection, shared_slots(settings), settings.max_output, runner)


async def _slot_while_wanted(
    registry: Registry, vm_id: str, before: VmState, take_slot: TakeSlot
) -> Slot:
    """A slot; VmStateError or VmNotFoundError when the VM is stopped or destroyed meanwhile."""
    taking = asyncio.ensure_future(take_slot())
    try:
        while not (await asyncio.wait([taking], timeout=LOOK_SECONDS))[0]:
            now = (await asyncio.to_thread(registry.status, vm_id)).record.state
            if now is not before:
                raise VmStateError(
                    f"{vm_id} was {now} while it waited for a slot",
                    hint=f"vmkernel start {vm_id}",
                )
        return taking.result()
    except BaseException:
        taking.cancel()
        await asyncio.wait([taking])
        if not taking.cancelled() and taking.exception() is None:
            taking.result().release()  # it came in the very last moment
        raise


async def _make_startable(registry: Registry, settings: Settings, vm_id: str) -> VmState:
    """With its start lock held: wait for its end if it is stopping; VmStateError if it runs.

    Returns the state on record, from which it is started.
    """
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        await asyncio.to_thread(reaper.settle, settings, vm_id, locked=True)
        found = await asyncio.to_thread(registry.status, vm_id)
        if found.state is not VmState.STOPPING or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.05)
    if found.state in (VmState.RUNNING, VmState.STOPPING, VmState.ORPHANED):
        raise VmStateError(
            f"{vm_id} is {found.state}",
            hint=f"use it (`vmkernel exec {vm_id}`), or stop it first (`vmkernel stop {vm_id}`)",
        )
    if found.state is VmState.STARTING:  # by nobody: the lock is ours
        await update(registry, vm_id, state=VmState.FAILED, exit_cause="its start was given up")
        return VmState.FAILED
    return found.record.state


async def _follow(
    runner: RunnerProcess,
    connection: Connection,
    start: wire.Start,
    on_progress: OnProgress | None,
) -> None:
    """Wait until the VM is awake.  Raises VmError, with the runner's last words if it died."""

    def on_event(event: wire.Event) -> None:
        if isinstance(event, wire.Progress) and event.text and on_progress is not None:
            on_progress(event.text)

    loop = asyncio.get_running_loop()
    answering = asyncio.ensure_future(connection.call(start, on_event=on_event))
    try:
        while not answering.done():
            await asyncio.wait([answering], timeout=1.0)
            if loop.time() - connection.heard > SILENCE:
                runner.kill()
                raise VmBootError(
                    f"the runner (pid {runner.identity.pid}) has said nothing for "
                    f"{SILENCE:g} s, and was ended{_quoted(runner)}",
                    hint="is the host overloaded, or the process stopped? Try again",
                    log_path=runner.log_path,
                )
        await answering
    except VmGuestError as error:
        # Each who asks is given an error of his own; it is the connection's loss by its words
        if connection.ended.done() and str(connection.ended.result()) == str(error):
            status = await runner.wait()
            if status == -signal.SIGTERM:
                raise VmStateError(
                    f"the start of {runner.vm_id} was given up: somebody stopped it",
                    hint=f"vmkernel start {runner.vm_id}",
                ) from error
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise VmBootError(
                f"the VM's runner ended while it started the VM ({how}){_quoted(runner)}",
                hint="was it killed? Try again; `vmkernel doctor --start` shows each step",
                log_path=runner.log_path,
            ) from error
        raise
    finally:
        answering.cancel()


async def see_off(runner: RunnerProcess) -> None:
    """Wait for a runner that has reason to end; if it does not, kill it."""
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await runner.wait()
    except TimeoutError:
        runner.kill()
        await runner.wait()


async def forget_failed(
    registry: Registry, settings: Settings, record: VmRecord, error: BaseException
) -> None:
    """A VM that was never there stays on record only to tell why, and gives its name back."""
    vm_id = record.vm_id
    try:
        if isinstance(error, VmError):
            await _mark_failed(registry, vm_id, error, name="", kept=False)
        else:
            await asyncio.to_thread(registry.remove, vm_id)
            remove_logs(settings, vm_id)
    except RegistryError as problem:  # the error that led here is what is to be told
        log.warning("%s is still on record: %s", vm_id, problem)


async def _give_up(
    registry: Registry, vm_id: str, starting: asyncio.Future[VmRecord], error: BaseException
) -> None:
    await asyncio.wait([starting])  # its thread goes on, whatever becomes of us
    if starting.cancelled() or starting.exception() is not None:
        return
    cause = error if isinstance(error, VmError) else VmError("its start was given up")
    await _mark_failed(registry, vm_id, cause)


async def _mark_failed(registry: Registry, vm_id: str, error: VmError, **more: Any) -> None:
    cause = error.message.partition("\n")[0]
    with contextlib.suppress(VmNotFoundError, VmStateError):
        status = await asyncio.to_thread(registry.status, vm_id)
        if status.record.state is not VmState.FAILED:
            more |= {"state": VmState.FAILED, "ended": time.time()}
        await update(registry, vm_id, exit_cause=cause, **more)


async def update(registry: Registry, vm_id: str, **changes: Any) -> VmRecord:
    """`Registry.update`, beside the event loop."""
    return await asyncio.to_thread(lambda: registry.update(vm_id, **changes))


def as_runner(identity: ProcessIdentity) -> dict[str, Any]:
    """The fields of the record that name the VM's runner."""
    return {
        "runner_pid": identity.pid,
        "runner_start": identity.start_time,
        "boot_id": boot_id(),  # a VM that is kept may have run in an earlier one
    }


def _quoted(runner: RunnerProcess) -> str:
    words = runner.last_words()
    return f"; its last words:\n{words}" if words else ""
