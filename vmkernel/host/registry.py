"""The record of the VMs that run: one directory per VM, with ``vm.json`` in it.

    <runtime_dir>/vms/vm-1a2b3c4d/vm.json     besides the VM's sockets and whatever else it needs

The process table is the truth, the record only says where to look: each process is written down
with its start time (``processes.py``). ``sweep``, called at each start, settles one against the
other. No lock is needed: a directory appears under its name with its record already in it, and
disappears by being renamed first, so several processes may sweep and create at once.
A later issue puts SQLite behind the same functions.
"""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from vmkernel.errors import VmError, VmNotFoundError
from vmkernel.host import processes
from vmkernel.host.processes import ProcessIdentity
from vmkernel.settings import ensure_private_dir

if TYPE_CHECKING:
    from vmkernel.settings import Settings

_RECORD = "vm.json"
_NEW = ".new-"  # + pid - start time - VM id: being made by that process
_DEAD = ".dead-"  # + VM id - random: being removed by anyone


class VmState(StrEnum):
    """What the runner is at."""

    STARTING = "starting"
    WAITING = "waiting"  # for a slot
    RUNNING = "running"


class VmRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One VM. Change it with ``msgspec.structs.replace`` and ``write_record``."""

    vm_id: str
    owner: int  # uid
    created: float  # seconds since 1970
    runner_pid: int
    runner_start: int  # clock ticks since the host's boot, as in ProcessIdentity
    state: VmState = VmState.STARTING
    qemu_pid: int | None = None
    qemu_start: int | None = None
    slot: int | None = None
    kernel_id: str = ""
    connection_file: str = ""
    recipe: str = ""
    memory: int = 0  # MiB
    accelerator: str = ""
    console_log: str = ""

    @property
    def runner(self) -> ProcessIdentity:
        """The process that owns the VM."""
        return ProcessIdentity(self.runner_pid, self.runner_start)

    @property
    def qemu(self) -> ProcessIdentity | None:
        """The VM's QEMU; None before it was started."""
        if self.qemu_pid is None or self.qemu_start is None:
            return None
        return ProcessIdentity(self.qemu_pid, self.qemu_start)


class VmStatus(NamedTuple):
    """A record, and what the process table says to it."""

    record: VmRecord
    runner_alive: bool
    qemu_alive: bool


def create_vm_dir(
    settings: Settings,
    *,
    kernel_id: str = "",
    connection_file: str = "",
    recipe: str = "",
    memory: int = 0,
    accelerator: str = "",
) -> VmRecord:
    """A new VM id with its directory (mode 0700) and first record, run by this process.

    Raises VmError when the directory cannot be made, SettingsError when ``runtime_dir`` is
    another user's.
    """
    runner = processes.identify_self()
    ensure_private_dir(settings.runtime_dir)
    root = _vms(settings)
    while True:
        record = VmRecord(
            vm_id=f"vm-{os.urandom(4).hex()}",
            owner=os.geteuid(),
            created=time.time(),
            runner_pid=runner.pid,
            runner_start=runner.start_time,
            kernel_id=kernel_id,
            connection_file=connection_file,
            recipe=recipe,
            memory=memory,
            accelerator=accelerator,
        )
        final = root / record.vm_id
        new = root / f"{_NEW}{runner.pid}-{runner.start_time}-{record.vm_id}"
        try:
            root.mkdir(mode=0o700, exist_ok=True)
            new.mkdir(mode=0o700)
            (new / _RECORD).write_bytes(msgspec.json.encode(record))
            if final.exists():  # one in 2**32; the rename would fail on it, as it is not empty
                _remove_tree(new)
                continue
            new.rename(final)
        except OSError as error:
            _remove_tree(new)
            raise _unwritable(root, error) from error
        return record


def vm_dir(settings: Settings, vm_id: str) -> Path:
    """Where this VM's sockets and files lie, whether it exists or not."""
    return _vms(settings) / vm_id


def write_record(settings: Settings, record: VmRecord) -> None:
    """Replace the VM's record, at one stroke for readers.

    Raises VmNotFoundError when the VM's directory is gone, VmError when it cannot be written.
    """
    path = vm_dir(settings, record.vm_id) / _RECORD
    temporary = path.with_name(f"{_RECORD}.{os.getpid()}")
    try:
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.rename(path)
    except FileNotFoundError as error:
        raise VmNotFoundError(
            f"there is no VM {record.vm_id}: its directory {path.parent} is gone",
            hint="see which VMs there are: `vmkernel ps`",
        ) from error
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path.parent, error) from error


def remove_vm(settings: Settings, vm_id: str) -> None:
    """Remove the VM's directory and record; again, or from two processes at once, is harmless."""
    directory = vm_dir(settings, vm_id)
    grave = directory.with_name(f"{_DEAD}{vm_id}-{os.urandom(4).hex()}")
    try:
        directory.rename(grave)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(directory.parent, error) from error
    _remove_tree(grave)


def list_vms(settings: Settings) -> list[VmStatus]:
    """Every recorded VM of this user, the oldest first, with what lives of it."""
    found = [
        VmStatus(record, processes.is_alive(record.runner), processes.is_alive(record.qemu))
        for name in _entries(settings)
        if not name.startswith(".") and (record := _read(settings, name))
    ]
    found.sort(key=lambda status: status.record.created)
    return found


def sweep(settings: Settings) -> list[str]:
    """Settle the records: remove every VM whose runner is dead, and kill its QEMU if that lives.

    Returns the ids of the VMs removed. Kills nothing but a QEMU: one that a record names, with the
    right start time, or one with the VM's directory in its command line. Leaves alone what a live
    runner owns, at whatever stage. Safe from several processes at once; never raises for what it
    cannot remove (it is logged, and tried again at the next sweep).
    """
    removed = []
    for name in _entries(settings):
        try:
            if name.startswith(_DEAD):
                _remove_tree(_vms(settings) / name)
            elif name.startswith(_NEW):
                pid, start_time, _ = name.removeprefix(_NEW).split("-", 2)
                if not processes.is_alive(ProcessIdentity(int(pid), int(start_time))):
                    _remove_tree(_vms(settings) / name)
            elif _settle(settings, name):
                removed.append(name)
        except (VmError, OSError, ValueError) as error:
            _warn("cannot sweep %s: %s", _vms(settings) / name, error)
    return removed


def name_of_runner(settings: Settings, pid: int) -> str:
    """What the process runs: the VM's id and its kernel's; "" when it is no runner of this user."""
    for status in list_vms(settings):
        record = status.record
        if pid in (record.runner_pid, record.qemu_pid):
            return record.vm_id + (f", kernel {record.kernel_id}" if record.kernel_id else "")
    return ""


def _settle(settings: Settings, vm_id: str) -> bool:
    record = _read(settings, vm_id)
    if record is None or processes.is_alive(record.runner):
        return False
    left = [record.qemu] if record.qemu else _strays(vm_dir(settings, vm_id))
    for qemu in left:
        if not processes.is_alive(qemu):
            continue
        if not _is_qemu(settings, qemu.pid):
            _warn("pid %d of %s is no QEMU: left alone", qemu.pid, vm_id)
        elif not processes.kill(qemu):
            _warn("cannot kill pid %d, the QEMU of %s", qemu.pid, vm_id)
            return False
    remove_vm(settings, vm_id)
    return True


def _strays(directory: Path) -> list[ProcessIdentity]:
    """QEMUs of a runner that died between starting one and writing it down."""
    name, below = f"vmkernel-{directory.name}", f"{directory}/"  # its -name, a path in it
    return [
        identity
        for pid in processes.own_processes()
        if any(word.split(".")[0] == name or below in word for word in processes.arguments(pid))
        and (identity := processes.identify(pid))
    ]


def _is_qemu(settings: Settings, pid: int) -> bool:
    program = Path(settings.qemu).name
    for _ in range(20):  # in the midst of execve a process has no command line, for an instant
        if processes.arguments(pid) or not processes.identify(pid):
            break
        time.sleep(0.005)
    # Not the first word alone: QEMU may run under a wrapper (bwrap … qemu-system-x86_64 …).
    names = (word.rpartition("/")[2] for word in processes.arguments(pid))
    return any(name == program or name.startswith("qemu-system-") for name in names)


def _read(settings: Settings, vm_id: str) -> VmRecord | None:
    """The record; None when it is gone or damaged (logged; left for a person to look at)."""
    path = vm_dir(settings, vm_id) / _RECORD
    try:
        record = msgspec.json.decode(path.read_bytes(), type=VmRecord)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        _warn("the record %s is unreadable: %s", path, error)
        return None
    return record if record.vm_id == vm_id else None


def _vms(settings: Settings) -> Path:
    return settings.runtime_dir / "vms"


def _entries(settings: Settings) -> list[str]:
    try:
        with os.scandir(_vms(settings)) as entries:
            return [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unwritable(_vms(settings), error) from error


def _remove_tree(directory: Path) -> None:
    import shutil  # not before something is to be removed: it imports the compressors

    shutil.rmtree(directory, ignore_errors=True)


def _warn(message: str, *values: object) -> None:
    import logging  # rarely needed, and this module is on the kernel's start path

    logging.getLogger(__name__).warning(message, *values)


def _unwritable(directory: Path, error: OSError) -> VmError:
    return VmError(
        f"cannot use the VM directory {directory}: {error.strerror or error}",
        hint="make room and check permissions there, or set runtime_dir (VMKERNEL_RUNTIME_DIR) "
        "to a place of your own",
    )
