"""Writing on the host what comes out of a guest: by descriptors of directories, never by a path.

A name is the guest's word, and the directory it goes to may be shared with what the guest sent
before: so nothing is opened through a link, nothing that exists is written to, and no special
permission bits are set.  Where it stands: under ``host.files``.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from vmkernel.errors import VmError, VmFileError
from vmkernel.host.shielded import to_its_end

T = TypeVar("T")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def host_errors(path: Path) -> Iterator[None]:
    """What the host's system refuses inside becomes a VmFileError that names ``path``."""
    try:
        yield
    except OSError as error:
        if isinstance(error, VmError):  # some of ours are OSErrors, too
            raise
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        where = f"{path}" if not name or name == str(path) else f"{path} ({name!r})"
        raise VmFileError(
            f"On the host, {where}: {error.strerror or error}",
            hint="choose another name" if isinstance(error, FileExistsError) else "",
        ) from error


@contextmanager
def named_directory(path: Path) -> Iterator[int]:
    """The directory that the caller named, made if need be: its descriptor."""
    path.mkdir(exist_ok=True)
    fd = os.open(path, _DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def directory_in(parent: int, name: bytes, mode: int) -> Iterator[int]:
    """A directory in another, made if need be; not through a link.  Its descriptor."""
    with suppress(FileExistsError):
        os.mkdir(name, (mode & 0o777) | 0o700, dir_fd=parent)
    fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def new_file_in(parent: int, name: bytes, mode: int) -> Iterator[int]:
    """A file that is not there yet; removed again when the writing fails.  Its descriptor."""
    fd = os.open(name, _NEW_FILE, (mode & 0o777) | 0o600, dir_fd=parent)
    try:
        yield fd
    except BaseException:
        with suppress(OSError):
            os.unlink(name, dir_fd=parent)
        raise
    finally:
        os.close(fd)


@contextmanager
def named_file(path: Path, mode: int) -> Iterator[int]:
    """The very file that the caller named; one that is there is replaced, at the end, as a whole.

    Raises VmFileError when what is there is neither a file nor a link.
    """
    with named_parent(path) as parent:
        with suppress(FileNotFoundError):
            found = os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_mode
            if not (stat.S_ISREG(found) or stat.S_ISLNK(found)):
                raise VmFileError(
                    f"On the host, {path} is neither a file nor a link to one, and stays",
                    hint="choose another name",
                )
        temporary = f".{os.urandom(8).hex()}.part".encode()
        with new_file_in(parent, temporary, mode) as fd:
            yield fd
            os.rename(temporary, path.name, src_dir_fd=parent, dst_dir_fd=parent)


@contextmanager
def named_parent(path: Path) -> Iterator[int]:
    """The directory of what the caller named, which is there: its descriptor."""
    fd = os.open(path.parent, _DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


async def aside(function: Callable[..., T], *arguments: object) -> T:
    """Let a thread do what may wait for a disk.

    Seen through even when the caller is cancelled: it uses descriptors that are closed then.
    """
    return await to_its_end(asyncio.to_thread(function, *arguments))


def write_all(fd: int, data: memoryview) -> None:
    """Write everything."""
    while data:
        data = data[os.write(fd, data) :]
