"""Limits on a real VM's QEMU, as the host's kernel tells of them.

No systemd runs where these tests were written: that a scope's quota holds is not shown here.  What
is: that a program in systemd-run's place, which like it ends in an exec, changes nothing of how
QEMU is started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vmhost import RunningVm, VmHost
from vmkernel.host import processes, running
from vmkernel.vm import limits, qemu
from vmkernel.vm.limits import DATA_MIB, MEMORY_MIB, NICE, Holder

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

BUSY = """
import os, threading
def work(number):
    with open(f'f{number}', 'wb') as file:
        for _ in range(20):
            file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
fill = [bytearray(os.urandom(1 << 20)) for _ in range(200)]
"""


@pytest.fixture
def host(session_dir: Path, minimal_image: str) -> Iterator[VmHost]:
    """A host of the test's own."""
    host = VmHost(session_dir)
    yield host
    assert host.left() == []


def limit(pid: int, name: str) -> list[str]:
    """Soft and hard, from /proc/PID/limits (proc(5))."""
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith(name):
            return line.removeprefix(name).split()[:2]
    raise AssertionError(name)


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")[:-1]


async def test_every_vm_has_its_limits_and_stays_within_them(host: VmHost) -> None:
    settings = host.settings()
    async with RunningVm(settings) as vm:
        pid = vm.guest.vm.process.qemu_pid
        data = (settings.memory + DATA_MIB) << 20
        assert limit(pid, "Max data size") == [str(data)] * 2
        assert limit(pid, "Max core file size") == ["0"] * 2
        assert psutil.Process(pid).nice() == psutil.Process().nice()
        await vm.run(BUSY, 120)
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        used = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Vm")}
        assert int(used["VmData"]) < data >> 10
        assert int(used["VmHWM"]) >> 10 < settings.memory + MEMORY_MIB


async def test_a_quota_that_nobody_holds_is_low_priority(
    host: VmHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder(None, "not here")
    monkeypatch.setattr(qemu, "find_holder", lambda uid, environ: holder)
    async with RunningVm(host.settings(VMKERNEL_CPU_QUOTA="50%")) as vm:
        process = psutil.Process(vm.guest.vm.process.qemu_pid)
        assert process.nice() == psutil.Process().nice() + NICE
        threads = [f"/proc/{process.pid}/task/{thread.id}/stat" for thread in process.threads()]
        nices = {Path(thread).read_text().rpartition(")")[2].split()[16] for thread in threads}
        assert nices == {str(process.nice())}
        assert await vm.run("print(6 * 7)") == "42\n"


STAND_IN = """#!/bin/sh
echo "$@" >"{log}"
env >>"{log}"
while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""


async def test_a_scopes_command_starts_the_same_qemu(
    host: VmHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in, log = tmp_path / "systemd-run", tmp_path / "log"
    stand_in.write_text(STAND_IN.format(log=log))
    stand_in.chmod(0o755)
    monkeypatch.setattr(limits, "_SYSTEMD_RUN", str(stand_in))
    monkeypatch.setattr(qemu, "find_holder", lambda uid, environ: Holder("user", "a stand-in"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/4711")
    async with RunningVm(host.settings(VMKERNEL_CPU_QUOTA="50%")) as vm:
        pid = vm.guest.vm.process.qemu_pid
        assert "qemu" in psutil.Process(pid).name()
        qemu_process = processes.identify(pid)
        assert qemu_process is not None
        assert running.owner(qemu_process) == processes.identify_self()
        assert os.getsid(pid) == pid
        names = {entry.partition("=")[0] for entry in environment(pid)}
        # The last is bubblewrap's
        assert names <= {"LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "PWD"}
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert limit(pid, "Max core file size") == ["0"] * 2
        assert await vm.run("print(6 * 7)") == "42\n"
    told = log.read_text()
    assert "--user --scope" in told
    assert "--property=CPUQuota=50%" in told
    assert "XDG_RUNTIME_DIR=/run/user/4711\n" in told


async def test_a_scope_that_cannot_be_made_is_an_error_with_a_way_out(
    host: VmHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vmkernel.errors import VmBootError

    refuses = tmp_path / "systemd-run"
    refuses.write_text("#!/bin/sh\necho 'Failed to start transient scope unit: no' >&2\nexit 1\n")
    refuses.chmod(0o755)
    monkeypatch.setattr(limits, "_SYSTEMD_RUN", str(refuses))
    monkeypatch.setattr(qemu, "find_holder", lambda uid, environ: Holder("system", ""))
    began = time.monotonic()
    with pytest.raises(VmBootError, match="transient scope") as caught:
        async with RunningVm(host.settings(VMKERNEL_CPU_QUOTA="50%")):
            pass
    assert "CPU_QUOTA" in caught.value.hint
    assert time.monotonic() - began < 20
