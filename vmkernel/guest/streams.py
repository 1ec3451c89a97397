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

A loop of prints writes some hundred times between two looks at the descriptors; all but the first
of those writes only add their text to a list (`PortStream.write`, 3 us under emulation, not 30).
"""

from __future__ import annotations

import contextvars
import fcntl
import os
import select
import signal
import struct
import sys
import termios
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any

from ipykernel.iostream import OutStream

from vmkernel.guest.port import Interrupts

FLUSH_INTERVAL = 0.1
"""Seconds that output waits for more of its kind while a cell runs."""
FLUSH_CHARACTERS = 256 << 10
"""Publish at once when this much has come together."""
FLUSHES = 40
"""How many flushes in one ``FLUSH_INTERVAL`` send at once."""
PIECE = 1 << 20
"""Characters of one message at most: host and guest are at work at the same time."""
LONG = 4096
"""Characters of a text that travels outside of JSON: looking for what must be escaped in it takes
seven times as long as encoding it, under emulation."""
SHORT = 2048
"""Characters of a text that may be added before anybody looks how much there is."""
READ_SIZE = 256 << 10
PIPE_SIZE = 1 << 20
"""Bytes that a child may write before it has to wait: a change of processes costs more than they.
The most that Linux allows an ordinary user (/proc/sys/fs/pipe-max-size)."""
LOOK_INTERVAL = 0.001
"""Seconds after which a write looks for what children and C code wrote before it; no child
starts and ends in less."""

REMINDERS = (0.1, 0.4, 1.5)
"""Seconds after which a signal that nobody has heard is sent again, and again."""

Publish = Callable[[str, str, dict[str, Any]], None]
"""publish(name, text, parent header)"""
Keep = Callable[[list[str]], None]
"""keep(texts): what Python code wrote, in order"""

_streams: weakref.WeakSet[PortStream] = weakref.WeakSet()


def _in_child() -> None:
    for stream in _streams:
        stream.slow_down()


os.register_at_fork(after_in_child=_in_child)


def stream_message(name: str, text: str, parent: dict[str, Any]) -> dict[str, Any]:
    """A ``stream`` message for the session; a long text travels as it is, not as JSON."""
    message: dict[str, Any] = {
        "header": {"msg_type": "stream"},
        "parent_header": parent,
        "metadata": {},
        "content": {"name": name},
    }
    if len(text) < LONG:
        message["content"]["text"] = text
    else:
        message["buffers"] = [text.encode(errors="backslashreplace")]
    return message


class _Sheet:
    """What one request has written to one stream and was not published yet."""

    __slots__ = ("_counted", "_size", "noted", "parent", "texts")

    def __init__(self, parent: dict[str, Any]) -> None:
        self.parent = parent
        self.texts: list[str] = []
        """One list for ever: who writes may have found it before another thread took what it held.
        """
        self.noted = 0
        """How many of them `PortStream.note` has seen"""
        self._counted = 0
        self._size = 0

    def size(self) -> int:
        """Characters in it."""
        texts = self.texts
        count = len(texts)
        self._size += sum(map(len, texts[self._counted : count]))
        self._counted = count
        return self._size

    def take(self) -> str:
        """Its text, which it has no longer."""
        count = len(self.texts)
        texts = self.texts[:count]
        del self.texts[:count]  # in one step with the last: a signal handler may print, and publish
        self._counted = self._size = self.noted = 0
        return "".join(texts)

    @property
    def forgotten(self) -> bool:
        """Whether nobody can write to it but by its stream."""
        return sys.getrefcount(self.texts) == _REFERENCES


_REFERENCES = 2
"""To a sheet's list: the sheet's own, and the question's."""


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
        self._sheets: list[_Sheet] = []
        self._put: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar(
            "put", default=None
        )
        """Adds to the sheet of this context's request"""
        self._until = 0.0
        """When the next look is due"""
        self._kept: Keep | None = None
        self._child_text = ""
        _streams.add(self)

    @property
    def parent_header(self) -> dict[str, Any]:
        """The header of the request that what is written here and now belongs to."""
        parent = self._parent_header.get(None)
        return self._parent_header_global if parent is None else parent

    @parent_header.setter
    def parent_header(self, value: dict[str, Any]) -> None:
        self._parent_header.set(value)
        self._parent_header_global = value
        self._put.set(None)

    def set_thread_parent(self, parent: dict[str, Any]) -> contextvars.Token[dict[str, Any]]:
        """As the base class."""
        self._put.set(None)
        token: contextvars.Token[dict[str, Any]] = super().set_thread_parent(parent)
        return token

    def reset_thread_parent(self, token: contextvars.Token[dict[str, Any]]) -> None:
        """As the base class."""
        self._put.set(None)
        super().reset_thread_parent(token)

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
        # Whatever else is to be done can wait for the first write after the next look
        if type(string) is str and len(string) < SHORT and monotonic() < self._until:
            put = self._put.get()
            if put is not None:
                put(string)
                return len(string)
        return self._write(string)

    def _write(self, string: str) -> int:
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string)}")
        if os.getpid() != self._master_pid:
            # A forked child has no port: its parent reads the descriptor.
            self._child_text += string
            if "\n" in string:  # whole lines, or those of several children would mix
                self._write_in_child()
            return len(string)
        if string:
            looked = self._pump.look()
            parent = self._parent_header.get(None)
            put = self.add(string, self._parent_header_global if parent is None else parent)
            if parent is not None:  # a thread's is the latest cell, whichever that is
                if self._put.get() is None:
                    self._put.set(put)
                self._until = looked + LOOK_INTERVAL
        return len(string)

    def slow_down(self) -> bool:
        """Let the next write see to everything; whether it would not have."""
        until, self._until = self._until, 0.0
        return until > 0.0

    def writelines(self, sequence: Iterable[str]) -> None:
        """Write one text after another."""
        for string in sequence:
            self.write(string)

    def _write_in_child(self) -> None:
        data = self._child_text.encode(errors="surrogateescape")
        self._child_text = ""
        while data:
            data = data[os.write(self._fd, data) :]

    def add(self, text: str, parent: dict[str, Any], noted: int = 0) -> Callable[[str], None]:
        """Add text that belongs to the request with header ``parent``; what adds more of it."""
        with self._lock:
            if self._pump.flushed is not self:
                self._pump.settle()
            sheet, put = self._sheet(parent)
            put(text)
            sheet.noted += noted
            if sheet.size() >= FLUSH_CHARACTERS:
                self.flush_buffer()
            self._pump.wake()
            return put

    def keep(self, keep: Keep | None) -> Keep | None:
        """Tell ``keep`` what is written from now on, when it is published; who was told before."""
        with self._lock:
            self.note()
            before, self._kept = self._kept, keep
        return before

    def note(self) -> None:
        """Tell who wants to keep it what was written so far."""
        with self._lock:
            for sheet in self._sheets:
                texts = sheet.texts[sheet.noted :]
                sheet.noted += len(texts)
                if texts and self._kept is not None:
                    self._kept(texts)

    def add_foreign(self, text: str) -> None:
        """Add text that no Python code of ours wrote."""
        with self._lock:
            self.note()
            self.add(text, self._parent_header_global, noted=1)

    def _sheet(self, parent: dict[str, Any]) -> tuple[_Sheet, Callable[[str], None]]:
        """The sheet of a request; who has what adds to it keeps it from being forgotten."""
        for sheet in self._sheets:
            if sheet.parent is parent or sheet.parent == parent:
                return sheet, sheet.texts.append
        sheet = _Sheet(parent)
        put = sheet.texts.append
        self._sheets.append(sheet)
        return sheet, put

    def holds(self) -> bool:
        """Whether there is text that was not published."""
        return any(sheet.texts for sheet in self._sheets)

    def flush(self) -> None:
        """What was written, by way of the descriptor too, will come before all that follows."""
        if os.getpid() != self._master_pid:
            self._write_in_child()
            return
        self._pump.drain()
        with self._lock:
            if not self.holds():
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
            self.note()
            for sheet in list(self._sheets):
                text = sheet.take()
                for at in range(0, len(text), PIECE):
                    self._publish(self.name, text[at : at + PIECE], sheet.parent)
                if not text and sheet.forgotten and sheet in self._sheets:
                    self._sheets.remove(sheet)


class OutputPump:
    """Reads descriptors 1 and 2, and publishes buffered output in time."""

    def __init__(
        self,
        read_fds: dict[str, int],
        flush_port: Callable[[], None],
        interrupts: Interrupts | None = None,
    ) -> None:
        self._names = {fd: name for name, fd in read_fds.items()}
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
        self._timer, self._set_timer = _timer()
        self._awake = False
        self._partial = dict.fromkeys(read_fds, b"")
        for fd in read_fds.values():
            os.set_blocking(fd, False)
            with suppress(OSError):  # too many of the user's pipes are that large
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)

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
            self._set_timer()

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
        now = monotonic()
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

    def look(self) -> float:
        """Drain the descriptors, if the last time was long enough ago for something to be there.

        When they were drained last (CLOCK_MONOTONIC).
        """
        if monotonic() - self._looked >= LOOK_INTERVAL:
            self.drain()
        return self._looked

    def drain(self) -> None:
        """Move what the descriptors hold into the streams' buffers."""
        self._looked = monotonic()
        with self._lock:
            pass  # the thread may have taken text from a pipe that it has not added yet
        for fd in select.select(self._names, (), (), 0)[0]:
            self._read(self._names[fd], fd)

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
                stream.add_foreign(data[:end].decode(errors="replace"))
            if len(data) < READ_SIZE and not _readable(fd):
                return

    def _run(self) -> None:
        # SIGINT is for the main thread: here it would only cut a read short.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        poll = select.poll()
        names = self._names
        for fd in (*names, self._timer):
            poll.register(fd, select.POLLIN)
        bell = self._interrupts.bell
        if bell >= 0:
            poll.register(bell, select.POLLIN)
        reminders: list[float] = []  # when to look whether an interrupt was heard
        while True:
            left = max(0.0, reminders[0] - monotonic()) * 1000 if reminders else None
            for fd, event in poll.poll(left):
                if fd == bell:
                    poll.modify(bell, 0)
                    if event == select.POLLIN:
                        reminders = [monotonic() + delay for delay in REMINDERS]
                elif fd in names:
                    self._read(names[fd], fd)
                else:
                    os.read(fd, 8)
                    self._publish_in_time()
            if reminders and monotonic() >= reminders[0]:
                del reminders[0]
                if not self._interrupts.remind() or not reminders:
                    reminders = []
                    self._interrupts.still()
                    poll.modify(bell, select.POLLIN)

    def _publish_in_time(self) -> None:
        """Publish what was written a while ago, and see to what is being written."""
        self._awake = False
        # A write that is on its way may add to what has just been published
        fast = [stream.slow_down() for stream in self.streams.values()]
        self.settle()
        for stream in self.streams.values():
            stream.flush_buffer()
        self.flush_port()
        if any(fast):
            self.wake()


def _timer() -> tuple[int, Callable[[], None]]:
    """A descriptor that is readable ``FLUSH_INTERVAL`` after its timer was set; what sets it.

    Linux's own, where Python has it (3.13, as in a guest): nobody runs before the time has come.
    """
    if sys.version_info >= (3, 13):
        fd = os.timerfd_create(time.CLOCK_MONOTONIC, flags=os.TFD_NONBLOCK | os.TFD_CLOEXEC)
        return fd, lambda: os.timerfd_settime(fd, initial=FLUSH_INTERVAL) and None
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def begin() -> None:
        timer = threading.Timer(FLUSH_INTERVAL, os.eventfd_write, (fd, 1))
        timer.daemon = True
        timer.start()

    return fd, begin


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
