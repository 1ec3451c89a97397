"""One kernel on this host that somebody elsewhere has asked for: its process, and what it tells.

A stock Jupyter kernel manager starts it.  Its end shows by a pidfd, the state of its start by
datagrams (`vmkernel.kernel.notify`).  Floor 5, under `vmkernel.cluster.hostactor`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import zmq.asyncio
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager

from vmkernel.errors import VmCapacityError, VmError
from vmkernel.host.trees import remove_tree
from vmkernel.kernel.notify import CAPACITY, HINT, VARIABLE
from vmkernel.settings import NOTEBOOK_DIRECTORY

log = logging.getLogger("vmkernel")

START_SECONDS = 60.0
"""How long a kernel may take to say that it has a slot, or that it waits for one."""
SLOT_SECONDS = 3.0
"""How long it may wait for one: kernels of the pool that nobody uses yield theirs within that."""
TRIES = 3
"""Starts of one kernel: its ports are chosen before they are bound, and may be taken meanwhile."""
END_SECONDS = 5.0
"""From SIGTERM to SIGKILL."""
LOOK_SECONDS = 3.0
"""How long a file system may take to say whether a directory is there: a dead NFS never does."""
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Manager(AsyncKernelManager):  # type: ignore[misc]
    """Jupyter's own, with SIGINT unblocked in what it spawns.

    Ray blocks it in its workers; a child inherits that, and would never be interrupted.
    """

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            await super()._async_launch_kernel(kernel_cmd, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    _launch_kernel = _async_launch_kernel


class Place:
    """What all kernels of this host share: address, environment, directory, ZeroMQ's threads."""

    def __init__(self, ip: str, environ: Mapping[str, str], directory: Path) -> None:
        """``directory``: for connection files; nobody else can enter it."""
        self.ip = ip
        self.environ = dict(environ)
        self.directory = directory
        self.context = zmq.asyncio.Context()
        self.specs = KernelSpecManager()


class HostedKernel:
    """One kernel, from the request until nobody asks about it any more."""

    def __init__(self, request: Mapping[str, Any], place: Place) -> None:
        """``request``: see `KernelHost.start`.  Raises VmError, KeyError: it is none."""
        self.kernel_id = str(request["kernel_id"])
        if not _ID.fullmatch(self.kernel_id):  # it becomes a file's name
            raise VmError(f"{self.kernel_id!r} is no kernel's id")
        self.kernel_name = str(request["kernel_name"])
        self.owner = str(request.get("owner", ""))
        self.lease = float(request["lease"])
        self.created = time.time()
        self.status = ""
        """What it said last of its VM's start"""
        self.why = ""
        """Why it was ended from here"""
        self.starting: asyncio.Task[dict[str, Any]] | None = None
        self.over = 0.0
        """When it ended (monotonic)"""
        self.pid: int | None = None
        """Its process's, also when that has ended"""
        self._request = request
        self._place = place
        self._expires = time.monotonic() + self.lease
        self._manager: _Manager | None = None
        self._exit: asyncio.Task[int] | None = None
        self._ready = False
        self._error: VmError | None = None
        self._news = asyncio.Event()
        self._close_socket: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"<HostedKernel {self.kernel_id} pid={self.pid} exit_code={self.exit_code}>"

    # --- facts ---

    @property
    def exit_code(self) -> int | None:
        """None while it runs, or is still being started."""
        if self._exit is not None and self._exit.done() and not self.is_starting:
            return self._exit.result()
        return None

    @property
    def is_starting(self) -> bool:
        """Whether its start is not over."""
        return self.starting is None or not self.starting.done()

    @property
    def lease_left(self) -> float:
        """Seconds until it is ended, unless the lease is renewed; negative: it is due."""
        return self._expires - time.monotonic()

    def renew(self) -> None:
        """Somebody wants it."""
        self._expires = time.monotonic() + self.lease

    # --- its start ---

    async def start(self) -> dict[str, Any]:
        """Start it, and wait until its VM has a slot.

        Returns ``info``, ``pid``, ``notes`` as `KernelHost.start` does.
        Raises VmCapacityError: no slot; VmError.  Then, and when it is cancelled, `end` is due.
        """
        for _ in range(TRIES):
            manager = await self._launch()
            if await self._has_slot():
                info = {
                    name: value.decode() if isinstance(value, bytes) else value
                    for name, value in manager.get_connection_info().items()
                    if name != "curve_secretkey"
                }
                return {"info": info, "pid": self.pid, "notes": []}
            assert self._exit is not None
            code = self._exit.result()
            log.warning("kernel %s ended as it started (status %s)", self.kernel_id, code)
            await self._clear_up()
        raise VmError(
            f"the kernel ended as it started, with status {code}",
            hint=f"see what it said in Ray's logs on {socket.gethostname()} (the worker's .err), "
            "and run `vmkernel doctor` there",
        )

    async def _launch(self) -> _Manager:
        """Start the process.  Raises VmError."""
        request, place = self._request, self._place
        manager = self._manager = _Manager(
            kernel_name=self.kernel_name,
            ip=place.ip,
            transport_encryption="required",
            context=place.context,
            kernel_spec_manager=place.specs,
        )
        manager.session.key = _bytes(request["key"])
        manager.session.signature_scheme = str(request["signature_scheme"])
        manager.connection_file = str(place.directory / f"kernel-{self.kernel_id}.json")
        env = {**place.environ, **request.get("env", {})}
        cwd = str(request.get("cwd") or "")
        there = await _is_directory(cwd) if cwd else None
        if not there:
            if there is False:  # the kernel's to tell, unless its workspace is another one
                env[NOTEBOOK_DIRECTORY] = cwd
            own = place.directory / self.kernel_id  # empty: nothing for a cell to copy out of
            own.mkdir(mode=0o700, exist_ok=True)
            cwd = str(own)
        self._ready, self._error, self._exit, self.status = False, None, None, ""
        address, self._close_socket = _listen(self._hear)
        try:
            await manager.start_kernel(
                env={**env, VARIABLE: address},
                cwd=cwd,
                extra_arguments=[str(word) for word in request.get("argv", ())],
                stdin=-3,  # subprocess.DEVNULL: nothing of the actor's
            )
        except NoSuchKernel as error:
            raise VmError(
                f"there is no kernel {self.kernel_name!r} on {socket.gethostname()}",
                hint="run `vmkernel install` there, as the user and in the environment of Ray",
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise VmError(
                f"the kernel {self.kernel_name!r} could not be started: {error}",
                hint=f"`jupyter kernelspec list` and `vmkernel doctor` on {socket.gethostname()} "
                "tell what is wrong there",
            ) from error
        finally:
            if manager.ready.done():
                manager.ready.exception()  # told above: nobody else will ask for it
            if manager.has_kernel:  # also when this was cancelled
                self.pid = manager.provisioner.pid
                self._exit = asyncio.create_task(self._wait_for_exit(manager))
        return manager

    async def _has_slot(self) -> bool:
        """Wait until the kernel's VM has its slot; False when the process ended before.

        Raises VmCapacityError, VmError.
        """
        assert self._exit is not None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_SECONDS
        waits = False
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._exit.done():
                return False
            if self.status and not waits:  # for a slot: nothing else comes before it
                waits, deadline = True, loop.time() + SLOT_SECONDS
            if loop.time() >= deadline:
                if waits:
                    raise VmCapacityError(
                        f"no VM slot became free within {SLOT_SECONDS:g} s ({self.status})"
                    )
                raise VmError(
                    f"the kernel has not begun to start a VM within {START_SECONDS:g} s",
                    hint=f"is {socket.gethostname()} too busy? Run `vmkernel doctor` there",
                )
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), deadline - loop.time())
        return True

    def _hear(self, fields: Mapping[str, str]) -> None:
        """What the kernel says of its VM's start."""
        self.status = fields.get("STATUS", self.status)
        if "READY" in fields:
            self._ready, self.status = True, ""
        if "ERRNO" in fields:
            kind = VmCapacityError if fields["ERRNO"] == str(CAPACITY) else VmError
            self._error = kind(self.status, hint=fields.get(HINT, ""))
        self._news.set()

    # --- its life and end ---

    async def signal(self, signum: int) -> None:
        """Send a signal; nothing when it has ended, or not begun."""
        if self._manager is None or self._exit is None or self._exit.done():
            return
        with contextlib.suppress(ProcessLookupError):
            if signum == signal.SIGINT:
                await self._manager.interrupt_kernel()
            else:
                await self._manager.signal_kernel(signum)

    async def wait(self, seconds: float) -> int | None:
        """Its exit code, as soon as it has one; None when it runs on after ``seconds``."""
        deadline = time.monotonic() + seconds
        while (code := self.exit_code) is None and (left := deadline - time.monotonic()) > 0:
            tasks = {task for task in (self.starting, self._exit) if task and not task.done()}
            if not tasks:
                return 0  # it never came to be
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        return code

    async def end(self, patience: float = END_SECONDS) -> None:
        """End the process and wait for that; may be called in every state, and again.

        It has ``patience`` seconds to clear up after itself (record, logs, a socket), then it is
        killed.
        """
        starting = self.starting
        if starting is not None and starting is not asyncio.current_task() and not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
        signum = signal.SIGTERM
        while self._exit is not None and not self._exit.done():
            if self._manager is not None:
                with contextlib.suppress(ProcessLookupError):
                    await self._manager.signal_kernel(signum)
            await asyncio.wait([self._exit], timeout=patience)
            signum = signal.SIGKILL
        await self._clear_up()

    async def _wait_for_exit(self, manager: _Manager) -> int:
        provisioner = manager.provisioner
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        fd = os.pidfd_open(provisioner.pid)  # a zombie, at the worst: nobody else reaps it
        try:
            loop.add_reader(fd, gone.set)
            await gone.wait()
            loop.remove_reader(fd)
        finally:
            os.close(fd)
        code = await provisioner.poll()
        self.over = time.monotonic()
        loop.call_soon(self._news.set)  # when this task is done
        if not self.is_starting:  # else its start, or who ends it, does
            await self._clear_up()
        return 0 if code is None else int(code)

    async def _clear_up(self) -> None:
        """Give back everything; once, since the ports may be another's by now."""
        manager, self._manager = self._manager, None
        if manager is None:
            return
        self._close_socket()
        await manager.cleanup_resources()  # connection file and ports
        await asyncio.to_thread(remove_tree, self._place.directory / self.kernel_id)


async def _is_directory(path: str) -> bool | None:
    """None: the file system does not say."""
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            return await asyncio.to_thread(os.path.isdir, path)
    except TimeoutError:
        return None


def _listen(hear: Callable[[Mapping[str, str]], None]) -> tuple[str, Callable[[], None]]:
    """A socket for what a kernel says: its address, as sd_notify(3) writes it, and how to close it.

    It has no name in any file system, so there is nothing to leave behind.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    name = f"vmkernel-notify-{secrets.token_hex(16)}"
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    sock.bind(f"\0{name}")
    loop = asyncio.get_running_loop()

    def receive() -> None:
        for data in _received(sock):
            lines = data.decode(errors="replace").splitlines()
            hear(dict(line.split("=", 1) for line in lines if "=" in line))

    def close() -> None:
        if sock.fileno() >= 0:
            loop.remove_reader(sock)
            sock.close()

    loop.add_reader(sock, receive)
    return f"@{name}", close


def _received(sock: socket.socket) -> Iterator[bytes]:
    """The datagrams that are there, of this user's processes."""
    while True:
        try:
            data, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
        except OSError:
            return
        # Anyone may write to a socket in the abstract namespace (unix(7))
        users = [
            _CREDENTIALS.unpack(content)[1]
            for level, kind, content in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        ]
        if users == [os.geteuid()]:
            yield data


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
