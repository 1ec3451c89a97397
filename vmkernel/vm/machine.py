"""One microVM in the hands of its owner: started, talked to, ended.

Where it stands: ``vm.command`` says how, ``vm.qemu`` starts the process, ``vm.ports`` carry
the talk; ``vm.template`` boots one to freeze it, ``host.start`` clones and wakes the
rest.  Starting is in two steps, so that QEMU can come up while the wrapper still imports:
:func:`spawn` needs no event loop, :meth:`Vm.attach` joins one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmkernel.errors import ProtocolError, TemplateError, VmBootError, VmError, VmGuestError
from vmkernel.protocol import messages
from vmkernel.vm.command import Machine, qemu_argv
from vmkernel.vm.console import ConsoleLog
from vmkernel.vm.limits import Limits
from vmkernel.vm.qemu import QemuProcess, find_qemu
from vmkernel.vm.wall import Wall, enclose

if TYPE_CHECKING:
    import asyncio

    from vmkernel.vm.loading import StateLoader
    from vmkernel.vm.monitor import Monitor
    from vmkernel.vm.ports import AgentPort, Port


_CLOCK_ERROR = 0.05  # seconds by which a guest's clock may be late, at most, when it wakes
_CLOCK_TRIES = 3  # on a host that is too busy for that


_LAST_WORDS = 2.0
"""Seconds that a QEMU which hung up has to end by itself."""


class Spawned(msgspec.Struct):
    """A QEMU that was started, and our ends of its sockets."""

    machine: Machine
    process: QemuProcess
    monitor: socket.socket
    kernel: socket.socket
    agent: socket.socket
    control: socket.socket
    workspace: socket.socket
    network: socket.socket
    console: socket.socket

    def abandon(self) -> None:
        """Give up a QEMU that was never attached."""
        self.process.abandon()
        for sock in (self.monitor, *self.ports(), self.console):
            sock.close()

    def ports(self) -> tuple[socket.socket, ...]:
        """Our ends of the guest's virtio-serial ports."""
        return (self.kernel, self.agent, self.control, self.workspace, self.network)


def spawn(
    machine: Machine,
    vm_dir: Path,
    *,
    wall: Wall,
    slot: int | None = None,
    keep_fds: tuple[int, ...] = (),
    cpu_quota: int | None = None,
    command_line: Callable[[Machine], list[str]] = qemu_argv,
) -> Spawned:
    """Start QEMU for ``machine``, whose socket descriptors are filled in here.

    ``vm_dir`` exists and gets ``qemu.log``.  ``wall`` is what is to enclose it, ``slot`` the number
    of the VM's slot.  ``keep_fds`` are inherited too (the slot's lock).  ``cpu_quota`` in per cent
    of one processor.  ``command_line``: something else that is to run in QEMU's place.  From the
    main thread only (see vm.qemu).  Raises VmBootError, and OSError about the machine's files.
    """
    find_qemu(machine.qemu, "")
    ports = ("kernel", "agent", "control", "workspace", "network")
    fields = ("monitor_fd", *(f"{name}_port_fd" for name in ports), "console_fd")
    pairs = [socket.socketpair() for _ in fields]
    theirs = {field: pair[1].fileno() for field, pair in zip(fields, pairs, strict=True)}
    machine = msgspec.structs.replace(machine, **theirs)
    try:
        enclosed = enclose(wall, machine, slot, command_line)
        try:
            process = QemuProcess.spawn(
                enclosed.argv,
                pass_fds=(*machine.fds(), *enclosed.fds, *keep_fds),
                log_path=vm_dir / "qemu.log",
                limits=Limits(machine.memory_mib, cpu_quota),
                user=enclosed.user,
                enclosed=bool(wall.bwrap),
            )
        finally:
            for fd in enclosed.fds:
                os.close(fd)
    except BaseException:
        for ours, _ in pairs:
            ours.close()
        raise
    finally:
        for _, their in pairs:
            their.close()
    return Spawned(machine, process, *(ours for ours, _ in pairs))


class Vm:
    """A VM that runs, from the side of the process that owns it.

    ``on_event`` gets the agent's events (Hello, Ready, KernelDied, Failed); ``on_message``
    and the ports ``kernel`` and ``control`` are the way to the guest kernel, which answers on
    ``kernel`` only; ``on_end`` is called once, with
    the error to show, when the VM ended without :meth:`close`.
    """

    def __init__(
        self,
        spawned: Spawned,
        *,
        on_event: Callable[[messages.FromAgent], None],
        on_message: Callable[[memoryview, list[memoryview]], None],
        on_end: Callable[[VmError], None],
    ) -> None:
        self.process = spawned.process
        self.machine = spawned.machine
        self.console: ConsoleLog | None = None
        self.agent: AgentPort
        self.kernel: Port
        self.control: Port
        self._ports: list[AgentPort | Port] = []
        self._spawned = spawned
        self._on_event = on_event
        self._on_message = on_message
        self._on_end = on_end
        self._monitor: Monitor | None = None
        self._loader: StateLoader | None = None
        self._closed = False
        self._ended = False
        self._broken: VmError | None = None
        self._watch: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Vm {self.machine.vm_id} {self.process!r}>"

    @property
    def running(self) -> bool:
        """Whether the VM is there and has kept to the protocol."""
        return not (self._closed or self._ended)

    async def attach(self, console_path: Path, console_cap: int) -> None:
        """Join the running event loop: watch the process, open the ports, log the console."""
        import asyncio

        from vmkernel.vm.loading import StateLoader
        from vmkernel.vm.ports import AgentPort, Port

        loop = asyncio.get_running_loop()
        self.process.watch()
        self._watch = loop.create_task(self._watch_process())
        if self.machine.incoming:
            self._loader = StateLoader(self._spawned.monitor)
        self.console = ConsoleLog(console_path, console_cap)
        self.console.drain(self._spawned.console.detach(), loop)
        self.agent = AgentPort(self._on_event)
        self._ports.append(self.agent)
        await self.agent.open(self._spawned.agent, self._on_lost)
        self.kernel = await Port.open(
            "kernel", self._spawned.kernel, self._on_message, self._on_lost
        )
        self._ports.append(self.kernel)
        self.control = await Port.open("control", self._spawned.control, _refuse, self._on_lost)
        self._ports.append(self.control)

    async def load(self, timeout: float) -> None:
        """Wait until a clone's state is loaded (`vm.loading`).

        Raises TemplateError, or VmBootError with QEMU's last words when it did not come up.
        """
        assert self._loader is not None, "attach() first"
        try:
            await self._loader.wait(timeout)
        except VmBootError as error:
            raise await self.failed(error.message) from error
        except TemplateError as error:
            failure = await self.failed(error.message)
            if (self.process.returncode or 0) < 0:  # killed: nothing is wrong with the template
                raise failure from error
            raise

    async def monitor(self) -> Monitor:
        """QEMU's monitor, opened at first use.  Raises VmBootError with QEMU's last words."""
        from vmkernel.vm.monitor import Monitor

        if self._monitor is None:
            try:
                if self._loader is None:
                    self._monitor = await Monitor.open(self._spawned.monitor)
                else:
                    self._monitor = await Monitor.open(self._loader.release(), greeted=True)
            except VmBootError as error:
                raise await self.failed(f"QEMU did not come up ({error})") from error
        return self._monitor

    async def wake(self, hostname: str, timeout: float) -> None:
        """Give a fresh clone its own time, entropy and name.  Raises VmGuestError."""
        asked = time.monotonic()
        await self.agent.call(
            messages.Wake(time_ns=time.time_ns(), entropy=os.urandom(64), hostname=hostname),
            timeout,
        )
        # The time was right when it was sent: the guest's clock is late by as much of the call as
        # passed before it was set.  The first code that a clone runs is slow; later calls are not.
        for _ in range(_CLOCK_TRIES):
            if time.monotonic() - asked < _CLOCK_ERROR:
                break
            asked = time.monotonic()
            await self.agent.call(messages.SetClock(time.time_ns()), timeout)

    async def failed(self, what: str, kind: type[VmError] = VmBootError) -> VmError:
        """An error for ``what``, with QEMU's and the guest's last words.

        Gives a QEMU that is about to end a moment, so that its own reason is told.
        """
        import asyncio

        try:
            async with asyncio.timeout(0.5):
                await self.process.wait()
        except TimeoutError:
            pass
        error = self.process.failure(what, kind)
        console = self.console.text(2000).strip() if self.console else ""
        if console:
            error.message += f"\nThe guest's console ends with:\n{console}"
        return error

    async def close(self) -> None:
        """End the VM and release what it held.  May be called twice, and when it has ended."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        self.process.kill()
        if self._monitor is not None:
            await self._monitor.close()
        else:
            if self._loader is not None:
                self._loader.release()
            self._spawned.monitor.close()
        for port in self._ports:
            port.close()
        for sock in self._spawned.ports():
            sock.close()  # no effect where a port has it
        if self._watch is not None:
            await self.process.close()
        if self.console is not None:
            self.console.close()

    async def _watch_process(self) -> None:
        await self.process.wait()
        if self._closed or self._ended:
            return
        self._ended = True
        self._on_end(
            await self.failed("The VM ended", VmGuestError)
            if self._broken is None
            else self._broken
        )

    def _on_lost(self, error: ProtocolError | None) -> None:
        """A port was lost: with the process (which is reported by itself), or by a lie."""
        if self._closed:
            return
        if error is None:
            # A QEMU that ends closes its sockets first; one that goes on is of no use.
            import asyncio

            asyncio.get_running_loop().call_later(_LAST_WORDS, self.process.kill)
        else:
            self._broken = VmGuestError(
                f"The guest broke the protocol and was stopped: {error}",
                hint="run the cell again in a new VM",
                log_path=self.process.log.path,
                code_ran="unknown",
            )
            self.process.kill()


def _refuse(body: memoryview, buffers: list[memoryview]) -> None:
    raise ProtocolError("a message on port 'control', which leads into the guest only")
