"""The record of VMs: rows, states, names, many processes at once."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest

from fakes import DEAD, Processes, identity, python, together
from vmkernel.errors import RegistryError, VmNotFoundError, VmStateError
from vmkernel.host import processes, registry
from vmkernel.host.registry import Registry, VmRecord, new_record
from vmkernel.models import TRANSITIONS, VmState
from vmkernel.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        runtime_dir=tmp_path / "run", state_dir=tmp_path / "state", database_timeout=1.0
    )


@pytest.fixture
def record(settings: Settings) -> Registry:
    return Registry(settings)


def ids(record: Registry, *, ended: bool = False) -> list[str]:
    return [status.record.vm_id for status in record.list(ended=ended)]


def test_A1_a_record_names_its_processes_with_their_start_times(
    settings: Settings, record: Registry
) -> None:
    children = Processes()
    try:
        qemu = children.start(name="qemu-system-x86_64")
        before = time.time()
        vm = record.new(kernel_id="k1", connection_file="/c.json", recipe="minimal", memory=512)
        assert len(vm.vm_id) == len("vm-12345678")
        assert before <= vm.created <= time.time()
        assert vm.owner == os.geteuid()
        assert vm.boot_id == processes.boot_id()
        assert vm.runner == processes.identify_self()
        assert vm.qemu is None
        assert record.list() == [(vm, True, False)]

        pid, start_time = identity(qemu)
        vm = record.update(
            vm.vm_id, state=VmState.STARTING, qemu_pid=pid, qemu_start=start_time, slot=3
        )
        assert record.list() == [(vm, True, True)]
        assert record.update(vm.vm_id, state=VmState.RUNNING).qemu == (pid, start_time)
        assert registry.name_of_runner(settings, os.getpid()) == f"{vm.vm_id}, kernel k1"
        assert registry.name_of_runner(settings, pid) == f"{vm.vm_id}, kernel k1"
        assert registry.name_of_runner(settings, 1) == ""
        record.update(vm.vm_id, slot_lease=77)
        assert registry.name_of_runner(settings, 1, 77) == f"{vm.vm_id}, kernel k1"
        (status,) = record.list()
        assert status.state is VmState.RUNNING
        qemu.kill()
        qemu.wait()
        (status,) = record.list()
        assert not status.qemu_alive
        assert status.state is VmState.FAILED
    finally:
        children.end()
    record.remove(vm.vm_id)
    record.remove(vm.vm_id)
    assert record.list(ended=True) == []


def test_A1_a_recycled_pid_or_one_of_an_earlier_boot_is_never_taken_for_the_old_one(
    record: Registry,
) -> None:
    me = processes.identify_self()
    vm = record.new(state=VmState.RUNNING, qemu_pid=me.pid, qemu_start=me.start_time)
    assert record.list()[0][1:] == (True, True)
    record.update(vm.vm_id, qemu_start=me.start_time - 1)
    assert record.list()[0][1:] == (True, False)
    record.update(vm.vm_id, qemu_start=me.start_time, boot_id="another boot")
    assert record.list()[0][1:] == (False, False)
    assert record.list()[0].state is VmState.FAILED


@pytest.mark.parametrize(
    ("said", "runner", "qemu", "kept", "true"),
    [
        (VmState.CREATED, True, False, False, VmState.CREATED),
        (VmState.CREATED, False, False, False, VmState.FAILED),
        (VmState.CREATED, False, False, True, VmState.CREATED),
        (VmState.STARTING, True, False, False, VmState.STARTING),
        (VmState.STARTING, False, True, False, VmState.ORPHANED),
        (VmState.RUNNING, True, True, False, VmState.RUNNING),
        (VmState.RUNNING, False, True, True, VmState.ORPHANED),
        (VmState.RUNNING, True, False, False, VmState.FAILED),
        (VmState.RUNNING, False, False, True, VmState.FAILED),
        (VmState.STOPPING, True, False, False, VmState.STOPPING),
        (VmState.ORPHANED, False, True, False, VmState.ORPHANED),
        (VmState.ORPHANED, False, False, False, VmState.FAILED),
        (VmState.STOPPED, False, True, False, VmState.STOPPED),
        (VmState.FAILED, True, True, False, VmState.FAILED),
    ],
)
def test_the_state_told_is_corrected_by_the_process_table(
    said: VmState, runner: bool, qemu: bool, kept: bool, true: VmState
) -> None:
    record = new_record(state=said, kept=kept)
    assert registry.VmStatus(record, runner, qemu).state is true


def test_looking_makes_nothing_and_the_oldest_is_first(
    settings: Settings, record: Registry
) -> None:
    assert record.list(ended=True) == []
    record.remove("vm-00000000")
    record.forget_old()
    with pytest.raises(VmNotFoundError):
        record.get("vm-00000000")
    assert not settings.state_dir.exists()
    made = [record.new().vm_id for _ in range(5)]
    assert ids(record) == made
    assert settings.state_dir.stat().st_mode & 0o777 == 0o700
    for path in settings.state_dir.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_ended_ones_are_listed_when_asked(record: Registry) -> None:
    first, second = record.new(), record.new()
    record.update(first.vm_id, state=VmState.FAILED, exit_cause="because")
    assert ids(record) == [second.vm_id]
    assert ids(record, ended=True) == [first.vm_id, second.vm_id]


def test_A3_a_vm_is_found_by_id_name_or_a_unique_beginning(record: Registry) -> None:
    record.add(new_record(vm_id="vm-12345678", name="mine"))
    record.add(new_record(vm_id="vm-12fffff0"))
    record.add(new_record(vm_id="vm-99999999", name="vm-12"))
    for word in ("vm-12345678", "mine", "vm-123", "1234"):
        assert record.get(word).vm_id == "vm-12345678"
    assert record.get("vm-12").vm_id == "vm-99999999", "a name goes before a beginning"
    with pytest.raises(VmNotFoundError, match=r"several.*vm-12345678 \(mine\), vm-12fffff0"):
        record.get("12")
    with pytest.raises(VmNotFoundError, match=r"no VM 'mien'; close to it: vm-12345678 \(mine\)$"):
        record.get("mien")
    with pytest.raises(VmNotFoundError, match="no VM 'vm-'"):
        record.get("vm-")
    for word in ("", "v", "nothing of the kind"):
        with pytest.raises(VmNotFoundError) as caught:
            record.get(word)
        assert "close" not in str(caught.value)
        assert "vmkernel ps" in caught.value.hint
    with pytest.raises(VmNotFoundError, match="vm-00000000"):
        record.update("vm-00000000", slot=1)


def test_a_state_is_followed_by_what_may_follow_it_only(record: Registry) -> None:
    for old in VmState:
        for new in VmState:
            vm = record.new(state=old)
            if new is old or new in TRANSITIONS[old]:
                assert record.update(vm.vm_id, state=new).state is new
            else:
                with pytest.raises(VmStateError, match=f"is {old}, so it cannot become {new}"):
                    record.update(vm.vm_id, state=new, slot=7)
                assert record.get(vm.vm_id) == vm, "nothing of a refused change is kept"


def test_an_expected_row_guards_a_change(record: Registry) -> None:
    old = record.new()
    new = record.update(old.vm_id, expected=old, slot=1)
    with pytest.raises(VmStateError, match="changed meanwhile"):
        record.update(old.vm_id, expected=old, slot=2)
    assert record.get(old.vm_id) == new


def test_a_name_is_given_once(record: Registry) -> None:
    first = record.new(name="mine", kept=True)
    with pytest.raises(VmStateError, match=rf"'mine' already: {first.vm_id}, created"):
        record.new(name="mine")
    other = record.new()
    with pytest.raises(VmStateError, match="mine"):
        record.update(other.vm_id, name="mine")
    record.update(first.vm_id, state=VmState.STOPPED)
    with pytest.raises(VmStateError, match=r"vmkernel rm mine|'mine' already"):
        record.update(other.vm_id, name="mine")
    record.update(first.vm_id, kept=False)
    record.update(other.vm_id, name="mine")  # from one that ended, and was not to be kept
    assert record.get("mine").vm_id == other.vm_id
    assert record.get(first.vm_id).name == ""
    record.remove(other.vm_id)
    assert record.new(name="mine").name == "mine"
    assert len(ids(record, ended=True)) == 2


def test_every_field_comes_back_as_it_was_written(record: Registry) -> None:
    vm = VmRecord(
        vm_id="vm-abcdef01", name="ä name; DROP TABLE vms; --", owner=12, state=VmState.ORPHANED,
        created=1.5, started=2.25, ended=3.125, boot_id="b", runner_pid=4194304,
        runner_start=2**62, qemu_pid=3, qemu_start=2**40, slot=0, slot_lease=2**63 - 1,
        template="t", recipe="r", language="l", accelerator="tcg", memory=10, vcpus=64,
        tenant_id="x", task_id="y", kernel_id="z", connection_file="/c", notebook="a \n'\".ipynb",
        directory="/d", log_dir="/l", settings='{"memory": 3}', kept=True, exit_cause="done",
            workspace="ro /n", network="open", environment="A", files="ask",
    )  # fmt: skip
    defaults = new_record(vm_id="vm-00000002")
    assert all(
        value != getattr(defaults, name) for name, value in msgspec.structs.asdict(vm).items()
    ), "the test would not see a field that is lost"
    record.add(vm)
    record.add(defaults)
    assert record.get(vm.vm_id) == vm
    assert record.get(defaults.vm_id) == defaults
    again = msgspec.structs.replace(vm, slot=5)
    record.add(again)  # found again by somebody else meanwhile
    assert record.get(vm.vm_id) == again


def test_old_ends_are_forgotten_and_what_is_kept_is_not(record: Registry) -> None:
    live = record.new()
    kept = record.new(state=VmState.STOPPED, kept=True, ended=0.0)
    gone = [record.new(state=VmState.STOPPED, ended=float(n)).vm_id for n in range(10)]
    record.forget_old(keep=3)
    assert ids(record, ended=True) == [live.vm_id, kept.vm_id, *gone[-3:]]


def test_what_ended_last_stays_though_the_clock_was_set_back(record: Registry) -> None:
    before = [record.new(state=VmState.STOPPED, ended=1000.0 + n).vm_id for n in range(5)]
    after = [record.new(state=VmState.STOPPED, ended=float(n)).vm_id for n in range(5)]
    record.forget_old(keep=3)
    assert ids(record, ended=True) == [*before[-3:], *after[-3:]]


def test_an_id_is_looked_up_as_such(record: Registry) -> None:
    vm = record.new(name="vm-00000000")  # as an older version would have let it be
    assert record.exactly(vm.vm_id) == vm
    for look in (record.get, record.exactly, record.status):
        with pytest.raises(VmNotFoundError):
            look("vm-00000000")
    with pytest.raises(VmNotFoundError):
        record.exactly(vm.vm_id[:-1])
    assert record.get(vm.vm_id[:-1]) == vm


def test_an_unknown_field_is_refused(record: Registry) -> None:
    vm = record.new()
    with pytest.raises(TypeError):
        record.update(vm.vm_id, colour="blue")
    with pytest.raises(TypeError):
        record.new(colour="blue")


UPDATES = """
import sys
from pathlib import Path
from vmkernel.host.registry import Registry
from vmkernel.models import VmState
from vmkernel.settings import Settings
shared = sys.argv[2]
sys.stdin.readline()
place = Path(sys.argv[1])
registry = Registry(Settings(runtime_dir=place / "run", state_dir=place / "state"))
own = registry.new(slot=0)
import time
slowest = 0.0
for number in range(200):
    began = time.perf_counter()
    registry.update(own.vm_id, slot=number + 1)
    while True:  # compare and swap, so that a lost update shows
        old = registry.get(shared)
        try:
            registry.update(shared, expected=old, slot=old.slot + 1)
            break
        except Exception as error:
            assert "meanwhile" in str(error), error
    slowest = max(slowest, time.perf_counter() - began)
    if number % 50 == 0:
        registry.remove(registry.new().vm_id)
assert registry.get(own.vm_id).slot == 200
registry.update(own.vm_id, state=VmState.STOPPED)
print(slowest)
"""


def test_eight_processes_write_two_hundred_times_each_and_nothing_is_lost(
    settings: Settings, tmp_path: Path
) -> None:
    with Registry(settings) as record:
        shared = record.new(slot=0)
        began = time.monotonic()
        slowest = together([python(UPDATES, str(tmp_path), shared.vm_id) for _ in range(8)])
        took = time.monotonic() - began
        assert record.get(shared.vm_id).slot == 8 * 200
        assert sorted(record.get(vm_id).slot for vm_id in ids(record, ended=True)) == [
            *[200] * 8,
            1600,
        ]
    print(f"3200 changes by 8 processes: {took:.1f} s, slowest {max(map(float, slowest)):.2f} s")


def test_the_first_use_by_many_processes_at_once(settings: Settings, tmp_path: Path) -> None:
    code = UPDATES.partition("slowest = 0.0")[0].replace("shared = ", "")
    together([python(code, str(tmp_path), "") for _ in range(8)])
    with Registry(settings) as record:
        assert len(record.list(ended=True)) == 8
    assert sorted(path.name for path in settings.state_dir.iterdir()) == [
        "vms.sqlite",
        "vms.sqlite.lock",
    ], "the last one to close leaves one file"


def test_many_threads_share_one_registry(record: Registry) -> None:
    vm = record.new(slot=0)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                record.update(vm.vm_id, memory=1)
                record.remove(record.new().vm_id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(record.list()) == 1


def test_a_writer_that_is_killed_at_any_moment_leaves_a_record_that_is_whole(
    settings: Settings, tmp_path: Path
) -> None:
    code = """
import sys
from pathlib import Path
from vmkernel.host.registry import Registry
from vmkernel.models import VmState
from vmkernel.settings import Settings
place = Path(sys.argv[1])
registry = Registry(Settings(runtime_dir=place / "run", state_dir=place / "state"))
sys.stdin.readline()
while True:
    vm = registry.new(slot=1, exit_cause="x" * 5000)
    registry.update(vm.vm_id, state=VmState.STARTING, slot=2)
    registry.update(vm.vm_id, state=VmState.FAILED, slot=3)
"""
    for number in range(4):
        writer = python(code, str(tmp_path))
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
        with Registry(settings) as record:
            end = time.monotonic() + 10
            before = len(record.list(ended=True))
            while len(record.list(ended=True)) < before + 5:
                assert time.monotonic() < end
        time.sleep(0.013 * number)
        writer.kill()
        writer.communicate()
        with Registry(settings) as record:
            slots = {VmState.CREATED: 1, VmState.STARTING: 2, VmState.FAILED: 3}
            for status in record.list(ended=True):
                assert slots[status.record.state] == status.record.slot
            record.new(slot=1)


def test_a_connection_is_not_carried_into_a_child(record: Registry) -> None:
    vm = record.new()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            record.update(vm.vm_id, slot=5)
            record.close()
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert record.get(vm.vm_id).slot == 5
    record.update(vm.vm_id, slot=6)


def test_what_the_record_costs(record: Registry, settings: Settings) -> None:
    def best(act: object) -> float:
        assert callable(act)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            act()
            times.append(time.perf_counter() - began)
        return 1000 * min(times)

    began = time.perf_counter()
    vm = record.new()
    first = 1000 * (time.perf_counter() - began)
    for _ in range(50):
        record.new(**DEAD)

    def reopened() -> None:
        with Registry(settings) as another:
            another.get(vm.vm_id)

    print(
        f"made {first:.1f} ms; new {best(record.new):.2f} ms; "
        f"update {best(lambda: record.update(vm.vm_id, created=time.time())):.2f} ms; "
        f"list of {len(record.list())} {best(record.list):.2f} ms; "
        f"open, get, close {best(reopened):.2f} ms"
    )
    assert best(lambda: record.update(vm.vm_id, created=time.time())) < 20


def test_repr_says_whether_it_is_open(record: Registry) -> None:
    assert repr(record) == f"<Registry {record.path} not open>"
    with record:
        record.new()
        assert repr(record) == f"<Registry {record.path} open>"
    assert repr(record) == f"<Registry {record.path} not open>"


def test_the_name_of_a_runner_is_for_messages_and_never_fails(tmp_path: Path) -> None:
    broken = Settings(runtime_dir=tmp_path, database_file=tmp_path)
    assert registry.name_of_runner(broken, 1) == ""
    with pytest.raises(RegistryError, match="it is a directory"):
        Registry(broken).list()
