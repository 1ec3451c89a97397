"""``vmkernel gc``: removes what VMs and builders that were killed have left, and what grew old.

Nothing here is needed for vmkernel to work well: each start clears away what is in its way. What
is looked for, and when it counts as left behind, is told where it is found, below. Floor 5.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from vmkernel.errors import VmError

if TYPE_CHECKING:
    from vmkernel.host.registry import Registry
    from vmkernel.settings import Settings

_YOUNG = 60.0
"""Seconds for which a file that should have no name any more may be somebody's at work."""
_PROBE_IS_DEAD = 3600.0
"""Seconds after which a trial of KVM, which takes 15, was killed."""


class Finding(NamedTuple):
    """Something that may go."""

    kind: str
    what: str
    why: str
    path: Path | None = None
    size: int = 0
    """Bytes on the disk."""


@click.command()
@click.option("--dry-run", is_flag=True, help="Only tell what would be removed.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also all logs and rows of VMs that have ended, and templates not used today.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; sizes in bytes.")
def gc(dry_run: bool, everything: bool, as_json: bool) -> None:
    """Clear up: VMs whose runner was killed, old logs, unused memory templates, leftovers.

    Shows what was removed and how much room that gave. VMs that run are left alone.
    """
    from vmkernel.cli.output import mebibytes, print_json, print_table
    from vmkernel.host.registry import Registry
    from vmkernel.settings import load_settings

    settings = load_settings()
    with Registry(settings) as registry:
        found = [*_vms(settings, registry, dry_run=dry_run)]
        found += [*_files(settings, registry, everything=everything)]
        if not dry_run:
            found = [finding for finding in found if finding.path is None or _remove(finding.path)]
        found += [*_rows(registry, everything=everything, dry_run=dry_run)]
    total = sum(finding.size for finding in found)
    if as_json:
        removed = [{**finding._asdict(), "path": finding.path} for finding in found]
        print_json({"dry_run": dry_run, "removed": removed, "bytes": total})
        return
    if found:
        print_table(
            ("KIND", "WHAT", "SIZE", "WHY"),
            [(found_.kind, found_.what, mebibytes(found_.size) if found_.path else "-", found_.why)
             for found_ in found],
            right="SIZE",
        )  # fmt: skip
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(found) or 'nothing'} {verb}, {mebibytes(total)}")


def _vms(settings: Settings, registry: Registry, *, dry_run: bool) -> Iterator[Finding]:
    """VMs whose runner is dead, and that the record takes for living."""
    from vmkernel.host import reaper
    from vmkernel.models import ENDED

    why = "its runner was killed"
    if not dry_run:
        for vm_id in reaper.sweep(settings):
            yield Finding("vm", vm_id, why)
        return
    for status in registry.list():
        if not status.runner_alive and (status.qemu_alive or status.state in ENDED):
            yield Finding("vm", status.record.vm_id, why)


def _rows(registry: Registry, *, everything: bool, dry_run: bool) -> Iterator[Finding]:
    """VMs that have ended and were not to be kept, but for the newest."""
    from vmkernel.host.registry import KEPT_ROWS
    from vmkernel.models import ENDED

    def count() -> int:
        listed = registry.list(ended=True)
        return sum(status.record.state in ENDED and not status.record.kept for status in listed)

    keep = 0 if everything else KEPT_ROWS
    before = count()
    if dry_run:
        gone = max(0, before - keep)
    else:
        registry.forget_old(keep)
        gone = before - count()
    if gone > 0:
        yield Finding("rows", f"{gone} on the record of VMs", "these VMs have ended")


def _files(settings: Settings, registry: Registry, *, everything: bool) -> Iterator[Finding]:
    found = [
        *_logs(settings, registry, everything=everything),
        *_templates(settings, everything=everything),
        *_builders(settings),
        *_strays(settings),
    ]
    for kind, path, why in found:
        yield Finding(kind, path.name, why, path, _size(path))


def _logs(
    settings: Settings, registry: Registry, *, everything: bool
) -> Iterator[tuple[str, Path, str]]:
    """Logs of VMs that do not live, but for the newest."""
    from vmkernel.host.start import KEPT_LOGS

    live = {status.record.vm_id for status in registry.list()}
    logs = [path for path in _entries(settings.state_dir / "logs") if path.name not in live]
    logs.sort(key=_mtime)
    for path in logs if everything else logs[:-KEPT_LOGS]:
        if time.time() - _mtime(path) > _YOUNG:  # else its VM may not be on record yet
            yield "logs", path, "the VM has ended"


def _templates(settings: Settings, *, everything: bool) -> Iterator[tuple[str, Path, str]]:
    """Memory templates that nothing can use, and those that nobody has used for long."""
    from vmkernel.image.store import list_images
    from vmkernel.vm.template import KEEP_UNUSED, list_templates

    images = {image.digest for _, image in list_images(settings) if not isinstance(image, VmError)}
    most = 24 * 3600 if everything else KEEP_UNUSED
    for directory, template in list_templates(settings):
        idle = time.time() - max(_mtime(directory / "used"), _mtime(directory))
        if isinstance(template, VmError):
            yield "template", directory, "it is damaged"
        elif template.manifest.inputs.get("image") not in images:
            yield "template", directory, f"the image {template.manifest.recipe!r} of it is gone"
        elif idle > most:
            yield "template", directory, f"not used for {idle / 86400:.0f} days"


def _builders(settings: Settings) -> Iterator[tuple[str, Path, str]]:
    """What builders of templates and images leave when they are killed.

    A builder holds the lock ``.lock-<key>`` as long as it is at work.
    """
    from vmkernel.vm.template import templates_dir

    why = "its builder was killed"
    directory = templates_dir(settings)
    for path in _entries(directory):
        for prefix in (".tmp-", ".progress-", ".lock-"):
            if path.name.startswith(prefix):
                key = path.name.removeprefix(prefix).partition("-")[0].partition(".")[0]
                if _nobody_holds(directory / f".lock-{key}"):
                    yield "leftover", path, why
    for path in _entries(settings.images_dir):
        if path.name.startswith(".tmp-"):
            name = path.name.removeprefix(".tmp-")
            # .tmp-<image>-<pid>[-…]: an image's name may have dashes, too
            locks = [
                other for other in _entries(settings.images_dir)
                if other.name.startswith(".lock-")
                and name.startswith(other.name.removeprefix(".lock-") + "-")
            ]  # fmt: skip
            if all(_nobody_holds(lock) for lock in locks):
                yield "leftover", path, why


def _strays(settings: Settings) -> Iterator[tuple[str, Path, str]]:
    """Files that should have lost their names at once, or were made for a moment."""
    for path in _entries(settings.cache_dir):
        old = time.time() - _mtime(path)
        if path.name.startswith("scratch-") and old > _YOUNG:
            yield "leftover", path, "its VM's start was killed"
        elif path.name.startswith(".probe-") and old > _PROBE_IS_DEAD:
            yield "leftover", path, "a trial of KVM was killed"


def _nobody_holds(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _remove(path: Path) -> bool:
    """Remove it; False when it is not to be had (any more)."""
    try:
        if path.name.startswith(".lock-"):
            return _remove_lock(path)
        if path.is_dir() and not path.is_symlink():
            if not path.name.startswith("."):  # at one stroke, so that nobody finds half of it
                path = path.rename(path.with_name(f".tmp-gone-{os.urandom(8).hex()}"))
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            click.echo(f"vmkernel: {path} could not be removed: {error.strerror}", err=True)
        return False
    return True


def _remove_lock(path: Path) -> bool:
    """As its last holder would: held, so that nobody takes it while it goes (vm.template)."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), path.stat()):
            return False
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    """Bytes on the disk: a template's files are sparse."""
    total = 0
    with contextlib.suppress(OSError):
        total = path.lstat().st_blocks * 512
    if path.is_dir() and not path.is_symlink():
        for below in path.rglob("*"):
            with contextlib.suppress(OSError):
                total += below.lstat().st_blocks * 512
    return total
