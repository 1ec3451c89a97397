"""One end of a virtio-serial port in the guest: whole messages out, bytes in.

Linux, ``Documentation/ABI`` and drivers/char/virtio_console.c: a port is a character
device that one process may open; /sys/class/virtio-ports/*/name tells which is which.
"""

from __future__ import annotations

import _thread
import functools
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from vmkernel.protocol import frames

READ_SIZE = 4096
"""Linux gives no more than a page of a port's at once (port_fops_read in virtio_console.c), and
larger room would be asked of the system and given back each time."""
_RINGS = 4096
REMINDER = signal.SIGURG
"""Ends a system call, after which Python looks for signals, SIGINT among them.  Not SIGINT itself:
one that is heard at that moment would be heard twice, by the next cell at worst.  Ignored by
default (signal(7)), so that it hurts nobody who resets all handlers."""


def open_port(name: str) -> int:
    """A descriptor of the port that the host calls ``name``.  Raises FileNotFoundError."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == name:
            return os.open(f"/dev/{entry.name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    raise FileNotFoundError(f"this VM has no virtio port {name!r}")


def _remember(signum: int, frame: FrameType | None) -> None:
    """The handler of REMINDER: that the signal came is all."""


def _forget_bell() -> None:
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


class _Again:
    """Signals once more when it goes: from C, in no frame of Python's to raise anything in."""

    __slots__ = ()
    __del__ = _thread.interrupt_main


class _Interrupt(KeyboardInterrupt):
    """A KeyboardInterrupt that is raised again when it was dropped before any code had it.

    To close a file that nobody refers to any more, CPython makes a warning about it, hears of a
    signal while it does (`PyObject_Repr`), and clears what was raised (fileio_dealloc_warn in
    Modules/_io/fileio.c): ``while True: open(name).read()`` spends so much of its time on the
    way there that most interrupts are lost.  Whatever passes a frame of Python gets that frame
    into its traceback; a traceback of nothing but the signal handler has passed none.
    """

    def __del__(self) -> None:
        trace = self.__traceback__
        if trace is not None and trace.tb_next is None and trace.tb_frame.f_code is _HANDLER:
            _again = _Again()  # goes with this frame

    def __reduce__(self) -> tuple[type[KeyboardInterrupt], tuple[object, ...]]:
        return KeyboardInterrupt, self.args


_Interrupt.__name__ = _Interrupt.__qualname__ = "KeyboardInterrupt"  # as it is shown
_Interrupt.__module__ = "builtins"


class Interrupts:
    """What SIGINT does in the guest kernel.

    It raises KeyboardInterrupt while a request is served (``armed``), and is ignored
    otherwise.  In the middle of a message on the port it is held back until the message
    is whole: half a frame would cut the kernel off from the host.

    A signal that comes between Python's last look and a system call, or in another thread, does
    not end that call: Python hears of it when ``time.sleep(60)`` is over.  So each signal also
    rings a bell (`signal.set_wakeup_fd`), which the handler stills; a thread that hears it ring for
    longer calls :meth:`remind`.
    """

    def __init__(self) -> None:
        self.armed = False
        self._held = 0
        self._pending = False
        self._main = threading.main_thread().ident
        self._bell: tuple[socket.socket, socket.socket] | None = None

    def install(self) -> None:
        """Take SIGINT; from the main thread."""
        self._bell = socket.socketpair()
        for end in self._bell:
            end.setblocking(False)
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(REMINDER, _remember)
        for number in (signal.SIGINT, REMINDER):
            signal.siginterrupt(number, True)
        signal.set_wakeup_fd(self._bell[1].fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_bell)  # a child's signals are not ours

    @property
    def bell(self) -> int:
        """The descriptor that is readable while a signal waits to be heard, -1 without one."""
        return self._bell[0].fileno() if self._bell is not None else -1

    def remind(self) -> bool:
        """Wake the main thread if SIGINT still waits to be heard; whether it did.

        Where the handler is the user's own, nothing is done: it may have run, and need not still
        the bell.
        """
        if self._bell is None:
            return False
        with suppress(OSError):
            signals = self._bell[0].recv(_RINGS, socket.MSG_PEEK)
            handler = signal.getsignal(signal.SIGINT)
            ours = handler == self.handle or getattr(handler, "func", None) == self._call
            if not ours or signal.SIGINT not in signals or self._main is None:
                self._bell[0].recv(len(signals))
            else:
                signal.pthread_kill(self._main, REMINDER)
                return True
        return False

    def still(self) -> None:
        """What rang was heard, or is given up."""
        if self._bell is not None:
            with suppress(OSError):
                self._bell[0].recv(_RINGS)

    def calling(self, callback: Callable[[], object]) -> Callable[..., None]:
        """A handler of SIGINT that calls this, for a while."""
        return functools.partial(self._call, callback)

    def _call(self, callback: Callable[[], object], signum: int, frame: FrameType | None) -> None:
        self.still()
        callback()

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.still()
        if self._held:
            self._pending = True
        elif self.armed:
            raise _Interrupt

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


_HANDLER = Interrupts.handle.__code__


class Port:
    """Framed messages over a non-blocking descriptor.  Sending is safe from any thread."""

    def __init__(self, fd: int, interrupts: Interrupts | None = None) -> None:
        self.fd = fd
        self.interrupts = interrupts or Interrupts()
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
        self.interrupts.hold()
        try:
            with self._lock:
                self._queued += pieces
                self._queued_bytes += len(body) + sum(len(memoryview(b)) for b in buffers)
            if self._queued_bytes > frames.MAX_FRAME:
                self.flush()
        finally:
            self.interrupts.release()

    def flush(self) -> None:
        """Write what is queued; waits while the host does not read (back-pressure)."""
        if self.muted or not (self._queued or self._data):
            return
        self.interrupts.hold()
        try:
            while not self._write():
                # Without the lock: a user's signal handler that runs meanwhile may print
                select.select([], [self.fd], [])
        finally:
            self.interrupts.release()

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
        self.interrupts.hold()
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
                if len(data) < READ_SIZE:
                    break
        finally:
            self.interrupts.release()
        return messages

    def wait(self, timeout: float | None = None) -> None:
        """Sleep until there is something to receive; a KeyboardInterrupt ends it."""
        select.select([self.fd], [], [], timeout)
