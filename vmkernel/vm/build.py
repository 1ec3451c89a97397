"""Building a memory template: boot a VM once, wait until it is warm, freeze it.

Where it stands: called by ``vm.template`` under the template's lock; also the proof that an
accelerator works (:func:`prove_accelerator` boots the same machine to the agent's first word).
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec

from vmkernel.environment import plain
from vmkernel.errors import TemplateError, VmBootError, VmError
from vmkernel.protocol import messages
from vmkernel.vm.machine import Vm, spawn
from vmkernel.vm.mounting import answer_mount
from vmkernel.vm.sandbox import find_wall
from vmkernel.vm.template import (
    FORMAT,
    KEEP_UNUSED,
    FileRecord,
    Manifest,
    Progress,
    Spec,
    Template,
    disk_errors,
    guest_config,
    guest_files,
    list_templates,
    sha256_sparse,
    write_progress,
)

if TYPE_CHECKING:
    from vmkernel.settings import Settings

# Seconds after which a probe's directory, which is used for 15, was left behind by a killed one.
_PROBE_IS_DEAD = 3600.0
P = ParamSpec("P")
R = TypeVar("R")

# Where a boot under emulation spends its time (measured, datascience recipe): shares of the bar.
_AT_HELLO = 0.35
_AT_READY = 0.9
# How long sleeps in a guest may take, as a multiple of what is asked for, and how often to boot one
# until they do not (guest/agent.py, measure_timer).
_SLOWEST_TIMER = 1.15
_TIMER_TRIES = 4
# MiB with which a guest that does not boot has something else to complain of.
_ENOUGH_MEMORY = 384
_TOO_SMALL = "The guest has too little memory to boot: set VMKERNEL_MEMORY higher, say 1G"


async def build_template(
    spec: Spec, settings: Settings, target: Path, progress: Progress
) -> Template:
    """Build ``target``; the caller holds its lock.  Raises TemplateError or VmBootError."""
    directory = target.parent
    _sweep(directory, target.name)

    def tell(text: str, fraction: float) -> None:
        write_progress(directory, target.name, text, fraction)
        progress(text, fraction)

    tell("booting the guest", 0.02)
    work = directory / f".tmp-{target.name}-{os.getpid()}"
    tries = 0
    try:
        while True:
            with disk_errors(directory):
                work.mkdir(mode=0o700)
                _require_space(spec, directory)
                await _in_thread(_prepare_files, spec, work)
            try:
                kernel_info = await _boot_and_freeze(spec, settings, work, tell)
                break
            except _SlowTimerError:
                tries += 1
                if tries == _TIMER_TRIES:
                    raise
                shutil.rmtree(work)
        with disk_errors(directory):
            tell("writing the template", 0.93)
            manifest = await _in_thread(_finish, spec, target.name, work, kernel_info)
            if target.exists():  # damaged; running clones keep their open files
                _remove(target.rename(work.with_name(f"{work.name}-old")))
            work.rename(target)
            _sync_directory(directory)
        _prune(settings, keep=target)
        return Template(target, manifest)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        (directory / f".progress-{target.name}").unlink(missing_ok=True)


async def prove_accelerator(spec: Spec, settings: Settings, timeout: float) -> None:
    """Boot the guest until its agent speaks.  Raises VmBootError, with the evidence, if not."""
    import tempfile

    with disk_errors(settings.cache_dir):
        settings.cache_dir.mkdir(parents=True, exist_ok=True)
        for left in settings.cache_dir.glob(".probe-*"):
            with suppress(FileNotFoundError):  # another process removes it, too
                if time.time() - left.stat().st_mtime > _PROBE_IS_DEAD:
                    _remove(left)
        work = Path(tempfile.mkdtemp(prefix=".probe-", dir=settings.cache_dir))
    try:
        with disk_errors(settings.cache_dir):
            await _in_thread(_prepare_files, spec, work)
        async with _Boot(spec, settings, work) as boot:
            await boot.reach("hello", timeout)
    finally:
        shutil.rmtree(work, ignore_errors=True)


async def _in_thread(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run slow work beside the event loop, which has a front end to answer.

    Waits for its end even when it is cancelled: the caller then removes the files it works on.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class _SlowTimerError(VmBootError):
    """The guest's timer was set wrongly as it booted: every sleep of every clone would be late."""


class _Boot:
    """A cold boot of ``spec`` in ``work``, as a context manager that ends it."""

    def __init__(self, spec: Spec, settings: Settings, work: Path) -> None:
        loop = asyncio.get_running_loop()
        self._stages: dict[str, asyncio.Future[Any]] = {
            "hello": loop.create_future(),
            "ready": loop.create_future(),
        }
        self._settings = settings
        scratch_fd = os.open(work / "scratch.raw", os.O_RDWR | os.O_CLOEXEC)
        machine = spec.machine(
            vm_id=f"template-{os.getpid()}",
            kernel=str(work / "kernel"),
            initrd=str(work / "initrd"),
            scratch_fd=scratch_fd,
            scratch_format="raw",
            scratch_base=None,
            ram_path=str(work / "ram"),
            ram_share=True,
            incoming=False,
        )
        logs = settings.state_dir / "logs" / f"boot-{os.getpid()}"
        self._console = logs / "console.log"
        try:
            with disk_errors(logs):
                logs.mkdir(mode=0o700, parents=True, exist_ok=True)
                spawned = spawn(machine, logs, wall=find_wall(settings, spec.qemu))
        finally:
            os.close(scratch_fd)
        self._workspace = spawned.workspace
        self.vm = Vm(
            spawned,
            on_event=self._on_event,
            on_message=lambda body, buffers: None,
            on_end=self._on_end,
        )

    async def __aenter__(self) -> _Boot:
        try:
            await self.vm.attach(self._console, self._settings.console_log_size << 20)
            self._answers = await answer_mount(self._workspace)
        except BaseException:
            await self.vm.close()  # __aexit__ is not called
            raise
        return self

    async def __aexit__(self, *failure: object) -> None:
        for stage in self._stages.values():
            stage.cancel()
        self._answers.close()  # first: asyncio would know the socket's number for that of another
        await self.vm.close()
        if failure[0] is None:
            shutil.rmtree(self._console.parent, ignore_errors=True)

    async def reach(self, stage: str, timeout: float) -> Any:
        """Wait for a stage; its message.  Raises VmBootError."""
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(self._stages[stage])
        except TimeoutError as error:
            failure = await self.vm.failed(
                f"The guest did not get to {stage!r} within {timeout:g} s"
            )
            failure.log_path = self._console
            failure.hint = (
                "Is the host overloaded? VMKERNEL_BOOT_TIMEOUT gives it more time; "
                "`vmkernel doctor` checks the rest"
            )
            if self.vm.machine.memory_mib < _ENOUGH_MEMORY:
                failure.hint = f"{_TOO_SMALL}. {failure.hint}"
            raise failure from error

    def _on_event(self, event: messages.FromAgent) -> None:
        if isinstance(event, messages.Hello):
            self._settle("hello", event)
        elif isinstance(event, messages.Ready):
            self._settle("ready", event.kernel_info)
        elif isinstance(event, messages.Failed | messages.KernelDied):
            reason = event.reason if isinstance(event, messages.Failed) else event.output
            self._on_end(
                VmBootError(
                    f"The guest did not get ready: {reason}",
                    hint="Check the recipe's packages and preloads, then build the image again",
                    log_path=self._console,
                )
            )

    def _on_end(self, error: VmError) -> None:
        for stage in self._stages.values():
            if not stage.done():
                boot = VmBootError(
                    f"The guest did not boot. {error.message}",
                    hint=_boot_hint(error, self.vm.machine.memory_mib),
                    log_path=self._console,
                )
                stage.set_exception(boot)
                stage.exception()  # seen: not every stage is waited for

    def _settle(self, stage: str, value: object) -> None:
        if not self._stages[stage].done():
            self._stages[stage].set_result(value)


def _boot_hint(error: VmError, memory: int) -> str:
    text = error.message.lower()
    # With very little the guest dies without a word, with a bit more it says so when it does.
    signs = ("out of memory", "deadlocked on memory", "memoryerror", "no space", "oom")
    if memory < _ENOUGH_MEMORY or any(sign in text for sign in signs):
        return _TOO_SMALL
    return error.hint or "Run `vmkernel doctor`"


async def _boot_and_freeze(
    spec: Spec, settings: Settings, work: Path, tell: Progress
) -> dict[str, Any]:
    from vmkernel.vm.monitor import save_state

    async with _Boot(spec, settings, work) as boot:
        started = time.monotonic()
        async with _Ticker(tell, "booting the guest", 0.02, _AT_HELLO, 12.0):
            hello: messages.Hello = await boot.reach("hello", settings.boot_timeout)
        if hello.timer > _SLOWEST_TIMER:
            raise _SlowTimerError(
                f"The guest's timer runs {hello.timer:.2f} times too slowly, as the host was busy "
                "when the guest booted",
                hint="try again when the host has less to do",
            )
        left = settings.boot_timeout - (time.monotonic() - started)
        what = "Python and its libraries"
        if spec.image.recipe.engine != "python":
            what = "the kernel"
        async with _Ticker(tell, f"loading {what}", _AT_HELLO, _AT_READY, 20.0):
            kernel_info: dict[str, Any] = await boot.reach("ready", max(left, 1.0))
        if not kernel_info:
            raise VmBootError(
                "The guest did not get ready: it says nothing of its kernel",
                hint="Check the recipe's kernel, then build the image again",
            )
        tell("saving the guest's memory", _AT_READY)
        await asyncio.sleep(0.3)  # let the guest fall idle: what it runs now, every clone repeats
        monitor = await boot.vm.monitor()
        fd = os.open(work / "state", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await save_state(monitor, fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        return kernel_info


class _Ticker:
    """Progress for something that says nothing on its way: nears its end, never reaches it."""

    def __init__(self, tell: Progress, text: str, start: float, end: float, usual: float) -> None:
        self._tell, self._text, self._start, self._end = tell, text, start, end
        self._usual = usual
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def __aexit__(self, *failure: object) -> None:
        assert self._task is not None
        self._task.cancel()

    async def _run(self) -> None:
        began = time.monotonic()
        while True:
            share = (time.monotonic() - began) / self._usual
            part = share / (share + 0.3)
            self._tell(self._text, self._start + (self._end - self._start) * min(part, 0.97))
            await asyncio.sleep(0.5)


def _require_space(spec: Spec, directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    # A template of the datascience recipe holds some 400 MB; memory that is never touched none.
    need = min(spec.memory, 768) << 20
    if free < need:
        raise TemplateError(
            f"the disk of {directory} has {free >> 20} MiB free; a VM template needs about "
            f"{need >> 20} MiB",
            hint="free space there, or set VMKERNEL_CACHE_DIR to another disk",
        )


def _prepare_files(spec: Spec, work: Path) -> None:
    """A boot's files in ``work``: RAM, kernel, initrd, disks.  Raises OSError, TemplateError."""
    with open(work / "ram", "xb") as ram:
        ram.truncate(spec.memory << 20)
    with open(work / "scratch.raw", "xb") as scratch:
        scratch.truncate(spec.scratch_size << 20)
    # No journal: the disk lives as long as its VM.  Lazy tables stay unwritten, hence sparse.
    _run(
        "mkfs.ext4", "-q", "-F", "-O", "^has_journal,^resize_inode", "-m", "0",
        "-E", "lazy_itable_init=1,root_owner=0:0", str(work / "scratch.raw"),
        package="e2fsprogs",
    )  # fmt: skip
    _run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=65536,lazy_refcounts=on",
        str(work / "scratch.qcow2"), f"{spec.scratch_size}M", package="qemu-utils",
    )  # fmt: skip
    _make_initrd(spec, work)
    # A copy, since a QEMU of root's, which is another user's, may not be able to read the original
    shutil.copyfile(spec.kernel or spec.image.kernel, work / "kernel")
    for name in ("kernel", "initrd"):
        (work / name).chmod(0o444)


def _make_initrd(spec: Spec, work: Path) -> None:
    """The image's initial RAM disk, and behind it an archive with the guest's own code.

    The kernel unpacks concatenated archives one over the other
    (Documentation/driver-api/early-userspace/buffer-format.rst).
    """
    tree = work / "guest"
    for name, source in guest_files().items():
        path = tree / "vmkernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    config = guest_config(spec.image.recipe)
    (tree / "vmkernel" / "config.json").write_text(json.dumps(config))
    for path in (tree / "vmkernel", *tree.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    names = "\0".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))) + "\0"
    try:
        archive = subprocess.run(
            ["cpio", "--create", "--null", "--format=newc", "--owner=0:0", "--quiet"],
            cwd=tree, input=names.encode(), capture_output=True, check=True, env=plain(os.environ),
        ).stdout  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise TemplateError(
            f"the guest's code could not be packed: {error}", hint="sudo apt install cpio"
        ) from error
    base = spec.image.initrd.read_bytes()
    (work / "initrd").write_bytes(base + b"\0" * (-len(base) % 4) + archive)
    shutil.rmtree(tree)


def _run(*command: str, package: str) -> None:
    environment = plain(os.environ)  # none of a kernel's secrets
    environment["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
    except FileNotFoundError as error:
        raise TemplateError(
            f"{command[0]} is not installed", hint=f"sudo apt install {package}"
        ) from error
    if result.returncode:
        raise TemplateError(
            f"{command[0]} failed: {result.stderr.strip()}",
            hint="Is the disk full? `vmkernel doctor` tells",
        )


def _finish(spec: Spec, key: str, work: Path, kernel_info: dict[str, Any]) -> Manifest:
    """Checksums and manifest; everything is on the disk when this returns."""
    (work / "initrd").unlink()
    (work / "kernel").unlink()
    files: dict[str, FileRecord] = {}
    for name in ("ram", "state", "scratch.raw", "scratch.qcow2"):
        path = work / name
        os.chown(path, os.geteuid(), os.getegid())  # root's QEMU had it (`vm.wall`)
        # A clone of root's reads the first two as another user, by descriptor; the directory is
        # closed to all others
        path.chmod(0o444 if name in ("ram", "scratch.raw") else 0o400)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        found = path.stat()
        files[name] = FileRecord(
            found.st_size, found.st_ino, found.st_mtime_ns, sha256_sparse(path)
        )
    manifest = Manifest(
        FORMAT, key, spec.image.name, time.time(), spec.inputs(), files, kernel_info
    )
    (work / "used").touch()
    with open(work / "manifest.json", "xb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest)))
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(work)
    return manifest


def _sync_directory(directory: Path) -> None:
    """Names and renamings in it are on the disk, too (fsync(2))."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sweep(directory: Path, key: str) -> None:
    """Remove what dead builders left: of this key, whose lock we hold, and of any other."""
    for left in directory.glob(".tmp-*"):
        other = left.name.split("-")[1]
        if other == key:
            _remove(left)
            continue
        lock = directory / f".lock-{other}"
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), lock.stat()):
                continue  # the file of an earlier holder: someone may build under a new one
            _remove(left)
            (directory / f".progress-{other}").unlink(missing_ok=True)
            lock.unlink(missing_ok=True)  # by its holder only: see template._BuildLock
        except OSError:
            continue  # someone builds it
        finally:
            os.close(fd)


def _remove(directory: Path) -> None:
    """Remove a directory of ours, also one that was made unreadable."""
    with suppress(OSError):
        directory.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)


def _prune(settings: Settings, keep: Path) -> None:
    """Remove templates that nobody used for long: new ones replace them as versions change."""
    if settings.shared_dir == settings.cache_dir:
        return  # the store of all users, who leave no trace there: `vmkernel setup-host` sweeps it
    for directory, _ in list_templates(settings):
        try:
            idle = time.time() - (directory / "used").stat().st_mtime
        except OSError:
            idle = 0.0
        if directory != keep and idle > KEEP_UNUSED:
            shutil.rmtree(directory, ignore_errors=True)
