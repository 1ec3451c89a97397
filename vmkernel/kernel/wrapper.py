"""One kernel's life: requests in, a guest to serve them, answers out.

Requests to the main shell and to each subshell go through lanes (``kernel.lane``); what the control
channel asks is answered here at once, or passed to the guest's control thread.  The guest's
messages are matched to the request they name, given a fresh header and that request's own parent
header, and published.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel.errors import VmError, VmExpiredError, VmGuestError
from vmkernel.host import contents
from vmkernel.kernel import local
from vmkernel.kernel.asking import Asking
from vmkernel.kernel.door import Door
from vmkernel.kernel.history import History
from vmkernel.kernel.lane import EXECUTE, Exchange, Lane
from vmkernel.kernel.policy import Outputs
from vmkernel.kernel.questions import Questions
from vmkernel.kernel.sockets import Request, Sockets
from vmkernel.kernel.supply import GuestSupply
from vmkernel.protocol import messages
from vmkernel.protocol.messages import COMM_TYPES
from vmkernel.vm import pace

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest, KernelDeath
    from vmkernel.host.start import Label, Started
    from vmkernel.settings import Settings

log = logging.getLogger("vmkernel")

KNOWN_PARENTS = 4096
"""How many finished requests a late output (a thread, a comm) may still name."""
KNOWN_COMMS = 4096
"""How many comms' subshells are known: an answer goes where the comm was used last."""
MOST_SUBSHELLS = 256
DEAF = 10.0
"""Seconds after which a cell that was interrupted and still runs is said to ignore it."""
PATIENCE = 1.0
"""Seconds that a request which the host can answer waits for a guest that does not react."""
QUIET_AFTER = 2.0
"""Seconds after which a kernel may do what is of no use to itself."""
PREPARE_AFTER = 0.02
"""Seconds after which the front end's first questions are mostly answered."""
MOST_NEWS = 8
"""How many things that happened between two cells are told."""
MOST_QUESTIONS = 64
"""How many questions of a guest are being answered at once."""
MOST_DEATHS = 5
"""How many guest kernels of one VM may die without having been asked to run anything."""

# What a guest may publish.  ``status`` is the end of a request, and published by us.
IOPUB_TYPES = frozenset(
    "stream display_data update_display_data execute_input execute_result error clear_output "
    "comm_open comm_msg comm_close debug_event".split()
)
# Control requests that we can answer: they wait for no other, which may wait for a guest.
OURS = frozenset(
    "interrupt_request shutdown_request usage_request kernel_info_request connect_request "
    "history_request".split()
)


class Wrapper:
    """The kernel as a front end sees it.  ``await run()`` returns the exit status."""

    def __init__(
        self,
        settings: Settings,
        sockets: Sockets,
        label: Label,
        history: History,
        begun: Started | None,
        failure: VmError | None = None,
    ) -> None:
        self.sockets = sockets
        self.supply = GuestSupply(settings, label, begun, self, failure)
        self.history = history
        self.execution_count = 0
        self._outputs = Outputs(settings.outputs)
        self._main = Lane(self, self._on_lane_failure)
        self._subshells: dict[str, Lane] = {}
        self._with_guest: dict[str, Exchange] = {}
        self._parents: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        """Header and subshell id of requests that went to the guest, by msg_id"""
        self._comms: OrderedDict[str, str] = OrderedDict()
        self._meanwhile: OrderedDict[str, bytes] = OrderedDict()
        """Headers of comm messages sent beside a cell, of whose end nothing was said yet"""
        self._asking = Asking(sockets, lambda: any(e.unanswered for e in self._with_guest.values()))
        self._questions = Questions(self.supply, settings, sockets, self._asking)
        self._door = Door(settings, self.supply)
        self._one_control = asyncio.Lock()
        self._interrupting: asyncio.Task[None] | None = None
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exit_asked = False
        self._news: deque[str] = deque(maxlen=MOST_NEWS)
        self._spared: Request | None = None
        """What an interrupt was not meant for, as it had been sent before"""
        self._deaths = 0
        """Guest kernels that died since a cell was sent"""
        self._questions_open = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.on_restart: Callable[[], object] | None = None
        """Called when the front end is about to start this kernel anew"""
        self.on_quiet: Callable[[], object] | None = None
        """Called once, when the kernel has served and has nothing to do"""
        self.on_idle_death: Callable[[VmError], object] | None = None
        """Hears of the end of VM or guest kernel in the wrapper's place"""

    # --- life ---

    async def run(self) -> int:
        """Serve until shutdown; everything is released when this returns."""
        self.sockets.status("starting")
        self.supply.start_early()
        # The guest takes longer to come than this does, on a processor of its own
        loop = asyncio.get_running_loop()
        loop.call_later(PREPARE_AFTER, self.prepare)
        loop.call_later(QUIET_AFTER, self._look_for_quiet)
        try:
            return await self._exit
        finally:
            await self.close()

    async def close(self) -> None:
        """Release everything; also of one that never ran."""
        for lane in (self._main, *self._subshells.values()):
            lane.close()
        self._door.close()
        await asyncio.gather(self.supply.close(), self.history.close())
        self.supply.oddities.log_total()

    def prepare(self) -> None:
        """Import what outputs need, before the first one comes."""
        self._outputs.prepare()

    def _look_for_quiet(self) -> None:
        if self.on_quiet is None:
            return
        if self.supply.current is None or self._main.open is not None:
            asyncio.get_running_loop().call_later(QUIET_AFTER, self._look_for_quiet)
        else:
            self.on_quiet()

    def stop(self, status: int = 0) -> None:
        """End the kernel with this exit status."""
        if not self._exit.done():
            self._exit.set_result(status)

    def _on_lane_failure(self, error: BaseException) -> None:
        log.critical("the kernel's request loop failed", exc_info=error)
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
                self.interrupt(request)  # at once: it is meant for what runs now
            self._spawn(self._control(request))
        else:
            self._to_lane(request)

    def _to_lane(self, request: Request) -> None:
        subshell_id = request.subshell_id
        if request.msg_type in COMM_TYPES:
            self._outputs.heard(request.msg_type, request.content)
            subshell_id = self._comms.get(str(request.content.get("comm_id")), subshell_id)
        if not subshell_id:
            self._main.add(request)
        elif subshell_id in self._subshells:
            self._subshells[subshell_id].add(request)
        else:
            self.sockets.status("busy", request.raw[0])
            error = local.unknown_subshell(subshell_id)
            self.reply(request, error, {"status": "error"})
            self.sockets.status("idle", request.raw[0])

    async def answer(self, request: Request) -> dict[str, Any] | None:
        """The reply to a shell request that needs no guest, None when it does."""
        if request.msg_type == "kernel_info_request":
            return self._kernel_info()
        if request.msg_type == "connect_request":
            names = ("shell", "iopub", "stdin", "control", "hb")
            ports = {f"{name}_port": self.sockets.info[f"{name}_port"] for name in names}
            return {"status": "ok", **ports}
        if request.msg_type == "history_request" and self.history.on:
            return await self.history.query(request.content)
        return None

    async def before_execution(self, guest: Guest, request: Request, visible: bool) -> None:
        """What must be over, or told, before a request goes to the guest."""
        self._door.open_soon(guest)
        if self._interrupting is not None:
            # An interrupt meant for the cell before must not hit this one.
            await asyncio.wait([self._interrupting])
        if visible and guest.vm.kernel.connected:
            for line in self._news:
                self.sockets.stderr(f"vmkernel: {line}\n", request.raw[0])
            self._news.clear()

    def send(
        self, guest: Guest, request: Request, lane: Lane | None, *, meanwhile: bool = False
    ) -> Exchange:
        """Send a request to the guest, and remember it until the guest says idle.

        ``meanwhile``: a comm message beside the cell that runs, of which the guest says no idle
        unless the cell ended first.
        """
        if request.msg_id in self._with_guest:
            raise VmError(
                f"a request with the id {request.msg_id!r} is being served already",
                hint="every message needs an id of its own (messaging spec, msg_id)",
            )
        self._parents[request.msg_id] = (request.raw[0], request.subshell_id)
        if len(self._parents) > KNOWN_PARENTS:
            self._parents.popitem(last=False)
        exchange = Exchange(request, lane)
        header, _, metadata, content = request.raw
        if lane is not None and lane.subshell_id and lane.subshell_id != request.subshell_id:
            # A comm message goes where its comm was used last; the guest has that of the header
            header = messages.encode_json({**request.header, "subshell_id": lane.subshell_id})
        guest.send(
            messages.ToGuest(
                "control" if request.channel == "control" else "shell",
                request.msg_id,
                request.msg_type,
                msgspec.Raw(header),
                msgspec.Raw(metadata),
                msgspec.Raw(content),
            ),
            request.buffers,
            while_busy=lane is not self._main,
        )
        if request.msg_type == EXECUTE:
            self._deaths = 0
        if not meanwhile:
            self._with_guest[request.msg_id] = exchange
            self.supply.note_work(True)
        else:
            self._meanwhile[request.msg_id] = request.raw[0]
            if len(self._meanwhile) > KNOWN_COMMS:
                self._meanwhile.popitem(last=False)
        return exchange

    def _forget(self, msg_id: str) -> None:
        """A request is not with the guest any more."""
        self._with_guest.pop(msg_id, None)
        self.supply.note_work(bool(self._with_guest))

    def reply(self, request: Request, content: Any, metadata: Any = None) -> None:
        """Send the reply to a request."""
        msg_type = request.msg_type.removesuffix("_request") + "_reply"
        self.sockets.reply(request, msg_type, content, metadata)

    def _kernel_info(self) -> dict[str, Any]:
        supply = self.supply
        return local.kernel_info(supply.guest_info(), supply.manifest(), supply.facts())

    # --- control ---

    async def _control(self, request: Request) -> None:
        if request.msg_type in OURS:
            await self._serve_control(request)
        else:
            async with self._one_control:  # one at a time, as ipykernel has it
                await self._serve_control(request)

    async def _serve_control(self, request: Request) -> None:
        self.sockets.status("busy", request.raw[0])
        try:
            await self._answer_control(request)
        except VmError as error:
            self.reply(request, {**local.explain(error), "status": "error"})
        except Exception as error:  # nobody may be left waiting
            log.exception("%s failed", request.msg_type)
            content = local.error_content(type(error).__name__, str(error), [])
            self.reply(request, {**content, "status": "error"})
        self.sockets.status("idle", request.raw[0])
        if request.msg_type == "shutdown_request":
            self.stop()

    async def _answer_control(self, request: Request) -> None:
        msg_type = request.msg_type
        if msg_type == "interrupt_request":  # done already, by on_request
            self.reply(request, {"status": "ok"})
        elif msg_type == "shutdown_request":
            content = {"status": "ok", "restart": bool(request.content.get("restart"))}
            if content["restart"] and self.on_restart is not None:
                self.on_restart()
            self.reply(request, content)
            self.sockets.publish("shutdown_reply", content, request.raw[0])
        elif msg_type == "usage_request":
            self.reply(request, await self.supply.usage())
        elif (own := await self.answer(request)) is not None:
            await self._reply_ourselves(request, own)
        elif msg_type == "create_subshell_request" and len(self._subshells) >= MOST_SUBSHELLS:
            raise VmError(
                f"this kernel has {MOST_SUBSHELLS} subshells already",
                hint="delete those that are not used any more (delete_subshell_request)",
            )
        else:  # the debugger, subshells: the guest's control thread
            guest = await self.supply.guest(None)
            exchange = self.send(guest, request, None)
            await exchange.done
            if not exchange.replied:
                why = f"this kernel does not know {msg_type} on control"
                error = local.error_content("NotImplementedError", why, [])
                self.reply(request, {**error, "status": "error"})

    async def _reply_ourselves(self, request: Request, content: dict[str, Any]) -> None:
        """Answer a control request; a guest that is there sees it first: code can ask for it."""
        guest = self.supply.current
        exchange: Exchange | None = None
        if guest is not None and request.msg_id not in self._with_guest:
            with contextlib.suppress(VmError, TimeoutError):
                exchange = self.send(guest, request, None)
                exchange.own = content
                async with asyncio.timeout(PATIENCE):
                    await exchange.done
            self._forget(request.msg_id)
        if exchange is None or not exchange.replied:
            self.reply(request, content)

    def interrupt(self, asked: Request | None = None) -> None:
        """Interrupt what is running or waited for: from a message, or from SIGINT (None)."""
        running = self._main.request
        if (
            asked is not None
            and running not in (None, self._spared)
            and asked.was_sent_before(running)
        ):
            self._spared = running  # once: who interrupts again means it
            return  # it came by another socket, and later than what was sent after it
        if not self._main.interrupt() and self._interrupting is None:
            self._interrupting = self._spawn(self._interrupt_guest())

    async def _interrupt_guest(self) -> None:
        guest, exchange = self.supply.current, self._main.exchange
        try:
            if exchange is not None:
                await exchange.can_be_interrupted()
                if exchange.done.done():
                    return
                exchange.interrupted = True
                self._questions.interrupt(exchange)
            if guest is not None:
                await guest.interrupt(kill=exchange is not None and exchange.warned)
                if exchange is not None and not exchange.done.done():
                    asyncio.get_running_loop().call_later(DEAF, self._offer_more, exchange)
        except VmError as error:
            log.warning("the interrupt failed: %s", error)
            if exchange is not None and exchange is self._main.open:
                reason = local.explain(error)["evalue"]  # without what a terminal obeys
                text = f"\nvmkernel: the interrupt was not heard: {reason}. Restart the kernel if "
                self.sockets.stderr(f"{text}this lasts.\n", exchange.request.raw[0])
        finally:
            self._interrupting = None

    def _offer_more(self, exchange: Exchange) -> None:
        """Tell who interrupted a cell in vain what else there is."""
        if exchange.warned or exchange is not self._main.open:
            return
        exchange.warned = True
        text = (
            f"\nvmkernel: the cell still runs {DEAF:g} s after the interrupt. Interrupt it once "
            "more to end the guest kernel: its variables are lost then, the VM's files stay.\n"
        )
        self.sockets.stderr(text, exchange.request.raw[0])

    # --- stdin ---

    def _on_input_reply(self, request: Request) -> None:
        if self._asking.heard(request):
            return
        guest = self.supply.current
        if seen := [exchange for exchange in self._with_guest.values() if exchange.unanswered]:
            seen[-1].unanswered -= 1
        asking = [exchange for exchange in self._with_guest.values() if exchange.asked]
        if not asking or guest is None or request.msg_type != "input_reply":
            return  # an answer to a question that is no longer asked
        # Its parent is the question, whose own parent asked; some clients name none.
        parent_id = request.parent_id
        if parent_id:
            asking = [exchange for exchange in asking if exchange.question == parent_id]
            if not asking:
                return
        exchange = asking[-1]
        exchange.asked = False
        header, _, metadata, content = request.raw
        with contextlib.suppress(VmError):
            guest.send(
                messages.ToGuest(
                    "stdin",
                    exchange.request.msg_id,
                    "input_reply",
                    msgspec.Raw(header),
                    msgspec.Raw(metadata),
                    msgspec.Raw(content),
                ),
                while_busy=exchange.lane is not self._main,
            )

    # --- from the guest ---

    def on_output(self, message: messages.FromGuest, buffers: Sequence[memoryview]) -> bool:
        """The guest kernel sent a message; returns whether nobody waits for such a one now."""
        exchange = self._with_guest.get(message.parent_id)
        if message.channel == "iopub":
            self._on_iopub(message, buffers, exchange)
        elif message.channel == "vm":
            self._on_vm_message(message, exchange)
        elif exchange is None:
            self._odd("answers to what was not asked", message)
        elif message.channel == "stdin" and message.msg_type == "input_request":
            self._on_question(exchange, message)
        elif (
            message.channel == exchange.request.channel
            and not exchange.replied
            and message.msg_type == exchange.request.msg_type.removesuffix("_request") + "_reply"
            and contents.fits(message.msg_type, message.content)
        ):
            self._on_reply(exchange, message, buffers)
        else:
            self._odd("answers that are none to what was asked", message)
        if self.sockets.congested:
            self.supply.pause(until=self.sockets.when_clear)
        return exchange is None or message.channel == "vm"

    def _on_question(self, exchange: Exchange, message: messages.FromGuest) -> None:
        """The code wants something of a person."""
        request = exchange.request
        if request.msg_type == EXECUTE and request.content.get("allow_stdin") is False:
            self._odd("questions where none are allowed", message)
            return
        if self._asking.hold(lambda: self._on_question(exchange, message)):
            return  # an answer is meant for one of us
        if exchange.done.done():
            return
        if exchange.asked:  # after an interrupt it may ask again; nobody can answer a flood
            self.supply.charge(pace.QUESTION)
        question = self._outputs.prompt(contents.question(message.content))
        exchange.question = self.sockets.reply(request, "input_request", question, channel="stdin")
        exchange.asked = True
        exchange.unanswered += 1

    def _on_reply(
        self, exchange: Exchange, message: messages.FromGuest, buffers: Sequence[memoryview]
    ) -> None:
        exchange.replied = True
        request = exchange.request
        content, metadata, buffers = self._outputs.reply(
            message.msg_type, (message.content, message.metadata, buffers), request.msg_id
        )
        self._tell_removed(request.raw[0])
        if request.msg_type == EXECUTE:
            count = contents.count_in(content)
            self.execution_count = self.execution_count if count is None else count
            self._exit_asked = self._exit_asked or contents.asks_exit(content)
        elif request.msg_type == "create_subshell_request":
            self._add_subshell(content)
        elif request.msg_type == "delete_subshell_request" and content.get("status") == "ok":
            lane = self._subshells.pop(str(request.content.get("subshell_id")), None)
            if lane is not None:
                if lane.exchange is not None:
                    # The guest's subshell ends in the midst of what awaits something
                    self._forget(lane.exchange.request.msg_id)
                lane.retire()
        if exchange.own is not None:
            content = exchange.own
        if "started" in metadata:
            # As all dates, of the host's clock: front ends subtract it from the reply's
            metadata = {**metadata, "started": exchange.started}
        self.sockets.reply(request, message.msg_type, content, metadata, buffers)
        if content.get("status") == "error" and exchange.lane is not None:
            exchange.lane.abort_queued(request)

    def _add_subshell(self, content: dict[str, Any]) -> None:
        subshell_id = content.get("subshell_id")
        if isinstance(subshell_id, str) and subshell_id and subshell_id not in self._subshells:
            self._subshells[subshell_id] = Lane(self, self._on_lane_failure, subshell_id)

    def _on_iopub(
        self,
        message: messages.FromGuest,
        buffers: Sequence[memoryview],
        exchange: Exchange | None,
    ) -> None:
        msg_type, content = message.msg_type, message.content
        parent = self._parents.get(message.parent_id)
        if msg_type == "status":
            self._on_status(message, exchange)
        elif msg_type not in IOPUB_TYPES:
            self._odd("messages that a guest may not publish", message)
        elif parent is None and message.parent_id:
            self._odd("outputs of what was not asked", message)
        elif not contents.fits(msg_type, content):
            self._odd("outputs that lack what they must contain", message)
        elif msg_type == "execute_input" and (
            exchange is None or exchange.shown or exchange.request.msg_type != EXECUTE
        ):
            self._odd("cells shown that do not begin", message)
        else:
            header = parent[0] if parent is not None else b"{}"
            if msg_type in COMM_TYPES:
                self._note_comm(message, parent)
            passed = self._outputs.iopub(
                msg_type,
                (content, message.metadata, buffers),
                message.parent_id,
                exchange.request.content if exchange is not None else None,
            )
            self._tell_removed(header)
            if parent is not None:
                self._parents.move_to_end(message.parent_id)  # a thread that goes on
            if passed is None:
                return
            content, metadata, buffers = passed
            if msg_type in ("execute_input", "execute_result") and exchange is not None:
                self._note_history(exchange, msg_type, content)
                if msg_type == "execute_input":
                    exchange.shown = True
                    exchange.begun.set()
                    content = {**content, "code": exchange.request.content.get("code", "")}
            self.sockets.publish(msg_type, content, header, metadata, buffers)

    def _on_status(self, message: messages.FromGuest, exchange: Exchange | None) -> None:
        """The guest is done with a request: the end is all that it says of its state."""
        if not contents.is_idle(message.content):
            self._odd("states that are not idle", message)
        elif exchange is not None:
            self._forget(message.parent_id)
            if not exchange.done.done():
                exchange.done.set_result(None)
        elif (header := self._meanwhile.pop(message.parent_id, None)) is not None:
            # It was served after the cell, not beside it: then its status is for all to see
            self.sockets.status("busy", header)
            self.sockets.status("idle", header)

    def _tell_removed(self, header: bytes) -> None:
        """Say what the output policy took out of a message, in the output of its cell."""
        if notice := self._outputs.notice():
            self.sockets.stderr(notice, header)

    def _note_history(
        self, exchange: Exchange, msg_type: str, content: dict[str, Any] | None
    ) -> None:
        """Keep a cell, as the front end sent it, and its result's text.

        ``content`` is the guest's message about it; None when it died before there was one.
        """
        asked = exchange.request.content
        if asked.get("silent") or not asked.get("store_history", True):
            return
        count = None if content is None else content.get("execution_count")
        if content is None or msg_type == "execute_input":
            if not exchange.noted:  # a guest may say it twice
                exchange.noted = True
                self.history.record(count, str(asked.get("code")))
        else:
            data = content.get("data")
            if isinstance(data, dict):
                self.history.output(count, data.get("text/plain"))

    def _note_comm(self, message: messages.FromGuest, parent: tuple[bytes, str] | None) -> None:
        """An answer on a comm belongs to the subshell that used it last (ipykernel 7.4)."""
        if parent is None:
            return
        comm_id = message.content["comm_id"]
        self._comms.pop(comm_id, None)
        if message.msg_type != "comm_close":
            self._comms[comm_id] = parent[1]
            if len(self._comms) > KNOWN_COMMS:
                self._comms.popitem(last=False)

    def _on_vm_message(self, message: messages.FromGuest, exchange: Exchange | None) -> None:
        if message.msg_type == "awaiting":
            if exchange is not None and exchange.lane is not None:
                exchange.awaiting = True
                exchange.lane.send_comms()
        elif message.msg_type != "vm_request":
            self._odd("questions that nobody knows", message)
        elif self._questions_open >= MOST_QUESTIONS:
            self._odd("questions while too many were open", message)
        else:
            self._questions_open += 1
            self._spawn(self._answer_question(message.content, exchange))

    async def _answer_question(self, content: dict[str, Any], exchange: Exchange | None) -> None:
        try:
            await self._questions.answer(content, exchange)
        finally:
            self._questions_open -= 1

    def _odd(self, kind: str, message: messages.FromGuest) -> None:
        """Drop a message that no correct guest sends."""
        self.supply.oddities.note(kind, f"{message.msg_type} on {message.channel}")

    # --- deaths ---

    def on_kernel_death(self, death: KernelDeath) -> None:
        """The guest kernel ended; the VM and its files are still there."""
        if self.on_idle_death is not None:
            self.on_idle_death(VmGuestError(death.reason, hint=death.hint))
            return
        running = self._main.open
        if self._main.exchange is not None and self._main.exchange.warned:
            death.reason = "The guest kernel was ended, as the cell ignored the first interrupt"
            death.hint = "let the cell end when it gets a KeyboardInterrupt"
        error = VmGuestError(
            f"{death.reason}. The variables are lost; the VM's files are still there. "
            "The next cell runs in a new guest kernel",
            hint=death.hint,
            code_ran="unknown",
        )
        if death.output.strip():
            error.message += f"\nIts last words:\n{death.output.strip()}"
        self._fail_exchanges(error)
        if running is None and not self._exit_asked:
            self._news.append(
                f"{death.reason} while no cell ran; this cell runs in a new guest kernel, "
                "variables are lost, files are still there"
            )
        self._deaths += 1
        if death.asked_for and self._exit_asked:
            self.stop()  # exit(): a kernel that ends is what was wanted
        elif self._deaths > MOST_DEATHS:
            self.supply.give_up("guest kernels that nobody used died again and again")
        else:
            self.supply.kernel_died()

    def on_vm_end(self, error: VmError) -> None:
        """The VM ended by itself, or its time was over."""
        if self.on_idle_death is not None:
            self.on_idle_death(error)
            return
        expired = isinstance(error, VmExpiredError)
        lost = "The VM died and its state is lost: variables and files."
        running = self._main.open
        self._fail_exchanges(
            VmGuestError(
                f"{error.message}. Its state is lost: variables and files"
                if expired
                else f"{lost} {error.message}",
                hint=f"run the cell again: it gets a new VM. {error.hint}",
                log_path=error.log_path,
                code_ran="unknown",
            )
        )
        if running is not None:
            self._news.append("this cell runs in a new VM; the old one's state is lost")
        elif expired:
            how = error.message.replace("The VM", "the old one", 1)
            self._news.append(f"this cell runs in a new VM; {how}")
        else:
            log.error("the VM ended while no cell ran: %s", error.explain())
            self._news.append(f"{lost} This cell runs in a new VM. ({error.message})")

    def _fail_exchanges(self, error: VmError) -> None:
        """What was with the guest is lost, and its subshells with it."""
        exchanges, self._with_guest = self._with_guest, {}
        self.supply.note_work(False)
        for exchange in exchanges.values():
            if not exchange.done.done():
                exchange.done.set_exception(error)
                if exchange.request.msg_type == EXECUTE:
                    self._note_history(exchange, "", None)
        lanes, self._subshells = self._subshells, {}
        self._comms.clear()
        self._meanwhile.clear()
        for lane in lanes.values():
            lane.retire()
