"""One kernel's life: requests in, a guest to serve them, answers out.

The wrapper keeps the queue of shell requests and sends them to the guest one at a time; so it
knows what runs, can answer for a guest that cannot, and aborts what is queued behind an error
(messaging spec, "stop_on_error").  Control requests are answered here at once.  The guest's
messages are matched to the request they name, given a fresh header and that request's own
parent header, and published.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel import trace
from vmkernel.errors import VmError, VmGuestError
from vmkernel.kernel import local
from vmkernel.kernel.progress import Notice
from vmkernel.kernel.sockets import Request, Sockets
from vmkernel.kernel.supply import GuestSupply
from vmkernel.protocol import messages

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest, KernelDeath
    from vmkernel.host.manager import Started
    from vmkernel.settings import Settings

log = logging.getLogger("vmkernel")

KNOWN_PARENTS = 4096
"""How many finished requests a late output (a thread, a comm) may still name."""
MOST_NEWS = 8
"""How many things that happened between two cells are told."""
MOST_ODDITIES = 20
"""How many wrong messages of a guest are logged: the log is the server's."""
PATIENCE = 2.0
"""Seconds that an editor's question waits for a guest that is coming up."""

# What a guest may publish.  ``status`` is the end of a request, and published by us.
IOPUB_TYPES = frozenset(
    "stream display_data update_display_data execute_input execute_result error clear_output "
    "comm_open comm_msg comm_close debug_event".split()
)
NO_REPLY = frozenset(("comm_open", "comm_msg", "comm_close"))
# A guest's error in an execute_request is in its reply; others have none to abort for.
_EXECUTE = "execute_request"


class InterruptedWait(Exception):  # noqa: N818 - no error, a wish
    """The user interrupted what the wrapper was waiting for."""


def _unexpected(error: Exception) -> VmError:
    return VmError(
        f"vmkernel failed in a way it should not: {type(error).__name__}: {error}",
        hint="run the cell again; please report this with the Jupyter server's log",
        code_ran="unknown",
    )


class Wrapper:
    """The kernel as a front end sees it.  ``await run()`` returns the exit status."""

    def __init__(
        self,
        settings: Settings,
        sockets: Sockets,
        kernel_id: str,
        begun: Started | None,
        failure: VmError | None = None,
    ) -> None:
        self.settings = settings
        self.sockets = sockets
        self.supply = GuestSupply(settings, kernel_id, begun, self, failure)
        self._queue: deque[Request] = deque()
        self._arrived = asyncio.Event()
        self._current: Request | None = None
        self._done: asyncio.Future[None] | None = None
        self._replied = False
        self._waiting: asyncio.Task[Guest] | None = None
        self._interrupting: asyncio.Task[None] | None = None
        self._asked = False  # input_request, and no answer yet
        self._parents: OrderedDict[str, bytes] = OrderedDict()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exit_asked = False
        self._execution_count = 0
        self._interrupted = False
        self._news: deque[str] = deque(maxlen=MOST_NEWS)
        self._oddities = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- life ---

    async def run(self) -> int:
        """Serve until shutdown; everything is released when this returns."""
        self.sockets.status("starting")
        self.supply.start_early()
        worker = asyncio.create_task(self._work())
        worker.add_done_callback(self._on_worker_end)
        try:
            return await self._exit
        finally:
            worker.cancel()
            await self.supply.close()

    def stop(self, status: int = 0) -> None:
        """End the kernel with this exit status."""
        if not self._exit.done():
            self._exit.set_result(status)

    def _on_worker_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.critical("the kernel's request loop failed", exc_info=task.exception())
            self.stop(1)

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- requests ---

    def on_request(self, request: Request) -> None:
        """A front end's message came in."""
        if request.channel == "stdin":
            self._on_input_reply(request)
        elif request.channel == "control" or request.msg_type == "shutdown_request":
            # Shutdown came on shell once, and ipykernel still takes it there.
            if request.msg_type == "interrupt_request":
                self.interrupt()  # at once: it is meant for what runs now
            self._spawn(self._control(request))
        else:
            self._queue.append(request)
            self._arrived.set()

    async def _work(self) -> None:
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            # An interrupt that was sent before this request came by another socket, and is not
            # meant for it: let it be heard now, when nothing runs.
            self.sockets.drain("control")
            request = self._queue.popleft()
            self._current, self._replied = request, False
            self._remember(request)
            self.sockets.status("busy", request.raw[0])
            try:
                await self._serve(request)
            except VmError as error:
                self._fail(request, local.explain(error))
            except Exception as error:  # our bug: it costs this cell, not the kernel
                log.exception("%r could not be served", request)
                self._fail(request, local.explain(_unexpected(error)))
            finally:
                self._current = None
                self._asked = False
            self.sockets.status("idle", request.raw[0])

    async def _serve(self, request: Request) -> None:
        msg_type = request.msg_type
        if request.aborted:
            self._reply(request, {"status": "aborted"}, {"status": "aborted"})
        elif msg_type == "kernel_info_request":
            self._reply(request, self._kernel_info())
        elif msg_type == "connect_request":
            names = ("shell", "iopub", "stdin", "control", "hb")
            ports = {f"{name}_port": self.sockets.info[f"{name}_port"] for name in names}
            self._reply(request, {"status": "ok", **ports})
        elif msg_type in local.WITHOUT_GUEST and not await self._guest_soon():
            self._reply(request, local.without_guest(msg_type, request.content))
        else:
            try:
                await self._serve_by_guest(request)
            except InterruptedWait:
                self._fail(request, local.interrupted())

    async def _guest_soon(self) -> bool:
        """Whether there is a guest, or one within the patience of an editor."""
        if self.supply.failed:
            return False
        with contextlib.suppress(TimeoutError, VmError):
            async with asyncio.timeout(PATIENCE):
                await self.supply.guest(None)
            return True
        return False

    async def _serve_by_guest(self, request: Request) -> None:
        self._interrupted = False
        visible = request.msg_type == _EXECUTE and not request.content.get("silent")
        while True:
            guest = await self._wait_for_guest(request, visible)
            if self._interrupting is not None:
                # An interrupt meant for the cell before must not hit this one.
                await asyncio.wait([self._interrupting])
            if self._interrupted:  # between the guest's coming and the request's going
                raise InterruptedWait
            if guest.vm.kernel.connected:
                break  # else it died in this very instant: the next one serves
        trace.mark("first request for the guest")
        if visible:
            self._tell_news(request)
        self._done = asyncio.get_running_loop().create_future()
        header, _, metadata, content = request.raw
        guest.send(
            messages.ToGuest(
                "shell",
                request.msg_id,
                request.msg_type,
                msgspec.Raw(header),
                msgspec.Raw(metadata),
                msgspec.Raw(content),
            ),
            request.buffers,
        )
        await self._done
        if not self._replied and request.msg_type not in NO_REPLY:
            # Nobody may be left waiting, whatever the guest forgot or cannot do.
            error = local.error_content(
                "NotImplementedError", f"the guest kernel gave no answer to {request.msg_type}", []
            )
            self._reply(request, {**error, "status": "error"}, {"status": "error"})

    async def _wait_for_guest(self, request: Request, visible: bool) -> Guest:
        """The guest, however long it takes to come.  Raises VmError, InterruptedWait."""
        with Notice(self.sockets, request.raw[0], visible) as notice:
            self._waiting = asyncio.ensure_future(self.supply.guest(notice.show))
            try:
                return await self._waiting
            except asyncio.CancelledError:
                if self._exit.done():
                    raise  # it is us who are cancelled: shutdown
                raise InterruptedWait from None
            finally:
                self._waiting = None

    def _tell_news(self, request: Request) -> None:
        """Say in the cell's output what happened to the VM since the last cell."""
        for line in self._news:
            content = {"name": "stderr", "text": f"vmkernel: {line}\n"}
            self.sockets.publish("stream", content, request.raw[0])
        self._news.clear()

    def _remember(self, request: Request) -> None:
        self._parents[request.msg_id] = request.raw[0]
        if len(self._parents) > KNOWN_PARENTS:
            self._parents.popitem(last=False)

    def _reply(self, request: Request, content: Any, metadata: Any = None) -> None:
        self._replied = True
        if request.msg_type not in NO_REPLY:
            msg_type = request.msg_type.removesuffix("_request") + "_reply"
            self.sockets.reply(request, msg_type, content, metadata)

    def _fail(self, request: Request, error: dict[str, Any]) -> None:
        """End a request with an error of our own, and abort what is queued behind it."""
        if request.msg_type == _EXECUTE:
            self.sockets.publish("error", error, request.raw[0])
            content = {**error, "status": "error", "execution_count": self._execution_count,
                       "user_expressions": {}, "payload": []}  # fmt: skip
        else:
            content = {**error, "status": "error"}
        if not self._replied:
            self._reply(request, content, {"status": "error"})
        self._abort_queued(request)

    def _abort_queued(self, request: Request) -> None:
        """After an error: the execute requests that have arrived by now are not run."""
        content = request.content
        if request.msg_type != _EXECUTE or content.get("silent"):
            return
        if content.get("stop_on_error", True):
            self.sockets.drain("shell")
            for queued in self._queue:
                queued.aborted = queued.msg_type == _EXECUTE

    def _kernel_info(self) -> dict[str, Any]:
        supply = self.supply
        return local.kernel_info(supply.guest_info(), supply.python_version(), supply.facts())

    # --- control ---

    async def _control(self, request: Request) -> None:
        self.sockets.status("busy", request.raw[0])
        try:
            await self._answer_control(request)
        except Exception as error:  # nobody may be left waiting
            log.exception("%s failed", request.msg_type)
            content = local.error_content(type(error).__name__, str(error), [])
            self._reply_control(request, {**content, "status": "error"})
        self.sockets.status("idle", request.raw[0])
        if request.msg_type == "shutdown_request":
            self.stop()

    async def _answer_control(self, request: Request) -> None:
        msg_type = request.msg_type
        if msg_type == "interrupt_request":  # done already, by on_request
            self._reply_control(request, {"status": "ok"})
        elif msg_type == "shutdown_request":
            content = {"status": "ok", "restart": bool(request.content.get("restart"))}
            self._reply_control(request, content)
            self.sockets.publish("shutdown_reply", content, request.raw[0])
        elif msg_type == "kernel_info_request":
            self._reply_control(request, self._kernel_info())
        elif msg_type == "usage_request":
            self._reply_control(request, await self.supply.usage())
        else:
            error = local.error_content(
                "NotImplementedError", f"this kernel does not know {msg_type}", []
            )
            self._reply_control(request, {**error, "status": "error"})

    def _reply_control(self, request: Request, content: Any) -> None:
        msg_type = request.msg_type.removesuffix("_request") + "_reply"
        self.sockets.reply(request, msg_type, content)

    def interrupt(self) -> None:
        """Interrupt what is running or waited for: from a message, or from SIGINT."""
        if self._waiting is not None and self._waiting.cancel():
            return
        if self._done is None or self._done.done():
            self._interrupted = True
        elif self._interrupting is None:
            self._interrupting = self._spawn(self._interrupt_guest())

    async def _interrupt_guest(self) -> None:
        try:
            guest = self.supply.current
            if guest is not None:
                await guest.interrupt()
        except VmError as error:
            log.warning("the interrupt failed: %s", error)
        finally:
            self._interrupting = None

    # --- stdin ---

    def _on_input_reply(self, request: Request) -> None:
        guest = self.supply.current
        if not self._asked or guest is None or request.msg_type != "input_reply":
            return  # an answer to a question that is no longer asked
        self._asked = False
        header, _, metadata, content = request.raw
        with contextlib.suppress(VmError):
            guest.send(
                messages.ToGuest(
                    "stdin",
                    request.msg_id,
                    "input_reply",
                    msgspec.Raw(header),
                    msgspec.Raw(metadata),
                    msgspec.Raw(content),
                )
            )

    # --- from the guest ---

    def on_output(self, message: messages.FromGuest, buffers: Sequence[memoryview]) -> None:
        """The guest kernel sent a message."""
        if message.channel == "iopub":
            self._on_iopub(message, buffers)
            return
        request = self._current
        if request is None or message.parent_id != request.msg_id:
            self._odd("the guest answered what was not asked", message)
        elif message.channel == "stdin" and message.msg_type == "input_request":
            self.sockets.reply(request, "input_request", message.content, channel="stdin")
            self._asked = True
        elif (
            message.channel == "shell"
            and not self._replied
            and message.msg_type == request.msg_type.removesuffix("_request") + "_reply"
        ):
            self._on_reply(request, message, buffers)
        else:
            self._odd("the guest's answer is none to what was asked", message)

    def _on_reply(
        self, request: Request, message: messages.FromGuest, buffers: Sequence[memoryview]
    ) -> None:
        self._replied = True
        content = message.content
        if request.msg_type == _EXECUTE:
            count = content.get("execution_count")
            if isinstance(count, int):
                self._execution_count = count
            payload = content.get("payload")
            if isinstance(payload, list) and any(
                isinstance(item, dict)
                and item.get("source") == "ask_exit"
                and not item.get("keepkernel")
                for item in payload
            ):
                self._exit_asked = True
        self.sockets.reply(request, message.msg_type, content, message.metadata, buffers)
        if content.get("status") == "error":
            self._abort_queued(request)

    def _on_iopub(self, message: messages.FromGuest, buffers: Sequence[memoryview]) -> None:
        if message.msg_type == "status":
            done, current = self._done, self._current
            if done is None or done.done() or current is None:
                return
            if message.parent_id == current.msg_id:
                done.set_result(None)
        elif message.msg_type in IOPUB_TYPES:
            parent = self._parents.get(message.parent_id, b"{}")
            self.sockets.publish(
                message.msg_type, message.content, parent, message.metadata, buffers
            )
            if self.sockets.congested:
                self.supply.pause(until=self.sockets.when_clear)
        else:
            self._odd("the guest may not publish this", message)

    def _odd(self, what: str, message: messages.FromGuest) -> None:
        """Log a message that no correct guest sends; a flood of them ends in silence."""
        self._oddities += 1
        if self._oddities <= MOST_ODDITIES:
            log.warning("%s: %r on %s", what, message.msg_type, message.channel)

    def on_kernel_death(self, death: KernelDeath) -> None:
        """The guest kernel ended; the VM and its files are still there."""
        if self._done is not None and not self._done.done():
            error = VmGuestError(
                f"{death.reason}. The variables are lost; the VM's files are still there. "
                "The next cell runs in a new guest kernel",
                hint=death.hint,
                code_ran="unknown",
            )
            if death.output.strip():
                error.message += f"\nIts last words:\n{death.output.strip()}"
            self._done.set_exception(error)
        elif not self._exit_asked:
            self._news.append(
                f"{death.reason} while no cell ran; this cell runs in a new guest kernel, "
                "variables are lost, files are still there"
            )
        if death.asked_for and self._exit_asked:
            self.stop()  # exit(): a kernel that ends is what was wanted
        else:
            self.supply.kernel_died()

    def on_vm_end(self, error: VmError) -> None:
        """The VM ended by itself."""
        lost = "The VM died and its state is lost: variables and files."
        if self._done is not None and not self._done.done():
            failure = VmGuestError(
                f"{lost} {error.message}",
                hint=f"run the cell again: it gets a new VM. {error.hint}",
                log_path=error.log_path,
                code_ran="unknown",
            )
            self._done.set_exception(failure)
            self._news.append("this cell runs in a new VM; the old one's state is lost")
        else:
            log.error("the VM ended while no cell ran: %s", error.explain())
            self._news.append(f"{lost} This cell runs in a new VM. ({error.message})")
