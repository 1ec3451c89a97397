"""``vmkernel image``: build, list, verify and remove guest images. Floor 5."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from types import FrameType

    from vmkernel.image.apt import Mirrors
    from vmkernel.image.store import Image
    from vmkernel.settings import Settings


@click.group()
def image() -> None:
    """Build, list, verify and remove guest images.

    An image is what a VM starts from: a Linux kernel, and a read-only Debian with Python and the
    packages that a recipe names.
    """


@image.command()
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...")
@click.option("--force", is_flag=True, help="Build again what is there already.")
@click.option(
    "--debian-mirror",
    metavar="URI",
    help="Debian archive to take packages from, instead of the host's apt configuration.",
)
@click.option("--security-mirror", metavar="URI", help="The same for Debian's security updates.")
def build(
    recipes: tuple[str, ...], force: bool, debian_mirror: str | None, security_mirror: str | None
) -> None:
    """Build the image of each RECIPE: a name, or the path of a recipe's file (./mine.toml).

    Without one, the recipe that the settings name. Takes about two minutes and needs no
    administrator.
    """
    from vmkernel.image.apt import Mirrors
    from vmkernel.image.recipe import load_recipe
    from vmkernel.settings import load_settings

    if security_mirror and not debian_mirror:
        raise click.UsageError("--security-mirror needs --debian-mirror")
    settings = load_settings()
    mirrors = Mirrors(main=debian_mirror, security=security_mirror) if debian_mirror else None
    signal.signal(signal.SIGTERM, _end_in_good_order)
    signal.signal(signal.SIGHUP, _end_in_good_order)
    # All recipes first: a mistake in the second should not be told minutes later.
    for recipe in [load_recipe(name) for name in recipes or (settings.recipe,)]:
        _build_one(recipe, settings, force, mirrors)


def _build_one(recipe: Any, settings: Settings, force: bool, mirrors: Mirrors | None) -> None:
    from vmkernel.cli.output import age, mebibytes
    from vmkernel.image.builder import build_image

    started = time.monotonic()
    with _ProgressLine(recipe.name) as line:
        built = build_image(recipe, settings, progress=line.show, force=force, mirrors=mirrors)
    if not line.shown:
        click.echo(f"The image {built.name!r} is there already: {built.directory}")
        return
    click.echo(
        f"Built the image {built.name!r} in {age(time.monotonic() - started)}: "
        f"Python {built.manifest.python_version}, Linux {built.manifest.kernel_release}, "
        f"{mebibytes(built.size)} in {built.directory}"
    )


@image.command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; sizes in bytes.")
def list_(as_json: bool) -> None:
    """List the images on this host, and the recipes that have none yet."""
    from vmkernel.cli.output import mebibytes, print_json, print_table
    from vmkernel.errors import VmError
    from vmkernel.image.recipe import load_recipe, recipe_names
    from vmkernel.image.store import is_shared, list_images
    from vmkernel.settings import load_settings

    settings = load_settings()
    found = list_images(settings)
    there = {name for name, _ in found}
    not_built = [load_recipe(name) for name in recipe_names() if name not in there]
    if as_json:
        print_json(
            {
                "images_dir": settings.images_dir,
                "images": [_describe(name, image_) for name, image_ in found],
                "recipes_not_built": [recipe.name for recipe in not_built],
            }
        )
        return
    rows = []
    for name, image_ in found:
        if isinstance(image_, VmError):
            rows.append((name, "damaged", "-", "-", "-", str(image_)))
        else:
            manifest = image_.manifest
            state = "shared" if is_shared(image_, settings) else "built"
            rows.append(
                (name, state, mebibytes(image_.size), manifest.python_version,
                 manifest.created[:16].replace("T", " "), manifest.recipe.description)
            )  # fmt: skip
    rows += [(recipe.name, "not built", "-", "-", "-", recipe.description) for recipe in not_built]
    print_table(
        ("NAME", "STATE", "SIZE", "PYTHON", "CREATED (UTC)", "DESCRIPTION"), rows, right="SIZE"
    )


def _describe(name: str, image_: Image | Exception) -> dict[str, Any]:
    if isinstance(image_, Exception):
        return {"name": name, "state": "damaged", "error": str(image_)}
    manifest = image_.manifest
    return {
        "name": name,
        "state": "built",
        "directory": image_.directory,
        "size": image_.size,
        "digest": image_.digest,
        "created": manifest.created,
        "description": manifest.recipe.description,
        "engine": manifest.recipe.engine,
        "python_version": manifest.python_version,
        "kernel_release": manifest.kernel_release,
        "debian_suite": manifest.debian_suite,
    }


@image.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
def verify(names: tuple[str, ...]) -> None:
    """Read every byte of images (all, or those named) and of the memory templates made of them.

    Ends with 1 when one is damaged, and says which file and what to do.
    """
    from vmkernel.cli.output import say_error
    from vmkernel.errors import VmError
    from vmkernel.image.store import list_images, verify_image
    from vmkernel.settings import load_settings

    settings = load_settings()
    damaged = 0
    for name in names or [name for name, _ in list_images(settings)]:
        try:
            with _ProgressLine(name, only_terminal=True) as line:
                verify_image(name, settings, progress=line.show)
            click.echo(f"image {name!r}: whole")
        except VmError as error:
            damaged += 1
            say_error(error)
    if not names:
        damaged += _verify_templates(settings)
    if damaged:
        sys.exit(1)


def _verify_templates(settings: Settings) -> int:
    """How many memory templates are damaged."""
    from vmkernel.cli.output import say_error
    from vmkernel.errors import VmError
    from vmkernel.vm.template import list_templates, verify_template

    damaged = 0
    for directory, template in list_templates(settings):
        try:
            if isinstance(template, VmError):
                raise template
            verify_template(template)
            click.echo(f"memory template {directory.name}: whole")
        except VmError as error:
            damaged += 1
            say_error(error)
    return damaged


@image.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...]) -> None:
    """Remove images. VMs that run from them go on; new ones cannot start."""
    from vmkernel.image.store import remove_image
    from vmkernel.settings import load_settings

    settings = load_settings()
    for name in names:
        remove_image(name, settings)
        click.echo(f"Removed the image {name!r}")


class _ProgressLine:
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

    def __enter__(self) -> _ProgressLine:
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


def _end_in_good_order(number: int, frame: FrameType | None) -> None:
    # As an exception, so that what was begun is undone on the way out.
    sys.exit(128 + number)
