"""The provisioner, from a front end's side: one real Ray head, VM hosts, real VMs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from jupyter_client.manager import KernelManager

from localray import LocalRay
from vmhost import RunningVm, VmHost, seconds_until
from vmkernel.cluster import driver as driver_module
from vmkernel.cluster.driver import Driver
from vmkernel.cluster.placement import Cluster
from vmkernel.errors import VmError
from vmkernel.settings import Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

SLOTS = 2
PATIENCE = 60


@pytest.fixture(scope="module")
def ray(session_dir: Path, cluster_spec: str) -> Iterator[LocalRay]:
    """A head without VM slots; its token is in this process's environment."""
    with LocalRay(session_dir) as ray, pytest.MonkeyPatch.context() as patch:
        for name, value in ray.env.items():
            patch.setenv(name, value)
        yield ray
        if Driver._instance is not None:
            Driver._instance.stop()


@pytest.fixture(scope="module")
def host(ray: LocalRay, session_dir: Path) -> Iterator[VmHost]:
    """A VM host of two slots that is part of the cluster."""
    host = VmHost(session_dir)
    node = ray.join(SLOTS, host.env)
    yield host
    ray.end(node)
    assert seconds_until(lambda: not host.qemus(), 10) is not None


def _of(message: dict[str, Any], cell: str) -> bool:
    """Whether it came for this cell; the manager's own requests may have the same ids."""
    parent = message["parent_header"]
    return (parent.get("msg_type"), parent.get("msg_id")) == ("execute_request", cell)


class Kernel:
    """A kernel manager, and a client that says what a cell shows."""

    def __init__(self, name: str) -> None:
        self.manager = KernelManager(kernel_name=name)
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()

    def run(self, code: str, seconds: float = PATIENCE) -> str:
        """What it prints; its error's name and message when it fails."""
        return self.result(self.client.execute(code), seconds)

    def result(self, msg_id: str, seconds: float = PATIENCE) -> str:
        shown = []
        deadline = time.monotonic() + seconds
        while True:
            message = self.client.get_iopub_msg(timeout=max(0.0, deadline - time.monotonic()))
            if not _of(message, msg_id):
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                shown.append(content["text"])
            elif message["msg_type"] == "clear_output":
                shown.clear()
            elif message["msg_type"] == "error":
                shown.append(f"{content['ename']}: {content['evalue']}")
            elif content.get("execution_state") == "idle":
                return "".join(shown)

    def shows(self, msg_id: str, what: str, seconds: float) -> bool:
        """Whether a cell shows this, while it waits."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            message = self.client.get_iopub_msg(timeout=left)
            if _of(message, msg_id) and what in str(message["content"].get("text", "")):
                return True
        return False

    def close(self, now: bool = False) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=now)


@pytest.fixture
def spec(ray: LocalRay, cluster_spec: str) -> Callable[..., str]:
    """``spec(cluster_wait="2")``: a kernelspec of the cluster with these settings."""
    from vmkernel.cli.install import install_kernelspec

    def make(**options: str) -> str:
        name = "-".join(["vmsandbox-ray", *options.values()]).replace(":", "-")
        install_kernelspec(
            Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels",
            name=name,
            options={"cluster_address": ray.address, **options},
            on_hosts=cluster_spec,
        )
        return name

    return make


@pytest.fixture
def start(spec: Callable[..., str]) -> Iterator[Callable[..., Kernel]]:
    """``start(**settings)``: a kernel of the cluster, which is ended."""
    kernels: list[Kernel] = []

    def make(**options: str) -> Kernel:
        kernels.append(Kernel(spec(**options)))
        return kernels[-1]

    yield make
    for kernel in kernels:
        kernel.close(now=True)


def reserved(ray: LocalRay) -> int:
    """How many slots Ray has given away."""
    instance = Driver._instance
    assert instance is not None

    async def look() -> int:
        cluster = await instance.cluster(Settings(cluster_address=ray.address))
        slots = await cluster.ask("slots")
        return int(slots["total"] - slots["free"])

    return instance.submit(look()).result(20)


def actor_pid(ray: LocalRay) -> int:
    """The process of the host's actor."""
    instance = Driver._instance
    assert instance is not None

    async def look() -> int:
        cluster = await instance.cluster(Settings(cluster_address=ray.address))
        host = next(host for host in await cluster.hosts() if host.facts.alive)
        return int((await host.ready())["pid"])

    return instance.submit(look()).result(60)


def test_a_cell_waits_for_the_first_host_to_join(ray, start, request):
    kernel = start()
    began = time.monotonic()
    cell = kernel.client.execute("print(6 * 7)")
    if ray.hosts == 0:  # else another test came first
        assert kernel.shows(cell, "it has no VM host yet", 30)
    host = request.getfixturevalue("host")
    assert kernel.result(cell) == "42\n"
    assert len(host.qemus()) == 1
    print(f"after {time.monotonic() - began:.1f} s")


def test_start_run_interrupt_restart_shutdown(ray, host, start):
    kernel = start()
    assert kernel.run("x = 1; print(x)") == "1\n"
    began = time.monotonic()
    cell = kernel.client.execute("import time\nprint('busy', flush=True)\ntime.sleep(60)")
    assert kernel.shows(cell, "busy", PATIENCE)
    kernel.manager.interrupt_kernel()
    assert kernel.result(cell) == "KeyboardInterrupt: "
    assert time.monotonic() - began < 20
    ports = kernel.manager.ports
    for now in (False, True):
        kernel.manager.restart_kernel(now=now)
        assert kernel.run("print('x' in dir())") == "False\n"
        assert kernel.run("x = 1") == ""
        assert kernel.manager.ports == ports
        assert seconds_until(lambda: len(host.qemus()) == 1, 5) is not None
    assert reserved(ray) == 1
    began = time.monotonic()
    kernel.close()
    assert time.monotonic() - began < 3
    assert not kernel.manager.is_alive()
    assert seconds_until(lambda: not host.left() and not reserved(ray), 5) is not None


def test_the_next_one_waits_and_starts_when_one_ends(ray, host, start):
    kernels = [start() for _ in range(SLOTS)]
    assert [kernel.run("print(1)") for kernel in kernels] == ["1\n"] * SLOTS
    waiting = start()
    cell = waiting.client.execute("print('at last')")
    assert waiting.shows(cell, f"{SLOTS} of {SLOTS} taken on 1 host", 15)
    assert waiting.manager.is_alive()
    # An interrupt ends the wait of the cell, not that of the kernel
    waiting.manager.interrupt_kernel()
    assert "KeyboardInterrupt" in waiting.result(cell)
    cell = waiting.client.execute("print('at last')")
    kernels[0].close()
    assert waiting.result(cell) == "at last\n"
    assert len(host.qemus()) == SLOTS
    assert reserved(ray) == SLOTS


def test_ps_shows_hosts_kernels_and_who_waits(ray, host, start):
    kernels = [start() for _ in range(SLOTS)]
    assert [kernel.run("print(1)") for kernel in kernels] == ["1\n"] * SLOTS
    waiting = start()
    waiting.client.execute("print(1)")
    assert seconds_until(lambda: reserved(ray) == SLOTS, 10) is not None

    def ps(*words: str) -> str:
        done = host.cli("ps", "--cluster", *words, VMKERNEL_CLUSTER_ADDRESS=ray.address)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = json.loads(ps("--json"))
    assert told["slots"] == {"total": SLOTS, "free": 0}
    assert told["waiting"] == [waiting.manager.kernel_id]
    (there,) = told["hosts"]
    assert (there["ip"], there["slots"], there["problem"]) == (ray.ip, SLOTS, "")
    assert there["vms"] == {"limit": SLOTS, "used": SLOTS}
    assert {k["kernel_id"] for k in there["kernels"]} == {k.manager.kernel_id for k in kernels}
    table = ps()
    assert all(kernel.manager.kernel_id in table for kernel in kernels)
    assert f"VM slots of the cluster: {SLOTS} of {SLOTS} taken, 1 kernel waits" in table


def test_the_wait_has_a_limit_and_the_next_cell_tries_again(ray, host, start):
    kernels = [start() for _ in range(SLOTS)]
    assert [kernel.run("print(1)") for kernel in kernels] == ["1\n"] * SLOTS
    waiting = start(cluster_wait="4s")
    told = waiting.run("print(1)")
    assert told.startswith("VmCapacityError: No VM slot became free in the cluster within 4 s")
    assert waiting.manager.is_alive()
    cell = waiting.client.execute("print('now')")
    assert waiting.shows(cell, "waiting for a VM slot", 10)
    kernels[0].close()
    assert waiting.result(cell) == "now\n"


def test_a_reservation_that_is_cancelled_at_any_moment_is_given_back(ray, host, start):
    start().run("print(1)")
    instance = Driver._instance
    assert instance is not None

    async def cancel() -> Any:
        cluster = await instance.cluster(Settings(cluster_address=ray.address))
        for milliseconds in (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 25, 50):
            for name in ("a", "b"):  # one is granted, the other waits
                task = asyncio.create_task(cluster.reserve(f"{name}{milliseconds}"))
                await asyncio.sleep(milliseconds / 1000)
                if not task.cancel():
                    await task.result().release()
                await asyncio.wait([task])
        await asyncio.sleep(1)
        return await cluster.ask("waiting")

    assert instance.submit(cancel()).result(30) == []
    assert seconds_until(lambda: reserved(ray) == 1, 5) is not None


def test_shutdown_while_it_waits_leaves_nothing(ray, host, start, monkeypatch):
    kernels = [start() for _ in range(SLOTS)]
    assert [kernel.run("print(1)") for kernel in kernels] == ["1\n"] * SLOTS
    for now in (False, True):
        waiting = start()
        waiting.client.execute("print(1)")
        time.sleep(0.5)
        waiting.close(now=now)
        assert not waiting.manager.is_alive()
    monkeypatch.setattr(driver_module, "LINGER", 0.2)
    for kernel in kernels:
        kernel.close()
    assert seconds_until(lambda: Driver._instance is None, 5) is not None
    assert seconds_until(lambda: "vmkernel-driver" not in _threads(), 5) is not None
    assert not placers()
    assert seconds_until(lambda: not host.left(), 5) is not None


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


DRIVER = """
import sys
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name=sys.argv[1])
manager.start_kernel()
client = manager.client()
client.start_channels()
client.execute_interactive("print(1)", timeout=60)
print("up", flush=True)
sys.stdin.read()
"""


def test_a_killed_driver_leaves_the_kernel_to_its_lease(ray, host, spec):
    command = [sys.executable, "-c", DRIVER, spec(cluster_lease="4s")]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert driver.stdout is not None
        while driver.stdout.readline() != b"up\n":
            assert driver.poll() is None
        assert len(host.qemus()) == 1
        time.sleep(5)  # the lease is renewed
        assert len(host.qemus()) == 1
    finally:
        driver.kill()
        driver.wait()
    gone = seconds_until(lambda: not host.qemus(), 4 + 4)
    assert gone is not None
    print(f"gone after {gone:.1f} s")


async def test_a_killed_actor_is_told_and_the_restarter_brings_a_new_kernel(ray, host, spec):
    manager = AsyncIOLoopKernelManager(kernel_name=spec())
    await manager.start_kernel()
    restarts = asyncio.Event()
    manager.add_restart_callback(restarts.set, "restart")
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=PATIENCE)
        pid = await asyncio.to_thread(actor_pid, ray)
        cell = client.execute("import time; print('busy', flush=True); time.sleep(100)")
        while (await client.get_iopub_msg(timeout=PATIENCE))["content"].get("text") != "busy\n":
            pass
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        reply = await client.get_shell_msg(timeout=10)
        while reply["parent_header"]["msg_id"] != cell:
            reply = await client.get_shell_msg(timeout=10)
        print(f"told after {time.monotonic() - began:.1f} s")
        assert reply["content"]["ename"] == "VmHostLostError"
        assert time.monotonic() - began < 10
        await asyncio.wait_for(restarts.wait(), 10)
        status = ""
        while status != "ok":  # what comes before it is restarted is told of the loss
            assert time.monotonic() - began < 30
            done = await client.execute_interactive("print(1)", timeout=30, output_hook=_none)
            status = done["content"]["status"]
            await asyncio.sleep(0.2)
        print(f"another kernel after {time.monotonic() - began:.1f} s")
        assert seconds_until(lambda: len(host.qemus()) == 1, 10) is not None
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


def _none(message: dict[str, Any]) -> None:
    """Whatever it shows."""


def test_a_kernel_that_dies_alone_is_an_error_and_restarts_where_it_was(ray, host, start):
    kernel = start()
    assert kernel.run("print(1)") == "1\n"
    cell = kernel.client.execute("import time; print('busy', flush=True); time.sleep(100)")
    assert kernel.shows(cell, "busy", PATIENCE)
    wrappers = [p for p in psutil.process_iter() if _is_wrapper(p, host)]
    assert len(wrappers) == 1, [(p, p.cmdline(), p.ppid()) for p in wrappers]
    wrappers[0].kill()
    assert kernel.result(cell, 10).startswith("VmGuestError: The kernel on ")
    assert seconds_until(lambda: not kernel.manager.is_alive(), 5) is not None
    assert reserved(ray) == 1  # kept for a moment
    kernel.manager.restart_kernel()
    assert kernel.run("print(2)") == "2\n"


def _is_wrapper(process: psutil.Process, host: VmHost) -> bool:
    try:
        return (
            "-f" in process.cmdline()
            and process.environ().get("VMKERNEL_RUNTIME_DIR") == str(host.runtime_dir)
            and any(word.endswith("launcher.py") for word in process.cmdline())
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_a_host_without_a_slot_after_all_is_asked_again(ray, host, start):
    """VMs that Ray does not count: the semaphore file is the truth."""

    async def occupied() -> tuple[Kernel, str]:
        settings = host.settings(VMKERNEL_MAX_CONCURRENT_VMS=str(SLOTS))
        async with RunningVm(settings), RunningVm(settings):
            kernel = start()
            cell = kernel.client.execute("print('after all')")
            assert await asyncio.to_thread(kernel.shows, cell, "trying again", 30)
            assert len(host.qemus()) == SLOTS
            return kernel, cell

    kernel, cell = asyncio.run(occupied())
    assert kernel.result(cell) == "after all\n"


def test_the_process_that_speaks_with_ray_may_die(ray, host, start):
    kernel = start()
    assert kernel.run("x = 1") == ""
    (placer,) = placers()
    placer.kill()
    time.sleep(6)  # it is missed, and there is another one
    assert kernel.run("print(x)") == "1\n"
    assert placers() != [placer]
    assert seconds_until(lambda: reserved(ray) == 1, 10) is not None
    assert kernel.manager.is_alive()


def placers() -> list[psutil.Process]:
    """The children that speak with Ray."""
    children = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in children if "placer" in " ".join(p.cmdline())]


def test_a_process_that_was_forked_off_has_nothing_of_it(ray, host, start):
    kernel = start()
    assert kernel.run("x = 1") == ""
    (placer,) = placers()
    child = os.fork()
    if child == 0:
        time.sleep(1)
        mine = Driver._instance is None and Driver.get().submit(_answer()).result(5) == 42
        os._exit(0 if mine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert kernel.run("print(x)") == "1\n"
    assert placers() == [placer]


async def _answer() -> int:
    return 42


def test_a_front_end_that_encrypts_is_heard(ray, host, spec):
    manager = KernelManager(kernel_name=spec(), transport_encryption="required")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        reply = client.execute_interactive("print(1)", timeout=PATIENCE, output_hook=_none)
        assert reply["content"]["status"] == "ok"
        assert json.loads(Path(manager.connection_file).read_text())["curve_publickey"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_process_that_ends_without_a_shutdown_ends_its_kernels(ray, host, spec):
    script = DRIVER.replace("sys.stdin.read()", "")
    done = subprocess.run([sys.executable, "-c", script, spec()], timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert not host.qemus()


def test_another_process_takes_the_kernel_over(ray, host, start):
    kernel = start()
    assert kernel.run("x = 41") == ""
    assert kernel.manager.provisioner is not None
    manager = kernel.manager
    info = asyncio.run(manager.provisioner.get_provisioner_info())
    json.dumps({**info, "connection_info": None})
    # As after the end of its process: nobody listens on its ports any more, nothing is released
    instance = Driver._instance
    assert instance is not None
    old = manager.provisioner._kernel

    async def drop() -> None:
        old._running.link.remove(old._running.name)
        await old._relay.close()
        await old._search.give_back()
        old._running = old._relay = None
        instance.leave(old)

    instance.submit(drop()).result(10)
    from vmkernel.cluster.provisioner import RayProvisioner

    heir = RayProvisioner(
        kernel_id=manager.kernel_id, kernel_spec=manager.kernel_spec, parent=manager,
        **manager.kernel_spec.metadata["kernel_provisioner"]["config"],
    )  # fmt: skip
    asyncio.run(heir.load_provisioner_info(info))
    manager.provisioner = heir
    while kernel.client.get_iopub_msg(timeout=10)["msg_type"] != "iopub_welcome":
        pass  # of the front end's own connection, which ZeroMQ makes anew
    assert kernel.run("print(x + 1)") == "42\n"
    assert seconds_until(lambda: reserved(ray) == 1, 5) is not None


@pytest.mark.parametrize(
    ("changes", "address", "told"),
    [
        ({"RAY_AUTH_TOKEN": "w" * 40}, "", "refuses this host's token"),
        ({"RAY_AUTH_MODE": "disabled"}, "", "refuses this host's token"),
        ({}, "127.0.0.1:9", "No Ray cluster answers at 127.0.0.1:9"),
    ],
)
def test_why_a_cluster_cannot_be_joined(ray, monkeypatch, changes, address, told):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    settings = Settings(cluster_address=address or ray.address)
    began = time.monotonic()
    with pytest.raises(VmError, match=told) as caught:
        asyncio.run(Cluster.join(settings))
    assert caught.value.hint
    print(f"{time.monotonic() - began:.1f} s: {caught.value.explain()}")
    assert time.monotonic() - began < 15


def test_without_ray_the_cell_says_what_to_install(tmp_path, spec, monkeypatch):
    # What Python finds first, where the person who starts the notebook says so
    (tmp_path / "ray.py").write_text("raise ImportError('No module named ray')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(VmError, match="need Ray") as caught:
        asyncio.run(Cluster.join(Settings()))
    assert "vmkernel[ray]" in caught.value.hint
    (tmp_path / "ray.py").unlink()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").touch()
    with pytest.raises(VmError, match="cannot be imported"):
        asyncio.run(Cluster.join(Settings()))


def test_the_end_of_the_head_is_not_that_of_the_front_end(ray, host, start):
    """Last, for it is the cluster's end, too: Ray ends hosts and drivers whose head is away."""
    kernel = start()
    assert kernel.run("x = 1") == ""
    ray.end_head()
    assert kernel.run("print(x)") == "1\n"
    cell = kernel.client.execute("import time; time.sleep(100)")
    assert kernel.result(cell).startswith("VmHostLostError: The VM's host was lost")
    assert seconds_until(lambda: not kernel.manager.is_alive(), 5) is not None
    assert seconds_until(lambda: not host.qemus(), 5) is not None
    kernel.manager.restart_kernel(now=True)
    assert kernel.run("print(1)").startswith("VmError: No Ray cluster answers at")
