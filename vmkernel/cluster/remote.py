"""A relay's sockets towards the kernel on its host: encrypted, and one client to it.

Jupyter's identities stack (messaging specification, "The Wire Protocol": one or more before the
delimiter), so a message goes through with its client's identity in it, and comes back with it.  The
three DEALERs have one identity: a kernel asks for input on stdin whoever asked it on shell.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from vmkernel.errors import VmError

ASKING = ("shell", "control", "stdin")
_KINDS = {"shell": zmq.DEALER, "control": zmq.DEALER, "stdin": zmq.DEALER, "iopub": zmq.SUB}
_LARGE = 16 << 10
"""Bytes from which on a part of a message is not copied."""
_TURN = 64
"""Messages of one socket before the others have a turn."""


class Remote:
    """Connected to one kernel.  ``on_message(channel, frames)`` hears all it says.

    Raises VmError when the kernel does not encrypt.  TCP sees to connections that break for a
    moment: ZeroMQ makes them anew, and what was to be sent is kept.
    """

    def __init__(
        self, info: Mapping[str, Any], on_message: Callable[[str, Sequence[Any]], None]
    ) -> None:
        server_key = info.get("curve_publickey")
        if not server_key:
            raise VmError(
                f"the kernel at {info.get('ip')} does not encrypt its connections",
                hint="install jupyter-client 8.9 or later on that host",
            )
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._context.max_sockets = 8
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._paused = False
        identity = b"vmkernel-" + os.urandom(12).hex().encode()
        public, secret = zmq.curve_keypair()
        for name, kind in _KINDS.items():
            sock: zmq.Socket[bytes] = self._context.socket(kind)
            sock.linger = 0
            sock.copy_threshold = _LARGE
            sock.curve_serverkey = str(server_key).encode()
            sock.curve_publickey, sock.curve_secretkey = public, secret
            if kind == zmq.DEALER:
                sock.setsockopt(zmq.IDENTITY, identity)
                sock.sndhwm = 0  # bounded by who sends: the relay looks at what is on the way
            else:
                sock.setsockopt(zmq.SUBSCRIBE, b"")
            # A host that is silent for long is gone; a lease tells, not TCP (tcp(7))
            sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
            sock.connect(f"{info.get('transport', 'tcp')}://{info['ip']}:{info[f'{name}_port']}")
            self._sockets[name] = sock
        for name, sock in self._sockets.items():
            self._loop.add_reader(sock.FD, self._readable, name)
            self._loop.call_soon(self._readable, name)

    def send(self, channel: str, frames: Sequence[Any]) -> None:
        """Send a whole message, identities first."""
        sock = self._sockets.get(channel)
        if sock is not None:
            sock.send_multipart(frames, zmq.NOBLOCK, copy=sum(map(len, frames)) < _LARGE)
            self._loop.call_soon(self._readable, channel)  # sending may swallow the signal

    def pause(self) -> None:
        """Hear nothing on iopub: the kernel is held up by that, and loses nothing."""
        self._paused = True

    def resume(self) -> None:
        """After :meth:`pause`."""
        if self._paused:
            self._paused = False
            self._loop.call_soon(self._readable, "iopub")

    def _readable(self, name: str) -> None:
        for _ in range(_TURN):
            sock = self._sockets.get(name)
            if sock is None or (self._paused and name == "iopub"):
                return
            if not int(sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            self._on_message(name, sock.recv_multipart(zmq.NOBLOCK, copy=True))
        self._loop.call_soon(self._readable, name)

    def close(self) -> None:
        """Let go of the kernel, at once."""
        sockets, self._sockets = self._sockets, {}
        for sock in sockets.values():
            self._loop.remove_reader(sock.FD)
            sock.close()
        self._context.term()
