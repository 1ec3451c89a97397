"""Many kernels at once, each answering cells, while something is killed again and again.

Each kernel counts: a cell adds one to a number that only lives in its VM, and must say what the
driver expects.  After a kill the number may be gone (then the cell says so by its error, or the
count begins anew); an answer that is wrong, late or missing is a finding.  Every few seconds the
host is looked at: VMs, slots, memory, descriptors.  Findings make the exit status 1.

    script/soak                             60 kernels for ten minutes
    script/soak --kernels 6 --seconds 20    a look
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import psutil
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager

from vmkernel.cli.install import install_kernelspec
from vmkernel.host.capacity import vm_slots
from vmkernel.settings import load_settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import leftovers

KERNEL = "vmsandbox-soak"
COUNT = "n = globals().get('n', 0) + 1"
SLOWLY = f"import time; time.sleep(1); {COUNT}"
"""So long that a kill now and then hits a cell that runs"""
VICTIMS = ("VM", "guest kernel", "wrapper", "nothing of ours: an interrupt")
START_AT_ONCE = 4
MiB = 1 << 20


@dataclass
class Sample:
    """The host at one moment; memory in MiB."""

    at: float
    vms: int
    slots: int
    wrappers: int
    wrapper_pss: float
    """Median of the wrappers'"""
    vm_pss: float
    """Median of the VMs' (QEMU with what encloses it)"""
    wrapper_fds: float
    """Median of the wrappers'"""
    most_fds: int


@dataclass
class Result:
    """What a run found."""

    kernels: int
    seconds: float
    cells: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Cells that ended in an error after a kill, by the error's name"""
    kills: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    """Seconds from a cell's sending to its reply, of undisturbed cells"""
    samples: list[Sample] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    started_in: float = 0.0
    ended_in: float = 0.0


class Member:
    """One kernel, its front end, and what its VM should remember."""

    def __init__(self, number: int, soak: Soak) -> None:
        self.number = number
        self.manager = AsyncKernelManager(kernel_name=KERNEL)
        self.client: AsyncKernelClient | None = None
        self.expected = 0
        self.disturbed = True
        """Since the last right answer something was killed: its number may be gone"""
        self.kills = 0
        self.answered = asyncio.Event()
        self._soak = soak
        self._not_ours: set[str] = set()

    @property
    def pid(self) -> int:
        """The wrapper's."""
        return int(self.manager.provisioner.pid)

    async def start(self) -> None:
        """Start the kernel, or another after its death."""
        await self.manager.start_kernel(stderr=self._soak.log, stdout=self._soak.log)
        self._connect()

    async def restart(self) -> None:
        """What a front end does when a kernel's process has died."""
        assert self.client is not None
        self.client.stop_channels()
        await self.manager.restart_kernel(now=True)
        self._connect()

    def _connect(self) -> None:
        self.client = self.manager.client()
        self.client.start_channels(hb=False)
        self.disturbed = True

    async def close(self) -> None:
        """End the kernel as a front end does."""
        if self.client is not None:
            self.client.stop_channels()
        await self.manager.shutdown_kernel()

    async def count(self) -> None:
        """One cell, and a look at what it says."""
        assert self.client is not None
        asked, kills = time.monotonic(), self.kills
        slow = self._soak.random.random() < 0.3
        msg_id = self.client.execute(
            SLOWLY if slow else COUNT, user_expressions={"n": "n"}, stop_on_error=False
        )
        content = await self._answer(msg_id, asked)
        result = self._soak.result
        if content is None:
            return
        took = time.monotonic() - asked
        result.cells += 1
        if content["status"] != "ok":
            result.errors[str(content.get("ename"))] += 1
            if not self.disturbed:
                self._soak.find(f"kernel {self.number}: an error out of nowhere: {content}")
            elif not content.get("traceback"):
                self._soak.find(f"kernel {self.number}: an error without a word: {content}")
            return  # it may have counted or not, or its number may be gone
        said = content["user_expressions"]["n"]
        number = int(said["data"]["text/plain"]) if said.get("status") == "ok" else -1
        right = {self.expected + 1}
        if self.disturbed:
            right |= {1, self.expected + 2}
        if number not in right:
            self._soak.find(f"kernel {self.number}: {number} in place of {self.expected + 1}")
        elif not self.disturbed and not slow:
            result.waits.append(took)
        self.expected = number
        self.disturbed = self.kills != kills  # meanwhile: the next cell may feel it
        self.answered.set()

    def end_guest_kernel(self) -> None:
        """By a cell that nobody waits for."""
        assert self.client is not None
        self._not_ours.add(self.client.execute("import os; os._exit(7)", silent=True))

    async def _answer(self, msg_id: str, asked: float) -> dict[str, Any] | None:
        """The reply; None when the kernel's process died, which is then replaced."""
        assert self.client is not None
        while time.monotonic() < asked + self._soak.patience:
            try:
                message = await self.client.get_shell_msg(timeout=1.0)
            except Empty:
                if not await self.manager.is_alive():
                    if not self.disturbed:
                        self._soak.find(f"kernel {self.number}: its process died by itself")
                    await self.restart()
                    self.expected = 0
                    return None
                continue
            if message["parent_header"].get("msg_id") == msg_id:
                return dict(message["content"])
            if message["parent_header"].get("msg_id") not in self._not_ours:
                self._soak.find(f"kernel {self.number}: a reply to something else: {message}")
        self._soak.find(f"kernel {self.number}: no answer in {self._soak.patience:g} s")
        await self.restart()
        return None


class Soak:
    """The run."""

    def __init__(self, directory: Path, kernels: int, seconds: float, seed: int) -> None:
        self.directory = directory
        self.log = (directory / "kernels.log").open("wb")
        self.random = random.Random(seed)
        self.patience = 120.0
        self.result = Result(kernels, seconds)
        self.members = [Member(number, self) for number in range(kernels)]
        self._end = 0.0

    def find(self, what: str) -> None:
        """Something that must not be."""
        self.result.findings.append(what)
        print(f"soak: FOUND: {what}", flush=True)

    async def run(self, pause: float, between_kills: float) -> Result:
        """Start, soak, end.  ``pause``: mean seconds between a kernel's cells."""
        began = time.monotonic()
        gate = asyncio.Semaphore(START_AT_ONCE)

        async def start(member: Member) -> None:
            async with gate:
                await member.start()
                await member.count()

        try:
            await asyncio.gather(*map(start, self.members))
            self.result.started_in = time.monotonic() - began
            print(f"soak: {len(self.members)} kernels in {self.result.started_in:.1f} s")
            self._end = time.monotonic() + self.result.seconds
            workers = [asyncio.create_task(self._work(each, pause)) for each in self.members]
            watchers = [
                asyncio.create_task(self._kill(between_kills)),
                asyncio.create_task(self._watch()),
            ]
            await asyncio.gather(*workers)
            for task in watchers:
                task.cancel()
            for outcome in await asyncio.gather(*watchers, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome
        finally:
            ended = time.monotonic()
            await asyncio.gather(
                *(member.close() for member in self.members), return_exceptions=True
            )
            self.result.ended_in = time.monotonic() - ended
        self._look_at_the_end()
        return self.result

    async def _work(self, member: Member, pause: float) -> None:
        while time.monotonic() < self._end:
            await member.count()
            await asyncio.sleep(self.random.expovariate(1 / pause))
        member.disturbed = True  # the last word is an answer, whatever was killed meanwhile
        member.answered.clear()
        for _ in range(3):
            await member.count()
            if member.answered.is_set():
                return
        self.find(f"kernel {member.number}: no right answer at the end")

    async def _kill(self, between: float) -> None:
        while True:
            await asyncio.sleep(self.random.expovariate(1 / between))
            member, victim = self.random.choice(self.members), self.random.choice(VICTIMS)
            member.disturbed = True
            member.kills += 1
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if victim == "VM":
                    for process in _vms(psutil.Process(member.pid)):
                        process.kill()
                elif victim == "wrapper":
                    os.kill(member.pid, 9)
                elif victim == "guest kernel":
                    member.end_guest_kernel()
                else:
                    await member.manager.interrupt_kernel()
                self.result.kills[victim] += 1

    async def _watch(self) -> None:
        began = time.monotonic()
        while True:
            self.result.samples.append(
                await asyncio.to_thread(self._sample, time.monotonic() - began)
            )
            await asyncio.sleep(max(5.0, self.result.seconds / 60))

    def _sample(self, at: float) -> Sample:
        wrappers, vms = [], []
        fds = []
        for member in self.members:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process = psutil.Process(member.pid)
                wrappers.append(_pss(process))
                fds.append(process.num_fds())
                vms += [_pss(vm) for vm in _vms(process)]
        most = self.result.kernels
        used = vm_slots(load_settings()).statistics().used
        if used > most + 1:
            self.find(f"{used} slots for {most} kernels")
        return Sample(
            round(at, 1),
            len(vms),
            used,
            len(wrappers),
            statistics.median(wrappers or [0]),
            statistics.median(vms or [0]),
            statistics.median(fds or [0]),
            max(fds or [0]),
        )

    def _look_at_the_end(self) -> None:
        for line in leftovers.find(self.directory):
            self.find(f"left behind: {line}")
        slots = vm_slots(load_settings()).statistics()
        if slots.used or slots.waiting:
            self.find(f"slots are not free: {slots}")


def _vms(wrapper: psutil.Process) -> list[psutil.Process]:
    """The QEMU of a wrapper (one; two for a moment, while a new one replaces a dead one)."""
    return [
        process for process in wrapper.children(recursive=True) if "qemu-system" in process.name()
    ]


def _pss(process: psutil.Process) -> float:
    return float(process.memory_full_info().pss) / MiB


def report(result: Result) -> str:
    """A table of the run."""
    waits = sorted(result.waits) or [0.0]
    third = max(1, len(result.samples) // 3)
    first, last = result.samples[:third], result.samples[-third:]

    def medians(name: str) -> str:
        then, now = (statistics.median(getattr(s, name) for s in part) for part in (first, last))
        return f"{then:.1f} in the first third, {now:.1f} in the last"

    lines = [
        f"kernels               {result.kernels}, up in {result.started_in:.1f} s",
        f"time                  {result.seconds:g} s",
        f"cells answered        {result.cells}, of them errors after a kill: {dict(result.errors)}",
        f"killed                {dict(result.kills)}",
        f"undisturbed cell      median {waits[len(waits) // 2] * 1000:.0f} ms, "
        f"p95 {waits[len(waits) * 95 // 100] * 1000:.0f} ms, most {waits[-1] * 1000:.0f} ms",
        f"ended in              {result.ended_in:.1f} s",
    ]
    if result.samples:
        lines += [
            f"slots used            most {max(sample.slots for sample in result.samples)}",
            f"wrapper, PSS MiB      {medians('wrapper_pss')}",
            f"VM, PSS MiB           {medians('vm_pss')}",
            f"wrapper, descriptors  {medians('wrapper_fds')}; most "
            f"{max(sample.most_fds for sample in result.samples)}",
        ]
    return "\n".join([*lines, f"findings              {len(result.findings)}"])


def prepare(directory: Path, recipe: str, kernels: int) -> None:
    """Give the run a host of its own: sockets, records and slots lie in ``directory``."""
    cache_dir = load_settings().cache_dir
    cache_dir.mkdir(parents=True, exist_ok=True)
    (directory / "cache").symlink_to(cache_dir)
    os.environ.update(
        VMKERNEL_CACHE_DIR=str(directory / "cache"),
        VMKERNEL_RUNTIME_DIR=str(directory / "run"),
        VMKERNEL_STATE_DIR=str(directory / "state"),
        VMKERNEL_MAX_CONCURRENT_VMS=str(kernels + 4),
        JUPYTER_DATA_DIR=str(directory / "jupyter"),
        JUPYTER_RUNTIME_DIR=str(directory / "jupyter" / "runtime"),
        JUPYTER_PLATFORM_DIRS="1",
        JUPYTER_PREFER_ENV_PATH="0",
        IPYTHONDIR=str(directory / "ipython"),
    )
    options = {"recipe": recipe, "memory": "512M"}
    install_kernelspec(directory / "jupyter" / "kernels", name=KERNEL, options=options)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="script/soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--pause", type=float, default=4, help="mean seconds between two cells")
    parser.add_argument("--kills", type=float, default=3, help="mean seconds between two kills")
    parser.add_argument("--recipe", default="minimal")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="vmk-soak-", dir="/tmp"))
    try:
        prepare(directory, options.recipe, options.kernels)
        soak = Soak(directory, options.kernels, options.seconds, options.seed)
        result = asyncio.run(soak.run(options.pause, options.kills))
        soak.log.close()
        print(report(result))
        if options.json:
            counts = {"errors": dict(result.errors), "kills": dict(result.kills)}
            samples = [asdict(sample) for sample in result.samples]
            whole = {**vars(result), **counts, "samples": samples}
            options.json.write_text(json.dumps(whole, indent=1))
        if result.findings:
            print("soak: the kernels' own words, at the end:")
            print((directory / "kernels.log").read_text(errors="replace")[-4000:])
        return 1 if result.findings else 0
    finally:
        for process in leftovers.processes_of(directory):
            process.kill()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
