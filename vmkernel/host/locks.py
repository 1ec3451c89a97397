"""Open-file-description locks on single bytes: the primitive under the semaphore file.

Such a lock belongs to one open(2), not to a process: a child that inherits the descriptor shares
the lock, closing *another* descriptor of the same file does not lose it (as it would with plain
POSIX locks), and the kernel drops it when the last copy of the descriptor is gone. Source for all
facts here: fcntl_locking(2) and fcntl(2), "Open file description locks (non-POSIX)", Linux 3.15.
A lock may lie beyond the end of the file, so the file needs no content.
"""

from __future__ import annotations

import errno
import fcntl
import struct

# include/uapi/asm-generic/fcntl.h; the fcntl module names them only where its C library did.
_GETLK: int = getattr(fcntl, "F_OFD_GETLK", 36)
_SETLK: int = getattr(fcntl, "F_OFD_SETLK", 37)

# struct flock of the 64-bit Linux ABIs: type, whence, start, length, pid (must be 0), padding.
_FLOCK = struct.Struct("hhqqi0q")
_SEEK_SET = 0


def try_lock(descriptor: int, byte: int, count: int = 1) -> bool:
    """Lock ``count`` bytes from ``byte`` on, all or none, for this open file description.

    Does not wait: False when another has one of them.

    The descriptor must be open for writing. Raises OSError for anything but "taken".
    """
    request = _FLOCK.pack(fcntl.F_WRLCK, _SEEK_SET, byte, count, 0)
    try:
        fcntl.fcntl(descriptor, _SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # POSIX allows either for "taken"
            return False
        raise
    return True


def unlock(descriptor: int, byte: int, count: int = 1) -> None:
    """Give ``count`` bytes from ``byte`` on back, as far as this open file description has them."""
    fcntl.fcntl(descriptor, _SETLK, _FLOCK.pack(fcntl.F_UNLCK, _SEEK_SET, byte, count, 0))


def find_lock(descriptor: int, start: int, end: int) -> tuple[int, int] | None:
    """The bytes ``(first, after_last)`` of *some* lock in [start, end), or None.

    Sees the locks of other open file descriptions only, never the descriptor's own; reading
    permission is enough. Which lock is told when there are several is up to the kernel.
    """
    if start >= end:
        return None  # a length of 0 would mean "to the end of all files"
    request = _FLOCK.pack(fcntl.F_WRLCK, _SEEK_SET, start, end - start, 0)
    kind, _, first, length, _ = _FLOCK.unpack(fcntl.fcntl(descriptor, _GETLK, request))
    if kind == fcntl.F_UNLCK:
        return None
    after_last = end if length == 0 else first + length  # length 0: to the end of all files
    return max(first, start), min(after_last, end)


def all_locks(descriptor: int, start: int, end: int) -> list[tuple[int, int]]:
    """Every lock in [start, end) as ``find_lock`` tells it, in rising order.

    Asks for the ranges left and right of each lock found: 2n+1 questions for n locks.
    """
    found: list[tuple[int, int]] = []
    ranges = [(start, end)]
    while ranges:
        low, high = ranges.pop()
        lock = find_lock(descriptor, low, high)
        if lock is None:
            continue
        found.append(lock)
        if low < lock[0]:
            ranges.append((low, lock[0]))
        if lock[1] < high:
            ranges.append((lock[1], high))
    found.sort()
    return found
