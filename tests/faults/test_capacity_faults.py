"""The semaphore file over processes: B1 to B9 as far as they speak of slots, and what may go wrong.

All processes are real. `Worker` is a Python that waits for a slot, says so, and holds it until it
is told to end; the times it tells are of CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmkernel.errors import VmCapacityError
from vmkernel.host.capacity import Semaphore, Slot

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = """
import asyncio, json, sys, time
from vmkernel.errors import VmCapacityError
from vmkernel.host.capacity import Semaphore

def say(**values):
    print(json.dumps({"t": time.monotonic(), **values}), flush=True)

async def main(path, limit, hold, timeout):
    semaphore = Semaphore(path, int(limit))
    try:
        slot = await semaphore.acquire(
            on_wait=lambda place: say(waits=place.ahead), timeout=float(timeout) or None
        )
    except VmCapacityError as error:
        say(error=str(error), hint=error.hint)
        return
    say(got=slot.index)
    if hold == "stdin":
        sys.stdin.read()
    else:
        time.sleep(float(hold))
    say(ends=slot.index)

asyncio.run(main(*sys.argv[1:]))
"""
UNPRIVILEGED = 65534  # nobody
_AS_NOBODY = ["setpriv", f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups"]


class Worker:
    """One process that wants a slot."""

    def __init__(
        self,
        path: Path,
        limit: int,
        *,
        hold: str = "stdin",
        timeout: float = 0,
        prefix: list[str] | None = None,
    ) -> None:
        command = [*(prefix or []), sys.executable, "-c", WORKER]
        self.process = subprocess.Popen(
            [*command, str(path), str(limit), hold, str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        self.said: list[dict[str, Any]] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def hear(self, key: str, seconds: float = 20) -> Any:
        """The value of the next thing it says under this key."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.001, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no {key!r} from {self.process.pid}: {self.said}") from None
            assert line, f"{self.process.pid} ended without {key!r}: {self.said}"
            self.said.append(json.loads(line))
            if key in self.said[-1]:
                return self.said[-1][key]

    def when(self, key: str) -> float:
        return float(next(entry["t"] for entry in self.said if key in entry))

    def end(self) -> None:
        """Let it end by itself, and take the rest of what it says; again is harmless."""
        if self.process.returncode is not None:
            return
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(20)
        self._reader.join(20)
        while (line := self._lines.get()) != "":
            self.said.append(json.loads(line))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@pytest.fixture
def workers() -> Generator[list[Worker]]:
    """All that are put in here are gone afterwards."""
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.kill()
        for stream in (worker.process.stdin, worker.process.stdout):
            assert stream
            worker._reader.join(20)
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slots"


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that other users can reach, which pytest's own is not."""
    directory = Path(tempfile.mkdtemp(prefix="vmk-slots-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to act as two users")


def holds(slot: Slot) -> bool:
    return slot.holds  # a call, for mypy takes a property to stay what it was


def sleeper(slot: Slot) -> subprocess.Popen[bytes]:
    """A process that is a VM, as far as its slot is concerned."""
    child = subprocess.Popen(["sleep", "60"], pass_fds=[slot.fd])
    slot.handed_over()
    return child


def most_at_once(spans: list[tuple[float, float]]) -> int:
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def test_B1_B3_twenty_processes_limit_two_in_order_and_never_more(
    path: Path, workers: list[Worker]
) -> None:
    for _ in range(2):
        workers.append(Worker(path, 2))
        workers[-1].hear("got")
    for number in range(18):
        workers.append(Worker(path, 2, hold="0.02"))
        assert workers[-1].hear("waits") == number
    semaphore = Semaphore(path, 2)
    assert semaphore.statistics() == (2, 2, 0, 18)
    workers[1].end()
    workers[10].hear("got")  # so far one slot went round, and the order can be seen exactly
    for worker in workers:
        worker.end()
    order = [workers.index(w) for w in sorted(workers, key=lambda worker: worker.when("got"))]
    assert order[:11] == list(range(11))
    # With two slots going round, two may be served at one moment and speak in either order.
    assert all(abs(place - number) <= 1 for place, number in enumerate(order)), order
    assert most_at_once([(w.when("got"), w.when("ends")) for w in workers]) == 2
    assert semaphore.statistics() == (2, 0, 2, 0)
    gaps = [b.when("got") - a.when("ends") for a, b in itertools.pairwise(workers[1:11])]
    print(f"a slot changed hands in {1000 * sorted(gaps)[len(gaps) // 2]:.1f} ms (median)")


async def test_B9_a_killed_vm_frees_its_slot_at_once(path: Path) -> None:
    semaphore = Semaphore(path, 1)
    latencies = []
    for _ in range(20):
        slot = await semaphore.acquire()
        vm = sleeper(slot)
        assert holds(slot)
        waiter = asyncio.create_task(semaphore.acquire(timeout=10))
        while not semaphore.statistics().waiting:
            await asyncio.sleep(0.001)
        killed = time.monotonic()
        vm.kill()
        successor = await waiter
        latencies.append(time.monotonic() - killed)
        assert not holds(slot)
        assert holds(successor)
        assert successor.index == slot.index
        vm.wait()
        successor.release()
    latencies.sort()
    print(f"woken {1000 * latencies[10]:.2f} ms (median), {1000 * latencies[-1]:.2f} ms (worst)")
    assert latencies[10] < 0.05


def test_B9_a_vm_that_outlives_its_runner_still_holds_its_slot(path: Path) -> None:
    code = """
import subprocess, sys
from vmkernel.host.capacity import Semaphore
slot = Semaphore(sys.argv[1], 1).acquire_nowait()
print(subprocess.Popen(["sleep", "60"], pass_fds=[slot.fd], stdout=subprocess.DEVNULL).pid)
"""
    runner = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=20,
    )
    vm = int(runner.stdout)
    semaphore = Semaphore(path, 1)
    try:
        assert semaphore.statistics().used == 1
        assert semaphore.acquire_nowait() is None
    finally:
        pidfd = os.pidfd_open(vm)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    assert_comes_true(lambda: semaphore.statistics().used == 0)


def assert_comes_true(condition: Any, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_B4_a_sibling_does_not_inherit_the_slot(path: Path) -> None:
    semaphore = Semaphore(path, 1)
    slot = semaphore.acquire_nowait()
    assert slot is not None
    # close_fds=False: only close-on-exec stands between the sibling and the slot.
    with subprocess.Popen(["sleep", "60"], close_fds=False) as sibling:
        vm = sleeper(slot)
        inherited = [os.readlink(entry) for entry in Path(f"/proc/{sibling.pid}/fd").iterdir()]
        vm.kill()
        vm.wait()
        assert not holds(slot)
        assert str(path) not in inherited
        assert semaphore.statistics().used == 0
        sibling.kill()


def test_B8_B9_two_hundred_kills_lose_no_slot(path: Path) -> None:
    semaphore = Semaphore(path, 3)
    chance = random.Random(9)
    alive: list[tuple[Slot, subprocess.Popen[bytes]]] = []
    for _ in range(200):
        slot = semaphore.acquire_nowait()
        if slot is not None:
            assert len(alive) < 3
            alive.append((slot, sleeper(slot)))
        if len(alive) == 3 or chance.random() < 0.4:
            slot, vm = alive.pop(chance.randrange(len(alive)))
            vm.kill()
            vm.wait()
            assert not holds(slot)
        assert semaphore.statistics().used == len(alive)
        assert all(slot.holds for slot, _ in alive)
    for _, vm in alive:
        vm.kill()
        vm.wait()
    assert semaphore.statistics() == (3, 0, 3, 0)


CHURN = """
import asyncio, random, sys
from vmkernel.host.capacity import Semaphore

async def use(semaphore, chance):
    while True:
        with await semaphore.acquire():
            await asyncio.sleep(chance.random() * 0.004)

async def main():
    semaphore = Semaphore(sys.argv[1], 2)
    await asyncio.gather(*(use(semaphore, random.Random()) for _ in range(3)))

asyncio.run(main())
"""


def test_B9_processes_killed_at_random_moments_of_taking_waiting_and_giving_back(
    path: Path,
) -> None:
    semaphore = Semaphore(path, 2)
    chance = random.Random(2)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CHURN, str(path)], env=environment)

    churners = [start() for _ in range(3)]
    try:
        assert_comes_true(lambda: semaphore.statistics().waiting >= 6, 20)
        for _ in range(20):
            time.sleep(chance.random() * 0.1)
            victim = churners.pop(chance.randrange(len(churners)))
            victim.kill()
            victim.wait()
            churners.append(start())
            assert semaphore.statistics().used <= 2
    finally:
        for churner in churners:
            churner.kill()
            churner.wait()
    assert semaphore.statistics() == (2, 0, 2, 0)


def test_B3_a_killed_waiter_does_not_block_the_queue(path: Path, workers: list[Worker]) -> None:
    workers += [Worker(path, 1)]
    workers[0].hear("got")
    for _ in range(3):
        workers.append(Worker(path, 1))
        workers[-1].hear("waits")
    workers[1].kill()  # the first in line, and then one in the middle
    assert workers[2].hear("waits") == 0
    assert workers[3].hear("waits") == 1
    workers[2].kill()
    start = time.monotonic()
    workers[0].kill()
    workers[3].hear("got")
    print(f"served after {1000 * (workers[3].when('got') - start):.1f} ms")
    assert workers[3].when("got") - start < 0.5


def test_B3_a_stopped_waiter_is_passed_and_keeps_its_place(
    path: Path, workers: list[Worker]
) -> None:
    workers.append(Worker(path, 1))
    workers[0].hear("got")
    for _ in range(2):
        workers.append(Worker(path, 1))
        workers[-1].hear("waits")
    workers[1].process.send_signal(signal.SIGSTOP)
    workers[0].end()
    start = time.monotonic()
    workers[2].hear("got")
    print(f"passed it after {workers[2].when('got') - start:.1f} s")
    workers.append(Worker(path, 1))
    assert workers[3].hear("waits") == 1
    workers[1].process.send_signal(signal.SIGCONT)
    workers[2].end()
    workers[1].hear("got")
    assert workers[3].hear("waits") == 0


def test_B2_processes_that_are_too_late_say_why(path: Path, workers: list[Worker]) -> None:
    workers.append(Worker(path, 1))
    workers[0].hear("got")
    workers.append(Worker(path, 1, timeout=0.3))
    text = workers[1].hear("error")
    assert f"pid {workers[0].process.pid} (" in text
    assert "place in the queue: 1" in text


async def test_the_file_is_removed_under_waiters(path: Path) -> None:
    semaphore = Semaphore(path, 2)
    vms = []
    slots = []
    for _ in range(2):
        slots.append(await semaphore.acquire())
        vms.append(sleeper(slots[-1]))
    order: list[int] = []

    async def use(number: int) -> None:
        with await Semaphore(path, 2).acquire(timeout=20):
            order.append(number)
            await asyncio.sleep(0.02)

    tasks = []
    for number in range(4):
        tasks.append(asyncio.create_task(use(number)))
        await asyncio.sleep(0.02)
    path.unlink()
    await asyncio.sleep(0.4)
    assert path.exists(), "the first waiter has made it anew"
    assert not order, "the VMs on the removed file still count for those who knew it"
    assert all(slot.holds for slot in slots)
    assert semaphore.statistics().used == 2
    vms.pop().kill()
    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    assert order == [0, 1, 2, 3]
    vms.pop().kill()
    assert_comes_true(lambda: semaphore.statistics() == (2, 0, 2, 0))


async def test_the_file_is_moved_away_and_back(path: Path) -> None:
    semaphore = Semaphore(path, 2)
    first = await semaphore.acquire()
    aside = path.with_name("aside")
    path.rename(aside)
    second = await semaphore.acquire()
    assert semaphore.statistics().used == 2
    assert semaphore.acquire_nowait() is None
    second.release()
    aside.rename(path)
    assert semaphore.statistics().used == 1
    assert holds(first)
    first.release()
    assert semaphore.statistics() == (2, 0, 2, 0)


async def test_the_directory_is_removed_under_a_waiter(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    semaphore = Semaphore(directory / "slots", 1)
    slot = await semaphore.acquire()
    assert directory.stat().st_mode & 0o777 == 0o700
    task = asyncio.create_task(semaphore.acquire(timeout=20))
    await asyncio.sleep(0.1)
    shutil.rmtree(directory)
    await asyncio.sleep(0.1)
    slot.release()
    (await task).release()
    assert (directory / "slots").exists()


async def test_the_path_turns_bad_under_a_waiter(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    semaphore = Semaphore(directory / "slots", 1)
    slot = await semaphore.acquire()
    task = asyncio.create_task(semaphore.acquire())
    await asyncio.sleep(0.1)
    shutil.rmtree(directory)
    directory.write_text("a file where the directory was")
    with pytest.raises(VmCapacityError, match="Not a directory"):
        await asyncio.wait_for(task, 10)
    assert "unusable" in repr(semaphore)
    slot.release()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to(path.with_name("elsewhere")), "symbolic link"),
        (lambda path: path.parent.rmdir() or path.parent.write_text(""), "Not a directory"),
        (lambda path: path.parent.rmdir() or path.parent.symlink_to("/nowhere"), "/slots: "),
    ],
)
async def test_a_path_that_cannot_be_a_semaphore_file(tmp_path: Path, make: Any, told: str) -> None:
    path = tmp_path / "run" / "slots"
    path.parent.mkdir()
    make(path)
    with pytest.raises(VmCapacityError, match=told) as caught:
        await Semaphore(path, 1).acquire()
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_an_unwritable_file_or_directory_says_what_to_do(
    open_dir: Path, workers: list[Worker]
) -> None:
    prefix = _AS_NOBODY if os.geteuid() == 0 else []
    if not prefix:
        open_dir.chmod(0o500)
    workers.append(Worker(open_dir / "slots", 1, prefix=prefix))
    assert "Permission denied" in workers[0].hear("error")
    assert "install -m 666" in workers[0].said[-1]["hint"]
    workers.append(Worker(open_dir / "sub" / "slots", 1, prefix=prefix))
    assert "Permission denied" in workers[1].hear("error")
    open_dir.chmod(0o755)
    (open_dir / "slots").touch()
    (open_dir / "slots").chmod(0o444)
    workers.append(Worker(open_dir / "slots", 1, prefix=prefix))
    assert "Permission denied" in workers[2].hear("error")
    assert f"install -m 666 /dev/null {open_dir}/slots" in workers[2].said[-1]["hint"]


def test_B1_two_users_share_one_file(open_dir: Path, workers: list[Worker]) -> None:
    need_root()
    path = open_dir / "slots"
    path.touch()
    path.chmod(0o666)
    workers.append(Worker(path, 1))
    workers[0].hear("got")
    workers.append(Worker(path, 1, prefix=_AS_NOBODY))
    assert workers[1].hear("waits") == 0
    workers.append(Worker(path, 1))
    assert workers[2].hear("waits") == 1
    workers[0].end()
    workers[1].hear("got")
    assert workers[2].hear("waits") == 0
    [holder] = Semaphore(path, 1).holders()
    assert holder.pid == workers[1].process.pid
    assert "user nobody" in holder.name
    workers[1].end()
    workers[2].hear("got")


def test_B1_a_shared_file_in_a_sticky_directory(open_dir: Path, workers: list[Worker]) -> None:
    need_root()
    open_dir.chmod(0o1777)  # as /tmp: fs.protected_regular refuses O_CREAT on others' files there
    path = open_dir / "slots"
    path.touch()
    os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
    path.chmod(0o666)
    workers.append(Worker(path, 1))
    workers[0].hear("got")


def test_a_read_only_file_system_and_a_full_one_say_so(tmp_path: Path) -> None:
    script = """
set -e
mount -t tmpfs -o nr_inodes=2 none "$1"
mkdir "$1/run"
"$2" -c "$3" "$1/run/slots" 1 0 0
mount -o remount,ro "$1"
"$2" -c "$3" "$1/slots" 1 0 0
"""
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, WORKER],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=30,
        )
    except FileNotFoundError:
        pytest.skip("no unshare on this host")
    if done.returncode:
        pytest.skip(f"no mounts of our own here: {done.stderr}")
    full, read_only = (json.loads(line) for line in done.stdout.splitlines())
    assert "No space left" in full["error"]
    assert "inodes" in full["hint"]
    assert "Read-only file system" in read_only["error"]


def test_too_many_open_files_says_so(path: Path) -> None:
    code = """
import resource, sys
from vmkernel.host.capacity import Semaphore
resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
semaphore, slots = Semaphore(sys.argv[1], 100), []
try:
    while True:
        slots.append(semaphore.acquire_nowait())
except Exception as error:
    print(type(error).__name__, error, error.hint, len(slots))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "VmCapacityError" in done.stdout
    assert "Too many open files" in done.stdout
    assert "ulimit -n" in done.stdout
