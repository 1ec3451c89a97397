"""What a copy is to bring, on the host or in a guest: known, within limits, before its first byte.

Where it stands: under ``host.copies``.  The host's files are looked at by descriptors, and nothing
is opened through a link; of a guest's word the amounts are held to limits.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from vmkernel.errors import VmFileError
from vmkernel.host.files import MAX_BYTES, MAX_DEPTH, MAX_FILES
from vmkernel.host.guestfiles import Call, GuestFiles, refusal, shown
from vmkernel.protocol.files import FileListing

LONGEST_NAME = 255

Leave = Callable[[bytes], bool]
"""leave(name): whether what has this name, and all below it, is left out"""


class Item(NamedTuple):
    """A file or directory that is copied."""

    parts: tuple[bytes, ...]
    """Its name below what is copied; none: that itself."""
    mode: int
    size: int | None
    """None: a directory."""
    modified: int
    """Microseconds since the epoch"""


class Plan:
    """All that a copy is to bring, known before its first byte."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
        self.items: list[Item] = []
        self.skipped: list[str] = []
        """What is left out: neither file nor directory, or not to be copied"""
        self.bytes = 0
        self.origin: tuple[bytes | int, ...] = ()
        """Which file or directory it is, where it comes from"""
        self._limits = (max_bytes, max_files)

    @property
    def is_file(self) -> bool:
        """Whether it is one file, and no directory."""
        return self.items[0].size is not None

    @property
    def files(self) -> int:
        """How many files."""
        return sum(item.size is not None for item in self.items)

    def add(self, item: Item) -> None:
        """One more.  Raises VmFileError: a limit."""
        most = self._limits[0]
        self.items.append(item)
        self.bytes += item.size or 0
        if self.bytes > most:
            raise _over(item.parts, f"more than {in_words(most)}")
        self._check(item.parts)

    def skip(self, parts: tuple[bytes, ...]) -> None:
        """One that is left out, and told.  Raises VmFileError: a limit."""
        self.skipped.append(os.fsdecode(b"/".join(parts)))
        self._check(parts)

    def _check(self, parts: tuple[bytes, ...]) -> None:
        files = self._limits[1]
        if len(self.items) + len(self.skipped) > files:
            raise _over(parts, f"more than {files} files and directories")
        if len(parts) > MAX_DEPTH:
            raise _over(parts, f"more than {MAX_DEPTH} directories deep")

    def part_of(self, name: bytes) -> bytes:
        """What a copy of this is called until it is whole."""
        told = [(item.parts, item.size, item.modified if item.size is not None else 0)
                for item in self.items]  # fmt: skip
        mark = hashlib.sha256(repr((self.origin, told)).encode()).hexdigest()[:8]
        tail = f".{mark}.part".encode()
        return name[: LONGEST_NAME - len(tail)] + tail


def in_words(size: int) -> str:
    """Bytes for people: ``12.3 MiB``."""
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << bits:
            return f"{size / (1 << bits):.1f} {unit}"
    return f"{size} bytes" if size != 1 else "1 byte"


def _over(parts: tuple[bytes, ...], what: str) -> VmFileError:
    where = shown(b"/".join(parts)) if parts else "it"
    return VmFileError(f"At {where} it is {what}", hint="copy less at once")


# --- the host's side -------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file or directory of the host to be read, by a path without links: its descriptor.

    What is behind a component that is a link, perhaps since a moment ago, is refused (ELOOP).
    Raises OSError, VmFileError.
    """
    with ExitStack() as stack:
        fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        for part in path.parts[1:]:
            fd = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            stack.callback(os.close, fd)
        found = _readable(fd, str(path))
        stack.callback(os.close, found)
        yield found


def _readable(handle: int, name: str) -> int:
    """A descriptor for reading of what an O_PATH descriptor is about."""
    mode = os.fstat(handle).st_mode
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "it has become a link", name)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise VmFileError(f"On the host, {name!r} is neither a file nor a directory")
    return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def survey_host(fd: int, leave: Leave, max_bytes: int = MAX_BYTES) -> Plan:
    """What there is to copy of a file or directory of the host's.  Raises OSError, VmFileError."""
    plan = Plan(max_bytes)
    found = os.fstat(fd)
    plan.origin = (found.st_dev, found.st_ino)
    plan.add(_item((), found))
    if stat.S_ISDIR(found.st_mode):
        _survey(fd, (), plan, leave)
    return plan


def _item(parts: tuple[bytes, ...], found: os.stat_result) -> Item:
    size = None if stat.S_ISDIR(found.st_mode) else found.st_size
    return Item(parts, found.st_mode & 0o777, size, found.st_mtime_ns // 1000)


def _survey(fd: int, above: tuple[bytes, ...], plan: Plan, leave: Leave) -> None:
    for name in sorted(map(os.fsencode, os.listdir(fd))):
        parts = (*above, name)
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        is_directory = stat.S_ISDIR(found.st_mode)
        if leave(name) or not (is_directory or stat.S_ISREG(found.st_mode)):
            plan.skip(parts)
            continue
        plan.add(_item(parts, found))
        if is_directory:
            with below(fd, (name,)) as inner:
                _survey(inner, parts, plan, leave)


@contextmanager
def below(fd: int, parts: Sequence[bytes]) -> Iterator[int]:
    """A descriptor, for reading, of what lies below a directory; of ``fd`` itself without parts."""
    with ExitStack() as stack:
        for part in parts:
            fd = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            stack.callback(os.close, fd)
        found = _readable(fd, os.fsdecode(b"/".join(parts)))
        stack.callback(os.close, found)
        yield found


# --- the guest's side ----------------------------------------------------------------


async def survey_guest(call: Call, path: bytes, leave: Leave, max_bytes: int = MAX_BYTES) -> Plan:
    """What there is to copy of a file or directory of the guest's.  Raises VmFileError."""
    guest = GuestFiles(call)
    plan = Plan(max_bytes)
    plan.origin = (path,)
    found = await guest.listing(path)
    if found.kind == "file":
        plan.add(Item((), found.mode, found.size, found.modified))
    elif found.kind == "directory":
        plan.add(Item((), found.mode, None, found.modified))
        await _survey_guest(guest, path, found, (), plan, leave)
    else:
        raise refusal(path, errno.ENOTSUP)
    return plan


async def _survey_guest(
    guest: GuestFiles,
    path: bytes,
    page: FileListing,
    above: tuple[bytes, ...],
    plan: Plan,
    leave: Leave,
) -> None:
    skip = 0
    inner: list[bytes] = []
    while True:
        for entry in page.entries:
            if leave(entry.name) or entry.kind not in ("file", "directory"):
                plan.skip((*above, entry.name))
            else:
                size = entry.size if entry.kind == "file" else None
                item = Item((*above, entry.name), entry.mode, size, entry.modified)
                plan.add(item)
                if size is None:
                    inner.append(entry.name)
        skip += len(page.entries)
        if not page.more:
            break
        page = await guest.listing(path, skip)
    for name in inner:
        below = path.rstrip(b"/") + b"/" + name
        found = await guest.listing(below)
        if found.kind != "directory":
            raise refusal(below, errno.ENOTDIR)  # it was one a moment ago
        await _survey_guest(guest, below, found, (*above, name), plan, leave)
