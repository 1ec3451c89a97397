"""Keeps a warm pool as its policy says: starts members, watches over them, ends them.

Where it stands: over ``pool.py``, which decides, and under the scheduler, whose requests take
members. What it does with VMs and slots goes through one narrow seam, `Host`, so that its own
tests can hold up or break any step of a member's life.

Everything is begun in ``_act`` without a wait in between; what takes time has a task of its own.
The keeper itself sleeps until a member is taken, gets ready or dies, until somebody opens or
closes the semaphore file (inotify), or until time alone changes the answer. An idle pool costs
one look at the semaphore file in `IDLE_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from vmkernel.errors import VmError
from vmkernel.host.capacity import AGAIN_SECONDS, POLL_ALONE_SECONDS, Statistics
from vmkernel.host.inotify import FileWatch
from vmkernel.host.pool import Place, Pool

IDLE_SECONDS = 5.0
"""The safety net under inotify."""
PING_SECONDS = 5.0
"""How long the guest of a member may take to answer before it is handed out."""

_log = logging.getLogger(__name__)


class Member(Protocol):
    """What the keeper needs of a VM; `vmkernel.host.handle.VmHandle` has it."""

    async def ping(self, timeout: float) -> None:
        """The guest answers; VmError else."""

    async def wait_ended(self) -> VmError | None:
        """Return when the VM has ended, for whatever reason."""


V = TypeVar("V", bound=Member)


class Host(Protocol[V]):
    """The keeper's way to VMs and slots."""

    async def start(self) -> V | None:
        """A new VM, ready; None when no slot is free or somebody waits for one.

        Raises VmError.  Cancelling it leaves nothing.
        """

    async def end(self, vm: V) -> None:
        """End it, whatever state it is in; raises nothing but CancelledError."""

    def slots(self) -> Statistics:
        """The host's slots now.  Raises VmError."""

    def follow(self, watch: FileWatch) -> bool:
        """As ``Semaphore.follow``."""


class _Start(Generic[V]):
    """One member: the task that starts it, later the VM and who watches over it."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.vm: V | None = None


class Hope(Generic[V]):
    """A request that waits for a slot of its own and would rather have a member."""

    def __init__(self, still: Callable[[], bool]) -> None:
        self.still = still
        """Whether it still waits: once it has a slot, a member is of no use to it."""
        self.member: asyncio.Future[V] = asyncio.get_running_loop().create_future()


class Keeper(Generic[V]):
    """A warm pool of ``size`` VMs of ``host``; ``begin`` it, ``take`` from it, ``close`` it."""

    def __init__(self, host: Host[V], size: int, max_idle: float) -> None:
        self.pool: Pool[_Start[V]] = Pool(size, max_idle)
        self.last_error: VmError | None = None
        """Why the newest start failed; None when it went well."""
        self._failures = 0
        self._host = host
        self._hopes: dict[Hope[V], None] = {}  # in order of arrival
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._watch: FileWatch | None = None
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Keeper {self.pool!r} hopes={len(self._hopes)}>"

    def begin(self) -> None:
        """Fill the pool from now on."""
        self._keeping = asyncio.get_running_loop().create_task(self._keep(), name="warm pool")

    async def take(self) -> V | None:
        """A member whose guest has just answered; it is the caller's. None: there is none.

        Members that do not answer are ended and replaced.
        """
        while (member := self.pool.take()) is not None:
            vm = member.vm
            assert vm is not None
            assert member.task is not None
            member.task.cancel()  # it watched over it
            self.poke()
            try:
                await vm.ping(PING_SECONDS)
            except BaseException as error:
                self._do(self._host.end(vm))
                if not isinstance(error, VmError):
                    raise
                _log.warning("a VM of the warm pool is replaced: %s", error)
                continue
            self.pool.used()
            return vm
        return None

    def hope(self, still: Callable[[], bool]) -> Hope[V]:
        """Ask for the next member that gets ready, while ``still()`` holds; to be given up."""
        hope: Hope[V] = Hope(still)
        self._hopes[hope] = None
        self.poke()
        return hope

    def give_up(self, hope: Hope[V]) -> V | None:
        """Hope no more; a member that came all the same is the caller's."""
        self._hopes.pop(hope, None)
        return None if hope.member.cancel() or hope.member.cancelled() else hope.member.result()

    async def wait_full(self) -> None:
        """Until as many members are ready as the pool is to have.

        Raises the VmError of a start that fails meanwhile (there will be others).
        """
        failures = self._failures
        while self.pool.count(Place.IDLE) < self.pool.size:
            if self._failures != failures and self.last_error is not None:
                raise self.last_error
            self._changed.clear()
            await self._changed.wait()

    async def close(self) -> None:
        """End every member and every start; return when all are gone. Not to be cancelled."""
        keeping, self._keeping = self._keeping, None
        if keeping is not None:
            keeping.cancel()
            await asyncio.wait([keeping])
        for hope in self._hopes:
            hope.member.cancel()
        while (member := self.pool.take()) is not None:
            self._end(member)
        for task in self._tasks:
            if task.get_name() == "start":
                task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- keeping ---

    async def _keep(self) -> None:
        again = len(AGAIN_SECONDS)
        watch = self._watch = FileWatch(arrivals=True)
        try:
            while True:
                pause = POLL_ALONE_SECONDS
                try:
                    # Watched before looked at: what happens after the look then ends the sleep.
                    if self._host.follow(watch):
                        pause = IDLE_SECONDS
                    pause = min(pause, self._act())
                except VmError as error:  # the semaphore file cannot be used just now
                    self.last_error = error
                    pause = 1.0
                if again < len(AGAIN_SECONDS):  # an event comes before what it tells of
                    pause = min(pause, AGAIN_SECONDS[again])
                again = 0 if await watch.sleep(pause) else again + 1
        finally:
            self._watch = None
            watch.close()

    def _act(self) -> float:
        """Do what the policy says; seconds until it should be asked again."""
        now = asyncio.get_running_loop().time()
        slots = self._host.slots()
        hoping = sum(1 for hope in self._hopes if not hope.member.done() and hope.still())
        decision = self.pool.decide(now, free=slots.free, waiting=slots.waiting, hoping=hoping)
        for member in decision.end:
            self._end(member)
        for _ in range(decision.start):
            member = _Start()
            self.pool.starting(member)
            member.task = self._do(self._live(member), "start")
            member.task.add_done_callback(partial(self._started, member))
        return IDLE_SECONDS if decision.look_again is None else decision.look_again - now

    async def _live(self, member: _Start[V]) -> None:
        """A member's life, from its start until it is taken, ended or dead."""
        loop = asyncio.get_running_loop()
        try:
            vm = member.vm = await self._host.start()
        except VmError as error:
            self.last_error = error
            self._failures += 1
            _log.warning("the warm pool could not start a VM: %s", error)
            self.pool.failed(member, loop.time())
            return
        if vm is None:
            self.pool.refused(member, loop.time())
            return
        self.last_error = None
        if not self.pool.ready(member, loop.time()):
            await self._end_vm(member)
        elif not self._fulfil(member):
            self.poke()
            failure = await vm.wait_ended()  # cancelled when it is taken or ended
            _log.warning("a VM of the warm pool has ended and is replaced: %s", failure)
            self._end(member, leave_task=True)

    def _started(self, member: _Start[V], _task: asyncio.Task[None]) -> None:
        """However a start ended, even if it was cancelled before it began: no place is lost."""
        if member.vm is None:
            self.pool.gone(member)

    def _fulfil(self, member: _Start[V]) -> bool:
        """Give it to the request that hopes for it longest, if there is one."""
        for hope in self._hopes:
            if not hope.member.done() and hope.still():
                self.pool.gone(member)
                self.pool.used()
                assert member.vm is not None
                hope.member.set_result(member.vm)
                return True
        return False

    def _end(self, member: _Start[V], *, leave_task: bool = False) -> None:
        """Begin the end of a member that is idle or only starting."""
        self.pool.leaving(member)
        if member.task is not None and not leave_task:
            member.task.cancel()
        if member.vm is not None:
            self._do(self._end_vm(member))

    async def _end_vm(self, member: _Start[V]) -> None:
        assert member.vm is not None
        try:
            await self._host.end(member.vm)
        finally:
            self.pool.gone(member)
            self.poke()

    def _do(self, work: Coroutine[Any, Any, None], name: str = "end") -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.poke()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a bug in the warm pool", exc_info=error)

    def poke(self) -> None:
        """Ask the policy anew: it was told something."""
        self._changed.set()
        if self._watch is not None:
            self._watch.wake()
