"""The administrator's store: images and templates that were built once and are read by all users.

It lies in the setting ``shared_dir`` (``images/``, ``templates/``, as in a user's own places) and
is made by ``vmkernel setup-host``.  What is in it is code: an image runs in the user's VMs, a
template *is* one, and their files are opened.  So nothing is taken from a place that anybody but
root and the user himself could have written to.  Floor 2; lies on the start path of a clone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmkernel.settings import Settings

USUAL_PLACE = Path("/var/lib/vmkernel")


def shared_images(settings: Settings) -> Path | None:
    """Where the administrator's images lie; None when there are none to be had."""
    return _part(settings, "images")


def shared_templates(settings: Settings) -> Path | None:
    """Where the administrator's templates lie; None when there are none to be had."""
    return _part(settings, "templates")


def shared_facts(settings: Settings) -> Path | None:
    """Where it is remembered what was found out about the host; None when it is not."""
    place = settings.shared_dir
    return place if place is not None and not distrust(place) else None


def _part(settings: Settings, name: str) -> Path | None:
    if settings.shared_dir is None:
        return None
    path = settings.shared_dir / name
    return path if not distrust(path) else None


def distrust(path: Path) -> str:
    """Why nothing may be taken from this directory; "" when it may.

    Root or this user must own it and each directory above it, and nobody else be able to write to
    it; above it a directory like /tmp will do, in which nobody can rename what is another's.
    """
    try:
        # On the way as it is written, and as it is without links
        for way in {os.fspath(path), os.path.realpath(path)}:
            place = way
            while True:
                found = os.lstat(place)
                if problem := _problem(place, found, leaf=place == way):
                    return problem
                if place == (above := os.path.dirname(place)):  # noqa: PTH120
                    break
                place = above
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def _problem(place: str, found: os.stat_result, *, leaf: bool) -> str:
    if found.st_uid not in (0, os.geteuid()):
        return f"{place} belongs to user id {found.st_uid}, neither root nor you"
    if stat.S_ISLNK(found.st_mode):
        return ""
    sticky = bool(found.st_mode & stat.S_ISVTX) and not leaf
    if found.st_mode & 0o022 and not sticky:
        return f"others may write to {place} (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""
