"""The first message to a guest kernel: what makes it differ from its twins.

Written into a clone's port when its QEMU was only just spawned, so that the guest finds it in the
instant it runs; written again to each guest kernel that takes the place of a dead one.  Where it
stands: under ``host.start`` and ``host.guest``.  No event loop, and light imports: it lies on the
way of a start.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmkernel.environment import Variables, given
from vmkernel.protocol import frames, messages

if TYPE_CHECKING:
    from vmkernel.settings import Settings

# Of the host's environment a guest gets this: a list, since the rest is the host's own.
_PASSED = ("JPY_SESSION_NAME", "IPYKERNEL_CELL_NAME", "COLUMNS", "LINES", "MPLBACKEND", "TZ")


def write_ahead(sock: socket.socket, env: Mapping[str, str], cwd: str = "") -> None:
    """Put a wake-up into the port of a clone that is not there yet."""
    with suppress(OSError):  # QEMU ended at once: whoever waits for the clone finds that out
        sock.sendall(b"".join(frames.encode(messages.encode_json(wake_request(env, cwd)))))


def wake_request(env: Mapping[str, str], cwd: str = "") -> messages.ToGuest:
    """A wake-up with fresh entropy; ``env`` is added to the guest kernel's environment.

    ``cwd``: the workspace that it waits for, and works in; "" for none.
    """
    content = messages.WakeKernel(entropy=os.urandom(64), env=dict(env), cwd=cwd)
    return messages.ToGuest(
        "control",
        "wake",
        "wake_request",
        msgspec.Raw(b"{}"),
        msgspec.Raw(b"{}"),
        msgspec.Raw(messages.encode_json(content)),
    )


def guest_environment() -> dict[str, str]:
    """What of this process's environment every guest gets."""
    env = Variables({name: os.environ[name] for name in _PASSED if name in os.environ})
    if "TZ" not in env:
        zone = local_zone()
        if zone:
            env["TZ"] = zone
    return env


def given_environment(settings: Settings) -> dict[str, str]:
    """What the settings `env` and `env_file` give a guest besides; they may be secrets.

    Raises:
        SettingsError: the file cannot be taken.
    """
    if not settings.env and settings.env_file is None:
        return Variables()
    variables, missing = given(settings.env, settings.env_file, os.environ)
    if missing:
        import logging  # not on the way of every start

        log = logging.getLogger("vmkernel")
    for name in missing:
        log.warning("the variable %s (setting `env`) is not set here: the guest lacks it", name)
    return variables


def local_zone() -> str:
    """The host's time zone by its name (localtime(5)), "" when it has none."""
    try:
        target = str(Path("/etc/localtime").readlink())
    except OSError:
        return ""
    return target.partition("zoneinfo/")[2]
