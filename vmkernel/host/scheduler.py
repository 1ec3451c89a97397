"""One piece of code, one fresh VM: the `Scheduler`, with or without a warm pool.

Where it stands: over ``manager.py`` (VMs) and ``keeper.py`` (the warm pool). A request takes a
member of the pool, or creates a VM and waits in the host's queue as everyone does; its files go
in, the code runs once, its files come out, and the VM is destroyed whatever happened.

What is promised about running code: it is sent to a guest at most once. A VM that died before
that is replaced, once; when one dies afterwards nobody knows how far the code came, and the error
says so (``code_ran`` is "unknown").
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from vmkernel.errors import VmCapacityError, VmError, VmGuestError, VmStateError
from vmkernel.host.capacity import QueuePosition, Statistics
from vmkernel.host.handle import OnInput, OnOutput, VmHandle
from vmkernel.host.inotify import FileWatch
from vmkernel.host.keeper import PING_SECONDS, Hope, Keeper
from vmkernel.host.manager import UNSET, Unset, VmManager
from vmkernel.host.oneshot import Use
from vmkernel.host.pool import Place
from vmkernel.host.scheduling import (
    Request,
    SchedulerConfig,
    SchedulerStatistics,
    changed,
    language_of,
)
from vmkernel.host.shielded import to_its_end
from vmkernel.host.start import shared_slots
from vmkernel.models import Language, RunResult

_log = logging.getLogger("vmkernel")

_QUEUEING = QueuePosition(0, 0, 0).text.partition(":")[0]
"""How what ``on_progress`` hears begins while a request waits for its slot."""


class Scheduler:
    """Runs pieces of code, each in a fresh VM that is destroyed afterwards.

    ``async with Scheduler(SchedulerConfig(...)) as scheduler: await scheduler.run("…")``.
    Leaving the context waits for no request: those under way end with VmStateError.
    """

    def __init__(self, config: SchedulerConfig | None = None) -> None:
        self.config = config or SchedulerConfig()
        # A VM of ours is to be used at once or to wait in the pool: that is no idleness of its user
        settings = msgspec.structs.replace(self.config.settings, idle_timeout=None)
        self._manager = VmManager(settings)
        self._requests: set[asyncio.Task[RunResult]] = set()
        self._running = self._done = self._from_pool = 0
        self._open = False
        self._pool_recipe = ""
        self._keeper: Keeper[VmHandle] | None = None

    async def __aenter__(self) -> Scheduler:
        config = self.config
        if config.warm_pool_size:
            self._pool_recipe = config.recipe_for(config.language, None)
            host = _PoolHost(self._manager, self._pool_recipe)
            self._keeper = Keeper(host, config.warm_pool_size, config.age_limit)
            self._keeper.begin()
        await self._manager.__aenter__()
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False
        await to_its_end(self._close())

    async def _close(self) -> None:
        for request in self._requests:
            request.cancel()
        try:
            while self._requests:
                await asyncio.wait(self._requests)
            if self._keeper is not None:
                await self._keeper.close()
        finally:
            await self._manager.close()

    async def run(
        self,
        code: str,
        *,
        language: Language | str | None = None,
        timeout: float | None = None,
        queue_timeout: float | Unset | None = UNSET,
        tenant_id: str = "",
        task_id: str = "",
        env: Mapping[str, str] | None = None,
        files: Mapping[str, Path | bytes] | None = None,
        outputs: Mapping[str, Path] | None = None,
        on_output: OnOutput | None = None,
        on_input: OnInput | None = None,
        on_progress: Callable[[str], None] | None = None,
        recipe: str | None = None,
        **settings: Any,
    ) -> RunResult:
        """Run ``code`` in a fresh VM and return what it did; an error of the code is in the result.

        ``timeout``: seconds that the code may run, not counting the wait for a VM;
        ``queue_timeout``: seconds to wait for a slot (default: the setting of that name; None: for
        ever). ``tenant_id`` and ``task_id`` tag the VM in the record and in the log. ``env`` is
        added to the environment of the code. ``files``: guest path to what is put there before, a
        file, a directory or bytes; ``outputs``: guest path to the local path to which it is copied
        afterwards (of code that failed, what there is of them); both as in `VmHandle.put` and
        `VmHandle.get`. ``on_output`` and ``on_input`` as in `VmHandle.run`; ``on_progress`` hears a
        line for each thing that is waited for. ``language``, ``recipe`` and any setting by its name
        make this VM differ from the others; such a request gets no member of the warm pool.

        Raises VmCapacityError (no slot in time), VmTimeoutError (the code took too long),
        VmGuestError (the VM died; ``code_ran`` says whether the code may have run), VmFileError,
        VmStateError (the scheduler is not open, or was closed meanwhile), SettingsError,
        ImageError, TemplateError, VmOverlayError, VmBootError, RegistryError. Cancelling it ends
        the VM.
        """
        if not self._open:
            raise _closed("is not open")
        config = self.config
        speaks = config.language if language is None else language_of(language)
        request = Request(
            code=code,
            recipe=config.recipe_for(speaks, recipe),
            changes=changed(config.settings, settings),
            timeout=timeout,
            queue_timeout=(
                config.settings.queue_timeout if isinstance(queue_timeout, Unset) else queue_timeout
            ),
            tenant_id=tenant_id,
            task_id=task_id,
            env=env or {},
            files=files or {},
            outputs=outputs or {},
            on_output=on_output,
            on_input=on_input,
            on_progress=on_progress or (lambda text: None),
        )
        task = asyncio.get_running_loop().create_task(self._serve(request))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        try:
            return await task
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if self._is_open() or (me is not None and me.cancelling()):
                raise
            raise _closed("was closed meanwhile") from None

    async def wait_warm(self) -> None:
        """Return when the warm pool is full; at once, if none is to be kept.

        Raises VmError when a member cannot be started; the pool goes on trying.
        """
        if self._keeper is not None:
            await self._keeper.wait_full()

    def statistics(self) -> SchedulerStatistics:
        """What this scheduler does now, and the host's slots.  Raises VmCapacityError."""
        pool = self._keeper.pool if self._keeper else None
        return SchedulerStatistics(
            running=self._running,
            queued=len(self._requests) - self._running,
            warm=pool.count(Place.IDLE) if pool else 0,
            starting=pool.count(Place.STARTING) if pool else 0,
            done=self._done,
            from_pool=self._from_pool,
            slots=self._manager.capacity(),
        )

    def _is_open(self) -> bool:  # a call, for mypy takes an attribute to stay what it was
        return self._open

    def __repr__(self) -> str:
        try:
            now = self.statistics()
        except VmCapacityError as error:
            return f"<Scheduler {error}>"
        return (
            f"<Scheduler {'' if self._open else 'closed '}running={now.running} "
            f"queued={now.queued} warm={now.warm}/{self.config.warm_pool_size} "
            f"starting={now.starting} slots={now.slots.used}/{now.slots.limit}>"
        )

    # --- one request ---

    async def _serve(self, request: Request) -> RunResult:
        loop = asyncio.get_running_loop()
        limit = request.queue_timeout
        deadline = None if limit is None else loop.time() + limit
        try:
            for last in (False, True):
                left = None if deadline is None else max(0.0, deadline - loop.time())
                vm = await self._obtain(request, left)
                _log.info(
                    "%s runs code of tenant %r, task %r",
                    vm.vm_id, request.tenant_id, request.task_id,
                )  # fmt: skip
                self._running += 1
                use = Use(vm, request)
                try:
                    return await use.run()
                except VmGuestError as error:
                    if last or vm.alive or error.code_ran != "no":
                        raise
                    _log.warning("%s died before the code was sent: %s", vm.vm_id, error)
                finally:
                    self._running -= 1
                    await to_its_end(self._end(use))
            raise AssertionError("the second round returns or raises")
        finally:
            self._done += 1

    async def _end(self, use: Use) -> None:
        await self._manager.destroy_vm(use.vm)
        await use.settle()

    async def _obtain(self, request: Request, timeout: float | None) -> VmHandle:
        """A VM for the request, from the pool or new."""
        keeper = self._keeper
        if request.recipe != self._pool_recipe or request.changes:
            keeper = None  # its members are not what this request wants
        if keeper is not None and (vm := await keeper.take()) is not None:
            return await self._hand_over(vm, request)
        queues = False

        def progress(text: str) -> None:
            nonlocal queues
            queues = text.startswith(_QUEUEING)
            request.on_progress(text)

        create = self._manager.create_vm(
            recipe=request.recipe,
            tenant_id=request.tenant_id,
            task_id=request.task_id,
            timeout=timeout,
            on_progress=progress,
            **request.changes,
        )
        if keeper is None:  # not as a task, whose result would be lost with us in its last moment
            return await create
        creating = asyncio.get_running_loop().create_task(create)
        member = await self._first_of(creating, keeper.hope(lambda: queues), keeper)
        return creating.result() if member is None else await self._hand_over(member, request)

    async def _first_of(
        self, creating: asyncio.Task[VmHandle], hope: Hope[VmHandle], keeper: Keeper[VmHandle]
    ) -> VmHandle | None:
        """A member of the pool, if one came before a VM of one's own; the other is ended."""
        try:
            await asyncio.wait({creating, hope.member}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await to_its_end(self._neither(creating, keeper.give_up(hope)))
            raise
        member = keeper.give_up(hope)
        if member is not None:
            try:
                await to_its_end(self._neither(creating, None))
            except asyncio.CancelledError:
                await to_its_end(self._manager.destroy_vm(member))
                raise
        return member

    async def _neither(self, creating: asyncio.Task[VmHandle], member: VmHandle | None) -> None:
        creating.cancel()
        await asyncio.wait([creating])
        if not creating.cancelled() and creating.exception() is None:
            await self._manager.destroy_vm(creating.result())
        if member is not None:
            await self._manager.destroy_vm(member)

    async def _hand_over(self, vm: VmHandle, request: Request) -> VmHandle:
        """Make a member of the pool the request's."""
        self._from_pool += 1
        if request.tenant_id or request.task_id:
            try:
                await self._manager.update_vm(
                    vm.vm_id, tenant_id=request.tenant_id, task_id=request.task_id
                )
            except BaseException:
                await to_its_end(self._manager.destroy_vm(vm))
                raise
        return vm


class _PoolHost:
    """The keeper's way to VMs and slots."""

    def __init__(self, manager: VmManager, recipe: str) -> None:
        self._manager = manager
        self._recipe = recipe
        self._slots = shared_slots(manager.settings)

    async def start(self) -> VmHandle | None:
        vm = await self._manager.create_vm_nowait(recipe=self._recipe)
        if vm is not None:
            try:  # under emulation a first answer takes 100 ms, and the next one 10
                await vm.ping(PING_SECONDS)
            except BaseException:
                await to_its_end(self._manager.destroy_vm(vm))
                raise
        return vm

    async def end(self, vm: VmHandle) -> None:
        try:
            await self._manager.destroy_vm(vm)
        except VmError as error:
            _log.warning("%s of the warm pool could not be ended: %s", vm.vm_id, error)

    def slots(self) -> Statistics:
        return self._slots.statistics()

    def follow(self, watch: FileWatch) -> bool:
        return self._slots.follow(watch)


def _closed(how: str) -> VmStateError:
    return VmStateError(f"The scheduler {how}", hint="use it within `async with Scheduler(...)`")
