"""Kernels on three hosts, each a network namespace with a raylet: real Ray, real VMs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import pytest

from netcluster import NetCluster, NetHost
from vmhost import seconds_until

pytestmark = [pytest.mark.vm, pytest.mark.cluster, pytest.mark.timeout(300)]

WHERE = "import socket; print(socket.gethostname())"
VMKERNEL = str(Path(sys.executable).with_name("vmkernel"))


class Front:
    """A front end on the gateway (front.py)."""

    def __init__(self, host: NetHost, **env: str) -> None:
        program = str(Path(__file__).with_name("front.py"))
        self.process: subprocess.Popen[str] = host.popen(
            sys.executable, program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={"VMKERNEL_CLUSTER_ADDRESS": host.cluster.address, **env},
        )  # fmt: skip
        self._waiting: dict[int, Future[Any]] = {}
        self._count = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(ValueError, KeyError):
                number, answer = json.loads(line)
                self._waiting.pop(number).set_result(answer)

    def begin(self, command: str, *arguments: Any) -> Future[Any]:
        """Ask, and go on."""
        self._count += 1
        future = self._waiting[self._count] = Future()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([self._count, command, arguments]) + "\n")
        self.process.stdin.flush()
        return future

    def __call__(self, command: str, *arguments: Any, seconds: float = 120) -> Any:
        answer = self.begin(command, *arguments).result(seconds)
        assert not (isinstance(answer, dict) and "exception" in answer), answer
        return answer

    def start(self, name: str) -> str:
        """Start a kernel and run a cell; the host that it is on."""
        self("start", name)
        assert self("run", name, "kept = 1")["status"] == "ok"
        return self.where(name)

    def where(self, name: str) -> str:
        return str((self("facts", name).get("host") or {}).get("name", ""))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture
def front(cluster: NetCluster) -> Iterator[Front]:
    front = Front(cluster.gateway)
    yield front
    front.close()
    assert seconds_until(lambda: used(cluster) == [0, 0, 0], 20) < 20


def used(cluster: NetCluster) -> list[int]:
    """VM slots in use, by host: what the semaphore files say."""
    return [host.vms.slots().used for host in cluster.hosts]


def by_name(cluster: NetCluster, name: str) -> NetHost:
    (host,) = (host for host in cluster.hosts if host.name == name)
    return host


def ray(cluster: NetCluster, code: str) -> str:
    """What a program on the gateway prints that has joined the cluster."""
    program = (
        "import ray, time; ray.init(address='auto', namespace='vmkernel', log_to_driver=False,"
        f" configure_logging=False)\n{code}"
    )
    done = cluster.gateway.run(sys.executable, "-c", program, RAY_ADDRESS=cluster.address)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_land_on_all_hosts_and_the_next_one_waits(
    cluster: NetCluster, front: Front
) -> None:
    names = [f"k{number}" for number in range(6)]
    places = [front.start(name) for name in names]
    assert sorted(set(places)) == sorted(host.name for host in cluster.hosts)
    assert used(cluster) == [2, 2, 2]
    front("start", "late")
    waiting = front.begin("run", "late", "print('had its turn')")
    with pytest.raises(TimeoutError):
        waiting.result(4)
    assert used(cluster) == [2, 2, 2], "never more than each host's slots"
    front("stop", "k3")
    late = waiting.result(30)
    assert late["said"].endswith("had its turn\n")
    assert "waiting for a VM slot in the cluster: 6 of 6 taken on 3 hosts" in late["said"]
    assert front.where("late") == places[3]
    assert used(cluster) == [2, 2, 2]


def test_a_wait_has_a_limit_and_the_next_cell_tries_again(cluster: NetCluster) -> None:
    first, second = Front(cluster.gateway), Front(cluster.gateway, VMKERNEL_CLUSTER_WAIT="3")
    try:
        for number in range(6):
            first.start(f"k{number}")
        second("start", "late")
        late = second("run", "late", "1")
        assert late["ename"] == "VmCapacityError"
        assert "What to do:" in late["traceback"]
        first("stop", "k0")
        assert second("run", "late", "print('on')")["said"].endswith("on\n")
    finally:
        first.close()
        second.close()


def test_interrupt_restart_and_input_reach_a_kernel_elsewhere(
    cluster: NetCluster, front: Front
) -> None:
    front.start("one")
    running = front.begin("run", "one", "while True: pass")
    time.sleep(1)
    front("interrupt", "one")
    assert running.result(10)["ename"] == "KeyboardInterrupt"
    assert front("run", "one", "print(kept)")["said"] == "1\n"
    front("restart", "one")
    assert front("run", "one", "print('kept' in globals())")["said"] == "False\n"
    assert sum(used(cluster)) == 1


def test_a_host_whose_slots_are_taken_by_others_is_passed_over(
    cluster: NetCluster, front: Front
) -> None:
    """Ray counts its own kernels only: the semaphore file is the truth."""
    busy = cluster.hosts[0]
    started = [busy.run(VMKERNEL, "start", "-q", name) for name in ("mine", "too")]
    assert [done.returncode for done in started] == [0, 0], started[0].stderr
    try:
        places = [front.start(f"k{number}") for number in range(4)]
        assert busy.name not in places
        assert used(cluster) == [2, 2, 2]
    finally:
        busy.run(VMKERNEL, "rm", "-f", "mine", "too")


def test_ports_are_the_hosts_and_speak_to_nobody_without_a_key(
    cluster: NetCluster, front: Front
) -> None:
    where = by_name(cluster, front.start("one"))
    remote = front("facts", "one")["remote"]
    assert remote["ip"] == where.ip
    assert "curve_secretkey" not in remote
    assert remote["curve_publickey"]
    listening = where.run("cat", "/proc/net/tcp").stdout
    port = f"{int(remote['shell_port']):04X}"
    bound = [line.split()[1] for line in listening.splitlines() if f":{port} " in line]
    assert bound
    assert not any(place.startswith(("00000000:", "0100007F:")) for place in bound)
    code = """
import sys, zmq
sock = zmq.Context().socket(zmq.DEALER)
sock.linger = 0
sock.connect(sys.argv[1])
sock.send_multipart([b"<IDS|MSG>", b"", b"{}", b"{}", b"{}", b"{}"])
print(sock.poll(1500))
monitor = zmq.Context.instance().socket(zmq.REQ)
hb = zmq.Context().socket(zmq.REQ)
hb.linger = 0
hb.connect(sys.argv[2])
hb.send(b"ping")
print(hb.poll(1500))
"""
    places = [f"tcp://{where.ip}:{remote[name]}" for name in ("shell_port", "hb_port")]
    done = cluster.gateway.run(sys.executable, "-c", code, *places)
    assert done.stdout == "0\n0\n", done.stderr


def test_a_wrong_token_is_refused(cluster: NetCluster) -> None:
    stranger = Front(cluster.gateway, RAY_AUTH_TOKEN="x" * 48)
    try:
        stranger("start", "one")
        told = stranger("run", "one", "1")
        assert told["status"] == "error"
        assert "token" in told["evalue"]
        assert "What to do:" in told["traceback"]
    finally:
        stranger.close()


def test_nbclient_runs_a_notebook(cluster: NetCluster, tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_code_cell("import os\nx = 20"),
        nbformat.v4.new_code_cell("print(x + 1)\nx * 2"),
        nbformat.v4.new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]}),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "vmsandbox-ray", "display_name": "", "language": ""}
    path = tmp_path / "notebook.ipynb"
    nbformat.write(notebook, path)
    program = str(Path(sys.executable).with_name("jupyter"))
    done = cluster.gateway.run(
        program, "execute", "--inplace", str(path), VMKERNEL_CLUSTER_ADDRESS=cluster.address
    )
    assert done.returncode == 0, done.stderr
    first, second, third = nbformat.read(path, as_version=4).cells
    assert not first.outputs
    assert second.outputs[0].text == "21\n"
    assert second.outputs[1].data["text/plain"] == "40"
    assert third.outputs[0].ename == "ZeroDivisionError"
    assert seconds_until(lambda: used(cluster) == [0, 0, 0], 10) < 10


def test_a_front_end_that_is_killed_leaves_its_kernels_to_the_lease(cluster: NetCluster) -> None:
    front = Front(cluster.gateway)
    front.start("one")
    assert sum(used(cluster)) == 1
    front.process.kill()
    began = time.monotonic()
    assert seconds_until(lambda: used(cluster) == [0, 0, 0], 25) < 25
    assert time.monotonic() - began > 4, "a lease, not a connection"


def test_a_host_that_is_cut_off_ends_its_kernels_and_comes_back(
    cluster: NetCluster, front: Front
) -> None:
    places = {name: front.start(name) for name in ("a", "b", "c")}
    victim = by_name(cluster, places["a"])
    running = front.begin("run", "a", "import time; time.sleep(200)")
    time.sleep(0.5)
    victim.cut_off()
    try:
        assert seconds_until(lambda: victim.vms.slots().used == 0, 25) < 25
        told = running.result(20)
        assert told["ename"] == "VmHostLostError"
        assert victim.name in told["evalue"]
        for name in ("b", "c"):
            assert front("run", name, "print(kept)")["said"] == "1\n"
    finally:
        victim.cut_off(False)
    assert not victim.vms.qemus()


def test_a_host_that_dies_takes_only_its_own_kernels(cluster: NetCluster) -> None:
    # The last test: there is a host less afterwards
    front = Front(cluster.gateway)
    try:
        seconds_until(lambda: slots(cluster) == 6, 60)
        places = {name: front.start(name) for name in ("a", "b", "c")}
        victim = by_name(cluster, places["a"])
        running = front.begin("run", "a", "import time; time.sleep(200)")
        time.sleep(0.5)
        began = time.monotonic()
        victim.kill()
        told = running.result(10)
        assert told["ename"] == "VmHostLostError"
        assert time.monotonic() - began < 10
        assert "What to do:" in told["traceback"]
        for name in ("b", "c"):
            if places[name] != victim.name:
                assert front("run", name, "print(kept)")["said"] == "1\n"
        assert seconds_until(lambda: not victim.vms.qemus(), 5) < 5
        assert victim.vms.slots().used == 0
        # When the host is there again, it clears away what the dead could not (so does a start)
        victim.run(VMKERNEL, "gc")
        assert seconds_until(lambda: slots(cluster) == 4, 70) < 70
        # A cell that is run again gets a kernel elsewhere
        front("restart", "a")
        assert front("run", "a", "print(2)")["said"].endswith("2\n")
        assert front.where("a") != victim.name
    finally:
        front.close()


def slots(cluster: NetCluster) -> int:
    return int(ray(cluster, "print(int(ray.cluster_resources().get('vm_slot', 0)))"))
