"""One client of a runner: what it asks for, and what it is answered.

Where it stands: the requests of ``host.wire``, served for ``host.runner``.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from vmkernel.errors import (
    ProtocolError,
    VmError,
    VmExpiredError,
    VmGuestError,
    VmTimeoutError,
)
from vmkernel.host import localsocket, wire
from vmkernel.protocol import frames, messages
from vmkernel.vm.ports import Port

if TYPE_CHECKING:
    from vmkernel.host.runner import Runner

_OURS = (messages.Wake, messages.SetClock, messages.Interrupt, messages.StartKernel)
"""The agent's commands that no client may give it by `wire.Ask`: they are the runner's."""


class RunnerClient:
    """One connection: the starter's, or one by the control socket."""

    def __init__(self, runner: Runner, *, is_owner: bool = False) -> None:
        self.port = Port("client", self._on_message, self._on_lost)
        self.port.on_congested = lambda congested: runner.hold_output(self, congested)
        self._runner = runner
        self._is_owner = is_owner
        self._known = is_owner
        self._runs: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        runner.clients.add(self)

    def send(self, number: int, event: wire.Event, buffers: Sequence[frames.Piece] = ()) -> None:
        """Tell it something, if it is still there."""
        if not self.port.connected:
            return
        try:
            self.port.send(wire.encode(wire.FromRunner(number, event)), buffers)
        except ProtocolError as error:  # an output at the limit, and what we put around it
            if not isinstance(event, wire.Output):
                raise
            text = f"vmkernel: {event.msg_type} was left out: {error.message}\n"
            self.send(number, wire.Output("stream", {"name": "stderr", "text": text}, {}))

    def leave(self) -> None:
        """As if it had hung up, which it cannot any more: its process is dead."""
        if self in self._runner.clients:
            self._on_lost(None)

    def _on_lost(self, error: ProtocolError | None) -> None:
        self._runner.clients.discard(self)
        self._runner.hold_output(self, False)
        for task in list(self._runs.values()):
            task.cancel()  # nobody waits for what it runs
        if self._is_owner:
            self._runner.owner_left()
        self.port.close()

    def _on_message(self, body: memoryview, buffers: list[memoryview]) -> None:
        if not self._known:
            self._check_peer()
        request = messages.decode(body, wire.Request)
        call = request.call
        if isinstance(call, wire.Stop):
            self._runner.stop(call.why, asked_by=(self, request.id))
        elif isinstance(call, wire.Interrupt) and call.run is not None:
            run = self._runs.get(call.run)
            if run is not None:
                run.cancel()
            self.send(request.id, wire.Reply())
        else:
            task = asyncio.ensure_future(self._serve(request.id, call, buffers))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if isinstance(call, wire.Run):
                self._runs[request.id] = task
                task.add_done_callback(lambda task: self._on_run_over(request.id, task))

    def _on_run_over(self, number: int, task: asyncio.Task[None]) -> None:
        del self._runs[number]
        if task.cancelled():  # perhaps before its first step, so that it could say nothing itself
            failure = wire.Failure("VmError", "the run was cancelled", code_ran="unknown")
            self.send(number, wire.Reply(failure))

    def _check_peer(self) -> None:
        """The directory lets nobody else in; this is the second lock.  Raises ProtocolError."""
        localsocket.check_peer(self.port.socket)
        self._known = True

    async def _serve(self, number: int, call: wire.Call, buffers: list[memoryview]) -> None:
        try:
            await self._perform(number, call, buffers)
        except VmTimeoutError as error:
            # First the VM ends, then the news: so that what the error says is true
            self._runner.stop(error.message, error, asked_by=(self, number))
        except VmError as error:
            # What breaks off as the VM ends does so for the reason why it ends
            ending = self._runner.ending
            if ending is not None and (
                error.code_ran != "no" or isinstance(ending, VmExpiredError)
            ):
                error = wire.once_more(ending, error.code_ran)
            self.send(number, wire.Reply(wire.Failure.of(error)))
        except Exception as error:
            traceback.print_exc()  # into the runner's log
            failure = wire.Failure("VmError", f"the runner failed: {error!r}", code_ran="unknown")
            self.send(number, wire.Reply(failure))

    async def _perform(self, number: int, call: wire.Call, buffers: Sequence[memoryview]) -> None:
        """Do what was asked for, and answer.  Raises VmError."""
        runner = self._runner
        if runner.guest is None:
            raise VmGuestError(f"{runner.vm_id} is not up yet", hint="wait for its start")
        match call:
            case wire.Run():
                end = await runner.executor.run(
                    call.code,
                    lambda event: self.send(number, event),
                    timeout=call.timeout,
                    env=call.env,
                    allow_stdin=call.allow_stdin,
                )
                self.send(number, wire.Reply(result=msgspec.to_builtins(end)))
            case wire.Answer():
                runner.executor.answer(call.question, call.value)
                self.send(number, wire.Reply())
            case wire.Interrupt():
                await runner.executor.interrupt(kill=call.kill, question=call.question)
                self.send(number, wire.Reply())
            case wire.Ask():
                if isinstance(call.command, _OURS):
                    raise VmGuestError("that command is the runner's own")
                agent = runner.guest.vm.agent
                is_work = isinstance(call.command, messages.FileCommand)
                with runner.executor.working() if is_work else contextlib.nullcontext():
                    result, received = await agent.exchange(call.command, buffers, call.timeout)
                self.send(number, wire.Reply(result=result), received)
            case _:
                raise VmGuestError(f"a runner does not do {type(call).__name__} twice")
