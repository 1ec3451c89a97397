"""The lifetime and the idle time-out of a manager's VMs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from vmhost import VmHost
from vmkernel import VmExpiredError, VmHandle, VmManager, VmState

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]


async def test_an_idle_vm_is_ended_and_work_keeps_it(host: VmHost, tmp_path: Path) -> None:
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm(idle_timeout=1.5)
        began = time.monotonic()
        assert (await vm.run("import time; time.sleep(2); print(1)")).stdout == "1\n"
        for _ in range(4):  # files are work, too
            await asyncio.sleep(0.5)
            await vm.put(b"1", "a")
            await vm.ping()
        assert vm.alive
        worked = time.monotonic()
        async with asyncio.timeout(10):
            error = await vm.wait_ended()
        assert time.monotonic() - worked < 5
        assert time.monotonic() - began > 5
        assert isinstance(error, VmExpiredError)
        assert "after 1.5 s without work (idle_timeout)" in str(error)
        assert not vm.holds_semaphore_slot
        assert vm.state is VmState.STOPPED
        with pytest.raises(VmExpiredError, match="idle_timeout"):
            await vm.run("1")


async def test_asking_how_it_is_keeps_no_vm_alive(host: VmHost) -> None:
    async def ask(vm: VmHandle) -> None:
        while True:
            await vm.statistics()
            await asyncio.sleep(0.2)

    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm(idle_timeout=1)
        with pytest.raises(VmExpiredError):
            await asyncio.wait_for(ask(vm), 10)


async def test_the_end_of_its_lifetime_ends_what_runs(host: VmHost) -> None:
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm(lifetime=3, keep=True, name="short")
        out: list[str] = []
        with pytest.raises(VmExpiredError, match="lifetime of 3 s was over") as caught:
            await vm.run(
                "print('begun')\nwhile True: pass",
                on_output=lambda output: out.append(output.content["text"]),
            )
        assert out == ["begun\n"]
        assert caught.value.code_ran == "unknown"
        assert "VMKERNEL_LIFETIME" in caught.value.hint
        (status,) = [one for one in await manager.list_vms(ended=True) if one.record.name]
        assert status.state is VmState.STOPPED
        assert "lifetime" in status.record.exit_cause
        again = await manager.start_vm("short")
        assert (await again.run("print(2)")).stdout == "2\n"
        await manager.destroy_vm(again)
