"""The host's end of a VM's ports, on asyncio.

A port is one end of a socket pair whose other end QEMU inherited: it has no name in the
file system, so nobody else can connect to it, and it is gone with either process.  What
comes in is hostile: :mod:`vmkernel.protocol` cuts and checks it, and a peer that breaks
the protocol is cut off for good.  :meth:`Port.pause` is the back-pressure: it stops reading,
and the guest's writes block.  What a guest does not take yet is kept here, up to a limit; then
:meth:`Port.send` says that the guest does not read.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from vmkernel.errors import ProtocolError, VmGuestError
from vmkernel.protocol import frames, messages
from vmkernel.vm import pace

log = logging.getLogger("vmkernel")

SLICE = 0.01
"""Seconds for which messages of one port are handled in a row; then others have their turn."""
MOST_UNSENT = 256 << 20
"""Bytes that may wait for a guest kernel when one more message is sent to it: a large one is legal,
and a busy guest reads it late."""
MOST_UNSENT_AGENT = 8 << 20
"""The same for the agent, which always reads: several pieces of files."""
MAX_AGENT_MESSAGE = 2 << 20
"""Largest message of an agent, bytes: a piece of a file and its news, and what is told in words."""

OnMessage = Callable[[memoryview, list[memoryview]], None]
OnLost = Callable[[ProtocolError | None], None]


class Port(asyncio.Protocol):
    """Framed messages over a connected socket; made by :meth:`open`.

    ``max_message`` bounds what comes in; ``max_unsent`` what may wait to go out, None: nothing.
    """

    def __init__(
        self,
        name: str,
        on_message: OnMessage,
        on_lost: OnLost,
        *,
        max_message: int = frames.MAX_MESSAGE,
        max_unsent: int | None = None,
    ) -> None:
        self.name = name
        self.received = 0
        self.on_congested: Callable[[bool], None] = lambda congested: None
        """Called with True when the peer is slow to take what was sent, with False when it did."""
        self._on_message = on_message
        self._on_lost = on_lost
        self._max_unsent = max_unsent
        self._max_message = max_message
        self._reader = frames.FrameReader(max_message)
        self._transport: asyncio.Transport | None = None
        self._broken = False
        self._arrived: deque[bytearray] = deque()
        """Whole messages that were not handled yet: of one read at most"""
        self._outgoing: deque[frames.Piece] = deque()
        """What asyncio has not been given yet: it copies what it keeps (before Python 3.12)"""
        self._outgoing_bytes = 0
        self._choked = False
        self._pauses: set[str] = set()
        self._handling: asyncio.Handle | None = None

    def __repr__(self) -> str:
        state = "broken" if self._broken else "open" if self._transport else "closed"
        paused = f" paused={','.join(sorted(self._pauses))}" if self._pauses else ""
        return f"<Port {self.name} {state}{paused} received={self.received} unsent={self.unsent}>"

    @classmethod
    async def open(
        cls,
        name: str,
        sock: socket.socket,
        on_message: OnMessage,
        on_lost: OnLost,
        *,
        max_message: int = frames.MAX_MESSAGE,
        max_unsent: int | None = MOST_UNSENT,
    ) -> Port:
        """A port on ``sock``, which becomes the port's to close.

        ``on_message(body, buffers)`` is called for each message; ``on_lost(error)`` once, when
        the peer hung up (None) or broke the protocol.
        """
        loop = asyncio.get_running_loop()
        port = cls(name, on_message, on_lost, max_message=max_message, max_unsent=max_unsent)
        await loop.create_connection(lambda: port, sock=sock)
        return port

    @property
    def connected(self) -> bool:
        """Whether :meth:`send` can be called: the peer neither hung up nor broke the protocol."""
        return self._transport is not None and not self._broken

    @property
    def unsent(self) -> int:
        """Bytes that the guest has not taken yet."""
        if self._transport is None:
            return 0
        return self._outgoing_bytes + self._transport.get_write_buffer_size()

    @property
    def pending(self) -> int:
        """Whole messages that have come and were not handled yet."""
        return len(self._arrived)

    @property
    def socket(self) -> socket.socket:
        """The socket, while it is connected, for questions about the peer."""
        assert self._transport is not None
        sock: socket.socket = self._transport.get_extra_info("socket")
        return sock

    def send(self, body: bytes, buffers: Sequence[frames.Piece] = ()) -> None:
        """Write a message; what the guest does not take yet is kept.

        Raises VmGuestError when the port is closed or the guest does not read, ProtocolError when
        the message is too large.
        """
        if self._transport is None or self._broken:
            raise VmGuestError(
                f"the VM's port {self.name!r} is closed",
                hint="the VM has ended; run the cell again to get a new one",
            )
        pieces = frames.encode(body, buffers)
        if self._max_unsent is not None and self.unsent > self._max_unsent:
            raise VmGuestError(
                f"the guest does not read its port {self.name!r}: {self.unsent} bytes wait for it",
                hint="interrupt what runs in it, or restart the kernel",
            )
        size = sum(map(len, pieces))
        if size > 2 * frames.MAX_FRAME:
            self._outgoing += pieces
        else:
            self._outgoing.append(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        self._outgoing_bytes += size
        self._write()

    def _write(self) -> None:
        """Hand pieces over until the guest is behind; a large message is kept where it lies."""
        while self._outgoing and not self._choked and self._transport is not None:
            piece = self._outgoing.popleft()
            self._outgoing_bytes -= len(piece)
            self._transport.write(piece)

    def resync(self, marker: bytes) -> None:
        """Begin anew with a process that replaces the guest's dead one (same stream)."""
        if self._transport is not None:
            self._broken = False
            self._arrived.clear()
            self._drop_outgoing()  # the guest skips what it has got of it
            self._reader.resync(marker)
            self._transport.write(marker)
            self._regulate()

    def pause(self, why: str = "") -> None:
        """Stop reading until :meth:`resume` of the same ``why``; the guest's writes block."""
        self._pauses.add(why)
        self._regulate()

    def resume(self, why: str = "") -> None:
        """Read again, if there is no other reason not to."""
        if why in self._pauses:
            self._pauses.discard(why)
            self._regulate()

    def pause_for(self, seconds: float) -> None:
        """Stop reading for a while: what comes is too much."""
        if "flood" not in self._pauses:
            self.pause("flood")
            asyncio.get_running_loop().call_later(seconds, self.resume, "flood")

    def close(self) -> None:
        """Hang up; ``on_lost`` is not called any more."""
        self._on_lost = lambda error: None
        self._on_message = lambda body, buffers: None
        self._forget()
        # asyncio tells of the loss a turn later: who sends before that would wait for ever.
        self._broken = True
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes from the guest."""
        if self._broken:
            return
        self.received += len(data)
        try:
            self._arrived += self._reader.feed(data)
        except Exception as error:
            self._break(error)
        else:
            if not self._pauses and self._handling is None:
                self._handle()

    def _handle(self) -> None:
        """Hand messages on, for a while; none after a pause, which may come with any of them."""
        self._handling = None
        loop = asyncio.get_running_loop()
        until = loop.time() + SLICE
        while self._arrived and not self._pauses:
            self._hand_on()
            if self._arrived and loop.time() > until:
                self._handling = loop.call_soon(self._handle)
                break
        self._regulate()

    def _hand_on(self) -> None:
        try:
            body, buffers = frames.split(self._arrived.popleft())
            self._on_message(body, buffers)
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        """Hear no more of a peer that did what must not be, and say so: were it left to asyncio, it
        would hang up without a word, and a cell wait for ever.
        """
        if isinstance(error, MemoryError):
            error = ProtocolError("a message that takes more memory than there may be of it")
        elif not isinstance(error, ProtocolError):
            log.exception("a message on port %s cannot be handled", self.name, exc_info=error)
            error = ProtocolError(f"a message that cannot be handled ({error!r:.500})")
        self._broken = True
        self._forget()
        self._on_lost(error)

    def _forget(self) -> None:
        """Let go of what has come: it may be large, and a VM's end takes a while."""
        self._arrived.clear()
        self._drop_outgoing()
        self._reader = frames.FrameReader(self._max_message)

    def _drop_outgoing(self) -> None:
        self._outgoing.clear()
        self._outgoing_bytes = 0

    def _regulate(self) -> None:
        """Read when there is no reason to wait and nothing that came before."""
        if self._transport is None or self._transport.is_closing():
            return
        if not self._pauses and self._arrived and self._handling is None:
            self._handling = asyncio.get_running_loop().call_soon(self._handle)
        wanted = not (self._pauses or self._arrived)
        if wanted and not self._transport.is_reading():
            self._transport.resume_reading()
        elif not wanted and self._transport.is_reading():
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """More than asyncio's high-water mark (64 KiB) waits to be sent."""
        self._choked = True
        self.on_congested(True)

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self._choked = False
        self._write()
        if not self._choked:
            self.on_congested(False)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed, by us or by QEMU's end."""
        self._transport = None
        self._drop_outgoing()
        while self._arrived:  # it came before the end
            self._hand_on()
        if not self._broken:
            self._broken = True
            self._on_lost(None)


_Answer = tuple[messages.Reply, list[memoryview]]


class AgentPort:
    """Calls to the guest agent, and its events.

    What comes too often is slowed (`vm.pace`): a correct agent sends one event in a kernel's life.
    """

    def __init__(self, on_event: Callable[[messages.FromAgent], None]) -> None:
        self.unasked = 0
        """Replies that nobody waits for: late, or forged."""
        self._on_event = on_event
        self._account = pace.Account(0.0)
        self._calls: dict[int, asyncio.Future[_Answer]] = {}
        self._next = 0
        self._port: Port | None = None

    async def open(self, sock: socket.socket, on_lost: OnLost) -> None:
        """Use ``sock``, which becomes ours to close."""

        def lost(error: ProtocolError | None) -> None:
            self._fail_calls()
            on_lost(error)

        self._port = await Port.open(
            "agent",
            sock,
            self._receive,
            lost,
            max_message=MAX_AGENT_MESSAGE,
            max_unsent=MOST_UNSENT_AGENT,
        )

    async def call(self, command: messages.Command, timeout: float = 10.0) -> dict[str, Any]:
        """Let the agent do something; its result.

        Raises VmGuestError when it fails, does not answer within ``timeout`` seconds, or is gone.
        """
        return (await self.exchange(command, (), timeout))[0]

    async def exchange(
        self,
        command: messages.Command,
        buffers: Sequence[frames.Piece] = (),
        timeout: float = 60.0,
    ) -> tuple[dict[str, Any], list[memoryview]]:
        """As :meth:`call`, with the bytes that go along in either direction: a file's."""
        if self._port is None:
            raise _gone()
        self._next += 1
        number = self._next
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._port.send(messages.encode_json(messages.Call(number, command)), buffers)
            async with asyncio.timeout(timeout):
                reply, received = await future
        except TimeoutError as error:
            raise VmGuestError(
                f"the guest agent did not answer to {type(command).__name__} in {timeout:g} s",
                hint="restart the kernel; `vmkernel doctor` checks the host",
                code_ran="unknown",
            ) from error
        finally:
            del self._calls[number]
        if reply.error:
            raise VmGuestError(
                f"the guest agent could not do {type(command).__name__}: {reply.error}",
                hint="restart the kernel",
            )
        result: dict[str, Any] = reply.result
        return result, received

    def close(self) -> None:
        """Hang up; who waits for an answer is told."""
        if self._port is not None:
            self._port.close()
            self._port = None
        self._fail_calls()

    def _fail_calls(self) -> None:
        for call in self._calls.values():
            if not call.done():
                call.set_exception(_gone())
                call.exception()  # mark as seen: its waiter may be gone

    def _receive(self, body: memoryview, buffers: list[memoryview]) -> None:
        message = messages.decode_from_agent(body)
        if isinstance(message, messages.Reply):
            call = self._calls.get(message.id)
            if call is None or call.done():
                self.unasked += 1
                self._slow_down(len(body))
            else:
                call.set_result((message, buffers))
        else:
            self._slow_down(len(body))
            self._on_event(message)

    def _slow_down(self, size: int) -> None:
        now = asyncio.get_running_loop().time()
        pause = self._account.take(pace.price(size), now)
        if pause and self._port is not None:
            self._port.pause_for(pause)


def _gone() -> VmGuestError:
    return VmGuestError("the VM has ended", hint="run the cell again to get a new VM")
