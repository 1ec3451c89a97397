"""The results as a table for people (Markdown, so that it can be pasted) and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from figures import Figure, Results, Series


def table(results: Results) -> str:
    """One line a figure: each kernel's median (min, p95), and ratios to the first kernel's."""
    base, *others = results.kernels
    head = ["figure", "unit", f"{base}: median (min … p95)"]
    for kernel in others:
        head += [f"{kernel}: median (min … p95)", "ratio", "of min", "of p95"]
    head.append("promised")
    rows = [head, ["---"] * len(head)]
    for figure in results.present():
        row = [figure.title, figure.unit, _cell(results.of(figure.key, base))]
        for kernel in others:
            ratios = results.ratios(figure.key, kernel) or {}
            row.append(_cell(results.of(figure.key, kernel)))
            row += [_times(ratios.get(name)) for name in ("median", "min", "p95")]
        row.append(_promise(figure))
        rows.append(row)
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def notes(results: Results) -> str:
    """What could not be measured and why, and promises that were not kept in this run."""
    lines = []
    for figure in results.present():
        for kernel in results.kernels:
            series = results.of(figure.key, kernel)
            for reason in series.failures:
                what = "some samples missing" if series.samples else "not taken"
                lines.append(f"* {figure.title}, {kernel}: {what}: {reason}")
            ratios = results.ratios(figure.key, kernel) if kernel != results.kernels[0] else None
            if figure.promise is not None and ratios and ratios["median"] > figure.promise:
                lines.append(
                    f"* {figure.title}, {kernel}: {ratios['median']:.2f} × is more than the "
                    f"promised {figure.promise:g} ×"
                )
    return "\n".join(lines)


def machine_lines(machine: dict[str, Any]) -> str:
    """The machine in a few lines."""
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items())
    return "\n".join(
        (
            f"{machine['processor']}, {machine['usable_cores']} of {machine['cores']} cores, "
            f"{machine['memory_mib'] / 1024:.1f} GiB; {machine['system']}, "
            f"Linux {machine['linux']}",
            f"Python {machine['python']}; {machine['qemu']}; {packages}",
            f"load at begin {machine['load_at_begin']}, at end {machine['load_at_end']}; "
            f"calibration loop {machine['calibration_ms_at_begin']} ms at begin, "
            f"{machine['calibration_ms_at_end']} ms at end; taken {machine['date']}",
            *(f"{name}: {banner}" for name, banner in machine["kernels"].items()),
        )
    )


def write_json(path: Path, machine: dict[str, Any], results: Results, options: Any) -> None:
    """Everything that was measured, raw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "options": options, **results.as_json()}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _cell(series: Series) -> str:
    found = series.summary()
    if not found["n"]:
        return "not taken"
    median, least, high = (_number(found[name]) for name in ("median", "min", "p95"))
    return median if found["n"] == 1 else f"{median} ({least} … {high})"


def _number(value: float) -> str:
    if value == 0:
        return "0"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} ×"


def _promise(figure: Figure) -> str:
    if figure.promise is None:
        return ""
    return f"{'≥' if figure.more_is_better else '≤'} {figure.promise:g} ×"
