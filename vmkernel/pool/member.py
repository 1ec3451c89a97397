"""One member: a fork of the server that has a VM ready, or a front end that waits for one.

It is a wrapper kernel that nobody has asked for yet.  When a launcher comes, it takes over what the
launcher is (environment, directory, descriptors) and is that kernel until its end, whatever
becomes of the server.  Until then it ends with the server, with its VM, or when it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel import trace
from vmkernel.errors import VmError
from vmkernel.host.start import Label, begin
from vmkernel.host.waking import local_zone
from vmkernel.kernel.history import History
from vmkernel.kernel.launch import label_of, parse_arguments
from vmkernel.kernel.serve import LOG_FORMAT, run_wrapper
from vmkernel.kernel.sockets import Sockets
from vmkernel.kernel.wrapper import Wrapper
from vmkernel.pool import client, handover
from vmkernel.pool.request import Request
from vmkernel.protocol import messages

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest, KernelDeath
    from vmkernel.settings import Settings

log = logging.getLogger("vmkernel")

READY, REFUSED, FAILED, UNUSED = b"R", b"N", b"F", b"U"
"""What a member says to its server, as the first byte."""
MOST_WORDS = 4000
PING_SECONDS = 30.0
"""How often a member that waits asks its guest's agent for a sign of life."""
PING_PATIENCE = 10.0
REHEARSALS = 3
"""How often the hand-over is rehearsed: under emulation the first takes 50 ms, the third 8.

No cell is: a guest that has served a request is given new random numbers by numpy's and OpenSSL's
own code, not by a few writes (`guest.wake`), which costs 10 MiB of translated code and memory.
"""
WARM_UP = 0.1
"""Seconds after which a guest that is not used begins to warm itself up (`guest.engine`)."""
NOBODYS = Label(task_id="pool", env={})
"""Of a VM that waits.  Its guest has nothing of the environment of a kernel before."""
QUIET_NICE = 10
"""How much a member that starts stands back for everybody else."""


class Asked(msgspec.Struct):
    """A launcher that waits: its connection, what it wants, its stdio."""

    connection: socket.socket
    request: Request
    stdio: list[int]
    listeners: list[int]

    @classmethod
    def receive(cls, connection: int, request: int, *fds: int) -> Asked:
        """From descriptors, which are this object's from now on.  Raises ValueError, OSError."""
        try:
            read = Request.read(request)
        finally:
            os.close(request)
        return cls(socket.socket(fileno=connection), read, list(fds), [])

    def close(self) -> None:
        """Let it go: it starts its kernel itself."""
        self.connection.close()
        for fd in self.stdio + self.listeners:
            os.close(fd)


def run(settings: Settings, server: bytes, control: socket.socket, asked: Asked | None) -> int:
    """The life of a forked member; its exit status.  ``server`` is the path of the pool's socket.

    With ``asked`` it was forked for that launcher, and its VM starts before all eyes.
    """
    from vmkernel.host.memory import MOST_IN_WRAPPER, limit_memory

    gc.freeze()  # what the server has is not looked at again, or all of it would be copied
    limit_memory(MOST_IN_WRAPPER)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT, force=True)
    member = _Member(settings, server, control)
    return asyncio.run(member.wait() if asked is None else member.serve(asked))


class _Member:
    def __init__(self, settings: Settings, server: bytes, control: socket.socket) -> None:
        self._settings = settings
        self._server = server
        self._control = control
        self._wrapper: Wrapper
        self._over: asyncio.Future[Asked | None]

    # --- waiting ---

    async def wait(self) -> int:
        """Have a VM ready until a launcher comes."""
        nice = _stand_back()
        try:
            begun = begin(self._settings, NOBODYS)
        except (VmError, OSError) as error:
            self._say(FAILED, str(error))
            return 1
        if begun is None:  # no slot is free any more
            self._say(REFUSED)
            return 0
        self._over = asyncio.get_running_loop().create_future()
        # Its history is the kernel's to be
        history = History(self._settings, ["--HistoryManager.enabled=False"])
        wrapper = self._wrapper = Wrapper(
            self._settings, self._sockets(None), NOBODYS, history, begun
        )
        supply = wrapper.supply
        supply.wait_for_a_kernel()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end, None)
        loop.add_reader(self._control, self._on_control)
        ping: asyncio.Task[None] | None = None
        try:
            supply.owner = _Watcher(self._end)
            guest = await self._unless_over(supply.guest(None))
            await self._unless_over(asyncio.sleep(WARM_UP))
            # What the hand-over will ask of it; answered when the warm-up is over
            await self._unless_over(self._rehearse_hand_over(guest))
            supply.owner = wrapper
            if nice is not None:
                _come_forward(guest.vm.process.qemu_pid, nice)
            wrapper.prepare()
            self._say(READY, begun.template.manifest.key)
            wrapper.on_idle_death = self._end
            ping = asyncio.create_task(self._ping(guest))
            asked = await self._over
        except (VmError, _OverError) as error:
            if isinstance(error, VmError):
                self._say(FAILED, str(error))
            asked = None
        if ping is not None:
            ping.cancel()
        if asked is None:
            await wrapper.close()
            return 0
        wrapper.on_idle_death = None
        return await self._serve(asked)

    async def _rehearse_hand_over(self, guest: Guest) -> None:
        # Each kernel is told the zone, this one's or another
        zone = {"TZ": local_zone()} if local_zone() else {}
        for _ in range(REHEARSALS):
            await guest.set_environment(zone, self._settings.start_timeout)
            await guest.vm.agent.call(messages.SetClock(time.time_ns()))

    async def _unless_over(self, work: Any) -> Any:
        """The work's result; raises _OverError when the member is to end before."""
        task = asyncio.ensure_future(work)
        await asyncio.wait([task, self._over], return_when=asyncio.FIRST_COMPLETED)
        if self._over.done():
            task.cancel()
            raise _OverError
        return task.result()

    def _end(self, error: VmError | None) -> None:
        """End without having been a kernel."""
        if error is not None:
            log.warning("a kernel of the pool ends: %s", error)
        if not self._over.done():
            self._over.set_result(None)

    def _on_control(self) -> None:
        """The server has a launcher for us, or is gone."""
        try:
            kind, fds, _, _ = socket.recv_fds(self._control, 16, 5)
        except BlockingIOError:
            return
        except OSError:
            kind, fds = b"", []
        if kind != handover.KERNEL or len(fds) != 5:
            asyncio.get_running_loop().remove_reader(self._control)
            self._end(None)
            return
        asked = Asked.receive(*fds)
        guest = self._wrapper.supply.current
        if self._over.done() or guest is None or not guest.vm.kernel.connected:
            asked.close()
            self._end(None)
        elif self._confirmed(asked):
            asyncio.get_running_loop().remove_reader(self._control)
            self._over.set_result(asked)
        else:
            asked.close()
            self._say(UNUSED)

    def _confirmed(self, asked: Asked) -> bool:
        """Tell the launcher that its kernel is here; whether it has not given up meanwhile."""
        connection = asked.connection
        connection.setblocking(False)
        try:
            connection.send(handover.TAKEN)
            poll = select.poll()
            poll.register(connection, select.POLLIN)
            poll.poll(handover.PATIENCE * 1000)  # microseconds, and there is nothing else to do
            kind, asked.listeners, _, _ = socket.recv_fds(connection, 1, 5)
            return kind == handover.CONFIRMED
        except OSError:
            return False

    async def _ping(self, guest: Guest) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            try:
                # Its code was run already, and the clock is right when somebody comes
                await guest.vm.agent.call(messages.SetClock(time.time_ns()), PING_PATIENCE)
            except VmError as error:
                self._end(error)
                return

    def _say(self, kind: bytes, words: str = "") -> None:
        with contextlib.suppress(OSError):  # the server is gone, which ends us elsewhere
            self._control.send(kind + words[:MOST_WORDS].encode())

    def _sockets(self, connection_file: None) -> Sockets:
        # There is a wrapper by the time of the first request
        return Sockets(connection_file, lambda request: self._wrapper.on_request(request))  # noqa: PLW0108

    # --- a kernel ---

    async def serve(self, asked: Asked) -> int:
        """Be the kernel of a launcher that waits, with a VM that starts now."""
        if not self._confirmed(asked):
            asked.close()
            return 0
        settings = self._settings
        # Neither label nor history matter before _serve() has given the right ones
        self._wrapper = Wrapper(settings, self._sockets(None), Label(), History(settings, []), None)
        # By then there is a template, if there was none before
        self._wrapper.on_quiet = lambda: client.want(self._server, asked.request.arguments)
        return await self._serve(asked)

    async def _serve(self, asked: Asked) -> int:
        wrapper, connection, request = self._wrapper, asked.connection, asked.request
        for fd, kept in enumerate(asked.stdio):
            os.dup2(kept, fd)
            os.close(kept)
        with contextlib.suppress(OSError):  # a directory that only the launcher may enter
            request.adopt()
        trace.begin(os.environ.get(trace.VARIABLE, ""))
        trace.mark("handed over")
        connection_file, _, options = parse_arguments(request.arguments)
        try:
            wrapper.sockets.open(connection_file, asked.listeners)
        except VmError as error:
            log.critical("%s", error.explain())
            await wrapper.close()
            return _tell_status(connection, 1)
        trace.mark("sockets bound")
        label = label_of(connection_file)
        notebook = os.environ.get("JPY_SESSION_NAME", "").rpartition("/")[2]
        wrapper.history = History(self._settings, options)
        wrapper.supply.assign(msgspec.structs.replace(label, notebook=notebook))
        wrapper.on_restart = lambda: client.want(self._server, request.arguments)
        loop = asyncio.get_running_loop()
        loop.add_reader(connection, self._on_shell, connection)
        status = await run_wrapper(wrapper)
        loop.remove_reader(connection)
        return _tell_status(connection, status)

    def _on_shell(self, connection: socket.socket) -> None:
        """What has happened to the process that the front end knows."""
        try:
            letters = connection.recv(64)
        except BlockingIOError:
            return
        except OSError:
            letters = b""
        if not letters:
            asyncio.get_running_loop().remove_reader(connection)
            # Whoever starts the kernel anew wants its ports: they are free as after any kill
            self._wrapper.sockets.abandon()
            self._wrapper.stop(1)
        if handover.INTERRUPT in letters:
            self._wrapper.interrupt()
        if handover.TERMINATE in letters:
            self._wrapper.stop(0)


class _OverError(Exception):
    """The member is to end."""


class _Watcher:
    """Hears the guest until it is somebody's: it has nothing to say but that it is no more."""

    def __init__(self, end: Callable[[VmError | None], None]) -> None:
        self._end = end

    def on_output(self, message: messages.FromGuest, buffers: Sequence[memoryview]) -> bool:
        """Nobody has asked."""
        return True

    def on_kernel_death(self, death: KernelDeath) -> None:
        """A guest kernel that dies of nothing is no good."""
        self._end(VmError(death.reason))

    def on_vm_end(self, error: VmError) -> None:
        """No VM, no member."""
        self._end(error)


def _tell_status(connection: socket.socket, status: int) -> int:
    with contextlib.suppress(OSError):
        connection.send(b"%d\n" % status)
    return status


def _stand_back() -> int | None:
    """Take low priority, if there is a way back to what we had; that."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if os.geteuid() and resource.getrlimit(resource.RLIMIT_NICE)[0] < 20 - nice:
        return None
    os.setpriority(os.PRIO_PROCESS, 0, min(19, nice + QUIET_NICE))
    return nice


def _come_forward(qemu_pid: int, nice: int) -> None:
    """Give this process, whose priority QEMU has inherited, and QEMU the usual one."""
    with contextlib.suppress(OSError):
        for process in (os.getpid(), qemu_pid):
            for thread in os.listdir(f"/proc/{process}/task"):  # noqa: PTH208
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)


def finish(status: int) -> None:
    """End this process at once."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
