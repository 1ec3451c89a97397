"""Which directory of the host a guest sees, and in which way: the setting ``workspace``.

Where it stands: `host.start` asks it for each VM, and hangs a gate (`host.workspace_gate`) between
the VM's port and the directory.  A directory that may not be shared is no reason not to start: the
kernel goes on without, and says why.  Where it was named by a setting, it is an error.

Never shared: the file system's root, the system's directories, what contains home directories.  Of
a home directory the names that begin with a dot are left out, and everywhere the directories of
vmkernel and of Jupyter, whose connection files hold the keys of other kernels.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmkernel.errors import SettingsError
from vmkernel.host.workspace_server import find_bwrap, missing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmkernel.settings import Settings

_SYSTEM = ("bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin",
           "sys", "usr")  # fmt: skip
_REMOVABLE = "/run/media/"
_SHARED_BY_ALL = ("/", "/home", "/tmp", "/var", "/var/tmp", "/var/lib", "/var/log", "/opt",  # noqa: S108
                  "/srv", "/mnt", "/media", "/run/media")  # fmt: skip
_GUESTS_HOME = "/home/user"


Place = tuple[bytes, ...]
"""A path in the workspace, name by name; the workspace itself has none."""


class Share(msgspec.Struct, frozen=True):
    """What is shared, and how."""

    path: str
    """The directory, as it was called when it was chosen, and as the guest calls it."""
    writable: bool = False
    size: int = 4096 << 20
    """Bytes that may be written."""
    files: int = 10_000
    """Files and directories that may be made."""
    hidden: frozenset[Place] = frozenset()
    """What lies in it and is not shared, by its place."""
    dots_hidden: bool = False
    """Whether the names at the top that begin with a dot are hidden: of a home directory."""


class Choice(msgspec.Struct, frozen=True):
    """What a VM gets: a share, or why there is none ("": nobody asked for one)."""

    share: Share | None = None
    problem: str = ""
    hint: str = ""

    @property
    def path(self) -> str:
        """Of the share; "" when there is none."""
        return self.share.path if self.share is not None else ""

    @property
    def notice(self) -> str:
        """What the first cell is told where there is none, though one was to be."""
        if not self.problem:
            return ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"vmkernel: the host's files are not seen here: {self.problem}{hint}\n"

    @property
    def in_words(self) -> str:
        """For `%vm` and `ps`."""
        if self.share is not None:
            return f"{'rw' if self.share.writable else 'ro'} {self.share.path}"
        return f"none: {self.problem}" if self.problem else "none"


def choose(settings: Settings, directory: str, connection_file: str = "") -> Choice:
    """The workspace of a VM whose owner works in ``directory`` ("": nowhere).

    Raises SettingsError: the directory was named by a setting, and cannot be shared.
    """
    if settings.workspace == "none":
        return Choice()
    named = settings.workspace_dir is not None
    if not named and not directory:
        return Choice()
    path = os.path.realpath(settings.workspace_dir or directory)
    problem, hint = _why_not(path, os.path.expanduser("~"))  # noqa: PTH111
    private = private_directories(settings, connection_file)
    for other in private if not problem else ():
        if path == other or path.startswith(other + "/"):
            problem = f"{path} belongs to vmkernel or Jupyter, or lies in such a directory"
            hint = _ELSEWHERE
    if not problem:
        problem, hint = missing_parts()
    if problem:
        if named:
            raise SettingsError(
                f"workspace_dir: {problem}", hint=f"{hint}; or set VMKERNEL_WORKSPACE=none"
            )
        return Choice(None, problem, hint)
    share = Share(
        path,
        writable=settings.workspace == "rw",
        size=settings.workspace_size << 20,
        files=settings.workspace_files,
        hidden=frozenset(_below(path, private)),
        dots_hidden=path in _homes(),
    )
    return Choice(share)


_ELSEWHERE = "start the notebook in a directory of its own, or name one: VMKERNEL_WORKSPACE_DIR"


def _why_not(path: str, home: str) -> tuple[str, str]:
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"the name of {path!r} is not UTF-8", "rename it"
    first = path.split("/", 2)[1]
    if (first in _SYSTEM and not path.startswith(_REMOVABLE)) or path in _SHARED_BY_ALL:
        return f"{path} is a directory of the system's", _ELSEWHERE
    if home.startswith(path.rstrip("/") + "/"):
        return f"{path} contains home directories", _ELSEWHERE
    if path == _GUESTS_HOME:
        return f"{path} is the guest's own home directory, too", _ELSEWHERE
    if not os.path.lexists(path):
        where = os.uname().nodename
        return (
            f"there is no {path} on {where}",
            "mount it there, or name another: VMKERNEL_WORKSPACE_DIR",
        )
    if not Path(path).is_dir():
        return f"{path} is not a directory", "name one that is there"
    if not os.access(path, os.R_OK | os.X_OK):
        return f"{path} cannot be read", "change its permissions, or name another one"
    if len(path) > 1024:
        return f"the path of {path} is too long", _ELSEWHERE
    return "", ""


def _homes() -> set[str]:
    import pwd

    homes = {os.path.expanduser("~")}  # noqa: PTH111
    with suppress(KeyError):
        homes.add(pwd.getpwuid(os.getuid()).pw_dir)
    return {os.path.realpath(home) for home in homes}


def private_directories(settings: Settings, connection_file: str) -> set[str]:
    """Directories that no guest sees."""
    environ = os.environ
    home = os.path.expanduser("~")  # noqa: PTH111
    found = {
        str(settings.runtime_dir), str(settings.state_dir), str(settings.cache_dir),
        str(settings.images_dir), str(settings.database_file.parent),
        str(settings.history_file.parent),
        environ.get("JUPYTER_RUNTIME_DIR", ""), environ.get("JUPYTER_CONFIG_DIR", ""),
        environ.get("JUPYTER_DATA_DIR", ""), environ.get("IPYTHONDIR", ""),
        f"{home}/.local/share/jupyter", f"{home}/.config", f"{home}/.ssh", f"{home}/.gnupg",
        connection_file,
    }  # fmt: skip
    return {os.path.realpath(path) for path in found if path and path != "/"}


def _below(path: str, private: Iterable[str]) -> Iterable[tuple[bytes, ...]]:
    prefix = path.rstrip("/") + "/"
    for other in private:
        if other.startswith(prefix):
            yield tuple(os.fsencode(other[len(prefix) :]).split(b"/"))


def missing_parts() -> tuple[str, str]:
    """Programs that a workspace needs and this host has not, and what to do; "" for none."""
    return missing(find_bwrap())
