"""One lane of requests, served in their order: the main shell's, or a subshell's.

Where it stands: ``kernel.wrapper`` has one for the main shell and one for each subshell.  A lane
keeps its queue and sends requests to the guest one at a time; so it knows what runs, can answer for
a guest that cannot, and aborts what is queued behind an error (messaging spec, "stop_on_error").
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from vmkernel import trace
from vmkernel.errors import VmError, VmGuestError
from vmkernel.kernel import local
from vmkernel.kernel.progress import Notice
from vmkernel.kernel.sockets import Request, Sockets, now
from vmkernel.kernel.supply import GuestSupply
from vmkernel.protocol.messages import COMM_TYPES

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest

log = logging.getLogger("vmkernel")

PATIENCE = 2.0
"""Seconds that an editor's question waits for a guest that is coming up."""

BEGIN_PATIENCE = 5.0
"""Seconds that an interrupt waits for the cell that it is meant for to begin in the guest."""

EXECUTE = "execute_request"


class InterruptedWait(Exception):  # noqa: N818 - no error, a wish
    """The user interrupted what the wrapper was waiting for."""


class Exchange:
    """A request that is with the guest."""

    __slots__ = (
        "asked", "awaiting", "begun", "done", "interrupted", "lane", "noted", "own", "question",
        "replied", "request", "shown", "started", "unanswered", "warned",
    )  # fmt: skip

    def __init__(self, request: Request, lane: Lane | None) -> None:
        self.request = request
        self.lane = lane
        self.started = now()
        self.replied = False
        self.own: dict[str, Any] | None = None
        """What is replied in place of the guest's answer"""
        self.shown = False
        """Its execute_input was published"""
        self.begun = asyncio.Event()
        """The guest runs it: its execute_input was published"""
        self.interrupted = False
        self.warned = False
        """It went on after an interrupt, and the user was told"""
        self.noted = False
        """The history has it"""
        self.asked = False
        """An input_request, and no answer yet"""
        self.question = ""
        """That input_request's id"""
        self.unanswered = 0
        """How many input_requests a person may still see, and answer: also older ones"""
        self.awaiting = False
        """The cell waits in the guest's event loop: comm messages can be served."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """The guest said idle, or died (an exception)."""

    async def can_be_interrupted(self) -> None:
        """Wait until a signal would hit its code, or it is done; a guest may never say so."""
        if self.request.msg_type != EXECUTE or self.request.content.get("silent"):
            return
        begun = asyncio.ensure_future(self.begun.wait())
        waiting: set[asyncio.Future[Any]] = {begun, self.done}
        await asyncio.wait(waiting, timeout=BEGIN_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()


class Owner(Protocol):
    """What a lane needs of the wrapper."""

    sockets: Sockets
    supply: GuestSupply
    execution_count: int

    def send(
        self, guest: Guest, request: Request, lane: Lane | None, *, meanwhile: bool = False
    ) -> Exchange:
        """Send a request to the guest; ``meanwhile``: beside the one that runs.  Raises VmError."""

    async def before_execution(self, guest: Guest, request: Request, visible: bool) -> None:
        """A request is about to be sent."""

    async def answer(self, request: Request) -> dict[str, Any] | None:
        """The reply's content when the host answers this request by itself."""

    def reply(self, request: Request, content: Any, metadata: Any = None) -> None:
        """Send the reply to a request."""


class Lane:
    """Requests that are served one after another.

    ``on_end(error)``: its loop failed.  ``subshell_id`` is "" for the main shell.
    """

    def __init__(
        self, owner: Owner, on_end: Callable[[BaseException], None], subshell_id: str = ""
    ) -> None:
        self.subshell_id = subshell_id
        self.exchange: Exchange | None = None
        """The request that is or was with the guest, until it is done with here, too"""
        self.request: Request | None = None
        """What is being served, by the guest or without it"""
        self.replied = False
        self._owner = owner
        self._queue: deque[Request] = deque()
        self._arrived = asyncio.Event()
        self._waiting: asyncio.Task[Guest] | None = None
        self._interrupted = False
        self._retired = False
        self._on_end = on_end
        self._worker = asyncio.create_task(self._work())
        self._worker.add_done_callback(self._ended)

    def __repr__(self) -> str:
        request = self.open.request if self.open is not None else None
        return f"<Lane with_guest={request} queued={len(self._queue)}>"

    @property
    def open(self) -> Exchange | None:
        """The request that the guest has and is not done with."""
        exchange = self.exchange
        return exchange if exchange is not None and not exchange.done.done() else None

    def close(self) -> None:
        """Serve no more."""
        self._worker.cancel()

    def retire(self) -> None:
        """The subshell is gone: say so to what it ran and what is queued, and serve no more."""
        self._retired = True
        self._arrived.set()
        if self.open is not None:
            error = VmGuestError(
                "The subshell was deleted while it ran this",
                hint="wait for the end of what a subshell runs, then delete it",
                code_ran="unknown",
            )
            self.open.done.set_exception(error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            error = task.exception()
            if error is not None:
                self._on_end(error)

    def add(self, request: Request) -> None:
        """A request came in."""
        self._queue.append(request)
        self._arrived.set()
        self.send_comms()

    def send_comms(self) -> None:
        """While a cell awaits something, it may be a widget: comm messages overtake the queue."""
        if self.open is None or not self.open.awaiting:
            return
        guest = self._owner.supply.current
        comms = [request for request in self._queue if request.msg_type in COMM_TYPES]
        if guest is None or not comms:
            return
        for request in comms:
            self._queue.remove(request)
            with contextlib.suppress(VmError):  # the cell is told
                self._owner.send(guest, request, self, meanwhile=True)

    def interrupt(self) -> bool:
        """Interrupt what this lane does; False when it is the guest that runs it."""
        if self._waiting is not None and self._waiting.cancel():
            return True
        if self.open is None:
            self._interrupted = True
            return True
        return False

    async def _work(self) -> None:
        owner = self._owner
        while True:
            while not self._queue:
                if self._retired:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            # An interrupt that was sent before this request came by another socket, and is not
            # meant for it: let it be heard now, when nothing runs.
            owner.sockets.drain("control")
            request = self.request = self._queue.popleft()
            self.replied = False
            owner.sockets.status("busy", request.raw[0])
            try:
                await self._serve(request)
            except VmError as error:
                self._fail(request, local.explain(error))
            except Exception as error:  # our bug: it costs this cell, not the kernel
                log.exception("%r could not be served", request)
                self._fail(request, local.explain(_unexpected(error)))
            finally:
                self.exchange = self.request = None
            owner.sockets.status("idle", request.raw[0])

    async def _serve(self, request: Request) -> None:
        msg_type = request.msg_type
        if request.aborted:
            self._reply(request, {"status": "aborted"}, self._owner.sockets.aborted_metadata())
            return
        if self._retired:
            self._reply(request, local.unknown_subshell(self.subshell_id), {"status": "error"})
            return
        content = await self._owner.answer(request)
        if content is not None:
            self._reply(request, content)
        elif msg_type in local.WITHOUT_GUEST and not await self._guest_soon():
            self._reply(request, local.without_guest(msg_type, request.content))
        else:
            try:
                await self._serve_by_guest(request)
            except InterruptedWait:
                self._fail(request, local.interrupted(sent=self.exchange is not None))

    async def _guest_soon(self) -> bool:
        """Whether there is a guest, or one within the patience of an editor."""
        supply = self._owner.supply
        if supply.failed:
            return False
        with contextlib.suppress(TimeoutError, VmError):
            async with asyncio.timeout(PATIENCE):
                await supply.guest(None)
            return True
        return False

    async def _serve_by_guest(self, request: Request) -> None:
        self._interrupted = False
        visible = request.msg_type == EXECUTE and not request.content.get("silent")
        while True:
            guest = await self._wait_for_guest(request, visible)
            await self._owner.before_execution(guest, request, visible)
            if self._interrupted:  # between the guest's coming and the request's going
                raise InterruptedWait
            if guest.vm.kernel.connected:
                break  # else it died in this very instant: the next one serves
        trace.mark("first request for the guest")
        self.exchange = self._owner.send(guest, request, self)
        await self.exchange.done
        if not self.exchange.replied and self.exchange.interrupted:
            raise InterruptedWait  # between two steps of the guest's: before its code, or after it
        if not self.exchange.replied and request.msg_type not in COMM_TYPES:
            # Nobody may be left waiting, whatever the guest forgot or cannot do.
            error = local.error_content(
                "NotImplementedError", f"the guest kernel gave no answer to {request.msg_type}", []
            )
            self._reply(request, {**error, "status": "error"}, {"status": "error"})

    async def _wait_for_guest(self, request: Request, visible: bool) -> Guest:
        """The guest, however long it takes to come.  Raises VmError, InterruptedWait."""
        with Notice(self._owner.sockets, request.raw[0], visible) as notice:
            supply = self._owner.supply
            self._waiting = asyncio.ensure_future(supply.guest(notice.show))
            try:
                return await self._waiting
            except asyncio.CancelledError:
                if self._worker.cancelling():
                    raise  # it is us who are cancelled: shutdown
                raise InterruptedWait from None
            finally:
                self._waiting = None

    def _reply(self, request: Request, content: Any, metadata: Any = None) -> None:
        self.replied = True
        if request.msg_type not in COMM_TYPES:
            self._owner.reply(request, content, metadata)

    def _fail(self, request: Request, error: dict[str, Any]) -> None:
        """End a request with an error of our own, and abort what is queued behind it."""
        if request.msg_type == EXECUTE:
            self._show_input(request)
            self._owner.sockets.publish("error", error, request.raw[0])
            content = {**error, "status": "error", "execution_count": self._owner.execution_count,
                       "user_expressions": {}, "payload": []}  # fmt: skip
        else:
            content = {**error, "status": "error"}
        if not (self.replied or (self.exchange is not None and self.exchange.replied)):
            self._reply(request, content, {"status": "error"})
        self.abort_queued(request)

    def _show_input(self, request: Request) -> None:
        """Publish what was to be executed, where no guest lived long enough to do so."""
        if request.content.get("silent") or (self.exchange is not None and self.exchange.shown):
            return
        content = {
            "code": request.content.get("code", ""),
            "execution_count": self._owner.execution_count + 1,
        }
        self._owner.sockets.publish("execute_input", content, request.raw[0])

    def abort_queued(self, request: Request) -> None:
        """After an error: the execute requests that have arrived by now are not run."""
        content = request.content
        if request.msg_type != EXECUTE or content.get("silent"):
            return
        if content.get("stop_on_error", True):
            self._owner.sockets.drain("shell")
            for queued in self._queue:
                queued.aborted = queued.msg_type == EXECUTE


def _unexpected(error: Exception) -> VmError:
    return VmError(
        f"vmkernel failed in a way it should not: {type(error).__name__}: {error}",
        hint="run the cell again; please report this with the Jupyter server's log",
        code_ran="unknown",
    )
