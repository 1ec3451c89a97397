"""Bodies: decoded strictly, whatever a hostile peer sends."""

import contextlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkernel.errors import ProtocolError
from vmkernel.protocol import messages

COMMANDS = [
    messages.Wake(time_ns=1, entropy=b"\x00\xff" * 32, hostname="vm"),
    messages.SetClock(time_ns=2**62),
    messages.Interrupt(),
    messages.StartKernel(marker=b"m" * 16),
    messages.Stats(),
    messages.ReadFile(path=b"\xff/a", offset=2**40, size=messages.MAX_CHUNK),
    messages.WriteFile(path=b"a", offset=0, mode=0o644, truncate=True),
    messages.ListFiles(path=b"/", skip=256),
    messages.MakeDirectory(path=b"a", mode=0o755),
]
EVENTS = [
    messages.Hello("6.12", "3.13", 1.02),
    messages.Ready({"language_info": {"name": "python"}, "status": "ok"}),
    messages.KernelDied(None, 11, False, "Segmentation fault"),
    messages.Failed("why"),
    messages.Reply(3, "", {"a": 1}),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_a_command_arrives_as_it_was_sent(command: messages.Command) -> None:
    call = messages.Call(7, command)
    assert messages.decode(messages.encode_json(call), messages.Call) == call


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_arrives_as_it_was_sent(event: messages.FromAgent) -> None:
    assert messages.decode_from_agent(messages.encode_json(event)) == event


def test_a_request_keeps_the_front_ends_json_to_the_letter() -> None:
    raw = msgspec.Raw(b'{"code" : "1+1",   "big": 123456789012345678901234567890}')
    empty = msgspec.Raw(b"{}")
    request = messages.ToGuest("shell", "id", "execute_request", empty, empty, raw)
    again = messages.decode(messages.encode_json(request), messages.ToGuest)
    assert bytes(again.content) == bytes(raw)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b"[]",
        b'["iopub"]',
        b'["heartbeat","stream","",{},{}]',
        b'["iopub",1,"",{},{}]',
        b'["iopub","stream",null,{},{}]',
        b'["iopub","stream","",[],{}]',
        b'["iopub","stream","",{},"text"]',
        b'["iopub","stream","",{},{},1]',
        b'["iopub","' + b"x" * 2000 + b'","",{},{}]',
        b'["iopub","stream","",{},{"text":"\xff"}]',
        b'["iopub","stream","",{},{"text":"\\ud800"}]',
        b'["iopub","stream","",{},' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_malformed_answer_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages.decode(body, messages.FromGuest)


@given(JSON)
def test_any_json_is_an_answer_or_a_protocol_error(value: object) -> None:
    for kind in (messages.FromGuest, messages.Call, messages.FromAgent):
        with contextlib.suppress(ProtocolError):
            messages.decode(json.dumps(value).encode(), kind)  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_a_protocol_error(body: bytes) -> None:
    for kind in (messages.FromGuest, messages.FromAgent):
        with contextlib.suppress(ProtocolError):
            messages.decode(body, kind)  # type: ignore[arg-type]


def test_a_streams_text_may_come_as_its_buffer() -> None:
    content = {"name": "stdout"}
    assert messages.take_text(content, [memoryview("é\n".encode())])
    assert content == {"name": "stdout", "text": "é\n"}
    content = {"name": "stdout", "text": "x"}
    assert not messages.take_text(content, [memoryview(b"y")])
    assert not messages.take_text({"name": "stdout"}, [])
    assert content["text"] == "x"


@pytest.mark.parametrize(
    "buffers",
    [[b"\xff"], ["é".encode()[:1]], [b"a", b"b"], [bytes(messages.MAX_TEXT + 1)]],
    ids=["no UTF-8", "half a character", "two", "too long"],
)
def test_a_streams_text_that_is_none_is_a_protocol_error(buffers: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        messages.take_text({"name": "stdout"}, buffers)
