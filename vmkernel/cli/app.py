"""The command ``vmkernel``: its subcommands, found by name and imported only when they are run.

``vmkernel --help`` and ``--version`` must answer at once, so nothing of the subcommands is
imported for them: the one-line helps stand here. Floor 5.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from vmkernel import __version__
from vmkernel.errors import VmError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class _Entry(NamedTuple):
    module: str
    attribute: str
    help: str


COMMANDS: dict[str, _Entry] = {
    "run": _Entry("vmkernel.cli.run", "run", "Run code in a VM that is destroyed afterwards."),
    "image": _Entry("vmkernel.cli.image", "image", "Build, list, verify, copy, remove images."),
    "install": _Entry("vmkernel.cli.install", "install", "Offer the kernel in Jupyter."),
    "uninstall": _Entry("vmkernel.cli.install", "uninstall", "Take the kernel out of Jupyter."),
    "start": _Entry("vmkernel.cli.vms", "start", "Start a VM that stays."),
    "exec": _Entry("vmkernel.cli.exec", "exec_", "Run code in a VM that runs."),
    "cp": _Entry("vmkernel.cli.copy", "cp", "Copy files into a VM that runs, and out of it."),
    "stop": _Entry("vmkernel.cli.vms", "stop", "End VMs."),
    "rm": _Entry("vmkernel.cli.vms", "rm", "Take VMs off the record."),
    "ps": _Entry("vmkernel.cli.ps", "ps", "List the VMs on this host."),
    "top": _Entry("vmkernel.cli.top", "top", "Show what the VMs take, as it changes."),
    "capacity": _Entry("vmkernel.cli.capacity", "capacity", "Show how many VMs may run."),
    "logs": _Entry("vmkernel.cli.logs", "logs", "Show what a VM has said."),
    "pool": _Entry("vmkernel.cli.pool", "pool", "Kernels that wait ready for a front end."),
    "gc": _Entry("vmkernel.cli.gc", "gc", "Remove leftovers, old logs and unused templates."),
    "setup-host": _Entry(
        "vmkernel.cli.setup_host", "setup_host", "Set a host up for all its users (root)."
    ),
    "doctor": _Entry("vmkernel.cli.doctor", "doctor", "Check all that the kernel needs."),
    "bench": _Entry("vmkernel.cli.bench", "bench", "Measure kernels beside plain ipykernel."),
    "settings": _Entry("vmkernel.cli.settings", "settings", "Show every setting and its source."),
    "completion": _Entry("vmkernel.cli.completion", "completion", "Let a shell complete words."),
}


class LazyGroup(click.Group):
    """A group that imports a subcommand's module only when that subcommand is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The subcommands, in the order in which a newcomer needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one subcommand."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a guess for a mistyped name."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, n=1)
            if not close or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{close[0]}'?", ctx) from error

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names and helps of subcommands, without importing any."""
        from click.shell_completion import CompletionItem

        names = [
            CompletionItem(name, help=entry.help)
            for name, entry in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        # Past click's own Group, which would import all of them
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; Ctrl-C ends it as a signal does, also before it has begun."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``--help``, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="vmkernel", message="%(prog)s %(version)s")
def cli() -> None:
    """Code in QEMU microVMs: the cells of a notebook, or a script's (`vmkernel run`).

    First steps: `vmkernel doctor`, `vmkernel image build datascience`, `vmkernel install`.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and end the process: 0 done, 1 failed (said on stderr), 2 misused."""
    try:
        cli.main(args=None if argv is None else list(argv), prog_name="vmkernel")
    except VmError as error:
        from vmkernel.cli.output import say_error

        say_error(error)
        sys.exit(1)
