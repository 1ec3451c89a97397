"""Options that several commands share: what a VM is to be like. Floor 5."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from vmkernel.settings import Settings


class VmOptions(NamedTuple):
    """What the command line says of a VM."""

    settings: dict[str, str]
    """Settings by name, as they were written."""
    environment: Mapping[str, str]
    language: str | None
    tenant: str
    task: str

    def load(self, language: str | None = None) -> Settings:
        """The settings in force, with these options before all other sources.

        ``language``: that of the code, where neither an option nor a named recipe tells.
        Raises SettingsError.
        """
        from vmkernel.host.start import settings_for_recipe
        from vmkernel.image.store import recipe_for_language
        from vmkernel.settings import load_settings_with_sources

        options = dict(self.settings)
        language = self.language or language
        if language is not None and "recipe" not in options:
            options["recipe"] = recipe_for_language(language, load_settings_with_sources().settings)
        return settings_for_recipe(load_settings_with_sources(options=options))


def complete_recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of recipes, for the shell."""
    from vmkernel.cli.completion import recipe_names

    return recipe_names(incomplete)


def complete_settings(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """``NAME=`` of each setting, for the shell."""
    from vmkernel.settings import FIELDS

    return [f"{name}=" for name in FIELDS if name.startswith(incomplete)]


def complete_variables(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of variables that a guest may be given, for the shell."""
    from vmkernel.environment import why_refused

    names = [name for name in os.environ if name.startswith(incomplete)]
    return sorted(name for name in names if not why_refused(name))


def complete_vms(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Names and ids of VMs on record, for the shell."""
    from vmkernel.cli.completion import vm_names

    return vm_names(incomplete)


_OPTIONS = (
    click.option("--recipe", metavar="NAME", help="The guest image to start from.",
                 shell_complete=complete_recipes),
    click.option("--language", type=click.Choice(["python", "bash"]),
                 help="The code's language, where no recipe is named; else by the file's suffix."),
    click.option("--memory", metavar="SIZE", help="Memory of the VM, like 512M or 4G."),
    click.option("--vcpus", metavar="N", help="Virtual processors of the VM."),
    click.option("--cpu-quota", metavar="PERCENT", help="At most so much of one processor: 50%."),
    click.option("--set", "more", multiple=True, metavar="NAME=VALUE",
                 shell_complete=complete_settings,
                 help="Any setting (`vmkernel settings`). Repeatable."),
    click.option("--tenant", default="", metavar="ID", help="A tag for the record of VMs."),
    click.option("--task", default="", metavar="ID", help="Another one."),
)  # fmt: skip


def code_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that runs code ``-c`` (``code``) and ``--json`` (``as_json``)."""
    from_line = click.option(
        "-c", "code", metavar="CODE", help="The code itself, instead of a file."
    )
    as_json = click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="One JSON document on stdout instead of the code's streams.",
    )
    return from_line(as_json(function))


def vm_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a VM; the function gets them as ``vm``, a `VmOptions`."""

    @functools.wraps(function)
    def gathered(
        *args: Any,
        recipe: str | None,
        language: str | None,
        memory: str | None,
        vcpus: str | None,
        cpu_quota: str | None,
        environment: Mapping[str, str],
        more: tuple[str, ...],
        tenant: str,
        task: str,
        **rest: Any,
    ) -> Any:
        named = {"recipe": recipe, "memory": memory, "vcpus": vcpus, "cpu_quota": cpu_quota}
        settings = named_values(more)
        settings |= {name: value for name, value in named.items() if value is not None}
        vm = VmOptions(settings, environment, language, tenant, task)
        return function(*args, vm=vm, **rest)

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return environment_options(gathered)


def environment_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--env`` and ``--env-file``; it gets the variables as ``environment``."""

    @functools.wraps(function)
    def gathered(*args: Any, env_names: tuple[str, ...], env_file: Path | None, **rest: Any) -> Any:
        return function(*args, environment=_environment(env_names, env_file), **rest)

    named = click.option(
        "--env",
        "env_names",
        multiple=True,
        metavar="NAME",
        shell_complete=complete_variables,
        help="A variable of this shell for the code. Repeatable.",
    )
    file = click.option(
        "--env-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="More of them: lines of NAME=value, readable by nobody else.",
    )
    return named(file(gathered))


def named_values(items: tuple[str, ...]) -> dict[str, str]:
    """Settings from ``NAME=VALUE`` words; UsageError when one is none."""
    values = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--set takes NAME=VALUE, not {item!r}")
        values[name.replace("-", "_")] = value
    return values


def _environment(names: tuple[str, ...], file: Path | None) -> Mapping[str, str]:
    from vmkernel.environment import given, variable_names
    from vmkernel.errors import SettingsError

    for word in names:
        name, equals, _ = word.partition("=")
        if equals:  # its value is not repeated: this may be read by others, too
            raise click.UsageError(
                f"--env takes a name and no value: every user of this host sees the command line. "
                f"Write: {name}=… vmkernel … --env {name}, or use --env-file"
            )
    try:
        variable_names(names)
        values, missing = given(names, file, os.environ)
    except ValueError as error:
        raise click.UsageError(f"--env: {error}") from None
    except SettingsError as error:
        raise click.UsageError(f"--env-file: {error.message}\n{error.hint}") from None
    for name in missing:
        click.echo(f"vmkernel: warning: the variable {name} (--env) is not set", err=True)
    return values


def seconds(text: str | float) -> float:
    """A duration on the command line, as settings have it: ``10``, ``2.5``, ``90s``, ``5m``."""
    from vmkernel.values import duration

    try:
        return duration(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no time: seconds above 0, or a number with s, m or h"
        ) from None


class Transfer(NamedTuple):
    """A file or directory on its way in or out."""

    source: str
    target: str


def transfer_in(text: str) -> Transfer:
    """``LOCAL[:GUEST]``: what goes in, and where to; a name alone goes into the guest's home."""
    local, colon, guest = text.rpartition(":")
    if not colon or os.path.exists(text):  # noqa: PTH110 - a name may have a colon
        local, guest = text, ""
    name = Path(local).absolute().name
    if not guest or guest.endswith("/"):
        guest += name
    return Transfer(local, guest)


def transfer_out(text: str) -> Transfer:
    """``GUEST[:LOCAL]``: what comes out, and where to; a name alone comes to where we are."""
    guest, _, local = text.partition(":")
    name = guest.rstrip("/").rpartition("/")[2]
    if not name or name in (".", ".."):
        raise click.UsageError(f"--out needs the name of a file or directory, not {text!r}")
    if not local or local.endswith("/") or Path(local).is_dir():
        local = str(Path(local) / name)
    return Transfer(guest, local)
