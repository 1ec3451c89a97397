"""Images really built: by root and by an ordinary user, at once, with failures, and looked into.

The builds of this module run at the same time, in processes of their own, and each test looks at
what came of one of them: a build is a minute's work and mostly waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import pytest

from prerequisites import missing
from vmkernel.errors import ImageError
from vmkernel.image.initrd import CpioWriter, modinfo, read_cpio
from vmkernel.image.store import find_image, verify_image
from vmkernel.settings import Settings, load_settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480)]

REPOSITORY = Path(__file__).resolve().parents[2]
USER = "vmkernel-test"
BUILD_LIMIT = 420

# What a builder process runs; the command line's own code, without needing its installation.
MAIN = "from vmkernel.cli.app import main; main()"


class Build(NamedTuple):
    """A build that has ended."""

    code: int
    output: str
    images_dir: Path


class Builder(NamedTuple):
    """A build under way."""

    process: subprocess.Popen[str]
    images_dir: Path

    def wait(self) -> Build:
        output = self.process.communicate(timeout=BUILD_LIMIT)[0]
        return Build(self.process.returncode, output, self.images_dir)


class Started(NamedTuple):
    """The builds of this module."""

    one: Builder
    other: Builder
    user: Builder | None
    user_reason: str
    bad_requirement: Builder
    bad_mirror: Builder
    bad_package: Builder


def start(images_dir: Path, *arguments: str, user: str = "", python: str = "") -> Builder:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("VMKERNEL_")
    }
    # conftest leads XDG_CONFIG_HOME away from the user, whose pip configuration may lie there.
    environment.pop("XDG_CONFIG_HOME", None)
    environment["VMKERNEL_IMAGES_DIR"] = str(images_dir)
    environment["VMKERNEL_STATE_DIR"] = str(images_dir / ".state")
    command = [python or sys.executable, "-c", MAIN, "image", "build", *arguments]
    if user:
        home = pwd.getpwnam(user).pw_dir
        environment = {
            "HOME": home,
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": python_path(),
            "VMKERNEL_IMAGES_DIR": str(images_dir),
            "VMKERNEL_STATE_DIR": str(images_dir / ".state"),
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
        }
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", *command]
    process = subprocess.Popen(
        command, env=environment, cwd="/", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return Builder(process, images_dir)


def python_path() -> str:
    import msgspec

    return os.pathsep.join([str(REPOSITORY), str(Path(msgspec.__file__).parents[1])])


def python_for(user: str) -> str:
    """An interpreter that *user* may run, with what the builder imports; "" when there is none."""
    for python in (sys.executable, "/usr/bin/python3"):
        result = subprocess.run(
            ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups",
             python, "-c", "import click, msgspec, vmkernel.image.builder"],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": python_path()}, cwd="/",
            capture_output=True, check=False,
        )  # fmt: skip
        if result.returncode == 0:
            return python
    return ""


@contextlib.contextmanager
def ordinary_user() -> Generator[str, None, None]:
    """The name of an ordinary user, made for this module when root runs the tests."""
    created = False
    try:
        pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "--create-home", USER], check=True, capture_output=True)
        created = True
    try:
        yield USER
    finally:
        if created:
            subprocess.run(["userdel", "--remove", USER], check=True, capture_output=True)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Generator[Started, None, None]:
    for tool in ("mmdebstrap", "mkfs.erofs"):
        if shutil.which(tool) is None:
            missing(f"{tool} is not installed")
    work = tmp_path_factory.mktemp("images")
    bad = work / "bad.toml"
    bad.write_text('name = "bad"\n[python]\nrequirements = ["ipykernel", "no-such-dist-x7==1"]\n')
    worse = work / "worse.toml"
    worse.write_text(
        'name = "worse"\n[debian]\npackages = ["no-such-package-x7"]\n'
        '[python]\nrequirements = ["ipykernel"]\n'
    )
    with contextlib.ExitStack() as stack:
        user_builder, reason = None, "not root, so the other tests are an ordinary user's already"
        if os.geteuid() == 0:
            user = stack.enter_context(ordinary_user())
            python = python_for(user)
            reason = "no Python interpreter that an ordinary user may run imports msgspec and click"
            if python:
                home = Path(pwd.getpwnam(user).pw_dir)
                user_builder = start(home / "images", "minimal", user=user, python=python)
        result = Started(
            one=start(work / "images", "minimal", "--force"),
            other=start(work / "images", "minimal", "--force"),
            user=user_builder,
            user_reason=reason,
            bad_requirement=start(work / "bad", str(bad)),
            bad_mirror=start(
                work / "mirror", "minimal", "--debian-mirror", "http://127.0.0.1:9/debian"
            ),
            bad_package=start(work / "worse", str(worse)),
        )
        try:
            yield result
        finally:
            for builder in result:
                if isinstance(builder, Builder):
                    builder.process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        builder.process.communicate(timeout=30)
                    builder.process.kill()
                    shutil.rmtree(builder.images_dir, ignore_errors=True)


def images_settings(images_dir: Path) -> Settings:
    return load_settings(environ={"HOME": "/", "VMKERNEL_IMAGES_DIR": str(images_dir)})


def nothing_left(images_dir: Path) -> bool:
    left = {path.name for path in images_dir.iterdir()}
    return not {name for name in left if not name.startswith((".lock-", ".state"))}


@pytest.fixture(scope="module")
def built(started: Started) -> tuple[Build, Build]:
    """What two builders of one image, started together, ended with."""
    return started.one.wait(), started.other.wait()


def test_a_mirror_that_is_not_there(started: Started) -> None:
    build = started.bad_mirror.wait()
    assert build.code == 1
    assert "http://127.0.0.1:9/debian" in build.output
    assert "refused" in build.output
    assert "--debian-mirror" in build.output
    assert nothing_left(build.images_dir)


def test_a_debian_package_that_does_not_exist(started: Started) -> None:
    build = started.bad_package.wait()
    assert build.code == 1
    assert "no package no-such-package-x7" in build.output
    assert "debian.packages" in build.output
    assert nothing_left(build.images_dir)


def test_a_requirement_that_does_not_exist(started: Started) -> None:
    build = started.bad_requirement.wait()
    assert build.code == 1
    assert "no-such-dist-x7" in build.output
    assert "python.requirements" in build.output
    assert nothing_left(build.images_dir)


def test_two_builders_build_once(built: tuple[Build, Build]) -> None:
    for build in built:
        assert build.code == 0, build.output
    worked = [build for build in built if "100% done" in build.output]
    waited = [build for build in built if "waiting for another build" in build.output]
    assert len(worked) == len(waited) == 1
    assert worked != waited
    names = {path.name for path in built[0].images_dir.iterdir()}
    assert names == {"minimal", ".lock-minimal", ".state"}


def test_the_image_is_whole_and_verify_sees_a_flipped_bit(built: tuple[Build, Build]) -> None:
    settings = images_settings(built[0].images_dir)
    image = verify_image("minimal", settings)
    with image.rootfs.open("r+b") as file:
        file.seek(image.manifest.files["rootfs.erofs"].size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
        file.flush()
        try:
            with pytest.raises(ImageError, match=r"rootfs\.erofs has changed"):
                verify_image("minimal", settings)
        finally:
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte]))
    verify_image("minimal", settings)


def test_the_lock_names_every_package(built: tuple[Build, Build]) -> None:
    image = find_image("minimal", images_settings(built[0].images_dir))
    lines = image.lock.read_text().splitlines()
    debian = {line.split()[0] for line in lines if len(line.split()) == 3}
    python = {line.split("==")[0] for line in lines if "==" in line}
    assert {"bash", "python3", "procps", "busybox-static"} <= debian
    assert f"linux-image-{image.manifest.kernel_release}" in debian
    assert {"ipykernel", "ipython", "msgspec", "psutil", "pip"} <= python
    assert "numpy" not in python
    assert image.manifest.python_version.startswith("3.")


def test_modules_stand_in_an_order_that_loads(built: tuple[Build, Build]) -> None:
    image = find_image("minimal", images_settings(built[0].images_dir))
    entries = read_cpio(image.initrd.read_bytes())
    order = entries["modules.order"][1].decode().split()
    assert {"/modules/virtio_mmio.ko", "/modules/erofs.ko", "/modules/overlay.ko"} <= set(order)
    loaded: set[str] = set()
    for path in order:
        info = modinfo(entries[path[1:]][1])
        needed = {name for text in info.get("depends", []) for name in text.split(",") if name}
        assert {name.replace("-", "_") for name in needed} <= loaded, path
        loaded.add(Path(path).stem)


def test_the_tree_is_fit_for_a_guest(built: tuple[Build, Build], tmp_path: Path) -> None:
    image = find_image("minimal", images_settings(built[0].images_dir))
    root = tmp_path / "root"
    extract = ["fsck.erofs", f"--extract={root}", "--preserve-perms", str(image.rootfs)]
    if os.geteuid() == 0:
        extract.insert(2, "--preserve-owner")
    subprocess.run(extract, check=True, capture_output=True)
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            status = Path(directory, name).lstat()
            if not stat.S_ISLNK(status.st_mode):
                assert not status.st_mode & 0o6000, f"{directory}/{name}"
            assert stat.S_IFMT(status.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
            if os.geteuid() == 0:
                assert (status.st_uid, status.st_gid) == (0, 0), f"{directory}/{name}"
    assert "user:x:1000:1000::/home/user:/bin/bash" in (root / "etc/passwd").read_text()
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    assert stat.S_IMODE((root / "etc/shadow").stat().st_mode) & 0o007 == 0
    # nothing of the host
    assert (root / "etc/resolv.conf").read_text() == ""
    assert os.uname().nodename not in (root / "etc/hosts").read_text().split()
    assert (root / "etc/hostname").read_text() == "vmkernel\n"
    assert not list((root / "etc/apt/apt.conf.d").glob("*mmdebstrap*"))
    packages = next((root / "usr/local/lib").glob("python3.*/dist-packages"))
    for script in (root / "usr/local/bin").iterdir():
        if not script.is_symlink():
            assert script.read_bytes().startswith(b"#!/usr/bin/python3"), script
    # bytecode with the guest's paths, and unchecked hashes (PEP 552: flags 1)
    bytecode = next((packages / "ipykernel/__pycache__").glob("kernelapp.*.pyc")).read_bytes()
    assert bytecode[4:8] == b"\x01\x00\x00\x00"
    assert f"/usr/local/lib/{packages.parent.name}/dist-packages/ipykernel".encode() in bytecode
    assert b".tmp-minimal" not in bytecode
    shutil.rmtree(root)


def test_an_ordinary_user_builds_the_same_image(
    started: Started, built: tuple[Build, Build]
) -> None:
    if started.user is None:
        pytest.skip(started.user_reason)
    build = started.user.wait()
    assert build.code == 0, build.output
    theirs = verify_image("minimal", images_settings(build.images_dir))
    assert theirs.rootfs.stat().st_uid == pwd.getpwnam(USER).pw_uid
    ours = find_image("minimal", images_settings(built[0].images_dir))
    # Unless a package was updated in between, not a bit depends on who builds where.
    if theirs.lock.read_bytes() == ours.lock.read_bytes():
        assert theirs.digest == ours.digest


def test_a_killed_builder_leaves_nothing_that_the_next_does_not_sweep(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "VMKERNEL_IMAGES_DIR": str(tmp_path / "i"),
    }
    command = [sys.executable, "-c", MAIN, "image", "build", "minimal"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as builder:
        for _ in range(200):
            if chroots(tmp_path):
                break
            time.sleep(0.1)
        assert list((tmp_path / "i").glob(".tmp-minimal-*"))
        builder.send_signal(signal.SIGKILL)
    for _ in range(200):
        if not processes_with(str(tmp_path)):
            break
        time.sleep(0.1)
    assert processes_with(str(tmp_path)) == []
    again = subprocess.run(
        [*command, "--debian-mirror", "http://127.0.0.1:9/debian"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 1
    assert {path.name for path in (tmp_path / "i").iterdir()} == {".lock-minimal"}


def test_a_builder_that_is_asked_to_end_leaves_nothing(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "VMKERNEL_IMAGES_DIR": str(tmp_path / "i"),
    }
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "image", "build", "minimal"], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as builder:  # fmt: skip
        for _ in range(200):
            if chroots(tmp_path):
                break
            time.sleep(0.1)
        builder.send_signal(signal.SIGTERM)
        assert builder.wait(30) == 128 + signal.SIGTERM
    assert processes_with(str(tmp_path)) == []
    assert {path.name for path in (tmp_path / "i").iterdir()} == {".lock-minimal"}
    assert chroots(tmp_path) == []


def chroots(directory: Path) -> list[Path]:
    """mmdebstrap's temporary trees. (Its empty keyring directory it forgets at times, itself.)"""
    return [path for path in directory.glob("mmdebstrap.*") if "gpghome" not in path.name]


def processes_with(word: str) -> list[str]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if word in command and directory.name != str(os.getpid()):
                found.append(command)
    return found


def test_a_disk_without_room_is_told_before_anything_is_done(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=50m none "$1" && shift && "$@"',
         "sh", tmp_path, sys.executable, "-c", MAIN, "image", "build", "minimal"],
        env={**os.environ, "VMKERNEL_IMAGES_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert f"MiB free in {tmp_path}; there are 50 MiB" in result.stderr
    assert "VMKERNEL_IMAGES_DIR" in result.stderr


# ---------------------------------------------------------------- the first program of the guest


def boot(directory: Path, *, scratch: bool, guest_code: bool) -> str:
    """Boot the user's minimal image until QEMU ends by itself; what the console showed."""
    image = find_image("minimal", load_settings())
    initrd = image.initrd.read_bytes()
    if guest_code:
        archive = CpioWriter()
        archive.directory("vmkernel", 0o700)
        archive.file("vmkernel/start.py", GUEST_CODE.encode(), 0o600)
        initrd += archive.finish()
    (directory / "initrd").write_bytes(initrd)
    disks = [f"driver=file,filename={image.rootfs},read-only=on"]
    if scratch:
        subprocess.run(["truncate", "-s", "64M", directory / "scratch"], check=True)
        command = ["mkfs.ext4", "-q", "-O", "^has_journal", str(directory / "scratch")]
        subprocess.run(command, env={"PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"}, check=True)
        # First in order: init must not rely on it.
        disks.insert(0, f"driver=file,filename={directory}/scratch")
    command = [
        load_settings().qemu, "-M", "microvm,acpi=on,isa-serial=on", "-accel", "tcg",
        "-cpu", "max", "-m", "512", "-nodefaults", "-no-user-config", "-display", "none",
        "-no-reboot", "-serial", "stdio", "-kernel", str(image.kernel),
        "-initrd", str(directory / "initrd"), "-append",
        "console=ttyS0 quiet loglevel=3 panic=-1 reboot=t tsc=reliable clocksource=tsc "
        f"tsc_early_khz={tsc_khz()}",
    ]  # fmt: skip
    for number, disk in enumerate(disks):
        command += ["-blockdev", f"{disk},node-name=d{number}"]
        command += ["-device", f"virtio-blk-device,drive=d{number}"]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150, check=False
    )
    return result.stdout + result.stderr


GUEST_CODE = """
import json, os, sys
report = {
    "pid": os.getpid(), "environment": dict(os.environ),
    "owner": [os.stat(p).st_uid for p in ("/run/vmkernel", "/home/user", "/home/user/.bashrc")],
    "mode": oct(os.stat("/run/vmkernel").st_mode & 0o7777),
    "links": os.readlink("/dev/fd"), "host": os.uname().nodename,
    "interfaces": sorted(os.listdir("/sys/class/net")),
    "up": open("/sys/class/net/lo/operstate").read().strip(),
}
open("/home/user/written", "w").write("x")
open("/root/written", "w").write("x")
print("REPORT", json.dumps(report), flush=True)
os.sync()
open("/proc/sysrq-trigger", "w").write("b")
"""


def tsc_khz() -> int:
    from vmkernel.vm.tsc import host_tsc_khz

    return host_tsc_khz(load_settings().state_dir)


@pytest.fixture
def qemu(minimal_image: str) -> None:
    if shutil.which(load_settings().qemu) is None:
        missing("QEMU is not installed")


@pytest.mark.usefixtures("qemu")
def test_init_becomes_the_guests_code(tmp_path: Path) -> None:
    console = boot(tmp_path, scratch=True, guest_code=True)
    lines = [line for line in console.splitlines() if line.startswith("REPORT ")]
    assert lines, console
    report = json.loads(lines[0].removeprefix("REPORT "))
    assert report["pid"] == 1
    assert report["environment"].keys() == {"PATH", "LANG", "HOME", "TERM"}
    assert report["owner"] == [0, 1000, 1000]
    assert report["mode"] == "0o755"
    assert report["links"] == "/proc/self/fd"
    assert report["host"] == "vmkernel"
    assert report["interfaces"] == ["lo"]
    assert report["up"] == "unknown"  # what an interface without a carrier says when it is up


@pytest.mark.usefixtures("qemu")
def test_init_says_that_the_scratch_disk_is_missing_and_ends(tmp_path: Path) -> None:
    console = boot(tmp_path, scratch=False, guest_code=True)
    assert "vmkernel-init: finding the scratch disk failed" in console


@pytest.mark.usefixtures("qemu")
def test_init_says_that_the_guests_code_is_missing_and_ends(tmp_path: Path) -> None:
    console = boot(tmp_path, scratch=True, guest_code=False)
    assert "vmkernel-init: finding the guest's code failed" in console
