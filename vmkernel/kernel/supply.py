"""Where the wrapper's guest comes from: started ahead, kept, replaced when it died.

A start that failed is told to whoever asked, and tried again for the next one who asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from vmkernel import trace
from vmkernel.environment import in_words
from vmkernel.errors import VmCapacityError, VmError, VmExpiredError, VmGuestError
from vmkernel.host.openings import in_a_line, openings
from vmkernel.host.registry import vm_dir
from vmkernel.host.start import Label, Started, VmStart, environment
from vmkernel.kernel.notify import CAPACITY, notify
from vmkernel.vm.oddities import Oddities

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmkernel.host.guest import Guest, KernelDeath
    from vmkernel.host.limits import TimeLimits
    from vmkernel.image.store import Manifest
    from vmkernel.protocol import messages
    from vmkernel.settings import Settings

log = logging.getLogger("vmkernel")

Show = Callable[[str], None]
OLD_NEWS = 2.0
"""Seconds after which a failed start that nobody has heard of may be tried again."""
ADOPT_SECONDS = 10.0
"""How long a guest that waited may take to be a kernel's: else it is replaced."""
CLOCK_SLACK = 0.5
"""Seconds by which the clocks' difference may change before the guest's clock is set again."""


class Owner(Protocol):
    """Who hears of the guest: the wrapper."""

    def on_output(self, message: messages.FromGuest, buffers: Sequence[memoryview]) -> bool:
        """The guest kernel sent a message; returns whether nobody waits for such a one."""

    def on_kernel_death(self, death: KernelDeath) -> None:
        """The guest kernel ended."""

    def on_vm_end(self, error: VmError) -> None:
        """The VM ended."""


class GuestSupply:
    """At most one guest at a time, for one wrapper."""

    def __init__(
        self,
        settings: Settings,
        label: Label,
        begun: Started | None,
        owner: Owner,
        final: VmError | None = None,
    ) -> None:
        """``final``: no start can succeed, and this is why (wrong settings)."""
        self.oddities = Oddities()
        """What the guest does that no guest should"""
        self.current: Guest | None = None
        self.failed: VmError | None = None
        """Why the last start failed; None when it did not."""
        self._settings = settings
        self._label = label
        self._begun = begun
        self.owner = owner
        """Who hears of the guest"""
        self._waiting = False
        self._final = final
        self._start: VmStart | None = None
        self._starting: asyncio.Task[Guest] | None = None
        self._replacing = False
        self._ended = asyncio.Event()
        self._show: Show | None = None
        self._text = ""
        self._info: dict[str, Any] | None = None
        self._accelerator = ""
        self._started_at = 0.0
        self._failed_at = 0.0
        self._clock = 0.0
        self._closing: set[asyncio.Task[None]] = set()
        self._limits: TimeLimits | None = None
        """Those of the VM that runs, where it has any"""

    def start_early(self) -> None:
        """Begin a start before anyone asks; its failure is told to the first who does, if soon."""
        if self.current is not None or self._starting is not None:
            return
        self._starting = asyncio.create_task(self._bring_up())
        self._starting.add_done_callback(_seen)

    async def guest(self, show: Show | None) -> Guest:
        """The guest, brought up if need be.  Cancelling the wait cancels the start.

        ``show`` hears what is being waited for.  Raises VmError.
        """
        if self.current is not None and not self.current.vm.kernel.connected:
            await self._ended.wait()  # it is dying: _on_end will tell how, then there is a new one
        if self.current is not None:
            if self._limits is not None:
                self._limits.touch()  # it must not end while somebody is about to use it
            await self._keep_time(self.current)
            return self.current
        if self._starting is None or self._is_old_news():
            self._starting = asyncio.create_task(self._bring_up())
            self._starting.add_done_callback(_seen)
        starting = self._starting
        if show is not None:
            self._show = show
            if self._text:
                show(self._text)
        try:
            # A question from an editor must not end the start when it gives up; nor an interrupt
            # the replacement of a kernel, whose VM holds the user's files.
            if show is None or self._replacing:
                return await asyncio.shield(starting)
            return await starting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if show is not None or not starting.cancelled() or (task and task.cancelling()):
                raise
            # Somebody else's wait was interrupted, and the start with it: this one is answered
            raise VmError(
                "the start of the VM was interrupted", hint="run a cell, which starts one"
            ) from None
        finally:
            self._show = None
            if starting.done() and self._starting is starting:
                self._starting = None

    def wait_for_a_kernel(self) -> None:
        """The guest is to be nobody's for the time being: no limit on its time runs."""
        self._waiting = True

    def assign(self, label: Label) -> None:
        """The guest that waited is this kernel's now; it runs nothing before it knows that."""
        self._waiting = False
        self._label = label
        guest, self.current = self.current, None
        if self._start is not None and guest is not None:
            self._start.assign(label)
            self._replacing = True  # an interrupt is not meant for this
            self._starting = asyncio.create_task(self._adopt(guest))
            self._starting.add_done_callback(_seen)

    def _is_old_news(self) -> bool:
        """Whether a start failed before anyone asked, longer ago than it would take to try again.

        What was in its way may be gone: a slot is free by now, an image was built.
        """
        if self._starting is None or not self._starting.done() or self.failed is None:
            return False
        took = self._failed_at - self._started_at
        return time.monotonic() - self._failed_at > max(took, OLD_NEWS)

    def kernel_died(self) -> None:
        """The guest kernel is gone: put a new one into the same VM."""
        guest, self.current = self.current, None
        if guest is not None:  # else it is being started: that start fails of it
            self._replacing = True
            self._starting = asyncio.create_task(self._replace_kernel(guest))
            self._starting.add_done_callback(_seen)

    def give_up(self, why: str) -> None:
        """End a VM in which no guest kernel stays: the next one who asks gets another."""
        start = self._start
        if start is not None:
            error = VmGuestError(f"The VM was ended: {why}", hint="run the cell again in a new VM")
            self._on_end(start, error)

    def charge(self, cost: float) -> None:
        """The guest kernel sent what costs more than its size says (`vm.pace`)."""
        if self.current is not None:
            self.current.charge(cost)

    def note_work(self, busy: bool) -> None:
        """Whether the guest has something to do."""
        if self._limits is not None:
            self._limits.note(busy)

    def pause(self, until: Callable[[Callable[[], None]], None]) -> None:
        """Stop reading from the guest until front ends have caught up."""
        guest = self.current
        if guest is not None:
            guest.vm.kernel.pause("front ends")
            until(lambda: guest.vm.kernel.resume("front ends"))

    async def close(self) -> None:
        """End the VM, or its start."""
        self._end_limits()
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, VmError):
                await self._starting
        self.current = None
        if self._begun is not None:  # cancelled before its first step
            begun, self._begun = self._begun, None
            self._start = VmStart(self._settings, self._label, begun)
        if self._start is not None:
            await self._start.close()
        if self._closing:
            await asyncio.wait(self._closing)

    # --- facts ---

    def directory(self) -> Path | None:
        """Where a socket of this VM may lie: it goes with the VM.  None when there is none."""
        if self._start is None or not self._start.vm_id:
            return None
        self._start.directory = vm_dir(self._settings, self._start.vm_id)
        return self._start.directory

    def touch(self) -> None:
        """The VM was used by somebody: its idle time begins anew."""
        if self._limits is not None:
            self._limits.touch()

    @property
    def connection_file(self) -> str:
        """This kernel's, with the key to it."""
        return self._label.connection_file

    def guest_info(self) -> dict[str, Any] | None:
        """The guest kernel's kernel_info, once a template is known."""
        if self._info is None and self._begun is not None:
            self._info = self._begun.template.manifest.kernel_info
        return self._info

    def manifest(self) -> Manifest | None:
        """The image's, with its recipe; None when there is no image."""
        from vmkernel.image.store import find_image

        with contextlib.suppress(VmError):
            return find_image(self._settings.recipe, self._settings).manifest
        return None

    def facts(self) -> str:
        """One line about this kernel's VM."""
        accelerator = self._accelerator
        if not accelerator and self._begun is not None:
            accelerator = self._begun.spawned.machine.accelerator
        shown = self._start.workspace.in_words if self.current is not None and self._start else None
        return (
            f"recipe: {self._settings.recipe}, memory: {self._settings.memory} MiB, "
            f"accelerator: {accelerator or 'not known yet'}, "
            + in_a_line(openings(self._settings, self._label, shown))
        )

    def describe(self) -> dict[str, str]:
        """What ``%vm`` shows of the VM and its settings, by name."""
        settings = self._settings
        record = self._start.record if self._start is not None else None
        facts = {
            "kernel": self._label.kernel_id,
            "VM": record.vm_id if record is not None else "none yet",
            "recipe": settings.recipe,
            "memory": f"{settings.memory} MiB",
            "vcpus": str(settings.vcpus),
            **self._limits_in_words(),
            "scratch disk": f"{settings.scratch_size} MiB, gone with the VM",
            "accelerator": self._accelerator or "not known yet",
            "outputs": settings.outputs,
            "workspace": self._start.workspace.in_words if self._start is not None else "none yet",
            "network": self._network_in_words(),
            "files": settings.files,
        }
        given = in_words(settings.env, settings.env_file, os.environ)
        if given:
            facts["environment"] = given
        if record is not None:
            facts["age"] = f"{max(0.0, time.time() - record.created):.0f} s"
            facts["slot"] = f"{record.slot} of {settings.max_concurrent_vms}"
        if self.oddities.total:
            facts["dropped"] = self.oddities.in_words()
        return facts

    def _network_in_words(self) -> str:
        if self._settings.network == "none":
            return "none"
        from vmkernel.host.network import in_words as network_in_words

        return network_in_words(self._settings)

    def _limits_in_words(self) -> dict[str, str]:
        from vmkernel.host.limits import spoken
        from vmkernel.vm.limits import Limits, describe, find_holder

        settings = self._settings
        words = {}
        if settings.cpu_quota is not None:
            limits = Limits(settings.memory, settings.cpu_quota)
            words["CPU"] = describe(limits, find_holder(os.geteuid(), os.environ))
        if settings.lifetime is not None:
            words["lifetime"] = f"{spoken(settings.lifetime)}, then it is ended"
        if settings.idle_timeout is not None:
            words["idle time-out"] = f"{spoken(settings.idle_timeout)}, then it is ended"
        return words

    async def usage(self) -> dict[str, Any]:
        """The content of a ``usage_reply``: what the guest kernel and its machine use."""
        from vmkernel.kernel.usage import usage

        return await usage(self.current, self._settings.memory, self._settings.vcpus)

    # --- work ---

    async def _bring_up(self) -> Guest:
        if self._final is not None:
            self.failed = self._final
            self._notify_failure(self._final)
            raise self._final
        begun, self._begun = self._begun, None
        if begun is not None:
            self._info = begun.template.manifest.kernel_info
            self._accelerator = begun.spawned.machine.accelerator
        start = self._start = VmStart(self._settings, self._label, begun)
        start.oddities = self.oddities
        start.on_slot = lambda: self._notify(ready=True)
        self.failed = None
        self._started_at = time.monotonic()
        self._text = ""
        try:
            guest = await start.guest(
                on_output=self._on_output if self._waiting else self.owner.on_output,
                on_kernel_death=self._on_kernel_death,
                on_end=lambda error: self._on_end(start, error),
                progress=self._progress,
            )
        except BaseException as error:
            self.failed = error if isinstance(error, VmError) else None
            if self.failed is not None:
                self._notify_failure(self.failed)
            self._failed_at = time.monotonic()
            self._start = None
            raise
        assert start.template is not None
        self._info = start.template.manifest.kernel_info
        self._accelerator = start.accelerator
        if start.warning:
            log.warning(start.warning)
        self.current = guest
        self._set_limits()
        self._ended.clear()
        self._clock = time.time() - time.monotonic()
        self._text = ""
        self._notify("running")
        return guest

    async def _adopt(self, guest: Guest) -> Guest:
        """Give a guest that waited its kernel's environment, fresh entropy and the right time."""
        from vmkernel.protocol import messages

        self._notify("running", ready=True)
        timeout = min(ADOPT_SECONDS, self._settings.start_timeout)
        try:
            env = environment(self._label, self._settings)
            start = self._start
            async with asyncio.TaskGroup() as group:
                if start is not None:
                    start.choose_workspace(guest)
                    group.create_task(start.show_workspace(guest))
                group.create_task(guest.set_environment(env, timeout))
                group.create_task(guest.vm.agent.call(messages.SetClock(time.time_ns()), timeout))
        except* VmError as errors:
            # Nothing of the user's was in it
            log.warning("a VM of the pool is replaced: %s", errors.exceptions[0])
            start, self._start = self._start, None
            if start is not None:
                await start.close(keep_logs=True, cause=str(errors.exceptions[0]))
        finally:
            self._replacing = False
        if self._start is None:
            return await self._bring_up()
        trace.mark("guest told whose it is")
        self._clock = time.time() - time.monotonic()
        self.current = guest
        self._set_limits()
        return guest

    async def _replace_kernel(self, guest: Guest) -> Guest:
        try:
            await guest.restart_kernel(self._settings.boot_timeout)
        except BaseException as error:
            # This VM cannot carry a kernel any more: the next one who asks gets a new VM.
            self._end_limits()
            start, self._start = self._start, None
            if start is not None:
                await start.close(keep_logs=True, cause=str(error))
            if isinstance(error, VmError):
                error.message += (
                    ". The VM was given up, its files are lost; the next cell gets a new one"
                )
            raise
        finally:
            self._replacing = False
        self.current = guest
        return guest

    async def _keep_time(self, guest: Guest) -> None:
        """After the host slept or its clock was set, the guest's clock must follow."""
        clock = time.time() - time.monotonic()
        if abs(clock - self._clock) > CLOCK_SLACK:
            from vmkernel.protocol import messages

            await guest.vm.agent.call(messages.SetClock(time.time_ns()))
            self._clock = clock

    def _progress(self, text: str) -> None:
        self._text = text
        self._notify(text)
        if self._show is not None:
            self._show(text)

    def _notify(self, status: str = "", *, ready: bool = False) -> None:
        if not self._waiting:  # else the environment is not its kernel's
            notify(status, ready=ready)

    def _notify_failure(self, error: VmError) -> None:
        if not self._waiting:
            number = CAPACITY if isinstance(error, VmCapacityError) else errno.EIO
            notify(error.message, error=number, hint=error.hint)

    def _set_limits(self) -> None:
        settings, start = self._settings, self._start
        if (settings.lifetime, settings.idle_timeout) == (None, None) or start is None:
            return
        if self._waiting:  # they count from the hand-over
            return
        from vmkernel.host.limits import TimeLimits

        def over(error: VmExpiredError) -> None:
            self._on_end(start, error)

        self._limits = TimeLimits(settings.lifetime, settings.idle_timeout, over)

    def _end_limits(self) -> None:
        limits, self._limits = self._limits, None
        if limits is not None:
            limits.close()

    def _on_output(self, message: messages.FromGuest, buffers: Sequence[memoryview]) -> bool:
        return self.owner.on_output(message, buffers)  # another one, once it is a kernel's

    def _on_kernel_death(self, death: KernelDeath) -> None:
        self.owner.on_kernel_death(death)

    def _on_end(self, start: VmStart, error: VmError) -> None:
        if self._start is not start:
            return
        self._end_limits()
        self.current = None
        self._ended.set()
        self._start = None
        if self._starting is not None and self._starting.done():
            self._starting = None
        failed = not isinstance(error, VmExpiredError)
        task = asyncio.create_task(start.close(keep_logs=failed, cause=str(error)))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self.owner.on_vm_end(error)


def _seen(task: asyncio.Task[Guest]) -> None:
    """Mark a failed start as seen: whoever asks next is told."""
    if not task.cancelled():
        task.exception()
