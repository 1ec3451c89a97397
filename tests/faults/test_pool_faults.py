"""The pool, with anything killed or stopped at any moment: kernels go on, and nothing is left.

Everything is real: server, members, launchers, VMs, SIGKILL and SIGSTOP.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from kernel_client import Kernel

from vmhost import VmHost, seconds_until
from vmkernel.host.registry import Registry, VmRecord

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PROMISED = 1.0
"""Seconds within which a death has had its effect."""
SOON = 20.0
ROUNDS = 12
ROOT = Path(__file__).parents[2]


class PoolHost(VmHost):
    """A host with a pool."""

    def __init__(self, session_dir: Path) -> None:
        super().__init__(session_dir)
        self.env["VMKERNEL_POOL_SIZE"] = "1"

    def fill(self, spec: str) -> psutil.Process:
        """Have a kernel ready; the server."""
        done = self.cli("pool", "fill", "--kernel", spec)
        assert done.returncode == 0, done.stderr
        return self.server()

    def pool(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cli("pool", "status", "--json").stdout)
        return found

    def ready(self) -> int:
        return int(self.pool()["ready"])

    def server(self) -> psutil.Process:
        (server,) = self.pool()["servers"]
        return psutil.Process(server["pid"])

    def vms(self, task: str = "") -> list[VmRecord]:
        """VMs that live: those that wait ("pool"), or those that are a kernel's ("")."""
        with Registry(self.settings()) as registry:
            found = [vm.record for vm in registry.list() if vm.runner_alive and vm.qemu_alive]
        return [record for record in found if record.task_id == task]

    def waiting(self) -> VmRecord:
        (record,) = self.vms("pool")
        return record


def from_pool(kernel: Kernel) -> bool:
    return psutil.Process(kernel.pid).exe().endswith(("sh", "busybox"))


def end(kernel: Kernel) -> None:
    kernel.close()
    kernel.manager.shutdown_kernel(now=not kernel.manager.is_alive())


@pytest.fixture
def host(session_dir: Path, spec: str) -> Iterator[PoolHost]:
    """A host with a kernel that waits; nothing is left on it at the end."""
    host = PoolHost(session_dir)
    host.fill(spec)
    yield host
    host.cli("pool", "stop")
    gone = seconds_until(lambda: not host.left(), SOON)
    left = host.left()
    host.clear()
    assert gone < SOON, left


@pytest.fixture
def kernel(host: PoolHost, spec: str) -> Iterator[Kernel]:
    """A kernel that was handed over."""
    kernel = Kernel(spec, env=host.env)
    assert from_pool(kernel)
    yield kernel
    end(kernel)


def test_a_killed_server_takes_what_waits_along_and_nothing_else(
    kernel: Kernel, host: PoolHost, spec: str
) -> None:
    kernel.run("x = 5")
    server = host.fill(spec)
    assert len(host.qemus()) == 2
    server.kill()
    assert seconds_until(lambda: len(host.qemus()) == 1, SOON) < PROMISED
    assert kernel.run("x").result == "5"
    # Its socket is still there: who comes next starts by itself, and begins a new pool
    following = Kernel(spec, env=host.env)
    assert not from_pool(following)
    assert following.run("6 * 7").result == "42"
    assert seconds_until(lambda: bool(host.ready()), SOON) < SOON
    end(following)
    assert kernel.run("x").result == "5"


def test_a_server_that_hangs_keeps_nobody_waiting(host: PoolHost, spec: str) -> None:
    server = host.server()
    server.suspend()
    try:
        begun = time.monotonic()
        kernel = Kernel(spec, env=host.env)
        assert not from_pool(kernel)
        assert kernel.run("1").result == "1"
        assert time.monotonic() - begun < SOON
    finally:
        server.resume()
    end(kernel)
    assert seconds_until(lambda: bool(host.ready()), SOON) < SOON
    kernel = Kernel(spec, env=host.env)
    assert from_pool(kernel)
    assert kernel.run("1").result == "1"
    end(kernel)


def test_a_member_that_hangs_is_not_waited_for(host: PoolHost, spec: str) -> None:
    member = psutil.Process(host.waiting().runner_pid)
    member.suspend()
    kernel = Kernel(spec, env=host.env)
    assert not from_pool(kernel)
    assert kernel.run("2").result == "2"
    kernel.manager.restart_kernel()  # who does not answer must not have its ports
    kernel.wait_ready()
    assert kernel.run("3").result == "3"
    member.resume()
    # It finds that its launcher has gone, and ends
    assert seconds_until(lambda: not member.is_running(), SOON) < SOON
    end(kernel)


@pytest.mark.parametrize("which", ["member", "VM"])
def test_one_that_died_is_replaced_and_never_handed_out(
    host: PoolHost, spec: str, which: str
) -> None:
    waiting = host.waiting()
    os.kill(waiting.runner_pid if which == "member" else waiting.qemu_pid, signal.SIGKILL)
    kernel = Kernel(spec, env=host.env)  # at once: perhaps nobody has noticed yet
    assert kernel.run("3").result == "3"
    assert waiting.vm_id not in {record.vm_id for record in host.vms()}
    end(kernel)
    assert seconds_until(lambda: bool(host.ready()), SOON) < SOON
    assert host.waiting().vm_id != waiting.vm_id


def test_launchers_killed_at_any_moment_leave_nothing(
    host: PoolHost, spec: str, tmp_path: Path
) -> None:
    chance = random.Random(20_26)
    for number in range(ROUNDS):
        host.fill(spec)
        manager_file = tmp_path / f"kernel-{number}.json"
        _write_connection_file(manager_file)
        launcher = subprocess.Popen(
            [*_argv(spec), "-f", str(manager_file)],
            env={**os.environ, **host.env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(0, 0.1 if number % 2 else 0.02))
        launcher.kill()
        launcher.wait()
        assert seconds_until(lambda: not host.vms(), SOON) < SOON, f"round {number}"
    assert seconds_until(lambda: len(host.qemus()) <= 1, SOON) < SOON


def test_a_kernel_whose_process_died_is_told_to_the_front_end(
    kernel: Kernel, host: PoolHost
) -> None:
    kernel.run("1")
    (record,) = host.vms()
    os.kill(record.runner_pid, signal.SIGKILL)
    assert kernel.manager.provisioner.process.wait(PROMISED) == 1
    assert seconds_until(lambda: record.qemu_pid not in host.qemus(), SOON) < PROMISED


def test_a_vm_that_dies_after_the_hand_over_costs_its_state_only(
    kernel: Kernel, host: PoolHost
) -> None:
    kernel.run("x = 1")
    (record,) = host.vms()
    os.kill(record.qemu_pid, signal.SIGKILL)
    assert seconds_until(lambda: not psutil.pid_exists(record.qemu_pid), SOON) < PROMISED
    kernel.run("pass")  # it may be the one that finds it out
    assert kernel.run("'x' in globals()").result == "False"


def test_two_at_once_for_one_that_waits(host: PoolHost, spec: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        kernels = list(pool.map(lambda _: Kernel(spec, env=host.env), range(3)))
    drawn = {kernel.run("import os; os.urandom(8).hex()").result for kernel in kernels}
    for kernel in kernels:
        end(kernel)
    assert len(drawn) == 3


def test_what_waits_gives_its_slot_to_who_waits_for_one(session_dir: Path, spec: str) -> None:
    host = PoolHost(session_dir)
    host.env["VMKERNEL_MAX_CONCURRENT_VMS"] = "1"
    host.fill(spec)
    assert host.slots().free == 0
    kernel = Kernel(spec, env={**host.env, "VMKERNEL_POOL_SIZE": "0"})
    try:
        assert kernel.run("4").result == "4"
        assert not host.vms("pool")
    finally:
        end(kernel)
        host.cli("pool", "stop")
    assert seconds_until(lambda: not host.left(), SOON) < SOON


def test_a_kernel_that_was_killed_leaves_its_ports_at_once(
    kernel: Kernel, host: PoolHost, spec: str
) -> None:
    for number in range(3):
        host.fill(spec)
        kernel.run(f"x = {number}")
        kernel.manager.restart_kernel(now=True)
        kernel.wait_ready()
        assert from_pool(kernel)
        assert kernel.run("'x' in globals()").result == "False"


def test_who_has_other_limits_starts_by_itself(host: PoolHost, spec: str) -> None:
    """A kernel of the pool has the server's: what holds for a front end is not lost by it."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))

    for limit in (lambda: os.nice(5), limit_files):
        kernel = Kernel(spec, env=host.env, preexec_fn=limit)
        assert not from_pool(kernel)
        assert kernel.run("5").result == "5"
        end(kernel)
    assert host.ready() == 1


def test_the_server_keeps_no_secrets(
    session_dir: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = PoolHost(session_dir)
    monkeypatch.setenv("SECRET_TOKEN", "of the first notebook")
    server = host.fill(spec)
    waiting = psutil.Process(host.waiting().runner_pid)
    assert "SECRET_TOKEN" not in server.environ() | waiting.environ()
    host.cli("pool", "stop")
    assert seconds_until(lambda: not host.left(), SOON) < SOON


def test_new_code_on_disk_retires_the_pool(session_dir: Path, tmp_path: Path) -> None:
    """A copy of vmkernel with a pool of its own, which is then changed as an upgrade changes it."""
    for name in ("vmkernel", "images", "kernelspec"):
        shutil.copytree(ROOT / name, tmp_path / name)
    host = PoolHost(session_dir)
    host.env["PYTHONPATH"] = str(tmp_path)
    host.env["JUPYTER_DATA_DIR"] = str(tmp_path / "data")  # its kernelspec has the copy's launcher
    assert host.cli("install", "--name", "copy").returncode == 0
    server = host.fill("copy")
    assert "vmkernel.pool" in server.cmdline()
    (tmp_path / "vmkernel" / "new.py").write_text('"""New."""\n')
    time.sleep(1.1)  # it looks once a second
    launcher = str(tmp_path / "vmkernel" / "pool" / "launcher.py")
    connection_file = tmp_path / "kernel-1.json"
    _write_connection_file(connection_file)
    process = subprocess.Popen(
        [sys.executable, "-S", "-P", launcher, "-f", str(connection_file)],
        env={**os.environ, **host.env},
    )
    assert seconds_until(lambda: not server.is_running(), SOON) < SOON
    process.kill()
    process.wait()
    host.cli("pool", "stop")
    assert seconds_until(lambda: not host.left(), SOON) < SOON


def _argv(spec: str) -> list[str]:
    from vmkernel.cli.install import installed_kernelspecs

    argv = json.loads((installed_kernelspecs()[spec] / "kernel.json").read_text())["argv"]
    return list(argv[: argv.index("-f")])


def _write_connection_file(path: Path) -> None:
    from jupyter_client.connect import write_connection_file

    write_connection_file(str(path))
