#!/usr/bin/env python3
"""Kernels side by side: plain ipykernel, and ours in its microVM, in one run.

    script/bench                      everything, about six minutes
    script/bench --quick              fewer rounds, about three
    script/bench --only start         one block (repeatable)
    script/bench --kernel NAME        which kernelspecs; the first is what others are compared to,
                                      NAME+pool is started from a ready pool, NAME is not
    script/bench --waterfall          where the time from the spawn to the first result goes
    script/bench --scale 200          many kernels at once: what a further one costs, as they grow
    script/bench --goals              all of that, for docs/performance.md: figures, plots
    script/bench --plot FILE.json     the plots of what one of these has written
    script/bench --cluster            a kernel that Ray places, beside the same kernel started here
    script/bench --oneshot            `vmkernel run` of hello world beside python3, bubblewrap, …

What is measured, and how, is in ``vmkernel/bench``; here is what only a checkout has: the command
line, ``waterfall``, ``scale``, ``plots``, ``oneshot``, ``soak``.  Tables and JSON files with every
sample go to bench-output/.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oneshot
import page
import plots
import scale
import waterfall

from vmkernel.bench import machine, report
from vmkernel.bench.blocks import BLOCKS
from vmkernel.bench.measure import measure, text
from vmkernel.bench.rig import Pool, Rig
from vmkernel.cli.install import install_kernelspec

OUTPUT = Path(__file__).resolve().parents[2] / "bench-output"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measures Jupyter kernels side by side; see tests/bench/compare.py."
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--brief", action="store_true", help="what needs long waits left out")
    parser.add_argument(
        "--kernel", action="append", metavar="NAME",
        help="a kernelspec's name, NAME+pool for one from the ready pool, repeatable; the first is "
        "the base (python3, vmsandbox, vmsandbox+pool)",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", choices=BLOCKS, metavar="BLOCK",
        help=f"measure this block, repeatable: {', '.join(BLOCKS)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="samples of what is slow (11; quick: 3)")
    parser.add_argument("--cells", type=int, help="round trips (400; quick: 60)")
    parser.add_argument("--many", type=int, help="kernels at once for memory (5; quick: 3)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--waterfall", action="store_true", help="the steps of a start instead")
    other.add_argument("--scale", type=int, metavar="N", help="up to N kernels at once instead")
    other.add_argument("--oneshot", action="store_true", help="one-shot hello world instead")
    other.add_argument("--cluster", action="store_true", help="placed by Ray beside started here")
    other.add_argument("--goals", action="store_true", help="figures, waterfall and scale, plotted")
    other.add_argument("--plot", type=Path, metavar="JSON", help="draw what was measured")
    parser.add_argument("--pool", action="store_true", help="with --cluster: from the ready pool")
    parser.add_argument(
        "--most", type=int, default=200, metavar="N", help="kernels at once, with --goals (200)"
    )
    parser.add_argument(
        "--into-docs", action="store_true", help="with --goals and --plot: also into docs/"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory of the results")
    options = parser.parse_args()
    options.only = options.only or list(BLOCKS)
    for name, usual, quick in (("rounds", 11, 3), ("cells", 400, 60), ("many", 5, 3)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    if min(options.rounds, options.cells) < 1 or options.many < 2:
        parser.error("--rounds and --cells need at least 1, --many at least 2")
    if options.scale is not None and options.scale < 2:
        parser.error("--scale needs at least 2")
    return options


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print, write; 0 unless the arguments are wrong."""
    options = parse_arguments()
    # An installed package has its bytecode; in a checkout the first start must be free to write it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if options.oneshot:
        return oneshot.main(options.rounds, options.output, say)
    if options.cluster:
        import cluster

        words, found = cluster.take(
            options.rounds, options.cells, options.many, options.pool, say
        )  # fmt: skip
        path = options.output / f"cluster-{time.strftime('%Y-%m-%dT%H%M%S')}.json"
        report.write_json(path, found)
        path.with_suffix(".md").write_text(words)
        print(words)
        return 0
    if options.plot:
        return draw(options.plot, options.into_docs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what there is by then is told
    what = next(
        (word for word in ("waterfall", "scale", "goals") if getattr(options, word)), "compare"
    )
    content: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}
    words: list[str] = []
    with Rig() as rig:
        install_kernelspec(rig.kernels_dir, name="vmsandbox")
        kernels = options.kernel or default_kernels()
        if what in ("compare", "goals"):
            results, host = measure(
                rig, kernels, options.only, rounds=options.rounds, cells=options.cells,
                many=options.many, say=say, brief=options.brief,
            )  # fmt: skip
            content |= report.full(results, host)
            words.append(text(results, host))
        else:
            content["machine"] = machine.describe() | {
                "date": time.strftime("%Y-%m-%dT%H%M%S"), "load_at_begin": machine.load()
            }  # fmt: skip
        if what in ("waterfall", "goals"):
            rounds = min(options.rounds, 7)
            content["waterfall"] = waterfall.take(rig, kernels, rounds, say)
            words.append(waterfall.text(content["waterfall"]))
        if what in ("scale", "goals"):
            most = options.most if what == "goals" else options.scale
            content["scale"] = scale.take(rig, kernels[-1], most, say)
            words.append(scale.text(content["scale"]))
    content["machine"]["load_at_end"] = machine.load()
    path = options.output / f"{what}-{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    report.write_json(path, content)
    if imports := waterfall.imports_text(content.get("waterfall", {})):
        words.append(f"{page.IMPORTS}\n\n{imports}")
    whole = "\n".join(words)
    path.with_suffix(".md").write_text(whole)
    print(whole)
    say(f"written: {os.path.relpath(path)} and .md")
    return draw(path, options.into_docs) if what == "goals" else 0


def default_kernels() -> list[str]:
    """Plain, ours past the pool, and from it where there is one."""
    return ["python3", "vmsandbox", *(["vmsandbox+pool"] if Pool.exists() else [])]


def draw(path: Path, into_docs: bool) -> int:
    """The plots beside the JSON file *path*, and in docs/ if so asked."""
    made: Sequence[Path] = plots.draw(path)
    for plot in made:
        say(f"drawn: {os.path.relpath(plot)}")
    if into_docs:
        page.update(path, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
