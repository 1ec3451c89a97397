"""A kernel's life as front ends manage it: start, answers at once, restart, end without a trace."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from jupyter_client.ioloop.manager import AsyncIOLoopKernelManager
from jupyter_client.manager import KernelManager
from kernel_client import Client, Kernel

from vmhost import VmHost, seconds_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

AT_ONCE = 5.0
"""Seconds for what takes a fraction of one on a quiet machine."""


started: list[Kernel] = []


def start_on(host: VmHost, spec: str, **changes: str) -> Kernel:
    """A kernel on this host; ended with the test, whatever happens."""
    kernel = Kernel(spec, env={**host.env, **changes})
    started.append(kernel)
    return kernel


@pytest.fixture
def host(session_dir: Path, small_spec: str) -> Iterator[VmHost]:
    """A host of the test's own, on which nothing may be left at its end."""
    host = VmHost(session_dir)
    yield host
    while started:
        started.pop().shut_down()
    seconds_until(lambda: not host.left(), AT_ONCE)
    left, records = host.left(), host.records()
    host.clear()
    assert not left
    assert not records


# --- the end ---


def test_shutdown_answers_and_leaves_nothing(small_spec: str, host: VmHost) -> None:
    kernel = start_on(host, small_spec)
    kernel.run("1")
    assert len(host.qemus()) == host.slots().used == len(host.records()) == 1
    process = kernel.manager.provisioner.process

    cell = kernel.ask("shutdown_request", {"restart": False}, channel="control")
    kernel.wait(lambda: cell.replies, "the reply")

    assert cell.reply == {"status": "ok", "restart": False}
    assert process.wait(AT_ONCE) == 0
    assert not host.left()
    assert not host.records()
    kernel.shut_down()


def test_shutdown_of_a_busy_kernel_leaves_nothing(small_spec: str, host: VmHost) -> None:
    kernel = start_on(host, small_spec)
    cell = kernel.send("print('begin')\nwhile True: pass")
    kernel.wait_output(cell, "begin")
    process = kernel.manager.provisioner.process
    kernel.shut_down()
    assert process.wait(AT_ONCE) == 0
    assert not host.left()


def test_a_front_end_that_dies_takes_its_kernel_along(
    small_spec: str, host: VmHost, tmp_path: Path
) -> None:
    program = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from kernel_client import Kernel\n"
        f"kernel = Kernel({small_spec!r})\n"
        "kernel.run('1')\n"
        "print(kernel.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    front_end = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **host.env},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert front_end.stdout is not None
        wrapper = psutil.Process(int(front_end.stdout.readline()))
        assert host.qemus()
    finally:
        front_end.kill()
        front_end.wait()
        front_end.stdout.close()
    assert seconds_until(lambda: not _alive(wrapper), 30) < AT_ONCE
    assert seconds_until(lambda: not host.left(), 30) < AT_ONCE
    seconds_until(lambda: not host.records(), AT_ONCE)


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


# --- restart ---


@pytest.mark.parametrize("now", [False, True])
def test_restart_gives_a_fresh_state(small_spec: str, host: VmHost, now: bool) -> None:
    kernel = start_on(host, small_spec)
    kernel.run("held = 'on'; open('file', 'w').close()")
    old_vm, old_wrapper = host.qemus(), kernel.pid

    kernel.manager.restart_kernel(now=now)

    kernel.wait_ready()
    cell = kernel.run("import os; 'held' in globals(), os.path.exists('file')")
    assert cell.result == "(False, False)"
    assert cell.reply["execution_count"] == 1
    assert kernel.pid != old_wrapper
    assert len(host.qemus()) == host.slots().used == 1
    assert host.qemus() != old_vm
    kernel.shut_down()


async def test_a_front_end_restarts_a_kernel_that_died(small_spec: str, host: VmHost) -> None:
    """By the restarter that Jupyter servers have for each kernel."""
    manager = AsyncIOLoopKernelManager(kernel_name=small_spec)
    await manager.start_kernel(env={**os.environ, **host.env})
    died = manager.provisioner.pid
    try:
        assert cell_of_a_new_client(manager, "held = 'on'; held") == "'on'"
        manager.start_restarter()
        os.kill(died, signal.SIGKILL)
        async with asyncio.timeout(60):
            # None in between, and the server chooses new ports for it: it waits for its file.
            while manager.provisioner.pid in (died, None) or not await manager.is_alive():
                await asyncio.sleep(0.2)
            await asyncio.sleep(1)
        assert cell_of_a_new_client(manager, "'held' in globals()") == "False"
    finally:
        manager.stop_restarter()
        await manager.shutdown_kernel()


def cell_of_a_new_client(manager: AsyncIOLoopKernelManager, code: str) -> str:
    client = Client(manager)
    try:
        return client.run(code).result
    finally:
        client.close()


# --- before there is a VM ---


def test_kernel_info_comes_at_once_without_an_image(
    small_spec: str, host: VmHost, tmp_path: Path
) -> None:
    began = time.monotonic()
    kernel = start_on(host, small_spec, VMKERNEL_IMAGES_DIR=str(tmp_path))
    assert time.monotonic() - began < AT_ONCE
    info = kernel.request("kernel_info_request").reply
    assert info["language_info"]["name"] == "python"
    assert info["protocol_version"] >= "5.4"
    cell = kernel.run("1")
    assert cell.status == "error"
    assert "vmkernel image build minimal" in cell.traceback
    for _ in range(2):  # editors ask these all the time, and need an answer, not a VM
        reply = kernel.request("complete_request", {"code": "zi", "cursor_pos": 2}).reply
        assert reply["matches"] == []
    kernel.shut_down()


def test_kernel_info_comes_at_once_while_a_template_is_built(
    small_spec: str, session_dir: Path
) -> None:
    host = VmHost(session_dir, own_cache=True)
    began = time.monotonic()
    kernel = start_on(host, small_spec)
    assert time.monotonic() - began < AT_ONCE
    cell = kernel.send("1")
    kernel.wait(lambda: "preparing the VM template" in cell.stderr, "progress")
    assert re.search(r"\d+ ?%", cell.stderr)
    info = kernel.ask("kernel_info_request", channel="control")
    began = time.monotonic()
    kernel.finish(info)
    assert time.monotonic() - began < AT_ONCE
    assert info.reply["language_info"]["version"].startswith("3.")
    assert kernel.raw.hb_channel.is_beating()
    # An interrupt, and an end, in the middle of it
    kernel.interrupt()
    assert kernel.finish(cell).reply["ename"] == "KeyboardInterrupt"
    again = kernel.send("1")
    kernel.wait(lambda: "preparing the VM template" in again.stderr, "progress")
    kernel.shut_down()
    seconds_until(lambda: not host.left(), AT_ONCE)
    left = host.left()
    host.clear()
    assert not left
    assert not list(host.cache_dir.glob("templates/*/ram"))


# --- a running kernel's answers ---


def test_kernel_info(kernel: Kernel) -> None:
    kernel.run("1")
    for channel in ("shell", "control"):
        info = kernel.request("kernel_info_request", channel=channel).reply
        assert info["status"] == "ok"
        assert info["implementation"] == "vmsandbox"
        assert info["language_info"]["file_extension"] == ".py"
        assert "microVM" in info["banner"]
        assert info["supported_features"] == ["kernel subshells", "debugger"]


def test_connect_request(kernel: Kernel) -> None:
    reply = kernel.request("connect_request").reply
    info = kernel.manager.get_connection_info()
    for name in ("shell", "iopub", "stdin", "control", "hb"):
        assert reply[f"{name}_port"] == info[f"{name}_port"]


def test_the_heart_beats_while_a_cell_runs(kernel: Kernel) -> None:
    cell = kernel.send("print('begin')\nimport time\nend = time.monotonic() + 4\n"
                       "while time.monotonic() < end: pass")  # fmt: skip
    kernel.wait_output(cell, "begin")
    kernel.raw.hb_channel.unpause()
    for _ in range(3):
        kernel.listen(1)
        assert kernel.raw.hb_channel.is_beating()
    kernel.finish(cell)


def test_usage(kernel: Kernel) -> None:
    usage = kernel.request("usage_request", channel="control").reply
    assert 0 < usage["kernel_memory"] < 512 << 20
    assert usage["host_virtual_memory"]["total"] < 512 << 20  # the guest's


def test_two_clients_share_a_kernel(kernel: Kernel) -> None:
    with kernel.another_client() as other:
        mine, theirs = kernel.send("print('mine')"), other.send("print('theirs')")
        kernel.finish(mine)
        other.finish(theirs)
        assert mine.stdout == "mine\n"
        assert theirs.stdout == "theirs\n"
        # Both hear both, and each got the one reply that is its own.
        kernel.wait(lambda: kernel.of(theirs.msg_id).idle, "the other's outputs")
        other.wait(lambda: other.of(mine.msg_id).idle, "the other's outputs")
        assert kernel.of(theirs.msg_id).stdout == "theirs\n"
        assert other.of(mine.msg_id).stdout == "mine\n"
        assert len(mine.replies) == len(theirs.replies) == 1
        assert not kernel.of(theirs.msg_id).replies
        assert not other.of(mine.msg_id).replies
        assert other.run("1 + 1").result == "2"
    assert kernel.run("1 + 1").result == "2"


def test_a_client_that_leaves_in_the_middle(kernel: Kernel) -> None:
    client = Client(kernel.manager)
    client.raw.wait_for_ready(timeout=60)
    client.send("import time; time.sleep(1); x = 'went on'")
    client.listen(0.3)
    client.close()
    assert kernel.run("x").result == "'went on'"


# --- ways to be started ---


def test_options_that_front_ends_append(small_spec: str) -> None:
    """nbclient does so for every kernel whose language is Python."""
    options = {"extra_arguments": ["--HistoryManager.hist_file=:memory:"]}
    kernel = Kernel(small_spec, **options)
    assert kernel.run("1 + 1").result == "2"
    kernel.shut_down()


@pytest.mark.parametrize("options", [{"transport": "ipc"}, {"transport_encryption": "required"}])
def test_other_transports(small_spec: str, options: dict[str, str]) -> None:
    """Unix sockets, and TCP encrypted by CURVE."""
    manager = KernelManager(kernel_name=small_spec, **options)
    manager.start_kernel(env=dict(os.environ))
    client = Client(manager)
    try:
        encrypted = "curve_publickey" in manager.get_connection_info()
        assert encrypted is ("transport_encryption" in options)
        assert client.run("1 + 1").result == "2"
    finally:
        client.close()
        manager.shutdown_kernel()


def test_environment_that_reaches_the_cell(small_spec: str) -> None:
    kernel = Kernel(
        small_spec, env={"JPY_SESSION_NAME": "/tmp/note.ipynb", "SECRET_TOKEN": "xyzzy"}
    )
    try:
        assert kernel.run("__session__").result == "'/tmp/note.ipynb'"
        assert kernel.run("import os; 'xyzzy' in str(os.environ)").result == "False"
    finally:
        kernel.shut_down()
