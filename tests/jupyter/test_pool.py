"""Kernels that waited for a front end: they are as any other, and nobody mixes them up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from kernel_client import Kernel

from network_rig import PackageIndex
from vmhost import VmHost, seconds_until
from vmkernel.host.registry import Registry, VmRecord

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

AT_ONCE = 5.0
POOL = {"VMKERNEL_POOL_SIZE": "1"}


class PoolHost(VmHost):
    """A host with a pool."""

    def kernels(self) -> list[VmRecord]:
        """What is on record of VMs that are a kernel's by now."""
        with Registry(self.settings()) as registry:
            return [vm.record for vm in registry.list() if vm.record.kernel_id]

    def fill(self, spec: str, **env: str) -> None:
        done = self.cli("pool", "fill", "--kernel", spec, **POOL, **env)
        assert done.returncode == 0, done.stderr

    def pool(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cli("pool", "status", "--json").stdout)
        return found

    def server(self) -> psutil.Process:
        (server,) = self.pool()["servers"]
        return psutil.Process(server["pid"])

    def kernel(self, spec: str, **env: str) -> Kernel:
        """A kernel that was handed over; this host's environment, and the pool's."""
        kernel = Kernel(spec, env={**self.env, **POOL, **env})
        assert is_shell(kernel), "it was started from the beginning"
        return kernel


def is_shell(kernel: Kernel) -> bool:
    """Whether the front end's process is the shell that stands for a kernel of the pool."""
    return psutil.Process(kernel.pid).exe().endswith(("sh", "busybox"))


def status_of(kernel: Kernel) -> int:
    """The exit status of the front end's process, which ends."""
    status: int = kernel.manager.provisioner.process.wait(AT_ONCE)
    return status


@pytest.fixture(scope="module")
def host(session_dir: Path, small_spec: str) -> Iterator[PoolHost]:
    host = PoolHost(session_dir)
    host.env["VMKERNEL_OUTPUTS"] = "trusted"  # comms of no widget
    yield host
    host.cli("pool", "stop")
    left = seconds_until(lambda: not host.left(), AT_ONCE) >= AT_ONCE and host.left()
    host.clear()
    assert not left


@pytest.fixture
def ready(host: PoolHost, small_spec: str) -> PoolHost:
    """The host, with a kernel that waits."""
    host.fill(small_spec)
    return host


@pytest.fixture
def kernel(ready: PoolHost, small_spec: str) -> Iterator[Kernel]:
    """A kernel from the pool."""
    kernel = ready.kernel(small_spec)
    yield kernel
    kernel.shut_down()


def test_it_is_a_kernel_as_any_other(kernel: Kernel, host: PoolHost) -> None:
    assert kernel.run("1 + 1").result == "2"
    assert kernel.run("Out, _").result == "({1: 2}, 2)"  # and nothing that it ran before
    cell = kernel.send("print(input('name? '))", allow_stdin=True)
    assert kernel.wait_question(cell)["prompt"] == "name? "
    kernel.raw.input("Ada")
    assert kernel.finish(cell).stdout == "Ada\n"
    assert kernel.run("1 / 0").error["ename"] == "ZeroDivisionError"
    opened = kernel.run("from comm import create_comm; c = create_comm('t'); c.send({'a': 1})")
    assert opened.types[-2:] == ["comm_open", "comm_msg"]
    assert kernel.request("complete_request", {"code": "prin", "cursor_pos": 4}).reply["matches"]


def test_interrupt_by_message_and_by_signal(kernel: Kernel) -> None:
    for interrupt in (kernel.interrupt, lambda: os.kill(kernel.pid, signal.SIGINT)):
        cell = kernel.send("print('begin')\nwhile True: pass")
        kernel.wait_output(cell, "begin")
        interrupt()
        assert kernel.finish(cell, 20).error["ename"] == "KeyboardInterrupt"
    os.kill(kernel.pid, signal.SIGINT)  # when idle it does nothing
    assert kernel.run("1").result == "1"


def test_it_has_what_its_launcher_had(ready: PoolHost, small_spec: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    env = {"JPY_SESSION_NAME": "/notes/mine.ipynb", "COLUMNS": "77", "TZ": "Asia/Tokyo"}
    with (tmp_path / "stderr").open("w") as stderr:
        kernel = Kernel(small_spec, env={**ready.env, **POOL, **env}, cwd=str(work), stderr=stderr)
    try:
        assert is_shell(kernel)
        code = "import os, time; os.environ['COLUMNS'], time.tzname[0], os.environ.get('PATH')"
        assert kernel.run(code).result.startswith("('77', 'JST', ")
        (record,) = ready.kernels()
        wrapper = psutil.Process(record.runner_pid)
        assert wrapper.cwd() == str(work)
        assert Path(f"/proc/{wrapper.pid}/fd/2").readlink() == tmp_path / "stderr"
        assert record.connection_file == kernel.manager.connection_file
        shown = json.loads(ready.cli("ps", "--json").stdout)["vms"]
        assert [vm["notebook"] for vm in shown if vm["kernel_id"]] == ["mine.ipynb"]
    finally:
        kernel.shut_down()


def test_a_network_goes_with_the_hand_over(host: PoolHost, small_spec: str) -> None:
    """It is opened while the kernel waits; the index is that of who takes it."""
    index = PackageIndex()
    try:
        host.fill(small_spec, VMKERNEL_NETWORK="packages")
        env = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index.url}
        kernel = host.kernel(small_spec, VMKERNEL_NETWORK="packages", **env)
        try:
            url = "http://packages.vmkernel/simple/vmkpkg/"
            code = f"import urllib.request as u; print(u.urlopen({url!r}).read().decode())"
            cell = kernel.run(code)
            assert index.file in cell.stdout, cell.traceback
        finally:
            kernel.shut_down()
    finally:
        index.close()


def test_twins_from_the_pool_differ(host: PoolHost, small_spec: str) -> None:
    said = []
    for _ in range(2):
        host.fill(small_spec)
        kernel = host.kernel(small_spec)
        cell = kernel.run(
            "import random, os, time; print(random.random(), os.urandom(8).hex(), time.time())"
        )
        *drawn, clock = cell.stdout.split()
        assert abs(float(clock) - time.time()) < 1
        said.append(drawn)
        kernel.shut_down()
    assert not set(said[0]) & set(said[1])


def test_shutdown_and_the_ways_to_end(host: PoolHost, small_spec: str) -> None:
    def ended(how: str) -> int:
        host.fill(small_spec)
        kernel = host.kernel(small_spec)
        kernel.run("1")
        if how == "shutdown":
            kernel.ask("shutdown_request", {"restart": False}, channel="control")
        elif how == "exit()":
            kernel.send("exit()")
        else:
            os.kill(kernel.pid, getattr(signal, how))
        status = status_of(kernel)
        (record,) = host.kernels() or [None]
        assert (
            record is None
            or seconds_until(lambda: not psutil.pid_exists(record.runner_pid), AT_ONCE) < AT_ONCE
        )
        kernel.shut_down()
        return status

    assert [ended(how) for how in ("shutdown", "exit()", "SIGTERM")] == [0, 0, 0]
    assert [ended(how) for how in ("SIGKILL", "SIGHUP")] == [-9, -1]


def test_restart_takes_one_that_waits(ready: PoolHost, small_spec: str) -> None:
    kernel = ready.kernel(small_spec)
    try:
        kernel.run("x = 1")
        assert seconds_until(lambda: ready.pool()["ready"] == 1, 20) < 20
        kernel.manager.restart_kernel()
        kernel.wait_ready()
        assert is_shell(kernel)
        assert kernel.run("'x' in globals()").result == "False"
    finally:
        kernel.shut_down()


def test_another_setting_gets_another_kernel(ready: PoolHost, small_spec: str) -> None:
    """One that waits for other settings is not handed out; the pool starts one for these."""
    kernel = ready.kernel(small_spec, VMKERNEL_LIFETIME="1h")
    try:
        assert "lifetime      1 h" in kernel.run("%vm").stdout
        assert ready.pool()["ready"] >= 1  # the old one; there may be one of these settings by now
    finally:
        kernel.shut_down()
    direct = Kernel(small_spec, env={**ready.env, "VMKERNEL_POOL_SIZE": "0"})
    try:
        assert not is_shell(direct)
        assert direct.run("2").result == "2"
    finally:
        direct.shut_down()


def test_a_first_kernel_fills_the_pool(session_dir: Path, small_spec: str) -> None:
    host = PoolHost(session_dir)
    kernel = Kernel(small_spec, env={**host.env, **POOL, "VMKERNEL_POOL_LINGER": "1"})
    try:
        assert not is_shell(kernel)
        assert kernel.run("1").result == "1"
        assert seconds_until(lambda: host.pool()["ready"] == 1, 20) < 20
        server = host.server()
        host.kernel(small_spec, VMKERNEL_POOL_LINGER="1").shut_down()
    finally:
        kernel.shut_down()
    # and goes when the last kernel has gone
    assert seconds_until(lambda: not server.is_running(), 20) < 20
    assert seconds_until(lambda: not host.left(), AT_ONCE) < AT_ONCE
    host.clear()


def test_one_that_dies_with_its_front_end(ready: PoolHost, small_spec: str, tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from kernel_client import Kernel\n"
        f"kernel = Kernel({small_spec!r})\n"
        "kernel.run('1')\n"
        "print(kernel.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    import sys

    front_end = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, **ready.env, **POOL},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert front_end.stdout is not None
        shell = psutil.Process(int(front_end.stdout.readline()))
        (record,) = ready.kernels()
    finally:
        front_end.kill()
        front_end.wait()
    assert seconds_until(lambda: not shell.is_running(), 30) < AT_ONCE
    assert seconds_until(lambda: not psutil.pid_exists(record.runner_pid), 30) < AT_ONCE


def test_a_kernel_of_another_language_is_forked_only(host: PoolHost, bash_kernel: str) -> None:
    """Its environment cannot be given to it later, so none waits."""
    host.fill(bash_kernel, VMKERNEL_RECIPE="bash")
    stocks = host.pool()["servers"][0]["stocks"]
    assert [stock["ready"] for stock in stocks if stock["recipe"] == "bash"] == [0]
    kernel = host.kernel(bash_kernel, VMKERNEL_RECIPE="bash", COLUMNS="66")
    try:
        assert kernel.run("echo $COLUMNS").stdout == "66\n"
    finally:
        kernel.shut_down()
