"""A Jupyter kernel as any other program starts it: its process, connection file and sockets.

Under :mod:`vmkernel.guest.relay`.  The kernel is unmodified and knows nothing of a VM: it finds a
connection file with a key of its own and addresses in a private directory (``ipc``), or on the
guest's loopback interface (``tcp``, for kernels that know nothing else), and is spoken to as a
front end speaks to it (https://jupyter-client.readthedocs.io, "Messaging in Jupyter": "The wire
protocol", "Connection files").
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import json
import os
import shutil
import signal
import socket as tcp
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
import zmq

from vmkernel.protocol import frames

PR_SET_PDEATHSIG = 1  # prctl(2)
DELIMITER = b"<IDS|MSG>"
# One identity on shell and stdin: a kernel sends its questions to whom it got the request from.
IDENTITY = b"vmkernel"
CHANNELS = ("shell", "control", "stdin", "iopub", "hb")

Channel = Literal["shell", "control", "stdin", "iopub"]

_prctl = ctypes.CDLL(None).prctl


class Message(msgspec.Struct):
    """What a kernel said, its JSON parts as they came."""

    channel: Channel
    msg_type: str
    parent_id: str
    metadata: bytes
    content: bytes
    buffers: Sequence[memoryview]


class _Head(msgspec.Struct):
    """What of a header anybody here wants to know."""

    msg_type: str = ""
    msg_id: str = ""


_read_head = msgspec.json.Decoder(_Head).decode


class ForeignKernel:
    """One kernel process.  ``status`` is its end, as ``subprocess`` tells it, None while it runs.

    ``poll_fd`` becomes readable when the process has ended.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        transport: Literal["ipc", "tcp"],
        env: dict[str, str],
        cwd: str,
        own_group: bool,
    ) -> None:
        """Start ``argv``, with ``{connection_file}`` replaced.

        ``own_group``: out of reach of a SIGINT to this process's group.  Raises OSError.
        """
        self._directory = tempfile.mkdtemp(prefix="kernel-")
        self._key = os.urandom(32).hex().encode()
        file = os.path.join(self._directory, "connection.json")
        if transport == "ipc":
            ports = list(range(1, 6))
            address = "ipc://" + os.path.join(self._directory, "socket") + "-{}"
        else:
            ports = _free_ports(5)
            address = "tcp://127.0.0.1:{}"
        connection = {
            "transport": transport,
            "ip": address.partition("://")[2][:-3],
            "key": self._key.decode(),
            "signature_scheme": "hmac-sha256",
            **{f"{name}_port": number for name, number in zip(CHANNELS, ports, strict=True)},
        }
        with open(file, "x") as output:
            json.dump(connection, output)
        self._process = subprocess.Popen(
            [word.replace("{connection_file}", file) for word in argv],
            stdin=subprocess.DEVNULL,
            env=env,
            cwd=cwd,
            process_group=0 if own_group else None,
            preexec_fn=_in_child,  # noqa: PLW1509 - ZeroMQ's threads come later
        )
        self.pid = self._process.pid
        self.poll_fd = os.pidfd_open(self.pid)
        self._context = zmq.Context()
        self.sockets: dict[Channel, zmq.Socket[bytes]] = {}
        for channel in ("shell", "control", "stdin", "iopub"):
            socket = self._context.socket(zmq.SUB if channel == "iopub" else zmq.DEALER)
            socket.linger = 0
            if channel == "iopub":
                socket.subscribe(b"")
            else:
                socket.setsockopt(zmq.IDENTITY, IDENTITY)
                # The host sends one request at a time, so this is no queue without a bound; a
                # limit would make us wait for a busy kernel while it has something to say.
                socket.sndhwm = 0
            # The kernel binds when it gets to it: ZeroMQ tries again every 100 ms
            socket.connect(address.format(connection[f"{channel}_port"]))
            self.sockets[channel] = socket

    @property
    def status(self) -> int | None:
        """How the process ended: an exit status, or the negative number of a signal."""
        return self._process.poll()

    def wait(self) -> int:
        """Wait for the process's end."""
        return self._process.wait()

    def send(
        self,
        channel: Channel,
        header: bytes,
        metadata: bytes,
        content: bytes,
        buffers: Sequence[frames.Piece] = (),
    ) -> None:
        """Send a request, signed, with the header as it is."""
        parts = [header, b"{}", metadata, content]
        signature = hmac.new(self._key, b"".join(parts), hashlib.sha256).hexdigest().encode()
        self.sockets[channel].send_multipart([DELIMITER, signature, *parts, *buffers], copy=False)

    def receive(self, channel: Channel, most: int) -> Iterator[Message]:
        """Up to ``most`` messages that can be had without waiting; malformed ones are skipped."""
        socket = self.sockets[channel]
        for _ in range(most):
            try:
                parts = socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            message = _parse(channel, [part.buffer for part in parts])
            if message is not None:
                yield message

    def close(self) -> None:
        """Forget sockets and files of a kernel that has ended."""
        self._context.destroy(linger=0)
        os.close(self.poll_fd)
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """End the process and everything in it that is left."""
        self._process.kill()
        self._process.wait()
        self.close()


def _parse(channel: Channel, parts: list[memoryview]) -> Message | None:
    """A message's parts.  The signature is not looked at: only that kernel has the address."""
    try:
        start = parts.index(DELIMITER) + 2  # type: ignore[arg-type]  # behind the signature
        header, parent, metadata, content = parts[start : start + 4]
        return Message(
            channel=channel,
            msg_type=_read_head(header).msg_type,
            parent_id=_read_head(parent).msg_id,
            metadata=bytes(metadata),
            content=bytes(content),
            buffers=parts[start + 4 :],
        )
    except (ValueError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def as_object(text: bytes) -> msgspec.Raw:
    """A JSON object that the host's strict decoder takes, from what a kernel takes for one.

    Python kernels write NaN, and others may write lone surrogates: null and escapes.
    """
    try:
        _read_object(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            value = json.loads(text.decode(errors="replace"), parse_constant=lambda _: None)
            text = msgspec.json.encode(_clean(value if isinstance(value, dict) else {}))
        except (ValueError, RecursionError):
            text = b"{}"
    return msgspec.Raw(text)


_read_object = msgspec.json.Decoder(dict[str, Any]).decode


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _free_ports(count: int) -> list[int]:
    """Numbers that nobody listens on: in a guest, nobody else will before the kernel does."""
    sockets = [tcp.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [int(socket.getsockname()[1]) for socket in sockets]
    for socket in sockets:
        socket.close()
    return numbers


def _in_child() -> None:
    """Between fork and exec: the kernel ends with us, and hears every signal as usual."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
