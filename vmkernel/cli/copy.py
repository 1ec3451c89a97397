"""``vmkernel cp``: files and directories into a VM that runs, and out of it. Floor 5."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from vmkernel.cli.options import complete_vms

if TYPE_CHECKING:
    from vmkernel.host.copies import Copied
    from vmkernel.host.files import OnProgress
    from vmkernel.host.guestfiles import Call

MAX_BYTES = 1 << 40
"""What one copy may bring: the disks' free space is the limit, and no guest's lie."""


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

    VM is a VM's name or id, or the id of a notebook's kernel, or the beginning of an id. A
    relative PATH is in the home directory of the guest's user, where code runs.

    Files that are there are replaced. A copy that was broken off is gone on with by the same
    command; until it is whole it is called NAME.….part.
    """
    from vmkernel.cli.foreground import Ended, Foreground
    from vmkernel.cli.output import print_json
    from vmkernel.host.copyplan import in_words

    from_, to = place(source), place(target)
    if bool(from_.vm) == bool(to.vm):
        raise click.UsageError("one of the two is VM:PATH, the other a path here")
    foreground = Foreground()
    try:
        done, landed = foreground.run(lambda: _copy(from_, to, quiet=as_json))
    except Ended as end:
        if sys.stderr.isatty():
            click.echo("vmkernel: broken off; the same command goes on from there", err=True)
        sys.exit(128 + end.number)
    if as_json:
        told = {"bytes": done.bytes, "files": done.files, "resumed": done.resumed}
        print_json({"source": source, "target": landed, **told})
    else:
        again = f" ({in_words(done.resumed)} of it from before)" if done.resumed else ""
        click.echo(f"Copied {in_words(done.bytes)}{again} to {landed}")


async def _copy(from_: Place, to: Place, *, quiet: bool) -> tuple[Copied, str]:
    from vmkernel.cli.output import say_skipped
    from vmkernel.cli.progress import Waiting
    from vmkernel.host.copyplan import in_words

    async with _reached(from_.vm or to.vm) as call:
        with Waiting(quiet=quiet) as waiting:

            def progress(done: int, total: int | None) -> None:
                waiting.show(f"{in_words(done)} of {in_words(total or done)} copied")

            if to.vm:
                done, path = await _put(call, Path(from_.path), to.path, progress)
                landed = f"{to.vm}:{path}"
            else:
                done, landed = await _get(call, from_.path, Path(to.path), progress)
    for name in done.skipped:
        say_skipped(name)
    return done, landed


@asynccontextmanager
async def _reached(vm: str) -> AsyncGenerator[Call, None]:
    """A way to the agent of a VM, whoever owns it.  Raises VmError."""
    import asyncio

    from vmkernel.host import handle, reach, wire
    from vmkernel.settings import load_settings

    connection = await reach.reach(await asyncio.to_thread(reach.find, vm, load_settings()))
    try:
        yield lambda command, buffers: connection.call(
            wire.Ask(command, handle.CHUNK_SECONDS), buffers=buffers
        )
    finally:
        connection.close()


async def _put(call: Call, local: Path, path: str, progress: OnProgress) -> tuple[Copied, str]:
    from vmkernel.host import copies, copyplan
    from vmkernel.host.guestfiles import GuestFiles, guest_path
    from vmkernel.host.landing import aside, host_errors

    name = local.absolute().name
    if not path or path.endswith("/"):
        path += name
    with host_errors(local), copyplan.opened(Path(os.path.realpath(local, strict=True))) as fd:
        plan = await aside(copyplan.survey_host, fd, _all, MAX_BYTES)
        there = await GuestFiles(call).look(guest_path(path)) if plan.is_file else None
        if there is not None and there.kind == "directory":
            path = f"{path.rstrip('/')}/{name}"
        done = await copies.put(
            call, fd, plan, guest_path(path), replace=True, on_progress=progress
        )
    return done, path


async def _get(call: Call, path: str, local: Path, progress: OnProgress) -> tuple[Copied, str]:
    from vmkernel.host import copies, copyplan, files
    from vmkernel.host.guestfiles import guest_path
    from vmkernel.host.landing import host_errors, named_parent

    name = path.rstrip("/").rpartition("/")[2]
    if local.is_dir() and name not in ("", ".", ".."):
        local /= name
    local = local.absolute()
    with host_errors(local):
        if local.is_dir():  # what is there already stays, and is gone on beside
            old = await files.get_tree(call, path, local, max_bytes=MAX_BYTES, on_progress=progress)
            return copies.Copied(old.bytes, old.files, 0, old.skipped), str(local)
        plan = await copyplan.survey_guest(call, guest_path(path), _all, MAX_BYTES)
        with named_parent(local) as parent:
            done = await copies.get(
                call, guest_path(path), plan, parent, os.fsencode(local.name),
                replace=plan.is_file, on_progress=progress,
            )  # fmt: skip
    return done, str(local)


def _all(name: bytes) -> bool:
    """The user's own hand copies: nothing is left out."""
    return False
