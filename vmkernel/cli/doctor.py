"""``vmkernel doctor``: every prerequisite, its evidence, and what to do about each one missing.

Shows what `vmkernel.cli.checks` finds. Changes nothing on the host. Floor 5.
"""

from __future__ import annotations

import sys
import textwrap

import click

# In the order of weight; only the last one makes the command fail.
_MARKS = {"ok": ("ok", "green"), "note": ("note", "blue"), "warning": ("warn", "yellow"),
          "missing": ("MISSING", "red")}  # fmt: skip


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def doctor(as_json: bool) -> None:
    """Check all that the kernel needs, and say what to do about each thing missing.

    Ends with 1 when something is missing without which no cell can run.
    """
    from vmkernel.cli.checks import run_checks
    from vmkernel.cli.output import print_json

    checks = run_checks()
    whole = all(check.state != "missing" for check in checks)
    if as_json:
        print_json({"ok": whole, "checks": [check._asdict() for check in checks]})
    else:
        for check in checks:
            mark, colour = _MARKS[check.state]
            click.echo(click.style(f"{mark:<8}", fg=colour) + f"{check.name:<15}", nl=False)
            click.echo(_hanging(check.found, 23))
            if check.remedy and check.state != "ok":
                click.echo(" " * 23 + _hanging(f"→ {check.remedy}", 25))
        missing = sum(check.state == "missing" for check in checks)
        click.echo(
            "\nEverything that a cell needs is there."
            if whole
            else f"\nMissing: {missing}. Cells cannot run before that is mended."
        )
    if not whole:
        sys.exit(1)


def _hanging(text: str, indent: int) -> str:
    """*text* in lines of at most 100 columns, all but the first indented."""
    width = 100 - indent
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
    return f"\n{' ' * indent}".join(lines)
