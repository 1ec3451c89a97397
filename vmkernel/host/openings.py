"""What a VM is let see or reach of the world outside, in words: for record, lists and banner.

A VM that nothing was opened for shares nothing with its host.  Each opening that the settings make
is shown wherever its VM is.  Values of environment variables never are.  Floor 4; lies on the start
path of a clone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmkernel.environment import in_words as variables_in_words
from vmkernel.errors import SettingsError
from vmkernel.host.workspace import choose

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmkernel.host.start import Label
    from vmkernel.settings import Settings

NAMES = ("workspace", "network", "environment", "files")
"""The openings, as the record's columns are called."""


def openings(settings: Settings, label: Label, workspace: str | None = None) -> dict[str, str]:
    """Each opening in a few words: "none" where it is closed.  ``workspace``: if it is known."""
    return {
        "workspace": _workspace(settings, label) if workspace is None else workspace,
        "network": _network(settings),
        "environment": _environment(settings, label) or "none",
        # A program and `vmkernel cp` copy files by their own authority; `%vm` is a notebook's
        "files": settings.files if label.kernel_id else "none",
    }


def in_a_line(found: Mapping[str, str]) -> str:
    """The same in one line, as a kernel's banner has it."""
    words = [f"{name}: {found[name]}" for name in NAMES if name != "environment"]
    if found["environment"] != "none":
        words.append(f"variables: {found['environment']}")
    return ", ".join(words)


def in_short(found: Mapping[str, str]) -> str:
    """The same as one word for a narrow table: ``ro,packages,env``; "-" where all is closed.

    "?": nobody knows.  What a person must agree to each time (``files``) is left out.
    """
    if not any(found[name] for name in NAMES):
        return "?"
    words = [found[name].partition(" ")[0].rstrip(":") for name in ("workspace", "network")]
    words.append("none" if found["environment"] in ("", "none") else "env")
    return ",".join(word for word in words if word not in ("", "none")) or "-"


def _workspace(settings: Settings, label: Label) -> str:
    try:
        return choose(settings, label.directory, label.connection_file).in_words
    except SettingsError as error:  # of which the start fails
        return f"none: {error.message}"


def _network(settings: Settings) -> str:
    if settings.network == "none":
        return "none"
    from vmkernel.host.network import in_words

    return in_words(settings)


def _environment(settings: Settings, label: Label) -> str:
    if label.env is None:
        return variables_in_words(settings.env, settings.env_file, os.environ)
    return ", ".join(sorted(label.env))
