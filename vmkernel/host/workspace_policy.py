"""What a guest may do in its workspace: pure rules, and the account of what it has written.

Where it stands: `host.workspace_requests` asks it about each request.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import NoReturn

import msgspec

from vmkernel.host.workspace import Place, Share
from vmkernel.host.workspace_names import is_hidden_place, is_protected
from vmkernel.protocol import sftp

MAX_NAME, MAX_PATH = 255, 4096
_SPECIAL = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX


class Statistics(msgspec.Struct):
    """What a gate has seen."""

    requests: int = 0
    refused: int = 0
    malformed: int = 0
    written: int = 0
    files: int = 0
    servers: int = 0
    replaced: int = 0


class RefusedError(Exception):
    """A request that is not passed on, with what it is answered."""

    def __init__(self, code: int, why: str = "") -> None:
        self.code = code
        super().__init__(why)


class Policy:
    """The rules for one share.  ``news`` is called with what a person should hear."""

    def __init__(self, share: Share, news: Callable[[str], None]) -> None:
        self.share = share
        self.statistics = Statistics()
        self.news = news

    def path(self, packet: sftp.Packet) -> Place:
        """The next field, which is to be a path."""
        return self.checked(bytes(packet.string()))

    def checked(self, path: bytes) -> Place:
        """A path, name by name.  Raises RefusedError."""
        if len(path) > MAX_PATH or b"\0" in path:
            raise RefusedError(sftp.NO_SUCH_FILE)
        if path == sftp.ROOT:
            return ()
        if not path.startswith(sftp.ROOT + b"/"):
            raise RefusedError(sftp.NO_SUCH_FILE)
        place = tuple(path[len(sftp.ROOT) + 1 :].split(b"/"))
        for name in place:
            if name in (b"", b".", b"..") or len(name) > MAX_NAME:
                raise RefusedError(sftp.NO_SUCH_FILE)
        if self.is_hidden_place(place):
            raise RefusedError(sftp.NO_SUCH_FILE)
        return place

    def is_hidden_place(self, place: Place) -> bool:
        """Whether the guest is not to see it."""
        share = self.share
        if share.dots_hidden and place[0].startswith(b"."):
            return True
        if share.hidden and any(place[: len(hidden)] == hidden for hidden in share.hidden):
            return True
        return is_hidden_place(place)

    def may_write(self, place: Place) -> None:
        """Raises RefusedError where nothing may be written."""
        if not self.share.writable:
            raise RefusedError(sftp.PERMISSION_DENIED, "the workspace is read-only")
        if not place or any(is_protected(name) for name in place):
            if place:
                self.news(
                    "names that programs of the host obey or that hold secrets cannot be written "
                    "in the workspace (docs/workspace.md)"
                )
            raise RefusedError(sftp.PERMISSION_DENIED, "a protected name")

    def refuse_repository(self) -> NoReturn:
        """Something was to be written in a directory that has a HEAD.  Raises RefusedError."""
        self.news(
            "a directory with a file HEAD is a repository to git: nothing in it can be written in "
            "the workspace (docs/workspace.md)"
        )
        raise RefusedError(sftp.PERMISSION_DENIED, "a repository")

    def mode(self, attributes: sftp.Attributes) -> int | None:
        """The permissions that are given to something new or old."""
        if attributes.mode is None:
            return None
        if attributes.mode & _SPECIAL:
            raise RefusedError(sftp.PERMISSION_DENIED, "a special permission bit")
        return attributes.mode & 0o777

    def changes(self, attributes: sftp.Attributes, limit: int) -> bytes:
        """What is to be changed of a file that may be as long as ``limit``."""
        if attributes.ids is not None:
            raise RefusedError(sftp.PERMISSION_DENIED, "another owner")
        if attributes.size is not None and attributes.size > limit:
            raise RefusedError(sftp.BROKEN, "workspace_size")
        mode = self.mode(attributes)
        return sftp.Attributes(attributes.size, None, mode, attributes.times).encode()

    def room_for_file(self) -> bool:
        """Whether one more may be made."""
        if self.statistics.files < self.share.files:
            return True
        self.news(
            f"the workspace's limit of {self.share.files} new files for one VM is reached "
            "(setting workspace_files)"
        )
        return False

    def count_file(self) -> None:
        """One is about to be made.  Raises RefusedError."""
        if not self.room_for_file():
            raise RefusedError(sftp.BROKEN, "workspace_files")
        self.statistics.files += 1

    def made_nothing(self) -> None:
        """What was counted was not made, or something is gone."""
        self.statistics.files = max(0, self.statistics.files - 1)

    def count_bytes(self, end: int, size: int, limit: int) -> None:
        """So many are about to be written, up to ``end`` of a file.  Raises RefusedError."""
        if self.statistics.written + size > self.share.size or end > limit:
            self.news(
                f"the workspace's limit of {self.share.size >> 20} MiB written by one VM is "
                "reached (setting workspace_size)"
            )
            raise RefusedError(sftp.BROKEN, "workspace_size")
        self.statistics.written += size

    def check_target(self, target: bytes) -> None:
        """What a new link may lead to.  Raises RefusedError.

        Downwards only: what leads up today may lead out when its directory is moved tomorrow.
        """
        parts = target.split(b"/")
        if (
            not target
            or len(target) > MAX_PATH
            or b"\0" in target
            or target.startswith(b"/")
            or b".." in parts
            or any(is_protected(part) for part in parts if part not in (b"", b"."))
        ):
            raise RefusedError(sftp.PERMISSION_DENIED)
