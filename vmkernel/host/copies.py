"""Copies that show nothing half done and can be gone on with, into a guest and out of it.

What is copied lies under a name of its own, ``NAME.MARK.part``, until all of it is there; then it
gets its name.  The mark is made of which file it is, and of names, sizes and times: so a copy that
was broken off is gone on with by the same command, unless its source has changed since, and of a
file that is gone on with the end of what is there is compared first.

Where it stands: beside ``host.files``, over ``host.copyplan`` and ``host.guestfiles``; on the host
everything is done by descriptors, and nothing is opened through a link.  Who may copy what is the
caller's business (``kernel.copying`` for `%vm`, ``cli.copy`` for `vmkernel cp`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from vmkernel.errors import VmFileError
from vmkernel.host.copyplan import Item, Plan, below, in_words
from vmkernel.host.files import OnProgress
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
        with below(fd, item.parts) as file:
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
    if not replace and is_there(parent, name):
        raise _in_the_way(f"On the host, {shown(name)}")
    os.rename(part, name, src_dir_fd=parent, dst_dir_fd=parent)


def is_there(parent: int, name: bytes) -> bool:
    """Whether a directory has something of that name."""
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
