"""`VmManager`: VMs for programs, each in the hands of a runner process of its own.

The order of a start is SEEDS' A2: the VM is on record, its start lock is taken, capacity is taken,
the runner and QEMU start, the guest answers; each step has its own error, and a failure or
cancellation at any of them gives back what was taken.  Start lock and slot are taken here, where
the wait costs no process, and are inherited by the runner; nothing hangs on this process from then
on but the VMs that it does not keep, which end with it.

Where it stands: the public face of floor 4, over ``host.client``, ``host.registry``,
``host.capacity``.  A notebook's kernel is its own runner and goes by ``host.start`` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from vmkernel.errors import VmError, VmGuestError, VmNotFoundError, VmStateError
from vmkernel.host import names, runner_start
from vmkernel.host.client import Connection
from vmkernel.host.ending import end_vm
from vmkernel.host.handle import VmHandle
from vmkernel.host.openings import openings
from vmkernel.host.processes import identify_self
from vmkernel.host.registry import Registry, VmRecord, VmStatus, vm_dir, where_it_lives
from vmkernel.host.runner_start import STOP_SECONDS, OnProgress, TakeSlot, as_runner
from vmkernel.host.shielded import to_its_end
from vmkernel.host.start import Label, log_dir, remove_logs, settings_for_recipe, shared_slots
from vmkernel.models import ENDED, Language, VmState
from vmkernel.settings import (
    LoadedSettings,
    Settings,
    check_locked,
    check_names,
    dump_settings,
    load_settings_with_sources,
    restore_settings,
)

if TYPE_CHECKING:
    from types import TracebackType

    from vmkernel.host.capacity import QueuePosition, Slot, Statistics

_DEFAULT_MEMORY = Settings.__struct_defaults__[Settings.__struct_fields__.index("memory")]


class Unset:
    """Stands for "as the settings say", where None means something else."""


UNSET = Unset()


class VmManager:
    """Creates, finds and ends VMs.  Use it as an async context manager.

    ``settings`` None: as `vmkernel.settings.load_settings` finds them.  Many managers, in many
    processes, share one record and one capacity.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._sources: dict[str, str] = {}
        if settings is None:
            settings, self._sources = load_settings_with_sources()
        self.settings = settings
        self._registry = Registry(settings)
        self._created: dict[str, VmHandle] = {}
        self._starting: set[asyncio.Task[VmHandle]] = set()
        self._closed = False

    def __repr__(self) -> str:
        try:
            capacity = str(self.capacity())
        except VmError as error:
            capacity = error.message
        return f"<VmManager {len(self._created)} VMs of its own, {capacity}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the VMs that this manager created and does not keep, and give up what it starts.

        It starts nothing more.  Raises the first VmError of those ends, after all of them.
        """
        self._closed = True
        await to_its_end(self._close())

    async def _close(self) -> None:
        for starting in self._starting:
            starting.cancel()
        if self._starting:
            await asyncio.wait(self._starting)
        ends = [self._let_go(handle) for handle in list(self._created.values())]
        results = await asyncio.gather(*ends, return_exceptions=True)
        await asyncio.to_thread(self._registry.close)
        for failure in filter(None, results):
            raise failure

    # --- starts ---

    async def create_vm(
        self,
        *,
        language: Language | str | None = None,
        recipe: str | None = None,
        name: str = "",
        tenant_id: str = "",
        task_id: str = "",
        env: Mapping[str, str] | None = None,
        keep: bool = False,
        timeout: float | Unset | None = UNSET,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> VmHandle:
        """A new VM, running and awake.

        ``language`` or ``recipe`` says which image; else the setting ``recipe`` does.  ``name``,
        ``tenant_id`` and ``task_id`` are for the record and the logs; a name must be new.  ``env``
        is added to the environment of the VM's kernel.  ``keep``: the VM outlives this manager, and
        stays on record when it is stopped.  At capacity it waits for a slot, in order of arrival,
        at most ``timeout`` seconds (None: for ever; left out: the setting ``queue_timeout``);
        ``on_progress`` hears what is being waited for.  Other keywords are settings of this VM, as
        ``memory=512``.

        Raises SettingsError, RegistryError, VmStateError (the name is taken), VmCapacityError,
        ImageError, TemplateError, VmOverlayError, VmBootError, VmGuestError; none of them leaves
        anything behind, nor does cancelling it.
        """
        mine = self._settings_for(language, recipe, settings)
        record = await self._new_record(mine, name, tenant_id, task_id, keep)
        take = _waiting_for_slot(mine, record, timeout, on_progress)
        return await self._create(record, mine, env, take, on_progress)

    async def create_vm_nowait(
        self,
        *,
        language: Language | str | None = None,
        recipe: str | None = None,
        name: str = "",
        tenant_id: str = "",
        task_id: str = "",
        env: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> VmHandle | None:
        """As `create_vm`, if a slot is free and nobody waits for one; else None, at once."""
        mine = self._settings_for(language, recipe, settings)
        slot = shared_slots(mine).acquire_nowait()
        if slot is None:
            return None
        with slot:  # closed here; by then the runner has its own
            record = await self._new_record(mine, name, tenant_id, task_id, keep=False)

            async def take() -> Slot:
                return slot

            return await self._create(record, mine, env, take, on_progress)

    async def start_vm(
        self,
        vm: str,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float | Unset | None = UNSET,
        on_progress: OnProgress | None = None,
    ) -> VmHandle:
        """Start a VM that is on record and does not run, with the settings it was created with.

        It starts anew: what was in it when it ended is gone.  ``vm`` is its id, a unique beginning
        of that, or its name.  ``env``, ``timeout`` and ``on_progress`` as for `create_vm`.

        Raises VmNotFoundError, VmAlreadyStartingError, VmStateError (it runs), and what `create_vm`
        raises; then the VM stays on record, as FAILED.
        """
        record = await asyncio.to_thread(self._registry.get, vm)
        mine = restore_settings(msgspec.json.decode(record.settings or b"{}", type=dict[str, Any]))
        check_locked(mine)

        take = _waiting_for_slot(mine, record, timeout, on_progress)
        return await self._start(record, mine, env, take, on_progress)

    async def _create(
        self,
        record: VmRecord,
        settings: Settings,
        env: Mapping[str, str] | None,
        take_slot: TakeSlot,
        on_progress: OnProgress | None,
    ) -> VmHandle:
        try:
            return await self._start(record, settings, env, take_slot, on_progress)
        except BaseException as error:
            await to_its_end(
                runner_start.forget_failed(self._registry, self.settings, record, error)
            )
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise VmStateError("this manager is closed", hint="make another one")

    async def _start(
        self,
        record: VmRecord,
        settings: Settings,
        env: Mapping[str, str] | None,
        take_slot: TakeSlot,
        on_progress: OnProgress | None,
    ) -> VmHandle:
        self._check_open()
        starting = asyncio.ensure_future(
            runner_start.start_vm(
                self._registry, record, settings, env or {}, take_slot, on_progress
            )
        )
        self._starting.add(starting)
        try:
            handle = await starting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if starting.done() and not starting.cancelled() and starting.exception() is None:
                # It went well in the very moment: nobody else knows of this VM
                vm_id, late = record.vm_id, starting.result()
                ending = end_vm(self._registry, self.settings, vm_id, late, STOP_SECONDS)
                await to_its_end(ending)
            if self._closed and not (task and task.cancelling()):
                raise VmStateError(
                    f"the start of {record.vm_id} was given up: its manager was closed",
                    hint="start it by another one",
                ) from None
            raise
        finally:
            self._starting.discard(starting)
        self._created[record.vm_id] = handle
        if handle.runner is not None:
            handle.runner.on_end(lambda status: self._forget(handle, status))
        return handle

    def _forget(self, handle: VmHandle, status: int) -> None:
        """A VM of ours has ended by itself: it stays on record, like others that ended so.

        Not so when its runner was killed: what that left is cleared away at our end at the latest.
        """
        if status == 0 and self._created.get(handle.vm_id) is handle:
            del self._created[handle.vm_id]

    # --- ends ---

    async def stop_vm(self, vm: str | VmHandle, *, timeout: float = STOP_SECONDS) -> None:
        """End a VM; what is in it is lost, its slot is free when this returns.

        It stays on record as STOPPED, and can be started again when it was created with ``keep``.
        A notebook's VM is ended, its kernel gets another one with its next cell.  One that has
        ended already is left as it is.  One that does not end within ``timeout`` seconds is killed,
        with its runner.  Raises VmNotFoundError, RegistryError.
        """
        record = await self._find(vm)
        handle = self._created.pop(record.vm_id, vm if isinstance(vm, VmHandle) else None)
        await to_its_end(end_vm(self._registry, self.settings, record.vm_id, handle, timeout))

    async def destroy_vm(self, vm: str | VmHandle) -> None:
        """End a VM, if it has not ended, and forget it; again is harmless.

        Raises VmNotFoundError for an id that is not on record, RegistryError.
        """
        try:
            record = await self._find(vm)
        except VmNotFoundError:
            if isinstance(vm, VmHandle):
                return
            raise
        handle = self._created.pop(record.vm_id, vm if isinstance(vm, VmHandle) else None)
        await to_its_end(self._destroy(record, handle))

    async def _destroy(self, record: VmRecord, handle: VmHandle | None) -> None:
        await end_vm(self._registry, self.settings, record.vm_id, handle, STOP_SECONDS)
        await asyncio.to_thread(self._registry.remove, record.vm_id)
        remove_logs(self.settings, record.vm_id)

    async def _let_go(self, handle: VmHandle) -> None:
        """What becomes of a VM of ours when this manager closes."""
        if handle.record.kept:
            await handle.close()
            if handle.runner is not None:
                handle.runner.forget()
        else:
            with contextlib.suppress(VmNotFoundError):
                await self.destroy_vm(handle)

    # --- the record ---

    async def get_vm(self, vm: str) -> VmHandle:
        """A handle on a VM that runs, whoever has started it.

        Raises VmNotFoundError, VmStateError (it does not run, or is a notebook's), VmGuestError.
        """
        record = await asyncio.to_thread(self._registry.get, vm)
        own = self._created.get(record.vm_id)
        if own is not None and own.alive:
            return own
        status = await asyncio.to_thread(self._registry.status, record.vm_id)
        if record.kernel_id or record.connection_file:
            whose = (
                f"notebook {record.notebook}"
                if record.notebook
                else f"Jupyter kernel {record.kernel_id}"
            )
            raise VmStateError(
                f"{record.vm_id} belongs to the {whose}",
                hint="talk to its kernel: jupyter console --existing "
                + (record.connection_file or f"kernel-{record.kernel_id}.json"),
            )
        if status.state is not VmState.RUNNING:
            raise VmStateError(
                f"{record.vm_id} does not run: it is {status.state}"
                + (f" ({record.exit_cause})" if record.exit_cause else ""),
                hint=f"vmkernel start {record.name or record.vm_id}",
            )
        try:
            connection = await Connection.reach(Path(record.directory))
        except OSError as error:
            raise VmGuestError(
                f"{record.vm_id}'s runner, pid {record.runner_pid}, cannot be reached: {error}",
                hint="is it about to end? See `vmkernel ps`",
            ) from error
        slots = shared_slots(where_it_lives(record, self.settings))
        return VmHandle(record, connection, slots, self.settings.max_output)

    async def list_vms(self, *, ended: bool = False) -> list[VmStatus]:
        """The VMs on record, the oldest first; with ``ended``, also those that are no more."""
        return await asyncio.to_thread(lambda: self._registry.list(ended=ended))

    async def update_vm(self, vm: str, **changes: Any) -> VmRecord:
        """Change ``name``, ``tenant_id``, ``task_id`` of a VM, or settings of one that has ended.

        Raises VmNotFoundError, VmStateError (it runs, or the name is taken), SettingsError.
        """
        record = await asyncio.to_thread(self._registry.get, vm)
        plain = {name: value for name, value in changes.items() if name in names.MOST}
        settings = {name: value for name, value in changes.items() if name not in names.MOST}
        names.check_words(plain)
        check_names(settings)

        def change(record: VmRecord) -> dict[str, Any]:
            if not settings:
                return plain
            if record.state not in (VmState.CREATED, *ENDED):
                raise VmStateError(
                    f"{record.vm_id} is {record.state}: its settings cannot be changed now",
                    hint=f"vmkernel stop {record.name or record.vm_id}",
                )
            values = msgspec.json.decode(record.settings or b"{}", type=dict[str, Any])
            mine = restore_settings(values | settings)
            return {
                **plain,
                "settings": _encode(mine),
                "recipe": mine.recipe,
                "memory": mine.memory,
                "vcpus": mine.vcpus,
            }

        return await asyncio.to_thread(self._registry.change, record.vm_id, change)

    def capacity(self) -> Statistics:
        """Limit, used, free and waiting, over all who share the semaphore file."""
        return shared_slots(self.settings).statistics()

    # --- odds and ends ---

    async def _find(self, vm: str | VmHandle) -> VmRecord:
        """By an id, its beginning or a name; a handle's VM is the one with that very id."""
        if isinstance(vm, str):
            return await asyncio.to_thread(self._registry.get, vm)
        return await asyncio.to_thread(self._registry.exactly, vm.vm_id)

    async def _new_record(
        self,
        settings: Settings,
        name: str,
        tenant_id: str,
        task_id: str,
        keep: bool,
    ) -> VmRecord:
        from vmkernel.image.store import find_image

        names.check_words({"name": name, "tenant_id": tenant_id, "task_id": task_id})
        fields = {
            "name": name,
            "tenant_id": tenant_id,
            "task_id": task_id,
            "kept": keep,
            "recipe": settings.recipe,
            "language": find_image(settings.recipe, settings).recipe.language.name,
            "memory": settings.memory,
            "vcpus": settings.vcpus,
            "settings": _encode(settings),
            **openings(settings, Label(env={})),  # until its runner tells
            **as_runner(identify_self()),
        }

        def add() -> VmRecord:
            record = self._registry.new(**fields)
            return self._registry.update(
                record.vm_id,
                directory=str(vm_dir(settings, record.vm_id)),
                log_dir=str(log_dir(settings, record.vm_id)),
            )

        adding = asyncio.ensure_future(asyncio.to_thread(add))
        try:
            return await asyncio.shield(adding)
        except asyncio.CancelledError:
            with contextlib.suppress(VmError):  # the thread goes on to its end, whatever we do
                record = await to_its_end(adding)
                await to_its_end(asyncio.to_thread(self._registry.remove, record.vm_id))
            raise

    def _settings_for(
        self, language: Language | str | None, recipe: str | None, changes: dict[str, Any]
    ) -> Settings:
        """The settings of one VM.  Raises SettingsError, ImageError."""
        from vmkernel.image.store import recipe_for_language

        check_names(changes)
        settings = msgspec.structs.replace(self.settings, **changes)
        if recipe is None and language is not None:
            recipe = recipe_for_language(str(language), settings)
        if recipe is not None:
            settings = msgspec.structs.replace(settings, recipe=recipe)
        check_locked(settings)
        sources = self._sources | dict.fromkeys(changes, "the program")
        if self.settings.memory != _DEFAULT_MEMORY:
            sources["memory"] = "the program"
        return settings_for_recipe(LoadedSettings(settings, sources))


def _waiting_for_slot(
    settings: Settings,
    record: VmRecord,
    timeout: float | Unset | None,
    on_progress: OnProgress | None,
) -> TakeSlot:
    def tell(place: QueuePosition) -> None:
        if on_progress is not None:
            on_progress(place.text)

    async def take() -> Slot:
        return await shared_slots(settings).acquire(
            on_wait=tell,
            timeout=settings.queue_timeout if isinstance(timeout, Unset) else timeout,
            label=record.vm_id,
        )

    return take


def _encode(settings: Settings) -> str:
    return msgspec.json.encode(dump_settings(settings)).decode()
