"""Files and directories into a guest and out of it, by the agent's commands.

Where it stands: whoever has a way to a guest's agent hands it in as ``call``.  What the agent
answers is as hostile as everything that a guest says: ``host.guestfiles`` checks it,
``host.landing`` writes it, and here it is counted; a size that a guest tells is not believed.
Links are neither followed nor made below what the caller named: like devices and FIFOs they are
left out, and the result tells which.

A file is taken as long as it was when its turn came; what is appended meanwhile is left.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vmkernel.errors import VmFileError
from vmkernel.host.guestfiles import Call, GuestFiles, guest_path, refusal, shown
from vmkernel.host.landing import (
    aside,
    directory_in,
    host_errors,
    named_directory,
    named_file,
    new_file_in,
    write_all,
)
from vmkernel.protocol.files import FileEntry, FileListing
from vmkernel.protocol.messages import MAX_CHUNK

MAX_BYTES = 4 << 30
MAX_FILES = 20_000
"""Names that one transfer may have, directories and what is left out included."""
MAX_DEPTH = 64
"""Directories inside each other."""

OnProgress = Callable[[int, int | None], None]
"""on_progress(bytes done, bytes in all, or None where that is not known before the end)"""


class Transfer(NamedTuple):
    """What was transferred."""

    bytes: int
    files: int
    skipped: list[str]
    """Paths of what is neither a file nor a directory."""


class _Count:
    """How much there was so far, held to the limits."""

    def __init__(
        self,
        max_bytes: int,
        max_files: int,
        max_depth: int,
        on_progress: OnProgress | None,
    ) -> None:
        self.total: int | None = None
        self.bytes = 0
        self.files = 0
        self.skipped: list[str] = []
        self._names = 0
        self._limits = (max_bytes, max_files, max_depth)
        self._on_progress = on_progress

    def name(self, path: bytes, depth: int = 0) -> None:
        self._names += 1
        if self._names > self._limits[1]:
            raise _over(path, f"more than {self._limits[1]} names", "max_files")
        if depth > self._limits[2]:
            raise _over(path, f"more than {self._limits[2]} directories deep", "max_depth")

    def expect(self, path: bytes, size: int) -> None:
        if self.bytes + size > self._limits[0]:
            raise _over(path, f"more than {self._limits[0]} bytes", "max_bytes")

    def add(self, path: bytes, size: int) -> None:
        self.expect(path, size)
        self.bytes += size
        if self._on_progress is not None:
            self._on_progress(self.bytes, self.total)

    def result(self) -> Transfer:
        return Transfer(self.bytes, self.files, self.skipped)


def _over(path: bytes, what: str, limit: str) -> VmFileError:
    return VmFileError(
        f"{shown(path)}: {what}", hint=f"transfer less, or ask for a higher limit ({limit})"
    )


# --- out of the guest ------------------------------------------------------------------


async def get_tree(
    call: Call,
    source: str,
    target: Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
    max_depth: int = MAX_DEPTH,
    on_progress: OnProgress | None = None,
) -> Transfer:
    """Copy ``source``, a file or a directory of the guest, to the host.

    A file replaces the file ``target``, or goes into the directory ``target``.  A directory's
    contents go into the directory ``target``, which is made if need be; what is there already is
    not written over.  Permissions are the guest's as far as the umask lets them, without special
    bits, and the owner may always write.

    Raises VmFileError (no such file, no permission, a limit, something is there already, the
    host's disk is full, …), and what ``call`` raises when the VM is gone.  What had arrived whole
    stays.
    """
    guest = GuestFiles(call)
    path = guest_path(source)
    count = _Count(max_bytes, max_files, max_depth, on_progress)
    listing = await guest.listing(path)
    with host_errors(target):
        if listing.kind == "file":
            if target.is_dir():
                target /= Path(os.fsdecode(path)).name
            count.total = listing.size
            with named_file(target, listing.mode) as fd:
                await _fetch(guest, path, listing.size, fd, count)
        elif listing.kind == "directory":
            with named_directory(target) as fd:
                await _get_directory(guest, path, listing, fd, 1, count)
        else:
            raise refusal(path, errno.ENOTSUP)
    return count.result()


async def read_file(call: Call, path: str, max_bytes: int = MAX_CHUNK) -> bytes:
    """What a file of the guest contains.  Raises VmFileError, also when that is too much."""
    guest = GuestFiles(call)
    count = _Count(max_bytes, 1, 1, None)
    found = bytearray()
    name = guest_path(path)
    while data := await guest.read(name, len(found), MAX_CHUNK):
        count.add(name, len(data))
        found += data
    return bytes(found)


async def _get_directory(
    guest: GuestFiles, path: bytes, listing: FileListing, fd: int, depth: int, count: _Count
) -> None:
    for entry in await _entries(guest, path, listing, depth, count):
        below = path.rstrip(b"/") + b"/" + entry.name
        if entry.kind == "directory":
            inner = await guest.listing(below)
            if inner.kind != "directory":
                raise refusal(below, errno.ENOTDIR)  # it was one a moment ago
            with directory_in(fd, entry.name, entry.mode) as inner_fd:
                await _get_directory(guest, below, inner, inner_fd, depth + 1, count)
        elif entry.kind == "file":
            with new_file_in(fd, entry.name, entry.mode) as file:
                await _fetch(guest, below, entry.size, file, count)
        else:
            count.skipped.append(os.fsdecode(below))


async def _entries(
    guest: GuestFiles, path: bytes, page: FileListing, depth: int, count: _Count
) -> list[FileEntry]:
    """All of a directory, before anything in it is looked into: a listing is no place to stay."""
    entries: list[FileEntry] = []
    while True:
        for _ in page.entries:
            count.name(path, depth)
        entries += page.entries
        if not page.more:
            return entries
        page = await guest.listing(path, len(entries))


async def _fetch(guest: GuestFiles, path: bytes, size: int, fd: int, count: _Count) -> None:
    """Write a guest's file to ``fd``; of a size of 0 it is not known what is in it (/proc)."""
    count.expect(path, size)
    offset = 0
    while data := await guest.read(
        path, offset, min(MAX_CHUNK, size - offset) if size else MAX_CHUNK
    ):
        count.add(path, len(data))
        await aside(write_all, fd, data)
        offset += len(data)
        if offset == size:
            break
    count.files += 1


# --- into the guest --------------------------------------------------------------------


class _Item(NamedTuple):
    """A file or directory of the host's that is to be copied."""

    source: Path
    target: bytes
    mode: int
    size: int | None
    """None: a directory."""


async def put_tree(
    call: Call,
    source: Path | bytes,
    target: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
    max_depth: int = MAX_DEPTH,
    on_progress: OnProgress | None = None,
) -> Transfer:
    """Copy ``source``, a file or directory of the host or bytes, to ``target`` in the guest.

    A ``target`` that ends with "/" is a directory that is there, and gets it under its own name.
    Otherwise a file becomes the file ``target``, a directory's contents go into the directory
    ``target``; files that are there are written over.  All of it belongs to the guest's user, who
    may always write.

    Raises VmFileError (no such file, no permission, a limit, the guest's disk is full, …), and
    what ``call`` raises when the VM is gone.  What had arrived stays.
    """
    guest = GuestFiles(call)
    count = _Count(max_bytes, max_files, max_depth, on_progress)
    path = guest_path(target)
    if isinstance(source, bytes):
        count.total = len(source)
        for offset in range(0, len(source) or 1, MAX_CHUNK):
            data = memoryview(source)[offset : offset + MAX_CHUNK]
            await guest.write(path, offset, data, 0o644, truncate=offset == 0)
            count.add(path, len(data))
        count.files += 1
        return count.result()
    if path.endswith(b"/"):
        path += os.fsencode(source.absolute().name)
    with host_errors(source):
        items = await aside(_survey, source, path, count)
        count.total = sum(item.size or 0 for item in items)
        count.expect(path, count.total)
        for item in items:
            if item.size is None:
                await guest.make_directory(item.target, item.mode | 0o700)
            else:
                await _send(guest, item, count)
    return count.result()


def _survey(source: Path, target: bytes, count: _Count) -> list[_Item]:
    """What is to be copied, a directory before what is in it."""
    items: list[_Item] = []
    source = Path(os.path.realpath(source, strict=True))  # a link that the caller named is followed
    found = source.stat()
    waiting = [(source, target, found, 0)]
    while waiting:
        path, into, found, depth = waiting.pop()
        count.name(os.fsencode(path), depth)
        mode = found.st_mode & 0o777
        if stat.S_ISDIR(found.st_mode):
            items.append(_Item(path, into, mode, None))
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                    below = into + b"/" + os.fsencode(entry.name)
                    status = entry.stat(follow_symlinks=False)
                    waiting.append((path / entry.name, below, status, depth + 1))
        elif stat.S_ISREG(found.st_mode):
            items.append(_Item(path, into, mode, found.st_size))
        elif depth == 0:
            raise VmFileError(f"On the host, {path} is neither a file nor a directory")
        else:
            count.skipped.append(str(path))
    return items


async def _send(guest: GuestFiles, item: _Item, count: _Count) -> None:
    # What was a file may be a FIFO by now, which must not be waited for, or a link
    fd = os.open(item.source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        offset = 0
        while True:
            data = await aside(os.read, fd, MAX_CHUNK)
            if data or offset == 0:
                await guest.write(item.target, offset, data, item.mode | 0o600, truncate=not offset)
                count.add(item.target, len(data))
                offset += len(data)
            if len(data) < MAX_CHUNK:
                break
    finally:
        os.close(fd)
    count.files += 1
