"""``vmkernel image build``: images of recipes, and recipes made of others. Floor 5."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from vmkernel.cli.options import complete_recipes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

    from vmkernel.image.additions import Added
    from vmkernel.image.apt import Mirrors
    from vmkernel.image.recipe import Recipe
    from vmkernel.image.store import Image
    from vmkernel.settings import Settings


class _Path(click.ParamType):  # type: ignore[type-arg]
    """Text that may be a file's name, which a shell completes."""

    name = "what"

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[Any]:
        """Let the shell look for files."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


@click.command()
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...", shell_complete=complete_recipes)
@click.option(
    "--name", metavar="NAME", help="Make a recipe of this name, of --from and what is added."
)
@click.option(
    "--from",
    "base",
    metavar="RECIPE",
    shell_complete=complete_recipes,
    help="What to add to; else the recipe that the settings name.",
)
@click.option(
    "--add",
    "additions",
    multiple=True,
    metavar="WHAT",
    type=_Path(),
    help="requirements.txt, pyproject.toml, pyproject.toml[extra], environment.yml, "
    'or a requirement like "scipy>=1.14". Repeatable.',
)
@click.option("--apt", multiple=True, metavar="PACKAGE", help="Add a Debian package. Repeatable.")
@click.option(
    "--preload",
    multiple=True,
    metavar="MODULE",
    help="A module that kernels find imported (in the memory template). Repeatable.",
)
@click.option("--update", is_flag=True, help="Choose versions anew, instead of those of the lock.")
@click.option("--force", is_flag=True, help="Build again what is there already.")
@click.option(
    "--debian-mirror",
    metavar="URI",
    help="Debian archive to take packages from, instead of the host's apt configuration.",
)
@click.option("--security-mirror", metavar="URI", help="The same for Debian's security updates.")
def build(
    recipes: tuple[str, ...],
    name: str | None,
    base: str | None,
    additions: tuple[str, ...],
    apt: tuple[str, ...],
    preload: tuple[str, ...],
    update: bool,
    force: bool,
    debian_mirror: str | None,
    security_mirror: str | None,
) -> None:
    """Build the image of each RECIPE: a name, or the path of a recipe's file (./mine.toml).

    Without one, the recipe that the settings name. Takes about a minute and needs no
    administrator.

    \b
    With packages of your own, under a name of your own:
      vmkernel image build --from datascience --add requirements.txt --name mine
      vmkernel image build --add "scikit-learn>=1.5" --apt graphviz --name ml
      vmkernel install --recipe mine     # offer it in Jupyter
      vmkernel image build mine --update # later: newer versions

    The recipe is kept in ~/.config/vmkernel/recipes, with the exact versions beside it.
    """
    from vmkernel.image.apt import Mirrors
    from vmkernel.settings import load_settings

    if security_mirror and not debian_mirror:
        raise click.UsageError("--security-mirror needs --debian-mirror")
    derives = bool(additions or apt or preload or base)
    if (derives or name) and recipes:
        raise click.UsageError(
            "give a RECIPE to build as it is, or --from RECIPE --name NAME to add to it, not both"
        )
    if derives and not name:
        raise click.UsageError("what is made needs a name of its own: --name NAME")
    settings = load_settings()
    mirrors = Mirrors(main=debian_mirror, security=security_mirror) if debian_mirror else None
    signal.signal(signal.SIGTERM, end_in_good_order)
    signal.signal(signal.SIGHUP, end_in_good_order)
    if name:
        jobs = [_derived(name, base or settings.recipe, additions, apt, preload, settings)]
    else:
        # All recipes first: a mistake in the second should not be told minutes later.
        jobs = [_known(recipe, settings) for recipe in recipes or (settings.recipe,)]
    for job in jobs:
        _build_one(job, settings, mirrors, force=force, update=update)


class _Job(NamedTuple):
    recipe: Recipe
    lock: str
    """Its versions, where they are known."""
    keep: bool
    """Whether it is the user's, and kept with its lock."""
    origins: Mapping[str, str]
    is_new: bool = False


def _known(text: str, settings: Settings) -> _Job:
    """A recipe by its name or path; one whose file is gone is in its image, too."""
    from vmkernel.errors import ImageError
    from vmkernel.image.recipe import check_recipe, load_recipe, recipe_path, user_recipes_dir
    from vmkernel.image.store import find_image

    try:
        recipe, path = load_recipe(text), recipe_path(text)
    except ImageError:
        if "/" in text or text.endswith(".toml") or _lies_there(text):
            raise
        try:
            image = find_image(text, settings)
        except ImageError:
            image = None
        if image is None:
            raise
        check_recipe(image.recipe, image.directory)  # which may come from somebody else
        return _Job(image.recipe, image.requirements, True, {})
    own = path.parent == user_recipes_dir()
    origins = {requirement: str(path) for requirement in recipe.python.requirements}
    return _Job(recipe, _read_lock(path.with_suffix(".lock")), own, origins)


def _lies_there(name: str) -> bool:
    from vmkernel.image.recipe import recipe_names, user_recipe_names

    return name in recipe_names() or name in user_recipe_names()


def _derived(
    name: str,
    base: str,
    additions: tuple[str, ...],
    apt: tuple[str, ...],
    preload: tuple[str, ...],
    settings: Settings,
) -> _Job:
    from vmkernel.image.additions import Added, read
    from vmkernel.image.debian import PYTHON
    from vmkernel.image.derive import derive
    from vmkernel.image.recipe import user_recipes_dir

    start = _known(base, settings).recipe
    added: Added = Added()
    for what in additions:
        read(what, added, PYTHON)
    for note in added.notes:
        click.echo(f"note: {note}", err=True)
    recipe = derive(start, name, added, debian=apt, preload=preload)
    origins = dict.fromkeys(start.python.requirements, f"the recipe {start.name}")
    lock = _read_lock(user_recipes_dir() / f"{name}.lock")
    return _Job(recipe, lock, True, {**origins, **added.requirements, **added.constraints}, True)


def _read_lock(path: Path) -> str:
    from vmkernel.errors import ImageError

    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(
            f"The lock {path} cannot be read: {error}", hint="make it readable, or use --update"
        ) from error


def _build_one(
    job: _Job, settings: Settings, mirrors: Mirrors | None, *, force: bool, update: bool
) -> None:
    from vmkernel.cli.output import age, mebibytes
    from vmkernel.image.builder import build_image
    from vmkernel.image.derive import save

    started = time.monotonic()
    with ProgressLine(job.recipe.name) as line:
        built: Image = build_image(
            job.recipe,
            settings,
            progress=line.show,
            force=force or update,
            mirrors=mirrors,
            lock="" if update else job.lock,
            reuse=job.keep,
            origins=job.origins,
        )
    path = save(built.recipe, built.requirements) if job.keep and built.requirements else None
    if not line.shown:
        click.echo(f"The image {built.name!r} is there already: {built.directory}")
    else:
        click.echo(
            f"Built the image {built.name!r} in {age(time.monotonic() - started)}: "
            f"Python {built.manifest.python_version}, Linux {built.manifest.kernel_release}, "
            f"{mebibytes(built.size)} in {built.directory}"
        )
    if path is not None and job.is_new:
        click.echo(f"Its recipe is {path}, its versions are in {path.with_suffix('.lock').name}")
        click.echo(f"Offer it in Jupyter with: vmkernel install --recipe {built.name}")


class ProgressLine:
    """Progress on stderr: one line that is written over on a terminal, else a line a phase.

    With *only_terminal* nothing where there is none.
    """

    def __init__(self, name: str, *, only_terminal: bool = False) -> None:
        self._only_terminal = only_terminal
        self._name = name
        self._phase = ""
        self._last = ""
        self._terminal = sys.stderr.isatty()
        self.shown = False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._terminal and self._last:
            click.echo("\r\x1b[K", nl=False, err=True)

    def show(self, phase: str, fraction: float) -> None:
        """Show the phase and the fraction done."""
        self.shown = True
        text = f"{self._name}: {fraction:4.0%} {phase}"
        if self._terminal:
            if text != self._last:
                # Cut to the terminal's width: a line that wraps cannot be written over.
                width = os.get_terminal_size(sys.stderr.fileno()).columns
                click.echo(f"\r{text[: max(10, width - 1)]}\x1b[K", nl=False, err=True)
        elif phase != self._phase and not self._only_terminal:
            click.echo(text, err=True)
        self._phase, self._last = phase, text


def end_in_good_order(number: int, frame: FrameType | None) -> None:
    """Handle a signal: as an exception, so that what was begun is undone on the way out."""
    sys.exit(128 + number)
