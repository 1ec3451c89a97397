"""A kernel's five Jupyter sockets on the front end's side, forwarded to wherever it runs.

Front ends keep their connections when the kernel gets another host, and hear what they wait for
when it has none.  Messages go through as they are: both sides sign with the same key.  What is said
here, of our own, is what one host's wrapper kernel says in its place (``vmkernel.kernel.local``).
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from vmkernel.cluster.remote import ASKING, Remote
from vmkernel.errors import VmError
from vmkernel.kernel import local
from vmkernel.kernel.progress import Notice
from vmkernel.kernel.sockets import DELIMITER, Request, Sockets

log = logging.getLogger("vmkernel")

MOST_HELD = 1000
"""Requests that wait for a kernel; one more is answered with an error."""
MOST_PENDING = 10_000
"""Requests of which is known that they have no answer yet."""
WELCOME_SECONDS = 3.0
"""How long a kernel may take to say that its iopub is heard, before requests go all the same."""

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class State(enum.Enum):
    """Where a relay's requests go."""

    WAITING = "waiting"  # they are held
    CONNECTING = "connecting"  # held, until iopub is heard
    UP = "up"
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
        self._sockets: Sockets | None = None
        self._remote: Remote | None = None
        self._welcome: asyncio.Event = asyncio.Event()
        self._held: list[Request] = []
        self._pending: dict[str, Request] = {}
        self._running = b"{}"
        """The header of the cell that was sent last: what is to be told of its kernel goes there"""
        self._notice: Notice | None = None
        self._text = ""
        self._error: VmError | None = None

    @property
    def info(self) -> dict[str, Any]:
        """The connection information, with the ports that were bound."""
        return dict(self._sockets.info) if self._sockets is not None else dict(self._wanted)

    async def open(self) -> None:
        """Bind.  Raises VmError."""
        ports = ("shell", "iopub", "stdin", "control", "hb")
        info = {"ip": "127.0.0.1", "transport": "tcp", **self._wanted}
        for name in ports:
            info.setdefault(f"{name}_port", 0)
        self._sockets = sockets = Sockets(None, self._on_request)
        sockets.open(info)
        sockets.status("starting")

    # --- what the driver says ---

    def say(self, text: str) -> None:
        """What is waited for: shown in the notebook, to the first who waits, when it lasts."""
        self._text = text
        if self._notice is not None:
            self._notice.show(text)

    def warn(self, text: str) -> None:
        """Tell whoever runs a cell, on standard error."""
        if self._sockets is not None and self._running != b"{}":
            self._sockets.stderr(f"{text}\n", self._running)

    async def connect(self, remote: Mapping[str, Any]) -> None:
        """Forward to this kernel from now on, what was held first.  Raises VmError."""
        self._detach()
        self.state, self._error = State.CONNECTING, None
        self._welcome = asyncio.Event()
        self._remote = mine = Remote(remote, self._on_answer)
        try:
            # Nothing that is published now may be lost (JEP 65, iopub_welcome)
            await asyncio.wait_for(self._welcome.wait(), WELCOME_SECONDS)
        except TimeoutError:
            log.warning("a kernel at %s said no welcome on iopub", remote.get("ip"))
        if self._remote is not mine or self.state is not State.CONNECTING:
            return  # it failed, or was let go, meanwhile
        self.state = State.UP
        self._hush()
        held, self._held = self._held, []
        for request in held:
            self._forward(request)

    def fail(self, error: VmError) -> None:
        """Answer every request that has no answer with this error, and those that come."""
        self._detach()
        self.state, self._error = State.FAILED, error
        self._hush()
        requests = [*self._pending.values(), *self._held]
        self._pending.clear()
        self._held.clear()
        self._running = b"{}"
        for request in requests:
            self._refuse(request, local.explain(error))

    def waiting(self) -> None:
        """There is no kernel, but there will be one: hold requests.

        Those that the last one had are not answered any more, as with any kernel that is restarted.
        """
        self._detach()
        self._pending.clear()
        self._running = b"{}"
        self.state, self._error, self._text = State.WAITING, None, ""

    async def close(self) -> None:
        """Let go of everything, after what is queued was sent (a second at most)."""
        self._detach()
        self._hush()
        sockets, self._sockets = self._sockets, None
        self._held.clear()
        self._pending.clear()
        if sockets is not None:
            sockets.close()

    # --- from front ends ---

    def _on_request(self, request: Request) -> None:
        if self.state is State.UP:
            self._forward(request)
        elif request.channel == "stdin":
            return  # nobody asked
        elif request.msg_type == "kernel_info_request":
            self._answer(request, {"status": "ok", **self._kernel_info()})
        elif request.msg_type == "interrupt_request":
            self._interrupt(request)
        elif request.msg_type == "shutdown_request":
            restart = bool(request.content.get("restart"))
            self._answer(request, {"status": "ok", "restart": restart})
            self.on_shutdown(restart)
        elif request.msg_type in local.WITHOUT_GUEST:
            self._answer(request, local.without_guest(request.msg_type, request.content))
        else:
            self._hold(request)

    def _kernel_info(self) -> dict[str, Any]:
        info = dict(self.kernel_info) if self.kernel_info is not None else None
        return local.kernel_info(info, None, self._text)

    def _hold(self, request: Request) -> None:
        if self.state is State.FAILED and request.msg_type == "execute_request":
            self.on_work()
        if self.state is State.FAILED and self._error is not None:
            self._refuse(request, local.explain(self._error))
        elif len(self._held) >= MOST_HELD:
            error = VmError(
                f"{MOST_HELD} requests wait for a kernel already", hint="wait until it has come"
            )
            self._refuse(request, local.explain(error))
        else:
            self._held.append(request)
            self._show()

    def _show(self) -> None:
        """Say in the first cell that waits what it waits for."""
        cells = (held for held in self._held if held.msg_type == "execute_request")
        cell = next(cells, None)
        if self._notice is None and cell is not None and self._sockets is not None:
            visible = not cell.content.get("silent")
            self._notice = Notice(self._sockets, cell.raw[0], visible)
            if self._text:
                self._notice.show(self._text)

    def _hush(self) -> None:
        notice, self._notice = self._notice, None
        if notice is not None:
            notice.__exit__(None, None, None)

    def _interrupt(self, request: Request) -> None:
        self._hush()
        held, self._held = self._held, []
        for waiting in held:
            self._refuse(waiting, local.interrupted())
        self._answer(request, {"status": "ok"})
        self.on_interrupt()

    def _forward(self, request: Request) -> None:
        if self._remote is None or self._sockets is None:
            return
        if request.channel != "stdin":
            if len(self._pending) >= MOST_PENDING:
                del self._pending[next(iter(self._pending))]
            self._pending[request.msg_id] = request
            if request.msg_type == "execute_request":
                self._running = request.raw[0]
        signed = [DELIMITER, self._sockets.sign(request.raw), *request.raw, *request.buffers]
        self._remote.send(request.channel, [*request.idents, *signed])

    def _answer(self, request: Request, content: dict[str, Any]) -> None:
        sockets = self._sockets
        if sockets is not None:
            sockets.status("busy", request.raw[0])
            sockets.reply(request, request.msg_type.replace("_request", "_reply"), content)
            sockets.status("idle", request.raw[0])

    def _refuse(self, request: Request, error: dict[str, Any]) -> None:
        sockets = self._sockets
        if sockets is None:
            return
        sockets.status("busy", request.raw[0])
        content: dict[str, Any] = {"status": "error", **error}
        if request.msg_type == "execute_request":
            if not request.content.get("silent"):
                sockets.publish("error", error, request.raw[0])
            content |= {"execution_count": 0, "user_expressions": {}, "payload": []}
        if request.msg_type.endswith("_request"):
            sockets.reply(request, request.msg_type.replace("_request", "_reply"), content)
        sockets.status("idle", request.raw[0])

    # --- from the kernel ---

    def _on_answer(self, channel: str, frames: Sequence[Any]) -> None:
        sockets, remote = self._sockets, self._remote
        if sockets is None or remote is None:
            return
        if channel == "iopub" and not self._welcome.is_set():
            self._welcome.set()  # whatever it is, it is heard
            if _header(frames, 0).get("msg_type") == "iopub_welcome":
                return  # front ends have theirs from us
        if channel in ASKING and channel != "stdin":
            self._pending.pop(str(_header(frames, 1).get("msg_id", "")), None)
        sockets.pass_on(channel, list(frames))
        if sockets.congested:
            remote.pause()
            sockets.when_clear(remote.resume)

    def _detach(self) -> None:
        remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()


def _header(frames: Sequence[Any], which: int) -> dict[str, Any]:
    """A message's header (0) or parent header (1); empty when it has none."""
    try:
        at = frames.index(DELIMITER)
        return _decode(frames[at + 2 + which])
    except (ValueError, IndexError, msgspec.MsgspecError):
        return {}
