"""Libraries that a clone's QEMU is started without, and the object that stands for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from prerequisites import missing
from vmhost import RunningVm, VmHost
from vmkernel.host.start import Label, VmStart
from vmkernel.settings import Settings
from vmkernel.vm import absent, sandbox
from vmkernel.vm.absent import Absent, absent_for, stand_in
from vmkernel.vm.command import Machine
from vmkernel.vm.machine import Spawned, spawn
from vmkernel.vm.sandbox import find_sandbox
from vmkernel.vm.wall import Wall, enclose

QEMU = "/usr/bin/qemu-system-x86_64"


@pytest.fixture(scope="module")
def found() -> Absent:
    return absent_for(QEMU, sandbox._libraries(QEMU))


def run(tmp_path: Path, found: Absent) -> subprocess.CompletedProcess[str]:
    """`qemu --version`, with the object for these libraries."""
    (tmp_path / "object.so").write_bytes(found.data)
    for name in found.names:
        (tmp_path / name).symlink_to(tmp_path / "object.so")
    return subprocess.run(
        [QEMU, "--version"],
        env={"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )


class TestObject:
    def test_qemu_starts_with_it_and_says_nothing(self, tmp_path: Path, found: Absent) -> None:
        assert found.names
        done = run(tmp_path, found)
        assert (done.returncode, done.stderr) == (0, "")
        assert "QEMU emulator version" in done.stdout

    def test_a_function_that_it_lacks_is_found_out_at_the_start(
        self, tmp_path: Path, found: Absent
    ) -> None:
        """QEMU is linked with -z now; so a stand-in that is not whole starts nothing."""
        done = run(tmp_path, found._replace(data=stand_in([], [])))
        assert done.returncode in (1, 127)
        assert "symbol" in done.stderr or "version" in done.stderr

    def test_who_calls_a_function_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "object.so"
        path.write_bytes(stand_in(["harmless", "cs_open"], ["LIB_1.0"]))
        program = f"import ctypes; ctypes.CDLL({str(path)!r}).cs_open()"
        done = subprocess.run([sys.executable, "-c", program], check=False)
        assert done.returncode == -signal.SIGILL

    def test_only_what_is_on_the_list_is_left_out(self, found: Absent) -> None:
        names = {name.partition(".so")[0] for name in found.names}
        assert names <= set(absent.UNUSED)
        assert not names & {"libc", "libglib-2.0", "libgnutls", "libseccomp", "libnuma", "libfdt"}

    def test_what_another_library_needs_stays(self) -> None:
        libraries = sandbox._libraries(QEMU)
        without_qemu = absent_for(libraries["libslirp.so.0"], libraries)
        assert without_qemu.names == []  # glib is not on the list
        assert absent._loaded(["a", "b"], {"b"}, {"a": ["c"], "b": ["d"], "c": ["b"]}) == {"a", "c"}


class TestWall:
    def test_a_clone_in_bubblewrap_alone_is_without(self, machine: Machine) -> None:
        around = Wall(bwrap="/usr/bin/bwrap", absent=("liba.so.1", "libb.so.2"), stand_in=b"x")
        assert "/absent/liba.so.1" in argv_of(around, machine)
        assert "/absent/libb.so.2" in argv_of(around, machine)
        assert "LD_LIBRARY_PATH" in argv_of(around, machine)
        template = msgspec.structs.replace(machine, incoming=False, ram_share=True)
        bare = msgspec.structs.replace(around, bwrap="")
        kvm = msgspec.structs.replace(machine, accelerator="kvm")
        cases = ((around, template), (bare, machine), (around, kvm))
        for argv in (argv_of(*case) for case in cases):
            assert "/absent" not in " ".join(argv)
            assert "LD_LIBRARY_PATH" not in " ".join(argv)

    def test_a_qemu_that_does_not_like_it_has_its_libraries(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Absent
    ) -> None:
        def settings(name: str) -> Settings:
            return Settings(state_dir=tmp_path / name, sandbox="auto")

        usual = find_sandbox(settings("usual"), QEMU)
        if usual.problem:
            pytest.skip(usual.problem)
        assert usual.wall.absent == tuple(found.names)
        assert find_sandbox(settings("usual"), QEMU) == usual  # as it was kept
        broken = found._replace(data=stand_in([], []))
        monkeypatch.setattr(absent, "absent_for", lambda *_: broken)
        other = find_sandbox(settings("broken"), QEMU)
        assert other.wall == msgspec.structs.replace(usual.wall, absent=(), stand_in=b"")

        def not_understood(*_: object) -> Absent:
            raise ValueError("no ELF file")

        monkeypatch.setattr(absent, "absent_for", not_understood)
        assert find_sandbox(settings("strange"), QEMU) == other


@pytest.fixture
def host(template: str, session_dir: Path) -> Iterator[VmHost]:
    """A host of the test's own."""
    host = VmHost(session_dir)
    if problem := find_sandbox(host.settings(), QEMU).problem:
        missing(problem)
    yield host
    host.clear()


# Calls two bytes: ud2
CALL = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b"\\x0f\\x0b")
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""


async def test_a_call_ends_the_vm_and_the_next_has_all_libraries(host: VmHost) -> None:
    settings = host.settings()
    assert find_sandbox(settings, QEMU).wall.absent
    async with RunningVm(settings) as vm:
        assert vm.start.record is not None
        machine, wall = vm.guest.vm.machine, find_sandbox(settings, QEMU).wall
        assert not vm.guest.vm.process.called_what_is_absent
    assert find_sandbox(settings, QEMU).wall == wall
    # Such a call in QEMU's place, and what the owner of the VM then does
    scratch = os.open(settings.cache_dir, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    spawned = spawn(
        msgspec.structs.replace(machine, scratch_fd=scratch),
        settings.state_dir,
        wall=wall,
        slot=0,
        command_line=lambda _: ["/usr/bin/python3", "-I", "-c", CALL],
    )
    os.close(scratch)
    spawned.process.watch()
    assert await spawned.process.wait() == -signal.SIGILL
    error = spawned.process.failure("the VM died")
    assert "the next one has them all" in error.hint
    start = VmStart(settings, Label())
    start._guest = _Dead(spawned)  # type: ignore[assignment]
    await start.close()
    assert find_sandbox(settings, QEMU).wall == msgspec.structs.replace(
        wall, absent=(), stand_in=b""
    )
    for sock in (spawned.monitor, spawned.kernel, spawned.agent, spawned.control, spawned.console):
        sock.close()
    await spawned.process.close()


class _Dead:
    """A guest whose QEMU has ended."""

    def __init__(self, vm: Spawned) -> None:
        self.vm = vm

    async def close(self) -> None:
        pass


async def test_a_real_clone_has_none_of_them(host: VmHost, found: Absent) -> None:
    async with RunningVm(host.settings()) as vm:
        pid = vm.guest.vm.process.qemu_pid
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "vmkernel-absent" in maps
        loaded = {os.path.basename(line.split()[-1]) for line in maps.splitlines()}
        real = {Path(sandbox._libraries(QEMU)[name]).resolve().name for name in found.names}
        assert not loaded & real


def argv_of(wall: Wall, machine: Machine) -> list[str]:
    enclosed = enclose(wall, machine, 0)
    for fd in enclosed.fds:
        os.close(fd)
    return enclosed.argv


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A clone, whose RAM is there."""
    (tmp_path / "ram").touch()
    return Machine(
        vm_id="test",
        qemu=QEMU,
        accelerator="tcg",
        memory_mib=64,
        vcpus=1,
        cmdline="",
        kernel=None,
        initrd=None,
        rootfs=str(tmp_path / "rootfs"),
        scratch_fd=0,
        ram_path=str(tmp_path / "ram"),
        ram_share=False,
        incoming=True,
    )
