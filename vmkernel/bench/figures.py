"""The figures: what each is called, what was measured for it, and how two kernels compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vmkernel.bench.rig import is_pooled


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    key: str
    title: str
    unit: str
    goal: float | None = None
    """The ratio to the base kernel that is to be reached: at most it, or at least."""
    pool_goal: float | None = None
    """The same for a kernel from the ready pool, where that one is another."""
    more_is_better: bool = False
    p95_of: str = ""
    """The figure whose samples these are: here their 95th percentile counts, not their median."""

    def goal_of(self, kernel: str) -> float | None:
        """What this kernel is to reach."""
        if is_pooled(kernel) and self.pool_goal is not None:
            return self.pool_goal
        return self.goal


FIGURES = (
    Figure("start_info", "spawn → kernel_info reply", "s"),
    Figure("start_first", "spawn → first result", "s", goal=0.6, pool_goal=0.2),
    Figure("restart_first", "restart → first result", "s", pool_goal=0.3),
    Figure("shutdown", "shutdown request → last process gone", "s"),
    Figure(
        "import_time", "`import numpy, pandas, matplotlib.pyplot` in a fresh kernel", "s", goal=0.05
    ),
    Figure("round_trip_reply", "`1+1` → reply", "ms"),
    Figure("round_trip", "`1+1` → result, reply and idle: median", "ms", goal=1.5),
    Figure("round_trip_p95", "— 95th percentile", "ms", goal=2.0, p95_of="round_trip"),
    Figure("interrupt", "interrupt of a busy loop → reply", "ms", goal=2.0),
    Figure("complete", "completion, warm", "ms", goal=1.5),
    Figure("print_lines", "10 MB in printed lines of 1 kB", "MB/s", goal=0.5, more_is_better=True),
    Figure("print_lines_lost", "— bytes lost", "bytes"),
    Figure("print_once", "one print of 10 MB", "MB/s", goal=0.5, more_is_better=True),
    Figure("print_once_lost", "— bytes lost", "bytes"),
    Figure("print_subprocess", "10 MB from a subprocess", "MB/s", goal=0.5, more_is_better=True),
    Figure("print_subprocess_lost", "— bytes lost", "bytes"),
    Figure("memory_one", "memory of one idle kernel, alone", "MiB PSS"),
    Figure("memory_further", "memory per further idle kernel", "MiB PSS", goal=1.0),
    Figure("memory_further_private", "— of it private", "MiB"),
    Figure("memory_one_imports", "memory of one kernel after those imports", "MiB PSS"),
    Figure(
        "memory_further_imports",
        "memory per further kernel after those imports",
        "MiB PSS",
        goal=0.7,
    ),
    Figure("idle_cpu", "idle CPU per kernel", "% of a core"),
)
BY_KEY = {figure.key: figure for figure in FIGURES}


@dataclass
class Series:
    """What was measured of one figure on one kernel."""

    samples: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Why samples are missing, each reason once."""

    def summary(self) -> dict[str, Any]:
        """Median, extremes and p95, or why there are none."""
        result: dict[str, Any] = {"n": len(self.samples)}
        if self.samples:
            ordered = sorted(self.samples)
            result |= {
                "median": statistics.median(ordered),
                "min": ordered[0],
                "p95": percentile(ordered, 0.95),
                "max": ordered[-1],
            }
        if self.failures:
            result["failures"] = self.failures
        return result


def percentile(ordered: list[float], share: float) -> float:
    """The smallest sample that ``share`` of all samples do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Results:
    """All series, by figure and kernel; the first kernel is the one that others are compared to."""

    def __init__(self, kernels: list[str]) -> None:
        self.kernels = kernels
        self.details: dict[str, Any] = {}
        """Facts beside the figures, by name and kernel, for the JSON only."""
        self._series: dict[tuple[str, str], Series] = {}

    def add(self, key: str, kernel: str, *samples: float) -> None:
        """Note samples of the figure ``key``."""
        self._series_of(BY_KEY[key].key, kernel).samples += samples

    def fail(self, keys: tuple[str, ...], kernel: str, reason: str) -> None:
        """Note why samples of these figures could not be taken."""
        for key in keys:
            failures = self._series_of(key, kernel).failures
            if reason not in failures:
                failures.append(reason)

    def detail(self, name: str, kernel: str, value: Any) -> None:
        """Note a fact for the JSON."""
        self.details.setdefault(name, {})[kernel] = value

    def of(self, key: str, kernel: str) -> Series:
        """The series of a figure; an empty one when nothing was tried."""
        return self._series.get((BY_KEY[key].p95_of or key, kernel), Series())

    def present(self) -> Iterator[Figure]:
        """The figures of which something was tried, in the table's order."""
        for figure in FIGURES:
            key = figure.p95_of or figure.key
            if any((key, kernel) in self._series for kernel in self.kernels):
                yield figure

    def value(self, figure: Figure, kernel: str) -> float | None:
        """The one number of a figure: the median, or the 95th percentile where that is asked."""
        summary = self.of(figure.key, kernel).summary()
        found: float | None = summary.get("p95" if figure.p95_of else "median")
        return found

    def ratio(self, figure: Figure, kernel: str) -> float | None:
        """That number as a multiple of the first kernel's."""
        base, mine = self.value(figure, self.kernels[0]), self.value(figure, kernel)
        return mine / base if base and mine is not None else None

    def met(self, figure: Figure, kernel: str) -> bool | None:
        """Whether the kernel reached the figure's goal; None where there is none, or no figure."""
        goal, ratio = figure.goal_of(kernel), self.ratio(figure, kernel)
        if goal is None or ratio is None or kernel == self.kernels[0]:
            return None
        if not figure.more_is_better:
            return ratio <= goal
        lost = f"{figure.key}_lost"
        return ratio >= goal and not (lost in BY_KEY and any(self.of(lost, kernel).samples))

    def as_json(self) -> dict[str, Any]:
        """Everything, raw samples included."""
        figures: dict[str, Any] = {}
        for figure in self.present():
            entry: dict[str, Any] = {"title": figure.title, "unit": figure.unit}
            for kernel in self.kernels:
                series = self.of(figure.key, kernel)
                entry[kernel] = series.summary()
                if not figure.p95_of:
                    entry[kernel]["samples"] = [round(sample, 6) for sample in series.samples]
                if kernel != self.kernels[0]:
                    entry[kernel] |= {
                        "ratio": self.ratio(figure, kernel),
                        "goal": figure.goal_of(kernel),
                        "met": self.met(figure, kernel),
                    }
            entry["more_is_better"] = figure.more_is_better
            figures[figure.key] = entry
        return {"kernels": self.kernels, "figures": figures, "details": self.details}

    def _series_of(self, key: str, kernel: str) -> Series:
        return self._series.setdefault((key, kernel), Series())
