"""A host's kernels in a real worker of Ray: its conditions, and its death."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from localray import LocalRay
from vmhost import VmHost, seconds_until
from vmkernel.cli.checks_cluster import cluster as cluster_check
from vmkernel.cluster import placement
from vmkernel.cluster.placement import Cluster
from vmkernel.settings import Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(150)]

DEATH = 3.0
"""Seconds from the death of what they depend on until kernels and VMs are gone."""


@pytest.fixture(scope="module")
def ray(session_dir: Path) -> Iterator[LocalRay]:
    with LocalRay(session_dir) as ray, pytest.MonkeyPatch.context() as patch:
        for name, value in ray.env.items():
            patch.setenv(name, value)
        yield ray


@pytest.fixture(scope="module")
def vms(session_dir: Path) -> Iterator[VmHost]:
    vms = VmHost(session_dir)
    yield vms
    seconds_until(lambda: not vms.left(), 5)
    left = vms.left()
    vms.clear()
    assert not left


@pytest.fixture(scope="module")
def node(ray: LocalRay, vms: VmHost) -> subprocess.Popen[bytes]:
    return ray.join(3, vms.env)


@pytest_asyncio.fixture
async def host(ray: LocalRay, node: subprocess.Popen[bytes]) -> AsyncIterator[placement.Host]:
    cluster = await Cluster.join(Settings(cluster_address=ray.address))
    (host,) = [host for host in await cluster.hosts() if host.facts.alive]
    await host.ready()
    yield host
    await cluster.close()


async def started(host: placement.Host, spec: str, *names: str) -> list[dict[str, Any]]:
    return [
        await host.call(
            "start",
            {"kernel_id": name, "kernel_name": spec, "key": "a key", "lease": 60.0,
             "signature_scheme": "hmac-sha256"},
            timeout=60,
            make=True,
        )
        for name in names
    ]  # fmt: skip


def processes_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


async def test_kernels_live_as_they_do_without_ray(
    host: placement.Host, cluster_spec: str, vms: VmHost
) -> None:
    (kernel,) = await started(host, cluster_spec, "a")
    actor = (await host.call("hello", timeout=10))["pid"]
    assert kernel["info"]["ip"] == host.facts.ip
    for pid in (actor, kernel["pid"], *vms.qemus()):
        assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "0\n"
    environ = Path(f"/proc/{kernel['pid']}/environ").read_bytes()
    assert b"RAY_" not in environ
    assert b"OMP_NUM_THREADS" not in environ
    await host.call("signal", "a", signal.SIGINT, timeout=10)
    status = Path(f"/proc/{kernel['pid']}/status").read_text()
    (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    assert not int(blocked, 16) & 1 << signal.SIGINT - 1
    await host.call("end", "a", timeout=10)


def test_doctor_warns_of_what_ends_all_kernels_of_a_host(
    ray: LocalRay, node: subprocess.Popen[bytes]
) -> None:
    found = cluster_check(Settings(cluster_address=ray.address))
    assert found.state == "warning"
    assert "0 of 3 taken on 1 host" in found.found
    assert "start Ray with RAY_memory_monitor_refresh_ms=0" in found.found


async def test_nothing_outlives_an_actor_that_is_killed_and_another_takes_its_place(
    host: placement.Host, cluster_spec: str, vms: VmHost
) -> None:
    await started(host, cluster_spec, "b", "c")
    assert vms.slots().used == 2
    actor = (await host.call("hello", timeout=10))["pid"]
    left = processes_of(actor)
    os.kill(actor, signal.SIGKILL)
    took = seconds_until(lambda: gone(left) and not vms.qemus(), DEATH)
    print(f"actor killed: {took:.2f} s")
    assert took < DEATH
    assert vms.slots().used == 0
    (again,) = await started(host, cluster_spec, "d")
    assert "info" in again
    assert (await host.call("hello", timeout=10))["pid"] != actor


async def test_nothing_outlives_a_raylet_that_is_killed(
    host: placement.Host, node: subprocess.Popen[bytes], cluster_spec: str, vms: VmHost
) -> None:
    await started(host, cluster_spec, "e")
    actor = (await host.call("hello", timeout=10))["pid"]
    left = [psutil.Process(actor), *processes_of(actor)]
    (raylet,) = [p for p in processes_of(node.pid) if p.name() == "raylet"]
    raylet.kill()
    took = seconds_until(lambda: gone(left) and not vms.qemus(), DEATH)
    print(f"raylet killed: {took:.2f} s")
    assert took < DEATH
    assert vms.slots().used == 0
