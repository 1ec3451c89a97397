"""The record of running VMs, and the sweep that settles it against the process table."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from vmkernel.errors import SettingsError, VmError, VmNotFoundError
from vmkernel.host import processes, registry
from vmkernel.host.processes import ProcessIdentity
from vmkernel.host.registry import VmRecord, VmState, vm_dir
from vmkernel.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(runtime_dir=tmp_path / "run")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that do nothing, under any name, and ends them."""
    started: list[subprocess.Popen[bytes]] = []

    def start(
        *arguments: str, name: str = "sleep", settled: bool = True
    ) -> subprocess.Popen[bytes]:
        program = [name, "-c", "read line", *arguments]  # a builtin: no second process
        child = subprocess.Popen(program, executable="/bin/sh", stdin=subprocess.PIPE)
        started.append(child)
        while settled and not processes.arguments(child.pid):
            time.sleep(0.001)  # Popen returns in the midst of execve
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def identity(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    found = processes.identify(process.pid)
    assert found is not None
    return found


def record_of(
    settings: Settings,
    *,
    runner: ProcessIdentity | None,
    qemu: ProcessIdentity | None = None,
) -> VmRecord:
    """A VM whose runner is this process, another one, or (None) one that is dead."""
    record = registry.create_vm_dir(settings)
    runner = runner or ProcessIdentity(record.runner_pid, record.runner_start - 1)
    record = msgspec.structs.replace(
        record,
        runner_pid=runner.pid,
        runner_start=runner.start_time,
        qemu_pid=qemu.pid if qemu else None,
        qemu_start=qemu.start_time if qemu else None,
    )
    registry.write_record(settings, record)
    return record


def test_A1_a_record_names_its_processes_with_their_start_times(
    settings: Settings, start: Start
) -> None:
    qemu = start(name="qemu-system-x86_64")
    before = time.time()
    record = registry.create_vm_dir(
        settings, kernel_id="k1", connection_file="/c.json", recipe="minimal", memory=512
    )
    directory = vm_dir(settings, record.vm_id)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert directory.parent.stat().st_mode & 0o777 == 0o700
    assert len(record.vm_id) == len("vm-12345678")
    assert before <= record.created <= time.time()
    assert record.owner == os.geteuid()
    [status] = registry.list_vms(settings)
    assert status == (record, True, False)
    assert status.record.state is VmState.STARTING
    assert status.record.runner == processes.identify_self()
    assert status.record.qemu is None

    pid, start_time = identity(qemu)
    record = msgspec.structs.replace(
        record, state=VmState.RUNNING, qemu_pid=pid, qemu_start=start_time, slot=3
    )
    registry.write_record(settings, record)
    assert registry.list_vms(settings) == [(record, True, True)]
    assert [entry.name for entry in directory.iterdir()] == ["vm.json"]
    qemu.kill()
    qemu.wait()
    assert registry.list_vms(settings) == [(record, True, False)]
    assert registry.name_of_runner(settings, os.getpid()) == f"{record.vm_id}, kernel k1"
    assert registry.name_of_runner(settings, 1) == ""

    registry.remove_vm(settings, record.vm_id)
    registry.remove_vm(settings, record.vm_id)
    assert registry.list_vms(settings) == []
    assert list(directory.parent.iterdir()) == []


def test_the_oldest_vm_is_listed_first_and_no_host_has_vms_before_the_first(
    settings: Settings,
) -> None:
    assert registry.list_vms(settings) == []
    assert registry.sweep(settings) == []
    assert not settings.runtime_dir.exists(), "looking makes nothing"
    made = [registry.create_vm_dir(settings).vm_id for _ in range(5)]
    assert [status.record.vm_id for status in registry.list_vms(settings)] == made


def test_a_sweep_leaves_live_vms_alone_at_every_stage(settings: Settings, start: Start) -> None:
    qemu = identity(start(name="qemu-system-x86_64"))
    gone = ProcessIdentity(qemu.pid, qemu.start_time - 1)
    records = [
        registry.create_vm_dir(settings),  # starting, no QEMU yet
        record_of(settings, runner=processes.identify_self(), qemu=qemu),
        record_of(settings, runner=processes.identify_self(), qemu=gone),  # the runner's own matter
    ]
    assert registry.sweep(settings) == []
    assert {status.record for status in registry.list_vms(settings)} == set(records)
    assert processes.is_alive(qemu)


def test_a_sweep_removes_dead_runners_vms_and_kills_their_qemu(
    settings: Settings, start: Start
) -> None:
    child = start(name="/usr/bin/qemu-system-x86_64")
    record = record_of(settings, runner=None, qemu=identity(child))
    (vm_dir(settings, record.vm_id) / "kernel.sock").touch()
    assert registry.sweep(settings) == [record.vm_id]
    assert child.wait(5) == -signal.SIGKILL
    assert list((settings.runtime_dir / "vms").iterdir()) == []


def test_a_dead_runner_is_found_by_its_start_time_or_as_a_zombie(settings: Settings) -> None:
    code = """
import sys
from pathlib import Path
from vmkernel.host import registry
from vmkernel.settings import Settings
print(registry.create_vm_dir(Settings(runtime_dir=Path(sys.argv[1]))).vm_id)
"""
    runner = subprocess.Popen(
        [sys.executable, "-c", code, str(settings.runtime_dir)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert runner.stdout
    vm_id = runner.stdout.read().strip()
    end = time.monotonic() + 10
    while processes.identify(runner.pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert Path(f"/proc/{runner.pid}").exists(), "still a zombie, since nobody waited for it"
    assert processes.arguments(runner.pid) == []
    assert registry.sweep(settings) == [vm_id]
    runner.wait()
    runner.stdout.close()


def test_A1_a_sweep_never_kills_what_took_over_a_pid(settings: Settings, start: Start) -> None:
    pid, start_time = identity(start(name="qemu-system-x86_64"))
    record = record_of(settings, runner=None, qemu=ProcessIdentity(pid, start_time - 1))
    assert registry.sweep(settings) == [record.vm_id]
    assert processes.is_alive(ProcessIdentity(pid, start_time))


def test_a_sweep_never_kills_what_is_no_qemu(
    settings: Settings, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    editor = identity(start("/somewhere/qemu-notes.txt"))
    record = record_of(settings, runner=None, qemu=editor)
    with caplog.at_level(logging.WARNING):
        assert registry.sweep(settings) == [record.vm_id]
    assert processes.is_alive(editor)
    assert f"pid {editor.pid}" in caplog.text


def test_a_qemu_of_another_name_is_known_by_the_setting(tmp_path: Path, start: Start) -> None:
    settings = Settings(runtime_dir=tmp_path / "run", qemu="/opt/x/my-emulator")
    child = start("--", "/opt/x/my-emulator", name="bwrap", settled=False)
    record = record_of(settings, runner=None, qemu=identity(child))
    assert registry.sweep(settings) == [record.vm_id]
    assert child.wait(5) == -signal.SIGKILL


def test_a_qemu_that_was_started_and_never_written_down_is_killed_too(
    settings: Settings, start: Start
) -> None:
    record = record_of(settings, runner=None)
    other = record_of(settings, runner=processes.identify_self())
    stray = start(f"path={vm_dir(settings, record.vm_id)}/kernel.sock", name="qemu-system-x86_64")
    not_ours = start(f"path={vm_dir(settings, other.vm_id)}/k.sock", name="qemu-system-x86_64")
    pager = start(f"{vm_dir(settings, record.vm_id)}/console.log", name="less")
    assert registry.sweep(settings) == [record.vm_id]
    assert stray.wait(5) == -signal.SIGKILL
    assert not_ours.poll() is None
    assert pager.poll() is None


def test_a_sweep_removes_what_died_half_made_or_half_removed(settings: Settings) -> None:
    live = registry.create_vm_dir(settings)
    vms = settings.runtime_dir / "vms"
    me = processes.identify_self()
    for name in (
        f".new-{me.pid}-{me.start_time - 1}-vm-00000001",
        ".dead-vm-00000002-12345678",
        f".new-{me.pid}-{me.start_time}-vm-00000003",
    ):
        (vms / name).mkdir()
        (vms / name / "vm.json").touch()
    assert registry.sweep(settings) == []
    assert {entry.name for entry in vms.iterdir()} == {
        live.vm_id,
        f".new-{me.pid}-{me.start_time}-vm-00000003",
    }


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b'{"vm_id": 3}', b"[" * 5000])
def test_a_damaged_record_is_told_and_left_alone(
    settings: Settings, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    record = registry.create_vm_dir(settings)
    path = vm_dir(settings, record.vm_id) / "vm.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert registry.list_vms(settings) == []
    assert str(path) in caplog.text
    assert registry.sweep(settings) == []
    assert path.exists()


def test_writing_a_record_of_a_removed_vm_says_so(settings: Settings) -> None:
    record = registry.create_vm_dir(settings)
    registry.remove_vm(settings, record.vm_id)
    with pytest.raises(VmNotFoundError, match=record.vm_id) as caught:
        registry.write_record(settings, record)
    assert caught.value.hint
    assert not vm_dir(settings, record.vm_id).exists()


def test_an_open_runtime_dir_is_refused(settings: Settings) -> None:
    settings.runtime_dir.mkdir(mode=0o755)
    settings.runtime_dir.chmod(0o755)
    with pytest.raises(SettingsError, match="not private"):
        registry.create_vm_dir(settings)


def test_a_write_that_fails_says_where_and_leaves_the_old_record(settings: Settings) -> None:
    settings.runtime_dir.mkdir(mode=0o700)
    (settings.runtime_dir / "vms").write_text("a file where a directory belongs")
    with pytest.raises(VmError, match=f"{settings.runtime_dir}/vms") as caught:
        registry.create_vm_dir(settings)
    assert "VMKERNEL_RUNTIME_DIR" in caught.value.hint
    assert registry.list_vms(settings) == []
    (settings.runtime_dir / "vms").unlink()

    code = """
import resource, sys
from pathlib import Path
import msgspec
from vmkernel.errors import VmError
from vmkernel.host import registry
from vmkernel.settings import Settings
settings = Settings(runtime_dir=Path(sys.argv[1]))
record = registry.create_vm_dir(settings)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # each write fails, as on a full disk
for act in (
    lambda: registry.create_vm_dir(settings),
    lambda: registry.write_record(settings, msgspec.structs.replace(record, slot=1)),
):
    try:
        act()
    except VmError as error:
        print(error)
assert [status.record for status in registry.list_vms(settings)] == [record]
assert sorted(path.name for path in Path(sys.argv[1]).rglob("*")) == sorted(
    ["vms", record.vm_id, "vm.json"]
)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(settings.runtime_dir)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.count("File too large") == 2


def test_many_processes_sweep_and_create_at_once(settings: Settings) -> None:
    code = """
import sys
from pathlib import Path
from vmkernel.host import registry
from vmkernel.settings import Settings
settings = Settings(runtime_dir=Path(sys.argv[1]))
sys.stdin.readline()
swept = []
for _ in range(25):
    record = registry.create_vm_dir(settings)
    swept += registry.sweep(settings)
    registry.write_record(settings, record)
    registry.list_vms(settings)
    registry.remove_vm(settings, record.vm_id)
print(len(swept))
"""
    dead = [record_of(settings, runner=None) for _ in range(40)]
    runners = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(settings.runtime_dir)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    outputs = [runner.communicate("go\n", timeout=60) for runner in runners]
    assert [runner.returncode for runner in runners] == [0] * 4, outputs
    assert [error for _, error in outputs] == [""] * 4
    # Two may both report a VM that they found dead at the same moment.
    assert sum(int(output) for output, _ in outputs) >= len(dead)
    assert list((settings.runtime_dir / "vms").iterdir()) == []


def test_a_sweep_of_fifty_live_vms_is_cheap(settings: Settings) -> None:
    for _ in range(50):
        registry.create_vm_dir(settings)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        registry.sweep(settings)
        times.append(time.perf_counter() - begin)
    print(f"sweep of 50 records: {1000 * min(times):.1f} ms (best)")
    assert min(times) < 0.05


def test_a_process_with_a_strange_name_is_identified(start: Start, tmp_path: Path) -> None:
    program = tmp_path / ") R 1 (x"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as child:
        end = time.monotonic() + 5
        while processes.describe(child.pid) != program.name:
            assert time.monotonic() < end
        found = identity(child)
        assert processes.is_alive(found)
        assert not processes.is_alive(found._replace(start_time=found.start_time + 1))
        while not (words := processes.arguments(child.pid)):
            assert time.monotonic() < end
        assert words == [str(program), "60"]
        assert processes.kill(found._replace(start_time=1)), "that one is dead"
        assert child.poll() is None
        assert processes.kill(found)
    assert processes.kill(found)
    assert not processes.is_alive(None)
    assert processes.describe(child.pid) == ""
    assert processes.identify(1 << 22) is None
