"""A kernel's five Jupyter sockets on the front end's side, forwarded to wherever it runs.

Front ends keep their connections when the kernel gets another host, and hear what they wait for
when it has none.  Messages go through as they are: both sides sign with the same key.  What is said
here, of our own, is what one host's wrapper kernel says in its place (``vmkernel.kernel.local``).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from vmkernel.cluster.relay_sockets import FrontEnds, Passing, delimiter_in, header_of
from vmkernel.cluster.relay_waiting import Pending, Waiting
from vmkernel.cluster.remote import Remote
from vmkernel.errors import VmError
from vmkernel.kernel import local
from vmkernel.kernel.sockets import DELIMITER
from vmkernel.text import plain_text

log = logging.getLogger("vmkernel")

WELCOME_SECONDS = 3.0
"""How long a kernel may take to say that its iopub is heard, before requests go all the same."""
PATIENCE = 2.0
"""Seconds that an editor's question waits for a kernel that is coming up (as on one host)."""

REFUSE_SECONDS = 5.0
"""For so long thousands of errors wait for a front end that does not read; then they are sent to
those that do, and what does not fit is lost to it."""
_TURN = 100
"""Errors that are sent at once."""

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class _Count(msgspec.Struct):
    execution_count: int | None = None


_decode_count = msgspec.json.Decoder(_Count).decode


class State(enum.Enum):
    """Where a relay's requests go."""

    WAITING = "waiting"  # they are held
    CONNECTING = "connecting"  # held, until iopub is heard
    UP = "up"
    ENDING = "ending"  # it was shut down: held, for the next one
    FAILED = "failed"  # answered with an error


class Relay:
    """The Jupyter sockets of one kernel.  Everything here runs in one event loop.

    ``info`` is the front end's connection information (jupyter_client, KernelConnectionInfo): ip,
    transport, key, signature scheme; ports, of which 0 is chosen; CURVE keys if it encrypts.
    ``kernel_info`` is what the kernel will say of itself, as far as somebody knows.
    """

    def __init__(
        self, info: Mapping[str, Any], *, kernel_info: Mapping[str, Any] | None = None
    ) -> None:
        self._wanted = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in info.items()
        }
        self.kernel_info = kernel_info
        self.state = State.WAITING
        self.on_interrupt: Callable[[], None] = lambda: None
        """An interrupt came while there is no kernel: what was held is told already."""
        self.on_shutdown: Callable[[bool], None] = lambda restart: None
        """A shutdown_request came while there is no kernel; it is answered."""
        self.on_work: Callable[[], None] = lambda: None
        """A cell came after :meth:`fail`: call :meth:`waiting` to have it held."""
        self._sockets: FrontEnds | None = None
        self._waiting: Waiting | None = None
        self._pending = Pending()
        self._remote: Remote | None = None
        self._welcome = asyncio.Event()
        self._own_info: dict[str, Any] | None = None
        """What the kernel itself said on a kernel_info_request"""
        self._count = 0
        """The kernel's last execution count"""
        self._error: VmError | None = None
        self._refused: deque[tuple[Passing, dict[str, Any]]] = deque()
        """Requests, and the errors that are to be their answers"""
        self._refusing: asyncio.TimerHandle | None = None
        self._refuse_until = 0.0

    def __repr__(self) -> str:
        held = len(self._waiting) if self._waiting is not None else 0
        return f"<Relay {self.state.value}: held={held} pending={len(self._pending)}>"

    @property
    def info(self) -> dict[str, Any]:
        """The connection information, with the ports that were bound."""
        return dict(self._sockets.info) if self._sockets is not None else dict(self._wanted)

    async def open(self) -> None:
        """Bind.  Raises VmError."""
        sockets = FrontEnds(self._on_request)
        sockets.open(self._wanted)
        self._sockets, self._waiting = sockets, Waiting(sockets)
        sockets.status("starting")

    # --- what the driver says ---

    def say(self, text: str) -> None:
        """What is waited for: shown in the notebook, to the first who waits, when it lasts."""
        if self._waiting is not None:
            self._waiting.say(plain_text(text))

    def warn(self, text: str) -> None:
        """Tell whoever runs a cell, on standard error."""
        cell = self._pending.running
        if self._sockets is not None and cell is not None:
            self._sockets.stderr(f"{plain_text(text)}\n", cell.raw[0])

    async def connect(self, remote: Mapping[str, Any]) -> None:
        """Forward to this kernel from now on, what was held first.  Raises VmError."""
        if self._sockets is None or self._waiting is None:
            raise VmError("the relay is closed", hint="open it before a kernel is connected")
        self._detach()
        self._remote = mine = Remote(
            remote, self._sockets.context, self._on_answer, self._sockets.release
        )
        self.state, self._error = State.CONNECTING, None
        self._welcome = asyncio.Event()
        try:
            # Nothing that is published now may be lost (JEP 65, iopub_welcome)
            await asyncio.wait_for(self._welcome.wait(), WELCOME_SECONDS)
        except TimeoutError:
            log.warning("a kernel at %s said no welcome on iopub", remote.get("ip"))
        if self._remote is not mine or self.state is not State.CONNECTING:
            return  # it failed, or was let go, meanwhile
        self.state = State.UP
        self._dispatch_held()

    def fail(self, error: VmError) -> None:
        """Answer every request that has no answer with this error, and those that come."""
        self._detach()
        self.state, self._error = State.FAILED, error
        requests = self._pending.take_all()
        if self._waiting is not None:
            requests += self._waiting.take_all()
        for request in requests:
            self._refuse(request, local.explain(error))

    def waiting(self) -> None:
        """There is no kernel, but there will be one: hold requests.

        Those that the last one had are not answered any more, as with any kernel that is restarted,
        and those that waited for it do not run: both were meant for what is given up.
        """
        former, self.state = self.state, State.WAITING
        self._detach()
        self._pending.take_all()
        self._error = None
        if self._sockets is None or self._waiting is None:
            return
        self._waiting.text = ""
        if former is State.ENDING:
            self._sockets.status("starting")
            self._dispatch_held()
        else:
            self._drop_held()
            self._sockets.status("starting")

    async def close(self) -> None:
        """Let go of everything, after what is queued was sent (a second at most)."""
        self._detach()
        if self._waiting is not None:
            self._waiting.take_all()
        sockets, self._sockets, self._waiting = self._sockets, None, None
        self._pending.take_all()
        if self._refusing is not None:
            self._refusing.cancel()
        if sockets is not None:
            while self._refused:
                _publish_error(sockets, *self._refused.popleft(), self._count)
            await sockets.close_gently()

    # --- from front ends ---

    def _on_request(self, request: Passing) -> None:
        msg_type, state = request.msg_type, self.state
        if msg_type == "connect_request" and state is not State.FAILED:
            self._answer(request, self._ports())  # where the kernel is, is nothing to front ends
        elif state is State.UP:
            self._forward(request)
        elif request.channel == "stdin":
            return  # nobody asked
        elif state is State.CONNECTING and msg_type == "shutdown_request":
            self._drop_held()
            self._forward(request)
        elif state is State.ENDING and msg_type != "shutdown_request":
            self._hold(request)
        elif msg_type == "kernel_info_request":
            if state is State.CONNECTING and self._own_info is None:
                self._hold_for_a_while(request)
            else:
                self._answer(request, self._kernel_info())
        elif msg_type == "interrupt_request":
            self._drop_held("execute_request")
            self._answer(request, {"status": "ok"})
            self.on_interrupt()
        elif msg_type == "shutdown_request":
            self._drop_held()
            restart = bool(request.content.get("restart"))
            self._answer(request, {"status": "ok", "restart": restart})
            self.on_shutdown(restart)
        elif msg_type in local.WITHOUT_GUEST and state is not State.FAILED:
            self._hold_for_a_while(request)
        elif msg_type in local.WITHOUT_GUEST:
            self._answer_without(request)
        else:
            self._hold(request)

    def _kernel_info(self) -> dict[str, Any]:
        if self._own_info is not None:
            return self._own_info
        info = dict(self.kernel_info) if self.kernel_info is not None else None
        text = self._waiting.text if self._waiting is not None else ""
        return {"status": "ok", **local.kernel_info(info, None, text)}

    def _ports(self) -> dict[str, Any]:
        names = ("shell", "iopub", "stdin", "control", "hb")
        return {"status": "ok", **{f"{name}_port": self.info[f"{name}_port"] for name in names}}

    def _answer_without(self, request: Passing) -> None:
        if request.msg_type == "kernel_info_request":
            self._answer(request, self._kernel_info())
        else:
            self._answer(request, local.without_guest(request.msg_type, request.content))

    def _hold_for_a_while(self, request: Passing) -> None:
        assert self._waiting is not None
        try:
            self._waiting.hold_for(request, PATIENCE, self._answer_without)
        except VmError:
            self._answer_without(request)

    def _hold(self, request: Passing) -> None:
        assert self._waiting is not None
        if self.state is State.FAILED and request.msg_type == "execute_request":
            self.on_work()
        error = self._error if self.state is State.FAILED else None
        if error is None:
            try:
                self._waiting.hold(request)
                return
            except VmError as too_many:
                error = too_many
        self._refuse(request, local.explain(error))

    def _drop_held(self, msg_type: str = "") -> None:
        """What waits (of this type) will not run: somebody gave it up."""
        assert self._waiting is not None
        for request in self._waiting.take_all(msg_type):
            if request.msg_type in local.WITHOUT_GUEST or request.msg_type == "kernel_info_request":
                self._answer_without(request)
            else:
                self._refuse(request, local.interrupted())

    def _dispatch_held(self) -> None:
        """What was held is served as if it came now."""
        assert self._waiting is not None
        for request in self._waiting.take_all():
            self._on_request(request)

    def _forward(self, request: Passing) -> None:
        if self._remote is None or self._sockets is None:
            return
        frames = request.frames
        if request.channel != "stdin":
            self._pending.add(request)
        if not self._remote.send(request.channel, frames):
            self._sockets.hold(request.channel)

    def _answer(self, request: Passing, content: dict[str, Any]) -> None:
        sockets = self._sockets
        if sockets is not None:
            sockets.status("busy", request.raw[0])
            sockets.reply(request, request.msg_type.replace("_request", "_reply"), content)
            sockets.status("idle", request.raw[0])

    def _refuse(self, request: Passing, error: dict[str, Any]) -> None:
        """Answer with an error: now, or when front ends have taken those before it."""
        if not self._refused:
            self._refuse_until = time.monotonic() + REFUSE_SECONDS
        self._refused.append((request, error))
        if self._refusing is None:
            self._refuse_some()

    def _refuse_some(self) -> None:
        self._refusing = None
        for _ in range(_TURN):
            sockets = self._sockets
            if not self._refused or sockets is None:
                return
            if sockets.congested and time.monotonic() < self._refuse_until:
                break
            request, error = self._refused.popleft()
            _publish_error(sockets, request, error, self._count)
        self._refusing = asyncio.get_running_loop().call_later(0.01, self._refuse_some)

    # --- from the kernel ---

    def _on_answer(self, channel: str, frames: Sequence[Any]) -> None:
        sockets, remote = self._sockets, self._remote
        if sockets is None or remote is None:
            return
        if channel == "iopub":
            if self._is_welcome(frames):
                return  # front ends have theirs from us
        elif channel != "stdin":
            self._note_reply(channel, frames)
        sockets.pass_on(channel, list(frames))
        if channel == "iopub" and sockets.congested:
            remote.pause()
            sockets.when_clear(remote.resume)

    def _is_welcome(self, frames: Sequence[Any]) -> bool:
        """Whether it says that we are heard; said again, it tells of a connection that broke."""
        first = not self._welcome.is_set()
        if not first and frames[0] and frames[0] != DELIMITER:
            return False  # it has a topic: the usual case, which costs no look inside
        if header_of(frames, 0).get("msg_type") != "iopub_welcome":
            if first:
                self._welcome.set()  # whatever it is, it is heard
            return False
        self._welcome.set()
        if not first:
            self.warn(
                "the connection to the kernel's host broke, and is there again; some output may "
                "be missing"
            )
        return True

    def _note_reply(self, channel: str, frames: Sequence[Any]) -> None:
        at = delimiter_in(frames)
        msg_id = str(header_of(frames, 1).get("msg_id", ""))
        request = self._pending.answered((channel, tuple(frames[:at]), msg_id))
        if request is None:
            return
        try:
            if request.msg_type == "execute_request":
                self._count = _decode_count(frames[at + 5]).execution_count or self._count
            elif request.msg_type == "kernel_info_request":
                self._own_info = _decode(frames[at + 5])
        except (IndexError, msgspec.MsgspecError, RecursionError) as error:
            log.warning("the kernel's answer to %r cannot be read: %s", request, error)
        if request.msg_type == "shutdown_request":
            self.state = State.ENDING

    def _detach(self) -> None:
        remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()
            if self._sockets is not None:
                for channel in ("shell", "control", "stdin"):
                    self._sockets.release(channel)


def _publish_error(sockets: FrontEnds, request: Passing, error: dict[str, Any], count: int) -> None:
    """The answer to a request that is not served; *count* is the last execution count."""
    header = request.raw[0]
    sockets.status("busy", header)
    content: dict[str, Any] = {"status": "error", **error}
    if request.msg_type == "execute_request":
        if not request.silent:
            sockets.publish("error", error, header)
        content |= {"execution_count": count, "user_expressions": {}, "payload": []}
    if request.msg_type.endswith("_request"):
        msg_type = request.msg_type.removesuffix("_request") + "_reply"
        sockets.reply(request, msg_type, content, {"status": "error"})
    sockets.status("idle", header)
