"""The relay engine: between the ports and an unmodified kernel (DESIGN 4.5).

The agent forks it in the place of the Python engine, as the ordinary user.  It starts the
recipe's ``argv`` (:mod:`vmkernel.guest.foreign`) and passes messages on in both directions, in
one thread and one poll loop.  Of the protocol it knows as little as it can:

* The host publishes busy and idle itself, and takes ``status`` idle for the guest's last word
  about a request.  Replies and idle come by two sockets, so both are held until both are there.
* Back-pressure: while the host does not read, writing to the port blocks, and nothing is read
  from the kernel.
* Clones are twins.  A kernel that runs in the template is told how to differ by the recipe's
  ``wake_code``; without one it is started after the wake-up.
* When the kernel ends, the relay ends in the same way, so that the agent can tell.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NoReturn

import msgspec
import zmq

from vmkernel.guest import workspace
from vmkernel.guest.foreign import Channel, ForeignKernel, Message, as_object
from vmkernel.guest.port import Port
from vmkernel.protocol import frames, messages

OUTPUT_TAIL = 16 << 10
AT_ONCE = 64
"""Messages taken from one socket before another gets its turn."""
MOST_COMMS = 256
"""Comm messages of one type whose end may still come."""
LOST = 3.0
"""Seconds of silence after which the other one of reply and idle will not come any more."""
LAST_WORDS = 0.3
"""Seconds in which the messages of a kernel that has ended still arrive."""
_OWN = "vmkernel-relay-"
_MAX_NAME = 1024  # messages.ShortStr


class Recipe(msgspec.Struct):
    """What the recipe says of its kernel (image.recipe, of which this is a part)."""

    argv: list[str]
    env: dict[str, str] = {}
    transport: Literal["ipc", "tcp"] = "ipc"
    interrupt_mode: Literal["signal", "message"] = "signal"
    wake_code: str = ""


def read_recipe(config: dict[str, Any]) -> Recipe:
    """The recipe from the guest's configuration."""
    return msgspec.convert(config, Recipe)


class _Open(msgspec.Struct):
    """A request that the host waits for."""

    msg_type: str
    channel: Channel
    reply: Message | None = None
    idle: bool = False
    since: float = 0.0


class KernelEnded(Exception):  # noqa: N818 - no error of ours
    """The kernel's process is gone."""


class Relay:
    """One guest kernel.  ``ports[0]`` is also written to."""

    def __init__(self, ports: Sequence[int], outputs: Mapping[str, int], recipe: Recipe) -> None:
        self.ports = [Port(fd) for fd in ports]
        self.port = self.ports[0]
        self._recipe = recipe
        self._outputs = list(outputs.values())
        self._tail = b""
        self._kernel: ForeignKernel | None = None
        self._open: dict[str, _Open] = {}
        self._awake = False
        self._heard = 0.0
        self._count = 0
        self._poller = zmq.Poller()

    def resync(self, marker: bytes) -> None:
        """Take the place of a dead guest kernel: every port begins anew at ``marker``."""
        for port in self.ports:
            port.resync(marker)

    # --- life ---

    def run(self, on_ready: Callable[[dict[str, Any]], None], *, template: bool) -> int:
        """Serve until the kernel ends; how it did, as ``ForeignKernel.status``.

        ``on_ready(kernel_info)`` is called once.  ``template``: learn the kernel_info first.
        """
        self._listen()
        try:
            info = self._prepare() if template else {}
            on_ready(info)
            while True:
                self._turn()
        except KernelEnded:
            assert self._kernel is not None
            return self._end(self._kernel)

    def _listen(self) -> None:
        for fd in self._outputs:
            os.set_blocking(fd, False)
            self._poller.register(fd, zmq.POLLIN)
        for port in self.ports:
            self._poller.register(port.fd, zmq.POLLIN)
        # A handler, which exec turns to the default again; an ignored signal would stay ignored
        self._signals, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.siginterrupt(signal.SIGINT, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._poller.register(self._signals, zmq.POLLIN)

    def _prepare(self) -> dict[str, Any]:
        """Start the kernel for a template; the content of its kernel_info_reply."""
        kernel = self._start(dict(os.environ), os.getcwd())
        info = self._kernel_info()
        if self._recipe.wake_code:
            self._run_wake_code(os.urandom(64), {}, os.getcwd())  # a mistake in it is told now
            _rehearse()
        else:
            self._stop(kernel)
        return info

    def _start(self, env: dict[str, str], cwd: str) -> ForeignKernel:
        kernel = self._kernel = ForeignKernel(
            self._recipe.argv,
            transport=self._recipe.transport,
            env={**env, **self._recipe.env},
            cwd=cwd,
            own_group=self._recipe.interrupt_mode == "message",
        )
        for socket in kernel.sockets.values():
            self._poller.register(socket, zmq.POLLIN)
        self._poller.register(kernel.poll_fd, zmq.POLLIN)
        return kernel

    def _stop(self, kernel: ForeignKernel) -> None:
        for socket in kernel.sockets.values():
            self._poller.unregister(socket)
        self._poller.unregister(kernel.poll_fd)
        kernel.kill()
        self._kernel = None

    def _end(self, kernel: ForeignKernel) -> int:
        """Pass on what a kernel that has ended still said."""
        status = kernel.wait()
        poller = zmq.Poller()
        for socket in kernel.sockets.values():
            poller.register(socket, zmq.POLLIN)
        while self._awake and poller.poll(int(LAST_WORDS * 1000)):
            self._take_all(kernel)
            self.port.flush()
        for msg_id, request in list(self._open.items()):
            if request.reply is not None:
                self._settle(msg_id, request, force=True)
        self.port.flush()
        self._read_outputs(self._outputs)
        with suppress(OSError):
            os.write(2, self._tail)  # for the agent, who reads what nobody read
        kernel.close()
        return status

    # --- the loop ---

    def _turn(self) -> None:
        """Wait for something, and deal with it.  Raises KernelEnded."""
        ready = dict(self._poller.poll(self._patience()))
        if self._signals in ready:
            os.read(self._signals, 4096)
            self._interrupt()
        self._read_outputs(ready)
        for port in self.ports:
            if port.fd in ready:
                for message in port.receive():
                    self._on_request(*_request(message))
        kernel = self._kernel
        if kernel is not None:
            self._take_all(kernel)
            self._give_up(ready.get(kernel.sockets["iopub"]))
            if kernel.poll_fd in ready:
                self.port.flush()
                raise KernelEnded
        self.port.flush()

    def _patience(self) -> int | None:
        """Milliseconds until a request's other half counts as lost."""
        waiting = [r for r in self._open.values() if r.since]
        if not waiting:
            return None
        first = max(min(r.since for r in waiting), self._heard) + LOST
        return max(0, int((first - time.monotonic()) * 1000) + 1)

    def _give_up(self, talking: int | None) -> None:
        if talking:
            return
        now = time.monotonic()
        for msg_id, request in list(self._open.items()):
            if request.since and now - max(request.since, self._heard) > LOST:
                self._settle(msg_id, request, force=True)

    def _read_outputs(self, ready: Container[object]) -> None:
        """What the kernel writes to its own stdout and stderr: kept for the news of its death."""
        for fd in self._outputs:
            if fd not in ready:
                continue
            with suppress(BlockingIOError):
                while data := os.read(fd, 1 << 16):
                    self._tail = (self._tail + data)[-OUTPUT_TAIL:]

    # --- from the host ---

    def _on_request(self, request: messages.ToGuest, buffers: Sequence[memoryview]) -> None:
        if request.msg_type == "wake_request":
            self._wake(request)
            return
        if request.channel == "vm":
            return  # an answer to what only the Python engine asks
        kernel = self._kernel
        if not self._awake or kernel is None:
            return  # fail closed
        channel: Channel = request.channel
        msg_id, msg_type = request.msg_id, request.msg_type
        if channel != "stdin":
            if msg_type == "execute_request":
                self._tail = b""
            self._open[msg_id] = _Open(msg_type, channel)
        kernel.send(
            channel, bytes(request.header), bytes(request.metadata), bytes(request.content), buffers
        )
        if msg_type.startswith("comm_"):
            # In the midst of an asynchronous cell ipykernel serves it and publishes no status
            comms = [other for other, request in self._open.items() if request.msg_type == msg_type]
            for forgotten in comms[:-MOST_COMMS]:
                del self._open[forgotten]

    def _wake(self, request: messages.ToGuest) -> None:
        content = messages.decode(bytes(request.content), messages.WakeKernel)
        if self._awake and not self._recipe.wake_code:
            why = "a kernel without wake_code takes its environment only when it starts"
            reply = messages.encode_json({"status": "error", "evalue": why})
            self._say("control", "wake_reply", request.msg_id, reply)
            return
        if content.cwd:
            workspace.wait()
        cwd = content.cwd if os.path.isdir(content.cwd) else os.getcwd()
        if self._kernel is not None:
            self._run_wake_code(content.entropy, content.env, cwd)
        else:
            self._start({**os.environ, **content.env}, cwd)
            self._kernel_info()
        self._awake = True
        self._say("control", "wake_reply", request.msg_id, b'{"status":"ok"}')

    def _interrupt(self) -> None:
        """The agent sent SIGINT to our process group: the kernel has it, too, or is told."""
        if self._kernel is None or not self._awake:
            return
        if self._recipe.interrupt_mode == "message":
            self._ask("control", "interrupt_request", {})
        else:
            # ipykernel#881: the signal alone does not wake a loop that awaits, a message does
            self._ask("shell", "kernel_info_request", {})

    # --- from the kernel ---

    def _take_all(self, kernel: ForeignKernel) -> None:
        # Outputs first: what was printed before a question is to be read before it
        for channel in ("iopub", "stdin", "shell", "control"):
            for message in kernel.receive(channel, AT_ONCE):
                self._on_message(message)

    def _on_message(self, message: Message) -> None:
        msg_type, parent_id = message.msg_type, message.parent_id
        self._heard = time.monotonic()
        if parent_id.startswith(_OWN) or max(len(msg_type), len(parent_id)) > _MAX_NAME:
            return
        request = self._open.get(parent_id)
        if message.channel == "iopub":
            if msg_type == "status":
                self._on_status(message, request)
            elif msg_type != "iopub_welcome":
                self._pass_on(message)
        elif message.channel == "stdin":
            self._pass_on(message)
        elif request is not None and request.channel == message.channel:
            request.reply, request.since = message, self._heard
            self._settle(parent_id, request)

    def _on_status(self, message: Message, request: _Open | None) -> None:
        if request is None:
            return
        state = msgspec.json.decode(as_object(message.content)).get("execution_state")
        if state == "idle":
            request.idle, request.since = True, self._heard
            self._settle(message.parent_id, request)
        elif state == "busy" and request.msg_type == "execute_request":
            # The kernel knows by itself when it can serve comm messages; they may be sent
            self._say("vm", "awaiting", message.parent_id, b"{}")

    def _settle(self, msg_id: str, request: _Open, *, force: bool = False) -> None:
        """End a request for the host when all about it was said."""
        has_reply = request.msg_type.endswith("_request")
        if force or (request.idle and (request.reply is not None or not has_reply)):
            del self._open[msg_id]
            if request.reply is not None:
                self._pass_on(request.reply)
            self._say("iopub", "status", msg_id, b'{"execution_state":"idle"}')

    def _pass_on(self, message: Message) -> None:
        body = messages.encode_json(
            [
                message.channel,
                message.msg_type,
                message.parent_id,
                as_object(message.metadata),
                as_object(message.content),
            ]
        )
        size = len(body) + sum(len(buffer) + 4 for buffer in message.buffers)
        if size + 4 > frames.MAX_MESSAGE or len(message.buffers) > frames.MAX_BUFFERS:
            text = (
                f"vmkernel: a message of {size} bytes and {len(message.buffers)} buffers was "
                f"dropped; the limits are {frames.MAX_MESSAGE} and {frames.MAX_BUFFERS}\n"
            )
            content = msgspec.json.encode({"name": "stderr", "text": text})
            self._say("iopub", "stream", message.parent_id, content)
        else:
            self.port.queue(body, tuple(message.buffers))

    def _say(self, channel: str, msg_type: str, parent_id: str, content: bytes) -> None:
        body = [channel, msg_type, parent_id, {}, msgspec.Raw(content)]
        self.port.queue(messages.encode_json(body))

    # --- requests of our own ---

    def _ask(self, channel: Channel, msg_type: str, content: dict[str, Any]) -> str:
        assert self._kernel is not None
        self._count += 1
        msg_id = f"{_OWN}{self._count}"
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "session": _OWN,
            "username": "user",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": "5.4",
        }
        self._kernel.send(channel, msgspec.json.encode(header), b"{}", msgspec.json.encode(content))
        return msg_id

    def _converse(self, msg_type: str, content: dict[str, Any], linger: float) -> _Open:
        """Ask on shell and wait for the reply, and ``linger`` seconds longer for idle.

        Whatever else the kernel says is not heard.  Raises KernelEnded.
        """
        msg_id = self._ask("shell", msg_type, content)
        kernel = self._kernel
        assert kernel is not None
        poller = zmq.Poller()  # the host has to wait
        for item in (kernel.sockets["shell"], kernel.sockets["iopub"], kernel.poll_fd):
            poller.register(item, zmq.POLLIN)
        for fd in self._outputs:
            poller.register(fd, zmq.POLLIN)
        found = _Open(msg_type, "shell")
        while not (found.reply and found.idle):
            left = None
            if found.reply:
                left = max(0, int(1000 * (found.since + linger - time.monotonic())))
            ready = dict(poller.poll(left))
            self._read_outputs(ready)
            for channel in ("shell", "iopub"):
                for message in kernel.receive(channel, AT_ONCE):
                    if message.parent_id != msg_id:
                        continue
                    if message.channel == "shell":
                        found.reply, found.since = message, time.monotonic()
                    elif message.msg_type == "status":
                        found.idle = b"idle" in message.content
            if kernel.poll_fd in ready:
                raise KernelEnded
            if left == 0:
                break
        return found

    def _kernel_info(self) -> dict[str, Any]:
        """The kernel's own, when it answers and is heard on iopub, too."""
        while True:
            found = self._converse("kernel_info_request", {}, linger=0.5)
            if found.idle and found.reply:
                info: dict[str, Any] = msgspec.json.decode(as_object(found.reply.content))
                return {"status": "ok", **info}

    def _run_wake_code(self, entropy: bytes, env: dict[str, str], cwd: str) -> None:
        code = fill_in(self._recipe.wake_code, entropy, env, cwd)
        content = {
            "code": code,
            "silent": True,
            "store_history": False,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": False,
        }
        found = self._converse("execute_request", content, linger=LOST)
        assert found.reply is not None
        reply = json.loads(found.reply.content)
        if reply.get("status") != "ok":
            raise RuntimeError(f"the recipe's wake_code failed: {reply}\n{code}")


def fill_in(code: str, entropy: bytes, env: Mapping[str, str], cwd: str) -> str:
    """``code`` with its placeholders filled in; see ``wake_code`` in image/recipe.py."""
    texts = {
        "{seed}": str(int.from_bytes(entropy[:4], "big") >> 1),
        "{entropy}": entropy.hex(),
        "{cwd:json}": json.dumps(cwd),
        "{cwd:sh}": shlex.quote(cwd),
        "{env:json}": json.dumps(dict(env)),
        "{env:string}": json.dumps(json.dumps(dict(env))),
        "{env:sh}": " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items()),
    }
    # In one pass: a value may look like a placeholder
    return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], code)


def end_like(status: int) -> NoReturn:
    """End this process as another one ended (``ForeignKernel.status``), signal and all."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # SIGKILL has no other disposition
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        signal.pause()
    os._exit(status)


def _request(message: bytearray) -> tuple[messages.ToGuest, list[memoryview]]:
    body, buffers = frames.split(message)
    return messages.decode(body, messages.ToGuest), buffers


def _rehearse() -> None:
    """Build the decoders before the template is saved: 80 ms each under emulation."""
    content = messages.encode_json(messages.WakeKernel(b"", {}, ""))
    messages.decode(content, messages.WakeKernel)
    empty = msgspec.Raw(b"{}")
    request = messages.ToGuest("control", "", "", empty, empty, empty)
    (message,) = frames.FrameReader().feed(b"".join(frames.encode(messages.encode_json(request))))
    _request(message)
