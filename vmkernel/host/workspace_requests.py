"""What a guest asks of its workspace, request by request: judged, and put anew for the server.

Where it stands: `host.workspace_gate` cuts the guest's stream into packets and has the server;
here each packet is taken apart, `host.workspace_policy` is asked, and what goes on to the server,
and what comes back of its answer, is made anew.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable

from vmkernel.errors import ProtocolError
from vmkernel.host.workspace import Place
from vmkernel.host.workspace_policy import Policy, RefusedError
from vmkernel.host.workspace_reads import (
    MOST_READ,
    Handle,
    Link,
    Reads,
    appearance,
    code_of,
    encode,
    status_for,
)
from vmkernel.protocol import sftp

_WORD = struct.Struct(">I")
_HANDLE = struct.Struct(">II")


class Requests:
    """One guest's requests, and its handles."""

    def __init__(self, policy: Policy, link: Link) -> None:
        self._policy = policy
        self._link = link
        self._generation = 0
        self._handles: dict[int, Handle] = {}
        self._next_handle = 0
        self._reads = Reads(policy, link)

    @property
    def handles(self) -> int:
        """How many are open."""
        return len(self._handles)

    def serve(self, kind: int, number: int, packet: sftp.Packet) -> None:
        """One request.  Raises RefusedError, ProtocolError."""
        handler = _REQUESTS.get(kind)
        if handler is None:
            raise RefusedError(sftp.UNSUPPORTED)
        handler(self, number, packet)

    def forget(self) -> None:
        """The server is gone, and its handles with it; what was read can be opened again."""
        for key, handle in [*self._handles.items()]:
            handle.server = b""
            if handle.kind != sftp.OPEN:
                del self._handles[key]
        self._generation = (self._generation + 1) & 0xFFFFFFFF

    def _write_at(self, number: int, places: tuple[Place, ...], write: Callable[[], None]) -> None:
        """Have something written at these places, unless one of them lies in a repository.

        Git obeys what stands beside a HEAD: ``config``, ``hooks``, ``commondir``.  No guest makes
        one, but it may be there.  The server is asked, and nothing overtakes the question: what is
        looked at here could be moved by a request that is on its way.  Raises RefusedError.
        """
        for place in places:
            self._policy.may_write(place)
        above = {place[:depth] for place in places for depth in range(len(place))}
        heads = [sftp.string(encode((*directory, b"HEAD"))) for directory in sorted(above)]

        def ask() -> None:
            expected = (sftp.ATTRS, sftp.STATUS)
            self._link.send(number, sftp.LSTAT, expected, looked, heads.pop())
            self._link.looking = True

        def looked(answer: memoryview) -> bytes | None:
            self._link.looking = False
            if answer[0] == sftp.ATTRS:
                self._policy.refuse_repository()
            if code_of(answer) != sftp.NO_SUCH_FILE:
                return status_for(number, answer)
            if heads:
                ask()
            else:
                write()
            return None

        ask()

    def _open(self, number: int, packet: sftp.Packet) -> None:
        place = self._policy.path(packet)
        flags, attributes = packet.number(), packet.attributes()
        packet.end()
        writes = flags & ~sftp.PFLAG_READ
        if flags & ~0x3F or not flags & (sftp.PFLAG_READ | sftp.PFLAG_WRITE):
            raise ProtocolError("flags that mean nothing")
        mode = self._policy.mode(attributes)
        given = sftp.Attributes(mode=mode) if flags & sftp.PFLAG_CREATE else sftp.Attributes()
        target = encode(place)
        size = 0
        looks: tuple[object, ...] = ()

        def opened(answer: memoryview) -> bytes | None:
            if answer[0] != sftp.HANDLE:
                return status_for(number, answer)
            limit = size + self._policy.share.size
            return self._new_handle(number, answer, sftp.OPEN, bool(writes), place, limit, looks)

        def looked(answer: memoryview) -> bytes | None:
            nonlocal size, looks
            self._link.looking = False
            if answer[0] == sftp.ATTRS:
                fields = sftp.Packet(answer)
                fields.number()
                there = fields.attributes()
                found, size = there.mode or 0, there.size or 0
                looks = () if writes else appearance(there)
                if not stat.S_ISREG(found):
                    code = sftp.FAILURE if stat.S_ISDIR(found) else sftp.PERMISSION_DENIED
                    return sftp.status(number, code)
            elif not (code_of(answer) == sftp.NO_SUCH_FILE and flags & sftp.PFLAG_CREATE):
                return status_for(number, answer)
            elif not self._policy.room_for_file():
                return sftp.status(number, sftp.BROKEN)
            else:
                self._policy.statistics.files += 1
            self._link.send(
                number, sftp.OPEN, (sftp.HANDLE, sftp.STATUS), opened,
                sftp.string(target), _WORD.pack(flags), given.encode(),
            )  # fmt: skip
            return None

        def look() -> None:
            expected = (sftp.ATTRS, sftp.STATUS)
            self._link.send(number, sftp.LSTAT, expected, looked, sftp.string(target))
            self._link.looking = True

        if writes:
            self._write_at(number, (place,), look)
        else:
            look()

    def _close(self, number: int, packet: sftp.Packet) -> None:
        key, handle = self._handle(packet)
        packet.end()
        del self._handles[key]
        if handle.server:
            self._send_status(number, sftp.CLOSE, sftp.string(handle.server))
        else:
            self._link.reply(sftp.status(number, sftp.OK))

    def _read(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet, sftp.OPEN)
        offset, size = packet.long(), min(packet.number(), MOST_READ)
        packet.end()
        self._reads.read(number, handle, offset, size)

    def _write(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet, sftp.OPEN)
        offset, data = packet.long(), packet.string()
        packet.end()
        if not handle.writable:
            raise RefusedError(sftp.PERMISSION_DENIED)
        self._policy.count_bytes(offset + len(data), len(data), handle.limit)
        self._send_status(
            number, sftp.WRITE, sftp.string(handle.server), struct.pack(">Q", offset),
            sftp.string(data),
        )  # fmt: skip

    def _lstat(self, number: int, packet: sftp.Packet, kind: int = sftp.LSTAT) -> None:
        place = self._policy.path(packet)
        packet.end()
        if not place and not self._link.has_server:  # to enter a directory is not to use it
            self._link.reply(sftp.packet(sftp.ATTRS, number, self._link.root.encode()))
            return
        self._send_attributes(number, kind, sftp.string(encode(place)))

    def _stat(self, number: int, packet: sftp.Packet) -> None:
        self._lstat(number, packet, sftp.STAT)

    def _fstat(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet)
        packet.end()
        if not handle.server:
            self._send_attributes(number, sftp.LSTAT, sftp.string(encode(handle.place)))
            return
        self._send_attributes(number, sftp.FSTAT, sftp.string(handle.server))

    def _setstat(self, number: int, packet: sftp.Packet) -> None:
        place = self._policy.path(packet)
        attributes = packet.attributes()
        packet.end()

        def change() -> None:
            changes = self._policy.changes(attributes, self._policy.share.size)
            self._send_status(number, sftp.SETSTAT, sftp.string(encode(place)), changes)

        self._write_at(number, (place,), change)

    def _fsetstat(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet, sftp.OPEN)
        attributes = packet.attributes()
        packet.end()

        def change() -> None:
            changes = self._policy.changes(attributes, handle.limit)
            self._send_status(number, sftp.FSETSTAT, sftp.string(handle.server), changes)

        self._write_at(number, (handle.place,), change)

    def _opendir(self, number: int, packet: sftp.Packet) -> None:
        place = self._policy.path(packet)
        packet.end()

        def opened(answer: memoryview) -> bytes:
            if answer[0] != sftp.HANDLE:
                return status_for(number, answer)
            return self._new_handle(number, answer, sftp.OPENDIR, False, place)

        self._link.send(
            number, sftp.OPENDIR, (sftp.HANDLE, sftp.STATUS), opened, sftp.string(encode(place))
        )

    def _readdir(self, number: int, packet: sftp.Packet) -> None:
        _, handle = self._handle(packet, sftp.OPENDIR)
        packet.end()

        def read(answer: memoryview) -> bytes | None:
            if answer[0] == sftp.STATUS:
                return status_for(number, answer)
            fields = sftp.Packet(answer)
            fields.number()
            entries = []
            for _ in range(fields.number()):
                name, _, attributes = bytes(fields.string()), fields.string(), fields.attributes()
                if b"/" in name or b"\0" in name or not name:
                    raise ProtocolError("a name that is none")
                if name in (b".", b"..") or not self._policy.is_hidden_place((*handle.place, name)):
                    entries += [sftp.string(name), sftp.string(b""), _seen(attributes).encode()]
            fields.end()
            if not entries:  # nothing of this part is to be seen: the next
                self._link.send(
                    number, sftp.READDIR, (sftp.NAME, sftp.STATUS), read,
                    sftp.string(handle.server),
                )  # fmt: skip
                return None
            return sftp.packet(sftp.NAME, number, _WORD.pack(len(entries) // 3), *entries)

        self._link.send(
            number, sftp.READDIR, (sftp.NAME, sftp.STATUS), read, sftp.string(handle.server)
        )

    def _remove(self, number: int, packet: sftp.Packet, kind: int = sftp.REMOVE) -> None:
        place = self._policy.path(packet)
        packet.end()

        def removed(answer: memoryview) -> bytes:
            if code_of(answer) == sftp.OK:
                self._policy.made_nothing()
            return status_for(number, answer)

        def remove() -> None:
            self._link.send(number, kind, (sftp.STATUS,), removed, sftp.string(encode(place)))

        self._write_at(number, (place,), remove)

    def _rmdir(self, number: int, packet: sftp.Packet) -> None:
        self._remove(number, packet, sftp.RMDIR)

    def _mkdir(self, number: int, packet: sftp.Packet) -> None:
        place = self._policy.path(packet)
        attributes = packet.attributes()
        packet.end()
        given = sftp.Attributes(mode=self._policy.mode(attributes))

        def make() -> None:
            self._policy.count_file()
            self._send_new(number, sftp.MKDIR, sftp.string(encode(place)), given.encode())

        self._write_at(number, (place,), make)

    def _realpath(self, number: int, packet: sftp.Packet) -> None:
        path = bytes(packet.string())
        packet.end()
        place = () if path == b"." else self._policy.checked(path)
        words = (_WORD.pack(1), sftp.string(encode(place)), sftp.string(b""))
        self._link.reply(sftp.packet(sftp.NAME, number, *words, sftp.Attributes().encode()))

    def _rename(self, number: int, packet: sftp.Packet, extension: bytes = b"") -> None:
        old, new = self._policy.path(packet), self._policy.path(packet)
        packet.end()
        for place in (old, new):
            if any(hidden[: len(place)] == place for hidden in self._policy.share.hidden):
                raise RefusedError(sftp.PERMISSION_DENIED)
        names = (sftp.string(encode(old)), sftp.string(encode(new)))

        def rename() -> None:
            if extension:
                self._send_status(number, sftp.EXTENDED, sftp.string(extension), *names)
            else:
                self._send_status(number, sftp.RENAME, *names)

        self._write_at(number, (old, new), rename)

    def _readlink(self, number: int, packet: sftp.Packet) -> None:
        place = self._policy.path(packet)
        packet.end()

        def read(answer: memoryview) -> bytes:
            if answer[0] == sftp.STATUS:
                return status_for(number, answer)
            fields = sftp.Packet(answer)
            fields.number()
            if fields.number() != 1:
                raise ProtocolError("not one link's target")
            words = (_WORD.pack(1), sftp.string(fields.string()), sftp.string(b""))
            return sftp.packet(sftp.NAME, number, *words, sftp.Attributes().encode())

        self._link.send(
            number, sftp.READLINK, (sftp.NAME, sftp.STATUS), read, sftp.string(encode(place))
        )

    def _symlink(self, number: int, packet: sftp.Packet) -> None:
        target, place = bytes(packet.string()), self._policy.path(packet)  # OpenSSH's order
        packet.end()
        self._policy.check_target(target)

        def make() -> None:
            self._policy.count_file()
            self._send_new(number, sftp.SYMLINK, sftp.string(target), sftp.string(encode(place)))

        self._write_at(number, (place,), make)

    def _extended(self, number: int, packet: sftp.Packet) -> None:
        name = bytes(packet.string())
        if name == sftp.POSIX_RENAME:
            self._rename(number, packet, name)
        elif name == sftp.HARDLINK:
            old, new = self._policy.path(packet), self._policy.path(packet)
            packet.end()
            names = (sftp.string(encode(old)), sftp.string(encode(new)))

            def make() -> None:
                self._policy.count_file()
                self._send_new(number, sftp.EXTENDED, sftp.string(name), *names)

            self._write_at(number, (old, new), make)
        elif name == sftp.STATVFS:
            place = self._policy.path(packet)
            packet.end()
            self._send_raw(number, sftp.string(name), sftp.string(encode(place)))
        elif name == sftp.FSTATVFS:
            _, handle = self._handle(packet)
            packet.end()
            self._send_raw(number, sftp.string(name), sftp.string(handle.server))
        elif name == sftp.FSYNC:
            _, handle = self._handle(packet, sftp.OPEN)
            packet.end()
            self._send_status(number, sftp.EXTENDED, sftp.string(name), sftp.string(handle.server))
        else:
            raise RefusedError(sftp.UNSUPPORTED)

    def _handle(self, packet: sftp.Packet, kind: int = 0) -> tuple[int, Handle]:
        given = packet.string()
        if len(given) != _HANDLE.size:
            raise RefusedError(sftp.BROKEN, "no such handle")
        generation, key = _HANDLE.unpack(given)
        handle = self._handles.get(key)
        if handle is None or generation != handle.generation:
            raise RefusedError(sftp.BROKEN, "no such handle")
        if kind and handle.kind != kind:
            raise RefusedError(sftp.BROKEN, "a handle of another kind")
        return key, handle

    def _new_handle(
        self,
        number: int,
        answer: memoryview,
        kind: int,
        writable: bool,
        place: Place,
        limit: int = 0,
        looks: tuple[object, ...] = (),
    ) -> bytes:
        fields = sftp.Packet(answer)
        fields.number()
        value = bytes(fields.string())
        fields.end()
        self._next_handle = (self._next_handle + 1) & 0xFFFFFFFF
        key = self._next_handle
        made = Handle(value, kind, writable, place, limit, self._generation, looks)
        self._handles[key] = made
        return sftp.packet(sftp.HANDLE, number, sftp.string(_HANDLE.pack(self._generation, key)))

    def _send_status(self, number: int, kind: int, *parts: bytes) -> None:
        def answered(answer: memoryview) -> bytes:
            return status_for(number, answer)

        self._link.send(number, kind, (sftp.STATUS,), answered, *parts)

    def _send_new(self, number: int, kind: int, *parts: bytes) -> None:
        """A request that makes something: it was counted, which is taken back where it failed."""

        def made(answer: memoryview) -> bytes:
            if code_of(answer) != sftp.OK:
                self._policy.made_nothing()
            return status_for(number, answer)

        self._link.send(number, kind, (sftp.STATUS,), made, *parts)

    def _send_attributes(self, number: int, kind: int, *parts: bytes) -> None:
        def answered(answer: memoryview) -> bytes:
            if answer[0] == sftp.STATUS:
                return status_for(number, answer)
            fields = sftp.Packet(answer)
            fields.number()
            attributes = fields.attributes()
            fields.end()
            return sftp.packet(sftp.ATTRS, number, _seen(attributes).encode())

        self._link.send(number, kind, (sftp.ATTRS, sftp.STATUS), answered, *parts)

    def _send_raw(self, number: int, *parts: bytes) -> None:
        """A question about the file system, whose answer has eleven numbers."""

        def answered(answer: memoryview) -> bytes:
            if answer[0] == sftp.STATUS:
                return status_for(number, answer)
            if len(answer) != 5 + 11 * 8:
                raise ProtocolError("not what a file system is like")
            return sftp.packet(sftp.EXTENDED_REPLY, number, answer[5:])

        self._link.send(number, sftp.EXTENDED, (sftp.EXTENDED_REPLY, sftp.STATUS), answered, *parts)


def _seen(attributes: sftp.Attributes) -> sftp.Attributes:
    """What a guest is told of a file: not whose it is on the host."""
    return sftp.Attributes(
        attributes.size,
        (0, 0) if attributes.ids is not None else None,
        attributes.mode,
        attributes.times,
    )


_REQUESTS: dict[int, Callable[[Requests, int, sftp.Packet], None]] = {
    sftp.OPEN: Requests._open,
    sftp.CLOSE: Requests._close,
    sftp.READ: Requests._read,
    sftp.WRITE: Requests._write,
    sftp.LSTAT: Requests._lstat,
    sftp.FSTAT: Requests._fstat,
    sftp.SETSTAT: Requests._setstat,
    sftp.FSETSTAT: Requests._fsetstat,
    sftp.OPENDIR: Requests._opendir,
    sftp.READDIR: Requests._readdir,
    sftp.REMOVE: Requests._remove,
    sftp.MKDIR: Requests._mkdir,
    sftp.RMDIR: Requests._rmdir,
    sftp.REALPATH: Requests._realpath,
    sftp.STAT: Requests._stat,
    sftp.RENAME: Requests._rename,
    sftp.READLINK: Requests._readlink,
    sftp.SYMLINK: Requests._symlink,
    sftp.EXTENDED: Requests._extended,
}
