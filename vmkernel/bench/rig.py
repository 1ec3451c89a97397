"""A place of the benchmark's own: directories, kernelspecs, and the ready pool in it.

The user's kernels, record, history and pool are neither used nor seen, and nothing is left; images
and memory templates are the user's, which no kernel changes.  Every process that belongs to a
kernel under measurement carries the place's path in its environment, whoever its parent is by now,
or descends from one that does: so all of them are found, a pool's too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from vmkernel.bench.memory import is_history
from vmkernel.host.registry import Registry, VmRecord
from vmkernel.settings import FIELDS, load_settings

POOL = "+pool"
FACTS = ("accelerator.json", "host.json")
"""What a start has found out about the machine, and would have to find out again."""
READY_LIMIT = 120.0
"""Seconds for the pool to have a member ready."""
MORE_VMS = 1024
"""Slots: how many kernels there are is the benchmark's business."""
_GOODBYE = 5.0
_ON_RECORD = 3.0
"""Seconds that a VM may take to be on record; it runs before."""


class RigError(Exception):
    """Something could not be measured for want of its conditions; the text says which."""


class Variant(NamedTuple):
    """A way to start a kernel: by its kernelspec, from the ready pool or past it."""

    kernel: str
    pooled: bool

    @classmethod
    def of(cls, name: str) -> Variant:
        """``vmsandbox`` starts directly, ``vmsandbox+pool`` from the ready pool."""
        return cls(name.removesuffix(POOL), is_pooled(name))


def is_pooled(name: str) -> bool:
    """Whether that is the name of a kernel from the pool."""
    return name.endswith(POOL)


class Rig:
    """The place.  A context manager: its end ends every process in it and removes it."""

    def __init__(self) -> None:
        # Short: a Unix socket's path has 107 bytes at most
        self.directory = Path(tempfile.mkdtemp(prefix="vmk-bench-", dir="/tmp"))
        data = self.directory / "jupyter" / "data"
        self.kernels_dir = data / "kernels"
        """Where kernelspecs are installed that only the benchmark sees."""
        self.pool = Pool(self)
        self._before = dict(os.environ)
        state, users = self.directory / "state", load_settings().state_dir
        state.mkdir(mode=0o700)
        for name in FACTS:
            with contextlib.suppress(OSError):
                shutil.copy(users / name, state)
        os.environ.update(
            VMKERNEL_RUNTIME_DIR=str(self.directory / "run"),
            VMKERNEL_STATE_DIR=str(state),
            VMKERNEL_MAX_CONCURRENT_VMS=str(MORE_VMS),
            JUPYTER_DATA_DIR=str(data),
            JUPYTER_RUNTIME_DIR=str(self.directory / "jupyter" / "runtime"),
            JUPYTER_PLATFORM_DIRS="1",  # it is asked for by a warning that nobody wants here
            # Else a kernelspec of the same name in this Python's environment would come first
            JUPYTER_PREFER_ENV_PATH="0",
            IPYTHONDIR=str(self.directory / "ipython"),
        )

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def environment(self, variant: Variant) -> dict[str, str]:
        """What a kernel is started with, so that it takes the way that is to be measured."""
        if not Pool.exists():
            return {}
        return {"VMKERNEL_POOL_SIZE": str(self.pool.size) if variant.pooled else "0"}

    def processes(self) -> list[int]:
        """All living processes of the place."""
        mark = os.fsencode(self.directory)
        parents = _parents()
        roots = []
        for pid in parents:
            with contextlib.suppress(OSError):  # another user's, or it ended meanwhile
                if mark in Path(f"/proc/{pid}/environ").read_bytes():
                    roots.append(pid)
        return _descendants(roots, parents)  # QEMU's own environment is emptied

    def processes_of(self, pid: int, connection_file: str) -> list[int]:
        """Those of one kernel: of the process *pid* that the front end started, and of the wrapper
        kernel, which is no descendant of it when it comes from the pool."""
        roots = [pid]
        for record in _records(connection_file):
            roots += [found for found in (record.runner_pid, record.qemu_pid) if found]
        return _descendants(roots, _parents())

    def came_from_pool(self, pid: int, connection_file: str) -> bool:
        """Whether the kernel is another process than that which the front end started."""
        end = time.monotonic() + _ON_RECORD
        while not (records := _records(connection_file)) and time.monotonic() < end:
            time.sleep(0.05)
        return any(record.runner_pid not in (None, pid) for record in records)

    def settle(self, limit: float = 40.0) -> float:
        """Wait until what ends by itself has ended.  Returns the seconds waited.

        That are threads and buffers, and the processes that wrote a history.
        """
        begun = time.monotonic()
        while True:
            time.sleep(1.0)
            writing = any(map(is_history, self.processes()))
            if not writing or time.monotonic() > begun + limit:
                return time.monotonic() - begun

    def close(self) -> None:
        """End everything in the place, and remove it."""
        self.pool.stop()
        deadline = time.monotonic() + _GOODBYE
        while any(map(is_history, left := self.processes())) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os.environ.clear()
        os.environ.update(self._before)
        shutil.rmtree(self.directory, ignore_errors=True)


class Pool:
    """The ready pool of the place, driven by its command."""

    size = 1
    """Members that wait; how many is no matter where one kernel after another is started."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._filled = False

    @staticmethod
    def exists() -> bool:
        """Whether this vmkernel has one."""
        return "pool_size" in FIELDS

    def wait_ready(self) -> None:
        """Return when a member can be handed out.  Raises RigError."""
        if not self.exists():
            raise RigError("this vmkernel has no ready pool")
        if not self._filled:
            self._filled = True
            self._ask("fill")
        end = time.monotonic() + READY_LIMIT
        while not self.ready():
            if time.monotonic() > end:
                raise RigError(f"no member of the pool was ready within {READY_LIMIT:g} s")
            time.sleep(0.1)

    def ready(self) -> int:
        """How many members can be handed out at this moment."""
        return int(self.status()["ready"])

    def status(self) -> dict[str, Any]:
        """What `vmkernel pool status` says."""
        found: dict[str, Any] = json.loads(self._ask("status", "--json"))
        return found

    def stop(self) -> None:
        """End the pool and its members; may be called at any time."""
        if self._filled:
            self._filled = False
            with contextlib.suppress(RigError):
                self._ask("stop")

    def _ask(self, *words: str) -> str:
        command = [sys.executable, "-c", "from vmkernel.cli.app import main; main()", "pool"]
        try:
            done = subprocess.run(
                [*command, *words],
                env={**os.environ, "VMKERNEL_POOL_SIZE": str(self.size)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=READY_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RigError(f"`vmkernel pool {words[0]}` did not end") from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no word of it"])[-1]
            raise RigError(f"`vmkernel pool {words[0]}` failed: {said}")
        return done.stdout


def _records(connection_file: str) -> list[VmRecord]:
    """The VMs on record that serve this kernel."""
    settings = load_settings()
    if not settings.database_file.exists():
        return []
    with Registry(settings) as registry:
        records = [status.record for status in registry.list()]
    return [record for record in records if record.connection_file == connection_file]


def _parents() -> dict[int, int]:
    """Each living process and its parent, this one left out."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
    return parents


def _descendants(roots: list[int], parents: dict[int, int]) -> list[int]:
    """The living ones of *roots*, and all that descend from them."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found = dict.fromkeys(pid for pid in roots if pid in parents)
    every = list(found)
    for pid in every:
        new = [child for child in children.get(pid, ()) if child not in found]
        found |= dict.fromkeys(new)
        every += new
    return every
