"""One host's kernels, without Ray: real kernels and VMs under `KernelHost`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from jupyter_client.blocking.client import BlockingKernelClient

from vmhost import VmHost, seconds_until
from vmkernel.cluster.hostactor import KernelHost
from vmkernel.cluster.remote import Remote

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

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


@pytest_asyncio.fixture
async def kernels(host: VmHost, cluster_spec: str) -> AsyncIterator[KernelHost]:
    environ = {**os.environ, **host.env, "VMKERNEL_MAX_CONCURRENT_VMS": "2"}
    environ["VMKERNEL_POOL_SIZE"] = "0"
    kernels = KernelHost("127.0.0.1", environ)
    yield kernels
    await kernels.close()


def wanted(name: str, spec: str, **more: Any) -> dict[str, Any]:
    return {
        "kernel_id": name, "kernel_name": spec, "key": KEY, "lease": 30.0,
        "signature_scheme": "hmac-sha256", **more,
    }  # fmt: skip


class Front:
    """A front end of one of those kernels."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.client = BlockingKernelClient()
        self.client.load_connection_info(info)
        self.client.start_channels()

    def run(self, code: str) -> tuple[str, dict[str, Any]]:
        said: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                said.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, output_hook=hear, timeout=PATIENCE)
        return "".join(said), reply["content"]

    def close(self) -> None:
        self.client.stop_channels()


async def run(info: dict[str, Any], code: str) -> tuple[str, dict[str, Any]]:
    front = Front(info)
    try:
        return await asyncio.to_thread(front.run, code)
    finally:
        front.close()


async def test_a_kernel_runs_cells_encrypted_and_ends(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    started = await kernels.start(wanted("one", cluster_spec, env={"COLUMNS": "77"}))
    info = started["info"]
    assert "curve_secretkey" not in info
    assert (await run(info, "print(6 * 7)"))[0] == "42\n"
    assert await kernels.start(wanted("one", cluster_spec)) == started, "asked twice, started once"
    assert (await run(info, "import os; print(os.environ['COLUMNS'])"))[0] == "77\n"
    assert (await kernels.renew(["one", "two"]))["two"]["state"] == "unknown"
    (listed,) = await kernels.kernels()
    assert listed["pid"] == started["pid"]
    assert 28 < listed["lease_left"] <= 30
    hello = await kernels.hello()
    assert hello["slots"] == {"limit": 2, "used": 1}
    assert hello["kernel_info"]["language_info"]["name"] == "python"
    # Who does not know the host's key gets nothing
    plain = {name: value for name, value in info.items() if not name.startswith("curve")}
    front = Front(plain)
    front.client.kernel_info()
    with pytest.raises(Exception, match=r"^$"):
        await asyncio.to_thread(front.client.get_shell_msg, timeout=1)
    front.close()
    await kernels.end("one")
    assert host.slots().used == 0
    assert await kernels.kernels() == []


async def test_it_says_no_when_there_is_no_slot_and_nothing_is_left(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    both = await asyncio.gather(*(kernels.start(wanted(n, cluster_spec)) for n in ("a", "b")))
    assert all("info" in started for started in both)
    assert host.slots().used == 2
    began = time.monotonic()
    third = await kernels.start(wanted("c", cluster_spec))
    assert third["refused"] == "capacity"
    assert "2 of 2 in use" in third["message"]
    assert time.monotonic() - began < 8
    assert (await kernels.renew(["c"]))["c"]["state"] == "unknown"
    assert seconds_until(lambda: host.slots().waiting == 0, 3) < 3
    await kernels.end("a")
    assert "info" in await kernels.start(wanted("c", cluster_spec))


async def test_a_lease_that_is_not_renewed_ends_the_kernel(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    await kernels.start(wanted("kept", cluster_spec, lease=2.0))
    await kernels.start(wanted("left", cluster_spec, lease=2.0))
    for _ in range(8):
        await asyncio.sleep(0.5)
        state = await kernels.renew(["kept"])
    assert state["kept"]["state"] == "running"
    assert [kernel["kernel_id"] for kernel in await kernels.kernels()] == ["kept"]
    assert (await kernels.renew(["left"]))["left"]["why"] == "no contact for 2 s"
    assert host.slots().used == 1


async def test_sigint_is_not_blocked_in_what_an_actor_starts(
    kernels: KernelHost, cluster_spec: str
) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray does in its workers
    try:
        started = await kernels.start(wanted("one", cluster_spec))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    status = Path(f"/proc/{started['pid']}/status").read_text()
    (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    assert not int(blocked, 16) & 1 << signal.SIGINT - 1
    front = Front(started["info"])
    running = asyncio.create_task(asyncio.to_thread(front.run, "while True: pass"))
    await asyncio.sleep(1.5)
    await kernels.signal("one", signal.SIGINT)
    assert (await running)[1]["ename"] == "KeyboardInterrupt"
    front.close()


async def test_an_end_in_the_middle_of_a_start(
    kernels: KernelHost, cluster_spec: str, host: VmHost
) -> None:
    for pause in (0, 0.05, 0.2):
        starting = asyncio.create_task(kernels.start(wanted("one", cluster_spec)))
        await asyncio.sleep(pause)
        await kernels.end("one", kill=True)
        assert "error" in await starting or "info" in await starting
        assert seconds_until(lambda: host.slots().used == 0, 3) < 3


async def test_what_is_wrong_with_a_request_is_told(kernels: KernelHost, cluster_spec: str) -> None:
    unknown = await kernels.start(wanted("one", "no-such-kernel"))
    assert "no-such-kernel" in unknown["error"]
    assert "vmkernel install" in unknown["hint"]
    lost = await kernels.start(wanted("two", cluster_spec, cwd="/nowhere/at/all"))
    assert "/nowhere/at/all" in lost["notes"][0]
    assert (await run(lost["info"], "print(1)"))[0] == "1\n"


async def test_who_does_not_encrypt_is_refused_by_the_other_side() -> None:
    from vmkernel.errors import VmError

    with pytest.raises(VmError, match="does not encrypt"):
        Remote({"ip": "127.0.0.1"}, lambda channel, frames: None)


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


@pytest.mark.parametrize("pool", ["0", "1"])
@pytest.mark.parametrize("when", ["up", "starting"])
async def test_nothing_outlives_an_actor_that_is_killed(
    session_dir: Path, cluster_spec: str, host: VmHost, when: str, pool: str
) -> None:
    requests = json.dumps([wanted(name, cluster_spec) for name in ("a", "b")])
    environ = {**os.environ, **host.env, "VMKERNEL_POOL_SIZE": pool}
    actor = subprocess.Popen(
        [sys.executable, "-c", ACTOR, requests, when], env=environ, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert actor.stdout is not None
    await asyncio.to_thread(actor.stdout.readline)
    if when == "starting":
        await asyncio.sleep(0.05)
    children = psutil.Process(actor.pid).children(recursive=True)
    actor.kill()
    actor.wait()
    assert seconds_until(lambda: not any(map(_runs, children)), 5) < 5
    if pool != "0":
        host.cli("pool", "stop")
    assert seconds_until(lambda: not host.qemus() and host.slots().used == 0, 10) < 10


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_capacity_is_what_ray_takes(host: VmHost) -> None:
    shown = host.cli("capacity", "--json", VMKERNEL_MAX_CONCURRENT_VMS="7")
    assert shown.stdout == '{"vm_slot": 7}\n'
    shown = host.cli("capacity", VMKERNEL_MAX_CONCURRENT_VMS="7")
    assert "limit:   7" in shown.stdout
    assert "free:    7" in shown.stdout
