"""A VM with a guest kernel in it that is awake: what a request can be sent to.

Where it stands: over ``vm.machine`` (the VM) and the protocol, under the wrapper kernel.  It
knows wake-up, interrupt and the replacement of a dead guest kernel; what the requests mean
is its owner's business.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from vmkernel.errors import ProtocolError, VmError, VmGuestError
from vmkernel.host.waking import wake_request
from vmkernel.protocol import frames, messages
from vmkernel.protocol.bounds import TooMuchError
from vmkernel.vm import pace
from vmkernel.vm.machine import Spawned, Vm
from vmkernel.vm.oddities import Oddities

if TYPE_CHECKING:
    from vmkernel.host.network import Network

LAST_WORDS = 0.01
"""Seconds of silence after which a dead guest kernel has said all."""
LAST_TURNS = 100
"""How many of them are waited for at most: a front end may hold the output up."""

MOST_REASON = 1000
"""Characters of a guest's own reason why it cannot wake up."""

OnOutput = Callable[[messages.FromGuest, Sequence[memoryview]], bool | None]
"""on_output(message, buffers) -> whether nobody waits for it: too many of those are slowed"""


class KernelDeath(msgspec.Struct):
    """How a guest kernel ended while its VM went on."""

    reason: str
    hint: str
    output: str
    exit_code: int
    """Its exit status, or 128 + the signal that killed it, as a shell tells it."""

    @property
    def asked_for(self) -> bool:
        """Whether it ended with status 0, as after ``exit()``."""
        return self.exit_code == 0


class Guest:
    """One VM and its guest kernel, whose environment has ``env`` besides what the image gives it.

    ``on_output(message, buffers)``: an answer or output.  ``on_kernel_death(death)``: the guest
    kernel is gone, the VM is not; see :meth:`restart_kernel`.  ``on_end(error)``: the VM is
    gone.  None of them is called after :meth:`close`.

    A message that is no message, or more than the host can bear, is dropped and counted in
    ``oddities``; so is what comes before the wake-up.
    """

    def __init__(
        self,
        spawned: Spawned,
        env: Mapping[str, str],
        *,
        on_output: OnOutput,
        on_kernel_death: Callable[[KernelDeath], None],
        on_end: Callable[[VmError], None],
        oddities: Oddities | None = None,
        cwd: str = "",
    ) -> None:
        self.oddities = oddities if oddities is not None else Oddities()
        self._account = pace.Account(0.0)
        self.vm = Vm(
            spawned, on_event=self._on_event, on_message=self._on_message, on_end=self._on_vm_end
        )
        self._env = dict(env)
        self.cwd = cwd
        """The workspace, in which guest kernels work; "" for none"""
        self.notice = ""
        """What is to be said in the first cell; once"""
        self._on_output = on_output
        self._on_kernel_death = on_kernel_death
        self._on_end = on_end
        # The request for it lies in the port already (host.waking): the answer may come any time
        self._woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard = False
        """Whether what the guest kernel says is passed on: once it is awake"""
        self._last_cell = ""
        self._ready: asyncio.Future[None] | None = None
        self._death: KernelDeath | None = None
        self._hearing = False
        """Whether a kernel died of which something may still come."""

    def __repr__(self) -> str:
        odd = f" odd={self.oddities.total}" if self.oddities.total else ""
        return f"<Guest {self.vm!r}{odd}>"

    def charge(self, cost: float) -> None:
        """The guest kernel sent what nobody waits for: when that is too much, let it wait."""
        pause = self._account.take(cost, asyncio.get_running_loop().time())
        if pause:
            self.vm.kernel.pause_for(pause)

    async def wake(
        self,
        timeout: float,
        network: Network | None = None,
        show_workspace: Callable[[Guest], Awaitable[None]] | None = None,
    ) -> None:
        """Make a fresh clone different from its twins, machine and guest kernel at once.

        And give it its network.  Nothing else may be sent before this returned.  Raises
        VmGuestError.
        """
        waking = self.vm.wake(self.vm.machine.vm_id, timeout)
        if self.cwd and show_workspace is not None:
            await asyncio.gather(waking, show_workspace(self))  # sent one after the other
        else:
            await waking
        if network is not None:
            await network.open(self.vm.agent)
        await self._kernel_woken(timeout)

    async def _kernel_woken(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._woken)  # while it is not done, nothing gets through
        except TimeoutError as error:
            raise await self.vm.failed(
                f"The guest kernel did not wake up within {timeout:g} s", VmGuestError
            ) from error
        if self._death is not None:  # after its answer, and before we came to read it
            raise VmGuestError(self._death.reason, hint=self._death.hint)

    def send(
        self,
        request: messages.ToGuest,
        buffers: Sequence[frames.Piece] = (),
        *,
        while_busy: bool = False,
    ) -> None:
        """Send a request to the guest kernel; ``while_busy`` so that it is heard during a cell.

        Raises VmGuestError when the VM has ended.
        """
        if request.msg_type == "execute_request":
            self._last_cell = request.msg_id
            if self.notice:
                notice, self.notice = self.notice, ""
                self.tell(notice)
        port = self.vm.control if while_busy else self.vm.kernel
        port.send(messages.encode_json(request), buffers)

    def tell(self, text: str) -> None:
        """Say something, on standard error, in the cell that runs or ran last."""
        if self._last_cell and self._heard and self.vm.running:
            content = {"name": "stderr", "text": text}
            self._on_output(messages.FromGuest("iopub", "stream", self._last_cell, {}, content), [])

    async def interrupt(self, *, kill: bool = False) -> None:
        """SIGINT to the guest kernel and its children, or SIGKILL.  Raises VmGuestError."""
        await self.vm.agent.call(messages.Interrupt(kill))

    async def restart_kernel(self, timeout: float) -> None:
        """Put a new guest kernel in the place of one that died; the VM's files stay.

        Raises VmGuestError.
        """
        marker = os.urandom(frames.MARKER_SIZE)
        self._woken = asyncio.get_running_loop().create_future()
        self._ready = asyncio.get_running_loop().create_future()
        self._death = None
        self._heard = False
        self.vm.kernel.resync(marker)
        self.vm.control.resync(marker)
        await self.vm.agent.call(messages.StartKernel(marker))
        try:
            async with asyncio.timeout(timeout):
                await self._ready
        except TimeoutError as error:
            raise VmGuestError(
                f"a new guest kernel was not ready within {timeout:g} s",
                hint="restart the kernel",
            ) from error
        self.send(wake_request(self._env, self.cwd))
        await self._kernel_woken(timeout)

    async def set_environment(self, env: Mapping[str, str], timeout: float) -> None:
        """Add to the environment of a guest kernel that is awake and has nothing to do.

        Raises VmGuestError, also when this kind of kernel takes an environment only at its start.
        """
        self._env.update(env)
        self._woken = asyncio.get_running_loop().create_future()
        self.send(wake_request(self._env, self.cwd))
        await self._kernel_woken(timeout)

    async def close(self) -> None:
        """End the VM."""
        self._fail(VmGuestError("the VM was shut down", hint="start a new kernel"))
        await self.vm.close()

    # --- from the VM ---

    def _on_message(self, body: memoryview, buffers: list[memoryview]) -> None:
        try:
            message = messages.decode_from_guest(body)
            size = len(body) + sum(map(len, buffers))
            if message.msg_type == "stream" and messages.take_text(message.content, buffers):
                buffers = []
        except TooMuchError as error:
            self._on_too_much(body, error)
        except ProtocolError as error:
            # The frames are right: what comes next can be read
            self._drop("malformed messages", error, len(body) + sum(map(len, buffers)))
        else:
            if message.msg_type == "wake_reply":
                self._on_wake_reply(message)
            elif self._heard:
                if self._on_output(message, buffers):
                    self.charge(pace.price(size))
            else:  # before the wake-up a guest has nothing to say: fail closed
                self._drop("messages before the wake-up", message.msg_type, len(body))

    def _on_wake_reply(self, message: messages.FromGuest) -> None:
        if self._woken.done():
            self._drop("wake-ups that nobody asked for", message.parent_id)
        elif message.content.get("status") == "ok":
            self._heard = True
            self._woken.set_result(None)
        else:
            reason = str(message.content.get("evalue"))[:MOST_REASON]
            self._fail(
                VmGuestError(
                    f"the guest kernel did not wake up: {reason}",
                    hint="build the image again if this lasts: vmkernel image build NAME --force",
                )
            )

    def _on_too_much(self, body: memoryview, error: TooMuchError) -> None:
        """Leave out what is more than the host can bear, and say so where it would have stood."""
        self._drop("messages over a limit", error, len(body))
        head = messages.decode_head(body)
        if head is not None and self._heard and head.channel in ("iopub", "shell"):
            text = f"vmkernel: {head.msg_type} was left out: {error.message}\n"
            content = {"name": "stderr", "text": text}
            self._on_output(messages.FromGuest("iopub", "stream", head.parent_id, {}, content), [])

    def _drop(self, kind: str, detail: object, size: int = 0) -> None:
        self.oddities.note(kind, detail)
        self.charge(pace.price(size))

    def _on_event(self, event: messages.FromAgent) -> None:
        if isinstance(event, messages.KernelDied):
            if not self._hearing:  # one at a time, whatever a guest tells
                self._hearing = True
                self._hear_out(explain_death(event))
            else:
                self.oddities.note("news of the death of what is dead")
        elif isinstance(event, messages.Ready):
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
            else:
                self.oddities.note("news of a new kernel that nobody asked for")
        elif isinstance(event, messages.Failed):
            self._fail(VmGuestError(event.reason, hint="restart the kernel"))
        else:
            self.oddities.note("events of a start, after it", type(event).__name__)

    def _hear_out(self, death: KernelDeath, received: int = -1, turns: int = LAST_TURNS) -> None:
        """Take in what the dead kernel still said: its port and the agent's share no order."""
        port = self.vm.kernel
        if (received != port.received or port.pending) and turns:
            loop = asyncio.get_running_loop()
            received = port.received
            loop.call_later(LAST_WORDS, self._hear_out, death, received, turns - 1)
            return
        self._hearing = False
        if self.vm.running:
            self._death = death
            self._fail(VmGuestError(death.reason, hint=death.hint))
            self._on_kernel_death(death)

    def _on_vm_end(self, error: VmError) -> None:
        self._fail(error)
        self._on_end(error)

    def _fail(self, error: VmError) -> None:
        for future in (self._woken, self._ready):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # seen: nobody may be waiting


def explain_death(event: messages.KernelDied) -> KernelDeath:
    """What a person is told about the end of a guest kernel."""
    if event.oom:
        return KernelDeath(
            "The guest ran out of memory, and its kernel was killed",
            "use less memory, or give the VM more: VMKERNEL_MEMORY, or --memory in the kernelspec",
            event.output,
            128 + signal.SIGKILL,
        )
    if event.signal is not None:
        try:
            name = signal.Signals(event.signal).name
        except ValueError:
            name = f"signal {event.signal}"
        return KernelDeath(
            f"The guest kernel was killed by {name}",
            "a crash in native code is the usual cause of SIGSEGV, SIGBUS and SIGABRT"
            if name in ("SIGSEGV", "SIGBUS", "SIGABRT")
            else "look for what the code did to its own process",
            event.output,
            128 + event.signal,
        )
    return KernelDeath(
        f"The guest kernel ended with exit status {event.exit_code}",
        "the code called os._exit, or exited in some other hard way",
        event.output,
        event.exit_code or 0,
    )
