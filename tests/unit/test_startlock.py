"""The lock on the start of one VM: of many who would start it, one does."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from fakes import python, together
from vmkernel.errors import SettingsError, VmAlreadyStartingError, VmError, VmNotFoundError
from vmkernel.host.startlock import StartLock
from vmkernel.settings import Settings

VM, OTHER, LAST = "vm-00000000", "vm-00000001", "vm-ffffffff"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(runtime_dir=tmp_path / "run", state_dir=tmp_path / "state")


def holder(settings: Settings, vm_id: str = VM) -> int | None:
    return StartLock.holder(settings, vm_id)


def test_A4_who_comes_second_is_told_who_has_it(settings: Settings) -> None:
    assert holder(settings) is None
    with StartLock.take(settings, VM) as lock:
        assert holder(settings) == os.getpid()
        with pytest.raises(VmAlreadyStartingError) as caught:
            StartLock.take(settings, VM)
        assert f"VM {VM} is already being started, by pid {os.getpid()} (" in str(caught.value)
        assert isinstance(caught.value, BlockingIOError)
        assert "vmkernel ps" in caught.value.hint
        for other in (OTHER, LAST):  # each VM has a lock of its own
            with StartLock.take(settings, other):
                assert holder(settings, other) == os.getpid()
            assert holder(settings, other) is None
        assert repr(lock) == f"<StartLock {VM} held>"
    lock.release()
    assert repr(lock) == f"<StartLock {VM} released>"
    with pytest.raises(ValueError, match="released"):
        _ = lock.fd
    assert holder(settings) is None
    StartLock.take(settings, VM).release()
    assert [path.name for path in settings.runtime_dir.iterdir()] == ["starts"]
    assert (settings.runtime_dir / "starts").stat().st_size == 0


RACE = """
import sys, time
from pathlib import Path
from vmkernel.errors import VmAlreadyStartingError
from vmkernel.host.startlock import StartLock
from vmkernel.settings import Settings
settings = Settings(runtime_dir=Path(sys.argv[1]))
locks = []  # each kept to the end
sys.stdin.readline()
for round in range(int(sys.argv[2])):
    time.sleep(max(0.0, float(sys.argv[3]) + 0.01 * round - time.time()))
    try:
        locks.append(StartLock.take(settings, f"vm-{round:08x}"))
        print("won", flush=True)
    except VmAlreadyStartingError as error:
        assert f"vm-{round:08x}" in str(error) and "pid " in str(error), error
        print("lost", flush=True)
sys.stdin.read()
"""


def test_A4_of_sixteen_processes_one_wins_each_time(settings: Settings, rounds: object) -> None:
    assert callable(rounds)
    count = rounds(quick=30, full=100)
    begin = str(time.time() + 3)
    racers = [python(RACE, str(settings.runtime_dir), str(count), begin) for _ in range(16)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = [[str(racer.stdout and racer.stdout.readline()).strip() for _ in range(count)]
               for racer in racers]  # fmt: skip
    together(racers)  # and only now do they end, and their locks
    assert [sum(each[n] == "won" for each in results) for n in range(count)] == [1] * count
    winners = [next(i for i, each in enumerate(results) if each[n] == "won") for n in range(count)]
    print(f"{count} rounds, {len(set(winners))} different winners of 16")


def test_A4_a_dead_holder_holds_nothing(settings: Settings) -> None:
    code = (
        "import sys; from pathlib import Path; from vmkernel.settings import Settings\n"
        "from vmkernel.host.startlock import StartLock\n"
        f"lock = StartLock.take(Settings(runtime_dir=Path(sys.argv[1])), {VM!r})\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    child = python(code, str(settings.runtime_dir))
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(VmAlreadyStartingError, match=rf"by pid {child.pid} \(python"):
        StartLock.take(settings, VM)
    child.kill()
    child.communicate()
    assert holder(settings) is None
    StartLock.take(settings, VM).release()


def test_A4_it_goes_over_to_who_inherits_it_and_then_that_one_is_named(settings: Settings) -> None:
    code = (
        "import os, sys; from vmkernel.host.startlock import StartLock\n"
        "print('up', flush=True); sys.stdin.readline()\n"
        f"lock = StartLock.inherited({VM!r}, int(sys.argv[1]))\n"
        "assert not os.get_inheritable(lock.fd)\n"
        "print('held', flush=True); sys.stdin.readline()\n"
        "lock.release()\n"
        "print('released', flush=True); sys.stdin.readline()\n"
    )
    lock = StartLock.take(settings, VM)
    runner = subprocess.Popen(
        [os.environ.get("PYTHON", "python"), "-c", code, str(lock.fd)],
        pass_fds=[lock.fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert runner.stdin is not None
    assert runner.stdout is not None
    assert runner.stdout.readline() == "up\n"
    lock.release()
    assert holder(settings) == os.getpid(), "who took it, as far as is known"
    runner.stdin.write("\n")
    runner.stdin.flush()
    assert runner.stdout.readline() == "held\n"
    assert holder(settings) == runner.pid
    with pytest.raises(VmAlreadyStartingError, match=f"pid {runner.pid}"):
        StartLock.take(settings, VM)
    runner.stdin.write("\n")
    runner.stdin.flush()
    assert runner.stdout.readline() == "released\n"
    StartLock.take(settings, VM).release()
    runner.communicate("\n")


def test_A9_a_start_waits_for_a_clean_up_of_the_same_vm(settings: Settings) -> None:
    cleaner = StartLock.take(settings, VM, cleaning=True)
    with pytest.raises(VmAlreadyStartingError):
        StartLock.take(settings, VM, cleaning=True)  # one cleaner is enough
    timer = threading.Timer(0.2, cleaner.release)
    timer.start()
    began = time.monotonic()
    with StartLock.take(settings, VM):
        assert 0.1 < time.monotonic() - began < 1
        with pytest.raises(VmAlreadyStartingError):
            StartLock.take(settings, VM, cleaning=True)
    timer.join()


def test_a_clean_up_that_hangs_is_waited_for_within_a_bound(settings: Settings) -> None:
    with StartLock.take(settings, VM, cleaning=True):
        began = time.monotonic()
        with pytest.raises(VmAlreadyStartingError, match=f"pid {os.getpid()}"):
            StartLock.take(settings, VM)
        assert 1.9 < time.monotonic() - began < 4


def test_a_lock_that_nobody_refers_to_is_free(settings: Settings) -> None:
    StartLock.take(settings, VM)
    StartLock.take(settings, VM).release()


def test_a_lock_on_a_file_that_was_removed_is_on_nothing(settings: Settings) -> None:
    with StartLock.take(settings, VM):
        (settings.runtime_dir / "starts").unlink()
        assert holder(settings) is None
        with StartLock.take(settings, OTHER):
            assert holder(settings, OTHER) == os.getpid()


@pytest.mark.parametrize(
    "name", ["mine", "", "vm-1234567", "vm-1234567g", "vm--1234567", "vm-12 34 56", "vm-123456789"]
)
def test_what_is_no_id_is_not_found(settings: Settings, name: str) -> None:
    with pytest.raises(VmNotFoundError, match="no VM's id"):
        StartLock.take(settings, name)


def test_a_file_that_cannot_be_used_is_told(settings: Settings, tmp_path: Path) -> None:
    settings.runtime_dir.mkdir(mode=0o700)
    (settings.runtime_dir / "starts").mkdir()
    with pytest.raises(VmError, match="Is a directory") as caught:
        StartLock.take(settings, VM)
    assert "VMKERNEL_RUNTIME_DIR" in caught.value.hint
    settings.runtime_dir.chmod(0o755)
    with pytest.raises(SettingsError, match="not private"):
        StartLock.take(settings, VM)
