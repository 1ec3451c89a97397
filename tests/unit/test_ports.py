"""The host's end of a port, and a peer that floods it, cuts its messages up, or does not read."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from vmkernel.errors import ProtocolError, VmGuestError
from vmkernel.protocol import frames, messages
from vmkernel.vm import ports
from vmkernel.vm.pace import BURST, RATE, Account, price
from vmkernel.vm.ports import AgentPort, Port


def encoded(body: bytes, *buffers: bytes) -> bytes:
    return b"".join(map(bytes, frames.encode(body, buffers)))


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class Peer:
    """A port, what it heard, and the guest's end of it."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.heard: list[bytes] = []
        self.lost: list[ProtocolError | None] = []
        self.port: Port

    def on_message(self, body: memoryview, buffers: list[memoryview]) -> None:
        self.heard.append(bytes(body))


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    peer = Peer()
    peer.port = await Port.open(
        "kernel",
        peer.ours,
        lambda body, buffers: peer.on_message(body, buffers),
        peer.lost.append,
    )
    yield peer
    peer.port.close()
    peer.theirs.close()


async def test_after_a_pause_nothing_is_handed_on_though_it_has_come(peer: Peer) -> None:
    def hear(body: memoryview, buffers: list[memoryview]) -> None:
        peer.heard.append(bytes(body))
        if len(peer.heard) == 3:
            peer.port.pause("one")
            peer.port.pause("two")

    peer.on_message = hear  # type: ignore[method-assign]
    wanted = [b"%d" % number for number in range(10)]
    peer.theirs.sendall(b"".join(map(encoded, wanted)))
    await until(lambda: peer.port.pending)
    await asyncio.sleep(0.05)
    assert peer.heard == wanted[:3]
    peer.port.resume("one")
    await asyncio.sleep(0.05)
    assert len(peer.heard) == 3, "there was another reason"
    peer.port.resume("two")
    await until(lambda: len(peer.heard) == 10)
    assert peer.heard == wanted


async def test_who_floods_leaves_others_their_turn(peer: Peer) -> None:
    def hear(body: memoryview, buffers: list[memoryview]) -> None:
        peer.heard.append(b"")
        time.sleep(0.001)

    peer.on_message = hear  # type: ignore[method-assign]
    peer.theirs.sendall(encoded(b"x") * 1000)
    await until(lambda: peer.heard)
    longest, before = 0.0, time.monotonic()
    while len(peer.heard) < 1000:
        await asyncio.sleep(0)
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
    assert longest < 0.3  # a second and more, were it all in one turn


async def test_what_came_before_the_end_is_heard_before_it(peer: Peer) -> None:
    peer.port.pause("a while")
    await asyncio.sleep(0.01)
    peer.port.resume("a while")
    peer.theirs.sendall(encoded(b"x") * 5000)
    peer.theirs.close()
    await until(lambda: peer.lost)
    assert len(peer.heard) == 5000


async def test_what_has_come_of_a_message_is_let_go_when_the_port_breaks(peer: Peer) -> None:
    peer.theirs.setblocking(True)
    frame = (0x8000_0000 | frames.MAX_FRAME).to_bytes(4, "big") + bytes(frames.MAX_FRAME)
    await asyncio.to_thread(peer.theirs.sendall, frame * 4)
    await until(lambda: peer.port._reader.held >= 4 << 20)
    await asyncio.to_thread(peer.theirs.sendall, b"\x7f\xff\xff\xff")
    await until(lambda: peer.lost)
    assert isinstance(peer.lost[0], ProtocolError)
    assert peer.port._reader.held == 0


async def test_a_guest_that_does_not_read_is_told_of(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer.port._max_unsent = 1 << 20
    piece = bytes(300 << 10)

    def fill() -> None:
        for _ in range(100):
            peer.port.send(piece)

    with pytest.raises(VmGuestError, match="does not read its port 'kernel'"):
        fill()
    assert peer.port.unsent < (1 << 20) + 2 * len(piece)


async def test_half_a_message_on_one_port_keeps_no_other_waiting(peer: Peer) -> None:
    peer.theirs.sendall(encoded(b"x" * 1000)[:-1])
    other = Peer()
    other.port = await Port.open("agent", other.ours, other.on_message, other.lost.append)
    other.theirs.sendall(encoded(b"x"))
    await until(lambda: other.heard)
    assert not peer.heard
    other.port.close()
    other.theirs.close()


async def agent() -> tuple[AgentPort, socket.socket, list[Any], list[Any]]:
    events: list[Any] = []
    lost: list[Any] = []
    port = AgentPort(events.append)
    ours, theirs = socket.socketpair()
    await port.open(ours, lost.append)
    return port, theirs, events, lost


async def test_an_agent_that_floods_is_slowed_and_nothing_is_lost() -> None:
    port, theirs, events, _ = await agent()
    news = encoded(messages.encode_json(messages.KernelDied(1, None, False, "")))
    count = int(BURST) + 300
    sending = asyncio.create_task(asyncio.to_thread(theirs.sendall, news * count))
    began = time.monotonic()
    await until(lambda: len(events) == count, 20)
    assert time.monotonic() - began > 0.8 * 300 / RATE
    await sending
    port.close()
    theirs.close()


async def test_replies_that_nobody_asked_for_are_counted_and_no_answer() -> None:
    port, theirs, _, _ = await agent()
    asked = asyncio.create_task(port.call(messages.Stats(), timeout=5))
    await asyncio.sleep(0)
    for number in (7, -1, 1 << 70):
        theirs.sendall(encoded(messages.encode_json(messages.Reply(number, "", {"a": 1}))))
    theirs.sendall(encoded(messages.encode_json(messages.Reply(1, "", {"right": 1}))))
    assert await asked == {"right": 1}
    assert port.unasked == 3
    port.close()
    theirs.close()


async def test_an_agents_message_may_not_be_large() -> None:
    port, theirs, _, lost = await agent()
    sending = asyncio.create_task(
        asyncio.to_thread(theirs.sendall, encoded(bytes(ports.MAX_AGENT_MESSAGE + 1)))
    )
    await until(lambda: lost)
    assert isinstance(lost[0], ProtocolError)
    await sending
    port.close()
    theirs.close()


def test_an_account_pays_for_a_progress_bar_and_not_for_a_flood() -> None:
    account, now = Account(0.0), 0.0
    for _ in range(10_000):  # a hundred a second, for minutes
        now += 0.01
        assert account.take(price(2000), now) == 0
    assert sum(account.take(price(2000), now) for _ in range(int(BURST) // 2)) == 0
    paused, now, sent = 0.0, 1000.0, 0
    while now < 1010:
        pause = account.take(price(100), now)
        now += pause + 1e-5
        paused += pause
        sent += 1
    assert paused > 5
    assert sent < BURST + 10 * RATE
