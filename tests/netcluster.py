"""A cluster on one machine: namespaces that are hosts, a bridge between them, a raylet in each.

The gateway has Ray's head and no slots.  The addresses exist in these namespaces only (the bridge
has none), so any number of clusters may be up at once.  See ip-netns(8), veth(4).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

import leftovers
from vmhost import VmHost

SUBNET = "10.213.77"
PORT = 6379
READY_SECONDS = 60
STARTS = 3
"""A raylet ends itself when its agents take more than 15 s to start (Ray's issue 65983)."""
HASTE = ["nice", "--adjustment=-10"]
"""So that they do not, be the machine ever so busy; only for the start."""
RAY_OPTIONS = [
    "--num-cpus=0", "--object-store-memory=80000000", "--disable-usage-stats", "--block",
    "--include-log-monitor=false",  # a process of Python less on each host
]  # fmt: skip


def why_not() -> str:
    """Why there can be no such cluster here; "" when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "this machine allows no network namespaces"


class NetHost:
    """One namespace, its raylet, and the directories of a VM host."""

    def __init__(self, cluster: NetCluster, number: int, slots: int, name: str = "gateway") -> None:
        self.cluster = cluster
        self.number = number
        self.slots = slots
        self.name = f"{name}{cluster.tag}" if not slots else f"vmhost{number}{cluster.tag}"
        self.namespace = f"vmk{cluster.tag}n{number}"
        self.link = f"vmk{cluster.tag}v{number}"
        self.ip = f"{SUBNET}.{number + 1}"
        self.directory = cluster.directory.with_name(f"r{number}")
        """What the cluster's directory is on this host: raylets that share one get in each other's
        way."""
        self.directory.mkdir()
        self.log = cluster.directory.parent / f"{self.name}.log"
        self.vms = VmHost(cluster.session_dir)
        self.raylet: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<NetHost {self.name} {self.ip}>"

    @property
    def env(self) -> dict[str, str]:
        """The environment of everything on this host."""
        own = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
        return {
            **own,
            **self.vms.env,
            **self.cluster.env,
            "VMKERNEL_MAX_CONCURRENT_VMS": str(self.slots or 1),
            "VMKERNEL_POOL_SIZE": "0",
        }

    def add(self) -> None:
        """Make namespace and link."""
        other = ["netns", self.namespace]
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", *other)
        _ip("link", "set", self.link, "master", self.cluster.bridge, "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.ip}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", self.namespace, "link", "set", device, "up")

    def command(self, *words: str) -> list[str]:
        """A command line that runs on this host: its name, and its own files of Ray's."""
        script = 'hostname "$0" && mount --bind "$1" "$2" && shift 2 && exec "$@"'
        places = [str(self.directory), str(self.cluster.directory)]
        named = ["unshare", "--uts", "--mount", "sh", "-c", script, self.name, *places, *words]
        return ["ip", "netns", "exec", self.namespace, *named]

    def popen(self, *words: str, env: dict[str, str] | None = None, **options: Any) -> Any:
        """Start a program on this host."""
        return subprocess.Popen(self.command(*words), env={**self.env, **(env or {})}, **options)

    def run(
        self, *words: str, timeout: float = 120, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on this host to its end."""
        return subprocess.run(
            self.command(*words), env={**self.env, **env}, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip

    def start(self) -> None:
        """Start the raylet; a host with slots finds the head by its address."""
        ray = str(Path(sys.executable).with_name("ray"))
        where = (
            [f"--resources={{\"vm_slot\": {self.slots}}}",
             f"--address={self.cluster.address}"]
            if self.slots
            else ["--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor",
                  f"--temp-dir={self.cluster.directory}"]
        )  # fmt: skip
        with self.log.open("ab") as log:
            self.raylet = self.popen(
                *HASTE, ray, "start", *where, f"--node-ip-address={self.ip}", *RAY_OPTIONS,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Wait until the raylet is part of the cluster."""
        for _ in range(STARTS):
            limit = time.monotonic() + READY_SECONDS
            while time.monotonic() < limit and self.raylet and self.raylet.poll() is None:
                if b"Ray runtime started" in self.log.read_bytes():
                    return self._take_time()
                time.sleep(0.05)
            self.kill()
            self.log.rename(self.log.with_suffix(f".{time.monotonic_ns()}.log"))
            self.start()
        raise AssertionError(f"{self} did not start:\n{self.cluster.logs()}")

    def _take_time(self) -> None:
        for pid in self.pids():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).nice(0)

    def pids(self) -> list[int]:
        """The processes in this namespace."""
        said = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in said.stdout.split()]

    def kill(self) -> None:
        """As a host that dies: all its processes, at once.  VMs are in namespaces of their own."""
        for _ in range(50):
            pids = self.pids()
            if not pids:
                break
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self.raylet is not None:
            self.raylet.wait(20)

    def cut_off(self, off: bool = True) -> None:
        """Pull the host's plug out of the switch, or put it back."""
        _ip("link", "set", self.link, "down" if off else "up")


class NetCluster:
    """A gateway and VM hosts.  ``with NetCluster(session_dir, [2, 2, 2]) as cluster:``."""

    def __init__(self, session_dir: Path, slots: Sequence[int], **env: str) -> None:
        """``slots`` of each VM host; ``env`` is added to every process's."""
        self.session_dir = session_dir
        self.tag = secrets.token_hex(3)
        self.bridge = f"vmk{self.tag}br"
        self.token = secrets.token_hex(24)
        # Not "ray": a directory of that name hides the package from who starts beside it
        self.directory = session_dir / f"cluster{self.tag}" / "r"
        self.directory.mkdir(parents=True)
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_raylet_start_wait_time_s": str(READY_SECONDS),  # the machine may be busy
            **env,
        }
        self.gateway = NetHost(self, 0, 0)
        self.hosts = [NetHost(self, number, most) for number, most in enumerate(slots, 1)]
        self.hub = NetHost(self, len(slots) + 1, 0, "hub")
        """Where people are: it has no part in Ray"""

    @property
    def address(self) -> str:
        """The head's."""
        return f"{SUBNET}.1:{PORT}"

    @property
    def all(self) -> list[NetHost]:
        """The gateway first."""
        return [self.gateway, *self.hosts, self.hub]

    def __enter__(self) -> NetCluster:
        leftovers.note_network(self.session_dir, f"vmk{self.tag}")
        try:
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("link", "set", self.bridge, "up")
            for host in self.all:
                host.add()
            # One after the other: hosts wait for their head with a limit of their own
            for hosts in ([self.gateway], self.hosts):
                for host in hosts:
                    host.start()
                for host in hosts:
                    host.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def logs(self) -> str:
        """What raylets said."""
        files = sorted(self.directory.parent.glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in files)

    def close(self) -> None:
        """End all processes, and take namespaces and bridge away."""
        for host in reversed(self.all):
            host.kill()
        for host in self.all:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", host.link], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)
        shutil.rmtree(self.directory.parent, ignore_errors=True)
        for host in self.all:
            host.vms.clear()

    def left(self) -> list[str]:
        """What is there of it after :meth:`close`."""
        networks = leftovers.networks_of(self.session_dir)
        found = [" ".join(one) for one in networks if one[1].startswith(f"vmk{self.tag}")]
        found += [
            f"process {process.pid} {process.info['name']}"
            for process in psutil.process_iter(["environ", "name"])
            if (process.info["environ"] or {}).get("RAY_AUTH_TOKEN") == self.token
        ]
        return [*found, *(line for host in self.all for line in host.vms.left())]


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
