"""The Scheduler beyond SEEDS: files, environment, limits, cancellation, errors, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmhost import VmHost, until
from vmkernel import (
    Language,
    Output,
    Scheduler,
    SchedulerConfig,
    SettingsError,
    VmCapacityError,
    VmError,
    VmGuestError,
    VmHandle,
    VmManager,
    VmStateError,
    VmTimeoutError,
)

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def config(host: VmHost, **more: object) -> SchedulerConfig:
    """As in the environment of this host."""
    own = {name.removeprefix("VMKERNEL_").lower(): value for name, value in host.env.items()}
    return SchedulerConfig(**{**own, **more})  # type: ignore[arg-type]


async def records(scheduler: Scheduler) -> list[str]:
    async with VmManager(scheduler.config.settings) as manager:
        return [status.record.vm_id for status in await manager.list_vms()]


# --- what goes in and comes out -------------------------------------------------------


@pytest.mark.parametrize("warm", [0, 1])
async def test_environment_files_and_outputs(host: VmHost, tmp_path: Path, warm: int) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "a.txt").write_text("from a directory")
    code = """
import os, pathlib
print(os.environ["GREETING"])
print(pathlib.Path("in.bin").read_bytes())
print(pathlib.Path("tree/deep/a.txt").read_text())
os.makedirs("out/sub", exist_ok=True)
pathlib.Path("out/one.txt").write_text("one")
pathlib.Path("out/sub/two.bin").write_bytes(bytes(range(256)) * 5000)
pathlib.Path("report.txt").write_text("done")
"""
    async with Scheduler(config(host, warm_pool_size=warm)) as scheduler:
        await scheduler.wait_warm()
        result = await scheduler.run(
            code,
            env={"GREETING": "good day"},
            files={"in.bin": b"\0bytes", "tree": tmp_path / "tree"},
            outputs={"out": tmp_path / "results", "report.txt": tmp_path / "report.txt"},
        )
        assert result.error is None, result
        assert result.stdout == "good day\nb'\\x00bytes'\nfrom a directory\n"
        assert (tmp_path / "results" / "one.txt").read_text() == "one"
        assert (tmp_path / "results" / "sub" / "two.bin").read_bytes() == bytes(range(256)) * 5000
        assert (tmp_path / "report.txt").read_text() == "done"
        assert scheduler.statistics().from_pool == warm


async def test_outputs_of_code_that_failed_are_what_there_is(host: VmHost, tmp_path: Path) -> None:
    code = "open('partial.txt', 'w').write('half')\n1/0"
    outputs = {"partial.txt": tmp_path / "partial.txt", "never.txt": tmp_path / "never.txt"}
    async with Scheduler(config(host)) as scheduler:
        result = await scheduler.run(code, outputs=outputs)
        assert result.error is not None
        assert result.error.name == "ZeroDivisionError"
        assert result.exit_code == 1
        assert (tmp_path / "partial.txt").read_text() == "half"
        assert not (tmp_path / "never.txt").exists()


async def test_a_missing_output_of_code_that_went_well_is_an_error_with_its_result(
    host: VmHost, tmp_path: Path
) -> None:
    async with Scheduler(config(host)) as scheduler:
        with pytest.raises(VmError, match=r"never\.txt") as caught:
            await scheduler.run("print('ok')", outputs={"never.txt": tmp_path / "never.txt"})
        assert caught.value.code_ran == "unknown", "it did run: not to be tried again"
        assert caught.value.result is not None
        assert caught.value.result.stdout == "ok\n"
        with pytest.raises(VmError, match=r"no such|not exist|No such") as missing:
            await scheduler.run("print('ok')", files={"x": tmp_path / "nowhere"})
        assert missing.value.code_ran == "no"


async def test_output_comes_while_the_code_runs_and_input_is_answered(host: VmHost) -> None:
    heard: list[tuple[float, Output]] = []
    asked: list[tuple[str, bool]] = []

    def answer(prompt: str, password: bool) -> str:
        asked.append((prompt, password))
        return "Ada"

    async with Scheduler(config(host)) as scheduler:
        result = await scheduler.run(
            "import time\nprint('first')\ntime.sleep(1)\nprint(input('name? '))",
            on_output=lambda output: heard.append((time.monotonic(), output)),
            on_input=answer,
        )
    assert result.stdout.splitlines()[0] == "first"
    assert "Ada" in result.stdout
    assert asked == [("name? ", False)]
    streams = [(when, output) for when, output in heard if output.msg_type == "stream"]
    texts = [(when, output.content["text"]) for when, output in streams]
    assert texts[0][1].startswith("first")
    assert texts[-1][0] - texts[0][0] > 0.7


async def test_another_language_by_request(host: VmHost, bash_image: str) -> None:
    async with Scheduler(config(host, warm_pool_size=1)) as scheduler:
        result = await scheduler.run("echo $((6 * 7))", language=Language.BASH)
        assert result.stdout == "42\n"
        assert (await scheduler.run("6 * 7")).results == [{"text/plain": "42"}]
        assert scheduler.statistics().from_pool == 1
    assert SchedulerConfig(recipe=bash_image).recipe_for(None, None) == bash_image


# --- limits ---------------------------------------------------------------------------


async def test_the_time_limit_ends_the_vm_and_counts_the_code_only(host: VmHost) -> None:
    async with Scheduler(config(host, max_concurrent_vms=1)) as scheduler:
        began = time.monotonic()
        slow, quick = await asyncio.gather(
            scheduler.run("print('begun')\nwhile True: pass", timeout=2),
            scheduler.run("print('ok')", timeout=1.5),  # waits for longer than that
            return_exceptions=True,
        )
        assert isinstance(slow, VmTimeoutError)
        assert slow.code_ran == "unknown"
        assert slow.result is not None
        assert slow.result.stdout == "begun\n"
        assert not isinstance(quick, BaseException)
        assert quick.stdout == "ok\n"
        assert time.monotonic() - began > 2
        assert await records(scheduler) == []
    assert host.left() == []


async def test_the_queue_has_a_time_limit_of_its_own(host: VmHost) -> None:
    async with Scheduler(config(host, max_concurrent_vms=1)) as scheduler:
        told: list[str] = []
        holder = asyncio.create_task(scheduler.run("import time; time.sleep(30)"))
        await until(lambda: scheduler.statistics().running == 1)
        with pytest.raises(VmCapacityError, match="place in the queue: 1"):
            await scheduler.run("1", queue_timeout=0.3, on_progress=told.append)
        assert told[0].startswith("waiting for a VM slot: next in line")
        now = scheduler.statistics()
        assert (now.running, now.queued, now.done) == (1, 0, 1)
        assert repr(scheduler) == "<Scheduler running=1 queued=0 warm=0/0 starting=0 slots=1/1>"
        holder.cancel()
        await asyncio.wait([holder])
        assert scheduler.statistics().slots.used == 0


# --- cancellation and the end ---------------------------------------------------------


@pytest.mark.parametrize("warm", [0, 1])
async def test_cancelling_a_run_ends_its_vm_at_once(host: VmHost, warm: int) -> None:
    async with Scheduler(config(host, warm_pool_size=warm, max_concurrent_vms=2)) as scheduler:
        await scheduler.wait_warm()
        begun = asyncio.Event()
        running = asyncio.create_task(
            scheduler.run(
                "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
                "print('x', flush=True)\nwhile True: pass",
                on_output=lambda output: begun.set(),
            )
        )
        await asyncio.wait_for(begun.wait(), 30)
        began = time.monotonic()
        for _ in range(1 + 2 * warm):  # once, or by an impatient caller
            running.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([running])
        took = time.monotonic() - began
        assert running.cancelled()
        print(f"ended {took:.2f} s after its cancellation")
        assert took < 3, "code that ignores its interrupt is not waited for"
        assert scheduler.statistics().running == 0
        await scheduler.wait_warm()
        assert len(await records(scheduler)) == warm
    assert host.left() == []


async def test_cancellation_at_random_moments_leaves_nothing(
    host: VmHost, rounds: Callable[..., int]
) -> None:
    import random

    chance = random.Random(11)
    settings = config(host, warm_pool_size=1, max_concurrent_vms=2)
    async with Scheduler(settings) as scheduler:
        for _ in range(rounds(quick=6, full=60)):
            runs = [asyncio.create_task(scheduler.run("6 * 7")) for _ in range(3)]
            await asyncio.sleep(chance.random())
            for run in runs:
                run.cancel()
            await asyncio.wait(runs)
            for run in runs:
                assert run.cancelled() or run.result().results == [{"text/plain": "42"}]
            now = scheduler.statistics()
            assert (now.running, now.queued) == (0, 0)
            assert len(host.qemus()) <= 2
        result = await scheduler.run("6 * 7")
        assert result.results == [{"text/plain": "42"}]
    assert host.left() == []


async def test_leaving_the_context_waits_for_nothing_and_ends_everything(host: VmHost) -> None:
    settings = config(host, warm_pool_size=1, max_concurrent_vms=2)
    async with Scheduler(settings) as scheduler:
        await scheduler.wait_warm()
        runs = [asyncio.create_task(scheduler.run("import time; time.sleep(60)")) for _ in range(4)]
        await until(lambda: scheduler.statistics().running == 2)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert host.left() == []
    for run in runs:
        with pytest.raises(VmStateError, match="closed meanwhile"):
            await run
    with pytest.raises(VmStateError, match="not open"):
        await scheduler.run("1")
    assert repr(scheduler).startswith("<Scheduler closed running=0 queued=0 ")
    assert await records(scheduler) == []


async def test_an_error_or_a_cancellation_in_the_context_ends_everything(host: VmHost) -> None:
    async def work(error: BaseException | None) -> None:
        async with Scheduler(config(host, warm_pool_size=1)) as scheduler:
            asyncio.get_running_loop().create_task(_ignoring(scheduler.run("while True: pass")))
            await until(lambda: scheduler.statistics().running == 1)
            if error is not None:
                raise error
            await asyncio.sleep(60)

    with pytest.raises(ZeroDivisionError):
        await work(ZeroDivisionError())
    assert host.left() == []
    task = asyncio.create_task(work(None))
    await until(lambda: host.qemus())
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert host.left() == []


async def _ignoring(run: object) -> None:
    with pytest.raises(VmStateError):
        await run  # type: ignore[misc]


def test_a_killed_program_leaves_nothing(host: VmHost) -> None:
    import subprocess
    import sys

    code = """
import asyncio, os, signal
from vmkernel import Scheduler, SchedulerConfig

async def main():
    async with Scheduler(SchedulerConfig(warm_pool_size=1, max_concurrent_vms=2)) as scheduler:
        await scheduler.wait_warm()
        asyncio.ensure_future(scheduler.run("while True: pass", on_output=print))
        await scheduler.wait_warm()
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **host.env, "PYTHONPATH": root},
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while host.left() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert host.left() == []


async def test_a_member_of_the_pool_is_not_idle(host: VmHost) -> None:
    async with Scheduler(config(host, warm_pool_size=1, idle_timeout=1)) as scheduler:
        await scheduler.wait_warm()
        (member,) = await records(scheduler)
        await asyncio.sleep(2.5)
        assert (await scheduler.run("6 * 7")).vm_id == member


# --- at most once ---------------------------------------------------------------------


async def test_a_vm_that_dies_before_the_code_was_sent_is_replaced_once(
    host: VmHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The moment cannot be hit from outside: between the ping and the first byte."""
    killed: list[str] = []
    how_many = 1
    usual = VmHandle.put

    async def put(self: VmHandle, *arguments: object, **more: object) -> int:
        if len(killed) < how_many:
            killed.append(self.vm_id)
            os.kill((await manager.get_vm(self.vm_id)).record.qemu_pid, signal.SIGKILL)
            await self.wait_ended()
        return await usual(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(VmHandle, "put", put)
    settings = config(host)
    async with Scheduler(settings) as scheduler, VmManager(settings.settings) as manager:
        result = await scheduler.run("print(open('x').read())", files={"x": b"ok"})
        assert result.stdout == "ok\n"
        assert result.vm_id not in killed
        killed.clear()
        how_many = 2
        with pytest.raises(VmGuestError) as caught:
            await scheduler.run("print(open('x').read())", files={"x": b"ok"})
        assert len(killed) == 2, "once is enough"
        assert caught.value.code_ran == "no"


async def test_a_vm_that_dies_while_the_code_runs_is_not_replaced(host: VmHost) -> None:
    async with Scheduler(config(host, warm_pool_size=1)) as scheduler:
        await scheduler.wait_warm()
        heard = asyncio.Event()
        code = "print('x', flush=True)\nwhile True: pass"
        running = asyncio.create_task(scheduler.run(code, on_output=lambda _: heard.set()))
        await asyncio.wait_for(heard.wait(), 30)
        async with VmManager(scheduler.config.settings) as manager:
            found = [status.record for status in await manager.list_vms()]
            mine = [record for record in found if record.vm_id not in _warm(scheduler)]
            os.kill(mine[0].qemu_pid, signal.SIGKILL)
        with pytest.raises(VmGuestError) as caught:
            await running
        assert caught.value.code_ran == "unknown"
        assert scheduler.statistics().done == 1


def _warm(scheduler: Scheduler) -> set[str]:
    keeper = scheduler._keeper
    assert keeper is not None
    return {m.vm.vm_id for m in keeper.pool._members if m.vm is not None}


# --- settings -------------------------------------------------------------------------


def test_every_field_of_the_configuration_has_a_sane_default(settings: object) -> None:
    found = SchedulerConfig()
    assert found.settings == settings
    assert (found.warm_pool_size, found.language, found.max_idle) == (0, None, 600)


def test_a_program_wins_over_the_environment_and_what_follows_a_setting_follows_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VMKERNEL_MEMORY", "640M")
    monkeypatch.setenv("VMKERNEL_VCPUS", "2")
    found = SchedulerConfig(memory="768M", runtime_dir=tmp_path, max_concurrent_vms=3).settings
    assert (found.memory, found.vcpus, found.max_concurrent_vms) == (768, 2, 3)
    assert found.semaphore_file == tmp_path / "slots"
    monkeypatch.setenv("VMKERNEL_BASE_IMAGES_DIR", str(tmp_path / "base"))
    assert SchedulerConfig().settings.images_dir == tmp_path / "base"
    assert SchedulerConfig(images_dir=tmp_path / "own").settings.images_dir == tmp_path / "own"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"warm_pool_size": 3, "max_concurrent_vms": 2}, "max_concurrent_vms is 2"),
        ({"warm_pool_size": -1}, "warm_pool_size is -1"),
        ({"max_idle": 0}, "max_idle is 0"),
        ({"memori": 1}, "no setting 'memori'"),
        ({"memory": "much"}, "Setting 'memory' is 'much'"),
        ({"language": "klingon"}, "no language 'klingon'"),
    ],
)
def test_a_wrong_configuration_is_told(fields: dict[str, object], told: str) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        SchedulerConfig(**fields)  # type: ignore[arg-type]
    assert caught.value.hint


async def test_a_wrong_request_is_told_before_anything_is_started(host: VmHost) -> None:
    async with Scheduler(config(host)) as scheduler:
        for request, told in [
            ({"memory": "much"}, "'memory' is 'much'"),
            ({"memori": 3}, "no setting 'memori'"),
            ({"language": "klingon"}, "no language 'klingon'"),
        ]:
            with pytest.raises(SettingsError, match=told):
                await scheduler.run("1", **request)  # type: ignore[arg-type]
    assert host.left() == []
