"""Memory templates: one booted VM, frozen, from which every kernel is cloned (DESIGN 4.1).

A template is a directory ``<cache_dir>/templates/<key>``::

    ram           the guest's memory; clones map it privately (copy on write)
    state         the devices' state, some 200 kB
    scratch.raw   the scratch disk as it was at that moment (ext4, sparse)
    scratch.qcow2 an empty overlay over it; each clone takes a copy
    manifest.json what it was made from, sizes, checksums, the kernel_info to serve

It is immutable and named by what it was made from: image, guest code, command line, QEMU's
version, accelerator and, under emulation, the host's TSC frequency.  It is built under a
temporary name and renamed, by one process at a time for each key; the others wait and
show the builder's progress.  A template that is damaged is built again, never repaired.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel.errors import TemplateError, VmError
from vmkernel.vm.command import Accelerator, Machine, kernel_cmdline, machine_fingerprint
from vmkernel.vm.wall import sealed_memory

if TYPE_CHECKING:
    from vmkernel.image.recipe import Recipe
    from vmkernel.image.store import Image
    from vmkernel.settings import Settings

FORMAT = 2
KEEP_UNUSED = 14 * 24 * 3600
"""Seconds after its last use when a template makes room for a new one."""
_FILES = ("ram", "state", "scratch.raw", "scratch.qcow2")
_GUEST_PACKAGES = ("guest", "protocol")
_GUEST_FILES = ("__init__.py", "errors.py")

Progress = Callable[[str, float], None]
"""progress(what is being done, fraction done from 0 to 1)"""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What a template is made from."""

    image: Image
    qemu: str
    qemu_version: str
    accelerator: Accelerator
    memory: int
    vcpus: int
    scratch_size: int
    tsc_khz: int
    kernel: str = ""
    """Path of a kernel to boot instead of the image's (`vm.guestkernel`)."""
    kernel_digest: str = ""

    def machine(self, **changes: Any) -> Machine:
        """The machine, as a clone unless ``changes`` say otherwise; descriptors are 0."""
        fields: dict[str, Any] = {
            "vm_id": "template",
            "qemu": self.qemu,
            "accelerator": self.accelerator,
            "memory_mib": self.memory,
            "vcpus": self.vcpus,
            "cmdline": kernel_cmdline(self.accelerator, self.tsc_khz),
            "kernel": None,
            "initrd": None,
            "rootfs": str(self.image.rootfs),
            "scratch_fd": 0,
            "scratch_format": "qcow2",
            "scratch_base": "scratch.raw",
            "ram_path": "ram",
            "ram_share": False,
            "incoming": True,
        }
        return Machine(**(fields | changes))

    def inputs(self) -> dict[str, Any]:
        """Everything that decides what the template's memory holds."""
        own = {"kernel": self.kernel_digest} if self.kernel else {}
        return {
            **own,
            "format": FORMAT,
            "image": self.image.digest,
            "config": guest_config(self.image.recipe),  # images are reproducible: one digest
            "guest": guest_digest(),
            "machine": machine_fingerprint(self.machine()),
            "cmdline": kernel_cmdline(self.accelerator, self.tsc_khz),
            "qemu": self.qemu_version,
            "accelerator": self.accelerator,
            "cpu": cpu_model() if self.accelerator == "kvm" else "",
            "tsc_khz": self.tsc_khz if self.accelerator == "tcg" else 0,
            "scratch_size": self.scratch_size,
        }

    def key(self) -> str:
        """The template's name: 32 hexadecimal digits."""
        text = json.dumps(self.inputs(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class FileRecord(msgspec.Struct):
    """What a template's file must still look like."""

    size: int
    inode: int
    mtime_ns: int
    sha256: str


class Manifest(msgspec.Struct):
    """``manifest.json`` of a template."""

    format: int
    key: str
    recipe: str
    created: float
    inputs: dict[str, Any]
    files: dict[str, FileRecord]
    kernel_info: dict[str, Any]


class Template:
    """A template on disk, found whole."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"<Template {self.manifest.recipe} {self.manifest.key[:8]}>"

    def machine(self, spec: Spec, vm_id: str, scratch_fd: int) -> Machine:
        """A clone of this template, its sockets still to be filled in."""
        return spec.machine(
            vm_id=vm_id,
            scratch_fd=scratch_fd,
            scratch_base=str(self.directory / "scratch.raw"),
            ram_path=str(self.directory / "ram"),
        )

    def open_scratch(self, directory: Path) -> int:
        """A private overlay of the scratch disk, as a descriptor without a name.

        Whatever ends the VM, the disk is gone with it.  Raises VmOverlayError.
        """
        from vmkernel.errors import VmOverlayError

        fd = -1
        try:
            try:
                fd = _open_nameless(directory)
            except FileNotFoundError:  # who has used the administrator's templates only
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = _open_nameless(directory)
            with open(self.directory / "scratch.qcow2", "rb") as source:
                data = source.read()
            while data:
                data = data[os.write(fd, data) :]
        except OSError as error:
            if fd >= 0:
                os.close(fd)  # a kernel on a full disk tries again and again
            raise VmOverlayError(
                f"the VM's scratch disk could not be made in {directory}: {error}",
                hint=f"free some space on the disk of {directory}, or set VMKERNEL_CACHE_DIR",
            ) from error
        return fd

    def has_its_state(self) -> bool:
        """Whether the device state is the one that was saved.  Raises OSError."""
        return sha256_sparse(self.directory / "state") == self.manifest.files["state"].sha256

    def open_state(self) -> int:
        """A copy of the device state in memory, to be loaded by a clone, as a descriptor.

        Not the file itself: QEMU could, once broken out of, change it for all later clones.
        Raises TemplateError when it is not what was saved; the next start then finds no template.
        """
        path = self.directory / "state"
        with suppress(OSError):
            os.utime(self.directory / "used")  # for prune()
        data = path.read_bytes()
        if not self.has_its_state():
            with suppress(OSError):
                os.utime(path)  # what `_load` sees
            raise TemplateError(
                f"the template {self.directory} is damaged: state has another checksum",
                hint="start again: it is built anew; and look at the disk",
            )
        return sealed_memory("state", data)


def _open_nameless(directory: Path) -> int:
    """A file without a name: whoever is killed at whatever moment leaves none.  Raises OSError."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # The file system cannot do that (open(2), "O_TMPFILE"), or the kernel knows no such flag
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    # tempfile would import random and the compressors before QEMU is started
    path = directory / f"scratch-{os.urandom(8).hex()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd


def templates_dir(settings: Settings) -> Path:
    """Where this user's templates lie."""
    return settings.cache_dir / "templates"


def find_template(spec: Spec, settings: Settings) -> Template | None:
    """The template for ``spec``, or None when there is none or it is not whole any more.

    The administrator's before the user's own: its memory is shared with other users' VMs.
    Cheap: one small file is read, four are looked at.
    """
    key = spec.key()
    if settings.shared_dir is not None:
        template = _find_shared(key, settings)
        if template is not None:
            return template
    try:
        return _load(templates_dir(settings) / key)
    except TemplateError:
        return None


def _find_shared(key: str, settings: Settings) -> Template | None:
    from vmkernel.shared import distrust, shared_templates

    directory = shared_templates(settings)
    if directory is None or distrust(directory / key):
        return None
    try:
        template = _load(directory / key, shared=True)
        # What is damaged can be told by the one who may write there only (`Template.open_state`)
        if template is not None and not template.has_its_state():
            return None
    except (TemplateError, OSError):
        return None
    return template


def _load(directory: Path, *, shared: bool = False) -> Template | None:
    """``shared``: nobody else may be able to write to it.  Raises TemplateError when damaged."""
    try:
        raw = (directory / "manifest.json").read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TemplateError(
            f"the template {directory} cannot be read: {error}",
            hint=f"make it readable, or remove it: rm -r {directory}",
        ) from error
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
        for name in _FILES:
            found = (directory / name).stat()
            wanted = manifest.files[name]
            if (found.st_size, found.st_ino, found.st_mtime_ns) != (
                wanted.size,
                wanted.inode,
                wanted.mtime_ns,
            ):
                raise ValueError(f"{name} is not the file that was built")
            if shared and (found.st_mode & 0o022 or found.st_uid not in (0, os.geteuid())):
                raise ValueError(f"others may write to {name}")
            if shared and not os.access(directory / name, os.R_OK):
                raise ValueError(f"{name} is not readable")
    except (msgspec.MsgspecError, OSError, ValueError, KeyError) as error:
        raise TemplateError(
            f"the template {directory} is damaged: {error}",
            hint="it is built again by the next kernel",
        ) from error
    return Template(directory, manifest)


def open_to_all(directory: Path) -> None:
    """Let every user clone from this template, and none change it.  Raises OSError."""
    for name in (*_FILES, "manifest.json"):
        (directory / name).chmod(0o444)
    (directory / "used").chmod(0o644)
    directory.chmod(0o755)


def list_templates(settings: Settings) -> list[tuple[Path, Template | TemplateError]]:
    """Every template directory, with the template or what is wrong with it."""
    found: list[tuple[Path, Template | TemplateError]] = []
    with suppress(FileNotFoundError):
        for directory in sorted(templates_dir(settings).iterdir()):
            if directory.name.startswith("."):
                continue
            try:
                template = _load(directory)
                if template is not None:
                    found.append((directory, template))
            except TemplateError as error:
                found.append((directory, error))
    return found


def verify_template(template: Template) -> None:
    """Read every byte and compare the checksums.  Raises TemplateError."""
    for name, record in template.manifest.files.items():
        if sha256_sparse(template.directory / name) != record.sha256:
            raise TemplateError(
                f"the template {template.directory} is damaged: {name} has another checksum",
                hint=f"remove it, it is built again: rm -r {template.directory}",
            )


async def ensure_template(
    spec: Spec,
    settings: Settings,
    progress: Progress,
    boot_slot: AbstractAsyncContextManager[object],
) -> Template:
    """Find the template, or build it; one process builds, the others wait for it.

    The builder holds ``boot_slot`` while it boots.

    Raises TemplateError or VmBootError when it cannot be built, ImageError when the image is
    not whole.
    """
    directory = templates_dir(settings)
    target = directory / spec.key()
    template = find_template(spec, settings)
    if template is not None:
        return template
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    async with _BuildLock(directory, target.name, progress):
        template = find_template(spec, settings)  # built while we waited
        if template is None:
            from vmkernel.vm.build import build_template

            async with boot_slot:
                template = await build_template(spec, settings, target, progress)
        return template


class _BuildLock:
    """One builder for each key.  The file goes with its last holder; waiters see that it did."""

    def __init__(self, directory: Path, name: str, progress: Progress) -> None:
        self._directory = directory
        self._name = name
        self._path = directory / f".lock-{name}"
        self._progress = progress
        self._fd = -1

    async def __aenter__(self) -> None:
        import asyncio  # not before a VM that has its template was started

        while not self._try():
            self._progress(*_read_progress(self._directory, self._name))
            await asyncio.sleep(0.25)

    async def __aexit__(self, *failure: object) -> None:
        self._path.unlink(missing_ok=True)  # still locked: nobody else is in here
        os.close(self._fd)

    def _try(self) -> bool:
        with disk_errors(self._directory):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), self._path.stat()):
                self._fd, fd = fd, -1
                return True
        except (BlockingIOError, FileNotFoundError):
            pass  # held, or removed by its holder between our open and lock
        finally:
            if fd >= 0:
                os.close(fd)
        return False


def write_progress(directory: Path, name: str, text: str, fraction: float) -> None:
    """Tell the other processes that wait for this template how far it is."""
    with suppress(OSError):
        path = directory / f".progress-{name}"
        path.with_suffix(".new").write_text(json.dumps([text, fraction]))
        path.with_suffix(".new").replace(path)


def _read_progress(directory: Path, name: str) -> tuple[str, float]:
    try:
        text, fraction = json.loads((directory / f".progress-{name}").read_text())
        return str(text), float(fraction)
    except (OSError, ValueError):
        return "another kernel is preparing it", 0.0


class disk_errors:  # noqa: N801 - used like a function
    """Turn an OSError of the disk into a TemplateError that names the place."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, VmError):
            raise TemplateError(
                f"the VM template could not be written to {self._directory}: {error}",
                hint=f"free space on the disk of {self._directory}, make it writable, "
                "or set VMKERNEL_CACHE_DIR to another place",
            ) from error


def guest_files() -> dict[str, Path]:
    """The guest's own code: path below /run/vmkernel -> file."""
    package = Path(__file__).resolve().parent.parent
    files = {"start.py": package / "guest" / "start.py"}
    for name in _GUEST_FILES:
        files[f"vmkernel/{name}"] = package / name
    for name in _GUEST_PACKAGES:
        for path in sorted((package / name).glob("*.py")):
            files[f"vmkernel/{name}/{path.name}"] = path
    return files


def guest_config(recipe: Recipe) -> dict[str, Any]:
    """What the guest's agent must know of the recipe: /run/vmkernel/config.json."""
    return {
        "engine": recipe.engine,
        "preload": recipe.preload,
        "relay": {
            "argv": recipe.argv,
            "env": recipe.env,
            "transport": recipe.transport,
            "interrupt_mode": recipe.interrupt_mode,
            "wake_code": recipe.wake_code,
        },
    }


def guest_digest() -> str:
    """A hash of the guest's code, so that new code means a new template."""
    digest = hashlib.sha256()
    for name, path in guest_files().items():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cpu_model() -> str:
    """The host's CPU, which a KVM guest with ``-cpu host`` sees."""
    with open("/proc/cpuinfo", "rb", buffering=0) as file:
        first = file.read(8192).partition(b"\n\n")[0]  # one entry: all of it is slow to read
    pairs = (line.partition(b":") for line in first.splitlines())
    lines = {name.strip(): value.strip().decode() for name, _, value in pairs}
    return json.dumps([lines.get(b"model name", ""), lines.get(b"flags", "")])


def sha256_sparse(path: Path) -> str:
    """A checksum of a sparse file's data and of where it lies; holes are not read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        at = 0
        while at < size:
            try:
                at = file.seek(at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            end = file.seek(at, os.SEEK_HOLE)
            digest.update(f"@{at}".encode())
            file.seek(at)
            while at < end:
                data = file.read(min(4 << 20, end - at))
                if not data:  # cut short while we read
                    break
                digest.update(data)
                at += len(data)
    return digest.hexdigest()
