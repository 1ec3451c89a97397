"""``vmkernel setup-host``: what an administrator sets up once for all users of a host. Floor 5.

docs/shared-hosts.md tells how it is meant. Each step looks first whether it is done.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmkernel.cli.options import complete_recipes, complete_settings, named_values

if TYPE_CHECKING:
    from vmkernel.image.recipe import Recipe
    from vmkernel.settings import LoadedSettings

_ALWAYS_LOCKED = ("semaphore_file", "max_concurrent_vms", "max_vms_per_user")


@click.command("setup-host")
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...", shell_complete=complete_recipes)
@click.option("--memory", metavar="SIZE", help="Memory of the VMs that templates are made for.")
@click.option("--max-vms", metavar="N", help="How many VMs all users may have at once.")
@click.option("--max-vms-per-user", metavar="N", help="How many of them one user may have.")
@click.option(
    "--lock",
    "locked",
    multiple=True,
    metavar="NAME",
    help="A setting that users may not change. Repeatable.",
)
@click.option(
    "--set",
    "more",
    multiple=True,
    metavar="NAME=VALUE",
    shell_complete=complete_settings,
    help="Any setting, for all users. Repeatable.",
)
@click.option("--group", metavar="NAME", help="Only members of this group may start VMs.")
@click.option("--rebuild", is_flag=True, help="Build images anew, with the newest packages.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
def setup_host(
    recipes: tuple[str, ...],
    memory: str | None,
    max_vms: str | None,
    max_vms_per_user: str | None,
    locked: tuple[str, ...],
    more: tuple[str, ...],
    group: str | None,
    rebuild: bool,
    dry_run: bool,
) -> None:
    """Set up this host for all its users: images, memory templates, VM slots, configuration.

    Builds each RECIPE (datascience, where none is named) and its template into the setting
    `shared_dir` (/var/lib/vmkernel), where every user's kernels find them; makes the one file whose
    locks are the VM slots; and writes /etc/vmkernel/config.toml, if there is none. Run it again
    after an upgrade of vmkernel or QEMU: it does what is missing.
    """  # fmt: skip
    from vmkernel.errors import VmError
    from vmkernel.image.recipe import load_recipe
    from vmkernel.settings import SYSTEM_CONFIG, check_lockable, check_names
    from vmkernel.shared import USUAL_PLACE, distrust

    if os.geteuid() != 0 and not dry_run:
        raise VmError(
            "setting a host up for all users takes root",
            hint="sudo vmkernel setup-host; --dry-run shows what it would do",
        )
    chosen = named_values(more)
    named = {"memory": memory, "max_concurrent_vms": max_vms, "max_vms_per_user": max_vms_per_user}
    chosen |= {name: value for name, value in named.items() if value is not None}
    check_names(locked)
    check_lockable(locked, ["semaphore_file", *chosen], str(SYSTEM_CONFIG))
    loaded = _administrators_settings(chosen)
    place = loaded.settings.shared_dir or USUAL_PLACE
    wanted = [load_recipe(name) for name in recipes or (loaded.settings.recipe,)]
    os.umask(0o022)
    for directory in (place, place / "images", place / "templates"):
        _make_directory(directory, dry_run)
    if not dry_run and (problem := distrust(place)):
        raise VmError(
            f"users would take nothing from {place}: {problem}",
            hint="choose a place that only root can change: --set shared_dir=/var/lib/vmkernel",
        )
    # Both files in a directory of root's: else anyone could put others in their place
    for name in ("slots", "slots.boots"):
        _make_slots(place / name, group, dry_run)
    _write_config(SYSTEM_CONFIG, place, chosen, locked, dry_run)
    for recipe in wanted:
        _build(recipe, loaded, place, rebuild=rebuild, dry_run=dry_run)
    _sweep(loaded, place, dry_run)


def _administrators_settings(chosen: dict[str, str]) -> LoadedSettings:
    """What /etc and these options say: not root's own file and environment, which no user has."""
    from vmkernel.settings import ENVIRONMENT_PREFIX, load_settings_with_sources

    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)
    }
    return load_settings_with_sources(
        environ={**environ, "XDG_CONFIG_HOME": "/dev/null"}, options=chosen
    )


def _make_directory(path: Path, dry_run: bool) -> None:
    if path.is_dir():
        return _tell("is there", f"directory {path}")
    if not dry_run:
        path.mkdir(mode=0o755, parents=True)
    return _tell("made", f"directory {path}", dry_run)


def _make_slots(path: Path, group: str | None, dry_run: bool) -> None:
    """A file that all users, or those of a group, may lock: for that they must open it to write."""
    import grp

    mode, gid = (0o666, 0) if group is None else (0o660, -1)
    if group is not None:
        try:
            gid = grp.getgrnam(group).gr_gid
        except KeyError:
            raise click.UsageError(f"there is no group {group!r}: sudo groupadd {group}") from None
    whom = "all users" if group is None else f"the group {group}"
    what = f"{path}, which {whom} may lock"
    try:
        found = path.lstat()
    except FileNotFoundError:
        found = None
    if found is not None and stat.S_IMODE(found.st_mode) == mode and found.st_gid in (gid, -1):
        return _tell("is there", what)
    if not dry_run:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchown(fd, 0, gid)
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
    return _tell("made" if found is None else "changed", what, dry_run)


def _write_config(
    path: Path, place: Path, chosen: dict[str, str], locked: tuple[str, ...], dry_run: bool
) -> None:
    import json

    values = {"shared_dir": str(place), "semaphore_file": str(place / "slots")} | chosen
    # A string of JSON is one of TOML
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    names = dict.fromkeys([*(name for name in _ALWAYS_LOCKED if name in values), *locked])
    lines.append(f"locked = {json.dumps(list(names))}")
    if path.exists():
        import tomllib

        there = tomllib.loads(path.read_text(encoding="utf-8"))  # it was read before: it is whole
        _tell("is there", f"{path}, left as it is")
        for line, name in zip(lines, [*values, "locked"], strict=True):
            if name not in there or (name == "locked" and not set(names) <= set(there["locked"])):
                click.echo(f"  it lacks: {line}")
        return
    if not dry_run:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        head = "# Settings of all users of this host; made by `vmkernel setup-host`.\n"
        new.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
        new.chmod(0o644)
        new.replace(path)
    _tell("written", str(path), dry_run)
    for line in lines:
        click.echo(f"  {line}")


def _build(
    recipe: Recipe, loaded: LoadedSettings, place: Path, *, rebuild: bool, dry_run: bool
) -> None:
    import msgspec

    from vmkernel.cli.image_build import ProgressLine
    from vmkernel.cli.output import mebibytes
    from vmkernel.host.sharing import share_template, store_settings
    from vmkernel.host.start import settings_for_recipe
    from vmkernel.image.builder import build_image
    from vmkernel.settings import LoadedSettings

    settings = msgspec.structs.replace(store_settings(loaded.settings, place), recipe=recipe.name)
    if dry_run:
        there = not rebuild and (settings.images_dir / recipe.name / "manifest.json").is_file()
        _tell("is there" if there else "built", f"image {recipe.name!r}", dry_run and not there)
        return _tell("built, if it is not there", f"template of {recipe.name!r}", dry_run)
    with ProgressLine(recipe.name) as line:
        image = build_image(recipe, settings, progress=line.show, force=rebuild)
    what = f"image {recipe.name!r}, {mebibytes(image.size)} in {image.directory}"
    _tell("built" if line.shown else "is there", what)
    settings = settings_for_recipe(LoadedSettings(settings, loaded.sources))
    show: Callable[[str], None] = lambda text: line.show(text.partition(",")[0], 0.0)  # noqa: E731
    with ProgressLine(f"template of {recipe.name}") as line:
        template, built = asyncio.run(share_template(settings, show))
    what = f"template of {recipe.name!r} for {settings.memory} MiB in {template.directory}"
    return _tell("built" if built else "is there", what)


def _sweep(loaded: LoadedSettings, place: Path, dry_run: bool) -> None:
    from vmkernel.host.sharing import outdated, remove, store_settings

    for directory, why in list(outdated(store_settings(loaded.settings, place))):
        if not dry_run:
            remove(directory)
        _tell("removed", f"template {directory.name}: {why}", dry_run)


def _tell(verb: str, what: str, dry_run: bool = False) -> None:
    click.echo(f"{'would be ' if dry_run else ''}{verb}: {what}")
