"""How the command shows things: tables for people, JSON for programs. Floor 5."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vmkernel.errors import VmError


def print_json(value: Any) -> None:
    """One JSON document on stdout; what JSON has no word for (paths) as text."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> None:
    """Columns as wide as needed; *right* names the columns that are set flush right."""
    for line in table_lines(header, rows, set(right.split())):
        click.echo(line)


def table_lines(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()
) -> list[str]:
    """The lines of a table.  What would move a terminal's cursor shows as a question mark."""
    table = [list(header), *[[printable(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def say_error(error: VmError) -> None:
    """Tell an error on stderr.  It may quote a guest's console or last words."""
    from vmkernel.text import plain_text

    click.echo(f"vmkernel: error: {plain_text(error.explain())}", err=True)


def say_skipped(path: str) -> None:
    """Tell that a link or device was left out of a copy."""
    click.echo(f"vmkernel: left out, neither a file nor a directory: {printable(path)}", err=True)


def printable(text: str) -> str:
    """One line without control characters: names may come from anywhere."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


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
