"""The figures: what each is called, what was measured for it, and how two kernels compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    key: str
    title: str
    unit: str
    promise: float | None = None
    """The ratio to the base kernel's median that is promised (at least it, if more is better)."""
    more_is_better: bool = False


FIGURES = (
    Figure("start_info", "spawn → kernel_info reply", "s"),
    Figure("start_first", "spawn → first result", "s", promise=1.5),
    Figure("restart_first", "restart → first result", "s"),
    Figure("shutdown", "shutdown request → last process gone", "s"),
    Figure("round_trip_reply", "`1+1` → reply", "ms"),
    Figure("round_trip", "`1+1` → result, reply and idle", "ms", promise=4.0),
    Figure("interrupt", "interrupt of a busy loop → reply", "ms"),
    Figure("complete", "completion, warm", "ms"),
    Figure("print_lines", "10 MB in printed lines of 1 kB", "MB/s", more_is_better=True),
    Figure("print_lines_lost", "— bytes lost", "bytes"),
    Figure("print_once", "one print of 10 MB", "MB/s", more_is_better=True),
    Figure("print_once_lost", "— bytes lost", "bytes"),
    Figure("print_subprocess", "10 MB from a subprocess", "MB/s", more_is_better=True),
    Figure("print_subprocess_lost", "— bytes lost", "bytes"),
    Figure("memory_one", "memory of one idle kernel, alone", "MiB PSS"),
    Figure("memory_further", "memory per further idle kernel", "MiB PSS", promise=2.5),
    Figure("memory_further_private", "— of it private", "MiB"),
    Figure("import_time", "`import numpy, pandas` in a fresh kernel", "s"),
    Figure("memory_one_imports", "memory of one kernel after that import", "MiB PSS"),
    Figure("memory_further_imports", "memory per further kernel after it", "MiB PSS"),
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
        self._of(BY_KEY[key].key, kernel).samples += samples

    def fail(self, keys: tuple[str, ...], kernel: str, reason: str) -> None:
        """Note why samples of these figures could not be taken."""
        for key in keys:
            failures = self._of(key, kernel).failures
            if reason not in failures:
                failures.append(reason)

    def detail(self, name: str, kernel: str, value: Any) -> None:
        """Note a fact for the JSON."""
        self.details.setdefault(name, {})[kernel] = value

    def of(self, key: str, kernel: str) -> Series:
        """The series of a figure; an empty one when nothing was tried."""
        return self._series.get((key, kernel), Series())

    def present(self) -> Iterator[Figure]:
        """The figures of which something was tried, in the table's order."""
        for figure in FIGURES:
            if any((figure.key, kernel) in self._series for kernel in self.kernels):
                yield figure

    def ratios(self, key: str, kernel: str) -> dict[str, float] | None:
        """The kernel's median, minimum and p95 as multiples of the first kernel's."""
        base = self.of(key, self.kernels[0]).summary()
        mine = self.of(key, kernel).summary()
        if not (base["n"] and mine["n"]):
            return None
        return {
            name: mine[name] / base[name] for name in ("median", "min", "p95") if base[name] > 0
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, raw samples included."""
        figures: dict[str, Any] = {}
        for figure in self.present():
            entry: dict[str, Any] = {"title": figure.title, "unit": figure.unit}
            if figure.promise is not None:
                entry["promised_ratio"] = figure.promise
            for kernel in self.kernels:
                series = self.of(figure.key, kernel)
                entry[kernel] = series.summary() | {"samples": series.samples}
                if kernel != self.kernels[0]:
                    entry[kernel]["ratios"] = self.ratios(figure.key, kernel)
            figures[figure.key] = entry
        return {"kernels": self.kernels, "figures": figures, "details": self.details}

    def _of(self, key: str, kernel: str) -> Series:
        return self._series.setdefault((key, kernel), Series())
