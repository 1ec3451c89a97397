"""The gate between a guest's sshfs and the host's sftp-server: it reads every packet, both ways.

What comes from the guest is hostile, and what comes from the server is that of a process that a
hostile guest has spoken with.  Every packet is taken apart, judged and put together anew: a request
has an id and handles of the gate's own when it goes to the server, an answer only goes back when it
is one that its request can have.

* A path begins at the workspace's root, has no ``..`` and no name that is hidden or, for what
  writes, protected (`host.workspace_names`).
* ``ro``: whatever could write is refused here; the server and its mount refuse it, too.
* ``rw``: bytes and new files are counted; no special permission bits, no owners, no link that leads
  upwards.
* Only a regular file is opened: a FIFO would keep the server waiting.
* The server is started at the first request that needs it, replaced when it died or does not
  answer, and ended when nobody has used it for a while.  The guest's sshfs never sees an end of its
  connection.  A handle of a server that is gone is an I/O error.

What a link leads to is not judged here, where it could change a moment later: on the server's mount
no link is followed (`host.workspace_server`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from vmkernel.errors import ProtocolError
from vmkernel.host.workspace import Place, Share
from vmkernel.host.workspace_names import is_hidden, is_protected
from vmkernel.host.workspace_server import OPEN_FILES, ServerProcess
from vmkernel.protocol import sftp

log = logging.getLogger("vmkernel")

MOST_PENDING = 64
"""Requests that are with the server; then the guest is not read."""
MOST_HANDLES = OPEN_FILES - 16
MOST_READ = 128 << 10
"""Bytes that one request may read: an answer may come short."""
PATIENCE = 15.0
"""Seconds without any answer after which a server is replaced."""
IDLE = 60.0
"""Seconds after which a server that nobody uses is ended."""
MOST_FAILURES = 3
"""Servers that end before their first word, one after another; then there is a pause."""
PAUSE = 10.0
MAX_NAME, MAX_PATH = 255, 4096
_NEWS_EVERY = 30.0
_BUFFER = 1 << 20

_WORD = struct.Struct(">I")
_HANDLE = struct.Struct(">II")
_SPECIAL = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_EXTENSION_ANSWERS = {
    sftp.STATVFS: (sftp.EXTENDED_REPLY, sftp.STATUS),
    sftp.FSTATVFS: (sftp.EXTENDED_REPLY, sftp.STATUS),
}


class Statistics(msgspec.Struct):
    """What a gate has seen."""

    requests: int = 0
    refused: int = 0
    malformed: int = 0
    written: int = 0
    files: int = 0
    servers: int = 0
    replaced: int = 0


class _RefusedError(Exception):
    """A request that is not passed on, with what it is answered."""

    def __init__(self, code: int, why: str = "") -> None:
        self.code = code
        super().__init__(why)


class _Pending(msgspec.Struct):
    number: int
    """The guest's."""
    expected: tuple[int, ...]
    then: Callable[[memoryview], bytes | None]
    """What the answer becomes for the guest; None: another request has taken its place."""


class _Handle(msgspec.Struct):
    server: bytes
    kind: int
    """What the request was that opened it: OPEN or OPENDIR."""
    writable: bool
    place: Place


class Gate(asyncio.Protocol):
    """One guest's way to one directory.  ``tell`` says a line in the cell that runs."""

    def __init__(self, share: Share, tell: Callable[[str], None] = lambda text: None) -> None:
        """Raises OSError when the directory cannot be opened."""
        self.share = share
        self.statistics = Statistics()
        self.problem = ""
        """Why the server did not start, the last time"""
        self._tell = tell
        self._told_at: dict[str, float] = {}
        # It is followed when it is renamed, and there is no other in its place
        self._directory = os.open(share.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        found = os.fstat(self._directory)
        self._root = sftp.Attributes(
            found.st_size,
            (0, 0),
            found.st_mode & (stat.S_IFMT(found.st_mode) | 0o777),
            (int(found.st_atime) & 0xFFFFFFFF, int(found.st_mtime) & 0xFFFFFFFF),
        )
        self._guest: asyncio.Transport | None = None
        self._reader = sftp.Reader()
        self._waiting: deque[memoryview] = deque()
        self._guest_choked = False
        self._server: _Server | None = None
        self._server_choked = False
        self._generation = 0
        self._pending: dict[int, _Pending] = {}
        self._next = 0
        self._looking = False
        """Whether a file is looked at before it is opened: what comes next must not overtake it"""
        self._handles: dict[int, _Handle] = {}
        self._next_handle = 0
        self._watch: asyncio.TimerHandle | None = None
        self._last = 0.0
        self._failures = 0
        self._not_before = 0.0
        self._closed = False

    def __repr__(self) -> str:
        state = "server" if self._server is not None else "no server"
        return (
            f"<Gate {self.share.path} {'rw' if self.share.writable else 'ro'} {state} "
            f"pending={len(self._pending)} handles={len(self._handles)}>"
        )

    async def attach(self, sock: socket.socket) -> None:
        """Serve the guest on this socket, which is the gate's from now on."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=sock)

    def close(self) -> None:
        """Hang up, and end the server."""
        if self._closed:
            return
        self._closed = True
        if self._guest is not None:
            self._guest.abort()
        self._drop_server()
        if self._watch is not None:
            self._watch.cancel()
        os.close(self._directory)

    @property
    def server_pid(self) -> int:
        """Of the server's outermost process; 0 while there is none."""
        return self._server.process.pid if self._server is not None else 0

    # --- the guest's side: asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The way to the guest is there."""
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(_BUFFER)
        self._guest = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """The VM has ended."""
        self._guest = None
        self._drop_server()

    def pause_writing(self) -> None:
        """The guest does not read: then it is not read either."""
        self._guest_choked = True
        self._regulate()

    def resume_writing(self) -> None:
        """It does again."""
        self._guest_choked = False
        self._work()

    def data_received(self, data: bytes) -> None:
        """Bytes from the guest."""
        if self._closed or self._guest is None:
            return
        try:
            self._waiting += self._reader.feed(data)
        except ProtocolError as error:
            # No word of it can be trusted any more; the kernel goes on without its workspace
            self.statistics.malformed += 1
            log.warning("the guest of the workspace %s broke the protocol: %s", self.share, error)
            self._guest.abort()
            self._drop_server()
            return
        self._work()

    def choke(self, choked: bool) -> None:
        """The server does not read as quickly as it is written to; or it does again."""
        self._server_choked = choked
        if choked:
            self._regulate()
        else:
            self._work()

    def _work(self) -> None:
        """Serve what waits, as far as there is room."""
        while self._waiting and not self._full:
            self._receive(self._waiting.popleft())
        self._regulate()

    @property
    def _full(self) -> bool:
        return (
            len(self._pending) >= MOST_PENDING
            or self._looking
            or self._guest_choked
            or self._server_choked
        )

    def _regulate(self) -> None:
        guest = self._guest
        if guest is None or guest.is_closing():
            return
        wanted = not (self._full or self._waiting)
        if wanted and not guest.is_reading():
            guest.resume_reading()
        elif not wanted and guest.is_reading():
            guest.pause_reading()

    def _reply(self, answer: bytes) -> None:
        if self._guest is not None and not self._guest.is_closing():
            self._guest.write(answer)

    def _receive(self, data: memoryview) -> None:
        kind, packet = data[0], sftp.Packet(data)
        number = packet.number()
        self.statistics.requests += 1
        if kind == sftp.INIT:  # a guest that begins anew
            self._drop_server()
            self._reply(sftp.hello())
            return
        try:
            handler = _REQUESTS.get(kind)
            if handler is None:
                raise _RefusedError(sftp.UNSUPPORTED)
            handler(self, number, packet)
        except _RefusedError as refusal:
            self.statistics.refused += 1
            self._reply(sftp.status(number, refusal.code, str(refusal).encode()))
        except ProtocolError:
            self.statistics.malformed += 1
            self._reply(sftp.status(number, sftp.BAD_MESSAGE))

    # --- requests ---

    def _open(self, number: int, packet: sftp.Packet) -> None:
        place = self._path(packet)
        flags, attributes = packet.number(), packet.attributes()
        packet.end()
        writes = flags & ~sftp.PFLAG_READ
        if flags & ~0x3F or not flags & (sftp.PFLAG_READ | sftp.PFLAG_WRITE):
            raise ProtocolError("flags that mean nothing")
        if writes:
            self._may_write(place)
        mode = self._mode(attributes)
        given = sftp.Attributes(mode=mode) if flags & sftp.PFLAG_CREATE else sftp.Attributes()
        target = _encode(place)

        def opened(answer: memoryview) -> bytes | None:
            if answer[0] != sftp.HANDLE:
                return _status_for(number, answer)
            return self._new_handle(number, answer, sftp.OPEN, bool(writes), place)

        def looked(answer: memoryview) -> bytes | None:
            self._looking = False
            if answer[0] == sftp.ATTRS:
                fields = sftp.Packet(answer)
                fields.number()
                found = fields.attributes().mode or 0
                if not stat.S_ISREG(found):
                    code = sftp.FAILURE if stat.S_ISDIR(found) else sftp.PERMISSION_DENIED
                    return sftp.status(number, code)
            elif not (_code(answer) == sftp.NO_SUCH_FILE and flags & sftp.PFLAG_CREATE):
                return _status_for(number, answer)
            elif not self._room_for_file():
                return sftp.status(number, sftp.BROKEN)
            else:
                self.statistics.files += 1
            self._send(
                number, sftp.OPEN, (sftp.HANDLE, sftp.STATUS), opened,
                sftp.string(target), _WORD.pack(flags), given.encode(),
            )  # fmt: skip
            return None

        self._send(number, sftp.LSTAT, (sftp.ATTRS, sftp.STATUS), looked, sftp.string(target))
        self._looking = True

    def _close(self, number: int, packet: sftp.Packet) -> None:
        key, handle = self._handle(packet)
        packet.end()
        del self._handles[key]
        self._send_status(number, sftp.CLOSE, sftp.string(handle.server))

    def _read(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet, sftp.OPEN)
        offset, size = packet.long(), min(packet.number(), MOST_READ)
        packet.end()

        def read(answer: memoryview) -> bytes:
            if answer[0] == sftp.STATUS:
                return _status_for(number, answer)
            fields = sftp.Packet(answer)
            fields.number()
            data = fields.string()
            fields.end()
            if len(data) > size:
                raise ProtocolError("more than was asked for")
            return sftp.packet(sftp.DATA, number, sftp.string(data))

        self._send(
            number, sftp.READ, (sftp.DATA, sftp.STATUS), read,
            sftp.string(handle.server), struct.pack(">QI", offset, size),
        )  # fmt: skip

    def _write(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet, sftp.OPEN)
        offset, data = packet.long(), packet.string()
        packet.end()
        if not handle.writable:
            raise _RefusedError(sftp.PERMISSION_DENIED)
        if self.statistics.written + len(data) > self.share.size:
            self._news(
                f"the workspace's limit of {self.share.size >> 20} MiB written by one VM is "
                "reached (setting workspace_size)"
            )
            raise _RefusedError(sftp.BROKEN, "workspace_size")
        if offset + len(data) > max(self.share.size, 1 << 40):
            raise _RefusedError(sftp.BROKEN)
        self.statistics.written += len(data)
        self._send_status(
            number, sftp.WRITE, sftp.string(handle.server), struct.pack(">Q", offset),
            sftp.string(data),
        )  # fmt: skip

    def _lstat(self, number: int, packet: sftp.Packet, kind: int = sftp.LSTAT) -> None:
        place = self._path(packet)
        packet.end()
        if not place and self._server is None:  # to enter a directory is not to use it
            self._reply(sftp.packet(sftp.ATTRS, number, self._root.encode()))
            return
        self._send_attributes(number, kind, sftp.string(_encode(place)))

    def _stat(self, number: int, packet: sftp.Packet) -> None:
        self._lstat(number, packet, sftp.STAT)

    def _fstat(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet)
        packet.end()
        self._send_attributes(number, sftp.FSTAT, sftp.string(handle.server))

    def _setstat(self, number: int, packet: sftp.Packet) -> None:
        place = self._path(packet)
        attributes = packet.attributes()
        packet.end()
        self._may_write(place)
        self._send_status(
            number, sftp.SETSTAT, sftp.string(_encode(place)), self._changes(attributes)
        )

    def _fsetstat(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet, sftp.OPEN)
        attributes = packet.attributes()
        packet.end()
        self._may_write(handle.place)
        self._send_status(
            number, sftp.FSETSTAT, sftp.string(handle.server), self._changes(attributes)
        )

    def _opendir(self, number: int, packet: sftp.Packet) -> None:
        place = self._path(packet)
        packet.end()

        def opened(answer: memoryview) -> bytes:
            if answer[0] != sftp.HANDLE:
                return _status_for(number, answer)
            return self._new_handle(number, answer, sftp.OPENDIR, False, place)

        self._send(
            number, sftp.OPENDIR, (sftp.HANDLE, sftp.STATUS), opened, sftp.string(_encode(place))
        )

    def _readdir(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet, sftp.OPENDIR)
        packet.end()

        def read(answer: memoryview) -> bytes | None:
            if answer[0] == sftp.STATUS:
                return _status_for(number, answer)
            fields = sftp.Packet(answer)
            fields.number()
            entries = []
            for _ in range(fields.number()):
                name, _, attributes = bytes(fields.string()), fields.string(), fields.attributes()
                if b"/" in name or b"\0" in name or not name:
                    raise ProtocolError("a name that is none")
                if name in (b".", b"..") or not self._is_hidden((*handle.place, name)):
                    entries += [sftp.string(name), sftp.string(b""), _seen(attributes).encode()]
            fields.end()
            if not entries:  # nothing of this part is to be seen: the next
                self._send(
                    number, sftp.READDIR, (sftp.NAME, sftp.STATUS), read,
                    sftp.string(handle.server),
                )  # fmt: skip
                return None
            return sftp.packet(sftp.NAME, number, _WORD.pack(len(entries) // 3), *entries)

        self._send(number, sftp.READDIR, (sftp.NAME, sftp.STATUS), read, sftp.string(handle.server))

    def _remove(self, number: int, packet: sftp.Packet, kind: int = sftp.REMOVE) -> None:
        place = self._path(packet)
        packet.end()
        self._may_write(place)

        def removed(answer: memoryview) -> bytes:
            if _code(answer) == sftp.OK:
                self.statistics.files = max(0, self.statistics.files - 1)
            return _status_for(number, answer)

        self._send(number, kind, (sftp.STATUS,), removed, sftp.string(_encode(place)))

    def _rmdir(self, number: int, packet: sftp.Packet) -> None:
        self._remove(number, packet, sftp.RMDIR)

    def _mkdir(self, number: int, packet: sftp.Packet) -> None:
        place = self._path(packet)
        attributes = packet.attributes()
        packet.end()
        self._may_write(place)
        given = sftp.Attributes(mode=self._mode(attributes))
        self._count_file()
        self._send_new(number, sftp.MKDIR, sftp.string(_encode(place)), given.encode())

    def _realpath(self, number: int, packet: sftp.Packet) -> None:
        path = bytes(packet.string())
        packet.end()
        place = () if path == b"." else self._checked(path)
        words = (_WORD.pack(1), sftp.string(_encode(place)), sftp.string(b""))
        self._reply(sftp.packet(sftp.NAME, number, *words, sftp.Attributes().encode()))

    def _rename(self, number: int, packet: sftp.Packet, extension: bytes = b"") -> None:
        old, new = self._path(packet), self._path(packet)
        packet.end()
        for place in (old, new):
            self._may_write(place)
            if any(hidden[: len(place)] == place for hidden in self.share.hidden):
                raise _RefusedError(sftp.PERMISSION_DENIED)
        names = (sftp.string(_encode(old)), sftp.string(_encode(new)))
        if extension:
            self._send_status(number, sftp.EXTENDED, sftp.string(extension), *names)
        else:
            self._send_status(number, sftp.RENAME, *names)

    def _readlink(self, number: int, packet: sftp.Packet) -> None:
        place = self._path(packet)
        packet.end()

        def read(answer: memoryview) -> bytes:
            if answer[0] == sftp.STATUS:
                return _status_for(number, answer)
            fields = sftp.Packet(answer)
            fields.number()
            if fields.number() != 1:
                raise ProtocolError("not one link's target")
            words = (_WORD.pack(1), sftp.string(fields.string()), sftp.string(b""))
            return sftp.packet(sftp.NAME, number, *words, sftp.Attributes().encode())

        self._send(
            number, sftp.READLINK, (sftp.NAME, sftp.STATUS), read, sftp.string(_encode(place))
        )

    def _symlink(self, number: int, packet: sftp.Packet) -> None:
        target, place = bytes(packet.string()), self._path(packet)  # OpenSSH's order
        packet.end()
        self._may_write(place)
        parts = target.split(b"/")
        # Downwards only: what leads up today may lead out when its directory is moved tomorrow
        if (
            not target
            or len(target) > MAX_PATH
            or b"\0" in target
            or target.startswith(b"/")
            or b".." in parts
            or any(is_protected(part) for part in parts if part not in (b"", b"."))
        ):
            raise _RefusedError(sftp.PERMISSION_DENIED)
        self._count_file()
        self._send_new(number, sftp.SYMLINK, sftp.string(target), sftp.string(_encode(place)))

    def _extended(self, number: int, packet: sftp.Packet) -> None:
        name = bytes(packet.string())
        if name == sftp.POSIX_RENAME:
            self._rename(number, packet, name)
        elif name == sftp.HARDLINK:
            old, new = self._path(packet), self._path(packet)
            packet.end()
            self._may_write(old)
            self._may_write(new)
            self._count_file()
            names = (sftp.string(_encode(old)), sftp.string(_encode(new)))
            self._send_new(number, sftp.EXTENDED, sftp.string(name), *names)
        elif name == sftp.STATVFS:
            place = self._path(packet)
            packet.end()
            self._send_raw(number, sftp.string(name), sftp.string(_encode(place)))
        elif name == sftp.FSTATVFS:
            _, handle = self._handle(packet)
            packet.end()
            self._send_raw(number, sftp.string(name), sftp.string(handle.server))
        elif name == sftp.FSYNC:
            _, handle = self._handle(packet, sftp.OPEN)
            packet.end()
            self._send_status(number, sftp.EXTENDED, sftp.string(name), sftp.string(handle.server))
        else:
            raise _RefusedError(sftp.UNSUPPORTED)

    # --- what is looked at ---

    def _path(self, packet: sftp.Packet) -> Place:
        return self._checked(bytes(packet.string()))

    def _checked(self, path: bytes) -> Place:
        if len(path) > MAX_PATH or b"\0" in path:
            raise _RefusedError(sftp.NO_SUCH_FILE)
        if path == sftp.ROOT:
            return ()
        if not path.startswith(sftp.ROOT + b"/"):
            raise _RefusedError(sftp.NO_SUCH_FILE)
        place = tuple(path[len(sftp.ROOT) + 1 :].split(b"/"))
        for name in place:
            if name in (b"", b".", b"..") or len(name) > MAX_NAME:
                raise _RefusedError(sftp.NO_SUCH_FILE)
        if self._is_hidden(place):
            raise _RefusedError(sftp.NO_SUCH_FILE)
        return place

    def _is_hidden(self, place: Place) -> bool:
        share = self.share
        if share.dots_hidden and place[0].startswith(b"."):
            return True
        if share.hidden and any(place[: len(hidden)] == hidden for hidden in share.hidden):
            return True
        return any(is_hidden(name) for name in place)

    def _may_write(self, place: Place) -> None:
        if not self.share.writable:
            raise _RefusedError(sftp.PERMISSION_DENIED, "the workspace is read-only")
        if not place or any(is_protected(name) for name in place):
            raise _RefusedError(sftp.PERMISSION_DENIED, "a protected name")

    def _mode(self, attributes: sftp.Attributes) -> int | None:
        """The permissions that are given to something new or old."""
        if attributes.mode is None:
            return None
        if attributes.mode & _SPECIAL:
            raise _RefusedError(sftp.PERMISSION_DENIED, "a special permission bit")
        return attributes.mode & 0o777

    def _changes(self, attributes: sftp.Attributes) -> bytes:
        if attributes.ids is not None:
            raise _RefusedError(sftp.PERMISSION_DENIED, "another owner")
        if attributes.size is not None and attributes.size > self.share.size:
            raise _RefusedError(sftp.BROKEN, "workspace_size")
        mode = self._mode(attributes)
        return sftp.Attributes(attributes.size, None, mode, attributes.times).encode()

    def _room_for_file(self) -> bool:
        if self.statistics.files < self.share.files:
            return True
        self._news(
            f"the workspace's limit of {self.share.files} new files for one VM is reached "
            "(setting workspace_files)"
        )
        return False

    def _count_file(self) -> None:
        if not self._room_for_file():
            raise _RefusedError(sftp.BROKEN, "workspace_files")
        self.statistics.files += 1

    def _handle(self, packet: sftp.Packet, kind: int = 0) -> tuple[int, _Handle]:
        given = packet.string()
        if len(given) != _HANDLE.size:
            raise _RefusedError(sftp.BROKEN, "no such handle")
        generation, key = _HANDLE.unpack(given)
        handle = self._handles.get(key)
        if generation != self._generation or handle is None:
            raise _RefusedError(sftp.BROKEN, "no such handle")
        if kind and handle.kind != kind:
            raise _RefusedError(sftp.BROKEN, "a handle of another kind")
        return key, handle

    def _new_handle(
        self, number: int, answer: memoryview, kind: int, writable: bool, place: Place
    ) -> bytes:
        fields = sftp.Packet(answer)
        fields.number()
        value = bytes(fields.string())
        fields.end()
        self._next_handle = (self._next_handle + 1) & 0xFFFFFFFF
        key = self._next_handle
        self._handles[key] = _Handle(value, kind, writable, place)
        return sftp.packet(sftp.HANDLE, number, sftp.string(_HANDLE.pack(self._generation, key)))

    def _news(self, text: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told_at.get(text, -_NEWS_EVERY) >= _NEWS_EVERY:
            self._told_at[text] = now
            self._tell(f"vmkernel: {text}\n")

    # --- the server's side ---

    def _send_status(self, number: int, kind: int, *parts: bytes) -> None:
        def answered(answer: memoryview) -> bytes:
            return _status_for(number, answer)

        self._send(number, kind, (sftp.STATUS,), answered, *parts)

    def _send_new(self, number: int, kind: int, *parts: bytes) -> None:
        """A request that makes something: it was counted, which is taken back where it failed."""

        def made(answer: memoryview) -> bytes:
            if _code(answer) != sftp.OK:
                self.statistics.files = max(0, self.statistics.files - 1)
            return _status_for(number, answer)

        self._send(number, kind, (sftp.STATUS,), made, *parts)

    def _send_attributes(self, number: int, kind: int, *parts: bytes) -> None:
        def answered(answer: memoryview) -> bytes:
            if answer[0] == sftp.STATUS:
                return _status_for(number, answer)
            fields = sftp.Packet(answer)
            fields.number()
            attributes = fields.attributes()
            fields.end()
            return sftp.packet(sftp.ATTRS, number, _seen(attributes).encode())

        self._send(number, kind, (sftp.ATTRS, sftp.STATUS), answered, *parts)

    def _send_raw(self, number: int, *parts: bytes) -> None:
        """A question about the file system, whose answer has eleven numbers."""

        def answered(answer: memoryview) -> bytes:
            if answer[0] == sftp.STATUS:
                return _status_for(number, answer)
            if len(answer) != 5 + 11 * 8:
                raise ProtocolError("not what a file system is like")
            return sftp.packet(sftp.EXTENDED_REPLY, number, answer[5:])

        self._send(number, sftp.EXTENDED, (sftp.EXTENDED_REPLY, sftp.STATUS), answered, *parts)

    def _send(
        self,
        number: int,
        kind: int,
        expected: tuple[int, ...],
        then: Callable[[memoryview], bytes | None],
        *parts: bytes,
    ) -> None:
        """Pass a request on.  Raises _RefusedError when there is no server to be had."""
        if kind in (sftp.OPEN, sftp.OPENDIR):
            opening = sum(sftp.HANDLE in other.expected for other in self._pending.values())
            if len(self._handles) + opening >= MOST_HANDLES:
                raise _RefusedError(sftp.FAILURE, "too many open files")
        server = self._need_server()
        loop = asyncio.get_running_loop()
        if not self._pending:
            self._last = loop.time()
        self._next = (self._next + 1) & 0xFFFFFFFF
        self._pending[self._next] = _Pending(number, expected, then)
        server.write(sftp.packet(kind, self._next, *parts))
        if self._watch is None:
            self._watch = loop.call_later(PATIENCE, self._look)

    def on_answer(self, data: memoryview) -> None:
        """One packet of the server's.  Raises ProtocolError: it cannot be trusted any more."""
        packet = sftp.Packet(data)
        pending = self._pending.pop(packet.number(), None)
        if pending is None or data[0] not in pending.expected:
            raise ProtocolError(f"an answer of type {data[0]} to no such question")
        self._last = asyncio.get_running_loop().time()
        self._failures = 0
        try:
            answer = pending.then(data)
        except _RefusedError as refusal:  # in the second step of a request
            answer = sftp.status(pending.number, refusal.code, str(refusal).encode())
        except ProtocolError:
            self._reply(sftp.status(pending.number, sftp.BROKEN))
            raise
        if answer is not None:
            self._reply(answer)

    def after_answers(self) -> None:
        """There may be room for more requests."""
        self._work()

    def _need_server(self) -> _Server:
        if self._server is None:
            loop = asyncio.get_running_loop()
            if loop.time() < self._not_before:
                raise _RefusedError(sftp.BROKEN, self.problem)
            try:
                process = ServerProcess(self._path_now(), writable=self.share.writable)
            except OSError as error:
                self.on_server_end(None, f"it could not be started: {error}")
                raise _RefusedError(sftp.BROKEN, "no server") from error
            self.statistics.servers += 1
            self._generation = (self._generation + 1) & 0xFFFFFFFF
            self._server = _Server(self, process)
        return self._server

    def _path_now(self) -> str:
        """Where the directory is by now.  Raises OSError when it is gone."""
        path = str(Path(f"/proc/self/fd/{self._directory}").readlink())
        ours, found = os.fstat(self._directory), Path(path).lstat()
        if not os.path.samestat(ours, found):
            raise FileNotFoundError(2, "the workspace's directory is gone", path)
        return path

    def on_server_end(self, server: _Server | None, why: str) -> None:
        """A server is gone, or never came."""
        if server is not self._server:
            return
        self._server = None
        self._server_choked = self._looking = False
        self._handles.clear()
        self._generation = (self._generation + 1) & 0xFFFFFFFF
        pending, self._pending = self._pending, {}
        for request in pending.values():
            self._reply(sftp.status(request.number, sftp.BROKEN))
        if self._closed or self._guest is None:
            return
        self.statistics.replaced += 1
        self.problem = why
        log.warning("the workspace's server ended: %s", why)
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            self._failures = 0
            self._not_before = asyncio.get_running_loop().time() + PAUSE
            self._news(f"the workspace cannot be served: {why}")
        self._work()

    def _drop_server(self) -> None:
        server, self._server = self._server, None
        self._pending.clear()
        self._handles.clear()
        self._generation = (self._generation + 1) & 0xFFFFFFFF
        self._server_choked = self._looking = False
        if server is not None:
            server.close()

    def _look(self) -> None:
        """Replace a server that hangs, end one that nobody uses."""
        self._watch = None
        server = self._server
        if server is None or self._closed:
            return
        loop = asyncio.get_running_loop()
        silent = loop.time() - self._last
        if self._pending and silent >= PATIENCE:
            server.close()
            self.on_server_end(
                server, f"it did not answer for {PATIENCE:.0f} s: does the file system hang?"
            )
        elif not self._pending and not self._handles and silent >= IDLE:
            self._drop_server()
        else:
            due = PATIENCE - silent if self._pending else max(PATIENCE, IDLE - silent)
            self._watch = loop.call_later(max(0.05, due), self._look)


class _Server(asyncio.Protocol):
    """The way to one server, from its INIT on."""

    def __init__(self, gate: Gate, process: ServerProcess) -> None:
        self.process = process
        self._gate = gate
        self._reader = sftp.Reader()
        self._greeted = False
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = [struct.pack(">IBI", 5, sftp.INIT, sftp.VERSION)]
        self._closed = False
        loop = asyncio.get_running_loop()
        loop.add_reader(process.pidfd, self._on_exit)
        self._connecting = loop.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, sock=self.process.sock)

    def write(self, data: bytes) -> None:
        if self._transport is None:
            self._unsent.append(data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """End it."""
        if self._closed:
            return
        self._closed = True
        self.process.kill()
        if self._transport is not None:
            self._transport.abort()
        else:
            self._connecting.cancel()
            self.process.sock.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._closed:
            transport.abort()
            return
        self._transport = transport
        transport.set_write_buffer_limits(_BUFFER)
        transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        try:
            for packet in self._reader.feed(data):
                if not self._greeted:
                    if packet[0] != sftp.VERSION_REPLY:
                        raise ProtocolError("it does not begin with its version")
                    self._greeted = True
                else:
                    self._gate.on_answer(packet)
        except ProtocolError as error:
            self._end(f"it broke the protocol: {error}")
        else:
            self._gate.after_answers()

    def pause_writing(self) -> None:
        self._gate.choke(True)

    def resume_writing(self) -> None:
        self._gate.choke(False)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed:
            self._end(self.process.words() or "it was killed")

    def _end(self, why: str) -> None:
        self.close()
        self._gate.on_server_end(self, why)

    def _on_exit(self) -> None:
        pidfd, words = self.process.pidfd, self.process.words()
        with suppress(OSError):
            if self.process.reap():
                asyncio.get_running_loop().remove_reader(pidfd)
                if not self._closed:
                    self._end(words or "it was killed")


def _encode(place: Place) -> bytes:
    return b"/".join((sftp.ROOT, *place))


def _code(answer: memoryview) -> int:
    if answer[0] != sftp.STATUS or len(answer) < 9:
        return -1
    (code,) = _WORD.unpack_from(answer, 5)
    return int(code)


def _status_for(number: int, answer: memoryview) -> bytes:
    """The server's status, without its words: those are none of the guest's business."""
    code = _code(answer)
    if code < 0:
        raise ProtocolError("a status without a code")
    return sftp.status(number, code if code <= sftp.UNSUPPORTED else sftp.FAILURE)


def _seen(attributes: sftp.Attributes) -> sftp.Attributes:
    """What a guest is told of a file: not whose it is on the host."""
    return sftp.Attributes(
        attributes.size,
        (0, 0) if attributes.ids is not None else None,
        attributes.mode,
        attributes.times,
    )


_REQUESTS: dict[int, Callable[[Gate, int, sftp.Packet], None]] = {
    sftp.OPEN: Gate._open,
    sftp.CLOSE: Gate._close,
    sftp.READ: Gate._read,
    sftp.WRITE: Gate._write,
    sftp.LSTAT: Gate._lstat,
    sftp.FSTAT: Gate._fstat,
    sftp.SETSTAT: Gate._setstat,
    sftp.FSETSTAT: Gate._fsetstat,
    sftp.OPENDIR: Gate._opendir,
    sftp.READDIR: Gate._readdir,
    sftp.REMOVE: Gate._remove,
    sftp.MKDIR: Gate._mkdir,
    sftp.RMDIR: Gate._rmdir,
    sftp.REALPATH: Gate._realpath,
    sftp.STAT: Gate._stat,
    sftp.RENAME: Gate._rename,
    sftp.READLINK: Gate._readlink,
    sftp.SYMLINK: Gate._symlink,
    sftp.EXTENDED: Gate._extended,
}
