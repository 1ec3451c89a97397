"""Copies that show nothing half done and can be gone on with, into a guest and out of it.

What is copied lies under a name of its own, ``NAME.MARK.part``, until all of it is there; then it
gets its name.  The mark is made from the names, sizes and times of what is copied: so a copy that
was broken off is gone on with by the same command, unless its source has changed since, and of a
file that is gone on with the end of what is there is compared first.

Where it stands: beside ``host.files``, over ``host.guestfiles``; on the host everything is done by
descriptors, and nothing is opened through a link.  Who may copy what is the caller's business
(``kernel.copying`` for `%vm`, ``cli.copy`` for `vmkernel cp`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vmkernel.errors import VmFileError
from vmkernel.host.files import MAX_BYTES, MAX_DEPTH, MAX_FILES, OnProgress
from vmkernel.host.guestfiles import Call, GuestFiles, refusal, shown
from vmkernel.host.landing import aside, directory_in, write_all
from vmkernel.protocol.files import FileListing
from vmkernel.protocol.messages import MAX_CHUNK

COMPARED = 64 << 10
"""Bytes at the end of what is there already that must be the source's."""
RESERVE = 256 << 20
"""Bytes that a copy leaves free on the host's disk."""
UNSIZED = 1 << 20
"""Bytes taken, in one copy, of a guest's files that say they have none, as those of /proc do."""
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
        mark = hashlib.sha256(repr(told).encode()).hexdigest()[:8]
        tail = f".{mark}.part".encode()
        return name[: LONGEST_NAME - len(tail)] + tail


class Copied(NamedTuple):
    """What a copy brought; ``resumed``: how many of the bytes were there from the time before."""

    bytes: int
    files: int
    resumed: int
    skipped: list[str]


class _Progress:
    def __init__(self, plan: Plan, tell: OnProgress | None) -> None:
        self.done = self.resumed = 0
        self.spare = UNSIZED
        self._total = plan.bytes
        self._tell = tell

    def found(self, size: int) -> None:
        self.resumed += size
        self.add(size)

    def add(self, size: int) -> None:
        self.done += size
        if self._tell is not None:
            self._tell(self.done, max(self._total, self.done))


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
            with _below(fd, (name,)) as inner:
                _survey(inner, parts, plan, leave)


@contextmanager
def _below(fd: int, parts: Sequence[bytes]) -> Iterator[int]:
    """A descriptor, for reading, of what lies below a directory; of ``fd`` itself without parts."""
    with ExitStack() as stack:
        for part in parts:
            fd = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            stack.callback(os.close, fd)
        found = _readable(fd, os.fsdecode(b"/".join(parts)))
        stack.callback(os.close, found)
        yield found


# --- into the guest --------------------------------------------------------------------


async def put(
    call: Call,
    fd: int,
    plan: Plan,
    target: bytes,
    *,
    replace: bool = False,
    on_progress: OnProgress | None = None,
) -> Copied:
    """Copy what ``fd`` and ``plan`` (`survey_host`) are, to ``target`` in the guest.

    With ``replace``, a file there is replaced as a whole, and a directory's files go into one that
    is there, at the end.  Raises VmFileError, OSError (the host's), and what ``call`` does.
    """
    guest = GuestFiles(call)
    there = await guest.look(target)
    if there is not None and not replace:
        raise _in_the_way(f"In the guest, {shown(target)}")
    if there is not None and plan.is_file != (there.kind == "file"):
        raise refusal(target, errno.EISDIR if plan.is_file else errno.ENOTDIR)
    head, slash, name = target.rstrip(b"/").rpartition(b"/")
    part = head + slash + plan.part_of(name)
    begun = await guest.look(part)
    progress = _Progress(plan, on_progress)
    for item in plan.items:
        into = b"/".join((part, *item.parts))
        if item.size is None:
            await guest.make_directory(into, item.mode | 0o700)
            continue
        before = begun if not item.parts else await guest.look(into) if begun else None
        with _below(fd, item.parts) as file:
            await _send(guest, file, item, into, before, progress)
    await guest.move(part, target, replace=replace)
    return Copied(plan.bytes, plan.files, progress.resumed, plan.skipped)


async def _send(
    guest: GuestFiles, fd: int, item: Item, into: bytes, begun: FileListing | None, to: _Progress
) -> None:
    size = item.size or 0
    offset = begun.size if begun is not None and begun.kind == "file" else 0
    if offset > size or (offset and not await _goes_on(guest, into, fd, offset)):
        offset = 0
    to.found(offset)
    first = offset == 0
    while offset < size or first:
        data = await aside(os.pread, fd, min(MAX_CHUNK, size - offset), offset)
        if not data and size:
            raise VmFileError(
                f"On the host, {shown(b'/'.join(item.parts) or into)} became shorter while it was "
                "copied",
                hint="copy it when nobody writes to it",
            )
        await guest.write(into, offset, data, item.mode | 0o600, truncate=first)
        offset += len(data)
        to.add(len(data))
        first = False


async def _goes_on(guest: GuestFiles, path: bytes, fd: int, offset: int) -> bool:
    """Whether the end of the first ``offset`` bytes is the same in the guest and in ``fd``."""
    size = min(COMPARED, offset)
    theirs = await guest.read(path, offset - size, size)
    ours = await aside(os.pread, fd, size, offset - size)
    return len(ours) == size and bytes(theirs) == ours


# --- out of the guest ------------------------------------------------------------------


async def survey_guest(call: Call, path: bytes, leave: Leave, max_bytes: int = MAX_BYTES) -> Plan:
    """What there is to copy of a file or directory of the guest's.  Raises VmFileError."""
    guest = GuestFiles(call)
    plan = Plan(max_bytes)
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


async def get(
    call: Call,
    path: bytes,
    plan: Plan,
    parent: int,
    name: bytes,
    *,
    replace: bool = False,
    on_progress: OnProgress | None = None,
) -> Copied:
    """Copy ``path`` of the guest, as ``plan`` (`survey_guest`) has it, to ``name`` in ``parent``.

    ``parent`` is a directory's descriptor.  No more lands than the plan says.  With ``replace`` a
    file that is there is replaced as a whole, at the end; a directory never is.  Raises
    VmFileError, OSError (the host's), and what ``call`` does.
    """
    guest = GuestFiles(call)
    check_free(parent, name, plan, replace)
    part = plan.part_of(name)
    progress = _Progress(plan, on_progress)
    for item in plan.items:
        if item.size is None:
            with _made(parent, (part, *item.parts), item.mode):
                pass
            continue
        *above, last = (part, *item.parts)
        source = b"/".join((path.rstrip(b"/"), *item.parts)) if item.parts else path
        with _made(parent, above) as directory, _begun(directory, last, item) as fd:
            await _fetch(guest, source, item.size, fd, progress)
    await aside(_settle, parent, part, name, replace, plan.is_file)
    return Copied(progress.done, plan.files, progress.resumed, plan.skipped)


def check_free(parent: int, name: bytes, plan: Plan, replace: bool) -> None:
    """See that a copy out of the guest can get its name, and that the disk has room for it."""
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        mode = 0
    where = f"On the host, {shown(name)}"
    if mode and not replace:
        raise _in_the_way(where)
    if mode and not (plan.is_file and (stat.S_ISREG(mode) or stat.S_ISLNK(mode))):
        raise VmFileError(
            f"{where} is there already, and only a file is ever replaced by a file",
            hint="choose another name",
        )
    disk = os.fstatvfs(parent)
    free = disk.f_bavail * disk.f_frsize - RESERVE
    if plan.bytes > free:
        raise VmFileError(
            f"{where}: {in_words(plan.bytes)} are more than the disk has room for "
            f"({in_words(max(0, free))}, {in_words(RESERVE)} being left free)",
            hint="make room there, or choose another place",
        )


def _in_the_way(where: str) -> VmFileError:
    return VmFileError(
        f"{where} is there already", hint="choose another name, or --force to write over it"
    )


@contextmanager
def _made(fd: int, parts: Sequence[bytes], mode: int = 0o700) -> Iterator[int]:
    """A directory below another, made if need be, all of its path; its descriptor."""
    with ExitStack() as stack:
        for part in parts:
            fd = stack.enter_context(directory_in(fd, part, mode))
        yield fd


@contextmanager
def _begun(parent: int, name: bytes, item: Item) -> Iterator[int]:
    """A file that a copy before this one began, or a new one; open for reading and writing.

    The directory may be one that the guest writes to: what is there and is no plain file of ours,
    of one name only, is no beginning.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = -1
    with suppress(OSError):
        looked = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISREG(looked.st_mode):
            fd = os.open(name, flags, dir_fd=parent)
    try:
        if fd >= 0:
            found = os.fstat(fd)
            mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            if not mine or found.st_nlink != 1 or found.st_size > (item.size or UNSIZED):
                os.close(fd)
                fd = -1
        if fd < 0:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            mode = (item.mode & 0o777) | 0o600
            fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=parent)
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


async def _fetch(guest: GuestFiles, path: bytes, size: int, fd: int, to: _Progress) -> None:
    offset = os.fstat(fd).st_size
    if not size or (offset and not await _goes_on(guest, path, fd, offset)):
        os.ftruncate(fd, 0)
        offset = 0
    os.lseek(fd, offset, os.SEEK_SET)
    to.found(offset)
    most = size or to.spare
    while offset < most:
        data = await guest.read(path, offset, min(MAX_CHUNK, most - offset))
        if not data and size:
            raise VmFileError(
                f"In the guest, {shown(path)} became shorter while it was copied",
                hint="copy it when nobody writes to it",
            )
        if not data:
            break
        await aside(write_all, fd, data)
        offset += len(data)
        to.add(len(data))
    if not size:
        to.spare -= offset


def _settle(parent: int, part: bytes, name: bytes, replace: bool, is_file: bool) -> None:
    """Give a copy that is whole its name.  Raises OSError, VmFileError."""
    if is_file and not replace:
        try:  # the one way to get a name that is surely free
            os.link(part, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
            os.unlink(part, dir_fd=parent)
            return
        except FileExistsError:
            raise _in_the_way(f"On the host, {shown(name)}") from None
        except OSError:  # a file system without hard links
            pass
    if not replace and _is_there(parent, name):
        raise _in_the_way(f"On the host, {shown(name)}")
    os.rename(part, name, src_dir_fd=parent, dst_dir_fd=parent)


def _is_there(parent: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
