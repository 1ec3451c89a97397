"""How the command shows things: tables for people, JSON for programs. Floor 5."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON document on stdout; what JSON has no word for (paths) as text."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> None:
    """Columns as wide as needed; *right* names the columns that are set flush right."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    flush_right = set(right.split())
    for row in table:
        cells = [
            cell.rjust(width) if name in flush_right else cell.ljust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def mebibytes(count: int | None) -> str:
    """Bytes as people read them: ``35 MiB``, ``1.9 GiB``; ``-`` when unknown."""
    if count is None:
        return "-"
    if count < 1024**3:
        return f"{count / 1024**2:.0f} MiB"
    return f"{count / 1024**3:.1f} GiB"


def age(seconds: float | None) -> str:
    """A duration in its two largest units: ``8 s``, ``3 min 20 s``, ``2 h 5 min``, ``4 d 1 h``."""
    if seconds is None:
        return "-"
    left = max(0, int(seconds))
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        number, left = divmod(left, size)
        if number:
            parts.append(f"{number} {unit}")
    return " ".join(parts[:2]) or "0 s"
