"""The results as a table for people (Markdown, so that it can be pasted) and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vmkernel.bench.figures import Figure, Results, Series


def table(results: Results, *, goals: bool = True) -> str:
    """One line a figure: each kernel's median (min … p95), ratio to the first kernel's, goal."""
    base, *others = results.kernels
    head = ["figure", "unit", base]
    for kernel in others:
        head += [kernel, "ratio", *(["goal", "met"] if goals else [])]
    rows = [head, ["---"] * len(head)]
    for figure in results.present():
        row = [figure.title, figure.unit, _cell(figure, results.of(figure.key, base))]
        for kernel in others:
            row += [
                _cell(figure, results.of(figure.key, kernel)),
                _times(results.ratio(figure, kernel)),
            ]
            if goals:
                met = results.met(figure, kernel)
                row += [_goal(figure, kernel), {None: "", True: "yes", False: "**no**"}[met]]
        rows.append(row)
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def memory_map(results: Results) -> str:
    """What the memory of a further idle kernel is; "" when not taken."""
    tables = []
    for kernel, found in results.details.get("memory_further_map", {}).items():
        lines = [
            f"Memory of a further idle kernel, {kernel}, MiB:",
            "",
            "| process: kind | PSS | of it its own | resident |",
            "| --- | --- | --- | --- |",
        ]
        for name, sizes in found.items():
            if abs(sizes["pss"]) >= 0.1:  # below 0: shared by more
                own, pss, resident = (f"{sizes[key]:.1f}" for key in ("private", "pss", "rss"))
                lines.append(f"| {name} | {pss} | {own} | {resident} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def notes(results: Results) -> str:
    """What could not be measured, and why."""
    lines = []
    for figure in results.present():
        for kernel in results.kernels:
            series = results.of(figure.key, kernel)
            for reason in series.failures:
                what = "some samples missing" if series.samples else "not taken"
                lines.append(f"* {figure.title}, {kernel}: {what}: {reason}")
    return "\n".join(lines)


def machine_lines(machine: dict[str, Any]) -> str:
    """The machine in a few lines: a list, in Markdown."""
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items())
    return "\n".join(
        f"* {line}"
        for line in (
            short_machine(machine),
            f"Python {machine['python']}; {machine['qemu']}; {packages}",
            f"load at begin {machine['load_at_begin']}, at end {machine['load_at_end']}; "
            f"calibration loop {machine['calibration_ms_at_begin']} ms at begin, "
            f"{machine['calibration_ms_at_end']} ms at end; taken {machine['date']}",
            *(f"{name}: {banner}" for name, banner in machine["kernels"].items()),
        )
    )


def short_machine(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{machine['processor']}, {machine['usable_cores']} of {machine['cores']} cores, "
        f"{machine['memory_mib'] / 1024:.1f} GiB; {machine['system']}, Linux {machine['linux']}"
    )


def accelerator(machine: dict[str, Any]) -> str:
    """How QEMU ran the guests, as our kernel's banner said it; "" when none was measured."""
    for banner in machine.get("kernels", {}).values():
        _, found, after = banner.partition("accelerator: ")
        if found:
            return str(after.split(",")[0].strip())
    return ""


def full(results: Results, machine: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, raw, and where."""
    return {"machine": machine, **results.as_json()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Everything that was measured, raw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def number(value: float) -> str:
    """Three digits that count, or so."""
    if value == 0:
        return "0"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def _cell(figure: Figure, series: Series) -> str:
    found = series.summary()
    if not found["n"]:
        return "not taken"
    if figure.p95_of:
        return number(found["p95"])
    median, least, high = (number(found[name]) for name in ("median", "min", "p95"))
    return median if least == high else f"{median} ({least} … {high})"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} ×"


def _goal(figure: Figure, kernel: str) -> str:
    goal = figure.goal_of(kernel)
    return "" if goal is None else f"{'≥' if figure.more_is_better else '≤'} {goal:g} ×"
