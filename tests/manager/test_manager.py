"""VMs for programs: code in, results out, and the ways in which either may go wrong.

What SEEDS promises of starts and capacity has its own files (test_seeds_a.py, test_seeds_b.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vmhost import VmHost
from vmkernel import (
    ImageError,
    Language,
    Output,
    SettingsError,
    VmGuestError,
    VmHandle,
    VmManager,
    VmNotFoundError,
    VmState,
    VmStateError,
    VmTimeoutError,
)

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("template"), pytest.mark.timeout(180)]


class TestRun:
    async def test_what_code_prints_shows_and_is_worth(self, vm: VmHandle) -> None:
        result = await vm.run(
            "import sys\nprint('out')\nprint('err', file=sys.stderr)\n"
            "from IPython.display import display, HTML\ndisplay(HTML('<b>x</b>'))\n6 * 7"
        )
        assert (result.stdout, result.stderr) == ("out\n", "err\n")
        assert [bundle.get("text/html") for bundle in result.results] == ["<b>x</b>", None]
        assert result.results[1]["text/plain"] == "42"
        assert result.ok
        assert (result.error, result.exit_code, result.vm_id) == (None, 0, vm.vm_id)
        assert 0 < result.duration < 60

    async def test_variables_stay_and_order_is_kept(self, vm: VmHandle) -> None:
        results = await asyncio.gather(
            *[vm.run(f"seen = globals().get('seen', []) + [{n}]; print(seen)") for n in range(5)]
        )
        assert results[-1].stdout == "[0, 1, 2, 3, 4]\n"

    @pytest.mark.parametrize(
        ("code", "name", "exit_code"),
        [
            ("1 / 0", "ZeroDivisionError", 1),
            ("import sys; sys.exit(3)", "SystemExit", 3),
            ("import sys; sys.exit()", "SystemExit", 0),
            ("import sys; sys.exit('no')", "SystemExit", 1),
            ("import os; os._exit(5)", "GuestKernelDied", 5),
            ("import os; os.kill(os.getpid(), 9)", "GuestKernelDied", 137),
            ("def (", "SyntaxError", 1),
        ],
    )
    async def test_code_that_fails_is_a_result(
        self, manager: VmManager, code: str, name: str, exit_code: int
    ) -> None:
        vm = await manager.create_vm()
        result = await vm.run(code)
        assert result.error is not None
        assert (result.error.name, result.exit_code) == (name, exit_code)
        assert result.ok is (exit_code == 0 and name != "SystemExit")
        # And the VM goes on, with a new kernel if need be
        assert (await vm.run("print('on')")).stdout == "on\n"

    async def test_outputs_come_while_the_code_runs(self, vm: VmHandle) -> None:
        heard: list[tuple[float, str]] = []

        def on_output(output: Output) -> None:
            heard.append((time.monotonic(), output.content["text"]))

        began = time.monotonic()
        await vm.run(
            "import time\nprint('first', flush=True)\ntime.sleep(2)\nprint('last')",
            on_output=on_output,
        )
        assert "".join(text for _, text in heard) == "first\nlast\n"
        assert heard[-1][0] - heard[0][0] > 1.5
        assert heard[0][0] - began < 1.5

    async def test_a_time_limit_ends_the_vm_and_the_error_says_so(
        self, host: VmHost, vm: VmHandle
    ) -> None:
        with pytest.raises(VmTimeoutError, match="time limit of 1 s; its VM was destroyed") as info:
            await vm.run("print('begun', flush=True)\nwhile True: pass", timeout=1)
        assert isinstance(info.value, TimeoutError)
        assert info.value.code_ran == "unknown"
        assert info.value.result.stdout == "begun\n"
        assert not vm.holds_semaphore_slot
        assert vm.state is VmState.FAILED
        assert host.qemus() == []

    async def test_cancelling_a_run_interrupts_its_code_only(self, vm: VmHandle) -> None:
        running = asyncio.ensure_future(vm.run("kept = 1\nimport time\ntime.sleep(100)"))
        queued = asyncio.ensure_future(vm.run("ran = 1"))
        await asyncio.sleep(1)
        queued.cancel()
        running.cancel()
        done = await asyncio.gather(running, queued, return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in done)
        after = await vm.run("print(kept, 'ran' in globals())")
        assert after.stdout == "1 False\n"

    @pytest.mark.parametrize("pause", [0, 0.001, 0.005, 0.02])
    async def test_cancelled_before_it_begins_it_does_not_run_on(
        self, vm: VmHandle, pause: float
    ) -> None:
        await vm.run("kept = 1")
        for _ in range(5):
            running = asyncio.ensure_future(vm.run("while True: pass"))
            await asyncio.sleep(pause)
            running.cancel()
            await asyncio.wait([running], timeout=4)
            assert running.cancelled()
            assert (await vm.run("print(kept)")).stdout == "1\n", "the kernel is the same"

    async def test_who_waits_behind_a_run_out_of_time_is_told_that_nothing_ran(
        self, vm: VmHandle
    ) -> None:
        late = asyncio.ensure_future(vm.run("while True: pass", timeout=1))
        queued = asyncio.ensure_future(vm.run("print('ran')"))
        with pytest.raises(VmTimeoutError):
            await late
        with pytest.raises(VmGuestError, match="time limit of 1 s") as info:
            await queued
        assert info.value.code_ran == "no"

    async def test_code_that_ignores_the_interrupt_loses_its_kernel(self, vm: VmHandle) -> None:
        code = (
            "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "open('file', 'w').close()\nwhile True: time.sleep(1)"
        )
        running = asyncio.ensure_future(vm.run(code))
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        result = await vm.run("import os; print(os.path.exists('file'), 'time' in globals())")
        assert result.stdout == "True False\n"

    async def test_cancelled_twice_it_still_ends(self, vm: VmHandle) -> None:
        code = "import signal, time\nsignal.signal(2, signal.SIG_IGN)\nwhile True: time.sleep(1)"
        running = asyncio.ensure_future(vm.run(code))
        await asyncio.sleep(1)
        running.cancel()
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with asyncio.timeout(30):
            assert (await vm.run("print('on')")).stdout == "on\n"

    async def test_kernels_that_die_again_and_again(self, host: VmHost, vm: VmHandle) -> None:
        """What code left behind kills each guest kernel: another comes a few times, then none.

        Or one comes that is quicker, and ends what it finds.
        """
        killer = (
            "import os, signal\n"
            "while True:\n"
            "    for pid in os.listdir('/proc'):\n"
            "        try:\n"
            "            if pid.isdigit() and int(pid) not in (1, os.getpid()):\n"
            "                os.kill(int(pid), signal.SIGKILL)\n"
            "        except OSError: pass\n"
        )
        result = await vm.run(
            "import subprocess, time\n"
            f"subprocess.Popen(['python3', '-c', {killer!r}], start_new_session=True)\n"
            "time.sleep(100)"
        )
        assert result.error is not None
        assert result.error.name == "GuestKernelDied"
        try:
            async with asyncio.timeout(20):
                error = await vm.wait_ended()
        except TimeoutError:
            assert (await vm.run("print('on')")).stdout == "on\n"
        else:
            assert error is not None
            assert "no other stayed in its place" in str(error)
            assert host.qemus() == []

    async def test_an_interrupt_is_the_code_s_own_error(self, vm: VmHandle) -> None:
        await vm.interrupt()  # of nothing: nothing
        running = asyncio.ensure_future(vm.run("import time\ntime.sleep(100)"))
        await asyncio.sleep(1)
        await vm.interrupt()
        result = await running
        assert result.error is not None
        assert (result.error.name, result.exit_code) == ("KeyboardInterrupt", 130)

    async def test_input_is_asked_for(self, vm: VmHandle) -> None:
        asked: list[tuple[str, bool]] = []

        def answer(prompt: str, password: bool) -> str:
            asked.append((prompt, password))
            return "Ada"

        code = "import getpass\nprint(input('who? ') + getpass.getpass('pin '))"
        result = await vm.run(code, on_input=answer)
        assert result.stdout == "AdaAda\n"
        assert asked == [("who? ", False), ("pin ", True)]

    async def test_without_an_answer_input_raises(self, vm: VmHandle) -> None:
        result = await vm.run("input('who? ')")
        assert result.error is not None
        assert result.error.name == "StdinNotImplementedError"

        def fail(prompt: str, password: bool) -> str:
            raise EOFError

        result = await vm.run("input('who? ')", on_input=fail)
        assert result.error is not None
        assert result.error.name == "KeyboardInterrupt"

    async def test_environment_by_vm_and_by_run(self, manager: VmManager) -> None:
        os.environ["NOT_FOR_GUESTS"] = "secret"
        try:
            vm = await manager.create_vm(env={"BY_VM": "a b"})
        finally:
            del os.environ["NOT_FOR_GUESTS"]
        code = (
            "import os\nprint([os.environ.get(n) for n in ('BY_VM', 'BY_RUN', 'NOT_FOR_GUESTS')])"
        )
        assert (await vm.run(code)).stdout == "['a b', None, None]\n"
        assert (await vm.run(code, env={"BY_RUN": "c"})).stdout == "['a b', 'c', None]\n"
        # A kernel that takes a dead one's place has it, too
        await vm.run("import os; os._exit(1)")
        assert (await vm.run(code)).stdout == "['a b', 'c', None]\n"

    async def test_output_beyond_the_limit_is_cut_and_said_to_be(self, manager: VmManager) -> None:
        vm = await manager.create_vm(max_output=1)
        seen = 0

        def on_output(output: Output) -> None:
            nonlocal seen
            seen += len(output.content["text"])

        result = await vm.run("print('x' * (3 << 20))", on_output=on_output)
        assert (len(result.stdout), result.truncated, seen) == (1 << 20, True, (3 << 20) + 1)

    async def test_a_slow_listener_holds_the_guest_back(self, vm: VmHandle) -> None:
        """Nothing is lost, and the runner does not keep what nobody takes."""
        import psutil

        runner = psutil.Process(vm.record.runner_pid)
        heard = 0
        most = 0

        def on_output(output: Output) -> None:
            nonlocal heard, most
            heard += len(output.content["text"])
            time.sleep(0.01)  # the whole event loop stands still
            most = max(most, runner.memory_info().rss)

        before = runner.memory_info().rss
        await vm.run("for _ in range(2000): print('x' * 9999)", on_output=on_output)
        assert heard == 20_000_000
        assert most - before < 15 << 20

    async def test_a_slow_listener_holds_it_back_while_others_come_and_go(
        self, host: VmHost, vm: VmHandle
    ) -> None:
        import psutil

        script = (
            "import asyncio, sys, time\n"
            "from vmkernel import VmManager\n"
            "async def main():\n"
            "    async with VmManager() as manager:\n"
            "        vm = await manager.get_vm(sys.argv[1])\n"
            "        code = 'while True: print(9999 * \"x\")'\n"
            "        await vm.run(code, on_output=lambda output: time.sleep(60))\n"
            "asyncio.run(main())\n"
        )
        slow = subprocess.Popen(
            [sys.executable, "-c", script, vm.vm_id], env={**os.environ, **host.env}
        )
        try:
            runner = psutil.Process(vm.record.runner_pid)
            await asyncio.sleep(3)
            before = runner.memory_info().rss
            for _ in range(10):
                async with VmManager(host.settings()) as other:
                    guest = await other.get_vm(vm.vm_id)
                    await guest.ping()
                    await guest.close()
                await asyncio.sleep(0.3)
            assert runner.memory_info().rss - before < 10 << 20
        finally:
            slow.kill()
            slow.wait()
        assert (await vm.run("print('on')")).stdout == "on\n", "its code was interrupted"

    async def test_small_outputs_count_too(self, manager: VmManager) -> None:
        vm = await manager.create_vm(max_output=1)
        code = "from IPython.display import display\nfor _ in range(6000): display({}, raw=True)"
        result = await vm.run(code)
        assert result.truncated
        assert len(result.results) < 5000

    async def test_an_error_of_the_listener_s_is_the_caller_s(self, vm: VmHandle) -> None:
        def fail(output: Output) -> None:
            raise BrokenPipeError("nobody reads")

        with pytest.raises(BrokenPipeError):
            await vm.run("while True: print('x')", on_output=fail)
        assert (await vm.run("print('on')")).stdout == "on\n"

    async def test_the_vm_magic_has_an_answer(self, vm: VmHandle) -> None:
        async with asyncio.timeout(20):
            result = await vm.run("%vm")
        assert "in the hands of a program" in result.stderr + str(result.error)

    async def test_whether_code_ran_is_never_said_wrongly(self, manager: VmManager) -> None:
        vm = await manager.create_vm()
        running = asyncio.ensure_future(vm.run("import time; time.sleep(100)"))
        queued = asyncio.ensure_future(vm.run("1"))
        await asyncio.sleep(0.5)
        await manager.destroy_vm(vm)
        later = asyncio.ensure_future(vm.run("1"))
        errors = await asyncio.gather(running, queued, later, return_exceptions=True)
        assert [error.code_ran for error in errors] == ["unknown", "no", "no"]  # type: ignore[union-attr]

    async def test_a_runner_that_stands_still_hangs_nobody(
        self, vm: VmHandle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vmkernel.host.client.SILENT_SECONDS", 1.0)
        monkeypatch.setattr("vmkernel.host.client.CANCEL_SECONDS", 1.0)
        running = asyncio.ensure_future(vm.run("while True: pass", timeout=5))
        await asyncio.sleep(0.5)
        os.kill(vm.record.runner_pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(VmGuestError, match="has not answered"):
            await vm.ping(0.5)
        cancelled = asyncio.ensure_future(vm.run("1"))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        await asyncio.wait([cancelled], timeout=5)
        assert cancelled.cancelled()
        with pytest.raises(VmTimeoutError, match="its VM was destroyed"):
            await running
        assert time.monotonic() - began < 15
        async with asyncio.timeout(5):
            assert await vm.wait_ended() is not None
            while vm.holds_semaphore_slot:  # QEMU follows its runner in a moment
                await asyncio.sleep(0.01)

    async def test_questions_of_many_runs_leave_the_manager_its_threads(
        self, manager: VmManager
    ) -> None:
        """Who does not answer keeps one thread, nobody else's, and never more than one."""
        import threading

        answered = threading.Event()
        threads: list[int] = []

        def wait(prompt: str, password: bool) -> str:
            threads.append(1)
            answered.wait(30)
            return ""

        vm = await manager.create_vm()
        ask = (
            "import threading\n"
            "for _ in range(40): threading.Thread(target=input, daemon=True).start()\n"
            "input()"
        )
        running = asyncio.ensure_future(vm.run(ask, on_input=wait))
        await asyncio.sleep(1.5)
        try:
            async with asyncio.timeout(5):
                assert len(await manager.list_vms()) == 1
            assert len(threads) == 1
        finally:
            answered.set()
        running.cancel()
        await asyncio.wait([running])

    async def test_an_answer_that_comes_late_is_no_interrupt_of_others(self, vm: VmHandle) -> None:
        import threading

        over = threading.Event()

        def fail_late(prompt: str, password: bool) -> str:
            over.wait(30)
            raise EOFError

        first = asyncio.ensure_future(vm.run("input()", on_input=fail_late))
        await asyncio.sleep(0.5)
        first.cancel()
        await asyncio.wait([first])
        second = asyncio.ensure_future(vm.run("import time\ntime.sleep(1.5)\nprint('whole')"))
        await asyncio.sleep(0.5)
        over.set()
        assert (await second).stdout == "whole\n"

    async def test_one_s_time_limit_is_not_another_s(self, host: VmHost, vm: VmHandle) -> None:
        async with VmManager(host.settings()) as other:
            theirs = await other.get_vm(vm.vm_id)
            mine = asyncio.ensure_future(vm.run("while True: pass", timeout=1))
            await asyncio.sleep(0.2)
            queued = asyncio.ensure_future(theirs.run("1"))
            results = await asyncio.gather(mine, queued, return_exceptions=True)
            assert isinstance(results[0], VmTimeoutError)
            assert type(results[1]) is VmGuestError
            assert results[1].code_ran == "no"
            assert type(await theirs.wait_ended()) is VmGuestError

    def test_a_handle_of_another_event_loop_says_so(self, host: VmHost) -> None:
        manager = VmManager(host.settings())
        vm = asyncio.run(manager.create_vm())
        with pytest.raises(VmStateError, match="another event loop"):
            asyncio.run(vm.run("1"))
        asyncio.run(manager.close())


class TestVm:
    async def test_what_is_on_record_and_how_it_shows(
        self, manager: VmManager, vm: VmHandle
    ) -> None:
        [status] = await manager.list_vms()
        record = status.record
        assert record == vm.record
        assert (record.tenant_id, record.task_id, record.recipe) == ("tenant", "task-1", "minimal")
        assert (record.state, record.language, record.memory) == (VmState.RUNNING, "python", 512)
        assert (status.runner_alive, status.qemu_alive) == (True, True)
        assert repr(vm) == f"<VmHandle {vm.vm_id} running>"
        assert manager.capacity().used == 1
        await vm.ping()
        assert (await vm.statistics())["cpu_count"] == 1

    async def test_leaving_the_manager_ends_what_it_does_not_keep(self, host: VmHost) -> None:
        async with VmManager(host.settings()) as manager:
            await manager.create_vm()
            kept = await manager.create_vm(name="kept", keep=True)
        assert len(host.qemus()) == 1
        async with VmManager(host.settings()) as manager:
            again = await manager.get_vm("kept")
            assert again.vm_id == kept.vm_id
            assert (await again.run("print(6 * 7)")).stdout == "42\n"
            await manager.destroy_vm("kept")
            with pytest.raises(VmNotFoundError):
                await manager.destroy_vm("kept")
            await manager.destroy_vm(again)  # by its handle: harmless
        assert host.left() == []

    async def test_a_kept_vm_starts_again_with_its_settings_and_an_empty_head(
        self, manager: VmManager
    ) -> None:
        vm = await manager.create_vm(name="kept", keep=True, max_output=2)
        await vm.run("mark = 1")
        await manager.stop_vm(vm)
        assert not vm.holds_semaphore_slot
        with pytest.raises(VmStateError, match="does not run: it is stopped"):
            await manager.get_vm("kept")
        await manager.update_vm("kept", max_output=1, tenant_id="other")
        again = await manager.start_vm("kept")
        assert again.vm_id == vm.vm_id
        assert again.record.tenant_id == "other"
        assert (await again.run("print('x' * (3 << 19))")).truncated, "1 MiB is kept now, not 2"
        assert (await again.run("print('mark' in globals())")).stdout == "False\n"
        with pytest.raises(VmStateError, match="is running"):
            await manager.start_vm("kept")
        with pytest.raises(VmStateError, match="settings cannot be changed"):
            await manager.update_vm("kept", memory=1024)
        with pytest.raises(VmStateError, match="kept"):
            await manager.create_vm(name="kept")
        await manager.destroy_vm(again)

    async def test_it_ends_with_the_process_that_created_it(self, host: VmHost) -> None:
        script = (
            "import asyncio, os, signal\n"
            "from vmkernel import VmManager\n"
            "async def main():\n"
            "    async with VmManager() as manager:\n"
            "        print((await manager.create_vm()).vm_id, flush=True)\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "asyncio.run(main())\n"
        )
        env = {**os.environ, **host.env}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        deadline = time.monotonic() + 5
        while host.left() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert host.left() == []
        async with VmManager(host.settings()) as manager:
            [status] = await manager.list_vms(ended=True)
        assert status.record.vm_id == done.stdout.strip()
        assert status.state is VmState.STOPPED
        assert status.record.exit_cause == "whoever had started it has ended"

    async def test_several_use_one_vm(self, host: VmHost, manager: VmManager) -> None:
        vm = await manager.create_vm()
        async with VmManager(host.settings()) as other:
            theirs = await other.get_vm(vm.vm_id)
            await asyncio.gather(
                *[each.run("n = globals().get('n', 0) + 1") for each in (vm, theirs) * 5]
            )
            await theirs.close()
        assert (await vm.run("print(n)")).stdout == "10\n"
        assert vm.alive, "a guest that leaves does not end it"

    async def test_a_client_that_dies_interrupts_what_it_ran(
        self, host: VmHost, manager: VmManager
    ) -> None:
        vm = await manager.create_vm()
        other = VmManager(host.settings())
        theirs = await other.get_vm(vm.vm_id)
        running = asyncio.ensure_future(theirs.run("import time\ntime.sleep(1000)"))
        await asyncio.sleep(0.5)
        await theirs.close()
        with pytest.raises(VmGuestError):
            await running
        async with asyncio.timeout(30):
            assert (await vm.run("print('mine')")).stdout == "mine\n"

    async def test_qemu_s_death_ends_what_waits_with_its_reason(self, vm: VmHandle) -> None:
        running = asyncio.ensure_future(vm.run("import time\ntime.sleep(100)"))
        await asyncio.sleep(0.5)
        os.kill(vm.record.qemu_pid, signal.SIGKILL)
        with pytest.raises(VmGuestError, match="signal 9") as info:
            await running
        assert info.value.code_ran == "unknown"
        assert info.value.log_path is not None
        assert info.value.log_path.exists()
        with pytest.raises(VmGuestError):
            await vm.run("1")
        assert await vm.wait_ended() is not None

    async def test_language_and_recipe(self, manager: VmManager, bash_image: str) -> None:
        vm = await manager.create_vm(language=Language.BASH, memory=512)
        assert vm.record.recipe == "bash"
        result = await vm.run('echo "$GREETING"', env={"GREETING": "good day"})
        assert result.stdout.strip() == "good day"
        with pytest.raises(ImageError, match="no image whose kernel speaks 'klingon'"):
            await manager.create_vm(language="klingon")
        with pytest.raises(ImageError, match="There is no image 'none-such'"):
            await manager.create_vm(recipe="none-such")

    async def test_a_wrong_setting_is_told_before_anything_happens(
        self, manager: VmManager
    ) -> None:
        with pytest.raises(SettingsError, match="there is no setting 'memroy'"):
            await manager.create_vm(memroy=512)
        with pytest.raises(SettingsError, match="'memory' is 1"):
            await manager.create_vm(memory=1)
        assert await manager.list_vms(ended=True) == []

    async def test_cancelled_starts_leave_nothing(self, host: VmHost, manager: VmManager) -> None:
        for number in range(12):
            starting = asyncio.ensure_future(manager.create_vm())
            await asyncio.sleep(number * 0.04)
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await manager.destroy_vm(await starting)
            assert host.left() == []
        assert await manager.list_vms(ended=True) == []

    async def test_a_start_under_way_is_given_up_when_its_manager_closes(
        self, host: VmHost
    ) -> None:
        for pause in (0, 0.05, 0.2, 0.3):
            manager = VmManager(host.settings())
            starting = asyncio.ensure_future(manager.create_vm())
            await asyncio.sleep(pause)
            await manager.close()
            [result] = await asyncio.gather(starting, return_exceptions=True)
            if isinstance(result, VmHandle):  # it was just there
                assert pause
                assert not result.alive
            else:
                assert isinstance(result, VmStateError)
                assert "closed" in str(result)
            with pytest.raises(VmStateError, match="closed"):
                await manager.create_vm()
            assert host.left() == []

    async def test_who_waits_for_a_slot_hears_that_it_is_not_wanted(self, host: VmHost) -> None:
        settings = host.settings(VMKERNEL_MAX_CONCURRENT_VMS="1")
        async with VmManager(settings) as manager, VmManager(settings) as other:
            await manager.create_vm()
            waiting = {
                name: asyncio.ensure_future(manager.create_vm(name=name, keep=True))
                for name in ("stopped", "destroyed")
            }
            await asyncio.sleep(0.5)
            assert manager.capacity().waiting == 2
            await other.stop_vm("stopped")
            await other.destroy_vm("destroyed")
            async with asyncio.timeout(5):
                with pytest.raises(VmStateError, match="was stopped while it waited"):
                    await waiting["stopped"]
                with pytest.raises(VmNotFoundError):
                    await waiting["destroyed"]
            assert manager.capacity().waiting == 0

    async def test_an_end_touches_nothing_of_the_next_life(
        self, host: VmHost, manager: VmManager
    ) -> None:
        vm = await manager.create_vm(name="kept", keep=True)
        async with VmManager(host.settings()) as other:
            for _ in range(10):
                await other.stop_vm("kept")
                vm = await manager.start_vm("kept")
                theirs = await other.get_vm("kept")
                assert (await theirs.run("print(1)")).stdout == "1\n"
                await theirs.close()
                assert (host.state_dir / "logs" / vm.vm_id / "runner.log").exists()
            await other.destroy_vm("kept")

    async def test_a_result_is_plain_data(self, vm: VmHandle) -> None:
        import msgspec

        result = await vm.run("1 / 0")
        assert json.loads(msgspec.json.encode(result))["error"]["name"] == "ZeroDivisionError"
