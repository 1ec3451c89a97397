"""Where the time from the spawn to the first result goes, step by step and import by import.

Two sources, each in starts of its own since the second one slows what it watches: the stamps that
a kernel writes into the file named by VMKERNEL_TRACE (``vmkernel/trace.py``; a kernel that knows
nothing of it shows only what a front end sees), and ``python -X importtime`` by its environment
variable (not of a kernel from the pool, which has imported all before).
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmkernel.bench.rig import Rig, RigError, is_pooled
from vmkernel.bench.subject import KernelFailedError, Subject
from vmkernel.errors import VmError

_WIDTH = 48
_TOP = 25
Say = Callable[[str], None]
Steps = list[tuple[str, float]]


def take(rig: Rig, kernels: list[str], rounds: int, say: Say) -> dict[str, Any]:
    """The waterfall of each kernel: its steps, and its imports; or why there is none."""
    found: dict[str, Any] = {}
    for kernel in kernels:
        say(f"waterfall of {kernel}")
        try:
            Subject.start(rig, kernel, limit=600.0).kill()  # files and template warm
            steps = median_steps([_one_start(rig, kernel) for _ in range(rounds)])
            imports = {} if is_pooled(kernel) else _imports(rig, kernel, min(rounds, 3))
        except (KernelFailedError, RigError, VmError, OSError, RuntimeError) as error:
            found[kernel] = {"not_taken": str(error)}
            continue
        found[kernel] = {"steps_ms": steps, "imports_us": imports}
    return found


def text(found: dict[str, Any]) -> str:
    """Bars."""
    lines: list[str] = []
    for kernel, data in found.items():
        if "not_taken" in data:
            lines.append(f"{kernel}: not taken: {data['not_taken']}\n")
        else:
            lines.append(_bars(kernel, data["steps_ms"]))
    return "```\n" + "\n".join(lines) + "```\n"


def imports_text(found: dict[str, Any]) -> str:
    """What each kernel imports on its way, the longest first."""
    lines = [
        f"{kernel}: {_import_table(data['imports_us'])}"
        for kernel, data in found.items()
        if data.get("imports_us")
    ]
    return "```\n" + "\n".join(lines) + "```\n" if lines else ""


def _one_start(rig: Rig, kernel: str) -> Steps:
    """The steps of one start, ms since the spawn."""
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace")
        subject = Subject.start(rig, kernel, env={"VMKERNEL_TRACE": str(trace)})
        subject.kill()
        steps = [
            ("front end has kernel_info", subject.info_after * 1000),
            ("front end has the first result", subject.first_after * 1000),
        ]
        if trace.exists():
            for line in trace.read_text().splitlines():
                moment, _, step = line.partition(" ")
                steps.append((step, int(moment) / 1e6 - subject.spawned_at * 1000))
    first: dict[str, float] = {}
    for step, at in steps:  # what happens again later is not part of the start
        first[step] = min(at, first.get(step, at))
    return list(first.items())


def median_steps(starts: list[Steps]) -> Steps:
    """The median moment of every step, in order; steps that some starts lack are left out."""
    moments: dict[str, list[float]] = defaultdict(list)
    for start in starts:
        for step, at in start:
            moments[step].append(at)
    medians = [
        (step, round(statistics.median(found), 1))
        for step, found in moments.items()
        if len(found) == len(starts)
    ]
    return sorted(medians, key=lambda item: item[1])


def _bars(kernel: str, steps: Steps) -> str:
    """Bars: each from the step before to this one."""
    total = steps[-1][1] or 1.0
    wide = max(len(step) for step, _ in steps)
    lines = [f"{kernel}: ms since the spawn, and since the step before (medians)"]
    before = 0.0
    for step, moment in steps:
        begin, end = (round(_WIDTH * at / total) for at in (before, moment))
        bar = " " * begin + "█" * max(1, end - begin)
        lines.append(f"  {step:<{wide}} {moment:7.1f} {moment - before:+7.1f}  {bar}")
        before = moment
    return "\n".join(lines) + "\n"


def _imports(rig: Rig, kernel: str, rounds: int) -> dict[str, tuple[int, int]]:
    """Microseconds of each import (its own, with what it imports): the least of several starts."""
    least: dict[str, tuple[int, int]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryFile() as stderr:
            env = {"PYTHONPROFILEIMPORTTIME": "1"}
            Subject.start(rig, kernel, env=env, stderr=stderr).kill()
            stderr.seek(0)
            said = stderr.read().decode(errors="replace")
        for line in said.splitlines():
            if not line.startswith("import time:") or "[us]" in line:
                continue
            own, total, module = (part.strip() for part in line[len("import time:") :].split("|"))
            found = (int(own), int(total))
            least[module] = min(found, least.get(module, found))
    return least


def _import_table(imports: dict[str, tuple[int, int]]) -> str:
    # What two threads import at once is taken from one's own time: below nothing, then
    total = sum(max(0, own) for own, _ in imports.values()) / 1000
    lines = [f"{len(imports)} modules imported, {total:.0f} ms (least of the starts); longest:"]
    longest = sorted(imports.items(), key=lambda item: -item[1][0])[:_TOP]
    for module, (own, with_its_own) in longest:
        lines.append(f"  {own / 1000:8.1f} ms, {with_its_own / 1000:7.1f} in all  {module}")
    return "\n".join(lines) + "\n"
