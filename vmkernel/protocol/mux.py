"""Many byte streams over one port: what carries the guest's network (port "network").

A frame is a kind, a stream's number, a length (nine bytes, big-endian) and as many bytes.  The
guest opens streams, numbered upwards; each side may send as many bytes on one as the other has
granted (``WINDOW`` at its start, more by GRANT frames as they are taken), so that a slow reader of
one stream holds up that stream alone and nobody keeps more than a window of it.

Both sides use this class, with asyncio, on a non-blocking descriptor.  The host's side takes
nothing on trust: whatever is not exactly a frame that may come now is a ProtocolError, told to
``on_lost``, and the end.  A stream begins behind a marker that both sides know: what a dead
predecessor has left in the port before that is skipped.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from vmkernel.errors import ProtocolError

HEADER = struct.Struct("!BII")
OPEN, DATA, GRANT, END, RESET = range(1, 6)
PIECE = 32 << 10
"""Bytes of one DATA frame at most."""
WINDOW = 256 << 10
"""Bytes of one stream and direction that may be on their way or wait to be taken."""
MOST_STREAMS = 128
MOST_SERVED = 2 * MOST_STREAMS
"""Streams that are being served, those counted that the other side has given up just now."""
MARKER_SIZE = 16
HIGH_WATER = 512 << 10
"""Bytes that may wait to be written to the port; who would add to them waits, and so do we."""
_READ = 64 << 10
_FRAMES = 1000  # handled in a row
_READS = 16
"""Reads from the port in a row; then others have their turn."""


class StreamResetError(ConnectionResetError):
    """The other side has given the stream up, or the port is gone."""


class Stream:
    """One byte stream, both ways."""

    def __init__(self, mux: Mux, number: int) -> None:
        self.number = number
        self._mux = mux
        self._arrived = bytearray()  # one object, however small the pieces are
        self._granted = WINDOW
        """Bytes that the other side may still send"""
        self._taken = 0
        """Bytes that were taken and not granted again yet"""
        self._credit = WINDOW
        """Bytes that we may still send"""
        self._ended = False  # by the other side
        self._closed = False  # by us
        self._reset = False
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        state = "reset" if self._reset else f"ended={self._ended} closed={self._closed}"
        return f"<Stream {self.number} {state} waiting={len(self._arrived)} credit={self._credit}>"

    async def receive(self) -> bytes | bytearray:
        """What has come, at least a byte; none at the stream's end.  Raises StreamResetError."""
        while not self._arrived:
            if self._reset:
                raise StreamResetError("the stream was given up")
            if self._ended:
                return b""
            await self._wait()
        data, self._arrived = self._arrived, bytearray()
        self._taken += len(data)
        if self._taken >= WINDOW // 2 and not (self._ended or self._reset):
            self._mux.send_frame(GRANT, self.number, struct.pack("!I", self._taken))
            self._granted += self._taken
            self._taken = 0
        return data

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it; waits for the other side's grants.  Raises StreamResetError."""
        view = memoryview(data)
        while view:
            while not self._reset and not self._closed and not self._credit:
                await self._wait()
            await self._mux.writable()
            if self._reset or self._closed:
                raise StreamResetError("the stream was given up")
            piece = view[: min(PIECE, self._credit)]
            if piece:  # another one may have used the credit meanwhile
                self._credit -= len(piece)
                self._mux.send_frame(DATA, self.number, piece)
                view = view[len(piece) :]

    async def lost(self) -> None:
        """Wait until it was given up."""
        while not self._reset:
            await self._wait()

    def end(self) -> None:
        """Nothing more will be sent."""
        if not self._closed and not self._reset:
            self._closed = True
            self._mux.send_frame(END, self.number)
            self._look_for_end()

    def reset(self) -> None:
        """Give the stream up; nothing if it has ended on both sides."""
        if not self._reset and not (self._closed and self._ended):
            self._mux.send_frame(RESET, self.number)
        self.lose()

    def release(self) -> None:
        """Whoever served it is done with it."""
        self._mux.release()

    # --- for the mux ---

    def lose(self) -> None:
        """It is no more."""
        self._reset = True
        self._arrived = bytearray()
        self._mux.forget(self)
        self._changed.set()

    def take(self, kind: int, payload: bytes) -> None:
        """A frame about this stream came.  Raises ProtocolError."""
        if kind == DATA:
            if self._ended or not payload or len(payload) > self._granted:
                raise ProtocolError(f"{len(payload)} bytes on a stream that has no room for them")
            self._granted -= len(payload)
            self._arrived += payload
        elif kind == GRANT:
            (credit,) = struct.unpack("!I", payload)
            self._credit += credit
            if self._credit > WINDOW:
                raise ProtocolError(f"a grant of {credit} bytes, more than were sent")
        elif kind == END:
            if self._ended:
                raise ProtocolError("a stream that ends twice")
            self._ended = True
            self._look_for_end()
        else:
            self.lose()
        self._changed.set()

    def _look_for_end(self) -> None:
        if self._closed and self._ended:
            self._mux.forget(self)

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Mux:
    """The streams of one port.  ``on_stream``: the other side opened one (on the host's side);
    who serves it calls `release` when he is done.
    """

    def __init__(
        self,
        fd: int,
        marker: bytes,
        on_lost: Callable[[Exception | None], None],
        on_stream: Callable[[Stream], None] | None = None,
    ) -> None:
        """``on_lost(error)`` is called once: the port is gone (None), or a peer broke the rules."""
        os.set_blocking(fd, False)
        self.streams: dict[int, Stream] = {}
        self._fd = fd
        self._on_lost = on_lost
        self._on_stream = on_stream
        self._loop = asyncio.get_running_loop()
        self._marker: bytes | None = marker
        self._inbox = bytearray()
        self._outbox: deque[bytes | memoryview] = deque((marker,))
        self._unsent = len(marker)
        self._last = 0  # number of a stream
        self._writing = False
        self._reading = True
        self._behind = False  # frames have come that were not handled yet
        self._served = 0  # streams that the other side has opened, until their `release`
        self._full = False
        self._closed = False
        self._room = asyncio.Event()
        self._room.set()
        self._loop.add_reader(fd, self._on_readable)
        self._write()

    def __repr__(self) -> str:
        return f"<Mux streams={len(self.streams)} unsent={self._unsent} closed={self._closed}>"

    def open(self) -> Stream:
        """A new stream (on the guest's side)."""
        self._last += 1
        stream = self.streams[self._last] = Stream(self, self._last)
        self.send_frame(OPEN, self._last)
        return stream

    def forget(self, stream: Stream) -> None:
        """The stream is over."""
        self.streams.pop(stream.number, None)

    async def writable(self) -> None:
        """Wait until the port takes more."""
        await self._room.wait()

    def send_frame(self, kind: int, number: int, payload: bytes | memoryview = b"") -> None:
        """Put a frame behind what waits to be written."""
        if self._closed:
            return
        frame = HEADER.pack(kind, number, len(payload)) + payload
        self._outbox.append(frame)
        self._unsent += len(frame)
        if self._unsent > HIGH_WATER:
            self._room.clear()
        if not self._writing:
            self._write()

    def close(self) -> None:
        """Leave the port alone; every stream is lost.  The descriptor stays the caller's."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        for stream in list(self.streams.values()):
            stream.lose()
        self._room.set()

    def _lose(self, error: Exception | None) -> None:
        if not self._closed:
            self.close()
            self._on_lost(error)

    def _write(self) -> None:
        try:
            while self._outbox:
                data = memoryview(self._outbox[0])
                sent = os.write(self._fd, data)
                self._unsent -= sent
                if sent == len(data):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = data[sent:]
        except BlockingIOError:
            pass
        except OSError:
            self._lose(None)
            return
        if self._unsent <= HIGH_WATER:
            self._room.set()
        if self._outbox and not self._writing:
            self._writing = True
            self._loop.add_writer(self._fd, self._write)
        elif not self._outbox and self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        self._regulate()

    def _regulate(self) -> None:
        """Read, unless there is a reason to wait."""
        # A peer that sends and does not read makes us keep answers: it has to read first
        wanted = self._unsent <= 2 * HIGH_WATER and not self._behind and not self._closed
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._fd, self._on_readable)
            else:
                self._loop.remove_reader(self._fd)

    def _on_readable(self) -> None:
        for _ in range(_READS):
            try:
                data = os.read(self._fd, _READ)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self._lose(None)
                return
            self._inbox += data
        self._work()

    def release(self) -> None:
        """Whoever served a stream that the other side opened is done with it."""
        self._served -= 1
        if self._full:
            self._full = False
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        """Handle what came, for a turn; the rest in the next one, or when there is room for it."""
        if self._closed:
            return
        try:
            self._behind = self._take()
        except ProtocolError as error:
            self._lose(error)
            return
        if self._behind and not self._full:
            self._loop.call_soon(self._work)
        self._regulate()

    def _take(self) -> bool:
        """Handle frames; whether some are left for later.  Raises ProtocolError."""
        inbox = self._inbox
        if self._marker is not None:
            place = inbox.find(self._marker)
            if place < 0:
                del inbox[: -len(self._marker)]
                return False
            del inbox[: place + len(self._marker)]
            self._marker = None
        begin = count = 0
        try:
            while len(inbox) - begin >= HEADER.size and not self._closed:
                kind, number, length = HEADER.unpack_from(inbox, begin)
                self._check(kind, number, length)
                end = begin + HEADER.size + length
                if len(inbox) < end:
                    return False
                # A stream that was given up counts until who served it has seen that
                self._full = kind == OPEN and self._served >= MOST_SERVED
                count += 1
                if self._full or count > _FRAMES:
                    return True
                payload = bytes(memoryview(inbox)[begin + HEADER.size : end])
                begin = end
                if kind == OPEN:
                    self._last = number
                    self._served += 1
                    stream = self.streams[number] = Stream(self, number)
                    assert self._on_stream is not None
                    self._on_stream(stream)
                elif number in self.streams:  # else it was given up here meanwhile
                    self.streams[number].take(kind, payload)
            return False
        finally:
            with suppress(BufferError):
                del inbox[:begin]

    def _check(self, kind: int, number: int, length: int) -> None:
        """Whether such a frame may come now.  Raises ProtocolError."""
        if kind == OPEN:
            if self._on_stream is None:
                raise ProtocolError("a stream that the other side opens")
            if number != self._last + 1 or length:
                raise ProtocolError(f"stream {number} opened after stream {self._last}")
            if len(self.streams) >= MOST_STREAMS:
                raise ProtocolError(f"more than {MOST_STREAMS} streams at once")
        elif not OPEN <= kind <= RESET:
            raise ProtocolError(f"a frame of kind {kind}")
        elif not 1 <= number <= self._last:
            raise ProtocolError(f"a frame of stream {number}, which was never opened")
        elif kind == DATA:
            if length > PIECE:
                raise ProtocolError(f"a frame of {length} bytes")
        elif length != (4 if kind == GRANT else 0):
            raise ProtocolError(f"a frame of kind {kind} with {length} bytes")


class Idle:
    """When something last moved on a connection: one that is forgotten is ended."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()

    def moved(self) -> None:
        """Something did."""
        self._last = self._loop.time()

    async def over(self) -> None:
        """Wait until nothing has moved for so long."""
        while (rest := self._last + self.seconds - self._loop.time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(rest)


async def join(
    stream: Stream,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    idle_seconds: float,
) -> None:
    """Pass bytes both ways until both have ended, one broke off, or nothing moved for so long."""
    idle = Idle(idle_seconds)

    async def inwards() -> None:
        while data := await stream.receive():
            idle.moved()
            writer.write(data)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()

    async def outwards() -> None:
        while data := await reader.read(PIECE):
            idle.moved()
            await stream.send(data)
        stream.end()

    both = asyncio.ensure_future(asyncio.gather(inwards(), outwards()))
    clock = asyncio.ensure_future(idle.over())
    try:
        await asyncio.wait((both, clock), return_when=asyncio.FIRST_COMPLETED)
        if both.done() and not both.cancelled() and both.exception() is None:
            return
        stream.reset()
        writer.transport.abort()
    finally:
        for task in (both, clock):
            task.cancel()
        await asyncio.gather(both, clock, return_exceptions=True)
        stream.reset()
        writer.close()
