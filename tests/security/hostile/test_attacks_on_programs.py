"""A hostile guest in the hands of a program (VmManager): runs, files, statistics."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hostile.attack import code_of

from vmhost import VmHost, seconds_until
from vmkernel import VmError, VmHandle, VmManager

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]


@pytest.fixture
def host(hostile_env: dict[str, str], session_dir: Path) -> Iterator[VmHost]:
    """A host of the test's own; nothing of it may be left at the end."""
    host = VmHost(session_dir)
    host.env |= hostile_env
    yield host
    seconds_until(lambda: not host.left(), 10)
    left = host.left()
    host.clear()
    assert not left


def runner_peak(handle: VmHandle) -> int:
    """MiB that the VM's runner had resident at most."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if handle.vm_id in process.cmdline() and "run_vm.py" in " ".join(process.cmdline()):
                status = Path(f"/proc/{process.pid}/status").read_text()
                return int(status.split("VmHWM:")[1].split()[0]) >> 10
    raise AssertionError(f"no runner of {handle.vm_id}")


# --- files -----------------------------------------------------------------------------


def lies_about_files(guest, what):
    """What is listed, and what is in it, is not what there is."""
    import base64

    def name(text):
        return base64.b64encode(text).decode()

    def listing(entries, more=False):
        entries = [[name(n), kind, size, 0o644] for n, kind, size in entries]
        return {"kind": "directory", "size": 0, "mode": 0o755, "entries": entries, "more": more}

    lists = {
        "parent": [(b"..", "directory", 0)],
        "up": [(b"../../out", "file", 4)],
        "absolute": [(b"/tmp/vmkernel-forged", "file", 4)],
        "nul": [(b"a\0b", "file", 4)],
        "twice": [(b"a", "file", 4), (b"a", "link", 4)],
        "link": [(b"a", "link", 4), (b"b", "other", 4)],
        "larger": [(b"a", "file", 1 << 40)],
        "smaller": [(b"a", "file", 1)],
        "without end": [(b"%d" % i, "file", 4) for i in range(200)],
        "deeper": [(b"d", "directory", 0)],
        "no more": [],
    }

    def listed(guest, command):
        more = what in ("without end", "no more")
        entries = lists[what]
        if what == "without end":
            skip = command["skip"]
            entries = [(b"%d" % (skip + i), "file", 4) for i in range(200)]
        guest.answer_command(command["id"], listing(entries, more))

    def read(guest, command):
        size = command["size"] if what != "smaller" else command["size"] + 1000
        guest.answer_command(command["id"], {"size": 4}, buffers=[b"x" * min(size, 1 << 20)])

    guest.on["list_files"] = listed
    guest.on["read_file"] = read


@pytest.mark.parametrize(
    "what",
    ["parent", "up", "absolute", "nul", "twice", "link", "larger", "smaller", "without end",
     "deeper", "no more"],
)  # fmt: skip
async def test_files_land_where_they_were_asked_for_or_not_at_all(
    host: VmHost, tmp_path: Path, what: str
) -> None:
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    before = sorted(os.listdir("/tmp"))
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm()
        assert (await vm.run(code_of(lies_about_files, what=what))).ok
        skipped: list[str] = []
        if what == "link":
            await vm.get("work", target / "out", on_skip=skipped.append)
            assert skipped == ["work/a", "work/b"]
        else:
            with pytest.raises(VmError) as failure:
                await vm.get("work", target / "out", max_bytes=1 << 20, on_skip=skipped.append)
            assert str(failure.value)
        assert (await vm.run("after")).stdout == "after"
        assert runner_peak(vm) < 120
    found = [path for path in tmp_path.rglob("*") if not path.is_relative_to(target / "out")]
    assert sorted(found) == [tmp_path / "a", target]
    assert not any("vmkernel-forged" in name for name in set(os.listdir("/tmp")) - set(before))
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


# --- runs ------------------------------------------------------------------------------


def floods(guest):
    """Outputs, questions and lies about all of it."""
    guest.raw("kernel", guest.framed("stream", {"name": "stdout", "text": "x" * 1000}, 20_000))
    question = {"id": "a", "command": "", "arguments": []}
    guest.raw("kernel", guest.framed("vm_request", question, 3000, channel="vm"))


def bomb(guest):
    """JSON that grows when it is decoded."""
    lists = b"[" + b"[]," * (5 << 20) + b"[]]"
    head = b'["iopub","display_data","' + guest.msg_id.encode() + b'",{},'
    guest.message("kernel", head + b'{"data":{"application/json":' + lists + b"}}]")


def noise(guest):
    """No frames."""
    guest.raw("kernel", b"\xff" * 1000)
    guest.serve()


def dies_each_time(guest):
    """No guest kernel stays."""
    guest.on["start_kernel"] = lambda guest, command: (
        guest.answer_command(command["id"]),
        guest.died(output="\x1b]0;forged\x07"),
    )
    guest.answer = False
    guest.died(output="x" * 60_000)


def silent(guest):
    """Nothing any more."""
    time.sleep(3600)


async def test_a_programs_output_is_bounded_whatever_comes(host: VmHost) -> None:
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm()
        result = await vm.run(code_of(floods))
        assert result.ok
        assert len(result.stdout) <= 17 << 20  # max_output
        assert (await vm.run("after")).stdout == "after"
        assert runner_peak(vm) < 120


async def test_a_bomb_is_defused_or_ends_its_vm(host: VmHost) -> None:
    async with VmManager(host.settings()) as manager:
        vm, other = await asyncio.gather(manager.create_vm(), manager.create_vm())
        with contextlib.suppress(VmError):
            await vm.run(code_of(bomb))
        assert (await other.run("unharmed")).stdout == "unharmed"


@pytest.mark.parametrize("attack", [noise, dies_each_time], ids=lambda attack: attack.__name__)
async def test_a_vm_of_no_use_is_an_error(host: VmHost, attack: Callable[..., None]) -> None:
    async with VmManager(host.settings(VMKERNEL_BOOT_TIMEOUT="5")) as manager:
        vm, other = await asyncio.gather(manager.create_vm(), manager.create_vm())
        with pytest.raises(VmError):
            await asyncio.wait_for(_run_until_it_fails(vm, code_of(attack)), 60)
        assert (await other.run("unharmed")).stdout == "unharmed"
        again = await manager.create_vm()
        assert (await again.run("another one")).stdout == "another one"


async def _run_until_it_fails(vm: VmHandle, code: str) -> None:
    for _ in range(3):
        assert not (await vm.run(code)).ok


async def test_a_silent_vm_is_destroyed_in_time(host: VmHost) -> None:
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm()
        began = time.monotonic()
        with pytest.raises(VmError):
            await vm.run(code_of(silent), timeout=1)
        assert time.monotonic() - began < 15
        began = time.monotonic()
        vm = await manager.create_vm()
        run = asyncio.ensure_future(vm.run(code_of(silent)))
        await asyncio.sleep(0.5)
        await manager.destroy_vm(vm)
        assert time.monotonic() - began < 15
        with pytest.raises(VmError):
            await run
