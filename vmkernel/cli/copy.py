"""``vmkernel cp``: files and directories into a VM that runs, and out of it. Floor 5."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from vmkernel.cli.options import complete_vms

if TYPE_CHECKING:
    pass


class Place(NamedTuple):
    """A path here, or in a VM."""

    vm: str
    path: str


def place(text: str) -> Place:
    """``VM:PATH``, or a path here; one with a slash before its colon is one here, too."""
    vm, colon, path = text.partition(":")
    if not colon or "/" in vm or not vm:
        return Place("", text)
    return Place(vm, path)


@click.command("cp")
@click.argument("source", shell_complete=complete_vms)
@click.argument("target", shell_complete=complete_vms)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; sizes in bytes.")
def cp(source: str, target: str, as_json: bool) -> None:
    """Copy files or directories: LOCAL VM:PATH, or VM:PATH LOCAL.

    A relative PATH is in the home directory of the guest's user, where code runs.
    """
    from vmkernel.cli.foreground import Ended, Foreground
    from vmkernel.cli.output import mebibytes, print_json

    from_, to = place(source), place(target)
    if bool(from_.vm) == bool(to.vm):
        raise click.UsageError("one of the two is VM:PATH, the other a path here")
    foreground = Foreground()
    try:
        size, landed = foreground.run(lambda: _copy(from_, to))
    except Ended as end:
        sys.exit(128 + end.number)
    if as_json:
        print_json({"source": source, "target": landed, "bytes": size})
    else:
        click.echo(f"Copied {mebibytes(size) if size >= 1 << 20 else f'{size} bytes'} to {landed}")


async def _copy(from_: Place, to: Place) -> tuple[int, str]:
    from vmkernel import VmManager
    from vmkernel.cli.output import say_skipped

    async with VmManager() as manager:
        vm = await manager.get_vm(from_.vm or to.vm)
        if to.vm:
            local = Path(from_.path)
            path = to.path
            if not path or path.endswith("/"):
                path += local.absolute().name
            return await vm.put(local, path, on_skip=say_skipped), f"{to.vm}:{path}"
        target = Path(to.path)
        if target.is_dir():
            target /= from_.path.rstrip("/").rpartition("/")[2]
        return await vm.get(from_.path, target, on_skip=say_skipped), str(target)
