"""A Ray cluster on this machine alone: a head without slots, and VM hosts that join it.

Everything lies in the session's directory, by which what is left behind is found, and is ended by
process id: there may be other clusters on the machine.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from prerequisites import missing

MEMORY = "80000000"  # bytes of Ray's object store, the least that it takes
PATIENCE = 60
"""Seconds for a node to start: 6 when the machine has nothing else to do."""
STARTS = 3
"""A raylet ends itself when its agents take more than 15 s to start (Ray's issue 65983)."""
HASTE = ["nice", "--adjustment=-10"]
"""So that they do not, be the machine ever so busy; only for the start, and only root may."""
_numbers = itertools.count()


def own_address() -> str:
    """An address of this machine that is not the loopback's: kernels and Ray bind it."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    missing("this machine has no address but the loopback's")
    raise AssertionError


class LocalRay:
    """``with LocalRay(session_dir) as ray:`` a head; `join` adds VM hosts."""

    def __init__(self, session_dir: Path) -> None:
        self.ip = own_address()
        with socket.create_server((self.ip, 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"{self.ip}:{self.port}"
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(24),
            # Seconds for which the head may be away, until Ray's processes end themselves: of 60
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        }
        self._session_dir = session_dir
        self._directory = session_dir / f"r{next(_numbers)}"  # short: Ray's sockets lie in it
        self._nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LocalRay:
        self._directory.mkdir()
        try:
            self._start(
                "--head", f"--port={self.port}", "--include-dashboard=false", "--no-monitor"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def hosts(self) -> int:
        """How many VM hosts have joined."""
        return len(self._nodes) - 1

    def join(self, slots: int, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Add a VM host with this environment; the process whose end is its end."""
        return self._start(
            f"--address={self.address}",
            f"--resources={json.dumps({'vm_slot': slots})}",
            **{"VMKERNEL_POOL_SIZE": "0", "VMKERNEL_MAX_CONCURRENT_VMS": str(slots), **env},
        )

    def _start(self, *options: str, **env: str) -> subprocess.Popen[bytes]:
        log = self._directory / f"node-{len(self._nodes)}.log"
        words = [
            "-m", "ray.scripts.scripts", "start", *options, f"--node-ip-address={self.ip}",
            "--num-cpus=0", "--block", f"--object-store-memory={MEMORY}", "--disable-usage-stats",
            "--include-log-monitor=false",
        ]  # fmt: skip
        if "--head" in options:
            words.append(f"--temp-dir={self._directory}")
        for _ in range(STARTS):
            with log.open("wb") as output:
                node = subprocess.Popen(
                    [*(HASTE if os.geteuid() == 0 else []), sys.executable, *words],
                    env={**os.environ, **self.env, **env},
                    cwd=self._directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._nodes.append(node)
            deadline = time.monotonic() + PATIENCE
            while node.poll() is None and time.monotonic() < deadline:
                if b"Ray runtime started" in log.read_bytes():
                    for process in _tree(node.pid):
                        with contextlib.suppress(psutil.Error, OSError):
                            for thread in process.threads():
                                os.setpriority(os.PRIO_PROCESS, thread.id, 0)
                    return node
                time.sleep(0.05)
            self.end(self._nodes.pop())
        raise AssertionError(f"Ray did not start:\n{log.read_text()[-3000:]}")

    def end_head(self) -> None:
        """As `end`, for the head."""
        self.end(self._nodes[0])

    def end(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node and all its processes at once, as a power cut would."""
        for process in _tree(node.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def __exit__(self, *_: object) -> None:
        for node in reversed(self._nodes):
            self.end(node)
        # Workers that were re-parented meanwhile
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if str(self._directory) in " ".join(process.cmdline()):
                    process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
