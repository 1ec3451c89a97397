"""The five Jupyter sockets: bound, signed, relayed by one event loop.

The wire protocol is that of https://jupyter-client.readthedocs.io/en/stable/messaging.html
("The Wire Protocol"): identities, ``<IDS|MSG>``, signature, four JSON parts, buffers.
Nothing here understands a message beyond its header.  pyzmq is used bare: its asyncio layer and
jupyter_client's Session would each cost more at start than the rest of this module does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import zmq

from vmkernel.errors import VmError
from vmkernel.protocol.messages import PROTOCOL_VERSION

log = logging.getLogger("vmkernel")

DELIMITER = b"<IDS|MSG>"
CHANNELS = ("shell", "control", "stdin")
BOUND = {
    "shell": zmq.ROUTER,
    "control": zmq.ROUTER,
    "stdin": zmq.ROUTER,
    "iopub": zmq.XPUB,
    "hb": zmq.ROUTER,
}
"""What is bound, in the order of the launcher's ports."""
PORT_PATIENCE = 2.0
"""Seconds for which a port may be taken by the kernel before this one, which was just killed."""
LARGE = 16 << 10
"""Bytes from which on a part of a message is not copied, and its way followed to its end.  Smaller
ones are bounded by ZeroMQ's own limit: 1,000 messages for each front end."""
MOST_ON_THE_WAY = 64 << 20
"""Bytes of large messages that may wait for front ends, before the guest is not read any more."""
MOST_BACKLOG = 10_000
"""Messages of our own (status) that are kept for a front end which takes none."""
LONGEST_DELAY = timedelta(seconds=5)
"""By which a message on one socket may come later than one that was sent after it on another."""
LOOK_SECONDS = 0.01
"""How often to look whether front ends have caught up."""

_encode = msgspec.json.Encoder().encode
_decode_header = msgspec.json.Decoder(dict[str, Any]).decode


class Request:
    """A message from a front end."""

    __slots__ = ("aborted", "buffers", "channel", "content", "header", "idents", "raw")

    def __init__(
        self, channel: str, idents: list[bytes], parts: Sequence[bytes], buffers: list[Any]
    ) -> None:
        self.channel = channel
        self.idents = idents
        self.raw = parts
        """header, parent header, metadata, content: as they came"""
        self.header = _decode_header(parts[0])
        _decode_header(parts[1])
        _decode_header(parts[2])  # goes to the guest as it is, and must be whole
        self.content = _decode_header(parts[3])
        self.buffers = buffers
        self.aborted = False

    @property
    def msg_id(self) -> str:
        """The request's id, by which answers name it."""
        return str(self.header.get("msg_id", ""))

    @property
    def subshell_id(self) -> str:
        """The subshell that it is for, "" for the main shell (messaging spec, "subshells")."""
        return str(self.header.get("subshell_id") or "")

    @property
    def parent_id(self) -> str:
        """The id of the message that this one answers, "" when it answers none."""
        return str(_decode_header(self.raw[1]).get("msg_id", ""))

    @property
    def msg_type(self) -> str:
        """Such as ``execute_request``."""
        return str(self.header.get("msg_type", ""))

    def was_sent_before(self, other: Request) -> bool:
        """Whether the same client sent this one shortly earlier; False when nobody can know.

        A longer time is no delay but a clock that was set.
        """
        if self.header.get("session") != other.header.get("session"):
            return False
        try:
            mine, theirs = (
                datetime.fromisoformat(request.header["date"]) for request in (self, other)
            )
            return timedelta() < theirs - mine < LONGEST_DELAY
        except (KeyError, TypeError, ValueError):
            return False

    def __repr__(self) -> str:
        return f"<Request {self.channel} {self.msg_type} {self.msg_id}>"


class Sockets:
    """Binds what the connection file names, and speaks for one kernel session.

    ``on_request(request)`` is called for each message whose signature is right.  Without a
    connection file nothing is bound before :meth:`open`, and what is published goes nowhere.
    Raises VmError when the connection file cannot be read or an address cannot be bound.
    """

    def __init__(
        self,
        connection_file: Path | None,
        on_request: Callable[[Request], None],
        listeners: Sequence[int] = (),
    ) -> None:
        self._on_request = on_request
        self.info: dict[str, Any] = {}
        self.session = os.urandom(16).hex()
        self.rejected = 0
        self._key = b""
        self._digest = "sha256"
        self._count = 0
        self._context = zmq.Context()
        self._context.max_sockets = 16
        self._loop = asyncio.get_running_loop()
        self._backlog: list[list[Any]] = []
        self._on_clear: Callable[[], None] | None = None
        self.lost = 0
        """Messages of ours that nobody took"""
        self._large: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._on_the_way = 0
        """Bytes of them"""
        self._retry: asyncio.TimerHandle | None = None
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        if connection_file is not None:
            self.open(connection_file, listeners)

    def open(
        self, connection_file: Path | Mapping[str, Any], listeners: Sequence[int] = ()
    ) -> None:
        """Bind what the connection file (or its content) names.  Raises VmError.

        A port of 0 is chosen by the system, and is in :attr:`info` then.  ``listeners``:
        descriptors of TCP sockets that listen there already; they are ours then.
        """
        known = dict(zip(BOUND, listeners, strict=False))
        if isinstance(connection_file, Path):
            self.info = _read_connection_file(connection_file)
        else:
            self.info = dict(connection_file)
        self._key = str(self.info.get("key", "")).encode()
        self._digest = str(self.info.get("signature_scheme", "hmac-sha256")).removeprefix("hmac-")
        if self._digest not in hashlib.algorithms_available:
            raise VmError(
                f"the connection file wants signatures by {self._digest}, which Python lacks",
                hint="use the default signature scheme, hmac-sha256",
            )
        try:
            self._sockets = {
                name: self._bind(name, kind, known.get(name)) for name, kind in BOUND.items()
            }
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise VmError(
                f"the kernel's sockets cannot be bound: {error}",
                hint="restart the kernel: another program may have taken a port meanwhile",
            ) from error
        for name, sock in self._sockets.items():
            self._loop.add_reader(sock.FD, self._readable, name)
            # The descriptor signals changes only: what came before we listened needs a look.
            self._loop.call_soon(self._readable, name)

    def _bind(self, name: str, kind: int, listener: int | None) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = self._context.socket(kind)
        if listener is not None:
            sock.setsockopt(zmq.USE_FD, listener)
        sock.linger = 1000
        sock.copy_threshold = LARGE
        if kind == zmq.ROUTER:
            # A client that reconnects under its identity gets its answers (ipykernel does so)
            sock.router_handover = 1
        if name == "iopub":
            # Slow subscribers stop the guest instead of losing messages: see publish()
            sock.setsockopt(zmq.XPUB_NODROP, 1)
            sock.setsockopt(zmq.XPUB_VERBOSE, 1)  # a welcome for each subscription
        if self.info.get("curve_secretkey"):
            sock.curve_secretkey = str(self.info["curve_secretkey"]).encode()
            sock.curve_publickey = str(self.info["curve_publickey"]).encode()
            sock.curve_server = True
        port = int(self.info[f"{name}_port"])
        if self.info.get("transport", "tcp") == "ipc":
            address = f"ipc://{self.info['ip']}-{port}"
        else:
            address = f"tcp://{self.info['ip']}:{port}" if port else f"tcp://{self.info['ip']}:*"
        end = time.monotonic() + PORT_PATIENCE
        while True:
            try:
                sock.bind(address)
                if not port:
                    last = sock.getsockopt_string(zmq.LAST_ENDPOINT)
                    self.info[f"{name}_port"] = int(last.rpartition(":")[2])
                return sock
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or time.monotonic() > end:
                    raise
            time.sleep(0.02)  # there is nothing to serve yet

    # --- in ---

    def _readable(self, name: str) -> None:
        sock = self._sockets.get(name)
        if sock is None:  # closed
            return
        for _ in range(64):
            if not _incoming(sock):
                if name == "iopub" and self._backlog:
                    self._flush_backlog()
                return
            frames = sock.recv_multipart(zmq.NOBLOCK, copy=True)
            if name == "hb":
                sock.send_multipart(frames)
            elif name == "iopub":
                if frames[0][:1] == b"\x01":
                    self._welcome(frames[0][1:])
            else:
                request = self._parse(name, frames)
                if request is not None:
                    self._on_request(request)
        # Others want a turn too; the descriptor will not tell again what is already there.
        self._loop.call_soon(self._readable, name)

    def drain(self, channel: str) -> None:
        """Take in everything that has arrived on ``channel`` by now."""
        sock = self._sockets[channel]
        while _incoming(sock):
            request = self._parse(channel, sock.recv_multipart(zmq.NOBLOCK, copy=True))
            if request is not None:
                self._on_request(request)
        self._loop.call_soon(self._readable, channel)

    def _parse(self, channel: str, frames: list[bytes]) -> Request | None:
        try:
            at, parts = self._verified(frames)
            return Request(channel, frames[:at], parts, frames[at + 6 :])
        except (ValueError, msgspec.MsgspecError, RecursionError):
            # Not from our front end: ipykernel logs and drops it, too.
            self.rejected += 1
            return None

    def _verified(self, frames: list[bytes]) -> tuple[int, list[bytes]]:
        """Where the delimiter is, and the four parts.  Raises ValueError: the signature is wrong,
        or something is missing.
        """
        at = frames.index(DELIMITER)
        signature, *parts = frames[at + 1 : at + 6]
        if len(parts) != 4:
            raise ValueError("fewer than four parts")
        if self._key and not hmac.compare_digest(signature, self.sign(parts)):
            raise ValueError("wrong signature")
        return at, parts

    def _welcome(self, topic: bytes) -> None:
        """Tell a new subscriber that it is heard (JEP 65, message iopub_welcome)."""
        self.publish("iopub_welcome", {"subscription": topic.decode(errors="replace")}, topic=topic)

    # --- out ---

    def sign(self, parts: Sequence[bytes]) -> bytes:
        """The signature of a message's four parts; empty without a key."""
        if not self._key:
            return b""
        mac = hmac.new(self._key, digestmod=self._digest)
        for part in parts:
            mac.update(part)
        return mac.hexdigest().encode()

    def aborted_metadata(self) -> dict[str, Any]:
        """What ipykernel has in the metadata of a reply, for a request that was aborted."""
        return {
            "started": now(),
            "dependencies_met": True,
            "engine": self.session,
            "status": "aborted",
        }

    def header(self, msg_type: str) -> dict[str, Any]:
        """A fresh header of this session."""
        self._count += 1
        return {
            "msg_id": f"{self.session}_{os.getpid()}_{self._count}",
            "msg_type": msg_type,
            "username": "vmkernel",
            "session": self.session,
            "date": now(),
            "version": PROTOCOL_VERSION,
        }

    def _message(
        self,
        msg_type: str,
        content: Any,
        parent: bytes,
        metadata: Any,
        buffers: Sequence[Any],
    ) -> tuple[list[Any], str]:
        header = self.header(msg_type)
        parts = [_encode(header), parent, _encode(metadata), _encode(content)]
        return [DELIMITER, self.sign(parts), *parts, *buffers], header["msg_id"]

    def publish(
        self,
        msg_type: str,
        content: Any,
        parent: bytes = b"{}",
        metadata: Any = None,
        buffers: Sequence[Any] = (),
        topic: bytes | None = None,
    ) -> None:
        """Publish on iopub.  Nothing is dropped: what a slow subscriber leaves is kept in order,
        and :meth:`congested` asks the caller to stop producing.
        """
        message, _ = self._message(msg_type, content, parent, metadata or {}, buffers)
        if topic is None:
            topic = f"kernel.{self.session}.{msg_type}".encode()
        message.insert(0, topic)
        if self._sockets:  # not closed
            self._publish(message)

    def _publish(self, message: list[Any]) -> None:
        if len(self._backlog) >= MOST_BACKLOG:
            self.lost += 1
            if self.lost == 1:
                log.warning("a front end takes no messages: some of the kernel's status are lost")
            return
        if self._backlog:
            self._backlog.append(message)
            return
        try:
            self._send("iopub", message)
        except zmq.Again:
            self._backlog.append(message)
            self._flush_later()
        self._look_again("iopub")

    def _send(self, name: str, message: list[Any]) -> None:
        """Hand a message over to ZeroMQ.  Raises zmq.Again when a subscriber is behind."""
        size = sum(map(len, message))
        if size < LARGE:
            self._sockets[name].send_multipart(message, zmq.NOBLOCK, copy=True)
            return
        tracker = self._sockets[name].send_multipart(message, zmq.NOBLOCK, copy=False, track=True)
        assert tracker is not None
        self._large.append((tracker, size))
        self._on_the_way += size
        while self._large and self._large[0][0].done:
            self._on_the_way -= self._large.popleft()[1]

    def _look_at_large(self) -> None:
        """Find those that have arrived, in whatever order."""
        self._large = deque(item for item in self._large if not item[0].done)
        self._on_the_way = sum(size for _, size in self._large)

    @property
    def congested(self) -> bool:
        """Whether front ends are behind: what the guest says should wait."""
        if self._on_the_way > MOST_ON_THE_WAY:
            self._look_at_large()
        return bool(self._backlog) or self._on_the_way > MOST_ON_THE_WAY

    def when_clear(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once front ends have caught up."""
        self._on_clear = callback
        if self._retry is None:
            self._flush_later()

    def _flush_later(self) -> None:
        """One timer at most: each subscriber that catches up a little asks for one, too."""
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self._loop.call_later(LOOK_SECONDS, self._flush_backlog)

    def _flush_backlog(self) -> None:
        self._retry = None
        sent = 0
        try:
            for message in self._backlog:
                self._send("iopub", message)
                sent += 1
        except zmq.Again:
            pass
        except KeyError:  # closed
            return
        finally:
            del self._backlog[:sent]
        self._look_again("iopub")
        if self._on_clear is None:
            if self._backlog:
                self._flush_later()
        elif self.congested:
            self._flush_later()
        else:
            callback, self._on_clear = self._on_clear, None
            callback()

    def reply(
        self,
        request: Request,
        msg_type: str,
        content: Any,
        metadata: Any = None,
        buffers: Sequence[Any] = (),
        channel: str = "",
    ) -> str:
        """Answer a request on its channel (or another, for stdin); the message's id."""
        message, msg_id = self._message(msg_type, content, request.raw[0], metadata or {}, buffers)
        name = channel or request.channel
        if name not in self._sockets:  # closed
            return msg_id
        with contextlib.suppress(zmq.ZMQError):  # a client that is gone: it has no heir
            self._send(name, [*request.idents, *message])
        self._look_again(name)
        return msg_id

    def _look_again(self, name: str) -> None:
        """Sending may swallow the descriptor's signal that something came in (zmq_getsockopt(3),
        ZMQ_FD): look, or it would lie there until the next message.
        """
        sock = self._sockets.get(name)
        if sock is not None and _incoming(sock):
            self._loop.call_soon(self._readable, name)

    def pass_on(self, name: str, message: list[Any]) -> None:
        """Send frames that another kernel made and signed.  As :meth:`publish` on iopub, where
        nobody loses any; elsewhere what is for a client that is gone is dropped.
        """
        if name not in self._sockets:  # closed
            return
        if name == "iopub":
            self._publish(message)
            return
        with contextlib.suppress(zmq.ZMQError):
            self._send(name, message)
        self._look_again(name)

    def status(self, state: str, parent: bytes = b"{}") -> None:
        """Publish ``busy``, ``idle`` or ``starting``."""
        self.publish("status", {"execution_state": state}, parent)

    def stderr(self, text: str, parent: bytes) -> None:
        """Show text of our own in the output of the request with header ``parent``."""
        self.publish("stream", {"name": "stderr", "text": text}, parent)

    def abandon(self) -> None:
        """Close at once, as when the process had been killed."""
        for sock in self._sockets.values():
            sock.linger = 0
        self.close()

    def close(self) -> None:
        """Send what is queued (for at most a second), then close."""
        sockets, self._sockets = self._sockets, {}
        for sock in sockets.values():
            self._loop.remove_reader(sock.FD)
            sock.close()
        self._context.term()


def now() -> str:
    """This moment, as headers have it (ISO 8601, UTC)."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _incoming(sock: zmq.Socket[bytes]) -> bool:
    """Whether a message waits to be received."""
    return bool(int(sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def _read_connection_file(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text())
        if not isinstance(info, dict):
            raise TypeError("not an object")
        for name in ("shell", "control", "stdin", "iopub", "hb"):
            int(info[f"{name}_port"])
        str(info["ip"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VmError(
            f"the connection file {path} cannot be used: {error!r}",
            hint="kernels are started by a front end: jupyter console --kernel vmsandbox",
        ) from error
    return info
