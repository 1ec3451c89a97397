"""The parts of the wall by themselves: command lines, the shim, the filter, and a host without."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from vmkernel.errors import VmBootError
from vmkernel.host.slotfile import MAX_SLOTS
from vmkernel.settings import Settings
from vmkernel.vm import sandbox, wall
from vmkernel.vm.command import Machine, machine_fingerprint, qemu_argv
from vmkernel.vm.filter import DENIED, seccomp_filter
from vmkernel.vm.limits import Holder, Limits, start_command
from vmkernel.vm.sandbox import find_sandbox, find_wall
from vmkernel.vm.shim import NAMES, shim
from vmkernel.vm.wall import VM_UIDS, Enclosed, Wall, enclose, sealed_memory, vm_uid

QEMU = "/usr/bin/qemu-system-x86_64"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A clone, whose files are there."""
    for name in ("ram", "rootfs", "base"):
        (tmp_path / name).touch()
    scratch = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    yield Machine(
        vm_id="test",
        qemu=QEMU,
        accelerator="tcg",
        memory_mib=64,
        vcpus=1,
        cmdline="",
        kernel=None,
        initrd=None,
        rootfs=str(tmp_path / "rootfs"),
        scratch_fd=scratch,
        scratch_base=str(tmp_path / "base"),
        ram_path=str(tmp_path / "ram"),
        ram_share=False,
        incoming=True,
    )
    os.close(scratch)


def enclosed(around: Wall, machine: Machine, slot: int | None = 3) -> Enclosed:
    found = enclose(around, machine, slot)
    for fd in found.fds:
        os.close(fd)
    return found


def triple(argv: list[str], option: str, place: str) -> str:
    """The source of what is bound to a place."""
    return next(
        argv[at + 1]
        for at, word in enumerate(argv)
        if word == option and argv[at + 2 : at + 3] == [place]
    )


class TestCommandLine:
    def test_a_users_files_are_bound_to_their_own_names_read_only(self, machine: Machine) -> None:
        argv, user, _ = enclosed(Wall(bwrap="/usr/bin/bwrap"), machine)
        for path in (machine.ram_path, machine.rootfs, str(machine.scratch_base)):
            assert triple(argv, "--ro-bind", path) == path
        assert "--bind" not in argv
        assert argv[-len(qemu_argv(machine)) :] == qemu_argv(machine)
        assert user == []

    def test_a_templates_ram_alone_is_written_to(self, machine: Machine) -> None:
        machine = msgspec.structs.replace(machine, ram_share=True, incoming=False)
        argv, _, _ = enclosed(Wall(bwrap="/usr/bin/bwrap"), machine, None)
        assert triple(argv, "--bind", machine.ram_path) == machine.ram_path
        assert argv.count("--bind") == 1
        assert "LD_PRELOAD" not in argv

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give its VMs users")
    def test_a_vm_of_roots_has_a_user_of_its_own_and_descriptors(self, machine: Machine) -> None:
        argv, user, fds = enclosed(Wall(bwrap="/usr/bin/bwrap", own_user=True), machine)
        assert user == ["--reuid=65540", "--regid=65540", "--clear-groups"]
        link = triple(argv, "--symlink", machine.ram_path)
        assert int(link.removeprefix("/proc/self/fd/")) in fds
        assert os.fstat(machine.scratch_fd).st_uid == 65540
        assert Path(machine.ram_path).stat().st_uid == 0
        argv, _, _ = enclosed(Wall(own_user=True), machine)
        assert argv[:3] == ["/usr/bin/env", "-i", "LC_ALL=C"]
        assert machine.ram_path not in " ".join(argv)
        assert f"mem-path={link[:-1]}" in " ".join(argv)

    def test_each_slot_has_a_user_and_templates_have_one(self) -> None:
        uids = [vm_uid(slot) for slot in (None, *range(MAX_SLOTS))]
        assert len(set(uids)) == len(uids)
        assert set(uids) <= set(VM_UIDS)
        assert set(VM_UIDS) <= set(range(65536, 100000))  # nobody else gives these out

    def test_the_kvm_device_is_there_for_kvm_alone(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        device = tmp_path / "kvm"
        device.touch()
        monkeypatch.setattr(wall, "_KVM", str(device))
        around = Wall(bwrap="/usr/bin/bwrap", own_user=os.geteuid() == 0)
        argv, _, _ = enclosed(around, machine)
        assert str(device) not in argv
        argv, user, _ = enclosed(around, msgspec.structs.replace(machine, accelerator="kvm"))
        assert triple(argv, "--dev-bind", str(device)) == str(device)
        assert argv.index("--remount-ro") > argv.index(str(device))
        if user:
            assert user[2] == f"--groups={device.stat().st_gid}"

    def test_a_qemu_that_can_open_ram_for_reading_is_told_to(self, machine: Machine) -> None:
        argv, _, _ = enclosed(Wall(bwrap="/usr/bin/bwrap", private_option=True), machine)
        assert any(word.endswith("share=off,readonly=on,rom=off") for word in argv)
        shared = msgspec.structs.replace(machine, ram_share=True)
        argv, _, _ = enclosed(Wall(bwrap="/usr/bin/bwrap", private_option=True), shared)
        assert not any("readonly=on,rom" in word for word in argv)
        told = msgspec.structs.replace(machine, ram_read_only=True)
        assert machine_fingerprint(told) == machine_fingerprint(machine)

    def test_a_qemu_outside_usr_brings_its_directories(self, machine: Machine) -> None:
        own = msgspec.structs.replace(machine, qemu="/opt/qemu/bin/qemu-system-x86_64")
        argv, _, _ = enclosed(Wall(bwrap="/usr/bin/bwrap"), own)
        for path in ("/opt/qemu/bin", "/opt/qemu/share/qemu", "/opt/qemu/lib"):
            assert triple(argv, "--ro-bind-try", path) == path

    def test_no_word_of_it_is_one_that_systemd_run_might_change(self, machine: Machine) -> None:
        """Else the quota of a VM behind the wall would be low priority and no more."""
        argv, _, _ = enclosed(Wall(bwrap="/usr/bin/bwrap"), machine)
        assert not [word for word in argv if "$" in word]
        assert "--scope" in start_command(argv, Limits(512, 50), Holder("system", ""), 1)

    def test_a_file_that_is_gone_leaves_no_descriptor(self, machine: Machine) -> None:
        Path(machine.ram_path).unlink()
        before = len(os.listdir("/proc/self/fd"))
        if os.geteuid() == 0:
            with pytest.raises(FileNotFoundError):
                enclose(Wall(own_user=True), machine, 3)
        assert len(os.listdir("/proc/self/fd")) == before


PROGRAM = r"""
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for name in sys.argv[2:]:
    fd = getattr(libc, name)(sys.argv[1].encode(), os.O_RDWR)
    print(name, fd >= 0 and open(f"/proc/self/fdinfo/{fd}").read().split()[3])
    if fd >= 0:
        private = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        private[0] = 1
        try:
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except PermissionError:
            print("not shared")
print(libc.open64(b"/no/such/file", os.O_RDWR), ctypes.get_errno())
print(libc.open64(sys.argv[1].encode(), os.O_WRONLY), ctypes.get_errno())
print(libc.open64(sys.argv[1].encode(), os.O_RDWR | os.O_CREAT, 0o600), ctypes.get_errno())
print(libc.open64(b"/dev/null", os.O_RDWR) >= 0)
"""


class TestShim:
    def run(self, path: Path, *, preload: bool) -> list[str]:
        path.write_bytes(bytes(4096))
        path.chmod(0o444)
        fds = (sealed_memory("shim", shim()), os.open(path, os.O_RDONLY))
        become = ["setpriv", "--reuid=65536", "--regid=65536", "--clear-groups"]
        try:
            done = subprocess.run(
                [*(become if os.geteuid() == 0 else []), "/usr/bin/python3", "-c", PROGRAM,
                 f"/proc/self/fd/{fds[1]}", *NAMES],
                env={"LD_PRELOAD": f"/proc/self/fd/{fds[0]}"} if preload else {},
                pass_fds=fds,
                capture_output=True,
                text=True,
            )  # fmt: skip
        finally:
            for fd in fds:
                os.close(fd)
        assert not done.stderr
        return done.stdout.splitlines()

    def test_it_opens_for_reading_what_may_not_be_written_to(self, tmp_path: Path) -> None:
        lines = self.run(tmp_path / "ram", preload=True)
        assert lines[:8] == [word for name in NAMES for word in (f"{name} 0100000", "not shared")]
        assert lines[8:] == ["-1 2", "-1 13", "-1 13", "True"]

    def test_without_it_the_kernels_refusal_stands(self, tmp_path: Path) -> None:
        lines = self.run(tmp_path / "ram", preload=False)
        assert lines[:4] == [f"{name} False" for name in NAMES]
        assert lines[4:] == ["-1 2", "-1 13", "-1 13", "True"]

    def test_whoever_loads_it_gets_no_huge_pages(self) -> None:
        fd = sealed_memory("shim", shim())
        try:
            status = subprocess.run(
                ["/bin/cat", "/proc/self/status"],
                env={"LD_PRELOAD": f"/proc/self/fd/{fd}"},
                pass_fds=(fd,),
                capture_output=True,
                text=True,
            ).stdout
        finally:
            os.close(fd)
        assert re.findall(r"^THP_enabled:\s*(\d)$", status, re.MULTILINE) in (["0"], [])

    def test_it_is_what_its_comments_say(self, tmp_path: Path) -> None:
        """Opcodes against objdump, tables against readelf, where binutils are."""
        objdump, readelf = shutil.which("objdump"), shutil.which("readelf")
        if not (objdump and readelf):
            pytest.skip("binutils are not installed")
        file = tmp_path / "shim.so"
        file.write_bytes(shim())
        from vmkernel.vm import shim as module

        source = Path(module.__file__).read_text()
        wanted = re.findall(r'^    "[0-9a-f ]+"  # +(\w+)', source, re.MULTILINE)
        start = shim().index(module._CODE)
        shown = subprocess.run(
            [objdump, "-D", "-b", "binary", "-m", "i386:x86-64", "-M", "intel",
             f"--start-address={start}", str(file)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        found = re.findall(r"^ +[0-9a-f]+:\t[0-9a-f ]+\t(\w+)", shown, re.MULTILINE)
        wanted.insert(wanted.index("push") + 1, "call")
        assert found[: len(wanted)] == wanted
        tables = subprocess.run(
            [readelf, "--dynamic", "--program-headers", "--wide", str(file)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert not tables.stderr
        assert len(re.findall(r"^  LOAD .* (R E|RW ) ", tables.stdout, re.MULTILINE)) == 2
        assert "GNU_STACK" in tables.stdout


class TestFilter:
    def test_its_numbers_are_the_kernels(self) -> None:
        header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
        if not header.exists():
            pytest.skip("the kernel's headers are not installed")
        numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
        wrong = {
            name for name, number in DENIED.items() if numbers.get(name, number) != str(number)
        }
        assert wrong <= {name for name in DENIED if name not in numbers}

    @pytest.mark.parametrize(
        ("number", "arguments", "verdict"),
        [
            (0, (), 0x7FFF0000),  # read
            (41, (), 0x50001),  # socket: EPERM
            (435, (), 0x50026),  # clone3: ENOSYS
            (56, (0x10000,), 0x7FFF0000),  # clone of a thread
            (56, (17,), 0x50001),  # of a process
            (56, (0x10000000,), 0x50001),  # of one in a user namespace
            (72, (3, 1030), 0x7FFF0000),  # fcntl: a copy of a descriptor
            (72, (3, 37), 0x50001),  # a lock
            (72, (3, 6), 0x50001),
            (0x40000000 + 41, (), 0x50001),  # by the numbers of x32
        ],
    )
    def test_its_verdicts(self, number: int, arguments: tuple[int, ...], verdict: int) -> None:
        assert judge(seccomp_filter(), 0xC000003E, number, arguments) == verdict

    def test_another_architecture_is_the_end(self) -> None:
        assert judge(seccomp_filter(), 0x40000003, 4, ()) == 0x80000000


def judge(program: bytes, architecture: int, number: int, arguments: tuple[int, ...]) -> int:
    """Run a filter as the kernel does (Documentation/networking/filter.rst), what is used of it."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = list(struct.iter_unpack("<HBBI", program))
    at = value = 0
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == 0x06:
            return int(operand)
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
            continue
        held = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
        at += yes if held else no


class TestMemory:
    def test_what_is_sealed_cannot_be_changed(self) -> None:
        fd = sealed_memory("test", b"state")
        try:
            assert os.read(fd, 10) == b"state"
            for change in (
                lambda: os.pwrite(fd, b"x", 0),
                lambda: os.truncate(fd, 0),
                lambda: os.pwrite(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), b"x", 0),
            ):
                with pytest.raises(PermissionError):
                    change()
        finally:
            os.close(fd)


class TestAHostWithout:
    """Bubblewrap is missing, or cannot do what it is for."""

    @pytest.fixture
    def refuses(self, session_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """One that always says the same, and where any user can run it."""
        words = "bwrap: No permissions to create new namespace"
        session_dir.chmod(0o711)
        program = session_dir / "bwrap"
        program.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
        program.chmod(0o755)
        monkeypatch.setattr(sandbox, "BWRAP", str(program))
        yield words
        program.unlink()

    def settings(self, tmp_path: Path, choice: str) -> Settings:
        return Settings(state_dir=tmp_path / "state", sandbox=choice)  # type: ignore[arg-type]

    def test_without_bubblewrap(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandbox, "BWRAP", str(tmp_path / "none"))
        found = find_sandbox(self.settings(tmp_path, "auto"), QEMU)
        assert found.wall.bwrap == ""
        assert found.wall.own_user == (os.geteuid() == 0)  # that much is left
        assert "there is no" in found.problem
        assert "apt install bubblewrap" in found.hint
        with pytest.raises(VmBootError, match="sandbox demands bubblewrap") as caught:
            find_wall(self.settings(tmp_path, "required"), QEMU)
        assert "apt install bubblewrap" in caught.value.hint
        assert "VMKERNEL_SANDBOX=auto" in caught.value.hint

    def test_with_one_that_may_not_make_namespaces(self, tmp_path: Path, refuses: str) -> None:
        found = find_sandbox(self.settings(tmp_path, "auto"), QEMU)
        assert found.wall.bwrap == ""
        assert refuses in found.problem
        assert "user namespaces" in found.hint
        # It may do better the next time: the host was busy, or its settings have changed
        Path(sandbox.BWRAP).write_text("#!/bin/sh\nexit 0\n")
        assert find_sandbox(self.settings(tmp_path, "auto"), QEMU).wall.bwrap

    def test_the_answer_is_kept_until_something_changes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = self.settings(tmp_path, "auto")
        asked = []
        usual = sandbox._try_out
        monkeypatch.setattr(sandbox, "_try_out", lambda qemu: asked.append(qemu) or usual(qemu))
        first = find_sandbox(settings, QEMU)
        assert find_sandbox(settings, QEMU) == first
        assert asked == [QEMU]
        monkeypatch.setattr(sandbox, "BWRAP", str(tmp_path / "none"))
        assert find_sandbox(settings, QEMU) != first
        assert asked == [QEMU] * 2

    def test_off_is_without_and_nothing_lacks_where_it_works(self, tmp_path: Path) -> None:
        assert find_sandbox(self.settings(tmp_path, "off"), QEMU).wall.bwrap == ""
        found = find_sandbox(self.settings(tmp_path, "auto"), QEMU)
        if found.problem:
            pytest.skip(found.problem)
        assert find_wall(self.settings(tmp_path, "required"), QEMU) == found.wall

    def test_a_qemu_that_others_cannot_reach_runs_without(self, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o700)
        (closed / "qemu").symlink_to(QEMU)
        assert wall.reachable_by_others(QEMU)
        (closed / "file").touch()
        assert not wall.reachable_by_others(str(closed / "file"))
        assert not wall.reachable_by_others(str(tmp_path / "nothing"))
