"""The five sockets, through pyzmq clients: signatures, identities, order, back-pressure."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from vmkernel.errors import VmError
from vmkernel.kernel.sockets import DELIMITER, Request, Sockets

KEY = b"secret"
NAMES = ("shell", "control", "stdin", "iopub", "hb")


class Kernel:
    """Sockets over ipc in a directory of the test, and a client for them."""

    def __init__(self, directory: Path) -> None:
        self.requests: list[Request] = []
        info: dict[str, Any] = {f"{name}_port": number for number, name in enumerate(NAMES, 1)}
        info |= {"transport": "ipc", "ip": str(directory / "k"), "key": KEY.decode()}
        info["signature_scheme"] = "hmac-sha256"
        file = directory / "kernel-1.json"
        file.write_text(json.dumps(info))
        self.sockets = Sockets(file, self.requests.append)
        self.context = zmq.asyncio.Context()
        self.address = f"ipc://{directory}/k-"

    def connect(self, name: str, kind: int, identity: bytes = b"") -> zmq.asyncio.Socket:
        sock = self.context.socket(kind)
        sock.linger = 0
        if identity:
            sock.identity = identity
        if kind == zmq.SUB:
            sock.subscribe(b"")
        sock.connect(self.address + str(NAMES.index(name) + 1))
        return sock

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.sockets.close()


@pytest.fixture
async def kernel(tmp_path: Path) -> AsyncIterator[Kernel]:
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()


def signed(msg_type: str, content: Any = None, msg_id: str = "1", key: bytes = KEY) -> list[bytes]:
    header = {"msg_id": msg_id, "msg_type": msg_type, "session": "s", "username": "u"}
    parts = [json.dumps(part).encode() for part in (header, {}, {}, content or {})]
    signature = hmac.new(key, b"".join(parts), hashlib.sha256).hexdigest().encode()
    return [DELIMITER, signature, *parts]


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_signed_request_arrives_and_its_answer_finds_the_client(kernel: Kernel) -> None:
    one, two = (kernel.connect("shell", zmq.DEALER, name) for name in (b"one", b"two"))
    await one.send_multipart([*signed("execute_request", {"code": "1"}, "a"), b"buffer"])
    await two.send_multipart(signed("execute_request", {"code": "2"}, "b"))
    await until(lambda: len(kernel.requests) == 2)
    requests = {request.msg_id: request for request in kernel.requests}
    assert requests["a"].buffers == [b"buffer"]
    for name, client in (("b", two), ("a", one)):
        kernel.sockets.reply(requests[name], "execute_reply", {"status": "ok"})
        frames = await client.recv_multipart()
        assert (
            frames[1] == hmac.new(KEY, b"".join(frames[2:6]), hashlib.sha256).hexdigest().encode()
        )
        assert json.loads(frames[3])["msg_id"] == name


@pytest.mark.parametrize(
    "frames",
    [
        signed("execute_request", key=b"wrong"),
        [b"no delimiter"],
        [DELIMITER],
        [DELIMITER, b"", b"{}", b"{}"],
        [*signed("x")[:1], b"", *signed("x")[2:]],
    ],
    ids=["wrong key", "no delimiter", "nothing else", "too few parts", "no signature"],
)
async def test_what_is_not_from_our_front_end_is_dropped(
    kernel: Kernel, frames: list[bytes]
) -> None:
    client = kernel.connect("shell", zmq.DEALER)
    await client.send_multipart(frames)
    await client.send_multipart(signed("kernel_info_request", msg_id="good"))
    await until(lambda: kernel.requests)
    assert [request.msg_id for request in kernel.requests] == ["good"]
    assert kernel.sockets.rejected == 1


async def test_the_heartbeat_echoes(kernel: Kernel) -> None:
    client = kernel.connect("hb", zmq.REQ)
    for beat in (b"ping", b"pong"):
        await client.send(beat)
        async with asyncio.timeout(10):
            assert await client.recv() == beat


async def test_a_subscriber_is_welcomed_and_hears_everything_in_order(kernel: Kernel) -> None:
    client = kernel.connect("iopub", zmq.SUB)
    async with asyncio.timeout(10):
        welcome = await client.recv_multipart()
    assert json.loads(welcome[3])["msg_type"] == "iopub_welcome"
    for number in range(300):
        kernel.sockets.publish("stream", {"n": number}, b'{"msg_id": "p"}')
    got = []
    async with asyncio.timeout(20):
        while len(got) < 300:
            frames = await client.recv_multipart()
            got.append(json.loads(frames[6])["n"])
            assert json.loads(frames[4]) == {"msg_id": "p"}
    assert got == list(range(300))


async def test_a_slow_subscriber_is_waited_for_and_loses_nothing(kernel: Kernel) -> None:
    client = kernel.connect("iopub", zmq.SUB)
    async with asyncio.timeout(10):
        await client.recv_multipart()
    total, sent, clear = 4000, 0, asyncio.Event()
    text = "x" * 20_000
    while not kernel.sockets.congested and sent < total:
        kernel.sockets.publish("stream", {"n": sent, "text": text})
        sent += 1
    assert sent < total, "80 MB went into buffers, and nobody was told to wait"
    kernel.sockets.when_clear(clear.set)
    got = 0
    async with asyncio.timeout(30):
        while got < sent:
            frames = await client.recv_multipart()
            assert json.loads(frames[6])["n"] == got
            got += 1
        await clear.wait()
    assert not kernel.sockets.congested


async def test_a_connection_file_that_is_none_is_an_error_with_a_hint(tmp_path: Path) -> None:
    file = tmp_path / "kernel.json"
    for text in ("", "[]", "{}", '{"shell_port": "x"}'):
        file.write_text(text)
        with pytest.raises(VmError) as failure:
            Sockets(file, lambda request: None)
        assert str(file) in str(failure.value)
        assert failure.value.hint


def dated(date: str, session: str = "s") -> Request:
    header = json.dumps({"msg_id": "1", "session": session, "date": date}).encode()
    return Request("control", [], [header, b"{}", b"{}", b"{}"], [])


def test_what_came_late_is_told_from_a_clock_that_was_set():
    noon, later = dated("2026-01-01T12:00:00Z"), dated("2026-01-01T12:00:00.5Z")
    assert noon.was_sent_before(later)
    assert not later.was_sent_before(noon)
    assert not noon.was_sent_before(dated("2026-01-01T13:00:00Z"))
    assert not noon.was_sent_before(dated("2026-01-01T12:00:00.5Z", session="other"))
    assert not noon.was_sent_before(dated("yesterday"))
    assert not noon.was_sent_before(dated("2026-01-01T12:00:00.5"))  # no zone: not comparable
