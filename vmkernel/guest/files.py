"""Files in and out of the VM, handled by a process that is the user.

The agent is root and must answer at once, and paths are the user's word: a link, swapped at the
right moment, would lend root's rights to whoever made it, and a file system of the user's own
(FUSE, reached through /proc) may never answer.  So commands about files go to a *clerk*: a fork of
the agent that gave up root for good and keeps none of its descriptors.  Nothing can be got from it
but what the user can do anyway, and one that hangs, was stopped or killed is replaced.

Bytes lie in memory that agent and clerk share; the words about them go over a socket of datagrams,
one command at a time, so that the agent never waits for the clerk to read.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import signal
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NoReturn

from vmkernel.protocol import messages
from vmkernel.protocol.frames import Piece

PATIENCE = 30.0
"""Seconds that one command may take: half a mebibyte, or a page of a directory."""

_LENGTH = struct.Struct(">I")
_DATAGRAM = 1 << 17  # what the socket takes at once is 208 KiB; a page of the longest names 100 KB
_MOST_TRIES = 2
_LOOKS = 4  # between looking for a file and making it, somebody else may do either

Result = dict[str, Any]


class Files:
    """The agent's side.  ``reply(number, result, data)`` is called for each command, in order."""

    def __init__(
        self,
        become_user: Callable[[], None],
        reply: Callable[[int, Result, memoryview], None],
    ) -> None:
        self.fd = -1
        """To be watched for reading, unless -1; it may change with every call."""
        self._become_user = become_user
        self._reply = reply
        self._jobs: deque[tuple[int, bytes, Piece]] = deque()  # the first of them is being done
        self._tries = 0  # at it
        self._deadline = 0.0
        self._socket: socket.socket | None = None
        self._pidfd = -1
        self._shared: mmap.mmap | None = None

    def submit(self, number: int, body: bytes, data: Piece) -> None:
        """Have the Call ``body`` carried out, with the bytes that came with it."""
        self._jobs.append((number, body, data))
        if len(self._jobs) == 1:
            self._next()

    def receive(self) -> None:
        """Read what the clerk answered, or that it is gone."""
        assert self._socket is not None
        try:
            answer = self._socket.recv(_DATAGRAM, socket.MSG_DONTWAIT)
            (length,) = _LENGTH.unpack_from(answer)
            if not self._jobs or length > messages.MAX_CHUNK:
                raise ValueError("not an answer of ours")
            result = messages.decode_object(answer[_LENGTH.size :])
        except BlockingIOError:
            return
        except (OSError, ValueError, RecursionError, struct.error):  # the clerk is the user's
            self._dismiss(errno.EIO, again=True)
        else:
            assert self._shared is not None
            self._answer(result, memoryview(self._shared)[:length])
        self._next()

    def time_left(self) -> float | None:
        """Milliseconds until :meth:`check` has something to do; None: it never has."""
        return max(0.0, self._deadline - time.monotonic()) * 1000 if self._jobs else None

    def check(self) -> None:
        """Give up a command that takes too long."""
        if self._jobs and time.monotonic() >= self._deadline:
            self._dismiss(errno.ETIMEDOUT)
            self._next()

    def disown(self) -> None:
        """In a fork of the agent: none of this is for the user's code."""
        if self._socket is not None:
            self._socket.close()
            os.close(self._pidfd)
        if self._shared is not None:
            self._shared.close()

    def _next(self) -> None:
        """Give the clerk its next command; one that cannot be given is answered."""
        while self._jobs:
            _, body, data = self._jobs[0]
            self._tries += 1
            try:
                clerk, shared = self._clerk()
                if len(data) > len(shared):
                    raise OSError(errno.EMSGSIZE, "more than travels at once")
                shared[: len(data)] = data
                clerk.send(_LENGTH.pack(len(data)) + body, socket.MSG_DONTWAIT)
                self._deadline = time.monotonic() + PATIENCE
                return
            except (BrokenPipeError, ConnectionResetError):
                self._dismiss(errno.EIO, again=True)
            except OSError as failure:
                self._dismiss(failure.errno or errno.EIO)

    def _clerk(self) -> tuple[socket.socket, mmap.mmap]:
        """The clerk's socket and the memory shared with it.  Raises OSError: it cannot be made."""
        if self._shared is None:
            self._shared = mmap.mmap(-1, messages.MAX_CHUNK)
        if self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    pid = os.fork()
                except OSError:
                    ours.close()
                    raise
                if pid == 0:
                    self._be_clerk(theirs)
            self._pidfd = os.pidfd_open(pid)
            self._socket, self.fd = ours, ours.fileno()
        return self._socket, self._shared

    def _be_clerk(self, theirs: socket.socket) -> NoReturn:
        try:
            self._become_user()
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            os.dup2(theirs.fileno(), 3, inheritable=False)
            # The ports to the host, and the kernel's: not for a process that the user can ptrace
            os.closerange(4, 1 << 16)
            assert self._shared is not None
            work(socket.socket(fileno=3), self._shared)
        finally:
            os._exit(1)

    def _dismiss(self, number: int, *, again: bool = False) -> None:
        """End the clerk; the command that it had is answered with that errno.

        ``again``: its successor may try, once.  What is done twice is as if it were done once.
        """
        if self._socket is not None:
            with suppress(ProcessLookupError):  # PID 1 has reaped it
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._socket.close()
            self._socket, self._pidfd, self.fd = None, -1, -1
        if self._jobs and not (again and self._tries < _MOST_TRIES):
            self._answer({"errno": number}, memoryview(b""))

    def _answer(self, result: Result, data: memoryview) -> None:
        self._tries = 0
        self._reply(self._jobs.popleft()[0], result, data)


# --- the clerk -----------------------------------------------------------------------


def work(agent: socket.socket, shared: mmap.mmap) -> None:
    """Carry out commands with the rights of this process, until the agent hangs up."""
    lister = Lister()
    while message := agent.recv(_DATAGRAM):
        (given,) = _LENGTH.unpack_from(message)
        result: Result = {}
        length = 0
        try:
            match messages.decode(message[_LENGTH.size :], messages.Call).command:
                case messages.ReadFile(path=path, offset=offset, size=size):
                    with memoryview(shared)[:size] as view:
                        length, total = read_file(path, offset, view)
                    result["size"] = total
                case messages.WriteFile() as write:
                    with memoryview(shared)[:given] as view:
                        write_file(write, view)
                case messages.ListFiles(path=path, skip=skip):
                    result = lister.page(path, skip)
                case messages.MakeDirectory(path=path, mode=mode):
                    make_directory(path, mode)
                case messages.MoveFile(path=path, target=target, replace=replace):
                    move(path, target, replace)
        except OSError as failure:
            result = {"errno": failure.errno or errno.EIO}
        except ValueError:  # a NUL in a path
            result = {"errno": errno.EINVAL}
        agent.send(_LENGTH.pack(length) + messages.encode_json(result))


def open_regular(path: bytes, flags: int) -> int:
    """A descriptor of a file that is there and regular.

    Raises OSError; ENOTSUP when it is something else.  Looked at before it is opened: opening a
    FIFO wakes who waits at its other end, opening a device may do anything.
    """
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "a directory")
        if not stat.S_ISREG(mode):
            raise OSError(errno.ENOTSUP, "neither a file nor a directory")
        # O_NONBLOCK: there may be a lease on it (fcntl(2))
        return os.open(f"/proc/self/fd/{handle}", flags | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)


def read_file(path: bytes, offset: int, view: memoryview) -> tuple[int, int]:
    """Fill ``view`` from a file; how many bytes there were, and how many the file has in all."""
    fd = open_regular(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [view], offset), os.fstat(fd).st_size
    finally:
        os.close(fd)


def write_file(command: messages.WriteFile, view: memoryview) -> None:
    """Put ``view`` into a file, which is made if need be."""
    fd = _open_to_write(command.path, command.mode & 0o777)
    try:
        end = command.offset
        while view:
            written = os.pwrite(fd, view, end)
            end, view = end + written, view[written:]
        if command.truncate:
            os.ftruncate(fd, end)
    finally:
        os.close(fd)


def _open_to_write(path: bytes, mode: int) -> int:
    for _ in range(_LOOKS):
        with suppress(FileNotFoundError):
            return open_regular(path, os.O_WRONLY)
        with suppress(FileExistsError):  # a link that leads nowhere, too
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    raise FileNotFoundError(errno.ENOENT, "a link that leads nowhere, or it comes and goes")


def make_directory(path: bytes, mode: int) -> None:
    """Make a directory, or find it there."""
    try:
        os.mkdir(path, mode & 0o777)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise


def move(source: bytes, target: bytes, replace: bool) -> None:
    """Give a file or directory another name; a directory's files go into one that is there."""
    if not replace and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "there is something of that name")
    if not (_is_directory(source) and _is_directory(target)):
        os.rename(source, target)
        return
    with os.scandir(source) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        move(os.path.join(source, name), os.path.join(target, name), replace)
    os.rmdir(source)


def _is_directory(path: bytes) -> bool:
    """Whether it is one, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


class Lister:
    """Tells what is in a directory, a page at a time."""

    def __init__(self) -> None:
        self._next: tuple[bytes, int] | None = None
        self._entries: Iterator[os.DirEntry[bytes]] = iter(())

    def page(self, path: bytes, skip: int) -> Result:
        """A `protocol.files.FileListing`.  The page after the last one costs no new beginning."""
        found = os.stat(path)
        listing = _facts(found)
        page: list[os.DirEntry[bytes]] = []
        if stat.S_ISDIR(found.st_mode):
            if self._next != (path, skip):
                self._entries = itertools.islice(os.scandir(path), skip, None)
            page = list(itertools.islice(self._entries, messages.MAX_ENTRIES))
        more = len(page) == messages.MAX_ENTRIES
        self._next = (path, skip + len(page)) if more else None
        entries = [[entry.name, *_entry_facts(entry)] for entry in page]
        return {**listing, "entries": entries, "more": more}


def _facts(found: os.stat_result) -> Result:
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    return {
        "kind": kinds.get(stat.S_IFMT(found.st_mode), "other"),
        "size": found.st_size,
        "mode": stat.S_IMODE(found.st_mode),
        "modified": max(0, found.st_mtime_ns // 1000),
    }


def _entry_facts(entry: os.DirEntry[bytes]) -> tuple[Any, ...]:
    try:
        return tuple(_facts(entry.stat(follow_symlinks=False)).values())
    except OSError:  # gone since
        return ("other", 0, 0, 0)
