"""A run of the benchmark from its begin to its end: warm, measure block by block, describe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from vmkernel.bench import machine, report
from vmkernel.bench.blocks import BLOCKS, Run
from vmkernel.bench.figures import Results
from vmkernel.bench.rig import Rig
from vmkernel.bench.subject import Subject

TEMPLATE_LIMIT = 600.0
"""Seconds the very first start may take: it may have to build a template."""


def warm(
    rig: Rig, kernels: Iterable[str], results: Results, say: Callable[[str], None]
) -> dict[str, str]:
    """Start each kernel once, unmeasured: a VM's template is there then, and files are cached.

    Returns what each says of itself; a kernel that does not start is left out from here on.
    """
    banners: dict[str, str] = {}
    for kernel in kernels:
        say(f"warming {kernel}")
        try:
            subject = Subject.start(rig, kernel, limit=TEMPLATE_LIMIT)
        except Exception as error:  # whatever it is: said, and the others are measured
            results.fail(("start_first",), kernel, f"it does not start: {error}")
            continue
        subject.ask_info()  # it may not have known its VM at first
        info = subject.info
        lines = str(info.get("banner", "")).splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith("Tip:")]
        banners[kernel] = (
            f"{info.get('implementation')} {info.get('implementation_version')}, "
            f"Python {info['language_info'].get('version')}; {lines[-1] if lines else ''}"
        )
        subject.kill()
    return banners


def measure(
    rig: Rig,
    kernels: list[str],
    blocks: Iterable[str],
    *,
    rounds: int,
    cells: int,
    many: int,
    say: Callable[[str], None],
    brief: bool = False,
) -> tuple[Results, dict[str, Any]]:
    """Take the figures; also where and when they were taken.  Ctrl-C ends it with what there is."""
    begun = time.time()
    results = Results(list(kernels))
    host: dict[str, Any] = machine.describe() | {
        "date": time.strftime("%Y-%m-%dT%H%M%S", time.localtime(begun)),
        "load_at_begin": machine.load(),
        "calibration_ms_at_begin": machine.calibrate(),
        "kernels": {},
    }
    try:
        host["kernels"] = warm(rig, kernels, results, say)
        results.kernels = [kernel for kernel in kernels if kernel in host["kernels"]]
        run = Run(results, rig, rounds, cells, many, say, brief)
        for name in blocks if results.kernels else ():
            say(f"{name} (load {machine.load()}, {time.time() - begun:.0f} s so far)")
            BLOCKS[name](run)
    except KeyboardInterrupt:
        say("interrupted: this is what was measured so far")
    results.kernels = list(kernels)
    host |= {
        "load_at_end": machine.load(),
        "calibration_ms_at_end": machine.calibrate(),
        "seconds": round(time.time() - begun),
    }
    return results, host


def text(results: Results, host: dict[str, Any], *, goals: bool = True) -> str:
    """Machine, table, and what is missing in it."""
    lines = f"{report.machine_lines(host)}\n\n{report.table(results, goals=goals)}\n"
    remarks = report.notes(results)
    parts = [lines, *([remarks + "\n"] if remarks else [])]
    if goals and (memory := report.memory_map(results)):
        parts.append(memory + "\n")
    return "\n".join(parts)
