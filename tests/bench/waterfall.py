"""Where the time from the spawn to the first result goes, step by step and import by import.

Two sources, each in starts of its own since the second one slows what it watches: the stamps that
a kernel writes into the file named by VMKERNEL_TRACE (``vmkernel/trace.py``; a kernel that knows
nothing of it shows only what a front end sees), and ``python -X importtime`` by its environment
variable.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import machine
from subject import KernelFailedError, Subject

_WIDTH = 48
_TOP = 25
Say = Callable[[str], None]
Steps = list[tuple[str, float]]


def main(kernels: list[str], rounds: int, output: Path, say: Say) -> int:
    """Print and write the waterfall of each kernel; always 0."""
    stamp = time.strftime("%Y-%m-%dT%H%M%S")
    collected: dict[str, object] = {"machine": machine.describe(), "load": machine.load()}
    lines: list[str] = []
    for kernel in kernels:
        say(f"waterfall of {kernel}")
        try:
            Subject.start(kernel, limit=600.0).kill()  # files and template warm
            steps = median_steps([_one_start(kernel) for _ in range(rounds)])
            imports = _imports(kernel, min(rounds, 3))
        except (KernelFailedError, OSError, RuntimeError) as error:
            lines.append(f"{kernel}: not taken: {error}\n")
            continue
        collected[kernel] = {"steps_ms": steps, "imports_us": imports}
        lines += [draw(kernel, steps), _import_table(imports)]
    text = "\n".join(lines)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"waterfall-{stamp}.json"
    path.write_text(json.dumps(collected, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(text)
    print(text)
    say(f"written: {path} and .md")
    return 0


def _one_start(kernel: str) -> Steps:
    """The steps of one start, ms since the spawn."""
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace")
        subject = Subject.start(kernel, env={"VMKERNEL_TRACE": str(trace)})
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


def draw(kernel: str, steps: Steps) -> str:
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


def _imports(kernel: str, rounds: int) -> dict[str, tuple[int, int]]:
    """Microseconds of each import (its own, with what it imports): the least of several starts."""
    least: dict[str, tuple[int, int]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryFile() as stderr:
            Subject.start(kernel, env={"PYTHONPROFILEIMPORTTIME": "1"}, stderr=stderr).kill()
            stderr.seek(0)
            text = stderr.read().decode(errors="replace")
        for line in text.splitlines():
            if not line.startswith("import time:") or "[us]" in line:
                continue
            own, total, module = (part.strip() for part in line[len("import time:") :].split("|"))
            found = (int(own), int(total))
            least[module] = min(found, least.get(module, found))
    return least


def _import_table(imports: dict[str, tuple[int, int]]) -> str:
    total = sum(own for own, _ in imports.values()) / 1000
    lines = [f"  imports: {len(imports)} modules, {total:.0f} ms (least of the starts); longest:"]
    longest = sorted(imports.items(), key=lambda item: -item[1][0])[:_TOP]
    for module, (own, with_its_own) in longest:
        lines.append(f"  {own / 1000:8.1f} ms, {with_its_own / 1000:7.1f} in all  {module}")
    return "\n".join(lines) + "\n"
