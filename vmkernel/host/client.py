"""Starting a runner and speaking with one: the near end of ``host.runner``'s sockets.

Where it stands: under ``host.handle`` and ``host.manager``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vmkernel.environment import outward
from vmkernel.errors import (
    CodeRan,
    ProtocolError,
    VmBootError,
    VmError,
    VmGuestError,
    VmStateError,
)
from vmkernel.host import localsocket, wire
from vmkernel.host.capacity import Slot
from vmkernel.host.processes import ProcessIdentity, identify, is_alive
from vmkernel.host.startlock import StartLock
from vmkernel.protocol import frames, messages
from vmkernel.settings import Settings
from vmkernel.vm.ports import Port

# What a runner needs of our environment: programs, words, and the way to a user's systemd.
_PASSED = (
    "DBUS_SESSION_BUS_ADDRESS", "HOME", "LANG", "LC_ALL", "PATH", "TMPDIR", "TZ", "USER",
    "VMKERNEL_TRACE", "XDG_RUNTIME_DIR",
)  # fmt: skip

OnEvent = Callable[[wire.Event], None]
_PROGRAM = Path(__file__).with_name("run_vm.py")
_LOG_TAIL = 4000
SILENT_SECONDS = 20.0
"""How much longer than the guest a runner may take to answer, on a host that is very busy."""
BUSY_SECONDS = 10.0
"""How long a runner may leave a new connection in its queue, when that is full."""
CANCEL_SECONDS = 20.0
"""How long a cancelled run is waited for: interrupt, end of its kernel, and then some."""


def _environment(settings: Settings) -> dict[str, str]:
    """What of ours a runner gets."""
    env = {name: os.environ[name] for name in _PASSED if name in os.environ}
    return env if settings.network == "none" else env | outward(os.environ)


class RunnerProcess:
    """A runner that this process has started.  ``identity`` tells it from later ones of its pid."""

    def __init__(self, vm_id: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.vm_id = vm_id
        self.log_path = log_path
        found = identify(process.pid)
        self.identity = found or ProcessIdentity(process.pid, 0)
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)  # ours to reap, so the number is still its own
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._forgotten = False

    def __repr__(self) -> str:
        state = f"ended {self._ended.result()}" if self._ended.done() else "running"
        return f"<RunnerProcess pid={self.identity.pid} {state}>"

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        if self._forgotten:
            self._reap()
        else:
            os.close(self._pidfd)
            self._ended.set_result(self._process.wait())

    def on_end(self, callback: Callable[[int], None]) -> None:
        """Call it when the process has ended, with its exit status as of `wait`."""
        self._ended.add_done_callback(lambda ended: callback(ended.result()))

    async def wait(self) -> int:
        """Until it has ended; its exit status, or minus the signal's number."""
        if self._loop is not asyncio.get_running_loop() and not self._ended.done():
            while self._process.poll() is None:  # noqa: ASYNC110 - the loop that would have been told is over
                await asyncio.sleep(0.02)
            return self._process.returncode
        return await asyncio.shield(self._ended)

    def forget(self) -> None:
        """It lives on without us; only its zombie will be ours."""
        if not (self._ended.done() or self._forgotten):
            self._forgotten = True
            self._process.returncode = 0  # else subprocess warns of a child that is left running
            _forgotten.append(self)
            if not self._loop.is_closed():
                self._ended.set_result(0)

    def _reap(self) -> None:
        _forgotten.remove(self)
        with contextlib.suppress(ChildProcessError):  # somebody else's, after a fork; or reaped
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        os.close(self._pidfd)

    def reap_if_left(self) -> None:
        """Reap it if it has ended, and the event loop is over that would have been told."""
        if self._loop.is_closed() and not is_alive(self.identity):
            self._reap()

    def kill(self) -> None:
        """SIGKILL, if it has not ended and is ours; QEMU dies with it."""
        if not (self._ended.done() or self._forgotten):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def last_words(self) -> str:
        """The end of its log."""
        try:
            data = self.log_path.read_bytes()
        except OSError:
            return ""
        return data[-_LOG_TAIL:].decode(errors="replace").strip()


_forgotten: list[RunnerProcess] = []
"""Children that live on by themselves: each one would be a zombie of this process in the end."""


def spawn_runner(
    settings: Settings, vm_id: str, log_dir: Path, slot: Slot, lock: StartLock
) -> tuple[RunnerProcess, socket.socket]:
    """Start a runner, which inherits slot and start lock (our copies stay ours to close).

    Returns it and our end of its socket.  Raises VmBootError.
    """
    for left in _forgotten.copy():
        left.reap_if_left()
    log_path = log_dir / "runner.log"
    pair: tuple[socket.socket, ...] = ()
    try:
        pair = ours, theirs = socket.socketpair()
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = os.open(
            log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        inherited = (theirs.fileno(), slot.fd, lock.fd)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_PROGRAM), vm_id, str(settings.database_file.resolve()),
                 *map(str, inherited)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=inherited, cwd="/",
                env=_environment(settings),
                start_new_session=True,  # Ctrl-C in our terminal is not for it
            )  # fmt: skip
        finally:
            os.close(log)
        try:
            runner = RunnerProcess(vm_id, process, log_path)
        except OSError:
            process.kill()
            process.wait()
            raise
    except OSError as error:
        for sock in pair[:1]:
            sock.close()
        raise VmBootError(
            f"the runner of {vm_id} could not be started: {error}",
            hint=f"check room and permissions of {log_dir}, and the limits on open files and "
            "processes (`vmkernel doctor`)",
        ) from error
    finally:
        for sock in pair[1:]:
            sock.close()
    return runner, ours


class RunnerSilentError(VmGuestError):
    """The runner is there, and says nothing: it is stopped, or its host is."""


_Answer = tuple[dict[str, Any], list[memoryview]]


class _Pending:
    """A call that waits for its answer."""

    def __init__(self, answer: asyncio.Future[_Answer], on_event: OnEvent | None) -> None:
        self.answer = answer
        self.on_event = on_event
        self.seconds: float | None = None
        """What the runner may take, by its own clock; None: for ever."""
        self.limit: asyncio.Timeout

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Its time begins."""
        if self.seconds is not None:
            self.limit.reschedule(loop.time() + self.seconds + SILENT_SECONDS)


class Connection:
    """A connection to a runner; made by :meth:`open` or :meth:`reach`."""

    def __init__(self) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[VmError | None] = loop.create_future()
        """Resolves when the VM has ended: to the reason, or None when it was asked to."""
        self.heard = loop.time()
        """When the runner last said something, on the loop's clock."""
        self._port = Port("runner", self._on_message, self._on_lost)
        self._next = wire.ABOUT_THE_VM
        self._calls: dict[int, _Pending] = {}

    @classmethod
    async def open(cls, sock: socket.socket) -> Connection:
        """Speak over a connected socket, which becomes the connection's to close."""
        connection = cls()
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: connection._port, sock=sock)
        return connection

    @classmethod
    async def reach(cls, directory: Path) -> Connection:
        """Connect to the runner whose VM's directory this is.  Raises OSError, VmGuestError."""
        connection = cls()
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            with localsocket.short_path(directory) as path:
                await _connect(sock, f"{path}/{localsocket.CONTROL_SOCKET}")
            await loop.create_connection(lambda: connection._port, sock=sock)
        except BaseException:
            sock.close()
            raise
        return connection

    @property
    def connected(self) -> bool:
        """Whether the runner is there to be asked."""
        return self.usable and self._port.connected and not self.ended.done()

    @property
    def usable(self) -> bool:
        """Whether this is the event loop that the connection was made in: it works in no other."""
        try:
            return self._loop is asyncio.get_running_loop()
        except RuntimeError:  # there is none
            return False

    async def call(
        self,
        call: wire.Call,
        *,
        on_event: OnEvent | None = None,
        buffers: Sequence[frames.Piece] = (),
    ) -> tuple[dict[str, Any], list[memoryview]]:
        """Ask the runner for something; its result, and the buffers that came with it.

        Cancelling a `wire.Run` interrupts the code and waits for its end.  Raises the VmError that
        the runner answers with, or VmGuestError when it is gone.
        """
        if not self.usable:
            raise VmStateError(
                "this VM's handle belongs to another event loop",
                hint="get one of your own: VmManager.get_vm()",
            )
        if not self.connected:  # a runner that said that its VM ended still hangs up
            raise self._gone("no")
        self._next += 1
        number = self._next
        pending = self._calls[number] = _Pending(self._loop.create_future(), on_event)
        try:
            self._port.send(wire.encode(wire.Request(number, call)), buffers)
            try:
                async with asyncio.timeout(None) as pending.limit:
                    if isinstance(call, wire.Run):  # its time begins with its turn: wire.Sent
                        pending.seconds = call.timeout
                    elif not isinstance(call, wire.Start):
                        pending.seconds = call.timeout if isinstance(call, wire.Ask) else 0.0
                        pending.begin(self._loop)
                    return await asyncio.shield(pending.answer)
            except VmError:  # the runner's answer, which may be a TimeoutError, too
                raise
            except TimeoutError:
                raise RunnerSilentError(
                    f"the VM's runner has not answered within {pending.seconds:g} s and "
                    f"{SILENT_SECONDS:g} s more",
                    hint="is it stopped, or the host overloaded? `vmkernel ps`, `vmkernel rm -f`",
                    code_ran="unknown",
                ) from None
            except asyncio.CancelledError:
                if isinstance(call, wire.Run):
                    await self._cancel(number, pending)
                raise
        finally:
            del self._calls[number]

    def tell(self, call: wire.Call) -> None:
        """Ask for something whose answer does not matter."""
        if self._port.connected:
            self._next += 1
            self._port.send(wire.encode(wire.Request(self._next, call)))

    async def _cancel(self, number: int, pending: _Pending) -> None:
        pending.on_event = None  # its output is for nobody
        self.tell(wire.Interrupt(run=number))
        await asyncio.wait([pending.answer], timeout=CANCEL_SECONDS)
        if pending.answer.done() and not pending.answer.cancelled():
            pending.answer.exception()  # seen

    def close(self) -> None:
        """Hang up."""
        if self.usable:
            self._port.close()
        else:  # its loop is over, and with it all that could close the transport in order
            with contextlib.suppress(OSError):
                self._port.socket.shutdown(socket.SHUT_RDWR)
        self._fail(None)

    def _gone(self, code_ran: CodeRan) -> VmError:
        """Why nothing comes back, for one who asks now ("no") or has asked ("unknown")."""
        error = self.ended.result() if self.ended.done() else None
        return wire.once_more(
            error or VmGuestError("the VM has ended", hint="create another one"), code_ran
        )

    def _on_message(self, body: memoryview, buffers: list[memoryview]) -> None:
        message = messages.decode(body, wire.FromRunner)
        self.heard = self._loop.time()
        if isinstance(message.event, wire.Ended):
            failure = message.event.failure
            self._fail(failure.error() if failure else None)
            return
        pending = self._calls.get(message.id)
        if pending is None or pending.answer.done():
            return
        answer = pending.answer
        if isinstance(message.event, wire.Sent):
            pending.begin(self._loop)
        elif not isinstance(message.event, wire.Reply):
            if pending.on_event is not None:
                try:
                    pending.on_event(message.event)
                except Exception as error:  # the caller's own: it is not the runner's fault
                    answer.set_exception(error)
                    self.tell(wire.Interrupt(run=message.id))
        elif message.event.failure is not None:
            answer.set_exception(message.event.failure.error())
        else:
            answer.set_result((message.event.result, buffers))

    def _on_lost(self, error: ProtocolError | None) -> None:
        self._fail(
            VmGuestError(
                "the VM's runner has ended, and the VM with it"
                if error is None
                else f"the VM's runner does not keep to the protocol: {error}",
                hint="was it killed? (`dmesg` tells of a lack of memory) Create another VM",
                code_ran="unknown",
            )
        )
        self._port.close()

    def _fail(self, error: VmError | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)
        for pending in self._calls.values():
            if not pending.answer.done():
                pending.answer.set_exception(self._gone("unknown"))
                pending.answer.exception()  # seen: its waiter may be gone


async def _connect(sock: socket.socket, path: str) -> None:
    """Not `loop.sock_connect`: that takes a full queue (EAGAIN, connect(2)) for a connection."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise VmGuestError(
                    f"the VM's runner has taken no connection for {BUSY_SECONDS:g} s: too many "
                    "wait for it",
                    hint="is it stopped, or the host overloaded? `vmkernel ps`",
                ) from None
            await asyncio.sleep(0.02)
        else:
            return
