"""A log of bounded size for what QEMU and the guest print.

Where it stands: ``vm.qemu`` drains QEMU's stderr into one, ``vm.machine`` the guest's serial
console into another. A hostile guest may print for ever, so the bound must hold without the
writer ever waiting: the reading end of a pipe or socket is drained by the event loop as fast as
it comes, the first half of the bound is kept as it is (a boot's story), and after that only the
newest part (a crash's story).

On disk: ``<path>`` holds the head. When it is full, ``<path>.tail`` is written and, each time
that is full, renamed to ``<path>.tail.old``; `ConsoleLog.close` puts all three into ``<path>``.
Rejected: overwriting one file as a ring (nobody can read it while the VM runs), keeping the tail
in memory (lost when the wrapper is killed, which is when it is wanted).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

_CHUNK = 65536
_LOG_MODE = 0o600  # a guest's console may show what a cell printed


class ConsoleLog:
    """Everything read from one descriptor, head and tail, in at most ``cap_bytes`` on disk."""

    def __init__(self, path: Path, cap_bytes: int, *, skip: int = 0) -> None:
        """``path``'s directory exists. The files are made when there is something to keep.

        ``cap_bytes`` bounds what is kept (plus one line that says how much is missing); the first
        ``skip`` bytes are not.
        """
        self.path = path
        self.cap_bytes = cap_bytes
        self.total = 0
        """Bytes received so far, kept or not."""
        self.write_error: OSError | None = None
        """The first failure to write the log (a full disk, say). The draining goes on."""
        self._skip = skip
        self._head_left = cap_bytes // 2
        self._segment_size = max(1, cap_bytes // 4)
        self._segment_left = 0
        self._dropped = 0
        self._old_size = 0
        self._out = -1
        self._fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"<ConsoleLog {self.path} received={self.total} cap={self.cap_bytes}>"

    @property
    def _tail_path(self) -> Path:
        return Path(f"{self.path}.tail")

    @property
    def _old_path(self) -> Path:
        return Path(f"{self.path}.tail.old")

    def drain(self, fd: int, loop: asyncio.AbstractEventLoop) -> None:
        """From now on read ``fd`` (which becomes ours to close) until its end, or `close`."""
        os.set_blocking(fd, False)
        self._fd, self._loop = fd, loop
        loop.add_reader(fd, self._readable)

    def feed(self, data: bytes) -> None:
        """Keep ``data``, or what the bound allows of it. Never raises for a disk that is full."""
        self.total += len(data)
        try:
            self._keep(memoryview(data)[self._skip :])
            self._skip = max(0, self._skip - len(data))
        except OSError as error:
            self.write_error = self.write_error or error

    def text(self, limit: int = _CHUNK) -> str:
        """The last ``limit`` bytes of what was kept, as text; undecodable bytes are replaced."""
        self._catch_up()
        parts: list[bytes] = []
        left = limit
        for path in (self._tail_path, self._old_path, self.path):
            data = _read_end(path, left)
            parts.append(data)
            left -= len(data)
            if left <= 0:
                break
        return b"".join(reversed(parts)).decode("utf-8", "replace")

    def close(self) -> None:
        """Read what is still to be had, stop reading, and put the log into one file."""
        self._catch_up()
        self._stop_reading()
        if self._out >= 0:
            os.close(self._out)
            self._out = -1
        try:
            self._join()
        except OSError as error:
            self.write_error = self.write_error or error

    def _readable(self) -> None:
        # One read per turn of the loop: a flood must not keep the loop from its other work.
        if not self._read_once():
            self._stop_reading()

    def _read_once(self) -> bool:
        """Read what is there; False at the end of the stream."""
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:  # a socket whose peer was killed may say ECONNRESET
            return False
        self.feed(data)
        return bool(data)

    def _catch_up(self) -> None:
        """Read what has already arrived; bounded, as the writer may be faster than we are."""
        for _ in range(16):
            if self._fd < 0:
                return
            before = self.total
            if not self._read_once():
                self._stop_reading()
            if self.total == before:
                return

    def _stop_reading(self) -> None:
        if self._fd >= 0:
            assert self._loop is not None
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _keep(self, data: memoryview) -> None:
        if self._head_left:
            part = data[: self._head_left]
            self._write(self.path, part)
            self._head_left -= len(part)
            data = data[len(part) :]
            if not self._head_left:
                os.close(self._out)
                self._out = -1
        while data:
            if not self._segment_left:
                self._rotate()
            part = data[: self._segment_left]
            self._write(self._tail_path, part)
            self._segment_left -= len(part)
            data = data[len(part) :]

    def _rotate(self) -> None:
        if self._out >= 0:
            os.close(self._out)
            self._out = -1
            self._dropped += self._old_size
            self._tail_path.replace(self._old_path)
            self._old_size = self._segment_size
        self._segment_left = self._segment_size

    def _write(self, path: Path, data: memoryview) -> None:
        if self._out < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._out = os.open(path, flags, _LOG_MODE)
        while data:
            data = data[os.write(self._out, data) :]

    def _join(self) -> None:
        """Head, a line about what is missing, and tail into one file; the parts go."""
        tails = [path for path in (self._old_path, self._tail_path) if path.exists()]
        if not tails:
            return
        with self.path.open("ab") as out:
            if self._dropped:
                out.write(f"\n[... {self._dropped} bytes left out ...]\n".encode())
            out.writelines(path.read_bytes() for path in tails)
        for path in tails:
            path.unlink()


def _read_end(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            return file.read(limit)
    except FileNotFoundError:
        return b""
