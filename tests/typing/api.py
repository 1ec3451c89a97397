"""The public API as a type checker sees it; `script/lint` checks this file, nobody runs it.

Each use must type-check strictly, and each wrong one must be found: an unused ``type: ignore`` is
an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

from vmkernel import (
    ImageError,
    Language,
    Output,
    ProtocolError,
    RegistryError,
    RunError,
    RunResult,
    Scheduler,
    SchedulerConfig,
    SchedulerStatistics,
    Settings,
    SettingsError,
    Statistics,
    TemplateError,
    VmAlreadyStartingError,
    VmBootError,
    VmCapacityError,
    VmError,
    VmExpiredError,
    VmFileError,
    VmGuestError,
    VmHandle,
    VmHostLostError,
    VmManager,
    VmNotFoundError,
    VmOverlayError,
    VmRecord,
    VmState,
    VmStateError,
    VmStatus,
    VmTimeoutError,
    __version__,
    load_settings,
)

assert_type(__version__, str)


async def one_shot(env: Mapping[str, str]) -> None:
    config = SchedulerConfig(
        images_dir=Path("/images"), max_concurrent_vms=2, warm_pool_size=1, language="python"
    )
    assert_type(config.settings, Settings)
    assert_type(config.language, Language | None)
    async with Scheduler(config) as scheduler:
        assert_type(scheduler, Scheduler)
        result = await scheduler.run(
            "print('ok')",
            language=Language.PYTHON,
            timeout=10,
            queue_timeout=None,
            tenant_id="t",
            task_id="1",
            env=env,
            files={"in": b"bytes", "tree": Path("tree")},
            outputs={"out": Path("out")},
            on_output=lambda output: print(output.content),
            on_input=lambda prompt, password: "" if password else prompt,
            on_progress=print,
            memory="1G",
        )
        assert_type(result, RunResult)
        assert_type(scheduler.statistics(), SchedulerStatistics)
        assert_type(scheduler.statistics().slots, Statistics)
        await scheduler.wait_warm()
        await scheduler.run(b"print()")  # type: ignore[arg-type]
        await scheduler.run("print()", timeout="10")  # type: ignore[arg-type]
        await scheduler.run("print()", files={"in": "text"})  # type: ignore[dict-item]


def a_result(result: RunResult) -> None:
    assert_type(result.stdout, str)
    assert_type(result.results, list[dict[str, Any]])
    assert_type(result.error, RunError | None)
    assert_type(result.exit_code, int)
    assert_type(result.duration, float)
    assert_type(result.ok, bool)
    if result.error is not None:
        assert_type(result.error.traceback, list[str])
    result.stdout = ""  # type: ignore[misc]


def hear(output: Output) -> None:
    assert_type(output.msg_type, str)


async def that_stay(settings: Settings) -> None:
    async with VmManager(settings) as manager:
        assert_type(manager, VmManager)
        vm = await manager.create_vm(language=Language.BASH, name="lab", keep=True, timeout=None)
        assert_type(vm, VmHandle)
        assert_type(await manager.create_vm_nowait(memory=512), VmHandle | None)
        assert_type(vm.holds_semaphore_slot, bool)
        assert_type(vm.state, VmState)
        assert_type(vm.record, VmRecord)
        assert_type(await vm.run("1", on_output=hear), RunResult)
        assert_type(await vm.put(Path("tree"), "tree/"), int)
        assert_type(await vm.get("tree", Path("tree")), int)
        assert_type(await vm.read_file("tree/file"), bytes)
        assert_type(await vm.wait_ended(), VmError | None)
        assert_type(await manager.list_vms(ended=True), list[VmStatus])
        assert_type(await manager.update_vm("lab", task_id="2"), VmRecord)
        assert_type(await manager.get_vm("lab"), VmHandle)
        assert_type(await manager.start_vm("lab"), VmHandle)
        assert_type(manager.capacity(), Statistics)
        await manager.stop_vm(vm, timeout=5)
        await manager.destroy_vm("lab")
        await manager.create_vm(keep="yes")  # type: ignore[arg-type]
        await manager.destroy_vm(7)  # type: ignore[arg-type]


def errors() -> None:
    try:
        load_settings()
    except (VmCapacityError, VmNotFoundError, VmOverlayError, VmBootError, VmFileError) as error:
        assert_type(error.hint, str)
        assert_type(error.log_path, Path | None)
    except (ImageError, TemplateError, RegistryError, SettingsError) as error:
        print(error.explain())
    except (VmTimeoutError, VmExpiredError, VmHostLostError, ProtocolError) as error:
        as_guest: VmGuestError = error
        print(as_guest.code_ran)
    except VmAlreadyStartingError as error:
        as_state: VmStateError = error
        as_blocking: BlockingIOError = error
        print(as_state, as_blocking)
    except VmError as error:
        print(error.code_ran == "no", error.result)
        print(error.code_ran == "yes")  # type: ignore[comparison-overlap]


Settings(max_concurrent_vms=2, base_images_dir=Path("/images"))
Settings(max_concurrent_vms="two")  # type: ignore[arg-type]
Settings(no_such_setting=1)  # type: ignore[call-arg]
