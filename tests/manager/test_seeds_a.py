"""SEEDS, part A: one VM, its start, run and stop.  Tests for each row, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from seeds import (
    Racers,
    destroy_on,
    fake_qemu,
    identity,
    kept_on,
    kept_vm,
    living,
    nothing_is_left,
    runners,
)
from vmhost import VmHost, seconds_until
from vmkernel import (
    TemplateError,
    VmAlreadyStartingError,
    VmBootError,
    VmCapacityError,
    VmError,
    VmGuestError,
    VmManager,
    VmNotFoundError,
    VmState,
)
from vmkernel.host import processes, reaper, running
from vmkernel.host.registry import Registry, vms_dir
from vmkernel.host.startlock import StartLock

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PROMISED = 1.0
"""Seconds within which the death of a process is noticed."""


# --- A1: two processes per VM ---


async def test_A1_the_record_matches_the_process_table(host: VmHost) -> None:
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm(tenant_id="t", task_id="1")
        (status,) = await manager.list_vms()
        runner, qemu = identity(status.record.runner), identity(status.record.qemu)
        assert host.qemus() == [qemu.pid]
        assert runners(host) == [runner.pid]
        assert running.owner(qemu) == runner
        assert psutil.Process(runner.pid).ppid() == os.getpid()
        assert os.getsid(runner.pid) == runner.pid
        boot = psutil.boot_time()
        ticks = os.sysconf("SC_CLK_TCK")
        for process in (runner, qemu):
            began = psutil.Process(process.pid).create_time()
            assert abs(boot + process.start_time / ticks - began) < 0.1
        assert status.record.boot_id == processes.boot_id()
        assert status.state is VmState.RUNNING
        assert (status.record.tenant_id, status.record.task_id) == ("t", "1")
        assert [held.slot for held in manager_slots(manager)] == [status.record.slot]
        assert (await vm.run("print(6 * 7)")).stdout == "42\n"


def manager_slots(manager: VmManager) -> list[Any]:
    from vmkernel.host.start import shared_slots

    return shared_slots(manager.settings).holders()


async def test_A1_a_notebooks_runner_is_the_wrapper_kernel_itself(host: VmHost) -> None:
    from vmhost import RunningVm

    async with RunningVm(host.settings()):
        with Registry(host.settings()) as record:
            (status,) = record.list()
        assert status.record.runner == processes.identify_self()
        assert running.owner(identity(status.record.qemu)) == processes.identify_self()
        assert runners(host) == []


@pytest.mark.parametrize("victim", ["qemu", "runner", "both"])
async def test_A1_sigkill_of_either_is_noticed(host: VmHost, victim: str) -> None:
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm()
        record = (await manager.list_vms())[0].record
        for name in ("qemu", "runner"):
            if victim in (name, "both"):
                os.kill(identity(getattr(record, name)).pid, signal.SIGKILL)
        killed = time.monotonic()
        error = await asyncio.wait_for(vm.wait_ended(), 10)
        assert time.monotonic() - killed < PROMISED
        assert isinstance(error, VmGuestError)
        assert vm.state is VmState.FAILED
        assert not vm.alive
        with pytest.raises(VmGuestError):
            await vm.run("1")
        assert seconds_until(lambda: not living(host), 10) < PROMISED
        assert not vm.holds_semaphore_slot
        reaper.sweep(host.settings())
        (status,) = await manager.list_vms(ended=True)
        assert status.record.state is VmState.FAILED
        assert status.record.exit_cause
        assert status.record.ended
    await nothing_is_left(host)


async def test_A1_a_recycled_pid_is_never_taken_for_the_old_one(host: VmHost) -> None:
    """The record names our VM's pids, with the start times of processes that are no more."""
    settings = host.settings()
    async with VmManager(settings) as manager:
        vm = await manager.create_vm()
        record = (await manager.list_vms())[0].record
        runner, qemu = identity(record.runner), identity(record.qemu)
        with Registry(settings) as registry:
            other = registry.new(
                state=VmState.RUNNING,
                runner_pid=runner.pid,
                runner_start=runner.start_time - 1,
                qemu_pid=qemu.pid,
                qemu_start=qemu.start_time - 1,
            )
            assert registry.status(other.vm_id)[1:] == (False, False)
        assert reaper.sweep(settings) == [other.vm_id]
        assert (await vm.run("print('on')")).stdout == "on\n"


async def test_A1_after_a_restart_of_the_host_a_kept_vm_starts_again(host: VmHost) -> None:
    settings = host.settings()
    async with VmManager(settings) as manager:
        vm_id = await kept_vm(manager)
        me = processes.identify_self()
        with Registry(settings) as registry:  # it ran, and somebody has its pids by now
            registry.update(vm_id, state=VmState.STARTING)
            registry.update(
                vm_id,
                state=VmState.RUNNING,
                boot_id="the boot before",
                runner_pid=me.pid,
                runner_start=me.start_time,
                qemu_pid=me.pid,
                qemu_start=me.start_time,
            )
        (status,) = await manager.list_vms()
        assert status.state is VmState.FAILED
        seen: set[VmState] = set()
        starting = asyncio.create_task(manager.start_vm(vm_id))
        while not starting.done():
            seen |= {status.state for status in await manager.list_vms()}
            await asyncio.sleep(0.005)
        vm = await starting
        assert VmState.STARTING in seen
        assert (await vm.run("print('on')")).stdout == "on\n"
        (status,) = await manager.list_vms()
        assert status.state is VmState.RUNNING
        assert status.record.boot_id == processes.boot_id()
        await manager.destroy_vm(vm)
    await nothing_is_left(host)


# --- A2: the order of checks on start ---


async def test_A2_step_1_the_vm_exists(host: VmHost) -> None:
    settings = host.settings()
    async with VmManager(settings) as manager:
        # Whoever would look at lock, capacity or QEMU first would tell of those.
        broken = {"VMKERNEL_QEMU": "/no/such/qemu", "VMKERNEL_MAX_CONCURRENT_VMS": "1"}
        with StartLock.take(settings, "vm-00000001"):
            async with VmManager(host.settings(**broken)) as other:
                with pytest.raises(VmNotFoundError, match="vm-00000001"):
                    await other.start_vm("vm-00000001")
        assert runners(host) == []
        assert manager.capacity().used == 0


async def test_A2_step_2_its_start_lock_is_taken(host: VmHost) -> None:
    settings = host.settings(VMKERNEL_MAX_CONCURRENT_VMS="1")
    async with VmManager(settings) as manager:
        stopped = await kept_vm(manager)
        await manager.create_vm()  # the one slot there is
        with StartLock.take(settings, stopped):
            with pytest.raises(VmAlreadyStartingError, match=rf"{stopped}.*pid {os.getpid()}"):
                await manager.start_vm(stopped, timeout=0)
            assert manager.capacity().waiting == 0


async def test_A2_step_3_capacity_is_taken(host: VmHost) -> None:
    settings = host.settings(VMKERNEL_MAX_CONCURRENT_VMS="1")
    async with VmManager(settings) as manager:
        stopped = await kept_vm(manager)
        await manager.update_vm(stopped, qemu="/no/such/qemu")  # not looked at before
        first = await manager.create_vm()
        with pytest.raises(VmCapacityError, match=rf"max_concurrent_vms is 1; .*{first.vm_id}"):
            await manager.start_vm(stopped, timeout=0.2)
        assert len(runners(host)) == 1
        assert StartLock.holder(settings, stopped) is None
        await manager.destroy_vm(first)
        with pytest.raises(VmBootError, match="no program '/no/such/qemu'"):
            await manager.start_vm(stopped, timeout=0.2)
    await nothing_is_left(host)


@pytest.mark.parametrize(
    ("step", "kind", "says"),
    [
        ("the runner starts", VmBootError, r"the runner of vm-\w+ could not be started"),
        ("QEMU starts", VmBootError, r"no program '/no/such/qemu'"),
        ("QEMU is alive", VmBootError, r"QEMU ended with status 3\s+it was too hot"),
        ("the guest has answered", VmGuestError, r"did not|no answer|not ready|answer"),
        ("the sockets are ready", VmError, r"the VM's socket could not be made"),
    ],
)
async def test_A2_steps_4_to_8(
    host: VmHost, tmp_path: Path, step: str, kind: type[VmError], says: str
) -> None:
    """Each step of the runner has its own error, and leaves nothing."""
    changes: dict[str, Any] = {}
    logs, vms = host.state_dir / "logs", vms_dir(host.settings())
    if step == "the runner starts":
        logs.touch()  # a file where its log's directory belongs
    elif step == "QEMU starts":
        changes["qemu"] = "/no/such/qemu"
    elif step == "QEMU is alive":
        changes["qemu"] = fake_qemu(tmp_path, "echo it was too hot >&2; exit 3")
    elif step == "the guest has answered":
        changes |= {"qemu": fake_qemu(tmp_path, 'exec "$REAL" "$@" -S'), "start_timeout": 2.0}
    else:
        host.runtime_dir.mkdir(mode=0o700, exist_ok=True)
        vms.touch()  # a file where the socket's directory belongs
    async with VmManager(host.settings()) as manager:
        with pytest.raises(VmError, match=says) as caught:
            await manager.create_vm(**changes)
        assert type(caught.value) is kind
        assert caught.value.hint
        for path in (logs, vms):
            if path.is_file():
                path.unlink()
        await nothing_is_left(host)
        assert (await (await manager.create_vm()).run("print(1)")).ok, "the way is free again"


# --- A3 ---


@pytest.mark.parametrize("word", ["vm-12345678", "no-such-name", "vm-", ""])
async def test_A3_a_vm_that_does_not_exist_is_not_found(host: VmHost, word: str) -> None:
    settings = host.settings()
    async with VmManager(settings) as manager:
        with contextlib.ExitStack() as stack:
            if word == "vm-12345678":  # not even when somebody holds a lock of that number
                stack.enter_context(StartLock.take(settings, word))
            for act in (manager.start_vm, manager.stop_vm, manager.destroy_vm, manager.get_vm):
                with pytest.raises(VmNotFoundError, match="no VM") as caught:
                    await act(word)
                assert not isinstance(caught.value, VmAlreadyStartingError)
                assert "being started" not in str(caught.value)


# --- A4: the start lock ---


@pytest.mark.timeout(3000)
def test_A4_of_sixteen_processes_that_start_one_vm_exactly_one_wins(
    host: VmHost, rounds: Callable[..., int]
) -> None:
    count = rounds(quick=10, full=100)
    settings = host.settings()
    racing = """
        try:
            handle = await manager.start_vm(words[0])
            say("won", handle.record.runner_pid)
        except VmStateError as error:
            say(type(error).__name__, error)
        """
    stopping = "await manager.stop_vm(words[0]); say('stopped')"
    vm_id = asyncio.run(kept_on(host))
    lock_file = settings.runtime_dir / "starts"
    inode = lock_file.stat().st_ino
    kinds: dict[str, int] = {}
    began = time.monotonic()
    with Racers(host, 16, race=racing, stop=stopping) as racers:
        for _ in range(count):
            said = racers.do("race", vm_id)
            winners = [number for number, (what, *_) in enumerate(said) if what == "won"]
            assert len(winners) == 1, said
            for what, *text in said:
                kinds[what] = kinds.get(what, 0) + 1
                if what == "VmAlreadyStartingError":
                    assert vm_id in text[0]
                    assert " pid " in text[0]
                elif what != "won":  # it came when all was over
                    assert what == "VmStateError"
                    assert f"{vm_id} is running" in text[0]
            assert len(runners(host)) == len(host.qemus()) == host.slots().used == 1
            assert StartLock.holder(settings, vm_id) is None, "the lock is free after the start"
            assert racers.do("stop", vm_id, only=winners[0]) == [["stopped"]]
            assert host.left() == []
    print(f"{count} rounds of 16 processes in {time.monotonic() - began:.0f} s: {kinds}")
    assert kinds["won"] == count
    assert kinds["VmAlreadyStartingError"] > 10 * count, "most of them came while it started"
    assert lock_file.stat().st_ino == inode, "the lock's file is never unlinked"


async def test_A4_the_lock_is_free_after_a_start_that_went_badly(
    host: VmHost, tmp_path: Path
) -> None:
    settings = host.settings()
    async with VmManager(settings) as manager:
        vm_id = await kept_vm(manager)
        await manager.update_vm(vm_id, qemu=fake_qemu(tmp_path, "exit 3"))
        for _ in range(2):
            with pytest.raises(VmBootError):
                await manager.start_vm(vm_id)
            assert StartLock.holder(settings, vm_id) is None
        await manager.update_vm(vm_id, qemu=settings.qemu)
        starting = asyncio.create_task(manager.start_vm(vm_id))
        while StartLock.holder(settings, vm_id) is None:
            await asyncio.sleep(0.001)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert StartLock.holder(settings, vm_id) is None
        vm = await manager.start_vm(vm_id)
        assert (await vm.run("print(1)")).ok
        await manager.destroy_vm(vm)
    await nothing_is_left(host)


def test_A4_the_lock_is_free_when_its_holder_died(host: VmHost, rounds: Callable[..., int]) -> None:
    """At any moment of the start: the starter dies, and with it the runner of what is not up."""
    settings = host.settings()
    vm_id = asyncio.run(kept_on(host))
    chance = random.Random(4)
    for _ in range(rounds(quick=4, full=30)):
        with Racers(host, 1, race="await manager.start_vm(words[0])") as racer:
            racer.ask("race", vm_id)
            assert seconds_until(lambda: StartLock.holder(settings, vm_id) is not None, 10) < 10
            time.sleep(chance.uniform(0, 0.4))
            racer.kill()
        held = seconds_until(lambda: StartLock.holder(settings, vm_id) is None, 10)
        assert held < PROMISED, "kept by nobody"
        if _state(host, vm_id) is VmState.RUNNING:  # it is to be kept, and was up
            asyncio.run(_stop(host, vm_id))
        assert seconds_until(lambda: not living(host), 10) < 2 * PROMISED

    async def start_again() -> None:
        async with VmManager(settings) as manager:
            vm = await manager.start_vm(vm_id)
            assert (await vm.run("print(1)")).ok
            await manager.destroy_vm(vm)

    asyncio.run(start_again())
    asyncio.run(nothing_is_left(host))


def _state(host: VmHost, vm_id: str) -> VmState:
    with Registry(host.settings()) as record:
        return record.status(vm_id).state


async def _stop(host: VmHost, vm_id: str) -> None:
    async with VmManager(host.settings()) as manager:
        await manager.stop_vm(vm_id)


# --- A5 ---


def test_A5_the_runner_has_the_right_vm_and_database_from_anywhere(
    host: VmHost, tmp_path: Path
) -> None:
    """A working directory that is full of traps and then gone, an environment that lies."""
    trap = tmp_path / "trap"
    for name in ("vmkernel", "msgspec", "asyncio", "sqlite3"):
        (trap / name).mkdir(parents=True)
        (trap / name / "__init__.py").write_text("raise SystemExit('trapped')")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(host.state_dir)
    code = f"""
import asyncio, json, os, shutil, sys
from pathlib import Path
from vmkernel import VmManager
from vmkernel.settings import load_settings
settings = load_settings()
os.environ.update(
    PYTHONPATH={str(trap)!r}, PYTHONHOME="/nowhere", PYTHONSTARTUP={str(trap)!r},
    VMKERNEL_STATE_DIR={str(tmp_path / "other")!r}, VMKERNEL_RUNTIME_DIR={str(tmp_path)!r},
    VMKERNEL_DATABASE_FILE={str(tmp_path / "other" / "x.sqlite")!r}, VMKERNEL_MEMORY="wrong",
    VMKERNEL_QEMU="/no/such/qemu", LD_PRELOAD="",
)
os.chdir({str(trap)!r})
shutil.rmtree({str(trap)!r}) if sys.argv[1] == "gone" else None

async def main():
    async with VmManager(settings) as manager:
        vm = await manager.create_vm(keep=True)
        (status,) = await manager.list_vms()
        pid = status.record.runner_pid
        words = Path(f"/proc/{{pid}}/cmdline").read_text().split("\\0")
        environ = Path(f"/proc/{{pid}}/environ").read_text().split("\\0")
        print(json.dumps([vm.vm_id, words, environ, os.readlink(f"/proc/{{pid}}/cwd"),
                          (await vm.run("print(6 * 7)")).stdout]))
asyncio.run(main())
"""
    for how in ("there", "gone"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, how],
            env={
                **os.environ,
                **host.env,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "VMKERNEL_DATABASE_FILE": str(tmp_path / "link" / "vms.sqlite"),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr

        vm_id, words, environ, cwd, stdout = json.loads(done.stdout)
        assert stdout == "42\n"
        assert vm_id in words
        assert str(host.state_dir / "vms.sqlite") in words, "resolved, so the same for all"
        assert cwd == "/"
        names = {line.partition("=")[0] for line in environ}
        assert not [name for name in names if name.startswith(("VMKERNEL_", "PYTHON"))]
        with Registry(host.settings()) as record:
            assert record.get(vm_id).state is VmState.RUNNING
        asyncio.run(destroy_on(host, vm_id))
    assert list((tmp_path / "other").iterdir()) == []


# --- A6, A7, A8: a start that fails ---


async def test_A6_a_bad_flag_is_told_with_qemus_own_words(host: VmHost, tmp_path: Path) -> None:
    qemu = fake_qemu(tmp_path, 'exec "$REAL" "$@" -no-such-flag')
    async with VmManager(host.settings()) as manager:
        with pytest.raises(VmBootError) as caught:
            await manager.create_vm(qemu=qemu)
        error = caught.value
        assert "-no-such-flag: invalid option" in str(error)
        assert "QEMU ended with status 1" in str(error)
        assert error.log_path is not None
        assert "-no-such-flag: invalid option" in error.log_path.read_text()
        (status,) = await manager.list_vms(ended=True)
        assert status.record.state is VmState.FAILED
        assert status.record.exit_cause in str(error)
        assert Path(status.record.log_dir) == error.log_path.parent
    await nothing_is_left(host)


async def test_A6_a_guest_that_panics_is_told_with_its_console(host: VmHost) -> None:
    """With too little memory for its initial RAM disk."""
    async with VmManager(host.settings()) as manager:
        with pytest.raises(VmBootError) as caught:
            await manager.create_vm(memory=73)
        error = caught.value
        assert "The guest did not boot" in str(error)
        assert "The guest's console ends with:" in str(error)
        assert "Kernel panic - not syncing: " in str(error)
        assert error.log_path is not None
        assert error.log_path.is_file()
        assert "VMKERNEL_MEMORY" in error.hint
    await nothing_is_left(host)


async def test_A6_a_runner_that_dies_is_told_with_its_own_words(
    host: VmHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "run_vm.py"
    program.write_text("import sys; sys.exit('the runner stumbled')")
    monkeypatch.setattr("vmkernel.host.client._PROGRAM", program)
    async with VmManager(host.settings()) as manager:
        with pytest.raises(VmBootError) as caught:
            await manager.create_vm()
        assert "(status 1)" in str(caught.value)
        assert "the runner stumbled" in str(caught.value)
        assert caught.value.log_path is not None
        assert caught.value.log_path.name == "runner.log"
        assert "the runner stumbled" in caught.value.log_path.read_text()
    await nothing_is_left(host)


@pytest.mark.parametrize(
    "fault",
    [
        "exit 3",
        "kill -9 $$",
        # A guest is awake a tenth of a second after this
        '(sleep 0.02; kill -9 $$) & exec "$REAL" "$@"',
        '(sleep 0.05; kill -9 $$) & exec "$REAL" "$@"',
    ],
)
async def test_A7_a_qemu_that_dies_right_after_start_is_told_at_once(
    host: VmHost, tmp_path: Path, fault: str
) -> None:
    async with VmManager(host.settings(VMKERNEL_START_TIMEOUT="60")) as manager:
        began = time.monotonic()
        with pytest.raises(VmError, match=r"QEMU (ended|was ended)") as caught:
            await manager.create_vm(qemu=fake_qemu(tmp_path, fault))
        took = time.monotonic() - began
        print(f"{fault!r}: told after {took:.2f} s: {caught.value.message!r}")
        assert took < 5, "long before the 60 s of the time-out"
        assert isinstance(caught.value, VmBootError | VmGuestError | TemplateError)
        assert caught.value.code_ran == "no"
    await nothing_is_left(host)


@pytest.mark.parametrize(
    "fault",
    [
        "exec sleep 1000",  # it never speaks
        'exec "$REAL" "$@" -S',  # it loads, and the guest stands still
        'exec "$REAL" "$@" -S < /dev/null > /dev/null 2>&1',
    ],
)
async def test_A8_a_guest_that_never_gets_ready_is_killed_after_the_time_out(
    host: VmHost, tmp_path: Path, fault: str
) -> None:
    async with VmManager(host.settings(VMKERNEL_START_TIMEOUT="2")) as manager:
        began = time.monotonic()
        with pytest.raises((VmBootError, VmGuestError)) as caught:
            await manager.create_vm(qemu=fake_qemu(tmp_path, fault))
        assert 2 <= time.monotonic() - began < 8
        assert caught.value.hint
        assert runners(host) == []
        assert host.qemus() == []
        assert manager.capacity().used == 0
    await nothing_is_left(host)
