"""The runner: a process of its own that owns one VM, when no notebook's kernel does.

Started by ``host.client`` for a `VmManager`, with three things by inheritance: the VM's slot, its
start lock, and a socket to its starter.  All else comes over that socket, so that neither the
working directory nor the environment decides anything.  QEMU gets the slot and dies with the
runner; the runner ends with its starter, unless the VM is to be kept; so whoever dies, what hangs
on it ends.  Others reach it by ``control.sock`` in the VM's directory.

As a wrapper kernel does, it starts QEMU before it imports an event loop.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vmkernel import trace
from vmkernel.errors import VmError, VmExpiredError, VmGuestError, VmTimeoutError
from vmkernel.host import localsocket, wire
from vmkernel.host.capacity import Slot
from vmkernel.host.memory import MOST_IN_RUNNER, limit_memory
from vmkernel.host.registry import vm_dir
from vmkernel.host.start import Label, Started, begin
from vmkernel.host.startlock import StartLock
from vmkernel.imports import import_without
from vmkernel.protocol import frames, messages
from vmkernel.settings import ensure_private_dir, restore_settings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine

    from vmkernel.host.guest import Guest
    from vmkernel.host.runner_client import RunnerClient
    from vmkernel.host.start import VmStart
    from vmkernel.settings import Settings


def main(arguments: list[str]) -> NoReturn:
    """Run one VM: VM_ID DATABASE SOCKET_FD SLOT_FD LOCK_FD."""
    trace.begin(os.environ.get(trace.VARIABLE, ""))
    trace.mark("runner: imported")
    signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # ignored by our starter, it would hide QEMU's end
    limit_memory(MOST_IN_RUNNER)
    vm_id, _, *numbers = arguments  # the database is named for who reads the process table
    socket_fd, slot_fd, lock_fd = map(int, numbers)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    starter = socket.socket(fileno=socket_fd)
    starter_pidfd = _watch_starter(starter)
    reader = frames.FrameReader()
    request = _first_request(starter, reader)
    assert isinstance(request.call, wire.Start)
    settings = restore_settings(request.call.settings)
    slot = Slot.adopt(settings.semaphore_file, slot_fd, request.call.slot, request.call.lease)
    label = Label(vm_id=vm_id, env=request.call.env)
    begun: Started | None = None
    failure: VmError | None = None
    try:
        begun = begin(settings, label, slot)
    except VmError as error:
        failure = error
    trace.mark("runner: QEMU started")
    import_without("ssl", "asyncio")  # 12 ms, and 2 MiB for each runner
    import asyncio

    runner = Runner(settings, label, request.call.kept, lock_fd)
    asyncio.run(runner.serve(starter, starter_pidfd, request.id, slot, begun, failure))
    sys.stderr.flush()
    os._exit(0)


def _watch_starter(starter: socket.socket) -> int:
    """A pidfd of the starter: its socket may live on in children that it forked."""
    raw = starter.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, localsocket.CREDENTIALS.size)
    pid = localsocket.CREDENTIALS.unpack(raw)[0]
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        os._exit(0)
    if os.getppid() != pid:  # it has died, and somebody may have its number by now
        os._exit(0)
    return pidfd


def _first_request(starter: socket.socket, reader: frames.FrameReader) -> wire.Request:
    while True:
        data = starter.recv(1 << 16)
        if not data:
            os._exit(0)  # the starter has died: nobody wants this VM
        for message in reader.feed(data):
            return messages.decode(frames.split(message)[0], wire.Request)


MOST_WAITING = 1024
"""Connections that wait to be taken while the runner is busy."""


class Runner:
    """One VM, and those who speak with it."""

    def __init__(self, settings: Settings, label: Label, kept: bool, lock_fd: int) -> None:
        from vmkernel.host.execution import Executor

        self.vm_id = label.vm_id
        self.clients: set[RunnerClient] = set()
        self.executor = Executor(settings.boot_timeout)
        self.guest: Guest | None = None
        self._settings = settings
        self._label = label
        self._kept = kept
        self._lock = StartLock.inherited(label.vm_id, lock_fd)
        self._stop: asyncio.Future[tuple[str, VmError | None]] | None = None
        self._slow: set[RunnerClient] = set()
        self._waiting: list[tuple[RunnerClient, int, VmError | None]] = []

    async def serve(
        self,
        starter: socket.socket,
        starter_pidfd: int,
        request_id: int,
        slot: Slot,
        begun: Started | None,
        failure: VmError | None,
    ) -> None:
        """Bring the VM up, serve it, end it.  ``failure``: it has failed already."""
        import asyncio

        from vmkernel.host.limits import TimeLimits
        from vmkernel.host.runner_client import RunnerClient
        from vmkernel.host.start import VmStart

        loop = asyncio.get_running_loop()
        self._stop = loop.create_future()
        loop.add_signal_handler(signal.SIGTERM, self.stop, "its runner was asked to end (SIGTERM)")
        owner = RunnerClient(self, is_owner=True)
        await loop.create_connection(lambda: owner.port, sock=starter)

        def on_starter_dead() -> None:
            loop.remove_reader(starter_pidfd)
            owner.leave()

        loop.add_reader(starter_pidfd, on_starter_dead)
        start = VmStart(self._settings, self._label, begun, slot)
        start.directory = self._directory

        def progress(text: str) -> None:
            owner.send(request_id, wire.Progress(text))

        error = failure or await self._outcome(self._bring_up(start, progress), progress)
        if error is None:
            self._lock.release()  # whoever wants to start it now finds that it runs
            assert self.guest is not None
            self.executor.attach(self.guest)
            limits = TimeLimits(
                self._settings.lifetime, self._settings.idle_timeout, self._on_expired
            )
            self.executor.on_work = limits.note
            self.executor.on_hopeless = self._on_hopeless
            owner.send(request_id, wire.Reply())
            why, end = await asyncio.shield(self._stop)
            error = end or VmGuestError(
                f"the VM was ended: {why}", hint="start or create another one"
            )
            self.executor.refuse(error)
            limits.close()
            failed = end is not None and not isinstance(end, VmExpiredError)
            await start.close(keep_logs=failed, cause=why)
            self.executor.on_end(error)  # its guest tells nobody any more
            for _ in range(100):  # who waited for a turn is told by its own reply, before the rest
                if not self.executor.busy:
                    break
                await asyncio.sleep(0)
            if isinstance(end, VmTimeoutError):  # whose run that was is told by its own reply
                end = VmGuestError(f"the VM was destroyed: {end.message}")
            told = wire.Failure.of(end) if end is not None else None
            for client, number, reason in self._waiting:
                client.send(number, wire.Reply(wire.Failure.of(reason) if reason else None))
            for client in self.clients:
                client.send(wire.ABOUT_THE_VM, wire.Ended(told))
        else:
            owner.send(request_id, wire.Reply(wire.Failure.of(error)))
        await self._hang_up()

    async def _bring_up(self, start: VmStart, progress: Callable[[str], None]) -> None:
        self.guest = await start.guest(
            on_output=self.executor.on_output,
            on_kernel_death=self.executor.on_kernel_death,
            on_end=self._on_vm_end,
            progress=progress,
        )
        try:
            await self._listen()
        except (OSError, VmError) as error:
            failure = VmError(
                f"the VM's socket could not be made: {error}",
                hint="check runtime_dir (VMKERNEL_RUNTIME_DIR): room, permissions",
            )
            await start.close(keep_logs=True, cause=failure.message)
            raise failure from error
        except BaseException:  # given up at the last moment: nobody else would clear up
            await start.close(cause="its start was given up")
            raise

    async def _outcome(
        self, start: Coroutine[Any, Any, None], progress: Callable[[str], None]
    ) -> VmError | None:
        """Why the start failed; None when it did not.  Gives signs of life meanwhile."""
        import asyncio

        assert self._stop is not None
        starting = asyncio.ensure_future(start)
        waiting: set[asyncio.Future[Any]] = {starting, self._stop}
        while not (starting.done() or self._stop.done()):
            await asyncio.wait(waiting, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            progress("")
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
        if starting.cancelled():
            why, _ = self._stop.result()
            return VmError(f"the start of {self.vm_id} was given up: {why}", hint="start it again")
        error = starting.exception()
        if error is None or isinstance(error, VmError):
            return error
        import traceback

        traceback.print_exception(error)  # into the log
        return VmError(f"the runner failed: {error!r}", hint="this is a mistake in vmkernel")

    def stop(
        self,
        why: str,
        error: VmError | None = None,
        *,
        asked_by: tuple[RunnerClient, int] | None = None,
    ) -> None:
        """End the VM, and then this process; ``error`` when that is not what was wanted.

        ``asked_by``, a client and its request, is answered when the VM is gone.
        """
        assert self._stop is not None
        if asked_by is not None:
            self._waiting.append((*asked_by, error))
        if not self._stop.done():
            self._stop.set_result((why, error))

    @property
    def ending(self) -> VmError | None:
        """Why the VM is being ended, or was, where that was not asked for."""
        if self._stop is None or not self._stop.done():
            return None
        return self._stop.result()[1]

    def owner_left(self) -> None:
        """The starter is gone; a VM that is kept, and up, stays."""
        if self.guest is None or not self._kept:
            self.stop("whoever had started it has ended")

    def hold_output(self, client: RunnerClient, hold: bool) -> None:
        """Back-pressure: while any client does not take what it is sent, the guest is not read."""
        (self._slow.add if hold else self._slow.discard)(client)
        if self.guest is not None and self.guest.vm.running:
            (self.guest.vm.kernel.pause if self._slow else self.guest.vm.kernel.resume)()

    def _on_expired(self, error: VmExpiredError) -> None:
        if self.executor.busy:
            error.code_ran = "unknown"
        self.stop(error.message, error)

    def _on_hopeless(self, error: VmError) -> None:
        self.stop(error.message, error)

    def _on_vm_end(self, error: VmError) -> None:
        self.executor.on_end(error)
        self.stop(error.message.partition("\n")[0], error)

    @property
    def _directory(self) -> Path:
        return vm_dir(self._settings, self.vm_id)

    async def _listen(self) -> None:
        """Let others in: those who may enter the directory, which is the user's alone."""
        import asyncio

        from vmkernel.host.runner_client import RunnerClient

        ensure_private_dir(self._settings.runtime_dir)
        loop = asyncio.get_running_loop()
        with localsocket.bound_in(self._directory) as sock:
            await loop.create_unix_server(
                lambda: RunnerClient(self).port, sock=sock, backlog=MOST_WAITING
            )

    async def _hang_up(self) -> None:
        """Let every client have what was said to it, for a moment; then end."""
        import asyncio

        for _ in range(200):
            if not any(client.port.unsent for client in self.clients):
                break
            await asyncio.sleep(0.01)
