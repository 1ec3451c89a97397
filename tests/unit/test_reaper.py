"""The reaper: what of the record is dead, what it kills and what it never does."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from fakes import DEAD, Processes, identity, python, together
from vmkernel.errors import RegistryError
from vmkernel.host import processes, reaper, running, start
from vmkernel.host.processes import ProcessIdentity
from vmkernel.host.registry import Registry, VmRecord, vm_dir, vms_dir
from vmkernel.host.startlock import StartLock
from vmkernel.models import VmState
from vmkernel.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(runtime_dir=tmp_path / "run", state_dir=tmp_path / "state")
    settings.runtime_dir.mkdir(mode=0o700)
    return settings


@pytest.fixture
def children() -> Iterator[Processes]:
    children = Processes()
    yield children
    children.end()


@pytest.fixture
def record(settings: Settings) -> Iterator[Registry]:
    with Registry(settings) as record:
        yield record


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not on record is no longer given time."""
    monkeypatch.setattr(running, "YOUNG", 0.0)


def add(
    record: Registry,
    settings: Settings,
    *,
    dead: bool = True,
    qemu: ProcessIdentity | None = None,
    **fields: object,
) -> VmRecord:
    """A VM that runs, as far as the record says, with a directory."""
    known: dict[str, object] = {"state": VmState.RUNNING, **(DEAD if dead else {})}
    if qemu is not None:
        known |= {"qemu_pid": qemu.pid, "qemu_start": qemu.start_time}
    vm = record.new(**{**known, **fields})
    vm_dir(settings, vm.vm_id).mkdir(mode=0o700, parents=True)
    (vm_dir(settings, vm.vm_id) / "control.sock").touch()
    return vm


def directories(settings: Settings) -> set[str]:
    place = vms_dir(settings)
    return {path.name for path in place.iterdir()} if place.is_dir() else set()


def test_a_sweep_of_nothing_makes_nothing(settings: Settings) -> None:
    assert reaper.sweep(settings) == []
    assert list(settings.runtime_dir.iterdir()) == []
    assert not settings.state_dir.exists()


def test_a_sweep_leaves_live_vms_alone_at_every_stage(
    settings: Settings, record: Registry, children: Processes
) -> None:
    qemu = identity(children.start(name="qemu-system-x86_64"))
    gone = ProcessIdentity(qemu.pid, qemu.start_time - 1)
    for state in VmState:
        add(record, settings, dead=False, state=state)
        add(record, settings, dead=False, state=state, qemu=qemu)
        add(record, settings, dead=False, state=state, qemu=gone)  # the runner's own matter
    kept = add(record, settings, state=VmState.CREATED, kept=True)  # its maker went, as it may
    before = record.list(ended=True)
    assert reaper.sweep(settings) == []
    assert record.list(ended=True) == before
    assert processes.is_alive(qemu)
    ended = {status.record.vm_id for status in before if status.record.state in reaper.ENDED}
    live = {status.record.vm_id for status in before} - ended
    assert directories(settings) == live, "what ended needs no directory"
    assert kept.vm_id in live


@pytest.mark.parametrize("state", [VmState.STARTING, VmState.RUNNING, VmState.STOPPING])
def test_A1_a_dead_runners_vm_is_failed_and_its_qemu_killed(
    settings: Settings, record: Registry, children: Processes, state: VmState
) -> None:
    child = children.start(name="/usr/bin/qemu-system-x86_64")
    vm = add(record, settings, qemu=identity(child), state=state)
    before = time.time()
    assert reaper.sweep(settings) == [vm.vm_id]
    assert child.wait(5) == -signal.SIGKILL
    assert directories(settings) == set()
    settled = record.get(vm.vm_id)
    assert settled.state is VmState.FAILED
    assert settled.exit_cause == f"its runner, pid {os.getpid()}, was killed"
    assert before <= (settled.ended or 0) <= time.time()
    assert settled.slot == vm.slot
    assert reaper.sweep(settings) == []
    assert record.get(vm.vm_id) == settled


def test_one_that_was_being_created_by_who_died_is_failed(
    settings: Settings, record: Registry
) -> None:
    vm = add(record, settings, state=VmState.CREATED)
    assert reaper.sweep(settings) == [vm.vm_id]
    assert "was to start it, ended" in record.get(vm.vm_id).exit_cause


def test_A1_nothing_of_an_earlier_boot_lives_or_is_killed(
    settings: Settings, record: Registry, children: Processes
) -> None:
    """Even if pid and start time agree by chance."""
    qemu = children.start(name="qemu-system-x86_64")
    vm = add(record, settings, dead=False, qemu=identity(qemu), boot_id="another")
    assert reaper.sweep(settings) == [vm.vm_id]
    assert qemu.poll() is None
    assert record.get(vm.vm_id).exit_cause == "the host was restarted"


def test_a_dead_runner_is_found_as_a_zombie(settings: Settings, record: Registry) -> None:
    code = """
import sys
from pathlib import Path
from vmkernel.host.registry import Registry
from vmkernel.models import VmState
from vmkernel.settings import Settings
place = Path(sys.argv[1])
registry = Registry(Settings(runtime_dir=place / "run", state_dir=place / "state"))
print(registry.new(state=VmState.RUNNING).vm_id, flush=True)
"""
    runner = python(code, str(settings.state_dir.parent))
    assert runner.stdout
    vm_id = runner.stdout.readline().strip()
    end = time.monotonic() + 10
    while processes.identify(runner.pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert Path(f"/proc/{runner.pid}").exists(), "still a zombie, since nobody waited for it"
    assert reaper.sweep(settings) == [vm_id]
    runner.communicate()


def test_A1_a_sweep_never_kills_what_took_over_a_pid(
    settings: Settings, record: Registry, children: Processes
) -> None:
    pid, start_time = identity(children.start(name="qemu-system-x86_64"))
    vm = add(record, settings, qemu=ProcessIdentity(pid, start_time - 1))
    assert reaper.sweep(settings) == [vm.vm_id]
    assert processes.is_alive(ProcessIdentity(pid, start_time))


def test_a_sweep_never_kills_what_is_no_qemu(
    settings: Settings, record: Registry, children: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    editor = identity(children.start("/somewhere/qemu-notes.txt"))
    vm = add(record, settings, qemu=editor)
    with caplog.at_level(logging.WARNING):
        assert reaper.sweep(settings) == [vm.vm_id]
    assert processes.is_alive(editor)
    assert f"pid {editor.pid}" in caplog.text


def test_a_qemu_that_is_about_to_end_is_let_end(
    settings: Settings,
    record: Registry,
    children: Processes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    child = children.start("anything")
    vm = add(record, settings, qemu=identity(child))
    known = processes.arguments
    # Between the release of its memory and its end a process has no command line
    monkeypatch.setattr(processes, "arguments", lambda pid: [] if pid == child.pid else known(pid))
    end = threading.Timer(0.3, child.kill)
    end.start()
    assert reaper.sweep(settings) == [vm.vm_id]
    end.join()
    assert record.get(vm.vm_id).state is VmState.FAILED
    assert caplog.text == ""


def test_a_qemu_of_another_name_is_known_by_the_setting(
    settings: Settings, record: Registry, children: Processes
) -> None:
    settings = msgspec.structs.replace(settings, qemu="/opt/x/my-emulator")
    child = children.start("--", "/opt/x/my-emulator", name="bwrap", settled=False)
    vm = add(record, settings, qemu=identity(child))
    assert reaper.sweep(settings) == [vm.vm_id]
    assert child.wait(5) == -signal.SIGKILL


def test_a_qemu_that_was_started_and_never_written_down_is_killed_too(
    settings: Settings, record: Registry, children: Processes
) -> None:
    dead = add(record, settings)
    live = add(record, settings, dead=False)
    stray = children.qemu(settings, dead.vm_id)
    not_dead = children.qemu(settings, live.vm_id)
    not_ours = children.qemu(settings, dead.vm_id, tag="01234567")
    pager = children.start(f"vmkernel-{dead.vm_id}", name="less")
    assert reaper.sweep(settings) == [dead.vm_id]
    assert stray.wait(5) == -signal.SIGKILL
    assert [child.poll() for child in (not_dead, not_ours, pager)] == [None] * 3


@pytest.mark.usefixtures("at_once")
def test_a_qemu_that_no_row_knows_is_killed_when_its_runner_is_dead(
    settings: Settings, children: Processes
) -> None:
    orphan = children.qemu(settings, "vm-00000001")  # nobody here holds a pidfd of it
    owned = children.qemu(settings, "vm-00000002")
    pidfd = os.pidfd_open(owned.pid)
    assert reaper.sweep(settings) == []
    assert orphan.wait(5) == -signal.SIGKILL
    assert owned.poll() is None
    os.close(pidfd)


def test_a_qemu_that_no_row_knows_is_given_time(settings: Settings, children: Processes) -> None:
    """Its runner may be about to write it down."""
    young = children.qemu(settings, "vm-00000001")
    (vms := vms_dir(settings)).mkdir(parents=True)
    (vms / "vm-00000002").mkdir()
    assert reaper.sweep(settings) == []
    assert young.poll() is None
    assert directories(settings) == {"vm-00000002"}


@pytest.mark.usefixtures("at_once")
def test_directories_without_a_vm_are_removed(settings: Settings, record: Registry) -> None:
    live = add(record, settings, dead=False)
    for name in ("vm-00000001", "not-a-vm"):
        (vms_dir(settings) / name).mkdir()
    assert reaper.sweep(settings) == []
    assert directories(settings) == {live.vm_id, "not-a-vm"}


def test_one_that_does_not_die_is_an_orphan_until_it_does(
    settings: Settings,
    record: Registry,
    children: Processes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    child = children.start(name="qemu-system-x86_64")
    vm = add(record, settings, qemu=identity(child))
    # A process in uninterruptible sleep cannot be made at will.
    monkeypatch.setattr(processes, "kill", lambda *_, **__: False)
    with caplog.at_level(logging.WARNING):
        assert reaper.sweep(settings) == []
        assert reaper.sweep(settings) == []
    assert record.get(vm.vm_id).state is VmState.ORPHANED
    assert directories(settings) == {vm.vm_id}
    assert f"cannot kill pid {child.pid}" in caplog.text
    monkeypatch.undo()
    assert reaper.sweep(settings) == [vm.vm_id]
    assert child.wait(5) == -signal.SIGKILL
    assert record.get(vm.vm_id).state is VmState.FAILED
    assert directories(settings) == set()


def test_A9_a_vm_that_somebody_is_starting_is_left_to_them(
    settings: Settings, record: Registry
) -> None:
    vm = add(record, settings, state=VmState.STARTING, kept=True)
    with StartLock.take(settings, vm.vm_id):
        assert reaper.sweep(settings) == []
        assert record.get(vm.vm_id) == vm
        assert directories(settings) == {vm.vm_id}
    assert reaper.sweep(settings) == [vm.vm_id]


def test_a_locked_record_is_told(settings: Settings, record: Registry) -> None:
    import sqlite3

    add(record, settings)
    quick = msgspec.structs.replace(settings, database_timeout=0.2)
    holder = sqlite3.connect(record.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert reaper.sweep(quick) == []  # nothing could be written; another sweep will
    holder.execute("ROLLBACK")
    holder.close()
    assert len(reaper.sweep(quick)) == 1


def test_a_record_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    settings = Settings(runtime_dir=tmp_path / "run", database_file=tmp_path)
    with pytest.raises(RegistryError):
        reaper.sweep(settings)


# --- found in the process table alone ---


@pytest.mark.usefixtures("at_once")
def test_running_vms_are_found_by_their_qemu(
    settings: Settings, record: Registry, children: Processes
) -> None:
    began = time.time()
    node = '{"driver":"raw","node-name":"root","file":{"filename":"/i/minimal/rootfs.erofs"}}'
    words = ("-accel", "tcg,tb-size=128", "-smp", "2", "-m", "768M", "-object",
             "memory-backend-file,id=ram0,size=768M,mem-path=/c/templates/abc/ram,share=off",
             "-blockdev", node)  # fmt: skip
    known = add(record, settings, dead=False)
    children.qemu(settings, known.vm_id)
    owned = children.qemu(settings, "vm-00000002", *words)
    orphan = children.qemu(settings, "vm-00000003")
    children.qemu(settings, "vm-00000004", tag="01234567")
    children.start("-name", "vmkernel-template-77", name="qemu-system-x86_64")
    children.start("-name", name="qemu-system-x86_64")
    pidfd = os.pidfd_open(owned.pid)
    found = {vm.vm_id: vm for vm in reaper.rebuild(settings)}
    os.close(pidfd)
    assert set(found) == {"vm-00000002", "vm-00000003"}
    vm = found["vm-00000002"]
    assert vm.state is VmState.RUNNING
    assert vm.runner == processes.identify_self()
    assert vm.qemu == identity(owned)
    assert (vm.accelerator, vm.vcpus, vm.memory) == ("tcg", 2, 768)
    assert (vm.template, vm.recipe) == ("abc", "minimal")
    assert began - 1 < vm.created < time.time() + 1
    assert vm.log_dir == str(settings.state_dir / "logs" / "vm-00000002")
    assert record.get("vm-00000002") == vm
    assert found["vm-00000003"].state is VmState.ORPHANED
    assert found["vm-00000003"].runner is None
    assert reaper.rebuild(settings) == [], "all are on record now"
    assert reaper.sweep(settings) == ["vm-00000003"]
    assert orphan.wait(5) == -signal.SIGKILL
    assert owned.poll() is None


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (("/v/host/run_vm.py", "vm-00000001"), {"directory": "/vm-00000001"}),
        (
            ("-m", "vmkernel", "-f", "/j/kernel-1234-abcd.json"),
            {"kernel_id": "1234-abcd", "connection_file": "/j/kernel-1234-abcd.json"},
        ),
    ],
)
def test_the_runner_is_told_by_its_command_line(
    settings: Settings, words: tuple[str, ...], fields: dict[str, str]
) -> None:
    tag = processes.tag_of(settings.database_file)
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(['qemu-system-x86_64', '-c', 'read line', '-name',"
        f" 'vmkernel-vm-00000001.{tag}'], executable='/bin/sh')\n"
        "pidfd = os.pidfd_open(child.pid)\n"
        "print('up', flush=True); child.wait()\n"
    )
    runner = python(code, *words)
    assert runner.stdout is not None
    assert runner.stdout.readline() == "up\n"
    end = time.monotonic() + 5
    while not (found := running.find_running(settings)):
        assert time.monotonic() < end
    runner.communicate("\n")
    (vm,) = found
    assert vm.runner_pid == runner.pid
    assert vm.state is VmState.RUNNING
    for name, value in fields.items():
        assert str(getattr(vm, name)).endswith(value)


def test_its_slot_is_told_by_the_semaphore_file(settings: Settings, children: Processes) -> None:
    from vmkernel.host.capacity import vm_slots

    qemu = children.qemu(settings, "vm-00000001")
    pidfd = os.pidfd_open(qemu.pid)
    slots = vm_slots(settings)
    other = slots.acquire_nowait()
    (vm,) = running.find_running(settings)
    assert other is not None
    assert vm.slot == other.index
    other.release()
    assert running.find_running(settings)[0].slot is None
    os.close(pidfd)


def test_the_oldest_logs_go_first_though_the_clock_was_set_back(settings: Settings) -> None:
    logs = settings.state_dir / "logs"
    for number in range(start.KEPT_LOGS + 5):
        path = logs / f"vm-{number:08x}"
        path.mkdir(parents=True)
        future = 3600 if number < 5 else -3600 + number
        os.utime(path, (time.time() + future,) * 2)
    start.prune_logs(settings)
    left = sorted(int(path.name[3:], 16) for path in logs.iterdir())
    assert left == list(range(5, start.KEPT_LOGS + 5))


# --- many at once ---

SWEEP = """
import sys
from contextlib import suppress
from pathlib import Path
from vmkernel.host import reaper
from vmkernel.host.registry import Registry, vm_dir
from vmkernel.models import VmState
from vmkernel.settings import Settings
place = Path(sys.argv[1])
settings = Settings(runtime_dir=place / "run", state_dir=place / "state")
sys.stdin.readline()
swept = []
with Registry(settings) as registry:
    for _ in range(15):
        vm = registry.new()
        vm_dir(settings, vm.vm_id).mkdir(mode=0o700, parents=True)
        swept += reaper.sweep(settings)
        registry.update(vm.vm_id, state=VmState.STARTING)
        registry.update(vm.vm_id, state=VmState.RUNNING)
        swept += reaper.sweep(settings)
        assert vm_dir(settings, vm.vm_id).exists()
        registry.update(vm.vm_id, state=VmState.STOPPED)
        with suppress(FileNotFoundError):  # another process's sweep came first
            vm_dir(settings, vm.vm_id).rmdir()
print(*swept)
"""


def test_many_processes_sweep_and_create_at_once(
    settings: Settings, record: Registry, tmp_path: Path
) -> None:
    dead = [add(record, settings).vm_id for _ in range(30)]
    outputs = together([python(SWEEP, str(tmp_path)) for _ in range(4)])
    swept = [vm_id for output in outputs for vm_id in output.split()]
    assert sorted(swept) == sorted(dead), "each was settled once"
    assert directories(settings) == set()


def test_a_sweep_of_fifty_live_vms_is_cheap(settings: Settings, record: Registry) -> None:
    for _ in range(50):
        record.new(state=VmState.RUNNING)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        reaper.sweep(settings)
        times.append(time.perf_counter() - began)
    others = len(os.listdir("/proc"))
    print(f"sweep of 50 rows, {others} entries in /proc: {1000 * min(times):.1f} ms (best)")
    assert min(times) < 0.1


def test_an_adopted_process_has_no_owner(children: Processes) -> None:
    code = "sleep 60 > /dev/null & echo $!"
    done = subprocess.run(["/bin/sh", "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    orphan = processes.identify(int(done.stdout))
    assert orphan is not None
    assert running.owner(orphan) is None
    assert running.age(orphan) < 30
    assert processes.kill(orphan)
    assert processes.parent(orphan.pid) is None or processes.identify(orphan.pid) is None
