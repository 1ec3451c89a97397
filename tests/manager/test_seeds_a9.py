"""SEEDS A9, A10 and B9: what happens to a VM at once, what is left, and SIGKILL at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from seeds import (
    Racers,
    destroy_on,
    fake_qemu,
    identity,
    kept_on,
    kept_vm,
    nothing_is_left,
    runners,
)
from vmhost import VmHost, seconds_until
from vmkernel import (
    RegistryError,
    VmAlreadyStartingError,
    VmBootError,
    VmCapacityError,
    VmError,
    VmGuestError,
    VmHandle,
    VmManager,
    VmState,
    VmStateError,
)
from vmkernel.host import processes, reaper
from vmkernel.host.registry import Registry, vm_dir, vms_dir

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PROMISED = 1.0
"""Seconds within which the death of a process is noticed."""


# --- A9: concurrency ---


def test_A9_config_updates(host: VmHost) -> None:
    """Eight processes change different things of one VM at once: nothing of it is lost."""
    vm_id = asyncio.run(kept_on(host))
    changing = """
        number, vm_id = int(words[0]), words[1]
        name = ["max_output", "console_log_size", "start_timeout", "queue_timeout", "lifetime",
                "boot_timeout", "tenant_id", "task_id"][number]
        for value in range(1, 26):
            await manager.update_vm(vm_id, **{name: str(value) if number > 5 else value})
        say("done")
        """
    with Racers(host, 8, change=changing) as racers:
        assert racers.do("change", vm_id, numbered=True) == [["done"]] * 8

    async def look() -> None:
        async with VmManager(host.settings()) as manager:
            record = (await manager.list_vms(ended=True))[0].record
            assert (record.tenant_id, record.task_id) == ("25", "25")
            vm = await manager.start_vm(vm_id)
            found = json.loads(vm.record.settings)
            for name in ("max_output", "console_log_size", "start_timeout", "lifetime"):
                assert float(found[name]) == 25, name
            with pytest.raises(VmStateError, match="cannot be changed now"):
                await manager.update_vm(vm_id, memory=1024)
            assert (await manager.update_vm(vm_id, tenant_id="other")).tenant_id == "other"
            await manager.destroy_vm(vm)

    asyncio.run(look())


async def test_A9_delete_while_starting(host: VmHost, rounds: Callable[..., int]) -> None:
    """At any moment of its start, by another manager: it is gone, and its starter is told."""
    chance = random.Random(9)
    told: dict[str, int] = {}
    async with VmManager(host.settings()) as manager, VmManager(host.settings()) as other:
        for _ in range(rounds(quick=8, full=60)):
            before = {status.record.vm_id for status in await other.list_vms(ended=True)}
            starting = asyncio.create_task(manager.create_vm())
            while not (new := {s.record.vm_id for s in await other.list_vms()} - before):
                await asyncio.sleep(0.001)
            (vm_id,) = new
            await asyncio.sleep(chance.uniform(0, 0.6))
            await asyncio.wait_for(other.destroy_vm(vm_id), 30)
            try:
                vm = await asyncio.wait_for(starting, 30)
                what = "started before"
                assert await asyncio.wait_for(vm.wait_ended(), 10) is None
            except VmError as error:
                what = type(error).__name__ if error.hint else f"no hint: {error}"
            told[what] = told.get(what, 0) + 1
            assert vm_id not in {s.record.vm_id for s in await other.list_vms()}
            assert host.qemus() == []
            assert manager.capacity().used == 0
            assert seconds_until(lambda: not runners(host), 5) < PROMISED, "it has but to exit"
    print(f"what starters were told: {told}")
    assert not [what for what in told if what.startswith(("VmBoot", "no hint"))], told
    await nothing_is_left(host)


async def test_A9_many_control_commands_at_once(host: VmHost, tmp_path: Path) -> None:
    """From several connections, while code runs and writes."""
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm()
        async with VmManager(host.settings()) as other:
            handles = [vm, *[await other.get_vm(vm.vm_id) for _ in range(3)]]
            running = asyncio.create_task(vm.run("for n in range(1000): print(n, flush=True)"))
            commands: list[Awaitable[Any]] = []
            for number in range(6):
                for handle in handles:
                    commands += [handle.statistics(), handle.ping(30)]
                commands.append(handles[number % 4].put(b"x" * number, f"file-{number}"))
            answers = await asyncio.wait_for(asyncio.gather(*commands), 60)
            assert len(answers) == 6 * 9
            result = await asyncio.wait_for(running, 60)
            assert result.stdout == "".join(f"{n}\n" for n in range(1000))
            sizes = [len(await handles[1].read_file(f"file-{n}")) for n in range(6)]
            assert sizes == list(range(6))
            for handle in handles[1:]:
                await handle.close()
        assert (await vm.run("print('on')")).stdout == "on\n", "others that leave end nothing"


async def test_A9_snapshot_while_stopping(host: VmHost, tmp_path: Path) -> None:
    """What is asked of a VM that stops is answered or refused, soon: never a hang.

    There are no snapshots yet; files and statistics go the way that they will go.
    """
    chance = random.Random(5)
    kinds: dict[str, int] = {}
    async with VmManager(host.settings()) as manager, VmManager(host.settings()) as second:
        for number in range(4):
            vm = await manager.create_vm()
            await vm.put(os.urandom(2 << 20), "data")
            other = await second.get_vm(vm.vm_id)

            async def ask(way: Callable[[], Awaitable[Any]]) -> str:
                await asyncio.sleep(chance.uniform(0, 0.5))
                try:
                    await way()
                    return "answered"
                except VmError as error:
                    return type(error).__name__ if error.hint else f"no hint: {error}"

            def get(number: int = number, vm: VmHandle = vm) -> Awaitable[int]:
                return vm.get("data", tmp_path / f"{number}-{chance.random()}")

            asking = [
                asyncio.create_task(ask(way))
                for way in (vm.statistics, vm.ping, get, other.statistics, get, vm.statistics) * 3
            ]
            await asyncio.sleep(chance.uniform(0, 0.6))
            await manager.stop_vm(vm)
            for what in await asyncio.wait_for(asyncio.gather(*asking), 10):
                kinds[what] = kinds.get(what, 0) + 1
            assert vm.state is VmState.STOPPED
            with pytest.raises(VmGuestError):
                await vm.statistics()
    print(kinds)
    assert set(kinds) <= {"answered", "VmGuestError"}, kinds
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size != 2 << 20], (
        "a file is there whole or not at all"
    )
    await nothing_is_left(host)


async def test_A9_same_vm_starts(host: VmHost) -> None:
    """Eight tasks of one process, and four of another manager's."""
    async with VmManager(host.settings()) as manager, VmManager(host.settings()) as other:
        vm_id = await kept_vm(manager)
        starts = [manager.start_vm(vm_id) for _ in range(8)] + [
            other.start_vm(vm_id) for _ in range(4)
        ]
        results = await asyncio.wait_for(asyncio.gather(*starts, return_exceptions=True), 60)
        (vm,) = [result for result in results if isinstance(result, VmHandle)]
        for error in results:
            assert error is vm or isinstance(error, VmAlreadyStartingError), repr(error)
        assert len(runners(host)) == len(host.qemus()) == manager.capacity().used == 1
        assert (await vm.run("print(1)")).ok
        with pytest.raises(VmStateError, match=f"{vm_id} is running"):
            await other.start_vm(vm_id)
        await manager.destroy_vm(vm_id)


async def test_A9_fifty_rapid_start_stop_cycles(host: VmHost, rounds: Callable[..., int]) -> None:
    count = rounds(quick=8, full=50)
    descriptors = 0
    async with VmManager(host.settings()) as manager:
        vm_id = await kept_vm(manager)
        began = time.monotonic()
        for number in range(count):
            vm = await manager.start_vm(vm_id)
            assert vm.state is VmState.RUNNING
            assert vm.holds_semaphore_slot
            if number % 5 == 0:
                assert (await vm.run(f"print({number})")).stdout == f"{number}\n"
            await manager.stop_vm(vm)
            assert vm.state is VmState.STOPPED
            assert not vm.holds_semaphore_slot
            assert host.left() == []
            assert runners(host) == []
            (status,) = await manager.list_vms(ended=True)
            assert status.record.state is VmState.STOPPED
            now = len(os.listdir("/proc/self/fd"))
            descriptors = descriptors or now
            assert now <= descriptors + 2, "a cycle leaves no descriptor open"
        took = time.monotonic() - began
        print(f"{count} start/stop cycles: {took:.1f} s, {took / count:.2f} s each")
        await manager.destroy_vm(vm_id)
    await nothing_is_left(host)


async def test_A9_database_locked_by_another_process(host: VmHost) -> None:
    """Waited for within the bound, then told; a VM that runs is not touched by it."""
    settings = host.settings(VMKERNEL_DATABASE_TIMEOUT="1")
    async with VmManager(settings) as manager:
        vm = await manager.create_vm()
        stopped = await kept_vm(manager)
        hold = (
            "import sqlite3, sys\n"
            "database = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "database.execute('BEGIN IMMEDIATE'); print('locked', flush=True); sys.stdin.read()"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", hold, str(settings.database_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"locked\n"
            for act in (
                manager.create_vm,
                lambda: manager.start_vm(stopped),
                lambda: manager.update_vm(stopped, tenant_id="x"),
            ):
                began = time.monotonic()
                with pytest.raises(RegistryError, match=rf"locked by pid {holder.pid}") as caught:
                    await act()
                assert 1 <= time.monotonic() - began < 8
                assert "VMKERNEL_DATABASE_TIMEOUT" in caught.value.hint
                assert str(settings.database_file) in str(caught.value)
            assert (await vm.run("print('on')")).stdout == "on\n"
            assert len(await manager.list_vms()) == 1, "who only looks does not wait"
        finally:
            holder.kill()
            holder.communicate()
        assert len(runners(host)) == len(host.qemus()) == manager.capacity().used == 1
        again = await manager.start_vm(stopped)
        assert (await again.run("print('on')")).stdout == "on\n"
        await manager.destroy_vm(again)
    await nothing_is_left(host)


async def test_A9_start_during_clean_up_of_the_same_vm(
    host: VmHost, rounds: Callable[..., int]
) -> None:
    """Its runner was killed; three processes sweep while it is started again."""
    settings = host.settings()
    sweeping = "from vmkernel.host.reaper import sweep; say(*sweep(manager.settings))"
    with Racers(host, 3, sweep=sweeping) as racers:
        async with VmManager(settings) as manager:
            vm_id = (await manager.create_vm(keep=True)).vm_id
            for number in range(rounds(quick=6, full=40)):
                record = (await manager.list_vms())[0].record
                runner = identity(record.runner)
                os.kill(runner.pid, signal.SIGKILL)
                assert seconds_until(lambda r=runner: not processes.is_alive(r), 5) < PROMISED
                if number % 2:
                    await asyncio.sleep(0.02)
                racers.ask("sweep")
                vm = await asyncio.wait_for(manager.start_vm(vm_id), 30)
                racers.answers()
                assert (await vm.run("print('on')")).stdout == "on\n"
                assert stat.S_ISSOCK((vm_dir(settings, vm_id) / "control.sock").stat().st_mode)
                (status,) = await manager.list_vms()
                assert status.state is VmState.RUNNING
                assert (status.record.exit_cause, status.record.ended) == ("", None)
                assert runners(host) == [status.record.runner_pid]
                assert host.qemus() == [status.record.qemu_pid]
            await manager.destroy_vm(vm_id)
    await nothing_is_left(host)


# --- A10 ---


async def test_A10_a_busy_life_leaves_no_lock_socket_process_or_file(
    host: VmHost, tmp_path: Path
) -> None:
    """What the whole session must not leave is checked at its end (tests/leftovers.py)."""
    settings = host.settings(VMKERNEL_MAX_CONCURRENT_VMS="3")
    before = {entry.name for entry in Path(settings.cache_dir).iterdir()}
    async with VmManager(settings) as manager:
        vms = [await manager.create_vm(name=name) for name in ("", "one", "two")]
        with pytest.raises(VmCapacityError):
            await manager.create_vm(timeout=0.1)
        await manager.destroy_vm(vms[0])
        with pytest.raises(VmBootError):
            await manager.create_vm(qemu=fake_qemu(tmp_path, "exit 1"))
        kept = await manager.create_vm(keep=True)
        os.kill(kept.record.qemu_pid, signal.SIGKILL)
        await kept.wait_ended()
        await manager.destroy_vm(kept)
        os.kill(vms[1].record.runner_pid, signal.SIGKILL)
    reaper.sweep(settings)
    await nothing_is_left(host)
    furniture = {path.name for path in settings.runtime_dir.iterdir()}
    assert furniture <= {"slots", "slots.boots", "starts", vms_dir(settings).name}
    for path in settings.runtime_dir.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                from vmkernel.host.locks import all_locks

                assert all_locks(file.fileno(), 0, 2**62) == [], path
    after = {entry.name for entry in Path(settings.cache_dir).iterdir()}
    assert not [name for name in after - before if name.startswith("scratch-")]
    assert list(host.directory.rglob("*.sock")) == []
    with contextlib.closing(sqlite3.connect(settings.database_file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match=r"."):
        probe.connect(str(vm_dir(settings, vms[2].vm_id) / "control.sock"))


# --- B9 ---


@pytest.mark.timeout(3000)
def test_B9_sigkill_at_random_moments_leaves_slots_record_and_directories_true(
    host: VmHost, rounds: Callable[..., int]
) -> None:
    """On the runner, QEMU, both, or the starter too; while it starts, runs, or stops."""
    settings = host.settings()
    count = rounds(quick=15, full=200)
    chance = random.Random(20_26)
    life = """
        try:
            async with VmManager(manager.settings) as own:
                vm = await own.create_vm(keep=words[0] == "keep")
                await vm.run("while True: pass", timeout=0.4)
        except VmError:
            pass
        """
    victims: dict[str, int] = {}
    began = time.monotonic()
    number = 0
    while number < count:
        who = chance.choice(["runner", "qemu", "both", "starter", "all"])
        with Racers(host, 1, live=life) as racer:
            racer.ask("live", chance.choice(["keep", ""]))
            assert seconds_until(lambda: bool(runners(host)), 30) < 30
            time.sleep(chance.uniform(0, 0.8))
            pids = {"runner": runners(host), "qemu": host.qemus(), "starter": [racer.pid]}
            pids["both"] = pids["runner"] + pids["qemu"]
            pids["all"] = pids["both"] + pids["starter"]
            for pid in chance.sample(pids[who], len(pids[who])):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            hit = who if pids["both"] and pids[who] else "too late, not counted"
            victims[hit] = victims.get(hit, 0) + 1
            number += hit == who
            # The slot is free as soon as QEMU is dead, with no clean-up by anyone.
            gone = seconds_until(lambda: not host.qemus(), 10)
            if who != "starter":
                assert gone < 2 * PROMISED, f"round {number}: {who}"
            free = seconds_until(lambda: not host.slots().used or bool(runners(host)), 5)
            assert free < PROMISED, f"round {number}: {who}"
            racer.kill()
        for vm_id in _alive(host):  # a kept one whose starter alone was killed lives on, rightly
            asyncio.run(destroy_on(host, vm_id))
        assert seconds_until(lambda: not runners(host), 10) < 5, f"round {number}: {who}"
        reaper.sweep(settings)
        assert host.slots().used == host.slots().waiting == 0, f"round {number}: {who}"
        assert host.records() == [], f"round {number}: {who}"
        assert host.left() == [], f"round {number}: {who}"
        with Registry(settings) as record:
            for status in record.list(ended=True):
                assert status.record.state in (VmState.FAILED, VmState.STOPPED)
                assert status.record.exit_cause, status.record
                assert status.record.ended
    took = time.monotonic() - began
    print(f"{count} rounds in {took:.0f} s; killed: {victims}")
    asyncio.run(nothing_is_left(host))


def _alive(host: VmHost) -> list[str]:
    with Registry(host.settings()) as record:
        return [status.record.vm_id for status in record.list() if status.runner_alive]
