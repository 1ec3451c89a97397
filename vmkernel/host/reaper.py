"""The reaper: settles the record of VMs against the process table, which is the truth.

Floor 4, over ``host.registry`` and ``host.running``; `sweep` runs at each start, whoever starts.
It kills nothing but a QEMU: one that a record names, with the right start time, in this boot of
the host; or one that says by its name that it is a VM of this record, and whose runner is dead.
What a live runner owns it leaves alone, at whatever stage.  It holds the VM's start lock for the
time, so several may sweep at once, and beside starts.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vmkernel.errors import VmAlreadyStartingError, VmError, VmNotFoundError, VmStateError
from vmkernel.host import processes, running
from vmkernel.host.processes import ProcessIdentity
from vmkernel.host.registry import (
    Registry,
    VmRecord,
    VmStatus,
    status_of,
    vm_dir,
    vms_dir,
    where_it_lives,
)
from vmkernel.host.startlock import StartLock
from vmkernel.host.trees import remove_tree
from vmkernel.models import ENDED, VmState

if TYPE_CHECKING:
    from vmkernel.settings import Settings


def sweep(settings: Settings) -> list[str]:
    """Settle the record; the ids of the VMs that turned out dead.

    Ends what is left of them: their QEMU and their directory.  Never raises for what it cannot
    settle: it is logged (a QEMU that does not die: ORPHANED), and tried again at the next sweep.
    Raises RegistryError when there is no using the record at all.
    """
    with Registry(settings) as registry:
        # Where there is no database, what the process table shows is not to be settled by it.
        statuses = registry.list(ended=True) if registry.exists else []
        dead = [status.record.vm_id for status in statuses if _is_dead(status)]
        settled = [vm_id for vm_id in dead if _try(settings, registry, vm_id)]
        live = {status.record.vm_id for status in statuses if status.record.state not in ENDED}
        for qemu, vm_id in running.find_orphans(settings).items():
            if vm_id not in live:
                _kill(qemu, vm_id)
        for vm_id in _directories(settings) - live:
            _try(settings, registry, vm_id)
        registry.forget_old()
    return settled


def settle(settings: Settings, vm_id: str, *, locked: bool = False) -> bool:
    """Settle one VM's record as `sweep` does; whether it turned out dead.

    ``locked``: the caller holds its start lock.
    """
    with Registry(settings) as registry:
        if locked:
            return _settle(_place(settings, registry, vm_id), registry, vm_id)
        return _try(settings, registry, vm_id)


def rebuild(settings: Settings) -> list[VmRecord]:
    """Put VMs that run on record, where they are not; their rows, as the process table tells them.

    A new database begins so by itself.  Raises RegistryError.
    """
    added = []
    with Registry(settings) as registry:
        for record in running.find_running(settings):
            try:
                if registry.exactly(record.vm_id).state not in ENDED:
                    continue
            except VmNotFoundError:
                pass
            registry.add(record)
            added.append(record)
    return added


def _is_dead(status: VmStatus) -> bool:
    """Whether the record says that it lives, and no runner of it does."""
    if status.runner_alive or status.record.state in ENDED:
        return False
    # One that is to be kept and was never started is not dead, whoever made it.
    return not (status.record.state is VmState.CREATED and status.record.kept)


def _try(settings: Settings, registry: Registry, vm_id: str) -> bool:
    try:
        place = _place(settings, registry, vm_id)
        with StartLock.take(place, vm_id, cleaning=True):
            return _settle(place, registry, vm_id)
    except (VmAlreadyStartingError, VmNotFoundError):
        return False  # somebody is at it; or it is no VM's directory
    except (VmError, OSError) as error:
        _warn("cannot settle VM %s: %s", vm_id, error)
        return False


def _place(settings: Settings, registry: Registry, vm_id: str) -> Settings:
    """Settings that lead to this VM's start lock and socket, which another runtime_dir may have."""
    if registry.exists:
        with suppress(VmNotFoundError):
            place = where_it_lives(registry.exactly(vm_id), settings)
            if place.runtime_dir.is_dir():  # else there is no lock that anybody could hold
                return place
    return settings


def _settle(settings: Settings, registry: Registry, vm_id: str) -> bool:
    """With the start lock in hand: look again, end what is left, say so on record."""
    record = None
    with suppress(VmNotFoundError):
        record = registry.exactly(vm_id) if registry.exists else None
    dead = record is not None and _is_dead(status_of(record))
    if record is not None and not dead and record.state not in ENDED:
        return False  # it was started meanwhile
    if not _end_qemus(settings, vm_id, record if dead else None):
        if record is not None and dead and record.state is not VmState.ORPHANED:
            registry.update(vm_id, state=VmState.ORPHANED)
        return False
    directory = vm_dir(settings, vm_id)
    if record is not None or _is_old(directory):
        remove_tree(directory)
    if record is None or not dead:
        return False
    try:
        registry.update(
            vm_id,
            expected=record,
            state=VmState.FAILED,
            ended=time.time(),
            exit_cause=_cause(record),
        )
    except VmStateError:
        return False  # its runner had the last word after all
    return True


def _cause(record: VmRecord) -> str:
    if record.boot_id not in ("", processes.boot_id()):
        return "the host was restarted"
    if record.state is VmState.CREATED:
        return f"pid {record.runner_pid}, which was to start it, ended"
    return (
        f"its runner, pid {record.runner_pid}, was killed" if record.runner else "its runner died"
    )


def _end_qemus(settings: Settings, vm_id: str, record: VmRecord | None) -> bool:
    """Kill what QEMU there is of a dead VM; False when one does not die."""
    find = running.find_orphans if record is None else running.find_qemus
    left = {qemu for qemu, name in find(settings).items() if name == vm_id}
    if record is not None and status_of(record).qemu_alive and record.qemu is not None:
        if _is_qemu(settings, record.qemu.pid):
            left.add(record.qemu)
        elif not processes.arguments(record.qemu.pid):  # it is about to end: let it
            if not processes.wait_ended(record.qemu):
                return False
        else:
            _warn("pid %d of %s is no QEMU: left alone", record.qemu.pid, vm_id)
    killed = [_kill(qemu, vm_id) for qemu in left]  # all of them, whatever becomes of the first
    return all(killed)


def _kill(qemu: ProcessIdentity, vm_id: str) -> bool:
    if processes.kill(qemu):
        return True
    _warn("cannot kill pid %d, the QEMU of %s", qemu.pid, vm_id)
    return False


def _is_qemu(settings: Settings, pid: int) -> bool:
    program = Path(settings.qemu).name
    for _ in range(20):  # in the midst of execve a process has no command line, for an instant
        if processes.arguments(pid) or not processes.identify(pid):
            break
        time.sleep(0.005)
    # Not the first word alone: QEMU may run under a wrapper (bwrap … qemu-system-x86_64 …).
    names = (word.rpartition("/")[2] for word in processes.arguments(pid))
    return any(name == program or name.startswith("qemu-system-") for name in names)


def _directories(settings: Settings) -> set[str]:
    try:
        return {entry.name for entry in vms_dir(settings).iterdir()}
    except OSError:
        return set()


def _is_old(directory: Path) -> bool:
    try:
        # The clock may have been set back since
        return abs(time.time() - directory.stat().st_mtime) > running.YOUNG
    except OSError:
        return False


def _warn(message: str, *values: object) -> None:
    import logging

    logging.getLogger(__name__).warning(message, *values)
