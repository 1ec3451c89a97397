"""One end of a virtio-serial port in the guest: whole messages out, bytes in.

Linux, ``Documentation/ABI`` and drivers/char/virtio_console.c: a port is a character
device that one process may open; /sys/class/virtio-ports/*/name tells which is which.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from pathlib import Path
from types import FrameType

from vmkernel.protocol import frames

READ_SIZE = 256 << 10


def open_port(name: str) -> int:
    """A descriptor of the port that the host calls ``name``.  Raises FileNotFoundError."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == name:
            return os.open(f"/dev/{entry.name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    raise FileNotFoundError(f"this VM has no virtio port {name!r}")


class Interrupts:
    """What SIGINT does in the guest kernel.

    It raises KeyboardInterrupt while a request is served (``armed``), and is ignored
    otherwise.  In the middle of a message on the port it is held back until the message
    is whole: half a frame would cut the kernel off from the host.
    """

    def __init__(self) -> None:
        self.armed = False
        self._held = 0
        self._pending = False
        self._main = threading.main_thread().ident

    def install(self) -> None:
        """Take SIGINT; from the main thread."""
        signal.signal(signal.SIGINT, self.handle)
        signal.siginterrupt(signal.SIGINT, True)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._held:
            self._pending = True
        elif self.armed:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """Start of a section that must not be interrupted (main thread only counts)."""
        if threading.get_ident() == self._main:
            self._held += 1

    def release(self) -> None:
        """End of the section; raises KeyboardInterrupt when one was held back."""
        if threading.get_ident() == self._main:
            self._held -= 1
            if self._pending and not self._held:
                self._pending = False
                if self.armed:
                    raise KeyboardInterrupt


class Port:
    """Framed messages over a non-blocking descriptor.  Sending is safe from any thread."""

    def __init__(self, fd: int, interrupts: Interrupts | None = None) -> None:
        self.fd = fd
        self._interrupts = interrupts or Interrupts()
        self._lock = threading.RLock()
        self._reader = frames.FrameReader()
        self._queued: list[frames.Piece] = []
        self._queued_bytes = 0
        self._data = memoryview(b"")  # what is being written
        self._sent: list[int] = []  # how much of it was
        self._writing = False
        self.muted = False
        """Write nothing: for rehearsals."""

    def resync(self, marker: bytes) -> None:
        """Begin a stream after a dead predecessor: send the marker, skip input up to it."""
        self._reader.resync(marker)
        self._queued.append(marker)
        self.flush()

    def queue(self, body: bytes, buffers: tuple[frames.Piece, ...] = ()) -> None:
        """Append a message to those that the next :meth:`flush` writes at once."""
        pieces = frames.encode(body, buffers)
        self._interrupts.hold()
        try:
            with self._lock:
                self._queued += pieces
                self._queued_bytes += len(body) + sum(len(memoryview(b)) for b in buffers)
            if self._queued_bytes > frames.MAX_FRAME:
                self.flush()
        finally:
            self._interrupts.release()

    def flush(self) -> None:
        """Write what is queued; waits while the host does not read (back-pressure)."""
        if self.muted or not (self._queued or self._data):
            return
        self._interrupts.hold()
        try:
            while not self._write():
                # Without the lock: a user's signal handler that runs meanwhile may print
                select.select([], [self.fd], [])
        finally:
            self._interrupts.release()

    def discard(self) -> None:
        """Forget what is queued."""
        with self._lock:
            self._queued, self._queued_bytes = [], 0

    def send(self, body: bytes, buffers: tuple[frames.Piece, ...] = ()) -> None:
        """Queue and flush."""
        self.queue(body, buffers)
        self.flush()

    def _write(self) -> bool:
        """Write what the host takes now; whether that was all.

        A user's signal handler may run anywhere in here, and raise: the next call goes on.
        """
        with self._lock:
            if self._writing:  # such a handler has printed; who writes sees to that, too
                return True
            self._writing = True
            try:
                while True:
                    self._data, self._sent = self._data[sum(self._sent) :], []
                    if not self._data:
                        count = len(self._queued)
                        if not count:
                            return True
                        self._data = memoryview(b"".join(self._queued[:count]))
                        del self._queued[:count]
                        self._queued_bytes = 0
                    # No handler runs between a write and the note of it: both are in C
                    self._sent.extend(map(os.write, (self.fd,), (self._data,)))
            except BlockingIOError:
                return False
            finally:
                self._writing = False

    def receive(self) -> list[bytearray]:
        """The messages that can be had without waiting.  Raises ProtocolError."""
        self._interrupts.hold()
        messages: list[bytearray] = []
        try:
            while True:
                try:
                    data = os.read(self.fd, READ_SIZE)
                except BlockingIOError:
                    break
                if not data:  # the host end is closed
                    break
                messages += self._reader.feed(data)
                if len(data) < 4096:
                    break
        finally:
            self._interrupts.release()
        return messages

    def wait(self, timeout: float | None = None) -> None:
        """Sleep until there is something to receive; a KeyboardInterrupt ends it."""
        select.select([self.fd], [], [], timeout)
