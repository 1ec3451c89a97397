"""``python -m vmkernel.pool SOCKET``: one process per user that has kernels ready.

It has imported all that a wrapper kernel needs and forks members (`member`), which share its pages.
What to start and to end is `host.pool`'s to decide and `host.keeper`'s to do, for each distinct set
of settings that kernels were asked for lately.  It is started by a kernel that found no pool, with
that kernel's request on descriptor 3, and ends some minutes after the user's last kernel has, or
when vmkernel's code on disk is no longer its own.  Kernels that were handed over live on.

Forks happen between two runs of the event loop, in the only thread: nothing of a loop is half done
in a child.  Where it stands: over ``kernel`` and ``host``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import gc
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

import vmkernel
from vmkernel.errors import VmError, VmStateError
from vmkernel.host import start
from vmkernel.host.capacity import Statistics
from vmkernel.host.descriptors import want_descriptors
from vmkernel.host.inotify import FileWatch
from vmkernel.host.keeper import Keeper
from vmkernel.host.pool import Place
from vmkernel.image.store import find_image
from vmkernel.kernel.launch import parse_arguments
from vmkernel.pool import handover, member
from vmkernel.pool.request import Request, adopt_environment
from vmkernel.pool.surroundings import surroundings
from vmkernel.settings import (
    Settings,
    dump_settings,
    ensure_private_dir,
    load_settings_with_sources,
)
from vmkernel.vm import accel, template
from vmkernel.vm.qemu import find_qemu
from vmkernel.vm.template import find_template

log = logging.getLogger("vmkernel.pool")

REFILL_AFTER = 1.5
"""Seconds after a hand-over before the pool fills again: the new kernel has the processors."""
HOPE_SECONDS = 0.8
"""How long a launcher may wait for a member that is starting; it is patient for a second."""
END_PATIENCE = 3.0
"""Seconds that a member has to end by itself."""
LOOK_SECONDS = 15.0
"""How often to see whether the user has kernels, at the most."""
CODE_SECONDS = 1.0
"""How old the last look at the code on disk may be."""
MOST_STOCKS = 4
"""How many different settings are kept ready at once; those asked for last."""

Job = Callable[[], int]


class Child:
    """A member, seen from the server."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        loop = asyncio.get_event_loop_policy().get_event_loop()
        self.pid = pid
        self.control = control
        self.template = ""
        """The key of what its VM is a clone of; once it is ready"""
        self.stock: Stock | None = None
        self.ready: asyncio.Future[bool] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.given = False
        self._loop = loop
        self._pidfd = os.pidfd_open(pid)
        control.setblocking(False)
        loop.add_reader(control, self._on_word)
        loop.add_reader(self._pidfd, self._on_exit)

    def __repr__(self) -> str:
        state = "ended" if self.ended.done() else "given" if self.given else "ours"
        return f"<Child {self.pid} {state}>"

    async def ping(self, timeout: float) -> None:
        """It lives, and its VM is a clone of what its settings lead to now; VmError else."""
        if self.ended.done():
            raise VmStateError("it has ended")
        if self.stock is not None and self.template != self.stock.template():
            raise VmStateError("its VM is a clone of an older template")

    async def wait_ended(self) -> VmError | None:
        """Return when it has ended."""
        await asyncio.shield(self.ended)
        return None

    def give(self, fds: list[int]) -> None:
        """Hand a launcher over; the descriptors stay ours to close.  Raises OSError."""
        self.given = True
        socket.send_fds(self.control, [handover.KERNEL], fds)

    async def end(self) -> None:
        """End a member that was not given away."""
        self._hang_up()
        try:
            async with asyncio.timeout(END_PATIENCE):
                await asyncio.shield(self.ended)
        except TimeoutError:
            self.kill()
            await asyncio.shield(self.ended)

    def kill(self) -> None:
        """SIGKILL; its VM dies with it."""
        if not self.ended.done():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _hang_up(self) -> None:
        if self.control.fileno() >= 0:
            self._loop.remove_reader(self.control)
            self.control.close()

    def _on_word(self) -> None:
        try:
            words = self.control.recv(member.MOST_WORDS + 1)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        kind, text = words[:1], words[1:].decode(errors="replace")
        if kind == member.UNUSED:  # its launcher had given up
            self.given = False
            self._hang_up()
        elif not words:
            self._hang_up()
        elif self.ready.done():
            pass
        elif kind == member.READY:
            self.template = text
            self.ready.set_result(True)
        elif kind == member.REFUSED:
            self.ready.set_result(False)
        else:
            self._fail(text)

    def _fail(self, why: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(VmStateError(f"a kernel could not be made ready: {why}"))
            self.ready.exception()  # seen: nobody may be waiting

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)
        self._on_word_before_end()
        self._fail("it has ended")
        self._hang_up()
        self.ended.set_result(None)

    def _on_word_before_end(self) -> None:
        """What it said last lies in the socket still."""
        if self.control.fileno() >= 0 and not self.ready.done():
            self._on_word()


class Stock:
    """The members for one set of settings: the `Host` of a `Keeper`."""

    def __init__(self, server: Server, settings: Settings, request: Request) -> None:
        self.settings = settings
        self.request = request
        """The latest for these settings: what a member starts with"""
        self.asked = time.monotonic()
        # A kernel of another kind takes its environment only when it starts
        engine = find_image(settings.recipe, settings).recipe.engine
        size = settings.pool_size if engine == "python" else 0
        self.keeper: Keeper[Child] = Keeper(self, size, settings.pool_max_idle)
        self._server = server

    def __repr__(self) -> str:
        return f"<Stock {self.settings.recipe} {self.keeper!r}>"

    def template(self) -> str:
        """The key of the template that the settings lead to; "" when there is none.  VmError."""
        settings = self.settings
        os.environ["PATH"] = self.request.environ.get("PATH", os.defpath)
        choice = accel.remembered_choice(settings)
        if choice is None:
            return ""
        found = find_template(start.spec_for(settings, choice.accelerator), settings)
        return "" if found is None else found.manifest.key

    def statistics(self) -> dict[str, Any]:
        """For ``vmkernel pool status``."""
        settings, pool = self.settings, self.keeper.pool
        error = self.keeper.last_error
        return {
            "recipe": settings.recipe,
            "memory": settings.memory * 1024**2,
            "size": pool.size,
            "ready": pool.count(Place.IDLE),
            "starting": pool.count(Place.STARTING),
            "asked": time.monotonic() - self.asked,
            "error": None if error is None else str(error),
        }

    # --- as a keeper's host ---

    async def start(self) -> Child | None:
        """A member that is ready; None when no slot is free."""
        if not self.template():  # building one is for a kernel, which shows how far it is
            raise VmStateError(f"there is no template of {self.settings.recipe!r} yet")
        child = await self._server.fork(self._job())
        child.stock = self
        try:
            if await asyncio.shield(child.ready):
                return child
        except BaseException:
            await self._server.end(child)
            raise
        await child.end()
        return None

    async def hope(self) -> Child | None:
        """The member that is on its way, if it comes soon: sooner than one that starts now."""
        end = time.monotonic() + HOPE_SECONDS
        hope = self.keeper.hope(lambda: time.monotonic() < end)
        try:
            await asyncio.wait([hope.member], timeout=HOPE_SECONDS)
        finally:
            child = self.keeper.give_up(hope)
        return child

    def _job(self) -> Callable[[socket.socket], int]:
        settings, request, path = self.settings, self.request, self._server.path

        def job(control: socket.socket) -> int:
            adopt_environment(request.environ)
            return member.run(settings, path, control, None)

        return job

    async def end(self, vm: Child) -> None:
        """End a member."""
        await vm.end()

    def slots(self) -> Statistics:
        """The host's slots now."""
        return start.shared_slots(self.settings).statistics()

    def follow(self, watch: FileWatch) -> bool:
        """See `Keeper`."""
        return start.shared_slots(self.settings).follow(watch)


class Server:
    """The one process that has this socket."""

    def __init__(self, path: bytes, listener: socket.socket) -> None:
        self.path = path
        self.stocks: dict[bytes, Stock] = {}
        self.children: set[Child] = set()
        self.over = False
        self.jobs: list[tuple[Callable[[socket.socket], int], asyncio.Future[Child]]] = []
        self.loop = asyncio.get_event_loop_policy().get_event_loop()
        self._listener = listener
        self._tasks: set[asyncio.Task[Any]] = set()
        self._surroundings = surroundings(os.getpid())
        self._code = _newest_code()
        self._code_seen = time.monotonic()
        self._kernel_seen = time.monotonic()
        listener.setblocking(False)
        self.loop.add_reader(listener, self._on_connection)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.stop)
        self._do(self._watch())

    # --- forks ---

    async def fork(self, job: Callable[[socket.socket], int]) -> Child:
        """Have a child do this; from within the event loop."""
        child: asyncio.Future[Child] = self.loop.create_future()
        self.jobs.append((job, child))
        self.loop.stop()
        return await child

    async def end(self, child: Child) -> None:
        """End a member whose start was given up."""
        task = self._do(child.end())
        await asyncio.shield(task)

    def _do(self, work: Any) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a bug in the pool", exc_info=error)

    # --- who asks ---

    def _on_connection(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._do(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        fds: list[int] = []
        try:
            connection.setblocking(False)
            peer = _peer(connection)
            if not peer:
                return
            async with asyncio.timeout(handover.PATIENCE):
                await _readable(self.loop, connection)
            kind, fds, _, _ = socket.recv_fds(connection, 1, 4)
            if not self._is_current():
                self.stop()
            elif kind in (handover.KERNEL, handover.WANTED) and (
                surroundings(peer) != self._surroundings
            ):
                connection.send(handover.REFUSED)  # it would lose, or escape, what holds for it
            elif kind == handover.KERNEL and len(fds) == 4:
                await self._on_kernel(connection, fds)
            elif kind == handover.WANTED and len(fds) == 1:
                connection.send(handover.TAKEN)
                self.wanted(Request.read(fds[0], whole=False))
            elif kind in (handover.STATUS, handover.STOP):
                answer = json.dumps(self.statistics()).encode()
                connection.setblocking(True)
                connection.settimeout(handover.PATIENCE)
                if kind == handover.STOP:
                    await self._stopped()
                connection.sendall(answer)
        except (OSError, ValueError, VmError) as error:
            log.warning("a request was not served: %s", error)
        finally:
            for fd in fds:
                os.close(fd)
            connection.close()  # who waits for "taken" starts by itself now

    async def _on_kernel(self, connection: socket.socket, fds: list[int]) -> None:
        request = Request.read(fds[0], whole=False)  # the rest is the kernel's own
        stock = self._stock(request)
        if stock is None:
            connection.send(handover.REFUSED)
            return
        self._kernel_seen = time.monotonic()
        child = await stock.keeper.take()
        stock.keeper.pool.postpone(time.monotonic() + REFILL_AFTER)
        if child is None and stock.keeper.pool.count(Place.STARTING):
            child = await stock.hope()
        if child is not None:
            try:
                child.give([connection.fileno(), *fds])
            except OSError:
                self._do(child.end())
                raise
            return
        path, settings = self.path, stock.settings
        kept = [os.dup(connection.fileno()), *map(os.dup, fds)]

        def job(control: socket.socket) -> int:
            asked = member.Asked.receive(*kept)
            return member.run(settings, path, control, asked)

        job.fds = kept  # type: ignore[attr-defined]
        child = await self.fork(job)
        child.given = True
        for fd in kept:
            os.close(fd)

    def wanted(self, request: Request) -> None:
        """Somebody will want a kernel like this soon."""
        try:
            stock = self._stock(request)
        except VmError as error:  # a kernel would tell its user
            log.info("nothing is kept ready: %s", error)
            return
        if stock is not None:
            stock.keeper.last_error = None  # whatever was in the way, it is tried again
            stock.keeper.pool.used()
            # A kernel that is restarted on a full host needs the very slot that it gives back
            now = time.monotonic()
            with contextlib.suppress(VmError):
                stock.keeper.pool.postpone(now if stock.slots().free else now + REFILL_AFTER)
            stock.keeper.poke()

    def _stock(self, request: Request) -> Stock | None:
        """Where kernels for this request are kept; None: such are not.  Raises VmError."""
        if request.environ.get("HOME") != os.environ.get("HOME"):
            return None  # settings' paths may begin with ~
        _, overrides, _ = parse_arguments(request.arguments)
        os.environ["PATH"] = request.environ.get("PATH", os.defpath)
        settings = start.settings_for_recipe(load_settings_with_sources(overrides, request.environ))
        if settings.pool_size == 0:
            return None
        qemu = find_qemu(settings.qemu, os.environ["PATH"])
        key = msgspec.json.encode([dump_settings(settings), qemu])
        stock = self.stocks.pop(key, None)
        if stock is None:
            stock = Stock(self, settings, request)
            stock.keeper.begin()
        self.stocks[key] = stock  # the latest is the last
        stock.request = request
        stock.asked = time.monotonic()
        while len(self.stocks) > MOST_STOCKS:
            self._forget(next(iter(self.stocks)))
        return stock

    def _forget(self, key: bytes) -> None:
        self._do(self.stocks.pop(key).keeper.close())

    def statistics(self) -> dict[str, Any]:
        """For ``vmkernel pool status``."""
        stocks = [stock.statistics() for stock in self.stocks.values()]
        return {
            "pid": os.getpid(),
            "socket": os.fsdecode(self.path),
            "ready": sum(stock["ready"] for stock in stocks),
            "starting": sum(stock["starting"] for stock in stocks),
            "size": sum(stock["size"] for stock in stocks),
            "kernels": sum(child.given for child in self.children),
            "stocks": stocks,
        }

    # --- life ---

    async def _watch(self) -> None:
        """Forget what nobody asks for, and end some time after the last kernel."""
        while True:
            linger = max((s.settings.pool_linger for s in self.stocks.values()), default=60.0)
            await asyncio.sleep(min(LOOK_SECONDS, max(linger / 3, 0.05)))
            now = time.monotonic()
            for key, stock in list(self.stocks.items()):
                if now - stock.asked > stock.settings.pool_max_idle and len(self.stocks) > 1:
                    self._forget(key)
            if self._has_kernels():
                self._kernel_seen = now
            elif now - self._kernel_seen > linger:
                self.stop()
            if not self._is_current():
                self.stop()

    def _has_kernels(self) -> bool:
        """Whether the user has kernels: given away by us, or such as started by themselves."""
        if any(child.given for child in self.children):
            return True
        from vmkernel.host.registry import Registry

        for stock in self.stocks.values():
            with contextlib.suppress(VmError), Registry(stock.settings) as registry:
                if any(vm.record.kernel_id and vm.runner_alive for vm in registry.list()):
                    return True
        return False

    def _is_current(self) -> bool:
        """Whether the code on disk is what this process has imported."""
        now = time.monotonic()
        if now - self._code_seen < CODE_SECONDS:
            return True
        self._code_seen = now
        return _newest_code() == self._code

    def stop(self) -> None:
        """End the server and the members that wait."""
        self._do(self._stopped())

    async def _stopped(self) -> None:
        if self._listener.fileno() >= 0:
            self.loop.remove_reader(self._listener)
            self._listener.close()
            with contextlib.suppress(OSError):
                Path(os.fsdecode(self.path)).unlink()
        stocks = list(self.stocks.values())
        self.stocks.clear()
        await asyncio.gather(*(stock.keeper.close() for stock in stocks))
        self.over = True
        self.loop.call_later(0.05, self.loop.stop)  # the answer to who asked for it goes out


def _peer(connection: socket.socket) -> int:
    """The other end's process; 0 when it is not this user's."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return int(pid) if uid == os.geteuid() else 0


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)


def _newest_code() -> tuple[float, int]:
    """Newest change and number of vmkernel's files: other code, other stamp."""
    newest, count = 0.0, 0
    for directory in _directories(Path(vmkernel.__file__).parent):
        for entry in os.scandir(directory):
            if entry.name.endswith(".py"):
                with contextlib.suppress(OSError):
                    newest = max(newest, entry.stat().st_mtime)
                    count += 1
    return newest, count


def _directories(root: Path) -> Iterator[Path]:
    yield root
    try:
        for entry in os.scandir(root):
            if entry.is_dir() and entry.name != "__pycache__":
                yield from _directories(Path(entry.path))
    except OSError:
        return


def _import_all() -> None:
    """What a wrapper imports in its life, so that no member has to."""
    import concurrent.futures.thread
    import sqlite3
    import subprocess

    import zmq

    import vmkernel.host.contents
    import vmkernel.host.guest
    import vmkernel.host.limits
    import vmkernel.host.memory
    import vmkernel.host.reaper
    import vmkernel.host.schema
    import vmkernel.host.waking
    import vmkernel.kernel.policy.messages
    import vmkernel.kernel.usage
    import vmkernel.vm.loading
    import vmkernel.vm.monitor
    import vmkernel.vm.ports  # noqa: F401

    del concurrent, sqlite3, subprocess, zmq
    # New code is found by its date, each time; a millisecond on the way of each kernel
    template.guest_digest = functools.cache(template.guest_digest)


def _close_all_but(keep: set[int]) -> None:
    """In a child: the server's descriptors are not its own.

    Their Python objects live as long as the child does, and never close another's by number.
    """
    start._semaphores.clear()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        fd = int(name)
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)


def _fork(
    server: Server, job: Callable[[socket.socket], int], child: asyncio.Future[Child]
) -> None:
    if child.cancelled():  # given up before it began
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid = os.fork()
    except OSError as error:
        ours.close()
        theirs.close()
        child.set_exception(VmStateError(f"no process could be forked: {error}"))
        return
    if pid == 0:
        status = 70
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)  # a shell's background ignores two of them
            _close_all_but({theirs.fileno(), *getattr(job, "fds", ())})
            status = job(theirs)
        except BaseException:
            log.exception("a member failed")
        finally:
            member.finish(status)
    theirs.close()
    born = Child(pid, ours)
    server.children.add(born)
    born.ended.add_done_callback(lambda _: server.children.discard(born))
    child.set_result(born)


def _begin(path: bytes) -> socket.socket | None:
    """The listening socket; None when another server has this place."""
    directory = ensure_private_dir(Path(os.fsdecode(path)).parent)
    lock = os.open(
        directory / (Path(os.fsdecode(path)).name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600
    )
    end = time.monotonic() + END_PATIENCE + 1
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process ends
            break
        except OSError:  # another serves, or is about to end
            if time.monotonic() > end or Path(os.fsdecode(path)).is_socket():
                return None
            time.sleep(0.05)
    with contextlib.suppress(FileNotFoundError):
        Path(os.fsdecode(path)).unlink()  # of one that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o077)
    listener.bind(path)
    os.umask(umask)
    listener.listen(64)
    return listener


def main() -> None:
    """Run the server; never returns."""
    path = os.fsencode(sys.argv[1])
    logging.basicConfig(
        level="INFO", format="%(asctime)s [pool %(process)d] %(levelname)s %(message)s"
    )
    os.chdir("/")
    with contextlib.suppress(OSError):
        os.setsid()
    listener = _begin(path)
    if listener is None:
        member.finish(0)
        return
    with contextlib.suppress(VmError):  # a kernel that starts by itself tells it
        want_descriptors()
    request = Request.read(3, whole=False)
    os.close(3)
    _import_all()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server = Server(path, listener)
    loop.call_soon(server.wanted, request)
    gc.collect()
    gc.freeze()
    log.info("begins: %s", os.fsdecode(path))
    while not server.over:
        loop.run_forever()
        jobs, server.jobs = server.jobs, []
        for job, child in jobs:
            _fork(server, job, child)
    log.info("ends")
    member.finish(0)
