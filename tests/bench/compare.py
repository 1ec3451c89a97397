#!/usr/bin/env python3
"""Kernels side by side: plain ipykernel, and ours in its microVM, in one run.

    script/bench                      everything, about five minutes
    script/bench --quick              fewer rounds, about two
    script/bench --only start         one block (repeatable)
    script/bench --kernel NAME        which kernelspecs; the first is what others are compared to
    script/bench --waterfall          where the time from the spawn to the first result goes
    script/bench --oneshot            `vmkernel run` of hello world beside python3, bubblewrap, …

Black box: jupyter_client starts the kernels, as any front end does, and /proc tells their memory.
The table and a JSON file with every sample go to bench-output/.  It never fails on a figure: one
that could not be taken is shown as such, with the reason.  Modules: ``blocks`` (what is done),
``subject`` (one kernel), ``memory``, ``machine``, ``figures`` (samples, ratios), ``report``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import machine
import oneshot
import report
import waterfall
from blocks import BLOCKS, Run
from figures import Results
from subject import Subject

OUTPUT = Path(__file__).resolve().parents[2] / "bench-output"
TEMPLATE_LIMIT = 600.0
"""Seconds the very first start may take: it may have to build a template."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measures Jupyter kernels side by side; see tests/bench/compare.py."
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--kernel", action="append", metavar="NAME",
        help="a kernelspec's name, repeatable; the first is the base (python3, vmsandbox)",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", choices=BLOCKS, metavar="BLOCK",
        help=f"measure this block, repeatable: {', '.join(BLOCKS)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="samples of what is slow (9; quick: 3)")
    parser.add_argument("--cells", type=int, help="round trips (300; quick: 60)")
    parser.add_argument("--many", type=int, help="kernels at once for memory (5; quick: 3)")
    parser.add_argument(
        "--waterfall", action="store_true", help="show the steps of a start instead"
    )
    parser.add_argument(
        "--oneshot", action="store_true", help="measure one-shot runs of hello world instead"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory of the results")
    options = parser.parse_args()
    options.kernel = options.kernel or ["python3", "vmsandbox"]
    options.only = options.only or list(BLOCKS)
    for name, usual, quick in (("rounds", 9, 3), ("cells", 300, 60), ("many", 5, 3)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    if min(options.rounds, options.cells) < 1 or options.many < 2:
        parser.error("--rounds and --cells need at least 1, --many at least 2")
    return options


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def warm(kernels: list[str], results: Results) -> dict[str, str]:
    """Start each kernel once, unmeasured: a VM's template is there then, and files are cached.

    Returns what each says of itself; a kernel that does not start is left out from here on.
    """
    banners: dict[str, str] = {}
    for kernel in kernels:
        say(f"warming {kernel}")
        try:
            subject = Subject.start(kernel, limit=TEMPLATE_LIMIT)
        except Exception as error:  # whatever it is: said, and the others are measured
            results.fail(("start_first",), kernel, f"it does not start: {error}")
            continue
        info = subject.info
        lines = [line for line in str(info.get("banner", "")).splitlines() if line.strip()]
        banners[kernel] = (
            f"{info.get('implementation')} {info.get('implementation_version')}, "
            f"Python {info['language_info'].get('version')}; {lines[-1] if lines else ''}"
        )
        subject.kill()
    return banners


def main() -> int:
    """Measure, print, write; 0 unless the arguments are wrong."""
    options = parse_arguments()
    # An installed package has its bytecode; in a checkout the first start must be free to write it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if options.waterfall:
        return waterfall.main(options.kernel, options.rounds, options.output, say)
    if options.oneshot:
        return oneshot.main(options.rounds, options.output, say)
    begun = time.time()
    stamp = time.strftime("%Y-%m-%dT%H%M%S", time.localtime(begun))
    host: dict[str, Any] = machine.describe()
    host |= {
        "date": stamp,
        "load_at_begin": machine.load(),
        "calibration_ms_at_begin": machine.calibrate(),
    }
    results = Results(list(options.kernel))
    host["kernels"] = warm(options.kernel, results)
    every = list(results.kernels)
    results.kernels = list(host["kernels"])
    run = Run(results, options.rounds, options.cells, options.many, say)
    try:
        for name in options.only if results.kernels else ():
            say(f"{name} (load {machine.load()}, {time.time() - begun:.0f} s so far)")
            BLOCKS[name](run)
    except KeyboardInterrupt:
        say("interrupted: this is what was measured so far")
    results.kernels = every
    host["load_at_end"] = machine.load()
    host["calibration_ms_at_end"] = machine.calibrate()
    path = options.output / f"compare-{stamp}.json"
    settings = {name: getattr(options, name) for name in ("rounds", "cells", "many", "only")}
    report.write_json(path, host, results, settings)
    text = f"{report.machine_lines(host)}\n\n{report.table(results)}\n"
    if remarks := report.notes(results):
        text += f"\n{remarks}\n"
    path.with_suffix(".md").write_text(text)
    print(text)
    say(f"written: {os.path.relpath(path)} and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
