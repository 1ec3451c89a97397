"""The SSH File Transfer Protocol, version 3, as far as a workspace speaks it.

draft-ietf-secsh-filexfer-02 (https://datatracker.ietf.org/doc/html/draft-ietf-secsh-filexfer-02)
and OpenSSH's PROTOCOL, section 4, for its extensions and for what it does in another way (the
arguments of SYMLINK).  The guest's end is sshfs, the host's `host.workspace_gate`, and, while a
template is made, `vm.mounting`.  Pure: bytes in, values out.
"""

from __future__ import annotations

import struct

from vmkernel.errors import ProtocolError

VERSION = 3
ROOT = b"/ws"
"""Where the workspace begins, in the paths that are sent."""

INIT, VERSION_REPLY = 1, 2
OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, SETSTAT, FSETSTAT = 3, 4, 5, 6, 7, 8, 9, 10
OPENDIR, READDIR, REMOVE, MKDIR, RMDIR, REALPATH, STAT = 11, 12, 13, 14, 15, 16, 17
RENAME, READLINK, SYMLINK = 18, 19, 20
STATUS, HANDLE, DATA, NAME, ATTRS = 101, 102, 103, 104, 105
EXTENDED, EXTENDED_REPLY = 200, 201

OK, END_OF_FILE, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE, BAD_MESSAGE = 0, 1, 2, 3, 4, 5
UNSUPPORTED = 8
BROKEN = 14
"""No number of version 3's: sshfs makes EIO of it."""

PFLAG_READ, PFLAG_WRITE, PFLAG_APPEND, PFLAG_CREATE, PFLAG_TRUNCATE, PFLAG_EXCLUSIVE = (
    1, 2, 4, 8, 16, 32,
)  # fmt: skip
ATTR_SIZE, ATTR_IDS, ATTR_PERMISSIONS, ATTR_TIMES = 1, 2, 4, 8
ATTR_KNOWN = 15

POSIX_RENAME = b"posix-rename@openssh.com"
STATVFS = b"statvfs@openssh.com"
FSTATVFS = b"fstatvfs@openssh.com"
HARDLINK = b"hardlink@openssh.com"
FSYNC = b"fsync@openssh.com"
LSETSTAT = b"lsetstat@openssh.com"
EXTENSIONS = ((POSIX_RENAME, b"1"), (STATVFS, b"2"), (HARDLINK, b"1"), (FSYNC, b"1"))
"""What a guest's sshfs is told of: all that it can use."""

MAX_PACKET = 256 << 10
"""Bytes of a packet after its length: no more has OpenSSH (SFTP_MAX_MSG_LENGTH)."""

_WORD = struct.Struct(">I")
_HEAD = struct.Struct(">IBI")


class Packet:
    """Reads the fields of one packet, behind its type.  Raises ProtocolError."""

    __slots__ = ("_at", "data")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self._at = 1

    def number(self) -> int:
        """A uint32."""
        end = self._at + 4
        if end > len(self.data):
            raise ProtocolError("an SFTP packet that is too short")
        (value,) = _WORD.unpack_from(self.data, self._at)
        self._at = end
        return int(value)

    def long(self) -> int:
        """A uint64."""
        return self.number() << 32 | self.number()

    def string(self) -> memoryview:
        """A string, not copied."""
        size = self.number()
        begin, end = self._at, self._at + size
        if end > len(self.data):
            raise ProtocolError("an SFTP packet that is too short")
        self._at = end
        return self.data[begin:end]

    def attributes(self) -> Attributes:
        """Attributes of a file.  None of an unknown kind."""
        attributes = Attributes()
        flags = self.number()
        if flags & ~ATTR_KNOWN:
            raise ProtocolError("attributes of an unknown kind")
        if flags & ATTR_SIZE:
            attributes.size = self.long()
        if flags & ATTR_IDS:
            attributes.ids = (self.number(), self.number())
        if flags & ATTR_PERMISSIONS:
            attributes.mode = self.number()
        if flags & ATTR_TIMES:
            attributes.times = (self.number(), self.number())
        return attributes

    def end(self) -> None:
        """Nothing may follow."""
        if self._at != len(self.data):
            raise ProtocolError("an SFTP packet that is too long")


class Attributes:
    """A file's attributes; None where they are not given."""

    __slots__ = ("ids", "mode", "size", "times")

    def __init__(
        self,
        size: int | None = None,
        ids: tuple[int, int] | None = None,
        mode: int | None = None,
        times: tuple[int, int] | None = None,
    ) -> None:
        self.size, self.ids, self.mode, self.times = size, ids, mode, times

    def encode(self) -> bytes:
        """As they travel."""
        flags, parts = 0, []
        if self.size is not None:
            flags |= ATTR_SIZE
            parts.append(struct.pack(">Q", self.size))
        if self.ids is not None:
            flags |= ATTR_IDS
            parts.append(struct.pack(">II", *self.ids))
        if self.mode is not None:
            flags |= ATTR_PERMISSIONS
            parts.append(_WORD.pack(self.mode))
        if self.times is not None:
            flags |= ATTR_TIMES
            parts.append(struct.pack(">II", *self.times))
        return _WORD.pack(flags) + b"".join(parts)


class Reader:
    """Cuts a stream into packets, of at most `MAX_PACKET`.  A stream that cannot be is an error."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[memoryview]:
        """The packets that are whole now, each from its type on.  Raises ProtocolError."""
        self._data += data
        packets = []
        at, available = 0, len(self._data)
        while available - at >= 4:
            (size,) = _WORD.unpack_from(self._data, at)
            if not 5 <= size <= MAX_PACKET:
                raise ProtocolError(f"an SFTP packet of {size} bytes")
            if available - at - 4 < size:
                break
            packets.append(memoryview(bytes(self._data[at + 4 : at + 4 + size])))
            at += 4 + size
        if at:
            del self._data[:at]
        return packets


def string(value: bytes | memoryview) -> bytes:
    """A string as it travels."""
    return _WORD.pack(len(value)) + value


def packet(kind: int, number: int, *parts: bytes | memoryview) -> bytes:
    """A whole packet with its length; ``number`` is its id, or the version."""
    return b"".join((_HEAD.pack(5 + sum(map(len, parts)), kind, number), *parts))


def status(number: int, code: int, text: bytes = b"") -> bytes:
    """The answer that has nothing but a code."""
    return packet(STATUS, number, _WORD.pack(code), string(text), string(b""))


def hello() -> bytes:
    """The answer to INIT."""
    words = [string(word) for extension in EXTENSIONS for word in extension]
    return packet(VERSION_REPLY, VERSION, *words)
