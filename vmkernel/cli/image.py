"""``vmkernel image``: build, list, verify, copy and remove guest images. Floor 5."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from vmkernel.cli.image_build import ProgressLine, build
from vmkernel.cli.image_copy import export, import_

if TYPE_CHECKING:
    from vmkernel.image.store import Image
    from vmkernel.settings import Settings


@click.group()
def image() -> None:
    """Build, list, verify, copy and remove guest images.

    An image is what a VM starts from: a Linux kernel, and a read-only Debian with Python and the
    packages that a recipe names.
    """


@image.command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; sizes in bytes.")
def list_(as_json: bool) -> None:
    """List the images on this host, and the recipes that have none yet."""
    from vmkernel.cli.output import mebibytes, print_json, print_table
    from vmkernel.errors import VmError
    from vmkernel.image.recipe import load_recipe, recipe_names, user_recipe_names
    from vmkernel.image.store import is_shared, list_images
    from vmkernel.settings import load_settings

    settings = load_settings()
    found = list_images(settings)
    there = {name for name, _ in found}
    not_built = [load_recipe(name) for name in recipe_names() if name not in there]
    for name in user_recipe_names():
        if name not in there:
            try:
                not_built.append(load_recipe(name))
            except VmError as error:  # the others are told nevertheless
                click.echo(f"warning: {error}", err=True)
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
            with ProgressLine(name, only_terminal=True) as line:
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
    """How many memory templates are damaged, the user's and the administrator's."""
    import msgspec

    from vmkernel.cli.output import say_error
    from vmkernel.errors import VmError
    from vmkernel.vm.template import list_templates, verify_template

    damaged = 0
    found = list_templates(settings)
    if settings.shared_dir is not None:
        found += list_templates(msgspec.structs.replace(settings, cache_dir=settings.shared_dir))
    for directory, template in found:
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
    from vmkernel.image.recipe import recipe_path, user_recipe_names
    from vmkernel.image.store import remove_image
    from vmkernel.settings import load_settings

    settings = load_settings()
    for name in names:
        remove_image(name, settings)
        click.echo(f"Removed the image {name!r}")
        if name in user_recipe_names():
            click.echo(f"Its recipe is kept: {recipe_path(name)}")


for _command in (build, export, import_):
    image.add_command(_command)
