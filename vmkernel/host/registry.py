"""The record of VMs: one row for each, in an SQLite database that many processes share.

Floor 4, over ``host.schema`` (the file).  The process table is the truth, the record only says
where to look: each process is written down with its start time and the host's boot, and what is
told of a VM (`VmStatus`) is corrected by what lives.  ``host.reaper`` settles one against the
other.

A connection is made at first use and kept.  Measured here: opening costs 0.4 ms, a change 0.1 ms;
closing the last one copies the log into the file and waits for the disk (0.7 ms here, tens on slow
disks), which nobody on the way to a first cell should.  The module itself imports no sqlite3: it
lies on the kernel's start path, where the record is written after QEMU was spawned.
"""

from __future__ import annotations

import builtins
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from vmkernel.errors import RegistryError, VmNotFoundError, VmStateError
from vmkernel.host import processes
from vmkernel.host.processes import ProcessIdentity
from vmkernel.models import ENDED, TRANSITIONS, VmState

if TYPE_CHECKING:
    import sqlite3

    from vmkernel.host.schema import Opened
    from vmkernel.settings import Settings

KEPT_ROWS = 200
"""How many VMs that ended and were not to be kept stay on record."""

_T = TypeVar("_T")
_ID = re.compile(r"vm-[0-9a-f]{8}")
_NOT_ENDED = f"state NOT IN ({', '.join(repr(str(state)) for state in sorted(ENDED))})"


class VmRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One VM, as it is on record.  `Registry.update` changes it."""

    vm_id: str
    """``vm-`` and 8 hexadecimal digits."""
    name: str = ""
    """Unique among the VMs on record; most have none."""
    owner: int
    """uid"""
    state: VmState = VmState.CREATED
    created: float
    """Seconds since the epoch, as are the next two."""
    started: float | None = None
    ended: float | None = None
    boot_id: str = ""
    """Of the host: the pids and start times below mean something within this boot only."""
    runner_pid: int = 0
    """0: nobody yet.  While it is CREATED, the process that is creating it."""
    runner_start: int = 0
    """Clock ticks since the host's boot, as in `ProcessIdentity`."""
    qemu_pid: int = 0
    qemu_start: int = 0
    slot: int | None = None
    slot_lease: int = 0
    """`Slot.lease`: tells this taking of the slot from a later one."""
    template: str = ""
    """Its key."""
    recipe: str = ""
    language: str = ""
    accelerator: str = ""
    memory: int = 0
    """MiB"""
    vcpus: int = 1
    tenant_id: str = ""
    task_id: str = ""
    kernel_id: str = ""
    connection_file: str = ""
    notebook: str = ""
    directory: str = ""
    """Where a runner's socket lies; "" for a notebook's kernel."""
    log_dir: str = ""
    """Where qemu.log, console.log and runner.log lie."""
    settings: str = ""
    """JSON of the settings that it was created with, for a later start."""
    kept: bool = False
    """It outlives its creator, and can be started again."""
    exit_cause: str = ""
    """How it ended, in one line for people."""
    workspace: str = ""
    """This and the next three are in words (`host.openings`); "": an older vmkernel's."""
    network: str = ""
    environment: str = ""
    """Names of variables; a value is never on record."""
    files: str = ""

    @property
    def runner(self) -> ProcessIdentity | None:
        """The process that owns the VM."""
        return ProcessIdentity(self.runner_pid, self.runner_start) if self.runner_pid else None

    @property
    def qemu(self) -> ProcessIdentity | None:
        """The VM's QEMU; None before it was started."""
        return ProcessIdentity(self.qemu_pid, self.qemu_start) if self.qemu_pid else None


class VmStatus(NamedTuple):
    """A record, and what the process table says to it."""

    record: VmRecord
    runner_alive: bool
    qemu_alive: bool

    @property
    def state(self) -> VmState:
        """The record's, corrected by what really lives."""
        state = self.record.state
        if state in ENDED:
            return state
        if state is VmState.CREATED:
            waits = self.runner_alive or self.record.kept
            return state if waits else VmState.FAILED
        if not self.runner_alive:
            return VmState.ORPHANED if self.qemu_alive else VmState.FAILED
        if state is VmState.RUNNING and not self.qemu_alive:
            return VmState.FAILED
        return state


def status_of(record: VmRecord) -> VmStatus:
    """Ask the process table; nothing of an earlier boot lives."""
    if record.boot_id not in ("", processes.boot_id()):
        return VmStatus(record, False, False)
    return VmStatus(record, processes.is_alive(record.runner), processes.is_alive(record.qemu))


def new_record(**fields: Any) -> VmRecord:
    """A record that is in no database yet: fresh id, run by this process unless fields say else."""
    runner = processes.identify_self()
    known: dict[str, Any] = {
        "vm_id": f"vm-{os.urandom(4).hex()}",
        "owner": os.geteuid(),
        "created": time.time(),
        "boot_id": processes.boot_id(),
        "runner_pid": runner.pid,
        "runner_start": runner.start_time,
    }
    return VmRecord(**{**known, **fields})


class _Place(msgspec.Struct):
    runtime_dir: str = ""
    semaphore_file: str = ""


def where_it_lives(record: VmRecord, settings: Settings) -> Settings:
    """The settings, with the VM's own place for sockets and start locks, and its slots' file.

    Who looks at a VM may have others: a cron job has no XDG_RUNTIME_DIR.
    """
    try:
        place = msgspec.json.decode(record.settings or b"{}", type=_Place)
    except msgspec.DecodeError:
        return settings
    changes = {name: Path(path) for name, path in msgspec.structs.asdict(place).items() if path}
    return msgspec.structs.replace(settings, **changes) if changes else settings


def vms_dir(settings: Settings) -> Path:
    """Where the directories of this record's VMs lie: other records may share ``runtime_dir``."""
    return settings.runtime_dir / f"vms-{processes.tag_of(settings.database_file)}"


def vm_dir(settings: Settings, vm_id: str) -> Path:
    """Where the socket of this VM's runner lies, whether it exists or not."""
    return vms_dir(settings) / vm_id


class Registry:
    """The record of VMs.  Cheap to make: the database is opened, or made, at first use.

    May be used from several threads, one at a time; each call may block, for
    ``settings.database_timeout`` seconds at most.  All raise RegistryError when the database cannot
    be used.  Looking into a database that is not there makes none.
    """

    def __init__(self, settings: Settings) -> None:
        import threading  # not at the module's import, which is before everything else

        self.path = settings.database_file
        self._settings = settings
        self._timeout = settings.database_timeout
        self._mutex = threading.Lock()
        self._opened: Opened | None = None
        self._pid = 0

    def __repr__(self) -> str:
        state = "not open" if self._opened is None else "open"
        return f"<Registry {self.path} {state}>"

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def exists(self) -> bool:
        """Whether there is a database already."""
        return os.path.lexists(self.path)

    def close(self) -> None:
        """Close the database; the next use opens it again."""
        with self._mutex:
            self._close()

    def new(self, **fields: Any) -> VmRecord:
        """A new VM, with these fields; its row is there when this returns.

        Raises VmStateError when another VM has its name.
        """
        while True:
            record = new_record(**fields)
            if self._write(partial(_insert, record=record, replace=False)):
                return record

    def add(self, record: VmRecord) -> None:
        """Put a VM on record; a row that is there (found again by somebody) gives way.

        Raises VmStateError when another VM has its name.
        """
        self._write(lambda connection: _insert(connection, record, replace=True))

    def update(self, vm_id: str, *, expected: VmRecord | None = None, **changes: Any) -> VmRecord:
        """Change a VM's row, and return what it is now.

        Raises VmNotFoundError, and VmStateError when its state may not be followed by the new one,
        another VM has its new name, or the row is not the ``expected`` one any more.
        """

        def work(connection: sqlite3.Connection) -> VmRecord:
            old = _read(connection, vm_id)
            if old is None:
                raise _not_found(vm_id, [])
            new = msgspec.structs.replace(old, **changes)
            if new.state is not old.state and new.state not in TRANSITIONS[old.state]:
                raise VmStateError(
                    f"VM {vm_id} is {old.state}, so it cannot become {new.state}",
                    hint="see what it is at: `vmkernel ps`",
                )
            if expected is not None and old != expected:
                raise VmStateError(
                    f"the record of VM {vm_id} was changed meanwhile: it is {old.state}",
                    hint="see what it is at: `vmkernel ps`",
                )
            if new != old:
                _insert(connection, new, replace=True)
            return new

        return self._write(work)

    def get(self, vm: str) -> VmRecord:
        """The VM with this id or name, or the one whose id begins so.

        Raises VmNotFoundError, which names those that may have been meant.
        """
        rows = {record.vm_id: record for record in self._rows("")}
        if found := rows.get(vm):
            return found
        if _ID.fullmatch(vm):  # a name does not stand in for the id of a VM that is gone
            raise _not_found(vm, list(rows.values()))
        named = [record for record in rows.values() if vm and record.name == vm]
        begin = [
            record
            for record in rows.values()
            if len(vm) > 1 and record.vm_id.startswith((vm, f"vm-{vm}")) and vm != "vm-"
        ]
        if found := next(iter(named), begin[0] if len(begin) == 1 else None):
            return found
        raise _not_found(vm, begin or list(rows.values()), several=len(begin))

    def exactly(self, vm_id: str) -> VmRecord:
        """The VM with this id; no name will do.  Raises VmNotFoundError."""
        if self.exists:
            found = self._read(lambda connection: _read(connection, vm_id))
        else:
            found = next((record for record in self._rows("") if record.vm_id == vm_id), None)
        if found is None:
            raise _not_found(vm_id, [])
        return found

    def status(self, vm_id: str) -> VmStatus:
        """What is on record of this VM, and what lives of it.  Raises VmNotFoundError."""
        return status_of(self.exactly(vm_id))

    def change(self, vm_id: str, changes: Callable[[VmRecord], dict[str, Any]]) -> VmRecord:
        """`update` by what ``changes`` makes of the row as it is, nobody else's change between.

        Raises VmNotFoundError, VmStateError, and what ``changes`` raises.
        """
        while True:
            record = self.exactly(vm_id)
            new = changes(record)
            try:
                return self.update(vm_id, expected=record, **new)
            except VmStateError:
                if self.exactly(vm_id) == record:  # not because of somebody else's change
                    raise

    def list(self, *, ended: bool = False) -> builtins.list[VmStatus]:
        """The VMs on record with what lives of them, the oldest first; ended ones when asked."""
        return [status_of(record) for record in self._rows("" if ended else _NOT_ENDED)]

    def remove(self, vm_id: str) -> None:
        """Forget the VM; again is harmless."""
        if self.exists:
            self._write(
                lambda connection: connection.execute("DELETE FROM vms WHERE vm_id = ?", (vm_id,))
            )

    def forget_old(self, keep: int = KEPT_ROWS) -> None:
        """Forget all but the newest of those that ended and were not to be kept.

        What is among the newest by the order of rows stays as well: after a step of the clock, the
        VMs that ended last may seem to have ended first.
        """
        old = f"SELECT vm_id FROM vms WHERE NOT kept AND NOT ({_NOT_ENDED}) ORDER BY"  # noqa: S608
        beyond = [f"({old} {order} DESC LIMIT -1 OFFSET :keep)" for order in ("ended", "rowid")]
        which = " AND ".join(f"vm_id IN {found}" for found in beyond)
        question, command = f"SELECT 1 FROM vms WHERE {which}", f"DELETE FROM vms WHERE {which}"  # noqa: S608
        values = {"keep": keep}
        if self.exists and self._read(lambda known: known.execute(question, values).fetchone()):
            self._write(lambda known: known.execute(command, values))

    def _rows(self, condition: str) -> builtins.list[VmRecord]:
        if not self.exists:
            from vmkernel.host.running import find_running

            return sorted(find_running(self._settings), key=lambda record: record.created)
        question = f"SELECT * FROM vms WHERE {condition or 'TRUE'} ORDER BY created, rowid"  # noqa: S608
        return self._read(lambda connection: [_record(row) for row in connection.execute(question)])

    def _read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        return self._do(work)

    def _write(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        from vmkernel.host.schema import transaction

        def change(connection: sqlite3.Connection) -> _T:
            with transaction(connection):
                return work(connection)

        return self._do(change)

    def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        import sqlite3

        from vmkernel.host import schema

        # Its wait counts, too: ten threads of a process would wait ten times as long as promised
        if not self._mutex.acquire(timeout=self._timeout):
            raise schema.locked(self.path, self._timeout)
        try:
            for _ in range(3):  # each round a damaged file was found, which is as good as never
                inode = schema.inode_of(self.path)
                try:
                    return work(self._current())
                except sqlite3.Error as error:
                    if self._opened is not None:
                        inode = self._opened.inode
                    if not schema.is_passing(error):
                        self._close()
                    if not schema.is_damage(error):
                        raise schema.explain(error, self.path, self._timeout) from error
                    aside = schema.set_aside(self.path, inode, self._timeout)
                    if aside is not None:
                        _warn("the record of VMs was damaged (%s) and is now %s", error, aside)
        finally:
            self._mutex.release()
        raise RegistryError(
            f"the record of VMs, {self.path}, is damaged again and again",
            hint="check the disk it lies on, or point database_file to another",
        )

    def _current(self) -> sqlite3.Connection:
        """The connection to the file that the path leads to now, made by this process."""
        from vmkernel.host import schema

        if self._opened is not None and (
            self._pid != os.getpid() or schema.inode_of(self.path) != self._opened.inode
        ):
            self._close()
        if self._opened is None:
            self._opened = schema.open_database(self.path, self._timeout, self._fill)
            self._pid = os.getpid()
        return self._opened.connection

    def _fill(self, connection: sqlite3.Connection) -> None:
        """A new database begins with the VMs that run: the one before was damaged, or is lost."""
        from vmkernel.host.running import find_running

        found = find_running(self._settings)
        for record in found:
            _insert(connection, record, replace=True)
        # A kernel's very first start is ahead of the record with its own VM: that is no news.
        others = [record.vm_id for record in found if record.runner_pid != os.getpid()]
        if others:
            _warn("VMs that run were put on the new record %s: %s", self.path, ", ".join(others))

    def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.connection.close()


def name_of_runner(settings: Settings, pid: int, lease: int = 0) -> str:
    """What the process runs: the VM's id and its kernel's; "" when it is no runner of this user.

    ``lease``: of the slot that it took; who creates VMs takes a slot for each of them.
    """
    try:
        with Registry(settings) as registry:
            statuses = registry.list()
    except RegistryError:
        return ""  # it is for a message that has something else to tell
    for record, _, _ in sorted(statuses, key=lambda status: status.record.slot_lease != lease):
        if pid in (record.runner_pid, record.qemu_pid) or (lease and record.slot_lease == lease):
            return record.vm_id + (f", kernel {record.kernel_id}" if record.kernel_id else "")
    return ""


def _insert(connection: sqlite3.Connection, record: VmRecord, *, replace: bool) -> bool:
    """Whether it was inserted; False when the id is taken, and is not to be replaced."""
    if not replace and _read(connection, record.vm_id):
        return False
    if record.name:
        other = connection.execute(
            "SELECT * FROM vms WHERE name = ? AND vm_id != ?", (record.name, record.vm_id)
        ).fetchone()
        if other is not None:
            holder = _record(other)
            if holder.kept or holder.state not in ENDED:
                raise VmStateError(
                    f"there is a VM {record.name!r} already: {holder.vm_id}, {holder.state}",
                    hint=f"take another name, or forget that one: `vmkernel rm {record.name}`",
                )
            connection.execute("UPDATE vms SET name = '' WHERE vm_id = ?", (holder.vm_id,))
    values = msgspec.structs.asdict(record)
    columns, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
    changes = ", ".join(f"{name} = excluded.{name}" for name in values if name != "vm_id")
    connection.execute(
        f"INSERT INTO vms ({columns}) VALUES ({marks}) "  # noqa: S608 - our own field names
        f"ON CONFLICT (vm_id) DO UPDATE SET {changes}",
        {**values, "state": str(record.state)},
    )
    return True


def _read(connection: sqlite3.Connection, vm_id: str) -> VmRecord | None:
    row = connection.execute("SELECT * FROM vms WHERE vm_id = ?", (vm_id,)).fetchone()
    return None if row is None else _record(row)


def _record(row: sqlite3.Row) -> VmRecord:
    try:
        return msgspec.convert(dict(row), VmRecord, strict=False)
    except msgspec.ValidationError as error:
        import sqlite3

        from vmkernel.host.schema import NONSENSE

        raise sqlite3.DatabaseError(f"{NONSENSE}: {error}, in a row") from error


def _not_found(vm: str, candidates: list[VmRecord], several: int = 0) -> VmNotFoundError:
    from difflib import get_close_matches

    names = [record.vm_id + (f" ({record.name})" if record.name else "") for record in candidates]
    if several:
        text = f"several VMs begin with {vm!r}: {', '.join(names[:8])}"
    else:
        close = [
            name
            for record, name in zip(candidates, names, strict=True)
            if vm and get_close_matches(vm, [record.vm_id, record.name], cutoff=0.7)
        ]
        text = f"there is no VM {vm!r}" + (
            f"; close to it: {', '.join(close[:3])}" if close else ""
        )
    return VmNotFoundError(text, hint="see which VMs there are: `vmkernel ps`")


def _warn(message: str, *values: object) -> None:
    import logging  # rarely needed, and this module is on the kernel's start path

    logging.getLogger(__name__).warning(message, *values)
