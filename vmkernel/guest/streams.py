"""stdout and stderr of the guest kernel, published as ``stream`` messages.

Three sources end up in the same place: Python's ``sys.stdout``, the file descriptors 1
and 2 (subprocesses and C code write there), and processes that the user's code forked.
Output is coalesced as ipykernel does, since Jupyter servers drop messages above 1,000 a
second: it is published when the cell ends, when enough has come together, or
``FLUSH_INTERVAL`` after it was written, whichever is first.  A flush sends at once, so that
the words before a crash are heard; but not too often, or a loop of ``print(..., flush=True)``
would be a flood: then it settles the order of what is sent, and no more.  One thread serves
both the timer and the descriptors, and sleeps while nothing is written.  It also sees to it that an
interrupt is heard (`guest.port.Interrupts`).
"""

from __future__ import annotations

import contextvars
import fcntl
import math
import os
import select
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ipykernel.iostream import OutStream

from vmkernel.guest.port import Interrupts

FLUSH_INTERVAL = 0.1
"""Seconds that output waits for more of its kind while a cell runs."""
FLUSH_CHARACTERS = 256 << 10
"""Publish at once when this much has come together."""
FLUSHES = 40
"""How many flushes in one ``FLUSH_INTERVAL`` send at once."""
READ_SIZE = 64 << 10
LOOK_INTERVAL = 0.001
"""Seconds after which a write looks for what children and C code wrote before it; no child
starts and ends in less."""

REMINDERS = (0.1, 0.4, 1.5)
"""Seconds after which a signal that nobody has heard is sent again, and again."""

Publish = Callable[[str, str, dict[str, Any]], None]
"""publish(name, text, parent header)"""


class PortStream(OutStream):
    """``sys.stdout`` or ``sys.stderr`` of the guest kernel.

    Derived from ipykernel's OutStream for its public face (parent headers, hooks,
    ``isinstance`` checks in other libraries); what it does with text is its own.
    """

    def __init__(self, name: str, fd: int, publish: Publish, pump: OutputPump) -> None:
        self.name = name
        self.session = None
        self.echo = None
        self._fid = None
        self._exc = None
        self._should_watch = False
        self._isatty = False
        self._fd = fd
        self._publish = publish
        self._pump = pump
        self._master_pid = os.getpid()
        self._local = threading.local()
        self._parent_header: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar(
            "parent_header"
        )
        self._parent_header.set({})
        self._parent_header_global: dict[str, Any] = {}
        self._lock = pump.lock
        self._texts: list[str] = []
        self._size = 0
        self._child_text = ""
        self._parent: dict[str, Any] = {}

    def fileno(self) -> int:
        """The descriptor behind this stream: what is written there is published too."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Never: see `close`."""
        return False

    def close(self) -> None:
        """Publish what is left; the stream stays usable, as the kernel needs it."""
        self.flush()

    def write(self, string: str) -> int:
        """Add text to what will be published; under the cell that is current here."""
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string)}")
        if os.getpid() != self._master_pid:
            # A forked child has no port: its parent reads the descriptor.
            self._child_text += string
            if "\n" in string:  # whole lines, or those of several children would mix
                self._write_in_child()
            return len(string)
        if string:
            self._pump.look()
            self.add(string, self.parent_header)
        return len(string)

    def writelines(self, sequence: Iterable[str]) -> None:
        """Write one text after another."""
        for string in sequence:
            self.write(string)

    def _write_in_child(self) -> None:
        data = self._child_text.encode(errors="surrogateescape")
        self._child_text = ""
        while data:
            data = data[os.write(self._fd, data) :]

    def add(self, text: str, parent: dict[str, Any]) -> None:
        """Add text that belongs to the request with header ``parent``."""
        with self._lock:
            if self._pump.flushed is not self:
                self._pump.settle()
            if self._texts and parent is not self._parent and parent != self._parent:
                self.flush_buffer()
            first = not self._texts
            self._parent = parent
            self._texts.append(text)
            self._size += len(text)
            if self._size >= FLUSH_CHARACTERS:
                self.flush_buffer()
            elif first:
                self._pump.wake()

    def flush(self) -> None:
        """What was written, by way of the descriptor too, will come before all that follows."""
        if os.getpid() != self._master_pid:
            self._write_in_child()
            return
        self._pump.drain()
        with self._lock:
            if not self._texts:
                return
            if self._pump.flushed is not self:
                self._pump.settle()
                self._pump.flushed = self
            if self._pump.may_send():
                self._pump.settle()
                self._pump.flush_port()

    def flush_buffer(self) -> None:
        """Publish now what is in the buffer."""
        with self._lock:
            if not self._texts:
                return
            texts, self._texts = self._texts, []  # at once: a signal handler may print
            self._size = 0
            self._publish(self.name, "".join(texts), self._parent)


class OutputPump:
    """Reads descriptors 1 and 2, and publishes buffered output in time."""

    def __init__(
        self,
        read_fds: dict[str, int],
        flush_port: Callable[[], None],
        interrupts: Interrupts | None = None,
    ) -> None:
        self._fds = read_fds
        self._interrupts = interrupts or Interrupts()
        self.flush_port = flush_port
        self.streams: dict[str, PortStream] = {}
        self.lock = threading.RLock()
        """Of all streams' buffers."""
        self.flushed: PortStream | None = None
        """Whose buffer goes out before anything else that is sent."""
        self.running = 0
        """How many cells run: when one has ended, all is sent together, in one write."""
        self._looked = 0.0
        self._counted_from = 0.0
        self._flushes = 0
        self._lock = threading.RLock()  # a signal handler that prints may come upon its own thread
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._awake = False
        self._partial = dict.fromkeys(read_fds, b"")
        for fd in read_fds.values():
            os.set_blocking(fd, False)

    def start(self) -> None:
        """Start the thread."""
        thread = threading.Thread(target=self._run, name="vmkernel output", daemon=True)
        # A debugger that stops all threads must not stop the one that tells of it
        thread.pydev_do_not_trace = thread.is_pydev_daemon_thread = True  # type: ignore[attr-defined]
        thread.start()

    def wake(self) -> None:
        """There is something to publish soon."""
        if not self._awake:
            self._awake = True
            os.eventfd_write(self._event, 1)

    def settle(self) -> None:
        """Publish what was flushed: something else is about to be sent."""
        if self.flushed is not None:
            with self.lock:
                stream, self.flushed = self.flushed, None
                if stream is not None:
                    stream.flush_buffer()

    def may_send(self) -> bool:
        """Whether a flush may send at once; counts it."""
        if not self.running:
            return False
        now = time.monotonic()
        if now - self._counted_from > FLUSH_INTERVAL:
            self._counted_from, self._flushes = now, 0
        self._flushes += 1
        return self._flushes <= FLUSHES

    def publish(self) -> None:
        """Publish all that was written so far."""
        self.drain()
        self.settle()
        for stream in self.streams.values():
            stream.flush_buffer()

    def look(self) -> None:
        """Drain the descriptors, if the last time was long enough ago for something to be there."""
        if time.monotonic() - self._looked > LOOK_INTERVAL:
            self.drain()

    def drain(self) -> None:
        """Move what the descriptors hold into the streams' buffers."""
        self._looked = time.monotonic()
        with self._lock:
            pass  # the thread may have taken text from a pipe that it has not added yet
        for name, fd in self._fds.items():
            if _readable(fd):
                self._read(name, fd)

    def _read(self, name: str, fd: int) -> None:
        stream = self.streams[name]
        while True:
            with self._lock:
                try:
                    data = os.read(fd, READ_SIZE)
                except BlockingIOError:
                    return
                if not data:
                    return
                data = self._partial[name] + data
                end = _whole_characters(data)
                self._partial[name] = data[end:]
                stream.add(data[:end].decode(errors="replace"), stream._parent_header_global)
            if len(data) < READ_SIZE and not _readable(fd):
                return

    def _run(self) -> None:
        # SIGINT is for the main thread: here it would only cut a read short.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        poll = select.poll()
        names = {fd: name for name, fd in self._fds.items()}
        for fd in (*names, self._event):
            poll.register(fd, select.POLLIN)
        bell = self._interrupts.bell
        if bell >= 0:
            poll.register(bell, select.POLLIN)
        reminders: list[float] = []  # when to look whether an interrupt was heard
        deadline = 0.0  # when what is buffered must go out; 0: nothing is
        while True:
            next_one = min([deadline or math.inf, *reminders[:1]])
            left = max(0.0, next_one - time.monotonic()) * 1000
            for fd, event in poll.poll(None if math.isinf(left) else left):
                if fd == bell:
                    poll.modify(bell, 0)
                    if event == select.POLLIN:
                        reminders = [time.monotonic() + delay for delay in REMINDERS]
                    continue
                if fd in names:
                    self._read(names[fd], fd)
                else:
                    os.eventfd_read(fd)
                if not deadline:
                    deadline = time.monotonic() + FLUSH_INTERVAL
            if reminders and time.monotonic() >= reminders[0]:
                del reminders[0]
                if not self._interrupts.remind() or not reminders:
                    reminders = []
                    self._interrupts.still()
                    poll.modify(bell, select.POLLIN)
            if deadline and time.monotonic() >= deadline:
                deadline = 0.0
                self._awake = False
                self.settle()
                for stream in self.streams.values():
                    stream.flush_buffer()
                self.flush_port()


def _readable(fd: int) -> bool:
    """Whether a pipe holds bytes (FIONREAD, pipe(7)): cheaper than a read that fails."""
    (size,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))
    return bool(size)


def _whole_characters(data: bytes) -> int:
    """The length of ``data`` without an unfinished UTF-8 character at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        need = 2 if byte >> 5 == 6 else 3 if byte >> 4 == 14 else 4 if byte >> 3 == 30 else 1
        return len(data) - back if need > back else len(data)
    return len(data)
