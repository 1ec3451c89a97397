"""What a review of the manager found: rare turns of events that it must be right in.

Each class is named for what goes wrong around the manager: its process, its names, its runner.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmhost import VmHost, seconds_until
from vmkernel import (
    SettingsError,
    VmBootError,
    VmGuestError,
    VmHandle,
    VmManager,
    VmNotFoundError,
    VmState,
)
from vmkernel.host import client, wire
from vmkernel.host.client import Connection
from vmkernel.host.landing import aside
from vmkernel.host.processes import is_alive
from vmkernel.host.registry import Registry
from vmkernel.host.startlock import StartLock
from vmkernel.protocol import messages

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("template"), pytest.mark.timeout(120)]


def status_line(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.split()[1]
    raise KeyError(name)


class TestProcesses:
    async def test_the_runner_of_a_kept_vm_leaves_no_zombie(self, host: VmHost) -> None:
        async with VmManager(host.settings()) as manager:
            vm = await manager.create_vm(keep=True)
        runner = vm.record.runner
        assert runner is not None
        assert vm.state is VmState.RUNNING  # let go of, and not ended
        async with VmManager(host.settings()) as manager:
            await manager.destroy_vm(vm.vm_id)
        assert vm.state is VmState.STOPPED
        for _ in range(200):
            if not Path(f"/proc/{runner.pid}").exists():
                break
            await asyncio.sleep(0.02)
        assert not Path(f"/proc/{runner.pid}").exists()
        assert client._forgotten == []

    def test_nor_when_the_event_loop_was_over_before(self, host: VmHost) -> None:
        async def start() -> VmHandle:
            async with VmManager(host.settings()) as manager:
                return await manager.create_vm(keep=True)

        async def destroy(vm: VmHandle) -> None:
            async with VmManager(host.settings()) as manager:
                await manager.destroy_vm(vm.vm_id)
                await manager.destroy_vm(await manager.create_vm())  # a start looks after them

        vm = asyncio.run(start())
        assert vm.state is VmState.RUNNING
        asyncio.run(destroy(vm))
        assert not Path(f"/proc/{vm.record.runner_pid}").exists()
        assert client._forgotten == []

    def test_a_vm_ends_with_its_creator_even_when_a_fork_has_its_socket(self, host: VmHost) -> None:
        code = """
import asyncio, os, time
from vmkernel import VmManager
async def main():
    vm = await VmManager().create_vm()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(vm.record.runner_pid, child, flush=True)
    os._exit(0)
asyncio.run(main())
"""
        done = _first_line(code, host)
        runner, child = map(int, done.split())
        try:
            assert seconds_until(lambda: not Path(f"/proc/{runner}").exists(), 20) < 20
        finally:
            os.kill(child, signal.SIGKILL)

    async def test_sigchld_ignored_here_hides_no_end(self, manager: VmManager) -> None:
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            vm = await manager.create_vm()
            (found,) = await manager.list_vms()
            os.kill(found.record.qemu_pid, signal.SIGKILL)
            error = await asyncio.wait_for(vm.wait_ended(), 20)
            assert "signal 9" in str(error)
            await manager.destroy_vm(vm)
        finally:
            signal.signal(signal.SIGCHLD, before)

    async def test_no_room_for_a_runners_socket_is_said_as_such(
        self, manager: VmManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(socket, "socketpair", full)
        with pytest.raises(VmBootError, match="Too many open files"):
            await manager.create_vm()
        assert manager.capacity().used == 0


def _first_line(code: str, host: VmHost) -> str:
    """What a program prints first; its children may live on and hold its stdout."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **host.env},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
    assert process.wait(60) == 0
    return line


class TestNames:
    @pytest.mark.parametrize(
        ("word", "problem"),
        [
            ("vm-1a2b3c4d", "looks like the id"),
            ("vm-", "looks like the id"),
            ("a\x1b[2Jb", "cannot be shown"),
            ("two\nlines", "cannot be shown"),
            ("\ud800", "cannot be shown"),
            ("x" * 65, "65 characters"),
            (7, "no text"),
        ],
    )
    async def test_a_name_that_cannot_be(self, manager: VmManager, word: str, problem: str) -> None:
        with pytest.raises(SettingsError, match=problem):
            await manager.create_vm(name=word)
        assert await manager.list_vms(ended=True) == []

    async def test_the_other_words_are_looked_at_too(self, manager: VmManager) -> None:
        with pytest.raises(SettingsError, match="tenant_id"):
            await manager.create_vm_nowait(tenant_id="a\tb")
        with pytest.raises(SettingsError, match="task_id"):
            await manager.create_vm(task_id="a" * 257)
        assert manager.capacity().used == 0

    async def test_an_id_is_never_another_vms_name(self, host: VmHost, vm: VmHandle) -> None:
        async with VmManager(host.settings()) as other:
            with pytest.raises(SettingsError):
                await other.update_vm(vm.vm_id, name="vm-00000000")
            # A record of an older version may have such a name
            with Registry(host.settings()) as registry:
                registry.update(vm.vm_id, name="vm-00000000")
                for look in (registry.get, registry.status, registry.exactly):
                    with pytest.raises(VmNotFoundError):
                        look("vm-00000000")
            gone = await other.create_vm()
            await other.destroy_vm(gone)
            await other.update_vm(vm.vm_id, name="plain name, é")
            await other.destroy_vm(gone)  # again is harmless
            assert (await other.get_vm("plain name, é")).alive


class TestOtherPlaces:
    """Two managers with one record, and other places for everything else."""

    async def test_the_slot_is_looked_for_in_the_vms_own_file(
        self, host: VmHost, vm: VmHandle
    ) -> None:
        settings = host.settings(VMKERNEL_SEMAPHORE_FILE=str(host.directory / "other-slots"))
        async with VmManager(settings) as other:
            found = await other.get_vm(vm.vm_id)
            assert found.holds_semaphore_slot
            await found.close()
        assert vm.alive

    async def test_a_clean_up_takes_the_vms_own_start_lock(self, host: VmHost) -> None:
        elsewhere = host.settings(VMKERNEL_RUNTIME_DIR=str(host.directory / "run2"))
        async with VmManager(elsewhere) as manager:
            vm = await manager.create_vm(keep=True)
            os.kill(vm.record.runner_pid, signal.SIGKILL)
            directory = Path(vm.record.directory)
            assert seconds_until(lambda: not is_alive(vm.record.runner), 10) < 10
            with Registry(host.settings()) as registry:
                with StartLock.take(elsewhere, vm.vm_id):  # as who starts it again would
                    await asyncio.to_thread(_sweep, host)
                    assert registry.exactly(vm.vm_id).state is VmState.RUNNING
                await asyncio.to_thread(_sweep, host)
                assert registry.exactly(vm.vm_id).state is VmState.FAILED
            assert not directory.exists()
            await manager.destroy_vm(vm.vm_id)


def _sweep(host: VmHost) -> None:
    from vmkernel.host.reaper import sweep

    sweep(host.settings())


class TestRunner:
    async def test_more_connections_than_a_busy_runner_can_queue(
        self, vm: VmHandle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        place = tmp_path / "control.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
            listener.listen(0)
            monkeypatch.setattr(client, "BUSY_SECONDS", 0.2)
            first = await Connection.reach(tmp_path)
            with pytest.raises(VmGuestError, match="too many wait for it"):
                await Connection.reach(tmp_path)
            monkeypatch.setattr(client, "BUSY_SECONDS", 5.0)
            second = asyncio.ensure_future(Connection.reach(tmp_path))
            await asyncio.sleep(0.1)
            assert not second.done()
            accepted = listener.accept()[0]
            (await second).close()
            first.close()
            accepted.close()

    async def test_clients_of_a_runner_that_stands_still_are_all_served(self, vm: VmHandle) -> None:
        os.kill(vm.record.runner_pid, signal.SIGSTOP)
        try:  # not by get_vm(): what stands still may have the record locked
            place = Path(vm.record.directory)
            connections = await asyncio.gather(*[Connection.reach(place) for _ in range(150)])
        finally:
            os.kill(vm.record.runner_pid, signal.SIGCONT)
        ask = wire.Ask(messages.Stats(), 20)
        await asyncio.gather(*[connection.call(ask) for connection in connections[::10]])
        assert all(connection.connected for connection in connections)
        for connection in connections:
            connection.close()

    async def test_a_message_that_grows_without_end_is_left_out_and_no_more(
        self, vm: VmHandle
    ) -> None:
        soft, _ = resource.prlimit(vm.record.runner_pid, resource.RLIMIT_DATA)
        assert soft == 1 << 30
        code = (  # 35 MB as JSON, above 1 GiB as objects
            "from IPython.display import display\n"
            "display({'application/json': [{'': 0}] * 5_000_000}, raw=True)\n"
            "print('after')"
        )
        result = await asyncio.wait_for(vm.run(code), 60)
        assert "display_data was left out: a message whose values would take" in result.stderr
        assert result.stdout == "after\n"
        assert result.results == []
        assert (await vm.run("print(1)")).stdout == "1\n"

    async def test_a_vm_that_ended_by_itself_is_no_burden(self, manager: VmManager) -> None:
        vm = await manager.create_vm()
        with contextlib.suppress(VmGuestError):
            await vm.run("import time; time.sleep(60)", timeout=0.5)
        for _ in range(200):
            if not manager._created:
                break
            await asyncio.sleep(0.02)
        assert manager._created == {}
        (found,) = await manager.list_vms(ended=True)
        assert (found.record.vm_id, found.state) == (vm.vm_id, VmState.FAILED)
        await manager.destroy_vm(vm)
        assert await manager.list_vms(ended=True) == []


async def test_a_manager_shows_itself_when_it_cannot_count(host: VmHost, tmp_path: Path) -> None:
    async with VmManager(host.settings(VMKERNEL_SEMAPHORE_FILE=str(tmp_path))) as manager:
        assert str(tmp_path) in repr(manager)


async def test_a_start_waits_for_a_clean_up_and_leaves_the_event_loop_alone(host: VmHost) -> None:
    with StartLock.take(host.settings(), "vm-00000001", cleaning=True):
        waiting = asyncio.ensure_future(StartLock.take_beside(host.settings(), "vm-00000001"))
        began = time.monotonic()
        await asyncio.sleep(0.1)
        assert time.monotonic() - began < 0.5
        assert not waiting.done()
    (await waiting).release()


async def test_a_thread_keeps_its_descriptor_however_often_it_is_cancelled() -> None:
    done = []

    def work() -> None:
        time.sleep(0.5)
        done.append(True)

    task = asyncio.ensure_future(aside(work))
    for _ in range(3):
        await asyncio.sleep(0.05)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done
