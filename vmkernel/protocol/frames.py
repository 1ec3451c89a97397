"""Framing on the virtio ports: length-prefixed fragments that make up messages.

Both ports are byte streams with two ends that do not trust each other, so this is the
first thing that touches a peer's bytes.  A *frame* is a big-endian 32-bit word, then that
many bytes of payload.  The top bit of the word says that the message goes on in the next
frame: a large message travels in pieces, so neither side needs one huge read or write.  Such a
frame is full: a message in millions of tiny pieces would be work without end.

A message is a JSON *body* and any number of binary *buffers*
(https://jupyter-client.readthedocs.io, "The wire protocol": a Jupyter message may carry
raw buffers after its four JSON parts)::

    u32 body length | body | { u32 buffer length | buffer } *

Pure: no I/O here.  Whoever reads calls :meth:`FrameReader.feed`, whoever writes sends what
:func:`encode` returns.  After a process on one end was replaced, the stream may stop in the
middle of a frame; :meth:`FrameReader.resync` then skips to an agreed random marker.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from vmkernel.errors import ProtocolError

MAX_FRAME = 1 << 20
"""Largest payload of one frame, bytes."""
MAX_MESSAGE = 256 << 20
"""Largest message, bytes: room for a 100 MB array in a display or a comm."""
MAX_BODY = 160 << 20
"""Largest JSON body of a message, bytes: room for a 100 MB image in base64."""
MAX_BUFFERS = 4096
MARKER_SIZE = 16
"""Bytes in a resynchronisation marker."""

_MORE = 0x8000_0000
_LENGTH = 0x7FFF_FFFF
_WORD = struct.Struct(">I")

Piece = bytes | bytearray | memoryview


def encode(body: bytes, buffers: Sequence[Piece] = ()) -> list[Piece]:
    """The bytes of one message, as pieces for ``writev``; large ones are not copied.

    Raises ProtocolError when the message is larger than ``MAX_MESSAGE``, or its body than
    ``MAX_BODY``.
    """
    if len(body) > MAX_BODY:
        raise ProtocolError(
            f"a message with {len(body)} bytes of JSON is over the limit of {MAX_BODY} bytes",
            hint="send less at once, for example in slices, or as a file",
        )
    pieces: list[Piece] = [_WORD.pack(len(body)), body]
    total = 4 + len(body)
    for buffer in buffers:
        view = memoryview(buffer)
        if not view.contiguous:  # only a copy can be written as it stands
            view = memoryview(view.tobytes())
        view = view.cast("B")
        pieces += (_WORD.pack(len(view)), view)
        total += 4 + len(view)
    if len(buffers) > MAX_BUFFERS or total > MAX_MESSAGE:
        raise ProtocolError(
            f"a message of {total} bytes and {len(buffers)} buffers is over the limit of "
            f"{MAX_MESSAGE} bytes and {MAX_BUFFERS} buffers",
            hint="send less at once, for example in slices",
        )
    if total <= MAX_FRAME:
        if not buffers:
            return [_WORD.pack(total) + _WORD.pack(len(body)) + body]
        return [_WORD.pack(total), *pieces]
    return list(_fragments(pieces, total))


def _fragments(pieces: Iterable[Piece], total: int) -> Iterable[Piece]:
    """Cut ``pieces`` into frames of at most MAX_FRAME."""
    room = 0
    left = total
    for piece in pieces:
        view = memoryview(piece)
        while view:
            if room == 0:
                room = min(left, MAX_FRAME)
                left -= room
                yield _WORD.pack(room | (_MORE if left else 0))
            part = view[:room]
            room -= len(part)
            view = view[len(part) :]
            yield part


def split(message: Piece) -> tuple[memoryview, list[memoryview]]:
    """A message's body and buffers, as views.  Raises ProtocolError when lengths lie."""
    view = memoryview(message)
    parts: list[memoryview] = []
    while view:
        if len(view) < 4 or len(parts) > MAX_BUFFERS:
            raise ProtocolError("a message ends inside a length, or has too many buffers")
        (length,) = _WORD.unpack_from(view)
        if length > len(view) - 4:
            raise ProtocolError("a message is shorter than its parts say")
        parts.append(view[4 : 4 + length])
        view = view[4 + length :]
    if not parts:
        raise ProtocolError("an empty message")
    return parts[0], parts[1:]


class FrameReader:
    """Cuts a byte stream into messages.  Memory is bounded by ``max_message`` and one read.

    ``max_frame`` is ``MAX_FRAME`` between host and guest; another one is for tests.
    """

    def __init__(self, max_message: int = MAX_MESSAGE, max_frame: int = MAX_FRAME) -> None:
        self._max = max_message
        self._max_frame = max_frame
        self._data = bytearray()
        self._message: bytearray | None = None
        self._marker: bytes | None = None

    def __repr__(self) -> str:
        partial = len(self._message) if self._message is not None else 0
        return f"<FrameReader buffered={len(self._data)} partial={partial}>"

    @property
    def held(self) -> int:
        """Bytes that are kept of a message that is not whole yet."""
        return len(self._data) + len(self._message or b"")

    def resync(self, marker: bytes) -> None:
        """Throw away all that comes before ``marker`` (MARKER_SIZE random bytes)."""
        if len(marker) != MARKER_SIZE:
            raise ValueError(f"a marker has {MARKER_SIZE} bytes")
        self._message = None
        self._marker = marker

    def feed(self, data: Piece) -> list[bytearray]:
        """The messages that ``data`` completes, in order.

        Raises ProtocolError when a frame or message is over its limit; the stream is then
        of no more use.
        """
        buffer = self._data
        buffer += data
        if self._marker is not None and not self._skip_to_marker():
            return []
        done: list[bytearray] = []
        at = 0
        while len(buffer) - at >= 4:
            (word,) = _WORD.unpack_from(buffer, at)
            length = word & _LENGTH
            if length > self._max_frame or length == 0:
                raise ProtocolError(f"a frame of {length} bytes (limit {self._max_frame})")
            if word & _MORE and length != self._max_frame:
                raise ProtocolError(f"a frame of {length} bytes that is not the message's last")
            if len(buffer) - at - 4 < length:
                break
            with memoryview(buffer) as view:
                payload = view[at + 4 : at + 4 + length]
                if len(self._message or b"") + length > self._max:
                    payload.release()
                    raise ProtocolError(f"a message of more than {self._max} bytes")
                if self._message is None:
                    self._message = bytearray(payload)
                else:
                    self._message += payload
                payload.release()
            at += 4 + length
            if not word & _MORE:
                done.append(self._message)
                self._message = None
        if at:
            del buffer[:at]
        return done

    def _skip_to_marker(self) -> bool:
        assert self._marker is not None
        found = self._data.find(self._marker)
        if found < 0:
            del self._data[: max(0, len(self._data) - MARKER_SIZE + 1)]
            return False
        del self._data[: found + MARKER_SIZE]
        self._marker = None
        return True
