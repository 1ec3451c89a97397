"""What a guest's message may become in memory, judged by its bytes before it is decoded.

JSON grows when it is decoded: ``{},`` are three bytes and a dict of 64.  A message of 160 MiB could
take the host 6 GB so.  So the structure is counted first, with what each part of it takes in
CPython, and a body that would take more than ``MAX_DECODED``, or nests deeper than ``MAX_DEPTH``,
is refused without being decoded.  The count is fast and too high at first (it counts what stands in
strings, too); only a body that fails it is looked at closely.

Where it stands: on the host, before :func:`.messages.decode`.  Pure.
"""

from __future__ import annotations

from itertools import accumulate

from vmkernel.errors import ProtocolError
from vmkernel.protocol.frames import MAX_BODY, Piece

MAX_DEPTH = 200
"""Arrays and objects inside each other.  Far from where Python's recursion ends (about 1,000), as
what is decoded is also looked through, cleaned, and encoded again."""
MAX_DECODED = 448 << 20
"""Bytes of memory that a decoded body may take: 100 MB of text may, at four bytes a character.
With the message itself and what is made of it for the front end, the peak is less than 1 GiB."""
ALWAYS_FINE = 1 << 20
"""Bytes of a body that can take no harmful amount of memory."""

# What a part takes at most, in bytes of CPython 3.11 to 3.13 on 64 bits, its share of the list or
# dict that it is in included.
_COSTS = {
    b"{": 136,  # a dict, its table and the collector's header
    b"[": 104,
    b":": 40,  # a place in a table, which has up to three times as many
    b'"': 28,  # half of a string's header
    b",": 42,  # a number, and a place in a list
}
_WIDEST = 4
_CHUNK = 1 << 20
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_NO_MARKS = bytes(set(range(256)) - set(b"".join(_COSTS)))
_STEPS = bytes.maketrans(_BRACKETS, b"\x01\xff\x01\xff")  # as signed bytes: in, out


class TooMuchError(ProtocolError):
    """A body whose structure is over a limit; its framing is right, so the stream goes on."""


def check(body: Piece) -> None:
    """Let a body pass that is safe to decode.  Raises TooMuchError.

    Says nothing on whether it is JSON: then the figures mean nothing, and decoding it fails.
    """
    size = len(body)
    if size > MAX_BODY:
        raise TooMuchError(f"a message with {size} bytes of JSON (limit {MAX_BODY})")
    if size <= ALWAYS_FINE:
        data = bytes(body)
        if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
            _Close().look(memoryview(data))
        return
    view = memoryview(body)
    cost = brackets = 0
    wide = False
    for at in range(0, size, _CHUNK):
        data = bytes(view[at : at + _CHUNK])
        marks = data.translate(None, _NO_MARKS)
        cost += _cost(marks)
        brackets += marks.count(b"[") + marks.count(b"{")
        wide = wide or _is_wide(data)
    if cost + size * (_WIDEST if wide else 1) > MAX_DECODED or brackets > MAX_DEPTH:
        _Close().look(view)


def memory(body: Piece) -> int:
    """Bytes that it takes at most, once it is decoded; ``body`` is JSON."""
    close = _Close(limit=None)
    close.look(memoryview(body))
    return close.cost


def _cost(marks: bytes) -> int:
    return sum(marks.count(mark) * cost for mark, cost in _COSTS.items())


def _is_wide(data: bytes) -> bool:
    """Whether a string with this in it may have more than a byte for each character."""
    return not data.isascii() or b"\\u" in data


class _Close:
    """A close look: what stands in strings is text, in pieces that bound the look's own memory."""

    def __init__(self, limit: int | None = MAX_DECODED) -> None:
        self.cost = 0
        self._limit = limit
        self._depth = 0
        self._inside = False
        self._open = 0
        """Bytes so far of a string that began in an earlier piece"""
        self._wide = False

    def look(self, body: memoryview) -> None:
        """Raises TooMuchError."""
        rest = b""
        for at in range(0, len(body), _CHUNK):
            data = rest + bytes(body[at : at + _CHUNK])
            escapes = len(data) - len(data.rstrip(b"\\"))
            rest = b"\\" if escapes % 2 else b""  # it escapes what comes in the next piece
            self._piece(data[:-1] if rest else data)

    def _piece(self, data: bytes) -> None:
        parts = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[1 if self._inside else 0 :: 2])
        self.cost += _cost(outside) + (len(parts) - 1) * _COSTS[b'"']
        self._add_text(parts, _WIDEST if _is_wide(data) else 1, len(data) - len(outside))
        if self._limit is None:
            return
        if self.cost + self._open * (_WIDEST if self._wide else 1) > self._limit:
            raise TooMuchError(
                f"a message whose values would take more than {self._limit >> 20} MiB of memory"
            )
        steps = memoryview(outside.translate(_STEPS, _NO_BRACKETS)).cast("b")
        if steps:
            levels = list(accumulate(steps, initial=self._depth))
            self._depth = levels[-1]
            if max(levels) > MAX_DEPTH:
                raise TooMuchError(f"a message that nests deeper than {MAX_DEPTH} levels")

    def _add_text(self, parts: list[bytes], factor: int, size: int) -> None:
        """One wide character makes all of its string wide, in whatever piece it stands."""
        if self._inside:
            self._open += len(parts[0])
            self._wide = self._wide or _is_wide(parts[0])
            if len(parts) == 1:
                return
            self.cost += self._open * (_WIDEST if self._wide else 1)
            size -= len(parts[0])
        self._inside = self._inside == (len(parts) % 2 == 1)
        self._open = len(parts[-1]) if self._inside else 0
        self._wide = self._inside and _is_wide(parts[-1])
        self.cost += (size - self._open) * factor
