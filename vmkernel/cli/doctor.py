"""``vmkernel doctor``: every prerequisite, its evidence, and what to do about each one missing.

Shows what `vmkernel.cli.checks` finds, and on demand starts a VM (`vmkernel.cli.start_check`).
Changes nothing else on the host. Floor 5.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vmkernel.cli.start_check import Step

# In the order of weight; only the last one makes the command fail.
_MARKS = {"ok": ("ok", "green"), "note": ("note", "blue"), "warning": ("warn", "yellow"),
          "missing": ("MISSING", "red")}  # fmt: skip


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--start", "with_start", is_flag=True, help="Start a VM as well, and time each step.")
def doctor(as_json: bool, with_start: bool) -> None:
    """Check all that the kernel needs, and say what to do about each thing missing.

    Ends with 1 when something is missing without which no cell can run, or the VM did not start.
    """
    from vmkernel.cli.checks import run_checks
    from vmkernel.cli.output import print_json

    checks = run_checks()
    whole = all(check.state != "missing" for check in checks)
    if as_json:
        report: dict[str, Any] = {"ok": whole, "checks": [check._asdict() for check in checks]}
        if with_start:
            report["start"] = _start(lambda step: None)
            report["ok"] = whole = whole and report["start"]["ok"]
        print_json(report)
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
        if with_start:
            click.echo("\nStarting a VM with these settings:")
            start = _start(lambda step: click.echo(f"{step.seconds:6.2f} s  {step.what}"))
            click.echo(f"The VM ({start['vm']}) works." if start["ok"] else start["error"])
            whole = whole and start["ok"]
    if not whole:
        sys.exit(1)


def _start(on_step: Callable[[Step], None]) -> dict[str, Any]:
    """Start a VM; whether that went well, what it was, its steps, or the error for a person."""
    from vmkernel.cli.start_check import check_start
    from vmkernel.errors import VmError
    from vmkernel.host.start import settings_for_recipe
    from vmkernel.settings import load_settings_with_sources
    from vmkernel.text import plain_text

    steps: list[Step] = []

    def note(step: Step) -> None:
        steps.append(step)
        on_step(step)

    vm, error = "", ""
    try:
        vm = check_start(settings_for_recipe(load_settings_with_sources()), note)
    except VmError as failure:
        error = f"{type(failure).__name__}: {plain_text(failure.explain())}"
    return {
        "ok": not error,
        "vm": vm,
        "steps": [step._asdict() for step in steps],
        "error": error,
    }


def _hanging(text: str, indent: int) -> str:
    """*text* in lines of at most 100 columns, all but the first indented."""
    width = 100 - indent
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
    return f"\n{' ' * indent}".join(lines)
