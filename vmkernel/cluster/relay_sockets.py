"""A relay's sockets towards front ends: those of one host's wrapper kernel, but for two things.

What a message says is not looked at before somebody asks for it, so that large ones cost little;
and a channel can be held, so that front ends wait (ZeroMQ's own limits) instead of our memory
growing, when the kernel takes no more.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from vmkernel.kernel.sockets import BOUND, CHANNELS, DELIMITER, Request, Sockets

log = logging.getLogger("vmkernel")

_TURN = 64
"""Messages of one socket before the others have a turn."""
_CONTEXT_SOCKETS = 32
"""Ours, those towards the kernel, and those of the kernel before it until they are gone."""

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class _Manner(msgspec.Struct):
    """Of a cell: what is told apart when it cannot be run."""

    silent: bool = False


_decode_manner = msgspec.json.Decoder(_Manner).decode


class Passing(Request):
    """A message from a front end whose signature is right.  ``frames`` is all of it."""

    __slots__ = ("_silent", "frames", "key")

    def __init__(self, channel: str, frames: list[bytes], at: int) -> None:
        self.channel = channel
        self.idents = frames[:at]
        self.raw = frames[at + 2 : at + 6]
        self.header = _decode(self.raw[0])
        self.buffers = []
        self.aborted = False
        self.frames: Sequence[bytes] = frames
        self.key = (channel, tuple(self.idents), self.msg_id)
        """By what its answer is told: a client's ids are its own (and a kernel manager and its
        client may even count alike, on control and on shell)"""
        self._silent: bool | None = None

    @property
    def content(self) -> dict[str, Any]:  # type: ignore[override]
        """What it says; empty when that is no JSON object."""
        try:
            return _decode(self.raw[3])
        except (msgspec.MsgspecError, IndexError, RecursionError):
            return {}

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return sum(map(len, self.frames))

    @property
    def silent(self) -> bool:
        """Whether a cell is to be run without being heard."""
        if self._silent is None:
            try:
                self._silent = _decode_manner(self.raw[3]).silent
            except (msgspec.MsgspecError, IndexError, RecursionError):
                self._silent = False
        return self._silent

    def forget_body(self) -> None:
        """It is on its way: keep what an answer to it needs, and no more."""
        if self.msg_type == "execute_request":
            _ = self.silent  # found out now
        self.raw, self.frames = self.raw[:1], ()


class FrontEnds(Sockets):
    """Bound for front ends; ``on_request`` is given what has the right signature: a `Passing`."""

    def __init__(self, on_request: Any) -> None:
        super().__init__(None, on_request)
        self._context.max_sockets = _CONTEXT_SOCKETS
        self._held: set[str] = set()

    @property
    def context(self) -> zmq.Context[Any]:
        """Whose threads do the encryption."""
        return self._context

    def open(
        self, connection_file: Path | Mapping[str, Any], listeners: Sequence[int] = ()
    ) -> None:
        """As `Sockets.open`; for ipc, too, a port of 0 is chosen.  Raises VmError."""
        assert not isinstance(connection_file, Path)
        info = {"ip": "127.0.0.1", "transport": "tcp", **connection_file}
        for name in BOUND:
            info.setdefault(f"{name}_port", 0)
        if info["transport"] == "ipc":
            taken = {int(info[f"{name}_port"]) for name in BOUND}
            for name in BOUND:
                if not int(info[f"{name}_port"]):
                    info[f"{name}_port"] = _free_number(str(info["ip"]), taken)
        super().open(info, listeners)

    def hold(self, channel: str) -> None:
        """Take nothing from this channel until :meth:`release`; front ends notice when it lasts."""
        self._held.add(channel)

    def release(self, channel: str) -> None:
        """After :meth:`hold`."""
        if channel in self._held:
            self._held.discard(channel)
            self._loop.call_soon(self._readable, channel)

    def _readable(self, name: str) -> None:
        if name not in CHANNELS:
            super()._readable(name)
            return
        for _ in range(_TURN):
            sock = self._sockets.get(name)
            if sock is None or name in self._held:
                return
            try:
                frames = sock.recv_multipart(zmq.NOBLOCK, copy=True)
            except zmq.ZMQError as error:
                if error.errno not in (errno.EAGAIN, errno.EINTR):
                    log.warning("a message on %s could not be received: %s", name, error)
                if error.errno == errno.EAGAIN:
                    return
                continue
            self._take(name, frames)
        self._loop.call_soon(self._readable, name)

    def _take(self, channel: str, frames: list[bytes]) -> None:
        try:
            at, _ = self._verified(frames)
            request = Passing(channel, frames, at)
        except (ValueError, msgspec.MsgspecError, RecursionError):
            self.rejected += 1
            return
        try:
            self._on_request(request)
        except Exception:  # our bug: it costs this message, not the kernel
            log.exception("%r could not be passed on", request)

    async def close_gently(self) -> None:
        """Send what is queued (for at most a second), then close; others are served meanwhile."""
        sockets, self._sockets = self._sockets, {}
        if self._retry is not None:
            self._retry.cancel()
        for sock in sockets.values():
            self._loop.remove_reader(sock.FD)
            sock.close()
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._context.term)
        except RuntimeError:  # the interpreter ends, and starts no threads any more
            self._context.term()
        if sockets and self.info.get("transport") == "ipc":
            for name in BOUND:
                Path(f"{self.info['ip']}-{self.info[f'{name}_port']}").unlink(missing_ok=True)


def header_of(frames: Sequence[Any], which: int) -> dict[str, Any]:
    """A message's header (0) or parent header (1); empty when it has none."""
    try:
        return _decode(frames[delimiter_in(frames) + 2 + which])
    except (IndexError, msgspec.MsgspecError, RecursionError):
        return {}


def delimiter_in(frames: Sequence[Any]) -> int:
    """Where identities end; behind the last frame when there is no delimiter."""
    for at, frame in enumerate(frames):
        if len(frame) == len(DELIMITER) and bytes(frame) == DELIMITER:
            return at
    return len(frames)


def _free_number(path: str, taken: set[int]) -> int:
    """The number of an ipc "port" whose file is not there, as jupyter_client chooses them."""
    number = 1
    while number in taken or Path(f"{path}-{number}").exists():
        number += 1
    taken.add(number)
    return number
