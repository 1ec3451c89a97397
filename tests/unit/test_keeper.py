"""The keeper of the warm pool over VMs that can be held up, broken and counted."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator

import pytest

from vmhost import until
from vmkernel.errors import VmBootError, VmCapacityError, VmError, VmGuestError
from vmkernel.host import keeper as keeper_module
from vmkernel.host import pool
from vmkernel.host.capacity import Semaphore, Slot, Statistics
from vmkernel.host.inotify import FileWatch
from vmkernel.host.keeper import Keeper
from vmkernel.host.pool import Place
from vmkernel.host.shielded import to_its_end


class FakeVm:
    """Holds a real slot, and lives until it is told otherwise."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.ended: asyncio.Future[VmError | None] = asyncio.get_running_loop().create_future()
        self.deaf = False

    async def ping(self, timeout: float) -> None:
        await asyncio.sleep(0)
        if self.deaf or self.ended.done():
            raise VmGuestError("no answer")

    async def wait_ended(self) -> VmError | None:
        return await asyncio.shield(self.ended)

    def die(self) -> None:
        self.slot.release()
        if not self.ended.done():
            self.ended.set_result(VmGuestError("killed"))


class FakeHost:
    """VMs on a real semaphore file."""

    def __init__(self, semaphore: Semaphore) -> None:
        self.semaphore = semaphore
        self.started: list[FakeVm] = []
        self.starts = 0
        self.start_seconds = 0.0
        self.end_seconds = 0.0
        self.failure: VmError | None = None

    async def start(self) -> FakeVm | None:
        self.starts += 1
        slot = self.semaphore.acquire_nowait()
        if slot is None:
            return None
        try:
            await asyncio.sleep(self.start_seconds)
            if self.failure is not None:
                raise self.failure
        except BaseException:
            slot.release()
            raise
        vm = FakeVm(slot)
        self.started.append(vm)
        return vm

    async def end(self, vm: FakeVm) -> None:
        await asyncio.sleep(self.end_seconds)
        vm.die()

    def slots(self) -> Statistics:
        return self.semaphore.statistics()

    def follow(self, watch: FileWatch) -> bool:
        return self.semaphore.follow(watch)

    def alive(self) -> int:
        return sum(not vm.ended.done() for vm in self.started)


@pytest.fixture
def semaphore(tmp_path) -> Semaphore:
    return Semaphore(tmp_path / "slots", 3)


@pytest.fixture
def host(semaphore: Semaphore) -> FakeHost:
    return FakeHost(semaphore)


@contextlib.asynccontextmanager
async def kept(host: FakeHost, size: int, max_idle: float = 600) -> AsyncIterator[Keeper[FakeVm]]:
    """A pool that is full at first, and of which nothing is left at the end."""
    keeper: Keeper[FakeVm] = Keeper(host, size, max_idle)
    keeper.begin()
    try:
        yield keeper
    finally:
        await keeper.close()
    assert keeper.pool._members == {}
    assert not keeper._tasks


async def full(keeper: Keeper[FakeVm]) -> None:
    async with asyncio.timeout(10):
        await keeper.wait_full()


async def test_members_are_taken_at_once_and_replaced(host: FakeHost) -> None:
    async with kept(host, 2) as keeper:
        await full(keeper)
        assert host.semaphore.statistics().used == 2
        vm = await keeper.take()
        assert vm is host.started[1]
        await full(keeper)
        assert host.semaphore.statistics().used == 3
        assert repr(keeper) == "<Keeper <Pool size=2 starting=0 idle=2 leaving=0> hopes=0>"
        await host.end(vm)
    assert host.alive() == 0
    assert host.semaphore.statistics().used == 0


async def test_dead_and_deaf_members_are_replaced_and_never_handed_out(host: FakeHost) -> None:
    async with kept(host, 2) as keeper:
        await full(keeper)
        host.started[0].die()
        await until(lambda: len(host.started) == 3 and keeper.pool.count(Place.IDLE) == 2)
        host.started[1].deaf = host.started[2].deaf = True
        assert await keeper.take() is None
        await full(keeper)
        assert host.alive() == 2
        assert await keeper.take() is host.started[-1]
        host.started[-1].die()


async def test_a_member_that_dies_while_it_is_taken_is_not_handed_out(host: FakeHost) -> None:
    async with kept(host, 1) as keeper:
        await full(keeper)
        taking = asyncio.create_task(keeper.take())
        host.started[0].die()
        assert await taking is None
        await full(keeper)


async def test_it_yields_at_once_to_another_process_that_waits(host: FakeHost) -> None:
    async with kept(host, 3) as keeper:
        await full(keeper)
        others = Semaphore(host.semaphore.path, 3)
        began = time.monotonic()
        slots = [await others.acquire(timeout=5), await others.acquire(timeout=5)]
        took = time.monotonic() - began
        print(f"two slots yielded within {1000 * took:.1f} ms")
        assert took < 0.5
        assert host.alive() == 1
        assert keeper.pool.count(Place.IDLE) == 1
        for slot in slots:
            slot.release()
        assert await until(lambda: host.alive() == 3) > 0.5, "it stays small for a moment"


async def test_a_pool_that_cannot_watch_the_file_polls(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileWatch, "follow", lambda *_: False)
    async with kept(host, 3) as keeper:
        await full(keeper)
        slot = await Semaphore(host.semaphore.path, 3).acquire(timeout=5)
        slot.release()


async def test_a_pool_that_found_the_host_full_fills_when_a_slot_is_freed(host: FakeHost) -> None:
    slots = [host.semaphore.acquire_nowait() for _ in range(3)]
    async with kept(host, 1) as keeper:
        await asyncio.sleep(0.05)
        assert host.starts == 0, "nothing is tried that cannot be"
        taken = slots.pop()
        assert taken is not None
        taken.release()
        assert await until(lambda: keeper.pool.count(Place.IDLE) == 1) < 0.5
    slots.clear()


async def test_a_waiting_request_of_ours_gets_the_member_that_gets_ready(host: FakeHost) -> None:
    host.start_seconds = 0.2
    others = [host.semaphore.acquire_nowait() for _ in range(2)]
    async with kept(host, 1) as keeper:
        await until(lambda: host.starts == 1)
        waiting = asyncio.create_task(host.semaphore.acquire())
        deaf = keeper.hope(lambda: False)
        hope = keeper.hope(lambda: True)
        vm = await asyncio.wait_for(hope.member, 5)
        assert keeper.give_up(hope) is vm
        assert keeper.give_up(deaf) is None
        waiting.cancel()
        await asyncio.wait([waiting])
        vm.die()
    others.clear()


async def test_a_start_that_fails_is_told_and_tried_again(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.failure = VmBootError("QEMU did not start")
    async with kept(host, 1) as keeper:
        with pytest.raises(VmBootError, match="QEMU did not start"):
            await keeper.wait_full()
        assert str(keeper.last_error) == "QEMU did not start"
        host.failure = None
        await full(keeper)
        assert keeper.last_error is None
        assert host.starts == 2


async def test_an_unusable_semaphore_file_is_told_and_looked_at_again(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kept(host, 1) as keeper:
        await full(keeper)

        def unusable() -> Statistics:
            raise VmCapacityError("no file")

        monkeypatch.setattr(host, "slots", unusable)
        vm = await keeper.take()
        assert vm is not None
        await until(lambda: keeper.last_error is not None)
        monkeypatch.undo()
        await full(keeper)
        vm.die()


async def test_closing_while_members_start_ends_all_of_them(host: FakeHost) -> None:
    host.start_seconds = 5
    began = time.monotonic()
    async with kept(host, 2):
        await until(lambda: host.starts == 2)
    async with kept(host, 2):
        pass
    assert time.monotonic() - began < 1
    assert host.semaphore.statistics().used == 0


async def test_a_member_given_up_while_it_starts_frees_its_slot(host: FakeHost) -> None:
    host.start_seconds = 5
    async with kept(host, 3) as keeper:
        await until(lambda: host.starts == 2)
        first = host.semaphore.acquire_nowait()
        second = await host.semaphore.acquire(timeout=2)
        assert keeper.pool.count(Place.STARTING) == 1
        assert first is not None
        first.release()
        second.release()


async def test_an_idle_pool_does_nothing(host: FakeHost) -> None:
    async with kept(host, 2) as keeper:
        await full(keeper)
        await asyncio.sleep(1)
        looks = 0
        usual = host.slots

        def counted() -> Statistics:
            nonlocal looks
            looks += 1
            return usual()

        host.slots = counted  # type: ignore[method-assign]
        await asyncio.sleep(1)
        assert looks <= 1


async def test_members_age_out(host: FakeHost) -> None:
    async with kept(host, 2, max_idle=0.2) as keeper:
        await full(keeper)
        await until(lambda: len(host.started) >= 6)
        assert host.alive() <= 2


async def test_cancelling_a_request_while_its_member_is_asked_ends_the_member(
    host: FakeHost,
) -> None:
    async with kept(host, 1) as keeper:
        await full(keeper)
        taking = asyncio.create_task(keeper.take())
        await asyncio.sleep(0)
        taking.cancel()
        await asyncio.wait([taking])
        assert taking.cancelled()
        await until(lambda: host.started[0].ended.done())
        await full(keeper)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_no_slot_and_no_vm_is_lost(
    host: FakeHost, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests, waiters, deaths and cancellations at random moments, for a second."""
    monkeypatch.setattr(pool, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(pool, "LONGEST_PAUSE", 0.03)
    chance = random.Random(seed)
    host.start_seconds = host.end_seconds = 0.003
    most = 0

    async def request(keeper: Keeper[FakeVm]) -> None:
        vm = await keeper.take()
        assert vm is None or not vm.ended.done()
        if vm is None:
            hope = keeper.hope(lambda: True)
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(hope.member), chance.random() * 0.02)
            vm = keeper.give_up(hope)
        if vm is not None:
            try:
                await asyncio.sleep(chance.random() * 0.01)
            finally:
                await to_its_end(host.end(vm))

    async def outsider() -> None:
        with await host.semaphore.acquire(timeout=20):
            await asyncio.sleep(chance.random() * 0.01)

    async with kept(host, 2) as keeper:
        tasks: set[asyncio.Task[None]] = set()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            work = request(keeper) if chance.random() < 0.6 else outsider()
            task = asyncio.create_task(work)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if chance.random() < 0.2:
                chance.choice(list(tasks)).cancel()
            if chance.random() < 0.1 and host.started:
                chance.choice(host.started[-3:]).die()
            await asyncio.sleep(chance.random() * 0.005)
            most = max(most, host.alive())
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
    assert most <= 3
    assert host.alive() == 0
    assert host.semaphore.statistics() == (3, 0, 3, 0)
    assert host.starts > 20
    print(f"{host.starts} starts, {len(host.started)} members")


async def test_to_its_end_goes_on_through_any_number_of_cancellations() -> None:
    done = []

    async def work() -> None:
        await asyncio.sleep(0.1)
        done.append(True)

    task = asyncio.create_task(to_its_end(work()))
    for _ in range(5):
        await asyncio.sleep(0.01)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [True]


assert keeper_module.IDLE_SECONDS > 1, "test_an_idle_pool_does_nothing counts on it"
