"""The real QEMU behind the wall: who it is, what it may, and that it ends with who started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from prerequisites import missing
from vmhost import RunningVm, VmHost, seconds_until
from vmkernel import VmManager
from vmkernel.errors import VmError
from vmkernel.host import processes, running
from vmkernel.host.registry import vm_dir
from vmkernel.settings import load_settings
from vmkernel.vm import wall
from vmkernel.vm.build import _Boot, _prepare_files
from vmkernel.vm.sandbox import find_sandbox, find_wall
from vmkernel.vm.template import Manifest
from vmkernel.vm.wall import BUILDER_UID, VM_UIDS

pytestmark = [pytest.mark.vm, pytest.mark.timeout(200)]

QEMU = "/usr/bin/qemu-system-x86_64"
SOMEBODY = 4242
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
QUICK = 1.0
"""Seconds within which a VM is gone with who started it."""


@pytest.fixture
def host(template: str, session_dir: Path) -> Iterator[VmHost]:
    """A host of the test's own; nothing of it may be left at the end."""
    host = VmHost(session_dir)
    if problem := find_sandbox(host.settings(), QEMU).problem:
        missing(problem)
    yield host
    seconds_until(lambda: not host.left(), 5)
    left = host.left()
    host.clear()
    assert left == []


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def assert_walled(pid: int, uids: set[int]) -> None:
    found = status(pid)
    assert found["Seccomp"] == "2"
    assert found["Seccomp_filters"] == "2"  # ours, and QEMU's own
    assert found["NoNewPrivs"] == "1"
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {
        "0" * 16
    }
    assert set(found["Uid"].split()) <= {str(uid) for uid in uids}
    assert len(found["NSpid"].split()) == 3  # it is two namespaces deep
    assert found["NSpid"].split()[-1] == "1"
    for name in NAMESPACES:
        assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"), name
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    for fields in mounts:
        # Nothing to be written to but two devices, and what of /proc the kernel gives to anyone
        writable = fields[5].split(",")[0] == "rw"
        assert not writable or fields[4] in ("/proc", "/dev/null", "/dev/urandom"), fields
        assert "nosuid" in fields[5], fields
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    assert re.search(r"^Max processes +256 +256 ", limits, re.MULTILINE)
    names = {word.partition("=")[0] for word in psutil.Process(pid).environ()}
    assert names <= {"LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "PWD"}


def opened(pid: int, name: str) -> list[str]:
    """How it has opened files of this name: r, w or rw."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if link.readlink().name == name:
                found.append("rw" if link.lstat().st_mode & 0o200 else "r")
    return found


class TestWhoItIs:
    async def test_a_notebooks_vm(self, host: VmHost) -> None:
        async with RunningVm(host.settings()) as vm:
            process = vm.guest.vm.process
            assert [process.qemu_pid] == host.qemus()
            assert_walled(process.qemu_pid, uids_of_root() or {os.geteuid()})
            assert set(opened(process.qemu_pid, "ram")) == {"r"}
            assert set(opened(process.qemu_pid, "scratch.raw")) == {"r"}
            assert set(opened(process.qemu_pid, "rootfs.erofs")) == {"r"}
            assert opened(process.qemu_pid, "state") == []  # a copy in memory, closed when loaded
            assert vm.start.template is not None
            directory = vm.start.template.directory
            assert directory.parent.stat().st_mode & 0o777 == 0o700
            assert directory.stat().st_mode & 0o777 == 0o700
            files = {path.name: path.stat() for path in directory.iterdir()}
            assert {found.st_uid for found in files.values()} == {os.geteuid()}
            modes = {name: found.st_mode & 0o777 for name, found in files.items()}
            del modes["used"], modes["manifest.json"]  # nothing that a VM would be given
            assert modes == {
                "ram": 0o444, "scratch.raw": 0o444, "scratch.qcow2": 0o400, "state": 0o400
            }  # fmt: skip
            assert await vm.run("print(6 * 7)") == "42\n"

    async def test_two_vms_of_a_manager_are_two_users_and_do_not_see_each_other(
        self, host: VmHost
    ) -> None:
        async with VmManager(host.settings()) as manager:
            await asyncio.gather(manager.create_vm(), manager.create_vm())
            pids = [vm.record.qemu_pid for vm in await manager.list_vms()]
            assert sorted(pids) == sorted(host.qemus())
            for pid in pids:
                assert_walled(pid, uids_of_root() or {os.geteuid()})
            if os.geteuid() == 0:
                assert len({status(pid)["Uid"] for pid in pids}) == 2
            assert len({os.readlink(f"/proc/{pid}/ns/user") for pid in pids}) == 2

    async def test_a_template_that_is_made(self, host: VmHost, tmp_path: Path) -> None:
        settings = host.settings()
        work = tmp_path / "work"
        work.mkdir()
        from vmkernel.host.start import spec_for

        spec = spec_for(settings, "tcg")
        _prepare_files(spec, work)
        async with _Boot(spec, settings, work) as boot:
            pid = boot.vm.process.qemu_pid
            await boot.vm.monitor()
            pid = boot.vm.process.qemu_pid
            assert_walled(pid, {BUILDER_UID if os.geteuid() == 0 else os.geteuid()})
            assert "rw" in opened(pid, "ram")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_another_users_vm(self, host: VmHost, session_dir: Path) -> None:
        theirs = VmHost(session_dir, own_cache=True, user=SOMEBODY)
        lend_template(theirs)
        tests = Path(__file__).parents[1]
        env = {**os.environ, **theirs.env, "VMKERNEL_SANDBOX": "required"}
        with subprocess.Popen(
            theirs.command(sys.executable, "-c", _THEIR_VM),
            env={**env, "PYTHONPATH": f"{tests.parent}:{tests}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            (pid,) = map(int, process.stdout.readline().split())
            assert theirs.qemus() == [pid]
            assert_walled(pid, {SOMEBODY})
            assert set(opened(pid, "ram")) == {"r"}
            process.kill()
            assert seconds_until(lambda: not theirs.qemus(), 5) < QUICK


_THEIR_VM = """
import asyncio, sys
from vmhost import RunningVm
from vmkernel.settings import load_settings
async def main():
    async with RunningVm(load_settings()) as vm:
        assert await vm.run("print(6 * 7)") == "42\\n"
        print(vm.guest.vm.process.qemu_pid, flush=True)
        sys.stdin.read()
asyncio.run(main())
"""


class TestTheShim:
    async def test_a_vm_without_it_does_not_start(
        self, host: VmHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A shim that is not loaded opens nothing."""
        monkeypatch.setattr(wall, "shim", lambda: b"no shared object")
        if find_wall(host.settings(), QEMU).private_option:
            pytest.skip("this QEMU has an option for it")
        with pytest.raises(VmError, match="can't open backing store"):
            await RunningVm(host.settings()).__aenter__()


class TestTheRunnersSocket:
    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    async def test_another_user_is_not_heard(self, host: VmHost) -> None:
        """The directory keeps him out; if it did not, his user id would."""
        async with VmManager(host.settings()) as manager:
            vm = await manager.create_vm()
            path = vm_dir(host.settings(), vm.vm_id) / "control.sock"
            assert path.parent.stat().st_mode & 0o777 == 0o700
            refused = await asyncio.to_thread(tell_to_end, path.parent, SOMEBODY)
            assert "Permission denied" in refused, refused
            for opened_up in (path, *path.parents):
                if opened_up == host.directory.parent:
                    break
                opened_up.chmod(0o777)
            host.directory.parent.chmod(0o711)
            try:
                refused = await asyncio.to_thread(tell_to_end, path.parent, SOMEBODY)
                assert refused != "it ends"
                assert "Permission denied" not in refused
                assert (await vm.run("print(6 * 7)")).stdout == "42\n"
                assert await asyncio.to_thread(tell_to_end, path.parent, 0) == "it ends"
            finally:
                host.runtime_dir.chmod(0o700)


class TestTogether:
    @pytest.mark.parametrize("whom", ["qemu", "bubblewrap", "child"])
    async def test_whoever_of_them_is_killed_all_end(self, host: VmHost, whom: str) -> None:
        ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        async with RunningVm(host.settings()) as vm:
            vm.guest.vm._on_end = ended.set_result
            process = vm.guest.vm.process
            victims = {
                "qemu": process.qemu_pid,
                "bubblewrap": psutil.Process(process.qemu_pid).ppid(),
                "child": process.pid,
            }
            assert len(set(victims.values())) == 3
            os.kill(victims[whom], signal.SIGKILL)
            error = await asyncio.wait_for(ended, QUICK + 1)
            if whom != "bubblewrap":  # of whose end `unshare` makes a status
                assert process.returncode == -signal.SIGKILL
                assert "signal 9" in str(error)
            assert seconds_until(lambda: not host.left(), 5) < QUICK

    async def test_one_that_is_stopped_around_it_does_not_hold_up_the_end(
        self, host: VmHost
    ) -> None:
        async with RunningVm(host.settings()) as vm:
            process = vm.guest.vm.process
            os.kill(process.pid, signal.SIGSTOP)
            os.kill(psutil.Process(process.qemu_pid).ppid(), signal.SIGSTOP)
            assert await vm.run("print(6 * 7)") == "42\n"
        assert process.returncode == -signal.SIGKILL
        assert seconds_until(lambda: not host.left(), 5) < QUICK

    async def test_the_record_knows_qemu_and_its_owner_is_found(self, host: VmHost) -> None:
        async with RunningVm(host.settings()) as vm:
            assert vm.start.record is not None
            qemu = vm.start.record.qemu
            assert qemu is not None
            assert qemu.pid == vm.guest.vm.process.qemu_pid
            assert running.owner(qemu) == processes.identify_self()
            assert list(running.find_qemus(host.settings())) == [qemu]
            (record,) = running.find_running(host.settings())
            assert record.template == vm.start.record.template
            assert record.recipe == "minimal"


class TestDamage:
    async def test_a_state_of_the_right_size_and_date_is_found_out_and_made_anew(
        self, host: VmHost, session_dir: Path, wait_until: Callable[..., None]
    ) -> None:
        own = VmHost(session_dir, own_cache=True)
        directory = lend_template(own)
        state = directory / "state"
        found = state.stat()
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 0xFF
        state.chmod(0o600)
        state.write_bytes(data)
        state.chmod(0o400)
        os.utime(state, ns=(found.st_atime_ns, found.st_mtime_ns))
        from vmkernel.errors import TemplateError
        from vmkernel.host.start import spec_for
        from vmkernel.vm.template import find_template

        spec = spec_for(own.settings(), "tcg")
        assert find_template(spec, own.settings()) is not None
        with pytest.raises(TemplateError, match="state has another checksum") as caught:
            async with RunningVm(own.settings()):
                pass
        assert "built anew" in caught.value.hint
        assert find_template(spec, own.settings()) is None  # the next start builds it


def uids_of_root() -> set[int]:
    return set(VM_UIDS) - {BUILDER_UID} if os.geteuid() == 0 else set()


def lend_template(host: VmHost) -> Path:
    """Give a host with a cache of its own a copy of the template: building one takes long."""
    from vmkernel.host.start import spec_for

    key = spec_for(host.settings(), "tcg").key()
    source = load_settings().cache_dir / "templates" / key
    target = host.cache_dir / "templates" / key
    target.parent.mkdir(mode=0o700)
    subprocess.run(["cp", "-a", "--sparse=always", f"{source}/", str(target)], check=True)
    manifest = msgspec.json.decode((target / "manifest.json").read_bytes(), type=Manifest)
    for name, record in manifest.files.items():
        record.inode = (target / name).stat().st_ino
    (target / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    if host.user:
        for path in (target.parent, target, *target.iterdir()):
            shutil.chown(path, host.user, host.user)
    return target


_CLIENT = """
import asyncio, sys
from pathlib import Path
from vmkernel.errors import VmError
from vmkernel.host import wire
from vmkernel.host.client import Connection
async def main():
    connection = await Connection.reach(Path(sys.argv[1]))
    await connection.call(wire.Stop("somebody wants it to end"))
    print("it ends")
try:
    asyncio.run(main())
except (VmError, OSError) as error:
    print(error)
"""


def tell_to_end(directory: Path, user: int) -> str:
    """What is answered to a user who tells the runner to end its VM."""
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    done = subprocess.run(
        [*become, sys.executable, "-c", _CLIENT, str(directory)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=30,
    )
    return (done.stdout or done.stderr).strip()
