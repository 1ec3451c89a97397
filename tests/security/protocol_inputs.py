"""What any bytes may do to the decoders: one function for the fuzzer, hypothesis and the corpus.

`run(data)` takes the first byte for the decoder, and what follows for its input.  It raises where
a decoder does what it must not: any exception but ProtocolError, another result when the same
stream is cut otherwise, or a value that does not survive being encoded again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

from vmkernel.errors import ProtocolError
from vmkernel.kernel.policy.messages import SafeOutputs
from vmkernel.protocol import bounds, files, frames, kernelinfo, messages

FRAME = 64
"""Bytes of a full frame here: small, so that short inputs have messages of several."""
STREAM_LIMIT = 512
"""Bytes of a message here"""


def run(data: bytes) -> None:
    """Feed ``data`` to the decoder that its first byte names."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def stream(data: bytes) -> None:
    """A port: the messages are the same however the stream is cut."""
    if not data:
        return
    step, stream = data[0] % 9 + 1, data[1:]
    whole = _read([stream])
    pieces = _read([stream[at : at + step] for at in range(0, len(stream), step)])
    assert whole[1] == pieces[1], "an error by one way of cutting, none by another"
    assert pieces[0][: len(whole[0])] == whole[0]
    if not whole[1]:
        assert whole[0] == pieces[0]
    for message in pieces[0]:
        split(bytes(message))


def _read(pieces: list[bytes]) -> tuple[list[bytearray], bool]:
    reader = frames.FrameReader(STREAM_LIMIT, FRAME)
    done: list[bytearray] = []
    try:
        for piece in pieces:
            done += reader.feed(piece)
            assert reader.held <= STREAM_LIMIT + FRAME + 4, "it keeps more than a message"
    except ProtocolError:
        return done, True
    return done, False


def resync(data: bytes) -> None:
    """A port after its guest kernel died: all before the marker is gone, all after it is read."""
    marker, rest = data[: frames.MARKER_SIZE], data[frames.MARKER_SIZE :]
    if not rest or (rest + marker).find(marker) != len(rest):
        return  # a marker is random: no stream has it by chance
    cut = rest[0] % len(rest)
    body = rest[: FRAME - 4]
    reader = frames.FrameReader(STREAM_LIMIT, FRAME)
    reader.resync(marker)
    done = []
    for piece in (rest[:cut], rest[cut:] + marker[:7], marker[7:], *frames.encode(body)):
        done += reader.feed(bytes(piece))
        assert reader.held <= STREAM_LIMIT + FRAME + len(data)
    assert [bytes(frames.split(message)[0]) for message in done] == [body]


def split(data: bytes) -> None:
    """A message: its parts are those that it was made of."""
    try:
        body, buffers = frames.split(data)
    except ProtocolError:
        return
    again = b"".join(frames.encode(bytes(body), buffers))
    assert again[4:] == data


def from_guest(data: bytes) -> None:
    """A guest kernel's message: what is decoded can be encoded, and is then the same."""
    try:
        message = messages.decode_from_guest(data)
    except ProtocolError:
        messages.decode_head(data)
        return
    again = messages.decode_from_guest(messages.encode_json(message))
    assert again == message
    head = messages.decode_head(data)
    assert head is not None
    assert (head.channel, head.parent_id) == (message.channel, message.parent_id)


def from_agent(data: bytes) -> None:
    """An agent's message; of a file's news and usage, the result too."""
    try:
        message = messages.decode_from_agent(data)
    except ProtocolError:
        return
    assert messages.decode_from_agent(messages.encode_json(message)) == message


def _decoded(*kinds: Any) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        for kind in kinds:
            try:
                value = messages.decode(data, kind)
            except ProtocolError:
                continue
            assert messages.decode(messages.encode_json(value), kind) == value

    return target


def kernel_info(data: bytes) -> None:
    """A kernel's account of itself: what is kept of it is kept whole the second time."""
    try:
        info = messages.decode(data, dict[str, Any])
        kept = kernelinfo.checked(info)
    except ProtocolError:
        return
    assert kernelinfo.checked(kept) == kept


def bounds_of_json(data: bytes) -> None:
    """What passes nests no deeper than it may, and what is JSON and shallow passes."""
    try:
        bounds.check(data)
        passes = True
    except ProtocolError:
        passes = False
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    assert passes == (_depth(value) <= bounds.MAX_DEPTH)


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        level = [
            item
            for inner in level
            if isinstance(inner, list | dict)
            for item in [None, *(inner.values() if isinstance(inner, dict) else inner)]
        ]
        depth += bool(level)
    return depth


_SHOWN = (
    "text/html", "text/markdown", "image/svg+xml", "text/latex", "text/plain", "application/json",
    "application/vnd.plotly.v1+json", "application/vnd.vega.v5+json",
    "application/vnd.jupyter.widget-view+json", "application/javascript", "text/HTML; x=1", "x/y",
)  # fmt: skip


def policy(data: bytes) -> None:
    """The output policy, of a display: what it lets through is encoded, and it takes no offence."""
    if not data:
        return
    text: Any = data[1:].decode(errors="replace")
    kind = _SHOWN[data[0] % len(_SHOWN)]
    if "json" in kind:
        with contextlib.suppress(ProtocolError):
            text = messages.decode(data[1:], dict[str, Any])
    content = {"data": {kind: text}, "metadata": {}, "transient": {}}
    done, removed = SafeOutputs().iopub("display_data", (content, {}, ()), "", None)
    messages.encode_json(done[0] if done is not None else None)
    assert all(isinstance(word, str) for word in removed)


TARGETS: list[Callable[[bytes], None]] = [
    stream,
    split,
    from_guest,
    from_agent,
    _decoded(messages.ToGuest, messages.Call),  # what the guest reads
    _decoded(messages.WakeKernel, messages.Usage),
    _decoded(files.FileListing, files.FileChunk, files.FileRefusal),
    kernel_info,
    bounds_of_json,
    resync,
    policy,
]
