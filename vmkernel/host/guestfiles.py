"""The agent's commands about files, and what it answers: checked, or refused with a reason.

Where it stands: under ``host.files``, over the protocol.  Nothing here touches the host's files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from vmkernel.errors import ProtocolError, VmFileError
from vmkernel.protocol import files, frames, messages

T = TypeVar("T")

Call = Callable[
    [messages.Command, Sequence[frames.Piece]],
    Awaitable[tuple[dict[str, Any], list[memoryview]]],
]
"""A way to a guest's agent: ``vm.agent.exchange``, or one that ends there."""

_LONGEST_PATH = 4095  # PATH_MAX, less its NUL

# errno -> what is wrong, what to do
_REFUSALS = {
    errno.ENOENT: ("there is no such file or directory", "a relative path begins at /home/user"),
    errno.EISDIR: ("it is a directory", "end the path with / to put a file into it"),
    errno.ENOTDIR: ("a part of the path is no directory", "look at the path"),
    errno.EEXIST: ("there is something else of that name", "choose another name"),
    errno.ENOTSUP: ("it is neither a file nor a directory", "pipes and devices stay"),
    errno.ENOSPC: ("the guest's disk is full", "a VM with a larger one: setting scratch_size"),
    errno.ETIMEDOUT: ("the guest did not get it done in time", "look at what the guest is doing"),
    errno.EIO: ("the guest gave it up", "try again; code in the guest may have ended its helper"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        ("the guest's user may not do that", "choose a place below /home/user or /tmp"),
    ),
}  # fmt: skip


class GuestFiles:
    """A guest's files.  Every method raises VmFileError for what the guest's system refuses,
    ProtocolError for an answer that is none, and what the ``call`` raises when the VM is gone.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    async def read(self, path: bytes, offset: int, size: int) -> memoryview:
        """Up to ``size`` bytes of a file, from ``offset``; none where it ends."""
        command = messages.ReadFile(_checked(path), offset, size)
        _, buffers = await self._ask(command, (), files.FileChunk)
        data = buffers[0] if buffers else memoryview(b"")
        if len(buffers) > 1 or len(data) > size:
            raise ProtocolError(f"the guest sent more of {shown(path)} than was asked for")
        return data

    async def write(
        self, path: bytes, offset: int, data: frames.Piece, mode: int, *, truncate: bool
    ) -> None:
        """Put ``data`` into a file, which is made with ``mode`` if need be."""
        command = messages.WriteFile(_checked(path), offset, mode, truncate)
        await self._ask(command, (data,), _Done)

    async def make_directory(self, path: bytes, mode: int) -> None:
        """Make a directory, or find it there."""
        await self._ask(messages.MakeDirectory(_checked(path), mode), (), _Done)

    async def move(self, path: bytes, target: bytes, *, replace: bool) -> None:
        """Give it another name; with ``replace`` also one that something has already."""
        command = messages.MoveFile(_checked(path), _checked(target), replace)
        await self._ask(command, (), _Done)

    async def look(self, path: bytes) -> files.FileListing | None:
        """What is there (a directory's first entries); None when nothing is."""
        try:
            return await self.listing(path)
        except VmFileError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ENOENT:
                return None
            raise

    async def listing(self, path: bytes, skip: int = 0) -> files.FileListing:
        """What is there; the names are single names, and none twice within a page."""
        command = messages.ListFiles(_checked(path), skip)
        found, _ = await self._ask(command, (), files.FileListing)
        names = [entry.name for entry in found.entries]
        for name in names:
            if b"/" in name or b"\0" in name or name in (b".", b".."):
                raise ProtocolError(f"the guest says that {shown(path)} contains {shown(name)}")
        if len(set(names)) < len(names) or (found.more and not names):
            raise ProtocolError(f"the guest lists {shown(path)} wrongly")
        return found

    async def _ask(
        self, command: messages.FileCommand, buffers: Sequence[frames.Piece], kind: type[T]
    ) -> tuple[T, list[memoryview]]:
        result, received = await self._call(command, buffers)
        try:
            if "errno" in result:
                number = msgspec.convert(result, files.FileRefusal).errno
                raise refusal(command.path, number)
            return msgspec.convert(result, kind), received
        except msgspec.ValidationError as error:
            what = type(command).__name__
            raise ProtocolError(f"a wrong answer of the guest to {what}: {error}") from error


class _Done(msgspec.Struct, forbid_unknown_fields=True):
    """The answer where there is nothing to say."""


def refusal(path: bytes, number: int) -> VmFileError:
    """The error for what the guest's system did not do."""
    why, hint = _REFUSALS.get(number, (os.strerror(number), ""))
    error = VmFileError(f"In the guest, {shown(path)}: {why}", hint=hint)
    error.__cause__ = OSError(number, os.strerror(number))
    return error


def shown(path: bytes) -> str:
    """A path for people's eyes: quoted, nothing in it that a terminal would obey."""
    return repr(os.fsdecode(path))


def guest_path(path: str) -> bytes:
    """A path in a guest, from the caller.  Raises VmFileError when there can be none such."""
    return _checked(os.fsencode(path))


def _checked(path: bytes) -> bytes:
    if not path or b"\0" in path or len(path) > _LONGEST_PATH:
        raise VmFileError(
            f"{shown(path[:200])} can be no path in a guest",
            hint=f"a path has 1 to {_LONGEST_PATH} bytes, and no NUL",
        )
    return path
