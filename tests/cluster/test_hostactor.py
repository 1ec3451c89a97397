"""One host's kernels, without Ray: real kernels and VMs under `KernelHost`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import LocalPortCache

from vmhost import VmHost, seconds_until, until
from vmkernel.cluster import hosted
from vmkernel.cluster.hostactor import KernelHost
from vmkernel.cluster.relay import Relay

pytestmark = [pytest.mark.vm, pytest.mark.timeout(100)]

KEY = "of this test only"
PATIENCE = 60


@pytest.fixture
def host(session_dir: Path) -> Iterator[VmHost]:
    host = VmHost(session_dir)
    yield host
    seconds_until(lambda: not host.left(), 5)
    left = host.left()
    host.clear()
    assert not left


@contextlib.asynccontextmanager
async def started(host: VmHost, **settings: str) -> AsyncIterator[KernelHost]:
    environ = {**os.environ, **host.env, "VMKERNEL_MAX_CONCURRENT_VMS": "2"}
    kernels = KernelHost("127.0.0.1", {**environ, "VMKERNEL_POOL_SIZE": "0", **settings})
    try:
        yield kernels
    finally:
        await kernels.close()


@pytest_asyncio.fixture
async def kernels(host: VmHost, cluster_spec: str) -> AsyncIterator[KernelHost]:
    async with started(host) as kernels:
        yield kernels


@pytest.fixture
def pool(host: VmHost) -> Iterator[None]:
    """Kernels may be kept ready; not beyond the test."""
    yield
    host.cli("pool", "stop")


def wanted(name: str, spec: str, **more: Any) -> dict[str, Any]:
    return {
        "kernel_id": name, "kernel_name": spec, "key": KEY, "lease": 30.0,
        "signature_scheme": "hmac-sha256", **more,
    }  # fmt: skip


class Front:
    """``async with Front(info) as front``: a front end, behind a relay as on its own host."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._info = info
        self.relay = Relay({"ip": "127.0.0.1", "key": KEY, "signature_scheme": "hmac-sha256"})
        self.client = BlockingKernelClient()

    async def __aenter__(self) -> Front:
        await self.relay.open()
        await self.relay.connect(self._info)
        self.client.load_connection_info(self.relay.info)
        self.client.start_channels()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.stop_channels()
        await self.relay.close()

    async def run(self, code: str) -> tuple[str, dict[str, Any]]:
        """What the cell prints, and the reply to it."""
        said: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                said.append(message["content"]["text"])

        def execute() -> dict[str, Any]:
            return self.client.execute_interactive(code, output_hook=hear, timeout=PATIENCE)

        reply = await asyncio.to_thread(execute)
        return "".join(said), reply["content"]


async def run(info: dict[str, Any], code: str) -> str:
    async with Front(info) as front:
        return (await front.run(code))[0]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- a kernel ---


async def test_a_kernel_runs_cells_encrypted_and_ends(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    answer = await kernels.start(wanted("one", cluster_spec, owner="me"))
    info = answer["info"]
    assert "curve_secretkey" not in info
    assert await run(info, "print(6 * 7)") == "42\n"
    assert await kernels.start(wanted("one", cluster_spec)) == answer, "asked twice, started once"
    states = await kernels.renew(["one", "two"])
    assert states["one"]["state"] == "running"
    assert states["one"]["status"] == "running"
    assert states["two"]["state"] == "unknown"
    (listed,) = await kernels.kernels()
    assert (listed["pid"], listed["owner"]) == (answer["pid"], "me")
    assert 28 < listed["lease_left"] <= 30
    hello = await kernels.hello()
    assert hello["slots"] == {"limit": 2, "used": 1}
    assert hello["kernel_info"]["language_info"]["name"] == "python"
    assert cluster_spec in hello["kernelspecs"]
    # Who does not know the host's key gets nothing
    plain = BlockingKernelClient()
    plain.load_connection_info({k: v for k, v in info.items() if not k.startswith("curve")})
    plain.start_channels()
    plain.kernel_info()
    with pytest.raises(Exception, match=r"^$"):
        await asyncio.to_thread(plain.get_shell_msg, timeout=0.5)
    plain.stop_channels()
    assert await kernels.wait("one", 0.01) is None
    watching = asyncio.create_task(kernels.wait("one", 20))
    await kernels.end("one")
    assert await watching == 0
    assert host.slots().used == 0
    assert await kernels.kernels() == []


async def test_it_gets_the_hosts_environment_and_little_of_the_front_ends(
    host: VmHost, cluster_spec: str
) -> None:
    env = {
        "COLUMNS": "77", "PATH": "/of/the/driver", "LD_PRELOAD": "x.so", "PYTHONPATH": "/x",
        "VMKERNEL_MEMORY": "1G", "RAY_AUTH_TOKEN": "secret", "JPY_PARENT_PID": "1",
    }  # fmt: skip
    of_ray = {"RAY_AUTH_TOKEN": "secret", "OMP_NUM_THREADS": "1"}
    async with started(host, VMKERNEL_WORKSPACE="ro", **of_ray) as kernels:
        answer = await kernels.start(wanted("one", cluster_spec, env=env, cwd="/nowhere/at/all"))
        variables = Path(f"/proc/{answer['pid']}/environ").read_bytes().split(b"\0")
        assert b"COLUMNS=77" in variables
        assert f"PATH={os.environ['PATH']}".encode() in variables
        assert f"JPY_PARENT_PID={os.getpid()}".encode() in variables
        names = {variable.partition(b"=")[0] for variable in variables}
        assert not names & {b"LD_PRELOAD", b"RAY_AUTH_TOKEN", b"OMP_NUM_THREADS"}
        said = await run(answer["info"], "import os; print(os.environ['COLUMNS'], set(os.environ))")
    # What is only on the front end's host is told of; the kernel's own directory is empty
    assert f"there is no /nowhere/at/all on {socket.gethostname()}" in said
    assert "77 {" in said
    assert "VMKERNEL" not in said.partition("77 {")[2]


async def test_it_works_where_the_front_end_does_if_that_is_here(
    host: VmHost, cluster_spec: str, tmp_path: Path
) -> None:
    (tmp_path / "here.txt").touch()
    async with started(host, VMKERNEL_WORKSPACE="ro") as kernels:
        answer = await kernels.start(wanted("one", cluster_spec, cwd=str(tmp_path)))
        assert Path(f"/proc/{answer['pid']}/cwd").readlink() == tmp_path
        assert await run(answer["info"], "import os; print(os.listdir())") == "['here.txt']\n"


async def test_a_workspace_of_the_hosts_own_is_there_wherever_the_front_end_works(
    host: VmHost, cluster_spec: str, tmp_path: Path
) -> None:
    (tmp_path / "here.txt").touch()
    settings = {"VMKERNEL_WORKSPACE": "ro", "VMKERNEL_WORKSPACE_DIR": str(tmp_path)}
    async with started(host, **settings) as kernels:
        answer = await kernels.start(wanted("one", cluster_spec, cwd="/nowhere/at/all"))
        assert await run(answer["info"], "import os; print(os.listdir())") == "['here.txt']\n"


async def test_sigint_is_not_blocked_in_what_an_actor_starts(
    kernels: KernelHost, cluster_spec: str
) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray does in its workers
    try:
        answer = await kernels.start(wanted("one", cluster_spec))
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    status = Path(f"/proc/{answer['pid']}/status").read_text()
    (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    assert not int(blocked, 16) & 1 << signal.SIGINT - 1
    async with Front(answer["info"]) as front:
        await front.run("")
        running = asyncio.create_task(front.run("while True: pass"))
        await asyncio.sleep(0.5)
        await kernels.signal("one", signal.SIGINT)
        assert (await running)[1]["ename"] == "KeyboardInterrupt"


async def test_a_port_that_was_taken_meanwhile_costs_a_try(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    stolen: list[socket.socket] = []
    over = threading.Event()

    def steal() -> None:
        """Bind a port as soon as it is chosen, before the kernel does."""
        while not over.is_set():
            for path in host.runtime_dir.glob("cluster-*/kernel-one.json"):
                with contextlib.suppress(OSError, ValueError):
                    address = "127.0.0.1", json.loads(path.read_text())["stdin_port"]
                    stolen.append(socket.create_server(address))
                    return
            time.sleep(0.0005)

    thief = threading.Thread(target=steal)
    thief.start()
    try:
        answer = await kernels.start(wanted("one", cluster_spec))
    finally:
        over.set()
        thief.join()
    (taken,) = stolen
    assert answer["info"]["stdin_port"] != taken.getsockname()[1]
    taken.close()
    assert await run(answer["info"], "print(1)") == "1\n"


# --- slots ---


async def test_it_says_no_when_there_is_no_slot_and_nothing_is_left(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    both = await asyncio.gather(*(kernels.start(wanted(n, cluster_spec)) for n in ("a", "b")))
    assert all("info" in answer for answer in both)
    assert host.slots().used == 2
    began = time.monotonic()
    third = await kernels.start(wanted("c", cluster_spec))
    assert time.monotonic() - began < 6
    assert third["refused"] == "capacity"
    assert "2 of 2 in use" in third["message"]
    assert (await kernels.renew(["c"]))["c"]["state"] == "unknown"
    assert host.slots().waiting == 0
    assert len(host.records()) == 2, "also not on record"
    await kernels.end("a")
    assert "info" in await kernels.start(wanted("c", cluster_spec))


async def test_a_users_own_limit_is_a_refusal_too(host: VmHost, cluster_spec: str) -> None:
    async with started(host, VMKERNEL_MAX_VMS_PER_USER="1") as kernels:
        assert "info" in await kernels.start(wanted("a", cluster_spec))
        second = await kernels.start(wanted("b", cluster_spec))
        assert second["refused"] == "capacity"
        assert "max_vms_per_user" in second["message"]


async def test_the_pool_serves_and_what_waits_in_it_yields(
    host: VmHost, cluster_spec: str, pool: None
) -> None:
    async with started(host, VMKERNEL_POOL_SIZE="1") as kernels:
        await kernels.start(wanted("a", cluster_spec))
        await until(lambda: '"ready": 1' in host.cli("pool", "status", "--json").stdout)
        answer = await kernels.start(wanted("b", cluster_spec, env={"COLUMNS": "77"}))
        line = Path(f"/proc/{answer['pid']}/cmdline").read_bytes()
        assert line.startswith(b"sh\0"), "a member was handed over"
        said = await run(answer["info"], "import os; print(os.environ['COLUMNS'], set(os.environ))")
        assert said.startswith("77 ")
        assert "VMKERNEL" not in said.partition("77 {")[2]
        await kernels.end("b")
        await until(lambda: '"ready": 1' in host.cli("pool", "status", "--json").stdout)
        assert host.slots().used == 2
        # Other settings, so the member is of no use to it but for its slot
        other = await kernels.start(wanted("c", cluster_spec, argv=["--outputs=trusted"]))
        assert "info" in other


async def test_a_lease_that_is_not_renewed_ends_the_kernel(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    names = ("kept", "left")
    await asyncio.gather(*(kernels.start(wanted(n, cluster_spec, lease=2.0)) for n in names))
    began = time.monotonic()
    while len(await kernels.kernels()) == 2:
        assert (await kernels.renew(["kept"]))["kept"]["state"] == "running"
        await asyncio.sleep(0.2)
    assert 1 < time.monotonic() - began < 6
    assert [kernel["kernel_id"] for kernel in await kernels.kernels()] == ["kept"]
    left = (await kernels.renew(["left"]))["left"]
    assert (left["state"], left["exit_code"]) == ("ended", 0)
    assert left["why"] == "no contact for 2 s"
    assert host.slots().used == 1


# --- calls in any order ---


async def test_an_end_in_the_middle_of_a_start(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    for pause in (0, 0.01, 0.03, 0.05, 0.1, 0.2):
        starting = [asyncio.create_task(kernels.start(wanted("one", cluster_spec)))]
        starting.append(asyncio.create_task(kernels.start(wanted("one", cluster_spec))))
        await asyncio.sleep(pause)
        await asyncio.gather(kernels.end("one", kill=True), kernels.end("one"))
        first, second = await asyncio.gather(*starting)
        assert first == second
        assert "ended while it started" in first.get("error", "") or "info" in first
        assert (await kernels.renew(["one"]))["one"]["state"] == "unknown"
        assert seconds_until(lambda: host.slots().used == 0, 3) < 3


async def test_who_asked_may_vanish(kernels: KernelHost, cluster_spec: str, host: VmHost) -> None:
    asking = asyncio.create_task(kernels.start(wanted("one", cluster_spec, lease=1.0)))
    await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await until(lambda: host.slots().used == 1)
    assert await kernels.wait("one", 10) == 0, "it is ended by its lease"
    assert host.slots().used == 0


async def test_a_kernel_that_hangs_is_killed(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    answer = await kernels.start(wanted("one", cluster_spec))
    os.kill(answer["pid"], signal.SIGSTOP)
    began = time.monotonic()
    await kernels.end("one", kill=True)
    assert time.monotonic() - began < 1.5
    assert not psutil.pid_exists(answer["pid"])
    await until(lambda: host.slots().used == 0, 3)


async def test_a_kernel_that_is_ended_at_once_leaves_nothing(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    answer = await kernels.start(wanted("one", cluster_spec))
    await run(answer["info"], "print(1)")
    await until(host.sockets)
    await kernels.end("one", kill=True)
    assert host.left() == []
    assert host.records() == []


async def test_a_kernel_that_dies_is_told_of(kernels: KernelHost, cluster_spec: str) -> None:
    answer = await kernels.start(wanted("one", cluster_spec))
    os.kill(answer["pid"], signal.SIGKILL)
    assert await kernels.wait("one", 10) == -signal.SIGKILL
    state = (await kernels.renew(["one"]))["one"]
    assert (state["state"], state["exit_code"], state["why"]) == ("ended", -signal.SIGKILL, "")
    await kernels.signal("one", signal.SIGINT)
    assert await kernels.kernels() == []
    await kernels.end("one")
    await kernels.end("one")
    assert (await kernels.renew(["one"]))["one"]["state"] == "unknown"


async def test_what_is_wrong_with_a_request_is_told(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    unknown = await kernels.start(wanted("one", "no-such-kernel"))
    assert "no-such-kernel" in unknown["error"]
    assert "vmkernel install" in unknown["hint"]
    outside = await kernels.start(wanted("../three", cluster_spec))
    assert "no kernel's id" in outside["error"]
    nothing = await kernels.start({"kernel_id": "four"})
    assert "makes no sense" in nothing["error"]
    setting = await kernels.start(wanted("five", cluster_spec, argv=["--vcpus=many"]))
    assert "vcpus" in setting["error"]
    assert setting["hint"]
    assert await kernels.kernels() == []


async def test_a_host_without_the_image_says_so_before_it_takes_a_slot(
    host: VmHost, cluster_spec: str
) -> None:
    async with started(host, VMKERNEL_RECIPE="none-such") as kernels:
        answer = await kernels.start(wanted("one", cluster_spec))
        assert "'none-such'" in answer["error"]
        assert "vmkernel image build none-such" in answer["hint"]
        assert (await kernels.hello())["kernel_info"] is None


async def test_nothing_grows_with_kernels_that_have_ended(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    me = psutil.Process()
    ports = LocalPortCache.instance().currently_used_ports
    counts = []
    for number in range(3):
        await kernels.start(wanted(f"kernel-{number}", cluster_spec))
        assert len(ports) == 5
        await kernels.end(f"kernel-{number}")
        counts.append((me.num_fds(), me.num_threads()))
    assert counts[2] <= counts[1]
    assert not ports
    (directory,) = host.runtime_dir.glob("cluster-*")
    assert [*directory.iterdir()] == []


# --- who else may speak ---


async def test_no_other_user_can_say_that_a_kernel_is_ready() -> None:
    heard: list[dict[str, str]] = []
    address, close = hosted._listen(lambda fields: heard.append(dict(fields)))
    code = (
        "from vmkernel.kernel import notify; notify.notify('a\\nb', ready=True); "
        "notify.notify('full', error=notify.CAPACITY, hint='wait')"
    )
    env = {**os.environ, "VMKERNEL_NOTIFY_SOCKET": address}
    if os.geteuid() == 0:  # else there is nobody else to be
        stranger = os.fork()
        if stranger == 0:
            try:
                os.setuid(65534)
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    sock.sendto(b"READY=1", address.replace("@", "\0"))
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(stranger, 0)[1] == 0
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    await until(lambda: len(heard) == 2)
    close()
    assert heard == [
        {"STATUS": "a b", "READY": "1"},
        {"STATUS": "full", "ERRNO": "11", "X_VMKERNEL_HINT": "wait"},
    ]


# --- its own end ---

ACTOR = """
import asyncio, json, sys
from vmkernel.cluster.hostactor import KernelHost
async def main():
    host = KernelHost("127.0.0.1")
    for request in json.loads(sys.argv[1]):
        starting = asyncio.create_task(host.start(request))
        if sys.argv[2] == "up":
            await starting
    print("there", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def actors(host: VmHost) -> Iterator[list[subprocess.Popen[bytes]]]:
    actors: list[subprocess.Popen[bytes]] = []
    yield actors
    for actor in actors:
        actor.kill()
        actor.wait()


@pytest.mark.parametrize(
    ("when", "pool_size"),
    [("up", "0"), ("up", "1"), ("0.05", "0"), ("0.1", "1"), ("0.2", "0"), ("0.2", "1")],
)
async def test_nothing_outlives_an_actor_that_is_killed(
    cluster_spec: str, host: VmHost, pool: None, actors: list[Any], when: str, pool_size: str
) -> None:
    requests = json.dumps([wanted(name, cluster_spec) for name in ("a", "b")])
    environ = {**os.environ, **host.env, "VMKERNEL_POOL_SIZE": pool_size}
    actor = subprocess.Popen(
        [sys.executable, "-c", ACTOR, requests, when], env=environ, stdout=subprocess.PIPE
    )
    actors.append(actor)
    assert actor.stdout is not None
    await asyncio.to_thread(actor.stdout.readline)
    process = psutil.Process(actor.pid)
    await until(process.children)
    if when != "up":
        await asyncio.sleep(float(when))
    left = process.children(recursive=True)
    actor.kill()
    actor.wait()
    assert seconds_until(lambda: not any(map(_runs, left)), 3) < 3
    if pool_size != "0":
        host.cli("pool", "stop")
    assert seconds_until(lambda: not host.qemus() and host.slots().used == 0, 3) < 3
    # Keys of kernels that are no more go with the next start
    assert [*host.runtime_dir.glob("cluster-*")]
    async with started(host) as kernels:
        kernels._open()
        assert not [*host.runtime_dir.glob("cluster-*/kernel-*.json")]
        assert len([*host.runtime_dir.glob("cluster-*")]) == 1


def test_capacity_is_what_ray_takes(host: VmHost) -> None:
    shown = host.cli("capacity", "--json", VMKERNEL_MAX_CONCURRENT_VMS="7")
    assert shown.stdout == '{"vm_slot": 7}\n'
    shown = host.cli("capacity", VMKERNEL_MAX_CONCURRENT_VMS="7")
    assert "limit:   7" in shown.stdout
    assert "free:    7" in shown.stdout
