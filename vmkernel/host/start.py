"""Starting a VM, from nothing to a guest that is awake: the one staircase for everyone.

The order is fixed: record, slot, accelerator, template, QEMU, state, wake-up.  Each step has
its own error, and a failure or cancellation at any of them gives back what was taken.

A start whose parts are all at hand (a free slot, a known accelerator, a template) can be
begun before the event loop, by :func:`begin`: QEMU then comes up while the wrapper kernel is
still importing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmkernel import trace
from vmkernel.environment import Variables
from vmkernel.errors import (
    ImageError,
    VmBootError,
    VmError,
    VmGuestError,
)
from vmkernel.host import registry
from vmkernel.host.capacity import QueuePosition, Semaphore, Slot, boot_slots, vm_slots
from vmkernel.host.openings import openings
from vmkernel.host.processes import identify, tag_of
from vmkernel.host.recording import Recorder
from vmkernel.host.shielded import to_its_end
from vmkernel.host.trees import remove_tree
from vmkernel.host.workspace import Choice, choose
from vmkernel.models import ENDED, VmState
from vmkernel.vm import accel
from vmkernel.vm.machine import Spawned, spawn
from vmkernel.vm.qemu import find_qemu
from vmkernel.vm.sandbox import find_wall, need_libraries
from vmkernel.vm.template import Spec, Template, ensure_template, find_template

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest, KernelDeath, OnOutput
    from vmkernel.host.network import Network
    from vmkernel.host.workspace_gate import Gate
    from vmkernel.settings import LoadedSettings, Settings
    from vmkernel.vm.command import Accelerator
    from vmkernel.vm.oddities import Oddities

KEPT_LOGS = 20
"""How many failed VMs' logs are kept."""

_YOUNG = 60_000_000_000  # nanoseconds

Progress = Callable[[str], None]
"""progress(one line for a person: what is being waited for)"""


class Label(msgspec.Struct, frozen=True):
    """Whose VM it is, for the record, and what its guest is told of its owner."""

    kernel_id: str = ""
    connection_file: str = ""
    vm_id: str = ""
    """A VM that is on record already; "" for one that is not."""
    env: dict[str, str] | None = None
    """Added to the guest kernel's environment; None: what a notebook gets of ours."""
    notebook: str = ""
    """Where its process does not tell: that of a pool has the environment of its server."""
    task_id: str = ""
    directory: str = ""
    """Where its owner works: the workspace, unless a setting names another."""


class Started(msgspec.Struct):
    """A clone whose QEMU has been started."""

    record: registry.VmRecord
    template: Template
    spawned: Spawned
    env: dict[str, str]
    """What its guest kernel gets; read once, since a file of variables may change."""
    workspace: Choice


def settings_for_recipe(loaded: LoadedSettings) -> Settings:
    """The settings, with the recipe's memory where no source of settings names one."""
    from vmkernel.image.store import find_image

    settings, sources = loaded
    if "memory" not in sources:
        with suppress(ImageError):  # told when the VM is started
            memory = find_image(settings.recipe, settings).recipe.memory
            if memory is not None:
                return msgspec.structs.replace(settings, memory=memory)
    return settings


def spec_for(settings: Settings, accelerator: Accelerator) -> Spec:
    """What the template of these settings is made from.  Raises ImageError, VmBootError."""
    from vmkernel.image.store import find_image
    from vmkernel.vm.tsc import host_tsc_khz

    qemu = find_qemu(settings.qemu, os.environ.get("PATH", os.defpath))
    image = find_image(settings.recipe, settings)
    shared = None
    if settings.shared_dir is not None:
        from vmkernel.shared import shared_facts

        shared = shared_facts(settings)
    kernel, kernel_digest = "", ""
    if settings.kernel_path is not None:
        from vmkernel.vm.guestkernel import own_kernel

        kernel, kernel_digest = own_kernel(settings.kernel_path, image, settings.state_dir)
    return Spec(
        image=image,
        kernel=kernel,
        kernel_digest=kernel_digest,
        qemu=qemu,
        qemu_version=accel.qemu_version(qemu, settings.state_dir),
        accelerator=accelerator,
        memory=settings.memory,
        vcpus=settings.vcpus,
        scratch_size=settings.scratch_size,
        tsc_khz=host_tsc_khz(settings.state_dir, shared) if accelerator == "tcg" else 0,
    )


def begin(settings: Settings, label: Label, slot: Slot | None = None) -> Started | None:
    """Start a clone at once, if nothing has to be waited for; else None.  Needs no event loop.

    With ``slot`` in that, or (left as it is when nothing could be begun) with one that is free.
    From the main thread.  Raises VmError for what waiting would not mend.
    """
    choice = accel.remembered_choice(settings)
    if choice is None:
        return None
    spec = spec_for(settings, choice.accelerator)
    template = find_template(spec, settings)
    if template is None:
        return None
    env, workspace = environment(label, settings), workspace_of(label, settings)
    slot = slot or shared_slots(settings).acquire_nowait(label=label.kernel_id)
    if slot is None:
        return None
    with slot:
        record = _new_record(
            settings, label, workspace
        )  # written down by VmStart, while QEMU loads
        try:
            return _spawn_clone(settings, spec, template, record, slot, env, workspace)
        except BaseException:
            remove_tree(log_dir(settings, record.vm_id))  # the next attempt has its own
            raise


def shared_slots(settings: Settings) -> Semaphore:
    """The process's one view of the semaphore file: it remembers a file that was replaced."""
    key = (settings.semaphore_file, settings.max_concurrent_vms, settings.max_vms_per_user)
    if key not in _semaphores:
        _semaphores[key] = vm_slots(settings)
    return _semaphores[key]


_semaphores: dict[tuple[Path, int, int | None], Semaphore] = {}


class VmStart:
    """One VM on its way up, and its end: ``start.guest(…)``, later ``start.close()``."""

    def __init__(
        self,
        settings: Settings,
        label: Label,
        begun: Started | None = None,
        slot: Slot | None = None,
    ) -> None:
        """``begun``: by :func:`begin`.  ``slot``: it has one already and need not queue."""
        self.settings = settings
        self.label = label
        self.warning: str | None = None
        self.accelerator = ""
        self.template: Template | None = None
        self.vm_id = ""
        self.record: registry.VmRecord | None = None
        """What is known of the VM once QEMU was started"""
        self.oddities: Oddities | None = None
        """Where what the guest does wrong is counted; None: in the guest's own"""
        self.on_slot: Callable[[], None] = lambda: None
        """Called when the VM has its slot"""
        self._begun = begun
        self._slot = slot
        self.directory: Path | None = None
        """Removed at the VM's end: a runner's."""
        self._guest: Guest | None = None
        self._spawned: Spawned | None = None
        self._network: Network | None = None
        self.workspace = Choice()
        """What of the host's files the guest sees, or why none"""
        self.gate: Gate | None = None
        """The way to them"""
        self._recorder = Recorder(settings, label.vm_id)

    async def guest(
        self,
        *,
        on_output: OnOutput,
        on_kernel_death: Callable[[KernelDeath], None],
        on_end: Callable[[VmError], None],
        progress: Progress,
    ) -> Guest:
        """Bring the VM up and wake it.  Raises VmError; cancelling it leaves nothing behind."""
        from vmkernel.host.guest import Guest

        begun, self._begun = self._begun, None
        awake = False

        def end(error: VmError) -> None:
            if awake:  # until then the step that fails of it tells of it
                on_end(error)

        try:
            started = begun or await self._start(progress)
            if begun is not None:
                self.on_slot()
                self._recorder.starting(begun.record)
            self.template = started.template
            self.record = started.record
            self.vm_id = started.record.vm_id
            self.accelerator = started.spawned.machine.accelerator
            self._spawned = started.spawned
            self.workspace = started.workspace
            guest = self._guest = Guest(
                started.spawned,
                started.env,
                on_output=on_output,
                on_kernel_death=on_kernel_death,
                on_end=end,
                oddities=self.oddities,
                cwd=started.workspace.path,
            )
            guest.notice = self.workspace.notice
            console = log_dir(self.settings, self.vm_id) / "console.log"
            await guest.vm.attach(console, self.settings.console_log_size << 20)
            await guest.vm.load(self.settings.start_timeout)
            trace.mark("state loaded")
            # Until now that of bubblewrap, if there is one around it
            qemu = identify(guest.vm.process.qemu_pid)
            if qemu is not None:
                pids = {"qemu_pid": qemu.pid, "qemu_start": qemu.start_time}
                self.record = msgspec.structs.replace(started.record, **pids)
            if self.settings.network != "none":
                from vmkernel.host.network import Network

                log_path = log_dir(self.settings, self.vm_id) / "network.log"
                self._network = Network(self.settings, started.spawned, log_path, guest.tell)
            await guest.wake(self.settings.start_timeout, self._network, self.show_workspace)
            await self._recorder.written()
            awake = True
            trace.mark("guest awake")
            self._recorder.running(self.record)
            if self.label.vm_id:  # who is told that it runs will look it up
                await self._recorder.written()
            if begun is not None:  # begin() was in a hurry; what it left undone delays nobody now
                self._recorder.write(lambda: _tidy(self.settings))
        except BaseException as error:
            failure = error
            if isinstance(error, OSError) and not isinstance(error, VmError):
                failure = VmBootError(
                    f"the VM could not be started: {error}",
                    hint="`vmkernel doctor` looks at disk space and permissions",
                )
            try:
                if isinstance(failure, VmError):
                    failure = await self._explain(failure)
            finally:
                await self.close(
                    keep_logs=isinstance(failure, VmError),
                    cause=str(failure)
                    if isinstance(failure, VmError)
                    else "its start was given up",
                )
            if failure is not error:
                raise failure from error
            raise
        return guest

    def assign(self, label: Label) -> None:
        """Whose VM it is from now on, also on record."""
        self.label = label
        told = {
            "kernel_id": label.kernel_id,
            "connection_file": label.connection_file,
            "notebook": label.notebook,
            "task_id": label.task_id,
            "created": time.time(),  # the age that people ask for is the kernel's
            **openings(self.settings, label),
        }
        if self.record is not None:
            self.record = msgspec.structs.replace(self.record, **told)
            self._recorder.changed(**told)

    async def close(self, *, keep_logs: bool = False, cause: str = "") -> None:
        """End the VM, whatever state it is in, and say on record that it ended.

        ``keep_logs`` when it failed: the newest logs of failed VMs stay in ``state_dir/logs``.
        ``cause`` is why, for the record; its first line is kept.
        Goes to its end even when it is cancelled: nobody else would reap QEMU and the record.
        """
        await to_its_end(self._close(keep_logs, cause))

    async def _close(self, keep_logs: bool, cause: str) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.spawned.abandon()
            self.vm_id = begun.record.vm_id
        guest, self._guest = self._guest, None
        try:
            if self.label.vm_id and self._recorder.begun:  # others may want to start it again
                self._recorder.stopping()
            gate, self.gate = self.gate, None
            if gate is not None:
                gate.close()
            network, self._network = self._network, None
            if network is not None:
                await network.close()
            if guest is not None:
                await guest.close()
                if guest.vm.process.called_what_is_absent:
                    need_libraries(self.settings, guest.vm.machine.qemu)
        finally:
            # The record comes last: from then on the VM may be started again, by others
            if self.directory is not None:
                remove_tree(self.directory)
            if self.vm_id and not keep_logs:
                remove_tree(log_dir(self.settings, self.vm_id))
            recorder, self._recorder = self._recorder, Recorder(self.settings, self.label.vm_id)
            if recorder.begun:
                recorder.ended(failed=keep_logs, cause=cause)
                with suppress(VmError):  # told already, or of no interest now
                    await recorder.written()

    def choose_workspace(self, guest: Guest) -> None:
        """Of a VM that waited: the workspace of the kernel that it was assigned to.

        Raises SettingsError.  :meth:`show_workspace` comes next.
        """
        self.workspace = workspace_of(self.label, self.settings)
        guest.cwd, guest.notice = self.workspace.path, self.workspace.notice

    async def show_workspace(self, guest: Guest) -> None:
        """Have the guest see the workspace; without one that works it goes on without."""
        share = self.workspace.share
        if share is None or self._spawned is None or self.gate is not None:
            return
        from vmkernel.host.workspace_gate import Gate
        from vmkernel.protocol.messages import ShowWorkspace

        try:
            self.gate = Gate(share, guest.tell)
            await self.gate.attach(self._spawned.workspace)
            await guest.vm.agent.call(
                ShowWorkspace(path=share.path.encode(), writable=share.writable)
            )
        except (OSError, VmGuestError) as error:
            self.workspace = Choice(None, str(error))
            self._recorder.changed(workspace=self.workspace.in_words)
            guest.cwd, guest.notice = "", self.workspace.notice
            gate, self.gate = self.gate, None
            if gate is not None:
                gate.close()

    async def _start(self, progress: Progress) -> Started:
        settings = self.settings
        from vmkernel.image.store import find_image

        # First what needs no slot to be told: mistakes in settings, an image that is not there
        env = environment(self.label, settings)
        workspace = workspace_of(self.label, settings)
        find_image(settings.recipe, settings)
        record = _new_record(settings, self.label, workspace)
        self.vm_id = record.vm_id
        self._recorder.write(lambda: _tidy(settings))
        self._recorder.waiting(record)
        await self._recorder.written()
        slot, self._slot = self._slot, None
        if slot is None:
            waited = False

            def on_wait(place: QueuePosition) -> None:
                nonlocal waited
                waited = True
                progress(place.text)

            slot = await shared_slots(settings).acquire(
                on_wait=on_wait,
                timeout=settings.queue_timeout,
                label=self.label.kernel_id,
            )
            if waited:  # it may have come free because its holder was killed
                self._recorder.write(lambda: _tidy(settings))
        self.on_slot()
        with slot:
            choice = accel.remembered_choice(settings)
            if choice is None:
                progress("testing whether KVM works here (once)")
                choice = await accel.choose_accelerator(settings, lambda: probe_kvm(settings))
            self.warning = choice.warning
            spec = spec_for(settings, choice.accelerator)
            template = find_template(spec, settings)
            if template is None:
                template = await ensure_template(
                    spec,
                    settings,
                    lambda text, done: progress(
                        f"preparing the VM template (first run only): {text}, {done:.0%}"
                    ),
                    boot_slot(settings, progress),
                )
            progress("starting the VM")
            started = _spawn_clone(settings, spec, template, record, slot, env, workspace)
        self._recorder.starting(started.record)
        return started

    async def _explain(self, error: VmError) -> VmError:
        """The error; with QEMU's state, its last words and the log's place, if they are missing."""
        if self._guest is None or error.log_path is not None:
            return error
        vm = self._guest.vm
        failure = await vm.failed(error.message, type(error))
        if vm.process.returncode is None:  # QEMU is not to blame
            failure.hint = error.hint
        return failure


async def probe_kvm(settings: Settings) -> None:
    """Boot a guest with KVM.  Raises VmError when that does not work."""
    from vmkernel.vm.build import prove_accelerator

    spec = spec_for(settings, "kvm")
    # The proof is about the machine: a VM that is too small to boot must not spoil it.
    spec = msgspec.structs.replace(spec, memory=max(spec.memory, 512), vcpus=1)
    await prove_accelerator(spec, settings, accel.PROBE_SECONDS)


class boot_slot:  # noqa: N801 - used like a function
    """Hold a boot slot, which bounds how many VMs boot from cold at once."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self._settings = settings
        self._progress = progress
        self._slot: Slot | None = None

    async def __aenter__(self) -> None:
        self._slot = await boot_slots(self._settings).acquire(
            on_wait=lambda place: self._progress(place.text)
        )

    async def __aexit__(self, *failure: object) -> None:
        assert self._slot is not None
        self._slot.release()


def environment(label: Label, settings: Settings) -> dict[str, str]:
    """What is added to the environment of this VM's guest kernel.

    Raises:
        SettingsError: `env_file` cannot be taken, or `network_allow` not be understood.
    """
    from vmkernel.host.waking import given_environment, guest_environment

    env = label.env
    if env is None:
        env = guest_environment() | given_environment(settings)
    if settings.network != "none":
        from vmkernel.host.network import check, guest_variables

        check(settings)
        env = env | guest_variables(settings)
    return Variables(env)


def workspace_of(label: Label, settings: Settings) -> Choice:
    """What of the host's files this VM's guest sees.

    Raises:
        SettingsError: `workspace_dir` cannot be shared.
    """
    return choose(settings, label.directory, label.connection_file)


def log_dir(settings: Settings, vm_id: str) -> Path:
    """Where the VM's ``console.log`` and ``qemu.log`` lie."""
    return settings.state_dir / "logs" / vm_id


def _tidy(settings: Settings) -> None:
    """Clear away what killed runners left, at each start."""
    from vmkernel.host.reaper import sweep

    sweep(settings)
    prune_logs(settings)


def prune_logs(settings: Settings) -> None:
    """Remove old logs of VMs that failed, or whose runner was killed; not those of live ones."""
    with registry.Registry(settings) as known:
        statuses = known.list(ended=True)
    live = {record.vm_id for record, *_ in statuses if record.kept or record.state not in ENDED}
    try:
        found = [path for path in (settings.state_dir / "logs").iterdir() if path.name not in live]
    except OSError:
        return
    now = time.time_ns()
    # What is of the future was made before the clock was set back
    ages = {path: changed if (changed := _changed(path)) < now + _YOUNG else 0 for path in found}
    found.sort(key=ages.__getitem__)
    for path in found[:-KEPT_LOGS]:
        if ages[path] < now - _YOUNG:  # a start may be ahead of its record
            remove_tree(path)


def remove_logs(settings: Settings, vm_id: str) -> None:
    """Remove what a VM that ended well has left in the logs."""
    remove_tree(log_dir(settings, vm_id))


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # another process removed it
        return 0


def _new_record(settings: Settings, label: Label, workspace: Choice) -> registry.VmRecord:
    vm_id = label.vm_id or f"vm-{os.urandom(4).hex()}"
    return registry.new_record(
        vm_id=vm_id,
        kernel_id=label.kernel_id,
        connection_file=label.connection_file,
        notebook=label.notebook,
        task_id=label.task_id,
        recipe=settings.recipe,
        memory=settings.memory,
        vcpus=settings.vcpus,
        log_dir=str(log_dir(settings, vm_id)),
        **openings(settings, label, workspace.in_words),
    )


def _spawn_clone(
    settings: Settings,
    spec: Spec,
    template: Template,
    record: registry.VmRecord,
    slot: Slot,
    env: dict[str, str],
    workspace: Choice,
) -> Started:
    """Start QEMU; it takes the slot over.  Raises VmOverlayError, VmBootError, TemplateError."""
    directory = log_dir(settings, record.vm_id)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # a runner's log may be in it
    except OSError as error:
        raise VmBootError(
            f"the directory for the VM's logs, {directory}, could not be made: {error}",
            hint="free space there, make it writable, or set VMKERNEL_STATE_DIR",
        ) from error
    wall = find_wall(settings, spec.qemu)
    scratch = template.open_scratch(settings.cache_dir)
    state = -1
    try:
        state = template.open_state()
        machine = template.machine(spec, record.vm_id, scratch)
        spawned = spawn(
            msgspec.structs.replace(machine, tag=tag_of(settings.database_file)),
            directory,
            wall=wall,
            slot=slot.index,
            keep_fds=(slot.fd, state),
            cpu_quota=settings.cpu_quota,
        )
    except OSError as error:
        raise VmBootError(
            f"the VM could not be started: {error}",
            hint="Is the limit on open files very low (ulimit -n)? `vmkernel doctor` tells",
        ) from error
    finally:
        os.close(scratch)
        if state >= 0:
            os.close(state)
    try:
        # QEMU and guest find in their sockets what is next: both get on with it while we import.
        from vmkernel.vm.loading import request_load

        request_load(spawned.monitor, state)
        from vmkernel.host.waking import write_ahead

        write_ahead(spawned.kernel, env, workspace.path)
        qemu = identify(spawned.process.pid)
        record = msgspec.structs.replace(
            record,
            state=VmState.STARTING,
            slot=slot.index,
            slot_lease=slot.lease,
            template=template.manifest.key,
            accelerator=spec.accelerator,
            qemu_pid=spawned.process.pid,
            qemu_start=qemu.start_time if qemu else 0,
        )
    except BaseException:
        spawned.abandon()  # it holds the slot, and nobody would ever end it
        raise
    slot.handed_over()
    return Started(record, template, spawned, env, workspace)
