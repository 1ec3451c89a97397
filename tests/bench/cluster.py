"""``script/bench --cluster``: a kernel that Ray places, beside the same kernel started here.

One machine is head, VM host and front end, so what differs is only the way: a reservation, the
host's actor, the relay and its encryption.  Starts are interleaved.  With ``--pool`` both take
their kernels from the ready pool.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from vmkernel.bench import machine, report
from vmkernel.bench.blocks import Run, restart, round_trip
from vmkernel.bench.figures import Results
from vmkernel.bench.measure import text, warm
from vmkernel.bench.memory import Footprint, footprint
from vmkernel.bench.rig import POOL, Rig
from vmkernel.bench.subject import Subject, clock
from vmkernel.cli.install import install_kernelspec

sys.path.insert(0, str(Path(__file__).parents[1]))
from localray import LocalRay

BASE, RAY = "vmsandbox", "vmsandbox-ray"
SLOTS = 64


def take(rounds: int, cells: int, many: int, pooled: bool, say: Callable[[str], None]) -> Any:
    """The figures: what they are in words, and as JSON."""
    suffix = POOL if pooled else ""
    kernels = [BASE + suffix, RAY + suffix]
    with Rig() as rig, _cluster(rig, pooled):
        host = machine.describe() | {
            "date": time.strftime("%Y-%m-%dT%H%M%S"), "load_at_begin": machine.load(),
            "calibration_ms_at_begin": machine.calibrate(),
        }  # fmt: skip
        results = Results(kernels)
        run = Run(results, rig, rounds, cells, many, say, brief=True)
        host["kernels"] = warm(rig, kernels, results, say)
        for name, block in (("start", _start), ("restart", restart), ("round trip", round_trip)):
            say(f"{name} (load {machine.load()})")
            block(run)
        say("memory")
        memory = {kernel: _memory(run, kernel) for kernel in kernels}
        host |= {
            "load_at_end": machine.load(), "calibration_ms_at_end": machine.calibrate(),
            "seconds": 0,
        }  # fmt: skip
        words = f"{text(results, host, goals=False)}\n{_in_words(memory, many)}"
        return words, report.full(results, host) | {"memory": memory}


@contextlib.contextmanager
def _cluster(rig: Rig, pooled: bool) -> Iterator[None]:
    """A head and one host, in the rig's directories, so that both ways meet the same VMs."""
    with LocalRay(rig.directory) as ray:
        ray.join(SLOTS, {"VMKERNEL_POOL_SIZE": "1" if pooled else "0"})
        os.environ.update(ray.env)
        for name, on_hosts in ((BASE, ""), (RAY, BASE)):
            options = {"cluster_address": ray.address} if on_hosts else {}
            install_kernelspec(rig.kernels_dir, name=name, options=options, on_hosts=on_hosts)
        try:
            yield
        finally:
            from vmkernel.cluster.driver import Driver

            Driver.get().stop()


def _start(run: Run) -> None:
    """As the block of that name; the end is jupyter_client's polite shutdown."""
    for order in run.orders(run.rounds):
        for kernel in order:
            with run.sample(kernel, "start_info", "start_first", "shutdown"):
                subject = Subject.start(run.rig, kernel)
                run.results.add("start_info", kernel, subject.info_after)
                run.results.add("start_first", kernel, subject.first_after)
                begun = clock()
                subject.end()
                run.results.add("shutdown", kernel, clock() - begun)


def _memory(run: Run, kernel: str) -> dict[str, Any]:
    """PSS of all processes of kernels and of this one, where the relays are: one kernel, many."""
    with contextlib.ExitStack() as stack:
        one, many = Footprint(), Footprint()
        for number in range(run.many):
            subject = Subject.start(run.rig, kernel, remembers=False)
            stack.callback(subject.kill)
            subject.listen()
            if number == 0:
                run.rig.settle()
                one = footprint(_counted(run.rig))
        run.rig.settle()
        many = footprint(_counted(run.rig))
        return {
            "further": many.minus(one, run.many - 1).as_json(),
            "once": {name: round(sum(map(_pss, pids)), 1) for name, pids in _rays(run.rig).items()},
        }


def _counted(rig: Rig) -> list[int]:
    rays = {pid for name, pids in _rays(rig).items() if name not in _OURS for pid in pids}
    return [os.getpid(), *(pid for pid in rig.processes() if pid not in rays)]


_OURS = ("the host's actor", "the front end's placer")


def _rays(rig: Rig) -> dict[str, list[int]]:
    """The processes that a cluster has once, by what they are."""
    found: dict[str, list[int]] = {name: [] for name in (*_OURS, "Ray's own, head and host")}
    for pid in rig.processes():
        with contextlib.suppress(psutil.Error):
            words = " ".join(psutil.Process(pid).cmdline())
            if words.startswith(("ray::RayHost", "ray::KernelHost")):
                found["the host's actor"].append(pid)
            elif "vmkernel.cluster.placer" in words:
                found["the front end's placer"].append(pid)
            elif words.startswith("ray::") or "/ray/" in words or "ray.scripts" in words:
                found["Ray's own, head and host"].append(pid)
    return found


def _pss(pid: int) -> float:
    return footprint([pid]).pss


def _in_words(memory: dict[str, Any], many: int) -> str:
    lines = [
        f"Memory per further kernel (from 1 to {many}), all processes and the front end's:",
        "",
    ]
    for kernel, found in memory.items():
        parts = ", ".join(
            f"{name} {size:g}" for name, size in found["further"]["by_program"].items() if size
        )
        lines.append(f"* {kernel}: {found['further']['pss']:.1f} MiB PSS ({parts})")
    *_, last = memory.values()
    lines += ["", "Once, whatever the number of kernels:", ""]
    lines += [f"* {name}: {size:.0f} MiB PSS" for name, size in last["once"].items()]
    return "\n".join(lines) + "\n"
