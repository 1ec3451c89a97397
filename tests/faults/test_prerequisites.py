"""What a start needs and does not find: each missing thing is told in the notebook and by the
command, with what to do; the kernel goes on, and works when the thing is there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from kernel_client import Cell, Kernel

from vmhost import VmHost
from vmkernel.settings import load_settings
from vmkernel.vm.qemu import find_qemu

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

NOBODY = 65534


class Fault(NamedTuple):
    """One thing that is missing, and all that is promised about it."""

    env: dict[str, str]
    error: str
    """The error's class."""
    says: str
    """Pattern of what the error says."""
    todo: str
    """Pattern of the hint."""
    mend: Callable[[], object] | None = None
    """What a person would do; None where the environment of the kernel is at fault."""
    check: str = ""
    """The check of `vmkernel doctor` that finds it missing without starting anything."""


class Workshop:
    """Where faults are made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._mounted: list[Path] = []

    def tmpfs(self, options: str) -> Path:
        """A small file system of its own."""
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small file system")
        place = self.directory / f"tmpfs{len(self._mounted)}"
        place.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
        self._mounted.append(place)
        return place

    def images(self) -> Path:
        """An images directory with a copy of the image, in which every file may be replaced."""
        images = self.directory / "images"
        real = load_settings().images_dir / "minimal"
        (images / "minimal").mkdir(parents=True)
        for file in real.iterdir():
            (images / "minimal" / file.name).symlink_to(file)
        return images

    def close(self) -> None:
        for place in self._mounted:
            subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> Path:
    """Write until there is no space left; what to remove to have it back."""
    file = place / "filling"
    with suppress(OSError), file.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))
    return file


def qemu_path() -> str:
    return find_qemu("qemu-system-x86_64", os.environ["PATH"])


# --- the faults ---


def no_qemu(work: Workshop) -> Fault:
    qemu = work.directory / "qemu-system-x86_64"
    return Fault(
        {"VMKERNEL_QEMU": str(qemu)},
        "VmBootError",
        r"QEMU was not found",
        r"sudo apt install qemu-system-x86; or .* VMKERNEL_QEMU",
        lambda: qemu.symlink_to(qemu_path()),
        "QEMU",
    )


def no_qemu_on_path(work: Workshop) -> Fault:
    programs = work.directory / "bin"
    programs.mkdir()
    return Fault(
        {"PATH": str(programs)},
        "VmBootError",
        r"QEMU was not found: no program 'qemu-system-x86_64'",
        r"apt install qemu-system-x86",
        lambda: (programs / "qemu-system-x86_64").symlink_to(qemu_path()),
        "QEMU",
    )


def no_image(work: Workshop) -> Fault:
    images = work.directory / "images"
    images.mkdir()
    return Fault(
        {"VMKERNEL_IMAGES_DIR": str(images)},
        "ImageError",
        r"There is no image 'minimal' in ",
        r"vmkernel image build minimal",
        lambda: (images / "minimal").symlink_to(load_settings().images_dir / "minimal"),
        "image",
    )


def a_truncated_image(work: Workshop) -> Fault:
    images = work.images()
    rootfs = images / "minimal" / "rootfs.erofs"
    real = rootfs.readlink()
    rootfs.unlink()
    rootfs.write_bytes(bytes(1000))

    def mend() -> None:
        rootfs.unlink()
        rootfs.symlink_to(real)

    return Fault(
        {"VMKERNEL_IMAGES_DIR": str(images)},
        "ImageError",
        r"The image 'minimal' is damaged: its file rootfs\.erofs has 1000 bytes instead of \d+",
        r"vmkernel image build minimal --force",
        mend,
        "image",
    )


def an_image_with_a_bad_manifest(work: Workshop) -> Fault:
    images = work.images()
    manifest = images / "minimal" / "manifest.json"
    manifest.unlink()
    manifest.write_text('{"format": 1, "recipe"')
    return Fault(
        {"VMKERNEL_IMAGES_DIR": str(images)},
        "ImageError",
        r"The manifest of image 'minimal' is damaged",
        r"vmkernel image build minimal --force",
        check="image",
    )


def a_full_disk_for_scratch_disks(work: Workshop) -> Fault:
    place = work.tmpfs("size=128k,mode=700")
    (place / "templates").symlink_to(load_settings().cache_dir / "templates")
    fill(place)
    return Fault(
        {"VMKERNEL_CACHE_DIR": str(place)},
        "VmOverlayError",
        r"the VM's scratch disk could not be made in .*: .*No space left on device",
        r"free some space .*VMKERNEL_CACHE_DIR",
        lambda: subprocess.run(["mount", "-o", "remount,size=8m", place], check=True),
    )


def no_room_for_a_template(work: Workshop) -> Fault:
    place = work.tmpfs("size=16m,mode=700")
    return Fault(
        {"VMKERNEL_CACHE_DIR": str(place)},
        "TemplateError",
        r"has 1\d MiB free; a VM template needs about 512 MiB",
        r"VMKERNEL_CACHE_DIR",
    )


def no_place_for_templates(work: Workshop) -> Fault:
    cache = work.directory / "cache"
    cache.mkdir()
    (cache / "templates").write_text("not a directory")

    def mend() -> None:
        (cache / "templates").unlink()
        (cache / "templates").symlink_to(load_settings().cache_dir / "templates")

    return Fault(
        {"VMKERNEL_CACHE_DIR": str(cache)},
        "TemplateError",
        r"could not be written to .*/cache/templates",
        r"VMKERNEL_CACHE_DIR",
        mend,
    )


def no_place_for_logs(work: Workshop) -> Fault:
    place = work.tmpfs("nr_inodes=1,mode=700")
    return Fault(
        {"VMKERNEL_STATE_DIR": str(place), "VMKERNEL_ACCELERATOR": "tcg"},
        "VmBootError",
        r"directory for the VM's logs, .*, could not be made: .*No space left on device",
        r"VMKERNEL_STATE_DIR",
        lambda: subprocess.run(["mount", "-o", "remount,nr_inodes=100", place], check=True),
    )


def a_directory_for_a_semaphore_file(work: Workshop) -> Fault:
    path = work.directory / "slots"
    path.mkdir()
    return Fault(
        {"VMKERNEL_SEMAPHORE_FILE": str(path)},
        "VmCapacityError",
        r"the semaphore file .*/slots is not a regular file",
        r"semaphore_file",
        path.rmdir,
        "VM slots",
    )


def a_read_only_semaphore_file(work: Workshop) -> Fault:
    place = work.tmpfs("size=64k,mode=700,ro")
    return Fault(
        {"VMKERNEL_SEMAPHORE_FILE": str(place / "slots")},
        "VmCapacityError",
        r"cannot use the semaphore file .*/slots: Read-only file system",
        r"VMKERNEL_SEMAPHORE_FILE",
        lambda: subprocess.run(["mount", "-o", "remount,rw", place], check=True),
        "VM slots",
    )


def somebody_elses_runtime_directory(work: Workshop) -> Fault:
    place = work.directory / "run"
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    return Fault(
        {"VMKERNEL_RUNTIME_DIR": str(place)},
        "SettingsError",
        r"is not private: others may enter it",
        r"chmod 700",
        lambda: place.chmod(0o700),
        "runtime dir",
    )


def no_such_value(work: Workshop) -> Fault:
    return Fault(
        {"VMKERNEL_MEMORY": "banana"},
        "SettingsError",
        r"Setting 'memory' is 'banana' \(from environment variable VMKERNEL_MEMORY\): "
        r".*Allowed: 64M to 1T",
        r"change environment variable VMKERNEL_MEMORY",
        check="settings",
    )


def no_such_setting(work: Workshop) -> Fault:
    return Fault(
        {"VMKERNEL_MEMROY": "1G"},
        "SettingsError",
        r"There is no setting 'memroy' .*Did you mean 'memory'\?",
        r"correct or remove it",
        check="settings",
    )


FAULTS = (
    no_qemu,
    no_qemu_on_path,
    no_image,
    a_truncated_image,
    an_image_with_a_bad_manifest,
    a_full_disk_for_scratch_disks,
    no_room_for_a_template,
    no_place_for_templates,
    no_place_for_logs,
    a_directory_for_a_semaphore_file,
    a_read_only_semaphore_file,
    somebody_elses_runtime_directory,
    no_such_value,
    no_such_setting,
)


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Workshop]:
    """Where faults are made; nothing stays mounted."""
    workshop = Workshop(tmp_path)
    yield workshop
    workshop.close()


@pytest.mark.parametrize("make", FAULTS, ids=lambda make: make.__name__)
def test_it_is_told_and_the_kernel_goes_on(
    make: Callable[[Workshop], Fault], spec: str, module_host: VmHost, work: Workshop
) -> None:
    fault = make(work)
    command = module_host.cli("doctor", "--start", **fault.env)
    _check_command(command, fault)

    kernel = Kernel(spec, env={**module_host.env, **fault.env})
    try:
        for _ in range(2):
            _check_cell(kernel.run("6 * 7"), fault)
            assert kernel.request("kernel_info_request").status == "ok"
        assert kernel.request("complete_request", {"code": "pri", "cursor_pos": 3}).done
        assert module_host.qemus() == []
        if fault.mend is not None:
            fault.mend()
            assert kernel.run("6 * 7").result == "42"
    finally:
        kernel.shut_down()
    assert module_host.qemus() == []


def _check_cell(cell: Cell, fault: Fault) -> None:
    assert cell.status == "error"
    assert cell.error["ename"] == fault.error
    assert re.search(fault.says, cell.error["evalue"], re.DOTALL)
    traceback = re.sub(r"\x1b\[\d+m", "", cell.traceback)
    assert re.search(rf"^What to do: .*{fault.todo}", traceback, re.MULTILINE)
    for path in re.findall(r"^Log: (.*)$", traceback, re.MULTILINE):
        assert Path(path).exists()


def _check_command(command: subprocess.CompletedProcess[str], fault: Fault) -> None:
    assert command.returncode == 1
    assert command.stderr == ""
    checks, start = command.stdout.split("\nStarting a VM with these settings:\n")
    assert fault.error in start
    assert re.search(fault.says, start, re.DOTALL)
    assert re.search(rf"^What to do: .*{fault.todo}", start, re.MULTILINE)
    missing = [line for line in checks.splitlines() if line.startswith("MISSING")]
    if fault.check:
        assert any(re.match(rf"MISSING +{fault.check}", line) for line in missing), checks
    else:  # nothing that can be seen without a start
        assert not missing, checks


def test_with_nothing_missing_the_command_starts_a_vm_and_ends_it(
    spec: str, module_host: VmHost
) -> None:
    command = module_host.cli("doctor", "--start", "--json")
    assert command.returncode == 0, command.stdout
    start = json.loads(command.stdout)["start"]
    steps = [step["what"] for step in start["steps"]]
    assert steps == ["QEMU started", "guest awake", "1 + 1 is 2", "VM ended"]
    assert all(step["seconds"] > 0 for step in start["steps"])
    assert start["vm"].startswith("minimal, 512 MiB, ")
    assert module_host.left() == []
    assert module_host.records() == []


def test_a_full_disk_for_logs_costs_the_logs_only(
    spec: str, module_host: VmHost, work: Workshop
) -> None:
    place = work.tmpfs("size=64k,mode=700")
    fill(place)
    env = {"VMKERNEL_STATE_DIR": str(place), "VMKERNEL_ACCELERATOR": "tcg"}
    kernel = Kernel(spec, env={**module_host.env, **env})
    try:
        assert kernel.run("6 * 7").result == "42"
    finally:
        kernel.shut_down()


def test_a_full_disk_for_the_record_costs_the_record_only(
    spec: str, module_host: VmHost, work: Workshop
) -> None:
    """All that matters of a notebook's VM is in the process table and in locks."""
    place = work.tmpfs("size=1m,mode=700")
    filling = fill(place)
    env = {"VMKERNEL_DATABASE_FILE": str(place / "vms.sqlite")}
    kernel = Kernel(spec, env={**module_host.env, **env})
    try:
        assert kernel.run("6 * 7").result == "42"
        told = module_host.cli("ps", **env)
        assert told.returncode == 1
        assert re.search(r"cannot use the record of VMs, .*full", told.stderr)
        assert re.search(r"What to do: free space .*VMKERNEL_DATABASE_FILE", told.stderr)
        filling.unlink()
        (vm,) = json.loads(module_host.cli("ps", "--json", **env).stdout)["vms"]
        assert vm["pid"] in module_host.qemus(), "found in the process table"
    finally:
        kernel.shut_down()
    assert json.loads(module_host.cli("ps", "--json", **env).stdout)["vms"] == []


def test_memory_too_small_to_boot_is_told_at_once(spec: str, module_host: VmHost) -> None:
    small = {"VMKERNEL_MEMORY": "64M"}
    kernel = Kernel(spec, env={**module_host.env, **small})
    try:
        cell = kernel.run("6 * 7")
        assert cell.status == "error"
        assert cell.error["ename"] == "VmBootError"
        assert cell.error["evalue"].startswith("The guest did not boot.")
        assert "too little memory to boot: set VMKERNEL_MEMORY higher" in cell.traceback
        (log,) = re.findall(r"^Log: (.*)$", cell.traceback, re.MULTILINE)
        assert Path(log).exists()
        assert kernel.request("kernel_info_request").status == "ok"
    finally:
        kernel.shut_down()
    command = module_host.cli("doctor", "--start", **small)
    assert command.returncode == 1
    assert re.search(r"^What to do: .*VMKERNEL_MEMORY higher", command.stdout, re.MULTILINE)


class TestOrdinaryUser:
    """Whom permissions stop, other than root."""

    @pytest.fixture
    def theirs(self, session_dir: Path, minimal_image: str) -> VmHost:
        if os.geteuid() != 0:
            pytest.skip("only root can become another user")
        return VmHost(session_dir, own_cache=True, user=NOBODY)

    def _start(self, host: VmHost) -> dict[str, str]:
        """The start that `vmkernel doctor --start` tried."""
        command = host.cli("doctor", "--start", "--json", PYTHONPATH=_repository())
        assert command.returncode == 1, command
        answer: dict[str, str] = json.loads(command.stdout)["start"]
        return answer

    @pytest.mark.parametrize("mode", [0o000, 0o500])
    def test_templates_out_of_reach(self, mode: int, theirs: VmHost) -> None:
        templates = theirs.cache_dir / "templates"
        templates.mkdir()
        os.chown(templates, NOBODY, NOBODY)
        templates.chmod(mode)
        error = self._start(theirs)["error"]
        assert error.startswith(
            f"TemplateError: the VM template could not be written to {templates}"
        )
        assert re.search(r"What to do: .*make it writable.*VMKERNEL_CACHE_DIR", error)
        templates.chmod(0o700)

    def test_an_image_out_of_reach(self, theirs: VmHost) -> None:
        image = Path(theirs.env["VMKERNEL_IMAGES_DIR"]) / "minimal"
        image.chmod(0)
        error = self._start(theirs)["error"]
        assert error.startswith("ImageError: The image 'minimal' cannot be read: ")
        assert "What to do: give this user the right to read it" in error

    def test_a_semaphore_file_of_somebody_else(self, theirs: VmHost, tmp_path: Path) -> None:
        slots = theirs.directory / "slots"
        slots.touch(mode=0o644)
        theirs.env["VMKERNEL_SEMAPHORE_FILE"] = str(slots)
        error = self._start(theirs)["error"]
        assert error.startswith(
            f"VmCapacityError: cannot use the semaphore file {slots}: Permission"
        )
        assert "What to do: for a semaphore file that all users share, the administrator" in error


def _repository() -> str:
    import vmkernel

    return str(Path(vmkernel.__file__).parents[1])
