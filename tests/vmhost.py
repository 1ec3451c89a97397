"""A host of a test's own: its own runtime, state and cache directory, and what lives there.

QEMU knows nothing of the directory in which its VM is recorded, so the cache directory, which is on
its command line, is a link of the host's own to the real one: by that a VM of this host is told
from all others in the process table, whoever its parent is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import psutil

from vmkernel.host.capacity import Statistics, vm_slots
from vmkernel.host.guest import Guest
from vmkernel.host.registry import Registry, vms_dir
from vmkernel.host.start import Label, VmStart
from vmkernel.protocol import messages
from vmkernel.settings import Settings, load_settings

MEMORY = "512M"
"""Of every VM on the small image: one template serves them all."""

FACTS = ("accelerator.json", "host.json")
"""What a start finds out about the machine, and need not be found out for each test's host."""

_numbers = itertools.count()


class VmHost:
    """Directories, environment, and a look at the process table."""

    def __init__(self, session_dir: Path, *, own_cache: bool = False, user: int = 0) -> None:
        """``own_cache``: start without templates; else those of the test run's user are used.

        ``user``: another user's host; needs root, and a cache and images of its own.
        """
        self.directory = session_dir / f"h{next(_numbers)}"  # short: sockets lie in it
        self.directory.mkdir()
        self.user = user
        self.runtime_dir = self.directory / "run"
        self.state_dir = self.directory / "state"
        self.cache_dir = self.directory / "cache"
        if own_cache:
            self.cache_dir.mkdir()
        else:
            real = load_settings().cache_dir
            real.mkdir(parents=True, exist_ok=True)
            self.cache_dir.symlink_to(real)
        self.state_dir.mkdir(mode=0o700)
        for name in FACTS:
            known = load_settings().state_dir / name
            if known.is_file():
                shutil.copy(known, self.state_dir)
        self.env = {
            "VMKERNEL_RUNTIME_DIR": str(self.runtime_dir),
            "VMKERNEL_STATE_DIR": str(self.state_dir),
            "VMKERNEL_CACHE_DIR": str(self.cache_dir),
            "VMKERNEL_RECIPE": "minimal",
            "VMKERNEL_MEMORY": MEMORY,
        }
        if user:
            session_dir.chmod(0o711)  # to be passed through
            self.env["VMKERNEL_IMAGES_DIR"] = str(self._link_image("minimal"))
            for path in (self.directory, self.state_dir, *self.state_dir.iterdir(), self.cache_dir):
                os.chown(path, user, user)

    def _link_image(self, recipe: str) -> Path:
        """The image where another user gets at it: the real one lies in somebody's home."""
        images = self.directory / "images"
        (images / recipe).mkdir(parents=True)
        for file in (load_settings().images_dir / recipe).iterdir():
            try:
                (images / recipe / file.name).hardlink_to(file)
            except OSError:  # another file system
                shutil.copy(file, images / recipe)
        return images

    def command(self, *words: str) -> list[str]:
        """A command line that runs as this host's user."""
        if not self.user:
            return list(words)
        as_user = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"]
        return [*as_user, *words]

    def cli(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the ``vmkernel`` command on this host; stdout and stderr are text."""
        main = "from vmkernel.cli.app import main; main()"
        return subprocess.run(
            self.command(sys.executable, "-c", main, *words),
            env={**os.environ, **self.env, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def share_facts(self) -> None:
        """Let hosts that are made later know what was found out on this one."""
        place = load_settings().state_dir
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in FACTS:
            shutil.copy(self.state_dir / name, place)

    def settings(self, **changes: str) -> Settings:
        """The settings of a process in this host's environment."""
        environ = {**os.environ, **self.env, **changes}
        return load_settings(environ=environ)

    def slots(self) -> Statistics:
        """The VM slots now."""
        return vm_slots(self.settings()).statistics()

    def qemus(self) -> list[int]:
        """The pids of this host's living QEMUs, those of templates included."""
        return [pid for pid in _pids() if self._is_ours(_command_line(pid))]

    def _is_ours(self, command_line: bytes) -> bool:
        # From the last exec on: what starts and encloses QEMU carries its arguments, too.
        program = command_line.partition(b"\0")[0].rpartition(b"/")[2].decode()
        return (
            b"-name\0vmkernel-" in command_line
            and self._mark in command_line
            and program not in ("setpriv", "sh", "env", "nice", "systemd-run", "unshare", "bwrap")
        )

    @property
    def _mark(self) -> bytes:
        return f"{self.cache_dir}/".encode()

    def sockets(self) -> list[Path]:
        """Every socket and pipe in this host's directories."""
        kinds = (stat.S_ISSOCK, stat.S_ISFIFO)
        found = []
        for path in self.directory.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # it went while we looked
                if any(kind(path.lstat().st_mode) for kind in kinds):
                    found.append(path)
        return found

    def records(self) -> list[str]:
        """The VMs that have not ended, as far as the record says or a directory of theirs does."""
        with Registry(self.settings()) as registry:
            known = {record.vm_id for record, *_ in registry.list()}
        vms = vms_dir(self.settings())
        return sorted(known | ({path.name for path in vms.iterdir()} if vms.is_dir() else set()))

    def left(self) -> list[str]:
        """What no VM may leave at its end: processes, sockets, slots. Empty when all is well."""
        slots = self.slots()
        return [
            *(f"QEMU {pid}" for pid in self.qemus()),
            *(f"socket {path}" for path in self.sockets()),
            *([f"{slots}"] if slots.used or slots.waiting else []),
        ]

    def clear(self) -> None:
        """End what is left, by process id."""
        for pid in self.qemus():
            psutil.Process(pid).kill()


class Sampler:
    """``with Sampler(host) as sampler:`` how many VMs ran at once, looked up every few ms."""

    def __init__(self, host: VmHost, interval: float = 0.003) -> None:
        self.most = 0
        self.samples = 0
        self.seen: dict[int, str] = {}
        """Each VM's command line, by QEMU's pid."""
        self._host = host
        self._interval = interval
        self._end = threading.Event()
        self._others: set[int] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._interval):
            now = [pid for pid in _pids() if self._is_vm(pid)]
            for pid in set(now) - self.seen.keys():
                self.seen[pid] = _command_line(pid).decode().replace("\0", " ")
            self.most = max(self.most, len(now))
            self.samples += 1

    def _is_vm(self, pid: int) -> bool:
        if pid in self._others:  # looked at before: reading all of them each time is too slow
            return False
        line = _command_line(pid)
        if self._host._is_ours(line):
            return True
        if line and b"vmkernel" not in line:  # one that does may be a wrapper's child before exec
            self._others.add(pid)
        return False


class RunningVm:
    """``async with RunningVm(settings) as vm:`` a clone that is awake, and runs code."""

    def __init__(self, settings: Settings) -> None:
        self.start = VmStart(settings, Label("test", "test"))
        self.guest: Guest
        self._done: asyncio.Future[str] | None = None
        self._output: list[str] = []
        self._number = 0

    async def __aenter__(self) -> RunningVm:
        self.guest = await self.start.guest(
            on_output=self._on_output,
            on_kernel_death=lambda death: self._fail(RuntimeError(death.reason)),
            on_end=self._fail,
            progress=lambda text: None,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.start.close()

    async def run(self, code: str, seconds: float = 60) -> str:
        """What the code prints; raises RuntimeError with its traceback."""
        self._number += 1
        self._done = asyncio.get_running_loop().create_future()
        self._output.clear()
        self.guest.send(execute_request(f"test-{self._number}", code))
        async with asyncio.timeout(seconds):
            return await self._done

    def _on_output(self, message: messages.FromGuest, buffers: Sequence[memoryview]) -> None:
        if self._done is None or self._done.done():
            return
        if message.msg_type == "stream":
            self._output.append(str(message.content["text"]))
        elif message.msg_type == "error":
            self._fail(RuntimeError("\n".join(message.content["traceback"])))
        elif message.msg_type == "status":
            self._done.set_result("".join(self._output))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


def execute_request(msg_id: str, code: str) -> messages.ToGuest:
    """A cell on its way to the guest kernel."""
    content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
    raw = [
        msgspec.Raw(messages.encode_json(value))
        for value in ({"msg_id": msg_id, "msg_type": "execute_request"}, {}, content)
    ]
    return messages.ToGuest("shell", msg_id, "execute_request", *raw)


def _pids() -> Iterator[int]:
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield int(entry.name)


def _command_line(pid: int) -> bytes:
    """Empty for one that is gone, and for a zombie, which holds nothing any more."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def seconds_until(condition: object, limit: float) -> float:
    """How long it took until ``condition()`` held; ``limit`` when it did not."""
    assert callable(condition)
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit:
            return limit
        time.sleep(0.005)
    return time.monotonic() - began


async def until(condition: Callable[[], object], seconds: float = 20) -> float:
    """How long it took until ``condition()`` held, beside the event loop; TimeoutError if never."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
    return time.monotonic() - began
