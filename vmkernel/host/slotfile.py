"""One semaphore file: what its locks mean, and how it is opened.

The file stays empty. All it says, it says by locks (``locks.py``), so that there is nothing to
get damaged, to fill a disk or to clean up after a crash; these ranges of bytes are used:

====================  ==========================================================================
byte                  locked while
====================  ==========================================================================
i < MAX_SLOTS         slot i is held
TICKETS + n           someone waits with number n; a newcomer takes the highest live number + 1
LEASES + i,pid,serial slot i is held by *this* taking of it. The same descriptor holds it as byte
                      i, so both go at one instant; the number is never used twice. It tells a
                      slot that is still ours from one that was freed and taken by another, and
                      who took it (a hint: the taker may be dead and its VM alive)
USERS + uid,i         one of the host's slots is held, or waited for, as the i-th of this user's
USER_TICKETS + uid,n  someone waits to be one of this user's so many
====================  ==========================================================================

Taking a ticket needs no mutex: two that pick the same number find out by the lock, and the loser
picks again. So a process that is stopped or killed at any point blocks nobody's arrival.

Rejected: a ticket counter and owner records inside the file (content can be garbage, the disk
full, a write half done); ``flock`` (one lock per file); named POSIX semaphores (not freed by the
holder's death); one file per slot (no queue, and files to clean up).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

from vmkernel.errors import VmCapacityError
from vmkernel.host.locks import all_locks, find_lock, try_lock, unlock

MAX_SLOTS = 1 << 14
_TICKETS = 1 << 61
_LEASES = 1 << 62
_USERS = 1 << 60
_USER_TICKETS = _USERS + (1 << 59)
_USER_TICKET_BITS = 26  # user ids have 32
_PID_BITS = 22  # Linux: PID_MAX_LIMIT is 2**22 on 64-bit machines, proc(5)
_SERIAL_BITS = 26

_serial = int.from_bytes(os.urandom(4), "little")


def _new_lease(index: int) -> int:
    """A byte that no other taking of a slot has: random start per process, then counted up."""
    global _serial
    _serial += 1
    serial = _serial & ((1 << _SERIAL_BITS) - 1)
    return _LEASES + (((index << _PID_BITS) + os.getpid()) << _SERIAL_BITS) + serial


def _lease_range(index: int) -> tuple[int, int]:
    start = _LEASES + (index << (_PID_BITS + _SERIAL_BITS))
    return start, start + (1 << (_PID_BITS + _SERIAL_BITS))


class Realm(NamedTuple):
    """Whose slots are meant, and where in the file their bytes lie."""

    slots: int
    tickets: int
    end: int
    """Of the tickets."""


HOST = Realm(0, _TICKETS, _LEASES)
"""The slots of all users."""


def realm_of(uid: int) -> Realm:
    """The slots of one user, of which each is also one of the host's."""
    tickets = _USER_TICKETS + (uid << _USER_TICKET_BITS)
    return Realm(_USERS + uid * MAX_SLOTS, tickets, tickets + (1 << _USER_TICKET_BITS))


class SlotFile:
    """One inode of the semaphore file; lives as long as someone refers to it.

    Holds a read-only descriptor for looking. Each slot and each ticket gets a descriptor of its
    own by ``open_lockable``, since locks belong to the open file description.
    """

    def __init__(self, path: Path, realm: Realm = HOST) -> None:
        """Open ``path``, creating it (mode 0600) if need be; VmCapacityError when that fails."""
        self.path = path
        self.realm = realm
        self._probe = -1  # for __del__, should opening fail
        try:
            self._probe = _open_or_create(path)
            status = os.fstat(self._probe)
        except OSError as error:
            raise explain(error, path) from error
        self.inode = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode):
            raise VmCapacityError(
                f"the semaphore file {path} is not a regular file",
                hint="remove it, or point the setting semaphore_file elsewhere",
            )

    def __del__(self) -> None:
        if self._probe >= 0:
            os.close(self._probe)

    def fileno(self) -> int:
        """The read-only descriptor."""
        return self._probe

    def is_current(self) -> bool:
        """Whether the path still leads to this inode: false once removed or replaced."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.inode

    def open_lockable(self) -> int:
        """A new close-on-exec descriptor of this inode, even when its path is gone."""
        try:
            # By /proc, because the path may lead to another file by now.
            return os.open(f"/proc/self/fd/{self._probe}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise explain(error, self.path) from error

    def held(self) -> list[int]:
        """The slots in use, by anybody, in rising order."""
        base = self.realm.slots
        locks = self._locks(base, base + MAX_SLOTS)
        return [byte - base for first, after_last in locks for byte in range(first, after_last)]

    def taker(self, index: int) -> tuple[int | None, int]:
        """The pid that took slot ``index``, as it called itself, and its lease; or (None, 0)."""
        if self.realm != HOST:
            return None, 0
        start, end = _lease_range(index)
        lock = self._any_lock(start, end)
        return (None, 0) if lock is None else ((lock[0] - start) >> _SERIAL_BITS, lock[0])

    def waiting(self, before: int | None = None) -> int:
        """How many wait; with ``before``, how many of them came before that ticket."""
        return len(self._locks(self.realm.tickets, self.realm.end if before is None else before))

    def anyone_waits(self, before: int | None = None) -> bool:
        """Whether ``waiting`` would find anyone: one system call instead of many."""
        last = self.realm.end if before is None else before
        return self._any_lock(self.realm.tickets, last) is not None

    def take(self, descriptor: int, limit: int, elsewhere: int = 0) -> tuple[int, int] | None:
        """Lock a free slot for ``descriptor``: its (index, lease byte), or None when full.

        Slots at or above ``limit`` (held by processes with a higher one) and the ``elsewhere``
        ones count too. Among processes of one limit the bytes alone keep it: there are no more
        than ``limit`` of them. Only when higher ones are held, a second count after locking is
        needed, because two takers may have counted at the same moment; then both step back.
        """
        held = set(self.held())
        if len(held) + elsewhere >= limit:
            return None
        base = self.realm.slots
        try:
            for index in range(limit):
                if index in held or not try_lock(descriptor, base + index):
                    continue
                higher = find_lock(self._probe, base + limit, base + MAX_SLOTS)
                if (elsewhere or higher) and len(self.held()) + elsewhere > limit:
                    unlock(descriptor, base + index)
                    return None
                if self.realm != HOST:
                    return index, 0
                lease = _new_lease(index)
                try_lock(descriptor, lease)
                return index, lease
        except OSError as error:
            raise explain(error, self.path) from error
        return None

    def lease_holds(self, lease: int) -> bool:
        """Whether this taking of a slot is still alive, in whatever process."""
        return self._any_lock(lease, lease + 1) is not None

    def queue(self) -> Ticket:
        """Join the queue's end."""
        return Ticket(self)

    def _any_lock(self, start: int, end: int) -> tuple[int, int] | None:
        try:
            return find_lock(self._probe, start, end)
        except OSError as error:
            raise explain(error, self.path) from error

    def _locks(self, start: int, end: int) -> list[tuple[int, int]]:
        try:
            return all_locks(self._probe, start, end)
        except OSError as error:
            raise explain(error, self.path) from error


class Ticket:
    """A place in the queue, held until ``close`` or the death of its process."""

    def __init__(self, file: SlotFile) -> None:
        self._descriptor = file.open_lockable()
        try:
            self.number = self._draw(file.fileno(), file.realm)
        except OSError as error:
            self.close()
            raise explain(error, file.path) from error
        if self.number == file.realm.end:
            self.close()
            raise VmCapacityError(
                f"another program has locked the queue of the semaphore file {file.path}",
                hint="find and end it: `lslocks` shows who locks the file; it is for vmkernel only",
            )

    def _draw(self, probe: int, realm: Realm) -> int:
        """Lock the number after the highest live one; the range's end when there is none left."""
        for _ in range(1000):  # each round lost means that another has just got a number
            number = realm.tickets
            while lock := find_lock(probe, number, realm.end):
                number = lock[1]
            if number == realm.end or try_lock(self._descriptor, number):
                return number
        return realm.end

    def close(self) -> None:
        """Leave the queue; again is harmless."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        # Unlocked before it is closed: the kernel tells inotify of a close *before* it drops the
        # locks (fs/file_table.c, __fput), and whoever that wakes should find them dropped.
        with contextlib.suppress(AttributeError, OSError):
            unlock(descriptor, self.number)
        os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def _open_or_create(path: Path) -> int:
    # First without O_CREAT: with it, Linux refuses an existing file of another owner in a sticky
    # directory (sysctl fs.protected_regular). O_NONBLOCK: never hang on a FIFO of that name.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    for _ in range(8):  # another process may create or remove the file at the same moment
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        _make_directory(path.parent)
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    return os.open(path, flags)


def _make_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    ancestor = directory.parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    status = ancestor.stat()
    # Closed to others, except where root makes it in a place that is open to all (/run): closed,
    # every user would be shut out of it.
    open_place = status.st_mode & (stat.S_IXOTH | stat.S_ISVTX) == stat.S_IXOTH
    mode = 0o755 if os.geteuid() == 0 and open_place else 0o700
    directory.mkdir(mode=mode, parents=True, exist_ok=True)


_SHARED = (
    "for a semaphore file that all users share, the administrator makes it once: "
    "install -d -m 755 {directory} && install -m 666 /dev/null {path}; "
    "else point the setting semaphore_file (VMKERNEL_SEMAPHORE_FILE) to a place of your own"
)
_HINTS = {
    errno.EACCES: _SHARED,
    errno.EPERM: _SHARED,
    errno.EROFS: _SHARED,
    errno.ENOENT: _SHARED,
    errno.ENOTDIR: "a part of the path is not a directory: correct the setting semaphore_file",
    errno.EISDIR: "the path is a directory: correct the setting semaphore_file",
    errno.ELOOP: "the path is a symbolic link: point the setting semaphore_file to its target",
    errno.ENOSPC: "free space or inodes on the file system of {directory}",
    errno.EDQUOT: "free some of your disk quota on the file system of {directory}",
    errno.EMFILE: "this process has too many files open: raise `ulimit -n`",
    errno.ENFILE: "the host has too many files open: see `sysctl fs.file-max`",
    errno.ENOLCK: "its file system gives no locks: point the setting semaphore_file to a local one",
    errno.EINVAL: "its file system knows no open-file-description locks (Linux 3.15): "
    "point the setting semaphore_file to a local file system, such as /run",
}
_HINTS[errno.EOPNOTSUPP] = _HINTS[errno.EINVAL]


def explain(error: OSError, path: Path) -> VmCapacityError:
    """What to tell a person about a failed operation on the semaphore file."""
    hint = _HINTS.get(error.errno or 0, "check the setting semaphore_file: `vmkernel doctor`")
    return VmCapacityError(
        f"cannot use the semaphore file {path}: {error.strerror or error}",
        hint=hint.format(directory=path.parent, path=path),
    )
