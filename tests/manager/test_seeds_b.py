"""SEEDS.md, part B: many VMs, one capacity. Each test is named after the row that it shows.

B9 has a file of its own; the queue and the slots without VMs are in ``unit/test_capacity.py`` and
``faults/test_capacity_faults.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from prerequisites import missing
from vmhost import Sampler, VmHost, until
from vmkernel import (
    Language,
    Scheduler,
    SchedulerConfig,
    Settings,
    TemplateError,
    VmBootError,
    VmCapacityError,
    VmError,
    VmGuestError,
    VmHandle,
    VmManager,
    VmNotFoundError,
    VmOverlayError,
    VmRecord,
)
from vmkernel.host import keeper, processes, runner_start, running

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def limit_two(host: VmHost) -> Settings:
    return host.settings(VMKERNEL_MAX_CONCURRENT_VMS="2")


def holds(vm: VmHandle) -> bool:
    return vm.holds_semaphore_slot  # a call, for mypy takes a property to stay what it was


def config(host: VmHost, **more: object) -> SchedulerConfig:
    """As in the environment of this host."""
    own = {
        name.removeprefix("VMKERNEL_").lower(): value
        for name, value in host.env.items()
        if name.startswith("VMKERNEL_")
    }
    return SchedulerConfig(**{**own, **more})  # type: ignore[arg-type]


# --- B1: the whole host ---------------------------------------------------------------

ONE_VM = """
import asyncio, sys
from vmkernel import VmManager

async def main(number):
    async with VmManager() as manager:
        vm = await manager.create_vm(task_id=number)
        result = await vm.run(f"print({number} * 2)")
        await manager.destroy_vm(vm)
        print(result.stdout, end="")

asyncio.run(main(sys.argv[1]))
"""


def start_process(host: VmHost, code: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **host.env, "PYTHONPATH": str(REPOSITORY), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_B1_six_processes_share_two_vms(host: VmHost) -> None:
    with Sampler(host) as sampler:
        processes = [
            start_process(host, ONE_VM, str(number), VMKERNEL_MAX_CONCURRENT_VMS="2")
            for number in range(6)
        ]
        said = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in said] == [f"{2 * number}\n" for number in range(6)], said
    assert sampler.most == 2
    assert len(sampler.seen) == 6
    assert sampler.samples > 50


# --- B2: waiting ----------------------------------------------------------------------


async def test_B2_create_vm_waits_and_goes_on_when_a_vm_is_destroyed(limit_two: Settings) -> None:
    async with VmManager(limit_two) as manager, VmManager(limit_two) as other:
        first = await manager.create_vm()
        await manager.create_vm()
        told: list[str] = []
        waiting = asyncio.create_task(other.create_vm(on_progress=told.append))
        await until(lambda: manager.capacity().waiting)
        await asyncio.sleep(0.2)
        assert not waiting.done()
        assert told == ["waiting for a VM slot: next in line, 2 of 2 in use"]
        began = time.monotonic()
        await manager.destroy_vm(first)
        vm = await asyncio.wait_for(waiting, 60)
        print(f"went on and was up {time.monotonic() - began:.2f} s after the destruction began")
        assert (await vm.run("6 * 7")).results == [{"text/plain": "42"}]


async def test_B2_a_waiter_can_be_cancelled_and_the_next_one_is_served(limit_two: Settings) -> None:
    async with VmManager(limit_two) as manager:
        vms = [await manager.create_vm() for _ in range(2)]
        waiters = [asyncio.create_task(manager.create_vm()) for _ in range(2)]
        await until(lambda: manager.capacity().waiting == 2)
        waiters[0].cancel()
        await asyncio.wait([waiters[0]])
        assert waiters[0].cancelled()
        assert manager.capacity().waiting == 1
        assert len(await manager.list_vms()) == 3, "what was cancelled is not on record"
        await manager.destroy_vm(vms[1])
        assert (await asyncio.wait_for(waiters[1], 60)).alive


async def test_B2_the_time_limit_names_limit_holders_and_place(limit_two: Settings) -> None:
    async with VmManager(limit_two) as manager:
        vms = [await manager.create_vm() for _ in range(2)]
        before = asyncio.create_task(manager.create_vm())
        await until(lambda: manager.capacity().waiting == 1)
        began = time.monotonic()
        with pytest.raises(VmCapacityError) as caught:
            await manager.create_vm(timeout=0.5)
        assert 0.4 < time.monotonic() - began < 5
        said = str(caught.value)
        assert "max_concurrent_vms is 2" in said
        assert "place in the queue: 2" in said
        for vm in vms:
            assert vm.vm_id in said, "the holders"
        assert "vmkernel ps" in caught.value.hint
        assert caught.value.code_ran == "no"
        before.cancel()
        await asyncio.wait([before])
        assert len(await manager.list_vms()) == 2


# --- B3: order ------------------------------------------------------------------------


async def test_B3_twenty_waiters_at_limit_two_are_served_in_order(
    host: VmHost, limit_two: Settings
) -> None:
    async with VmManager(limit_two) as manager:
        first = [await manager.create_vm() for _ in range(2)]

        async def use(number: int) -> None:
            vm = await manager.create_vm(task_id=str(number))
            await manager.destroy_vm(vm)

        waiters = []
        for number in range(20):
            waiters.append(asyncio.create_task(use(number)))
            await until(lambda number=number: manager.capacity().waiting == number + 1)
        seen: dict[str, float] = {}
        done = False

        async def watch() -> None:
            while not done:
                for status in await manager.list_vms():
                    if status.record.slot is not None and status.record.task_id:
                        seen.setdefault(status.record.task_id, time.monotonic())
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        with Sampler(host) as sampler:
            for vm in first:
                await manager.destroy_vm(vm)
            await asyncio.gather(*waiters)
        done = True
        await watching
    order = [int(task) for task in sorted(seen, key=lambda task: seen[task])]
    print("served in the order", *order)
    assert sorted(order) == list(range(20))
    # Two slots go round: two that are served at one moment may be seen in either order.
    assert all(abs(place - number) <= 1 for place, number in enumerate(order)), order
    assert sampler.most == 2


# --- B4: a slot lives as long as its VM -----------------------------------------------


async def test_B4_the_slot_is_held_while_the_vm_runs_and_not_after(limit_two: Settings) -> None:
    async with VmManager(limit_two) as manager:
        vm = await manager.create_vm()
        wrong: list[str] = []
        end = threading.Event()
        qemu = (await manager.get_vm(vm.vm_id)).record.qemu

        def watch() -> None:
            """Asked at each moment, from another thread: never false while QEMU lives."""
            from vmkernel.host.processes import is_alive

            while not end.is_set():
                if holds(vm):
                    time.sleep(0.001)
                    continue
                time.sleep(0.2)  # a process gives up its locks a moment before it is dead
                if is_alive(qemu):
                    wrong.append("QEMU lives without its slot")

        assert qemu is not None
        assert holds(vm)
        watching = threading.Thread(target=watch)
        watching.start()
        await vm.run("sum(range(10))")
        assert holds(vm)
        assert manager.capacity().used == 1
        await manager.destroy_vm(vm)
        assert not holds(vm)
        end.set()
        watching.join()
        assert wrong == []
        assert manager.capacity().used == 0
        successor = await manager.create_vm()
        assert successor.record.slot == vm.record.slot
        assert not holds(vm), "the slot is another's now"
        assert holds(successor)


@pytest.mark.parametrize("who", ["qemu", "runner"])
async def test_B4_the_slot_is_free_at_the_instant_of_the_vms_death(
    limit_two: Settings, who: str
) -> None:
    async with VmManager(limit_two) as manager:
        vm = await manager.create_vm()
        record = (await manager.get_vm(vm.vm_id)).record
        victim = getattr(record, who)
        os.kill(victim.pid, signal.SIGKILL)
        took = await until(lambda: not holds(vm), 5)
        print(f"the slot was free {1000 * took:.0f} ms after the SIGKILL of the {who}")
        assert manager.capacity().used == 0
        assert await asyncio.wait_for(vm.wait_ended(), 5) is not None
        assert not vm.alive


# --- B5: a creation that fails half-way -----------------------------------------------

COULD_NOT_START = (VmBootError, VmGuestError, TemplateError)


def a_qemu_that(host: VmHost, does: str) -> str:
    """A QEMU that does this instead of running a VM; else it is the real one."""
    path = host.directory / "qemu"
    real = shutil.which(host.settings().qemu)
    path.write_text(
        f"#!/bin/bash\nREAL={real}\n"
        f'case "$*" in *vmkernel-vm-*) {does};; *) exec $REAL "$@";; esac\n'
    )
    path.chmod(0o755)
    return str(path)


@asynccontextmanager
async def nothing_lost(host: VmHost, settings: Settings) -> AsyncIterator[VmManager]:
    """A manager; afterwards slots, processes, sockets and record are as before."""
    async with VmManager(settings) as manager:
        before = manager.capacity()
        yield manager
        # A QEMU that dies with its runner does so a moment after it
        await until(lambda: manager.capacity() == before, 1)
        assert host.left() == []
        assert await manager.list_vms() == []


async def test_B5_no_room_for_the_scratch_disk(host: VmHost) -> None:
    if os.geteuid() != 0:
        missing("only root can mount a small file system")
    place = host.directory / "full"
    place.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", place], check=True)
    try:
        (place / "templates").symlink_to(host.settings().cache_dir / "templates")
        with suppress(OSError), (place / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        async with nothing_lost(host, host.settings(VMKERNEL_CACHE_DIR=str(place))) as manager:
            with pytest.raises(VmOverlayError, match="No space left on device") as caught:
                await manager.create_vm()
            assert caught.value.code_ran == "no"
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("echo no such flag >&2; exit 1", "no such flag"),
        ("exec sleep 600", "within 2 s"),
        ('exec timeout --foreground -s KILL 0.05 $REAL "$@"', "VM|QEMU"),
    ],
    ids=["ends", "hangs", "dies"],
)
async def test_B5_a_qemu_that_does_not_boot(host: VmHost, does: str, says: str) -> None:
    settings = host.settings(VMKERNEL_QEMU=a_qemu_that(host, does), VMKERNEL_START_TIMEOUT="2")
    async with nothing_lost(host, settings) as manager:
        with pytest.raises(VmError, match=says) as caught:
            await manager.create_vm()
        assert isinstance(caught.value, COULD_NOT_START)
        assert caught.value.code_ran == "no"


def runner_of(qemu: int) -> int:
    process = processes.identify(qemu)
    assert process is not None
    runner = running.owner(process)
    assert runner is not None
    return runner.pid


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("whom", ["qemu", "runner"])
async def test_B5_killed_or_stopped_while_it_wakes(
    host: VmHost, how: signal.Signals, whom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_start, "SILENCE", 3.0)  # of a runner, else half a minute
    async with nothing_lost(host, host.settings(VMKERNEL_START_TIMEOUT="3")) as manager:
        creating = asyncio.create_task(manager.create_vm())
        qemus: list[int] = []  # of one look: a process that becomes another is unseen for a moment
        await until(lambda: qemus.extend(host.qemus()) or qemus)
        qemu = qemus[0]
        victim = qemu if whom == "qemu" else runner_of(qemu)
        os.kill(victim, how)
        with pytest.raises(VmError) as caught:
            await asyncio.wait_for(creating, 60)
        print(f"{type(caught.value).__name__}: {caught.value}")
        assert isinstance(caught.value, COULD_NOT_START)
        assert caught.value.code_ran == "no"


async def test_B5_cancelled_at_random_moments(host: VmHost, rounds: Callable[..., int]) -> None:
    chance = random.Random(5)
    count = rounds(quick=12, full=200)
    late = 0
    async with nothing_lost(host, host.settings(VMKERNEL_MAX_CONCURRENT_VMS="2")) as manager:
        for _ in range(count):
            creating = asyncio.create_task(manager.create_vm())
            await asyncio.sleep(chance.random() * 0.7)
            creating.cancel()
            await asyncio.wait([creating])
            if not creating.cancelled():
                late += 1
                await manager.destroy_vm(creating.result())
            assert manager.capacity() == (2, 0, 2, 0)
            assert host.qemus() == []
            assert await manager.list_vms() == []
    print(f"{count} creations were cancelled, {late} of them too late")
    assert late < count


@pytest.mark.parametrize("warm", [None, 0, 1])
async def test_B5_cancelled_in_the_very_moment_in_which_it_went_well(
    host: VmHost, monkeypatch: pytest.MonkeyPatch, warm: int | None
) -> None:
    """The moment has no length: the start has its result, and its caller has not heard of it."""
    usual = runner_start.start_vm
    callers: list[asyncio.Task[object]] = []
    started: list[str] = []

    async def start_vm(*arguments: Any) -> VmHandle:
        vm = await usual(*arguments)
        if callers:
            started.append(vm.vm_id)
            asyncio.get_running_loop().call_soon(callers[0].cancel)
        return vm

    monkeypatch.setattr(runner_start, "start_vm", start_vm)
    settings = config(host, max_concurrent_vms=2, warm_pool_size=warm or 0)
    async with Scheduler(settings) as scheduler, VmManager(settings.settings) as manager:
        await scheduler.wait_warm()
        before = manager.capacity().used
        if warm is None:
            callers.append(asyncio.create_task(manager.create_vm()))
        else:  # of another kind than the pool's members
            callers.append(asyncio.create_task(scheduler.run("1", lifetime=500.0)))
        await asyncio.wait(callers)
        assert callers[0].cancelled()
        assert len(started) == 1
        await until(lambda: manager.capacity().used == before, 2)
        known = [status.record.vm_id for status in await manager.list_vms(ended=True)]
        assert started[0] not in known


# --- B6: twice ------------------------------------------------------------------------


async def test_B6_destroying_twice_or_from_two_tasks_gives_back_one_slot(host: VmHost) -> None:
    settings = host.settings(VMKERNEL_MAX_CONCURRENT_VMS="3")
    async with VmManager(settings) as manager, VmManager(settings) as other:
        first, second = await manager.create_vm(), await manager.create_vm()
        used: set[int] = set()
        end = threading.Event()

        def watch() -> None:
            while not end.is_set():
                used.add(host.slots().used)

        watching = threading.Thread(target=watch)
        watching.start()
        ends = await asyncio.gather(
            manager.destroy_vm(first),
            manager.destroy_vm(first),
            other.destroy_vm(first.vm_id),
            return_exceptions=True,
        )
        await manager.destroy_vm(first)
        end.set()
        watching.join()
        assert ends[:2] == [None, None]
        # By its id, the other one may come when it is off the record already
        assert ends[2] is None or isinstance(ends[2], VmNotFoundError)
        assert used == {1, 2}
        assert holds(second)
        assert not holds(first)
        assert manager.capacity() == (3, 1, 2, 0)


# --- B7: one-shot runs ----------------------------------------------------------------


async def test_B7_twenty_runs_at_limit_two_with_a_warm_pool_of_one(host: VmHost) -> None:
    began = time.monotonic()
    with Sampler(host) as sampler:
        async with Scheduler(config(host, max_concurrent_vms=2, warm_pool_size=1)) as scheduler:
            results = await asyncio.gather(
                *(
                    scheduler.run(code=f"print('ok {number}')", language=Language.PYTHON)
                    for number in range(20)
                )
            )
    print(
        f"20 runs in {time.monotonic() - began:.1f} s, {len(sampler.seen)} VMs, "
        f"at most {sampler.most} at once in {sampler.samples} samples"
    )
    assert [result.stdout for result in results] == [f"ok {number}\n" for number in range(20)]
    assert all(result.ok for result in results)
    assert len({result.vm_id for result in results}) == 20, "each in a VM of its own"
    assert sampler.most == 2
    assert sampler.samples > 200
    assert host.slots() == (host.settings().max_concurrent_vms, 0, host.slots().free, 0)


# --- B8: no drift ---------------------------------------------------------------------


async def test_B8_after_thirty_cycles_the_count_of_free_slots_is_what_it_was(
    limit_two: Settings, host: VmHost
) -> None:
    files = len(os.listdir("/proc/self/fd"))
    async with VmManager(limit_two) as manager:
        before = manager.capacity()
        for _ in range(15):  # two at a time, for there are two processors
            pair = await asyncio.gather(manager.create_vm(), manager.create_vm())
            assert manager.capacity().used == 2
            await asyncio.gather(*map(manager.destroy_vm, pair))
            assert manager.capacity() == before
        assert before == (2, 0, 2, 0)
        assert len(await manager.list_vms()) == 0
        assert not (host.state_dir / "logs").exists() or not os.listdir(host.state_dir / "logs")
    assert len(os.listdir("/proc/self/fd")) <= files + 4, "no descriptor for each VM"


# --- B10: one piece of code -----------------------------------------------------------


async def test_B10_a_run_is_in_a_fresh_vm_and_tagged_in_record_and_logs(
    host: VmHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vmkernel")
    for warm in (0, 1):
        async with Scheduler(config(host, warm_pool_size=warm)) as scheduler:
            await scheduler.wait_warm()
            caplog.clear()
            running = asyncio.create_task(
                scheduler.run(
                    "import time\nx = 1\nprint('ok')\ntime.sleep(1)\n6 * 7",
                    language=Language.PYTHON,
                    tenant_id="tenant-7",
                    task_id=f"task-{warm}",
                )
            )
            async with VmManager(scheduler.config.settings) as manager:
                tagged = []
                while not tagged and not running.done():
                    tagged = [
                        status.record
                        for status in await manager.list_vms()
                        if status.record.task_id == f"task-{warm}"
                    ]
                    await asyncio.sleep(0.01)
                result = await running
                assert [record.tenant_id for record in tagged] == ["tenant-7"]
                assert tagged[0].vm_id == result.vm_id
                assert result.stdout == "ok\n"
                assert result.results == [{"text/plain": "42"}]
                assert result.duration >= 1
                second = await scheduler.run("x")
            assert second.error is not None
            assert second.error.name == "NameError"
            assert second.vm_id != result.vm_id
            assert scheduler.statistics().from_pool >= warm
        words = [record.getMessage() for record in caplog.records]
        assert any(
            result.vm_id in word and "tenant-7" in word and f"task-{warm}" in word for word in words
        ), words


# --- B11: warm pool -------------------------------------------------------------------


async def members(scheduler: Scheduler) -> list[VmRecord]:
    async with VmManager(scheduler.config.settings) as manager:
        return [status.record for status in await manager.list_vms()]


async def test_B11_a_request_takes_a_member_at_once_and_the_pool_fills_again(
    host: VmHost,
) -> None:
    async with Scheduler(config(host, warm_pool_size=2)) as scheduler:
        await scheduler.wait_warm()
        ready = {record.vm_id for record in await members(scheduler)}
        assert len(ready) == 2
        assert host.slots().used == 2, "they count against the capacity"
        began = time.monotonic()
        result = await scheduler.run("6 * 7")
        warm = time.monotonic() - began
        assert result.vm_id in ready
        await scheduler.wait_warm()
        assert len(await members(scheduler)) == 2
        began = time.monotonic()
        fresh = await scheduler.run("6 * 7", idle_timeout=500.0)  # the pool has no such VM
        print(f"from the pool {warm:.2f} s, without it {time.monotonic() - began:.2f} s")
        assert fresh.vm_id not in ready
        assert fresh.results == result.results == [{"text/plain": "42"}]
        assert warm < time.monotonic() - began
        assert scheduler.statistics().from_pool == 1
    assert host.slots().used == 0


@pytest.mark.parametrize("who", ["qemu", "runner"])
async def test_B11_a_dead_member_is_replaced_and_never_handed_out(host: VmHost, who: str) -> None:
    async with Scheduler(config(host, warm_pool_size=1)) as scheduler:
        for at_once in (True, False):
            await scheduler.wait_warm()
            (dead,) = await members(scheduler)
            os.kill(getattr(dead, f"{who}_pid"), signal.SIGKILL)
            if not at_once:
                await until(lambda: scheduler.statistics().warm == 0)
                await scheduler.wait_warm()
            result = await scheduler.run("6 * 7")
            assert result.vm_id != dead.vm_id
            assert result.results == [{"text/plain": "42"}]


async def test_B11_a_member_that_hangs_is_replaced(
    host: VmHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "PING_SECONDS", 0.5)
    async with Scheduler(config(host, warm_pool_size=1)) as scheduler:
        await scheduler.wait_warm()
        (stopped,) = await members(scheduler)
        os.kill(stopped.qemu_pid, signal.SIGSTOP)
        result = await scheduler.run("6 * 7")
        assert result.vm_id != stopped.vm_id
        await until(lambda: not Path(f"/proc/{stopped.qemu_pid}").exists())


async def test_B11_members_yield_their_slots_to_another_process_that_waits(host: VmHost) -> None:
    with Sampler(host) as sampler:
        settings = config(host, max_concurrent_vms=2, warm_pool_size=2)
        async with Scheduler(settings) as scheduler:
            await scheduler.wait_warm()
            process = start_process(host, ONE_VM, "21", VMKERNEL_MAX_CONCURRENT_VMS="2")
            out, errors = await asyncio.to_thread(process.communicate, timeout=60)
            assert out == "42\n", errors
            await scheduler.wait_warm()
            assert len(sampler.seen) == 4, "two, the other's, and one in the place of what yielded"
    assert sampler.most == 2


async def test_B11_a_request_of_another_kind_gets_a_yielded_slot(host: VmHost) -> None:
    settings = config(host, max_concurrent_vms=1, warm_pool_size=1)
    async with Scheduler(settings) as scheduler:
        await scheduler.wait_warm()
        (member,) = await members(scheduler)
        result = await scheduler.run("6 * 7", idle_timeout=500.0, queue_timeout=30)
        assert result.vm_id != member.vm_id
        assert result.results == [{"text/plain": "42"}]
        assert scheduler.statistics().from_pool == 0


async def test_B11_members_age_out_and_are_replaced(host: VmHost) -> None:
    async with Scheduler(config(host, warm_pool_size=1, max_idle=0.5)) as scheduler:
        seen: set[str] = set()
        async with asyncio.timeout(60):
            while len(seen) < 3:
                seen |= {record.vm_id for record in await members(scheduler)}
                await asyncio.sleep(0.05)
        result = await scheduler.run("6 * 7")
        assert result.results == [{"text/plain": "42"}]
