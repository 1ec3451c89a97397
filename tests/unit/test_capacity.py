"""The semaphore file within one process: slots, queue, time limit, cancellation, other limits."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmkernel.errors import SettingsError, VmCapacityError
from vmkernel.host import capacity
from vmkernel.host.capacity import QueuePosition, Semaphore, Slot, boot_slots, vm_slots
from vmkernel.host.slotfile import MAX_SLOTS
from vmkernel.settings import Settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slots"


def holds(slot: Slot) -> bool:
    return slot.holds  # a call, for mypy takes a property to stay what it was


def open_descriptors() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def until_waiting(semaphore: Semaphore, count: int) -> None:
    await until(lambda: semaphore.statistics().waiting == count)


async def test_a_free_slot_is_taken_at_once_and_given_back(path: Path) -> None:
    semaphore = Semaphore(path, 2)
    told: list[QueuePosition] = []
    first = await semaphore.acquire(on_wait=told.append, label="first")
    second = await semaphore.acquire(on_wait=told.append)
    assert (first.index, second.index) == (0, 1)
    assert holds(first)
    assert semaphore.statistics() == (2, 2, 0, 0)
    assert repr(first) == "<Slot 0 'first' ours>"
    assert repr(semaphore) == f"<Semaphore {path} limit=2 used=2 waiting=0>"
    first.release()
    first.release()
    assert not holds(first)
    assert repr(first) == "<Slot 0 'first' free>"
    with pytest.raises(ValueError, match="closed"):
        _ = first.fd
    assert semaphore.statistics() == (2, 1, 1, 0)
    assert not told
    second.release()


def test_taking_a_free_slot_imports_neither_asyncio_nor_ctypes_and_is_quick(path: Path) -> None:
    code = """
import json, sys, time
from vmkernel.host.capacity import Semaphore
semaphore = Semaphore(sys.argv[1], 8)
semaphore.acquire_nowait().release()
times = []
for _ in range(200):
    start = time.perf_counter()
    slot = semaphore.acquire_nowait()
    times.append(time.perf_counter() - start)
    slot.release()
print(json.dumps([sorted(times)[100], [m for m in ("asyncio", "ctypes") if m in sys.modules]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, timeout=30
    )
    median, imported = json.loads(done.stdout)
    print(f"taking a free slot: {median * 1e6:.0f} µs")
    assert imported == []
    assert median < 0.001


async def test_B4_holds_tells_the_truth_even_when_a_successor_has_the_byte(path: Path) -> None:
    semaphore = Semaphore(path, 1)
    first = await semaphore.acquire()
    first.release()
    second = await semaphore.acquire()
    assert second.index == first.index
    assert not holds(first)
    assert holds(second)
    second.release()


async def test_B3_tasks_are_served_in_order_of_arrival(path: Path) -> None:
    semaphore = Semaphore(path, 2)
    order: list[int] = []
    most = running = 0

    async def use(number: int) -> None:
        nonlocal most, running
        with await semaphore.acquire():
            order.append(number)
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.005)
            running -= 1

    await asyncio.gather(*(use(number) for number in range(40)))
    assert order == list(range(40))
    assert most == 2
    assert semaphore.statistics() == (2, 0, 2, 0)


async def test_B2_a_waiter_hears_its_place_and_goes_on_when_a_slot_is_freed(path: Path) -> None:
    semaphore = Semaphore(path, 1)
    held = await semaphore.acquire()
    first_told: list[str] = []
    second_told: list[str] = []
    first = asyncio.create_task(semaphore.acquire(on_wait=lambda p: first_told.append(p.text)))
    await until_waiting(semaphore, 1)
    second = asyncio.create_task(semaphore.acquire(on_wait=lambda p: second_told.append(p.text)))
    await until_waiting(semaphore, 2)
    assert semaphore.acquire_nowait() is None
    start = time.monotonic()
    held.release()
    slot = await asyncio.wait_for(first, 5)
    print(f"woken after {1000 * (time.monotonic() - start):.1f} ms")
    assert time.monotonic() - start < capacity.POLL_SECONDS / 2
    await asyncio.sleep(0.4)
    slot.release()
    (await asyncio.wait_for(second, 5)).release()
    assert first_told == ["waiting for a VM slot: next in line, 1 of 1 in use"]
    assert second_told == [
        "waiting for a VM slot: 1 kernel ahead",
        "waiting for a VM slot: next in line, 1 of 1 in use",
    ]
    assert QueuePosition(2, 3, 3).text == "waiting for a VM slot: 2 kernels ahead"


async def test_B2_the_time_limit_names_limit_holders_and_place(path: Path) -> None:
    semaphore = Semaphore(path, 1, name_of=lambda pid, lease: f"kernel of {pid}")
    slot = await semaphore.acquire()
    before = open_descriptors()
    other = asyncio.create_task(semaphore.acquire())
    await until_waiting(semaphore, 1)
    start = time.monotonic()
    with pytest.raises(VmCapacityError) as caught:
        await semaphore.acquire(timeout=0.3)
    assert 0.25 < time.monotonic() - start < 2
    text = str(caught.value)
    assert "within 0.3 s" in text
    assert "max_concurrent_vms is 1" in text
    assert f"pid {os.getpid()} (kernel of {os.getpid()})" in text
    assert "place in the queue: 2" in text
    assert "vmkernel ps" in caught.value.hint
    with pytest.raises(VmCapacityError):
        await semaphore.acquire(timeout=0)
    other.cancel()
    await asyncio.wait([other])
    assert semaphore.statistics() == (1, 1, 0, 0)
    await until(lambda: open_descriptors() == before)
    slot.release()


async def test_B2_cancelling_a_waiter_leaves_nothing_and_the_next_is_served(path: Path) -> None:
    semaphore = Semaphore(path, 1)
    slot = await semaphore.acquire()
    before = open_descriptors()
    waiters = [asyncio.create_task(semaphore.acquire()) for _ in range(3)]
    await until_waiting(semaphore, 3)
    waiters[0].cancel()
    waiters[1].cancel()
    await asyncio.wait(waiters[:2])
    assert semaphore.statistics().waiting == 1
    slot.release()
    (await asyncio.wait_for(waiters[2], 5)).release()
    waiters.clear()
    await until(lambda: open_descriptors() == before - 1)
    assert semaphore.statistics() == (1, 0, 1, 0)


async def test_B5_cancellation_at_any_moment_loses_no_slot(path: Path) -> None:
    semaphore = Semaphore(path, 2)

    async def use() -> None:
        with await semaphore.acquire():
            await asyncio.sleep(0.001)

    before = open_descriptors()
    for round_ in range(60):
        tasks = [asyncio.create_task(use()) for _ in range(5)]
        await asyncio.sleep(round_ % 12 * 0.0007)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    del tasks, task
    # The semaphore's own look at the file stays open.
    await until(lambda: open_descriptors() == before + 1)
    assert semaphore.statistics() == (2, 0, 2, 0)


async def test_a_slot_nobody_received_frees_itself(path: Path) -> None:
    semaphore = Semaphore(path, 1)
    task = asyncio.create_task(semaphore.acquire())
    await asyncio.wait([task])  # done, and its result never looked at
    assert semaphore.statistics().used == 1
    del task
    gc.collect()
    assert semaphore.statistics().used == 0


async def test_an_error_in_on_wait_leaves_nothing(path: Path) -> None:
    semaphore = Semaphore(path, 1)
    with await semaphore.acquire():

        def broken(place: QueuePosition) -> None:
            raise RuntimeError(place.text)

        with pytest.raises(RuntimeError, match="next in line"):
            await semaphore.acquire(on_wait=broken)
        assert semaphore.statistics().waiting == 0


async def test_a_higher_limit_counts_the_lower_ones_slots_and_the_other_way_round(
    path: Path,
) -> None:
    small, large = Semaphore(path, 2), Semaphore(path, 4)
    slots = [await large.acquire() for _ in range(3)]
    assert small.statistics() == (2, 3, 0, 0)
    assert small.acquire_nowait() is None
    slots[0].release()
    slots[1].release()  # left is slot 2, above the small limit
    one = small.acquire_nowait()
    assert one is not None
    assert small.acquire_nowait() is None, "two are used: slots 0 and 2"
    slots.append(await large.acquire())
    slots.append(await large.acquire())
    assert large.acquire_nowait() is None
    assert large.statistics() == (4, 4, 0, 0)
    for slot in [*slots, one]:
        slot.release()


async def test_a_waiter_under_a_lower_limit_does_not_stop_those_behind_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "_STALL_SECONDS", 0.3)
    small, large = Semaphore(path, 1), Semaphore(path, 3)
    held = await large.acquire()
    stuck = asyncio.create_task(small.acquire())
    await until_waiting(small, 1)
    assert large.acquire_nowait() is None, "no overtaking while someone waits"
    start = time.monotonic()
    passed = [await large.acquire(timeout=10), await large.acquire(timeout=10)]
    print(f"two passed in {time.monotonic() - start:.2f} s")
    assert time.monotonic() - start >= 0.3
    for slot in [held, *passed]:
        slot.release()
    (await asyncio.wait_for(stuck, 5)).release()


async def test_many_waiters_of_one_process_share_one_inotify_instance(path: Path) -> None:
    semaphore = Semaphore(path, 1)
    slot = await semaphore.acquire()
    tasks = [asyncio.create_task(semaphore.acquire()) for _ in range(150)]
    await until_waiting(semaphore, 150)

    def instances() -> int:
        count = 0
        for link in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                count += "inotify" in str(link.readlink())
        return count

    assert instances() == 1
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await until(lambda: instances() == 0)
    slot.release()


async def test_without_inotify_waiters_poll(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The per-user bound on instances cannot be reached without disturbing others on this host.
    from vmkernel.host.inotify import FileWatch

    monkeypatch.setattr(FileWatch, "follow", lambda *_: False)
    monkeypatch.setattr(FileWatch, "_wake", lambda self: os.read(self._descriptor, 4096))
    semaphore = Semaphore(path, 1)
    slot = await semaphore.acquire()
    task = asyncio.create_task(semaphore.acquire())
    await until_waiting(semaphore, 1)
    slot.release()
    (await asyncio.wait_for(task, 1)).release()


def test_holders_are_named_by_pid_and_program(path: Path) -> None:
    semaphore = Semaphore(path, 3)
    slots = [semaphore.acquire_nowait(), semaphore.acquire_nowait()]
    holders = semaphore.holders()
    del slots
    assert [holder.slot for holder in holders] == [0, 1]
    assert {holder.pid for holder in holders} == {os.getpid()}
    comm = Path("/proc/self/comm").read_text().strip()
    assert str(holders[0]) == f"pid {os.getpid()} ({comm})"


@pytest.mark.parametrize("limit", [0, -1, 1 << 20])
def test_an_impossible_limit_names_its_setting(path: Path, limit: int) -> None:
    with pytest.raises(SettingsError, match=f"max_concurrent_boots is {limit}") as caught:
        Semaphore(path, limit, setting="max_concurrent_boots")
    assert "from 1 to" in caught.value.hint


async def test_the_limits_of_the_settings(tmp_path: Path) -> None:
    settings = Settings(runtime_dir=tmp_path / "run", max_concurrent_vms=3, max_concurrent_boots=1)
    vms, boots = vm_slots(settings), boot_slots(settings)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    vms.check()
    boots.check()
    assert vms.path == tmp_path / "run" / "slots"
    assert boots.path == tmp_path / "run" / "slots.boots"
    with await boots.acquire():
        assert boots.acquire_nowait() is None
        assert vms.statistics() == (3, 0, 3, 0)
        with pytest.raises(VmCapacityError, match=r"no boot slot .*max_concurrent_boots is 1"):
            await boots.acquire(timeout=0)
    assert (tmp_path / "run" / "slots").stat().st_mode & 0o777 == 0o600


def test_the_content_of_the_file_means_nothing(path: Path) -> None:
    path.write_bytes(os.urandom(5000))
    content = path.read_bytes()
    semaphore = Semaphore(path, 2)
    slots = [semaphore.acquire_nowait(), semaphore.acquire_nowait()]
    assert semaphore.acquire_nowait() is None
    path.write_bytes(b"")
    assert semaphore.statistics().used == 2
    path.write_bytes(content)
    slots.clear()
    assert semaphore.statistics().used == 0
    assert path.read_bytes() == content


async def test_foreign_locks_on_the_file_make_it_full_and_no_busy_loop(path: Path) -> None:
    import fcntl

    from vmkernel.host import locks

    semaphore = Semaphore(path, 2)
    for length in (0, MAX_SLOTS, 1):
        with path.open("wb") as foreign:
            fcntl.fcntl(foreign, locks._SETLK, locks._FLOCK.pack(fcntl.F_WRLCK, 0, 0, length, 0))
            if length == 1:
                assert semaphore.statistics() == (2, 1, 1, 0)
                continue
            assert semaphore.acquire_nowait() is None
            start = time.process_time()
            told = "another program has locked the queue" if length == 0 else "within 0.4 s"
            with pytest.raises(VmCapacityError, match=told):
                await semaphore.acquire(timeout=0.4)
            assert time.process_time() - start < 0.3
    semaphore.check()
    assert semaphore.statistics() == (2, 0, 2, 0)


def test_an_unknown_error_of_the_file_system_is_told_too(path: Path) -> None:
    from vmkernel.host.slotfile import explain

    for number in (errno.ENOLCK, errno.EINVAL, errno.ENOSPC, errno.EMFILE, errno.EIO):
        error = explain(OSError(number, os.strerror(number)), path)
        assert os.strerror(number) in str(error)
        assert str(path) in str(error)
        assert error.hint


async def test_a_slot_ends_once_with_two_ends_at_once(path: Path) -> None:
    semaphore = Semaphore(path, 2)
    slots: list[Slot] = [await semaphore.acquire() for _ in range(2)]

    async def end(slot: Slot) -> None:
        await asyncio.sleep(0)
        slot.release()

    await asyncio.gather(end(slots[0]), end(slots[0]))
    assert semaphore.statistics().used == 1
    slots[1].handed_over()
    slots[1].release()
    assert semaphore.statistics().used == 0
