"""The limit on VMs, seen from notebooks: who waits is told so, is served in turn, and can leave."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator

import pytest
from kernel_client import Cell, Kernel

from vmhost import Sampler, VmHost, seconds_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

FIVE = 5
LIMIT = 2
QUEUE = ["next in line, 2 of 2 in use", "1 kernel ahead", "2 kernels ahead"]


def places(cell: Cell) -> list[str]:
    """The places in the queue that the cell has shown, each once."""
    found = re.findall(r"waiting for a VM slot: ([^\r\n]*?) *(?=[\r\n]|$)", cell.stderr)
    return list(dict.fromkeys(found))


def test_five_kernels_share_two_vms_in_turn(spec: str, host: VmHost) -> None:
    env = {**host.env, "VMKERNEL_MAX_CONCURRENT_VMS": str(LIMIT)}
    with Sampler(host) as sampler:
        kernels = [Kernel(spec, env=env, ready=False) for _ in range(FIVE)]
        running = dict(enumerate(kernels))
        try:
            for kernel in kernels:
                kernel.wait_ready()
            cells = [kernel.send(f"print({number})") for number, kernel in running.items()]

            def take() -> None:
                for number in list(running):
                    running[number].take(0.002)

            def waiters() -> list[int]:
                return [number for number in running if not cells[number].done]

            def shown() -> set[str]:
                return {places(cells[number])[-1] for number in waiters() if places(cells[number])}

            deadline = time.monotonic() + 120
            while len(waiters()) > FIVE - LIMIT or shown() != set(QUEUE):
                assert time.monotonic() < deadline, cells
                take()
            queue = sorted(waiters(), key=lambda number: QUEUE.index(places(cells[number])[-1]))

            served = []
            for _ in range(FIVE):
                done = [number for number in running if cells[number].done]
                waiting = waiters()
                running.pop(done[0]).shut_down()  # and its slot is the next one's
                while waiting and waiters() == waiting:
                    assert time.monotonic() < deadline, cells
                    take()
                served += [number for number in waiting if cells[number].done]
        finally:
            for kernel in running.values():
                kernel.shut_down()

    assert sampler.most == LIMIT
    assert len(sampler.seen) == FIVE
    assert sampler.samples > 100
    assert served == queue
    for number, cell in enumerate(cells):
        assert cell.status == "ok"
        assert cell.stdout == f"{number}\n"
        if number in queue:  # what it waited for is gone again from its output
            assert cell.types.index("clear_output") > cell.types.index("stream")
            assert cell.types[-1] == "stream"
    assert host.records() == []


class TestOneSlot:
    """A limit of one, and a kernel that holds it."""

    @pytest.fixture
    def env(self, host: VmHost) -> dict[str, str]:
        return {**host.env, "VMKERNEL_MAX_CONCURRENT_VMS": "1"}

    @pytest.fixture
    def holder(self, spec: str, env: dict[str, str]) -> Iterator[Kernel]:
        holder = Kernel(spec, env=env)
        holder.run("")
        yield holder
        if holder.manager.is_alive():
            holder.shut_down()

    @pytest.fixture
    def waiter(self, spec: str, env: dict[str, str], holder: Kernel) -> Iterator[Kernel]:
        waiter = Kernel(spec, env=env)
        yield waiter
        if waiter.manager.is_alive():
            waiter.shut_down()

    def test_an_interrupt_releases_a_waiter_for_good_or_until_its_next_cell(
        self, waiter: Kernel, holder: Kernel, host: VmHost
    ) -> None:
        ways = {
            "message": waiter.interrupt,
            "signal": lambda: os.kill(waiter.pid, signal.SIGINT),
        }
        for interrupt in ways.values():
            cell = waiter.send("print('ran')")
            waiter.wait(lambda cell=cell: places(cell), "its place in the queue")
            assert host.slots().waiting == 1
            began = time.monotonic()
            interrupt()
            waiter.finish(cell)
            assert time.monotonic() - began < 2
            assert cell.error["ename"] == "KeyboardInterrupt"
            assert "the cell did not run" in cell.error["evalue"]
            assert cell.stdout == ""
            assert host.slots().waiting == 0
            assert len(host.records()) == 1, "the holder's"
        # What is asked by an editor must not wait for ever either.
        assert waiter.request("complete_request", {"code": "pri", "cursor_pos": 3}).status == "ok"

        cell = waiter.send("6 * 7")
        waiter.wait(lambda: places(cell), "its place in the queue")
        holder.shut_down()
        assert waiter.finish(cell).result == "42"

    def test_an_interrupted_wait_leaves_no_other_request_without_an_end(
        self, waiter: Kernel
    ) -> None:
        asked = waiter.ask("create_subshell_request", channel="control")
        cell = waiter.send("print('ran')")
        waiter.wait(lambda: places(cell), "its place in the queue")
        assert not asked.done
        waiter.interrupt()
        assert waiter.finish(cell).error["ename"] == "KeyboardInterrupt"
        assert "interrupted" in waiter.finish(asked, 30).reply["evalue"]

    def test_shutdown_releases_a_waiter(self, waiter: Kernel, holder: Kernel, host: VmHost) -> None:
        cell = waiter.send("print('ran')")
        waiter.wait(lambda: places(cell), "its place in the queue")
        began = time.monotonic()
        waiter.shut_down()
        assert time.monotonic() - began < 4
        assert host.slots().waiting == 0
        assert holder.run("6 * 7").result == "42"

    def test_a_killed_waiter_is_out_of_the_queue_at_once(
        self, spec: str, env: dict[str, str], waiter: Kernel, holder: Kernel, host: VmHost
    ) -> None:
        second = Kernel(spec, env=env)
        try:
            assert seconds_until(lambda: host.slots().waiting == 2, 30) < 30
            cell = second.send("6 * 7")
            second.wait(lambda: "1 kernel ahead" in places(cell), "its place in the queue")
            os.kill(waiter.pid, signal.SIGKILL)
            second.wait(lambda: places(cell)[-1].startswith("next in line"), "the first place")
            os.kill(holder.pid, signal.SIGKILL)
            assert second.finish(cell).result == "42"
        finally:
            second.shut_down()

    def test_a_time_limit_ends_the_wait_with_all_that_one_needs_to_know(
        self, spec: str, env: dict[str, str], holder: Kernel, host: VmHost
    ) -> None:
        (record,) = host.records()
        waiter = Kernel(spec, env={**env, "VMKERNEL_QUEUE_TIMEOUT": "1.5"})
        try:
            cell = waiter.run("print('ran')")
            assert cell.status == "error"
            assert cell.stdout == ""
            assert cell.error["ename"] == "VmCapacityError"
            said = cell.error["evalue"]
            assert "max_concurrent_vms is 1" in said
            assert record in said
            assert "place in the queue: 1" in said
            assert re.search(r"What to do:.*`vmkernel ps`.*max_concurrent_vms", cell.traceback)
            # It stays a kernel: it answers, and gets its VM when there is room.
            assert waiter.request("kernel_info_request").status == "ok"
            assert waiter.run("").error["ename"] == "VmCapacityError"
            holder.shut_down()
            assert waiter.run("6 * 7").result == "42"
        finally:
            waiter.shut_down()

    def test_a_wait_that_ended_before_anyone_asked_is_no_answer_to_who_asks_later(
        self, spec: str, env: dict[str, str], holder: Kernel, host: VmHost
    ) -> None:
        waiter = Kernel(spec, env={**env, "VMKERNEL_QUEUE_TIMEOUT": "0.5"})
        try:
            time.sleep(1.5)
            assert seconds_until(lambda: host.slots().waiting == 0, 30) < 30
            holder.shut_down()
            time.sleep(2.5)
            assert waiter.run("6 * 7").result == "42"
        finally:
            waiter.shut_down()
