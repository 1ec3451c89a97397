"""Being told when someone closes the semaphore file: inotify on an asyncio loop.

Imported only by those who have to wait: ``ctypes`` costs several milliseconds of start-up, and
Python has no inotify of its own. Source: inotify(7); the numbers are <linux/inotify.h>'s.
A user may have 128 instances by default (fs.inotify.max_user_instances), so one is shared by all
waiters of a loop, and whoever gets none polls instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import threading

# What may mean a free slot, or another file under the path (unlinked, renamed away).
_MASK = 0x00000008 | 0x00000004 | 0x00000400 | 0x00000800
#       IN_CLOSE_WRITE IN_ATTRIB  IN_DELETE_SELF IN_MOVE_SELF
_OPEN = 0x00000020  # IN_OPEN: each slot and each place in the queue has a descriptor of its own


class FileWatch:
    """One inotify instance on the running loop, shared by its waiters; ``close`` it at the end.

    ``arrivals``: be told of who comes, too, not only of who goes.
    """

    def __init__(self, *, arrivals: bool = False) -> None:
        self._mask = _MASK | (_OPEN if arrivals else 0)
        self._loop = asyncio.get_running_loop()
        self._sleepers: set[asyncio.Future[bool]] = set()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._wake)
        self.users = 0

    def follow(self, descriptor: int) -> bool:
        """Watch this open file's inode, whatever its path is now; False when that cannot be."""
        # By /proc: a path may lead to another file by now. Adding an inode twice is harmless.
        path = f"/proc/self/fd/{descriptor}".encode()
        return self._descriptor >= 0 and (
            self._libc.inotify_add_watch(self._descriptor, path, self._mask) >= 0
        )

    async def sleep(self, seconds: float) -> bool:
        """Until something happens (True) or the time is over (False)."""
        sleeper: asyncio.Future[bool] = self._loop.create_future()
        timer = self._loop.call_later(seconds, _set, sleeper, False)
        self._sleepers.add(sleeper)
        try:
            return await sleeper
        finally:
            timer.cancel()
            self._sleepers.discard(sleeper)

    def close(self) -> None:
        """Give the instance back; again is harmless."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            descriptor, self._descriptor = self._descriptor, -1
            # In a thread, since whoever waited has a VM to start now: closing an inotify instance
            # waits for a grace period of the kernel's SRCU, measured here as 7 to 17 ms.
            closer = threading.Thread(target=os.close, args=(descriptor,), daemon=True)
            try:
                closer.start()
            except RuntimeError:  # no more threads for this user
                os.close(descriptor)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 65536)  # which event it was does not matter
        self.wake()

    def wake(self) -> None:
        """End every sleep, as if something had happened to the file."""
        for sleeper in self._sleepers:
            _set(sleeper, True)


def _set(sleeper: asyncio.Future[bool], value: bool) -> None:
    if not sleeper.done():
        sleeper.set_result(value)
