"""What is left when something is killed, and what the user is told: wrapper and QEMU die together.

Everything is real: wrapper kernels, VMs, SIGKILL and SIGSTOP.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kernel_client import Kernel

from vmhost import VmHost, seconds_until
from vmkernel.host.reaper import sweep

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

ROUNDS = 15
PROMISED = 1.0
"""Seconds within which the end of the wrapper or of QEMU has had its effect."""


@pytest.fixture
def kernel(spec: str, host: VmHost) -> Iterator[Kernel]:
    """A kernel on a host of its own."""
    kernel = Kernel(spec, env=host.env)
    yield kernel
    end(kernel)


@pytest.fixture(scope="module")
def shared(spec: str, module_host: VmHost) -> Iterator[Kernel]:
    """A kernel whose VM may be killed: it gets another one."""
    kernel = Kernel(spec, env=module_host.env)
    yield kernel
    end(kernel)


def end(kernel: Kernel) -> None:
    """Shut down, or, where nobody is there to be asked, tidy up."""
    kernel.close()
    kernel.manager.shutdown_kernel(now=not kernel.manager.is_alive())


def only_qemu(host: VmHost) -> psutil.Process:
    """The process of the host's one VM."""
    (pid,) = host.qemus()
    return psutil.Process(pid)


class TestWrapperKilled:
    def test_nothing_of_its_vm_outlives_it_by_a_second(self, kernel: Kernel, host: VmHost) -> None:
        assert kernel.run("print('up')").stdout == "up\n"
        assert len(host.qemus()) == host.slots().used == 1

        os.kill(kernel.pid, signal.SIGKILL)

        assert seconds_until(lambda: not host.left(), 10) < PROMISED

    def test_the_next_start_sweeps_its_record(
        self, kernel: Kernel, host: VmHost, spec: str
    ) -> None:
        kernel.run("")
        (record,) = host.records()
        os.kill(kernel.pid, signal.SIGKILL)
        seconds_until(lambda: not host.left(), 10)

        following = Kernel(spec, env=host.env)
        try:
            assert following.run("6 * 7").result == "42"
            # Beside the first cell, which does not wait for it
            assert seconds_until(lambda: record not in host.records(), 10) < PROMISED
            assert len(host.records()) == 1
        finally:
            end(following)
        assert host.records() == []

    def test_at_any_moment_of_its_start(self, host: VmHost, tmp_path: Path) -> None:
        """Before QEMU is spawned, in the instant of it, while the guest wakes, and after."""
        usual = _start_and_kill(host, tmp_path / "kernel-0.json", lambda: bool(host.qemus()), 0.8)
        chance = random.Random(20_24)
        for number in range(1, ROUNDS + 1):
            connection_file = tmp_path / f"kernel-{number}.json"
            if number % 3:  # anywhere
                moment, seen = chance.uniform(0, 2 * usual + 0.5), None
            else:  # just when QEMU begins
                moment, seen = chance.uniform(0, 0.05), lambda: bool(host.qemus())
            _start_and_kill(host, connection_file, seen, moment)
            gone = seconds_until(lambda: not host.left(), 10)
            assert gone < PROMISED, f"round {number}, killed {moment:.3f} s after {seen}"
        sweep(host.settings())
        assert host.records() == []
        assert host.slots().free == host.slots().limit
        scratch = [path for path in host.cache_dir.iterdir() if path.name.startswith("scratch-")]
        assert not scratch


def _start_and_kill(host: VmHost, connection_file: Path, seen: object, moment: float) -> float:
    """Start a wrapper, wait for ``seen`` and then ``moment`` seconds, and kill it.

    Returns how long it took until ``seen``.
    """
    from jupyter_client.connect import write_connection_file

    write_connection_file(str(connection_file), ip="127.0.0.1", transport="tcp")
    wrapper = subprocess.Popen(
        [sys.executable, "-m", "vmkernel", "-f", str(connection_file)],
        env={**os.environ, **host.env},
        start_new_session=True,
    )
    try:
        took = seconds_until(seen, 120) if seen else 0.0
        time.sleep(moment)
    finally:
        wrapper.kill()
        wrapper.wait()
    return took


class TestQemuKilled:
    def test_a_running_cell_ends_at_once_and_says_what_is_lost(
        self, shared: Kernel, module_host: VmHost
    ) -> None:
        cell = shared.send("kept = 41; import time; print('on', flush=True); time.sleep(300)")
        shared.wait_output(cell, "on")

        killed = time.monotonic()
        only_qemu(module_host).kill()
        shared.finish(cell)

        assert time.monotonic() - killed < PROMISED
        assert cell.status == "error"
        assert cell.error["ename"] == "VmGuestError"
        assert "The VM died and its state is lost" in cell.error["evalue"]
        assert "What to do:" in cell.traceback
        assert log_path_in(cell.traceback).exists()

        following = shared.run("'kept' in globals()")
        assert following.result == "False"
        assert "this cell runs in a new VM" in following.stderr
        assert "vmkernel:" not in shared.run("1").stderr, "news are told once"

    def test_cells_queued_behind_the_lost_one_do_not_run(
        self, shared: Kernel, module_host: VmHost
    ) -> None:
        cell = shared.send("import time; print('on', flush=True); time.sleep(300)")
        queued = [shared.send("open('ran', 'w')") for _ in range(2)]
        shared.wait_output(cell, "on")
        only_qemu(module_host).kill()
        for each in (cell, *queued):
            shared.finish(each)
        assert [each.status for each in (cell, *queued)] == ["error", "aborted", "aborted"]
        assert shared.run("import os; os.path.exists('ran')").result == "False"

    def test_an_idle_vm_is_replaced_and_the_next_cell_says_so(
        self, shared: Kernel, module_host: VmHost
    ) -> None:
        shared.run("kept = 1; import socket")
        name = shared.run("socket.gethostname()").result
        only_qemu(module_host).kill()
        time.sleep(0.3)

        following = shared.run("'kept' in globals()")
        assert following.result == "False"
        assert "The VM died and its state is lost" in following.stderr
        assert "This cell runs in a new VM" in following.stderr
        assert shared.run("import socket; socket.gethostname()").result != name

    def test_a_cell_sent_in_the_instant_of_death_is_run_or_refused_never_lost(
        self, shared: Kernel, module_host: VmHost
    ) -> None:
        for pause in (0.0, 0.0005, 0.001, 0.002, 0.004, 0.01):
            shared.run("")
            only_qemu(module_host).kill()
            time.sleep(pause)
            cell = shared.run("6 * 7")
            if cell.status == "ok":
                assert cell.result == "42"
                assert "state is lost" in cell.stderr
            else:
                assert "The VM died and its state is lost" in cell.error["evalue"]
        assert shared.run("6 * 7").result == "42"

    def test_while_it_starts_it_costs_one_cell_at_most(
        self, spec: str, module_host: VmHost
    ) -> None:
        before = set(module_host.qemus())
        for pause in (0.0, 0.1, 0.3):
            kernel = Kernel(spec, env=module_host.env, ready=False)
            try:
                assert seconds_until(lambda: set(module_host.qemus()) - before, 60) < 60
                time.sleep(pause)
                (pid,) = set(module_host.qemus()) - before
                psutil.Process(pid).kill()
                kernel.wait_ready()
                cell = kernel.run("6 * 7")
                if cell.status == "error":
                    assert cell.error["ename"] in ("VmBootError", "VmGuestError", "TemplateError")
                    assert "What to do:" in cell.traceback
                    assert log_path_in(cell.traceback).exists()
                    cell = kernel.run("6 * 7")
                assert cell.result == "42"
            finally:
                end(kernel)


class TestQemuStopped:
    def test_the_wrapper_still_answers_and_shuts_down(self, kernel: Kernel, host: VmHost) -> None:
        cell = kernel.send("import time; print('on', flush=True); time.sleep(300)")
        kernel.wait_output(cell, "on")
        only_qemu(host).send_signal(signal.SIGSTOP)

        began = time.monotonic()
        kernel.interrupt()
        kernel.request("kernel_info_request", channel="control")
        usage = kernel.ask("usage_request", channel="control")
        kernel.interrupt()
        assert time.monotonic() - began < 5
        kernel.finish(usage)

        began = time.monotonic()
        kernel.manager.shutdown_kernel()
        assert time.monotonic() - began < 5
        assert host.left() == []
        assert host.records() == []

    def test_its_wrapper_killed_too_leaves_nothing(self, kernel: Kernel, host: VmHost) -> None:
        kernel.run("")
        only_qemu(host).send_signal(signal.SIGSTOP)
        os.kill(kernel.pid, signal.SIGKILL)
        assert seconds_until(lambda: not host.left(), 10) < PROMISED


class TestGuestKernelDied:
    def test_an_interrupt_while_its_successor_comes_up_costs_no_files(
        self, kernel: Kernel, host: VmHost
    ) -> None:
        kernel.run("open('kept', 'w').close()")
        qemu = only_qemu(host)
        cell = kernel.send("import os; os._exit(3)")
        kernel.wait(lambda: cell.contents("error"), f"the error of {cell}")
        qemu.send_signal(signal.SIGSTOP)  # nothing comes up any more
        kernel.finish(cell)
        waiting = kernel.send("import os; os.path.exists('kept')")
        kernel.wait(lambda: waiting.messages, "its turn")
        kernel.interrupt()
        qemu.send_signal(signal.SIGCONT)
        kernel.finish(waiting)
        assert waiting.status == "ok" or waiting.error["ename"] == "KeyboardInterrupt"

        assert kernel.run("import os; os.path.exists('kept')").result == "True"
        assert host.qemus() == [qemu.pid]
        assert host.slots().used == 1

    def test_a_vm_that_cannot_carry_a_kernel_any_more_is_replaced(
        self, kernel: Kernel, host: VmHost
    ) -> None:
        kernel.run("")
        cell = kernel.send("import os; os._exit(3)")
        kernel.wait(lambda: cell.contents("error"), f"the error of {cell}")
        only_qemu(host).kill()
        kernel.finish(cell)
        kernel.run("")
        assert kernel.run("6 * 7").result == "42"
        assert len(host.qemus()) == host.slots().used == 1


class TestInterruptedStart:
    def test_impatience_leaves_nothing_behind(self, spec: str, host: VmHost) -> None:
        """Interrupts during the start, and during the clean-up after the first one."""
        kernel = Kernel(spec, env=host.env)
        try:
            for pause in (0.0, 0.05, 0.2):
                cell = kernel.send("6 * 7")
                time.sleep(pause)
                asked = [kernel.ask("interrupt_request", channel="control") for _ in range(4)]
                for each in (cell, *asked):
                    kernel.finish(each)
                if cell.status == "error":
                    assert cell.error["ename"] == "KeyboardInterrupt"
                assert kernel.run("6 * 7").result == "42"
                assert len(host.qemus()) == host.slots().used == len(host.records()) == 1
                only_qemu(host).kill()
                time.sleep(0.5)  # for the wrapper to notice
        finally:
            end(kernel)
        assert host.records() == []


def log_path_in(traceback: str) -> Path:
    """The path that an error shown in a notebook names."""
    line = next(line for line in traceback.splitlines() if line.startswith("Log: "))
    return Path(line.removeprefix("Log: "))
