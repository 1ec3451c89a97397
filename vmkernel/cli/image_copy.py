"""``vmkernel image export`` and ``import``: an image built on one host, for others. Floor 5."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click

from vmkernel.cli.image_build import ProgressLine, end_in_good_order
from vmkernel.cli.options import complete_recipes


@click.command("export")
@click.argument("recipe", shell_complete=complete_recipes)
@click.argument("file", required=False, type=click.Path(allow_dash=True))
def export(recipe: str, file: str | None) -> None:
    """Write the image of RECIPE to FILE (RECIPE.vmimage), or to stdout (-).

    \b
      vmkernel image export minimal                # minimal.vmimage; prints its checksum
      vmkernel image export minimal - | ssh HOST vmkernel image import -

    The archive is a tar file, not compressed, and has the checksums of all that is in it.
    """
    from vmkernel.cli.output import mebibytes
    from vmkernel.errors import ImageError
    from vmkernel.image.archive import export_image
    from vmkernel.image.store import find_image
    from vmkernel.settings import load_settings

    settings = load_settings()
    name = find_image(recipe, settings).name
    path = file or f"{name}.vmimage"
    _mind_signals()
    try:
        with _target(path) as target, ProgressLine(name, only_terminal=True) as line:
            done = export_image(name, settings, target, progress=line.show)
    except OSError as error:
        raise ImageError(
            f"The archive could not be written to {path}: {error.strerror or error}",
            hint="is there room, and does whoever reads it still run?",
        ) from error
    where = "stdout" if path == "-" else path
    to_stderr = path == "-"
    click.echo(
        f"Exported the image {name!r}, {mebibytes(done.image.size)}, to {where}", err=to_stderr
    )
    click.echo(f"checksum {done.checksum}", err=to_stderr)


@click.command("import")
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--checksum", metavar="SHA256", help="Take no other image than this one.")
@click.option("--force", is_flag=True, help="Replace another image of that name.")
def import_(file: str, checksum: str | None, force: bool) -> None:
    """Make the image that FILE, or stdin (-), has: what `vmkernel image export` wrote.

    All of it is checked before it can be found; what is damaged leaves nothing behind. An archive
    can come from anybody: --checksum, printed where it was exported, says that it is the right one.
    """
    from vmkernel.cli.output import mebibytes
    from vmkernel.errors import ImageError
    from vmkernel.image.archive import import_image
    from vmkernel.settings import load_settings

    wanted = (checksum or "").strip().lower().removeprefix("sha256:")
    if checksum is not None and (len(wanted) != 64 or set(wanted) - set("0123456789abcdef")):
        raise click.UsageError("--checksum takes the 64 digits that `image export` prints")
    settings = load_settings()
    _mind_signals()
    with contextlib.ExitStack() as stack:
        source: BinaryIO = sys.stdin.buffer
        if file != "-":
            try:
                source = stack.enter_context(Path(file).open("rb"))
            except OSError as error:
                raise ImageError(
                    f"The archive {file} cannot be read: {error.strerror or error}",
                    hint="make one: vmkernel image export RECIPE FILE",
                ) from error
        line = stack.enter_context(ProgressLine("import", only_terminal=True))
        done = import_image(source, settings, checksum=wanted, force=force, progress=line.show)
    image, manifest = done.image, done.image.manifest
    if done.is_new:
        click.echo(
            f"Imported the image {image.name!r}: Python {manifest.python_version}, "
            f"Linux {manifest.kernel_release}, {mebibytes(image.size)} in {image.directory}"
        )
    else:
        click.echo(f"The image {image.name!r} is there already: {image.directory}")
    click.echo(f"checksum {done.checksum}")


@contextlib.contextmanager
def _target(path: str) -> Iterator[BinaryIO]:
    """Where to write: a file that is there only when it is whole, or what *path* is already."""
    if path == "-":
        if sys.stdout.isatty():
            raise click.UsageError("an archive is nothing for a terminal: name a FILE")
        # Not sys.stdout's buffer, whose rest would be written, in vain, at the very end
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as stdout:
            yield stdout
        return
    final = Path(path)
    if final.exists() and not final.is_file():
        with final.open("wb", buffering=0) as special:
            yield special
        return
    descriptor, name = tempfile.mkstemp(prefix=f".{final.name}.", dir=final.parent)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            yield file
            os.umask(mask := os.umask(0o077))
            os.fchmod(file.fileno(), 0o666 & ~mask)
            os.fsync(file.fileno())
        Path(name).replace(final)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _mind_signals() -> None:
    signal.signal(signal.SIGTERM, end_in_good_order)
    signal.signal(signal.SIGHUP, end_in_good_order)
