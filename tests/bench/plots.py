"""The plots of docs/performance.md, from the JSON that a run has written: PNG files beside it.

``start-up.png``  the waterfall of a start, one bar a kernel, and their steps
``scale.png``     what a further kernel costs against their number: memory, start, answer
``ratios.png``    each figure with a goal: the ratio to plain ipykernel, and the goal

Each says at its foot on which machine it was taken.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmkernel.bench import report
from vmkernel.bench.figures import FIGURES

_COLOURS = ["#4c72b0", "#dd8452", "#55a868"]
_GREY = "#8c8c8c"


def draw(path: Path) -> list[Path]:
    """Draw what the JSON file *path* has; the PNG files, beside it."""
    # Its font cache is not the user's business
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MPLCONFIGDIR", cache)
        import matplotlib as mpl

        mpl.use("agg")
        content = json.loads(path.read_text())
        made = []
        for key, name, plot in _PLOTS:
            if content.get(key):
                figure = plot(content)
                if figure is None:
                    continue
                _foot(figure, content["machine"])
                target = path.with_name(f"{path.stem}-{name}.png")
                figure.savefig(target, dpi=110, metadata={"Software": None})
                made.append(target)
    return made


def _foot(figure: Any, machine: dict[str, Any]) -> None:
    version = next((word for word in machine["qemu"].split() if word[:1].isdigit()), "?")
    line = (
        f"{report.short_machine(machine)}, Python {machine['python']}, QEMU {version} "
        f"({report.accelerator(machine) or machine['accelerator']}); "
        f"{machine['date'][:10]}, load {machine['load_at_begin']}"
    )
    figure.text(0.01, 0.005, line, fontsize=6.5, color=_GREY)


def _start_up(content: dict[str, Any]) -> Any:
    """Each kernel's steps as one bar: a segment from the step before to this one."""
    import matplotlib.pyplot as plt

    found = {name: data for name, data in content["waterfall"].items() if "steps_ms" in data}
    if not found:
        return None
    heights = [len(data["steps_ms"]) for data in found.values()]
    longest = max(data["steps_ms"][-1][1] for data in found.values())
    figure, every = plt.subplots(
        len(found), 1, figsize=(9, 1.6 + 0.24 * sum(heights) + 0.5 * len(found)), sharex=True,
        height_ratios=heights, squeeze=False,
    )  # fmt: skip
    for axes, colour, (name, data) in zip(every[:, 0], _COLOURS, found.items(), strict=False):
        steps = data["steps_ms"]
        before = 0.0
        for row, (step, moment) in enumerate(steps):
            axes.barh(row, moment - before, left=before, color=colour, height=0.7)
            words = f"{step}  {moment:.0f} ms (+{moment - before:.0f})"
            if moment < 0.62 * longest:
                axes.text(moment + 0.006 * longest, row, words, va="center", fontsize=8)
            elif before > 0.35 * longest:
                at = before - 0.006 * longest
                axes.text(at, row, words, va="center", ha="right", fontsize=8)
            else:
                at = before + 0.01 * longest
                axes.text(at, row, words, va="center", fontsize=8, color="white")
            before = moment
        axes.set_ylim(len(steps) - 0.4, -0.6)
        axes.set_yticks([])
        axes.set_title(f"{name}: first result after {steps[-1][1]:.0f} ms", fontsize=10, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlim(0, longest * 1.02)
    every[-1, 0].set_xlabel("ms since the front end's spawn (medians)")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _scale(content: dict[str, Any]) -> Any:
    """Memory of a further kernel, its start, and the answer to 1+1, against their number."""
    import matplotlib.pyplot as plt

    data = content["scale"]
    steps = data["steps"]
    if not steps:
        return None
    numbers = [step["kernels"] for step in steps]
    figure, (memory, start, answer) = plt.subplots(1, 3, figsize=(11, 3.9))
    memory.plot(numbers[1:], [step["pss_further"] for step in steps[1:]], "o-", color=_COLOURS[0])
    memory.set_title("memory of a further kernel, MiB PSS", fontsize=10, loc="left")
    plain = content.get("figures", {}).get("memory_further", {}).get("python3", {}).get("median")
    if plain:
        memory.axhline(plain, color=_GREY, ls="--", lw=1)
        memory.text(
            numbers[-1], plain, "plain ipykernel", ha="right", va="bottom", fontsize=8, color=_GREY
        )
    start.plot(
        numbers, [step["start_median"] for step in steps], "o-", color=_COLOURS[1], label="median"
    )
    start.plot(numbers, [step["start_p95"] for step in steps], ".:", color=_COLOURS[1], label="p95")
    start.set_title(f"spawn → first result, s ({data['kernel']})", fontsize=10, loc="left")
    start.legend(fontsize=8, frameon=False)
    medians = [statistics.median(step["answers_ms"]) for step in steps]
    answer.plot(numbers, medians, "o-", color=_COLOURS[2], label="one after another")
    answer.set_title("answer to `1+1`, ms", fontsize=10, loc="left")
    for axes in (memory, start, answer):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("kernels at once")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _ratios(content: dict[str, Any]) -> Any:
    """A bar a figure and kernel: how many times plain ipykernel's; a mark where the goal is."""
    import matplotlib.pyplot as plt

    base, *others = content["kernels"]
    titles = {figure.key: figure for figure in FIGURES}
    rows: list[tuple[str, dict[str, Any]]] = []
    for key, entry in content["figures"].items():
        if key in titles and any(entry.get(name, {}).get("goal") is not None for name in others):
            rows.append((titles[key].title, entry))
    if not rows or not others:
        return None
    figure, axes = plt.subplots(figsize=(9.5, 1.6 + 0.48 * len(rows)))
    width = 0.8 / len(others)
    most = 2.2
    for place, (name, colour) in enumerate(zip(others, _COLOURS, strict=False)):
        for row, (_, entry) in enumerate(rows):
            found = entry.get(name, {})
            ratio, goal = found.get("ratio"), found.get("goal")
            at = row - 0.4 + width * (place + 0.5)
            if ratio is not None:
                label = name if row == 0 else None
                axes.barh(at, min(ratio, most), height=width * 0.9, color=colour, label=label)
                mark = {True: " ✓", False: " ✗", None: ""}[found.get("met")]
                right = max(min(ratio, most), min(goal or 0, most))  # clear of the goal's mark
                axes.text(right + 0.02, at, f"{ratio:.2f}{mark}", va="center", fontsize=8)
            if goal is not None:
                axes.plot([goal, goal], [at - width / 2, at + width / 2], color="black", lw=1.6)
    axes.axvline(1, color=_GREY, lw=1, ls="--", zorder=0)
    short = [
        f"{title} (more is better)" if entry.get("more_is_better") else title
        for title, entry in rows
    ]
    previous = ""
    for at, title in enumerate(short):
        if title.startswith("— "):
            short[at] = f"{previous}: {title[2:]}"
        previous = title.partition(":")[0]
    axes.set_yticks(range(len(rows)), short, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, most + 0.2)
    axes.set_xlabel(f"times {base} (dashed: as plain ipykernel; black mark: the goal)")
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


_PLOTS: tuple[tuple[str, str, Callable[[dict[str, Any]], Any]], ...] = (
    ("waterfall", "start-up", _start_up),
    ("scale", "scale", _scale),
    ("figures", "ratios", _ratios),
)
