"""The database file under the record of VMs: how it is opened, made, migrated and set aside.

Floor 4, under ``host.registry``, which alone uses it.  SQLite in WAL mode, so that readers and the
one writer do not wait for each other.  Every opening holds a lock on ``<file>.lock`` for its
millisecond: of many processes that meet an old or a damaged file at once, one migrates it or sets
it aside, and the others find that done.  (SQLite's own locks cannot guard a rename of the file.)

``synchronous=NORMAL``: a crash of the host may lose the last few changes, never the file; it ends
every VM as well.  A commit then costs no fsync, only a checkpoint does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmkernel.errors import RegistryError
from vmkernel.host import processes

if TYPE_CHECKING:  # 10 ms and 1 MiB: only who uses the record pays for it
    import sqlite3

# Step n leads from version n to n + 1.  A step is never changed once it was released, and adds
# columns with defaults only: processes of the version before go on using the file meanwhile.
STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE vms (
            vm_id TEXT PRIMARY KEY,
            name TEXT NOT NULL DEFAULT '',
            owner INTEGER NOT NULL,
            state TEXT NOT NULL,
            created REAL NOT NULL,
            started REAL,
            ended REAL,
            runner_pid INTEGER NOT NULL DEFAULT 0,
            runner_start INTEGER NOT NULL DEFAULT 0,
            qemu_pid INTEGER NOT NULL DEFAULT 0,
            qemu_start INTEGER NOT NULL DEFAULT 0,
            slot INTEGER,
            template TEXT NOT NULL DEFAULT '',
            recipe TEXT NOT NULL DEFAULT '',
            language TEXT NOT NULL DEFAULT '',
            accelerator TEXT NOT NULL DEFAULT '',
            memory INTEGER NOT NULL DEFAULT 0,
            vcpus INTEGER NOT NULL DEFAULT 1,
            tenant_id TEXT NOT NULL DEFAULT '',
            task_id TEXT NOT NULL DEFAULT '',
            kernel_id TEXT NOT NULL DEFAULT '',
            connection_file TEXT NOT NULL DEFAULT '',
            notebook TEXT NOT NULL DEFAULT '',
            directory TEXT NOT NULL DEFAULT '',
            log_dir TEXT NOT NULL DEFAULT '',
            exit_cause TEXT NOT NULL DEFAULT ''
        )""",
        "CREATE UNIQUE INDEX names ON vms (name) WHERE name != ''",
    ),
    (
        "ALTER TABLE vms ADD COLUMN boot_id TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE vms ADD COLUMN slot_lease INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE vms ADD COLUMN settings TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE vms ADD COLUMN kept INTEGER NOT NULL DEFAULT 0",
    ),
    (
        "ALTER TABLE vms ADD COLUMN workspace TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE vms ADD COLUMN network TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE vms ADD COLUMN environment TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE vms ADD COLUMN files TEXT NOT NULL DEFAULT ''",
    ),
)
VERSION = len(STEPS)
"""Of the schema, as ``PRAGMA user_version`` of the file has it."""

NONSENSE = "it makes no sense"
"""How the message of a sqlite3.DatabaseError of ours begins: what was read cannot be a record."""

Inode = tuple[int, int]

_LOCK_POLL = 0.005
# Result codes, https://sqlite.org/rescode.html
_BUSY, _LOCKED, _CORRUPT, _FULL, _PROTOCOL, _NOTADB = 5, 6, 11, 13, 15, 26
_SHORT_READ = 522  # extended, of IOERR: the file ends in the midst of a page


class Opened(NamedTuple):
    """A connection, and the file that it is to: the path may lead to another one later."""

    connection: sqlite3.Connection
    inode: Inode


def open_database(path: Path, timeout: float, fill: Callable[[sqlite3.Connection], None]) -> Opened:
    """Open the database, in the newest schema; one that is not there is made.

    ``fill`` puts the first rows into a new one, before anybody else sees it.  Raises RegistryError
    when that cannot be done or is not done within ``timeout`` seconds, and sqlite3.Error.
    """
    import sqlite3

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _lock(path, timeout):
            # SQLite would make it as the umask says, and its companions with the same mode.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            inode = inode_of(path)
            if path.stat().st_size == 0 and path.with_name(path.name + "-wal").exists():
                # Cut short by somebody. SQLite would drop the log, which others may be writing to.
                raise sqlite3.DatabaseError(f"{NONSENSE}: it is empty, and its log is not")
            connection = sqlite3.connect(
                path, timeout=timeout, isolation_level=None, check_same_thread=False
            )
            try:
                connection.row_factory = sqlite3.Row
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                _bring_up(connection, path, fill)
            except BaseException:
                connection.close()
                raise
    except OSError as error:
        raise unusable(path, error.strerror or str(error)) from error
    assert inode is not None
    return Opened(connection, inode)


def inode_of(path: Path) -> Inode | None:
    """Which file the path leads to now; None when to none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def set_aside(path: Path, damaged: Inode | None, timeout: float) -> Path | None:
    """Rename the damaged file, and SQLite's companions of it, unless somebody has already.

    Returns its new name.  Raises RegistryError when it cannot be renamed.
    """
    try:
        with _lock(path, timeout):
            if damaged is None or inode_of(path) != damaged:
                return None
            target = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
            while target.exists():
                target = target.with_name(target.name + "x")
            # A connection that somebody still has to it goes on with the renamed files; SQLite
            # deletes no companions by their old names when it finds that the file has moved.
            for suffix in ("-wal", "-shm", ""):
                with contextlib.suppress(FileNotFoundError):
                    path.with_name(path.name + suffix).rename(
                        target.with_name(target.name + suffix)
                    )
            return target
    except OSError as error:
        raise unusable(path, f"it is damaged and cannot be renamed: {error.strerror}") from error


def is_damage(error: sqlite3.Error) -> bool:
    """Whether this error says that the file's content is not what it should be."""
    code = getattr(error, "sqlite_errorcode", 0)
    return (
        code & 0xFF in (_CORRUPT, _NOTADB)
        or code == _SHORT_READ
        # The file says that it is of this version, and what belongs to that is not there.
        or str(error).startswith(
            ("no such table", "no such column", "table vms has no column", NONSENSE)
        )
    )


def is_passing(error: sqlite3.Error) -> bool:
    """Whether the connection is as good as before: it was locked, or the disk full."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (_BUSY, _LOCKED, _FULL)


def explain(error: sqlite3.Error, path: Path, timeout: float) -> RegistryError:
    """What to tell a person about an operation on the database that failed."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (_BUSY, _LOCKED, _PROTOCOL):
        return locked(path, timeout)
    return unusable(path, str(error), code)


def locked(path: Path, timeout: float) -> RegistryError:
    """The error for a database that others have not left in time."""
    return _locked(path, timeout, path.with_name(path.name + "-shm"), path)


def unusable(path: Path, why: str, code: int = 0) -> RegistryError:
    """The error for a file that cannot be used, and what to do about it."""
    place = "point the setting database_file (VMKERNEL_DATABASE_FILE) to a place of your own"
    if path.is_dir():
        why, hint = "it is a directory", place
    elif code == _FULL or "No space left" in why:
        hint = f"free space on the file system of {path.parent}, or {place}"
    else:
        hint = f"check permissions and space in {path.parent}, or {place}"
    return RegistryError(f"cannot use the record of VMs, {path}: {why}", hint=hint)


def _bring_up(
    connection: sqlite3.Connection, path: Path, fill: Callable[[sqlite3.Connection], None]
) -> None:
    version = _version(connection)
    if version > VERSION:
        raise RegistryError(
            f"the record of VMs, {path}, was made by a newer vmkernel: its schema is version "
            f"{version}, this one knows versions up to {VERSION}",
            hint="use the newer vmkernel, or point the setting database_file "
            "(VMKERNEL_DATABASE_FILE) to another file",
        )
    if version == VERSION:
        return
    if version == 0:
        if connection.execute("SELECT name FROM sqlite_master").fetchone():
            raise unusable(path, "it is another program's database")
        with transaction(connection):  # at one stroke: nobody sees it half made
            for step in STEPS:
                _take(connection, step)
            fill(connection)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        return
    _back_up(connection, path.with_name(f"{path.name}.v{version}.bak"))
    for number in range(version, VERSION):
        with transaction(connection):
            _take(connection, STEPS[number])
            connection.execute(f"PRAGMA user_version = {number + 1}")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing of what is written inside; waits for other writers before, not in between."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors have rolled it back already
            connection.execute("ROLLBACK")
        raise


def _take(connection: sqlite3.Connection, step: tuple[str, ...]) -> None:
    for statement in step:
        connection.execute(statement)


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _back_up(connection: sqlite3.Connection, target: Path) -> None:
    """Copy the whole database; it has its name only when it is whole."""
    import sqlite3

    new = target.with_name(target.name + ".new")
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(new)) as copy:
        connection.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, without companions
    new.replace(target)


@contextlib.contextmanager
def _lock(path: Path, timeout: float) -> Iterator[None]:
    lock = path.with_name(path.name + ".lock")  # never removed: somebody may be waiting on it
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _locked(path, timeout, lock) from None
                time.sleep(_LOCK_POLL)
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path, timeout: float, *locked: Path) -> RegistryError:
    holders = [pid for file in locked for pid in processes.lock_holders(file)]
    names = [
        f"pid {pid} ({name})" if (name := processes.describe(pid)) else f"pid {pid}"
        for pid in dict.fromkeys(holders)
        if pid != os.getpid()
    ]
    who = f"by {', '.join(names)}" if names else "by another process"
    return RegistryError(
        f"the record of VMs, {path}, stayed locked {who} for longer than {timeout:g} s",
        hint="is that process stopped or stuck? let it go on or end it; the setting "
        "database_timeout (VMKERNEL_DATABASE_TIMEOUT) says how long to wait",
    )
