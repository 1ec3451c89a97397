"""Writing a VM's life down, beside that life: each change in a thread, in their order.

A change of the record waits for the disk, and for whoever else writes; the event loop of a wrapper
kernel or a runner must not.  Where it stands: under ``host.start``, over ``host.registry``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmkernel.errors import RegistryError, VmNotFoundError, VmStateError
from vmkernel.host.registry import Registry, VmRecord
from vmkernel.models import VmState

if TYPE_CHECKING:
    import asyncio

    from vmkernel.settings import Settings

PATIENCE = 1.0
"""Seconds that a notebook's kernel waits for its VM to be on record."""
_TOLD_BY_ITS_PROCESS = (
    "state", "boot_id", "runner_pid", "runner_start", "qemu_pid", "qemu_start", "slot",
    "slot_lease", "template", "recipe", "accelerator", "memory", "vcpus", "log_dir",
    "workspace", "network", "environment", "files",
)  # fmt: skip
"""What of a row is the runner's to fill in; the rest is whoever put the VM on record."""


class Recorder:
    """The record of one VM, as the process that owns it keeps it.

    ``vm_id`` of a VM that is on record already: then a change that fails is an error.  A notebook's
    VM ("") is put on record here, as well as can be: all that matters of it is in the process table
    and in locks, and a full disk or a locked database should not keep a person from a kernel.
    """

    def __init__(self, settings: Settings, vm_id: str) -> None:
        self._registry = Registry(settings)
        self._strict = bool(vm_id)
        self._vm_id = vm_id
        self._last: asyncio.Future[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether anything was written."""
        return self._last is not None

    def write(self, change: Callable[[], object]) -> None:
        """Make a change, after the change before, whatever became of that."""
        import asyncio

        before = self._last

        async def write() -> None:
            if before is not None:
                await asyncio.wait([before])
            await asyncio.to_thread(self._make, change)

        self._last = asyncio.ensure_future(write())
        self._last.add_done_callback(_seen)

    async def written(self) -> None:
        """Wait until what was written last is on record.

        Raises VmError when it is not, and the VM was on record before.
        """
        import asyncio

        assert self._last is not None
        # Neither way is the write itself cancelled: what is written next must come after it.
        if self._strict:
            await asyncio.shield(self._last)
        else:
            await asyncio.wait([self._last], timeout=PATIENCE)

    def waiting(self, record: VmRecord) -> None:
        """It waits for a slot."""
        self._vm_id = record.vm_id
        if not self._strict:
            self.write(lambda: self._registry.add(record))

    def starting(self, record: VmRecord) -> None:
        """Its QEMU was started."""
        self._vm_id = record.vm_id
        if self._strict:
            told = {name: getattr(record, name) for name in _TOLD_BY_ITS_PROCESS}
            self.write(lambda: self._registry.update(record.vm_id, **told))
        else:
            self.write(lambda: self._registry.add(record))

    def running(self, record: VmRecord) -> None:
        """Its guest is awake.  ``record`` says which process is QEMU."""

        def change() -> None:
            with suppress(VmNotFoundError):  # it could not be put on record
                self._registry.update(
                    self._vm_id,
                    state=VmState.RUNNING,
                    started=time.time(),
                    qemu_pid=record.qemu_pid,
                    qemu_start=record.qemu_start,
                )

        self.write(change)

    def changed(self, **fields: Any) -> None:
        """It is another's, or for something else, by now."""

        def change() -> None:
            with suppress(VmNotFoundError):
                self._registry.update(self._vm_id, **fields)

        self.write(change)

    def stopping(self) -> None:
        """It is about to end."""

        def change() -> None:
            with suppress(VmNotFoundError, VmStateError):
                self._registry.update(self._vm_id, state=VmState.STOPPING)

        self.write(change)

    def ended(self, *, failed: bool, cause: str) -> None:
        """Nothing of it lives; the first line of ``cause`` is kept."""
        state = VmState.FAILED if failed else VmState.STOPPED
        line = cause.partition("\n")[0]

        def change() -> None:
            with self._registry, suppress(VmNotFoundError, VmStateError):  # settled by a sweep
                self._registry.update(self._vm_id, state=state, ended=time.time(), exit_cause=line)

        self.write(change)

    def _make(self, change: Callable[[], object]) -> None:
        try:
            change()
        except RegistryError as error:
            if self._strict:
                raise
            import logging

            logging.getLogger(__name__).warning(
                "VM %s is not on record as it is: %s", self._vm_id, error
            )


def _seen(task: asyncio.Future[None]) -> None:
    """Mark a failure as seen: who waits for it is told, or nobody."""
    if not task.cancelled():
        task.exception()
