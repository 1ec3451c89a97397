"""Framing: what one side encodes the other reads, however the bytes are cut; lies are errors."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmkernel.errors import ProtocolError
from vmkernel.protocol import frames

BODIES = st.binary(max_size=200)
MESSAGES = st.lists(st.tuples(BODIES, st.lists(BODIES, max_size=4)), max_size=6)


def joined(body: bytes, buffers: list[bytes]) -> bytes:
    return b"".join(frames.encode(body, buffers))


@given(MESSAGES, st.lists(st.integers(1, 50), min_size=1))
def test_messages_survive_any_cut_of_the_stream(
    messages: list[tuple[bytes, list[bytes]]], cuts: list[int]
) -> None:
    stream = b"".join(joined(body, buffers) for body, buffers in messages)
    reader = frames.FrameReader()
    received = []
    at = turn = 0
    while at < len(stream):
        step = cuts[turn % len(cuts)]
        received += reader.feed(stream[at : at + step])
        at, turn = at + step, turn + 1
    parts = [frames.split(message) for message in received]
    assert [(bytes(body), [bytes(b) for b in buffers]) for body, buffers in parts] == messages


def test_a_large_message_travels_in_frames_of_bounded_size() -> None:
    body, buffers = b"b" * 10, [os.urandom(3 * frames.MAX_FRAME + 7), b"", os.urandom(5)]
    pieces = frames.encode(body, buffers)
    stream = b"".join(pieces)
    at, count = 0, 0
    while at < len(stream):
        length = int.from_bytes(stream[at : at + 4], "big") & 0x7FFFFFFF
        assert length <= frames.MAX_FRAME
        at, count = at + 4 + length, count + 1
    assert count == 4
    (message,) = frames.FrameReader().feed(stream)
    got_body, got = frames.split(message)
    assert bytes(got_body) == body
    assert [bytes(b) for b in got] == buffers


def test_a_strided_buffer_is_sent_as_its_bytes() -> None:
    view = memoryview(bytes(range(10)))[::2]
    (message,) = frames.FrameReader().feed(b"".join(frames.encode(b"x", [view])))
    assert bytes(frames.split(message)[1][0]) == bytes([0, 2, 4, 6, 8])


def test_what_is_over_the_limit_is_refused_by_the_sender() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        frames.encode(b"", [memoryview(bytes(1))] * (frames.MAX_BUFFERS + 1))


@pytest.mark.parametrize(
    "data",
    [
        (frames.MAX_FRAME + 1).to_bytes(4, "big"),
        b"\x7f\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x80\x00\x00\x00",
    ],
)
def test_a_length_that_no_peer_sends_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.FrameReader().feed(data)


def test_a_message_that_never_ends_is_cut_off_at_the_limit() -> None:
    reader = frames.FrameReader(max_message=1000, max_frame=100)
    frame = (0x8000_0000 | 100).to_bytes(4, "big") + bytes(100)  # full ones
    assert reader.feed(frame * 10) == []
    with pytest.raises(ProtocolError, match="more than 1000"):
        reader.feed(frame)


@given(st.binary(max_size=400))
@settings(max_examples=500)
def test_random_bytes_are_messages_or_a_protocol_error(data: bytes) -> None:
    try:
        for message in frames.FrameReader(max_message=300).feed(data):
            frames.split(message)
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "message", [b"", b"\x00", b"\x00\x00\x00\x05abc", b"\x00\x00\x00\x01a\x00\x00\x00\x02b"]
)
def test_parts_that_lie_about_their_length_are_an_error(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.split(message)


@given(st.binary(max_size=100), st.integers(1, 30))
def test_a_reader_that_resynchronises_skips_to_the_marker(garbage: bytes, step: int) -> None:
    marker = os.urandom(frames.MARKER_SIZE)
    stream = garbage + marker + joined(b"first", [b"1"])
    reader = frames.FrameReader()
    reader.feed(b"\x00\x00\x00\x09half")  # what a dead process left
    reader.resync(marker)
    received = []
    for at in range(0, len(stream), step):
        received += reader.feed(stream[at : at + step])
    assert [bytes(frames.split(message)[0]) for message in received] == [b"first"]
