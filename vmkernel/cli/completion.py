"""``vmkernel completion``: what makes a shell complete commands, options, VMs and recipes.

The mechanism is click's (https://click.palletsprojects.com/shell-completion/): the shell runs the
command itself, with a variable set, for each word that is to be completed. Floor 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmkernel.errors import VmError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

VARIABLE = "_VMKERNEL_COMPLETE"
_HOW = {
    "bash": 'eval "$(vmkernel completion bash)"',
    "zsh": 'eval "$(vmkernel completion zsh)"',
    "fish": "vmkernel completion fish | source",
}


@click.command()
@click.argument("shell", type=click.Choice(list(_HOW)))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete `vmkernel`.

    For bash, a line for ~/.bashrc: eval "$(vmkernel completion bash)"; for zsh the same in
    ~/.zshrc; for fish: vmkernel completion fish | source
    """
    from click.shell_completion import get_completion_class

    from vmkernel.cli.app import cli

    kind = get_completion_class(shell)
    assert kind is not None, "click knows the three"
    maker = kind(cli, {}, "vmkernel", VARIABLE)
    # Not source(), which for bash runs a bash first to look at its version
    click.echo(f"# In your shell's start-up file: {_HOW[shell]}")
    click.echo(maker.source_template % maker.source_vars())


def recipe_names(incomplete: str) -> list[str]:
    """Recipes that begin so: those with an image, and ours."""
    from vmkernel.image.recipe import recipe_names, user_recipe_names
    from vmkernel.image.store import list_images
    from vmkernel.settings import load_settings

    try:
        built = [name for name, _ in list_images(load_settings())]
    except VmError:
        built = []
    return sorted(
        name
        for name in {*built, *recipe_names(), *user_recipe_names()}
        if name.startswith(incomplete)
    )


def vm_names(incomplete: str) -> list[CompletionItem]:
    """Names and ids of VMs on record that begin so, with their state."""
    from click.shell_completion import CompletionItem

    from vmkernel.host.registry import Registry
    from vmkernel.settings import load_settings

    found = []
    try:
        with Registry(load_settings()) as registry:
            for status in registry.list(ended=True):
                record = status.record
                if record.state in ("stopped", "failed") and not record.kept:
                    continue
                found += [
                    CompletionItem(word, help=str(status.state))
                    for word in (record.name, record.vm_id)
                    if word and word.startswith(incomplete)
                ]
    except VmError:
        pass  # a shell has no place for it
    return found
