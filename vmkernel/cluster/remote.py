"""A relay's sockets towards the kernel on its host: encrypted, and one client to it.

Jupyter's identities stack (messaging specification, "The Wire Protocol": one or more before the
delimiter), so a message goes through with its client's identity in it, and comes back with it.  The
three DEALERs have one identity: a kernel asks for input on stdin whoever asked it on shell.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from vmkernel.errors import VmError

log = logging.getLogger("vmkernel")

ASKING = ("shell", "control", "stdin")
_KINDS = {"shell": zmq.DEALER, "control": zmq.DEALER, "stdin": zmq.DEALER, "iopub": zmq.SUB}
_LARGE = 16 << 10
"""Bytes from which on a part of a message is not copied, and its way followed to its end."""
MOST_ON_THE_WAY = 64 << 20
"""Bytes of large messages that may be on their way to the kernel, before no more are taken."""
MOST_UNREAD = 128
"""Messages of the kernel on iopub that wait here; then it is held up itself.  They may be large."""
_TURN = 64
"""Messages of one socket before the others have a turn."""
_KEEPALIVE = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 60,
    zmq.TCP_KEEPALIVE_INTVL: 30,
    zmq.TCP_KEEPALIVE_CNT: 10,
}
"""Seconds and times (tcp(7)): no firewall between the hosts forgets a connection that is idle over
night.  That a host is gone the lease tells, far sooner than these do."""
_LOOK_SECONDS = 0.01
"""How often to look whether large messages have gone out."""


class Remote:
    """Connected to one kernel.  Raises VmError when that does not encrypt.

    ``on_message(channel, frames)`` hears all it says; ``on_clear(channel)`` that it takes more,
    after :meth:`send` said that it does not.  TCP sees to connections that break for a moment:
    ZeroMQ makes them anew, and what was to be sent is kept.
    """

    def __init__(
        self,
        info: Mapping[str, Any],
        context: zmq.Context[Any],
        on_message: Callable[[str, Sequence[Any]], None],
        on_clear: Callable[[str], None],
    ) -> None:
        server_key = info.get("curve_publickey")
        if not server_key:
            raise VmError(
                f"the kernel at {info.get('ip')} does not encrypt its connections",
                hint="install jupyter-client 8.9 or later on that host",
            )
        self._on_message = on_message
        self._on_clear = on_clear
        self._loop = asyncio.get_running_loop()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._queues: dict[str, deque[Sequence[Any]]] = {name: deque() for name in ASKING}
        """What ZeroMQ does not take now: at most what was held, or one message"""
        self._large: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._stopped: set[str] = set()
        """Channels whose sender was told to wait"""
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        identity = b"vmkernel-" + os.urandom(12).hex().encode()
        public, secret = zmq.curve_keypair()
        try:
            for name, kind in _KINDS.items():
                sock: zmq.Socket[bytes] = context.socket(kind)
                self._sockets[name] = sock
                sock.linger = 0
                sock.copy_threshold = _LARGE
                for option, value in _KEEPALIVE.items():
                    sock.setsockopt(option, value)
                sock.curve_serverkey = _bytes(server_key)
                sock.curve_publickey, sock.curve_secretkey = public, secret
                if kind == zmq.DEALER:
                    sock.setsockopt(zmq.IDENTITY, identity)
                else:
                    sock.setsockopt(zmq.SUBSCRIBE, b"")
                    sock.rcvhwm = MOST_UNREAD
                port, transport = info[f"{name}_port"], info.get("transport", "tcp")
                sock.connect(f"{transport}://{info['ip']}:{port}")
        except (zmq.ZMQError, ValueError, KeyError) as error:
            for sock in self._sockets.values():
                sock.close()
            raise VmError(
                f"the kernel's connection information cannot be used: {error!r}",
                hint="has the kernel's host another version of vmkernel?",
            ) from error
        for name, sock in self._sockets.items():
            self._loop.add_reader(sock.FD, self._ready, name)
            self._loop.call_soon(self._ready, name)

    # --- out ---

    def send(self, channel: str, frames: Sequence[Any]) -> bool:
        """Send a whole message, identities first.  False: take it, but no more until on_clear."""
        queue = self._queues[channel]
        if queue or not self._sent(channel, frames):
            queue.append(frames)
        if queue or self._on_the_way() > MOST_ON_THE_WAY:
            self._stopped.add(channel)
            if not queue:
                self._look_later()
            return False
        return True

    def _sent(self, channel: str, frames: Sequence[Any]) -> bool:
        """Hand it over to ZeroMQ; False when that has as much as it takes."""
        sock = self._sockets.get(channel)
        if sock is None:
            return True  # closed: nobody is there to be told
        size = sum(map(len, frames))
        try:
            if size < _LARGE:
                sock.send_multipart(frames, zmq.NOBLOCK)
            else:
                tracker = sock.send_multipart(frames, zmq.NOBLOCK, copy=False, track=True)
                assert tracker is not None
                self._large.append((tracker, size))
        except zmq.Again:
            return False
        # Sending may swallow the descriptor's signal (zmq_getsockopt(3), ZMQ_FD)
        if int(sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._ready, channel)
        return True

    def _on_the_way(self) -> int:
        if self._large:
            self._large = deque(item for item in self._large if not item[0].done)
        return sum(size for _, size in self._large)

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._on_the_way() > MOST_ON_THE_WAY:
            self._look_later()
            return
        for channel in tuple(self._stopped):
            self._flush(channel)

    def _flush(self, channel: str) -> None:
        """Send what waits; tell the sender when all of it has gone."""
        queue = self._queues[channel]
        while queue and self._sent(channel, queue[0]):
            queue.popleft()
        if queue or self._on_the_way() > MOST_ON_THE_WAY:
            if not queue:
                self._look_later()
        elif channel in self._stopped:
            self._stopped.discard(channel)
            self._on_clear(channel)

    # --- in ---

    def pause(self) -> None:
        """Hear nothing on iopub: the kernel is held up by that, and loses nothing."""
        self._paused = True

    def resume(self) -> None:
        """After :meth:`pause`."""
        if self._paused:
            self._paused = False
            self._loop.call_soon(self._ready, "iopub")

    def _ready(self, name: str) -> None:
        """Something has come in, or something more can go out."""
        if self._queues.get(name):
            self._flush(name)
        for _ in range(_TURN):
            sock = self._sockets.get(name)
            if sock is None or (self._paused and name == "iopub"):
                return
            try:
                frames = sock.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno == errno.EAGAIN:
                    return
                log.warning("a kernel's message on %s could not be received: %s", name, error)
                continue
            try:
                self._on_message(name, frames)
            except Exception:  # a message that nobody foresaw: it costs itself, not the kernel
                log.exception("a kernel's message on %s could not be passed on", name)
        self._loop.call_soon(self._ready, name)

    def close(self) -> None:
        """Let go of the kernel, at once."""
        if self._timer is not None:
            self._timer.cancel()
        sockets, self._sockets = self._sockets, {}
        for sock in sockets.values():
            self._loop.remove_reader(sock.FD)
            sock.close()
        self._large.clear()


def _bytes(key: object) -> bytes:
    return key if isinstance(key, bytes) else str(key).encode()
