"""A hostile guest's end of the workspace: SFTP packets of any kind, and no sshfs in between."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import NamedTuple

from vmkernel.host.workspace import Share
from vmkernel.host.workspace_gate import Gate
from vmkernel.protocol import sftp


class Answer(NamedTuple):
    """One packet that came back."""

    kind: int
    number: int
    body: bytes

    @property
    def code(self) -> int:
        """Of a status; -1 for anything else."""
        return struct.unpack_from(">I", self.body)[0] if self.kind == sftp.STATUS else -1

    @property
    def text(self) -> bytes:
        """The first string: a handle, data."""
        (size,) = struct.unpack_from(">I", self.body)
        return self.body[4 : 4 + size]

    @property
    def mode(self) -> int:
        """Of attributes, as OpenSSH sends them."""
        packet = sftp.Packet(memoryview(b"\0" + self.body))
        return packet.attributes().mode or 0

    @property
    def names(self) -> list[bytes]:
        """Of a directory's entries, or a link's target."""
        packet = sftp.Packet(memoryview(b"\0" + self.body))
        found = []
        for _ in range(packet.number()):
            found.append(bytes(packet.string()))
            packet.string()
            packet.attributes()
        return found


class Guest:
    """``async with Guest(share) as guest:`` a gate, and who speaks to it."""

    def __init__(self, share: Share) -> None:
        self.told: list[str] = []
        self.gate = Gate(share, self.told.append)
        self._number = 0
        self._answers: dict[int, asyncio.Future[Answer]] = {}

    async def __aenter__(self) -> Guest:
        ours, theirs = socket.socketpair()
        await self.gate.attach(theirs)
        self.reader, self.writer = await asyncio.open_connection(sock=ours)
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        self.writer.close()
        self.gate.close()

    async def _read(self) -> None:
        try:
            while True:
                (size,) = struct.unpack(">I", await self.reader.readexactly(4))
                data = await self.reader.readexactly(size)
                kind, number = struct.unpack_from(">BI", data)
                answer = Answer(kind, number, data[5:])
                if number in self._answers and not self._answers[number].done():
                    self._answers[number].set_result(answer)
        except (OSError, asyncio.IncompleteReadError):
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(ConnectionResetError("the gate hung up"))

    def send(self, kind: int, *parts: bytes) -> asyncio.Future[Answer]:
        """A request; its answer comes later."""
        self._number += 1
        self.writer.write(sftp.packet(kind, self._number, *parts))
        future = self._answers[self._number] = asyncio.get_running_loop().create_future()
        return future

    async def ask(self, kind: int, *parts: bytes) -> Answer:
        """A request and its answer."""
        async with asyncio.timeout(30):
            return await self.send(kind, *parts)

    async def open(self, path: bytes, flags: int, mode: int | None = None) -> Answer:
        return await self.ask(sftp.OPEN, s(path), word(flags), sftp.Attributes(mode=mode).encode())

    async def read(self, path: bytes, flags: int = sftp.PFLAG_READ) -> bytes | int:
        """What is in a file, or the code of the refusal."""
        opened = await self.open(path, flags)
        if opened.kind != sftp.HANDLE:
            return opened.code
        answer = await self.ask(sftp.READ, s(opened.text), struct.pack(">QI", 0, 4096))
        await self.ask(sftp.CLOSE, s(opened.text))
        return answer.text if answer.kind == sftp.DATA else answer.code

    async def write(self, path: bytes, data: bytes, flags: int = 0) -> int:
        """Make a file, and write to it; the code."""
        flags = flags or sftp.PFLAG_WRITE | sftp.PFLAG_CREATE | sftp.PFLAG_TRUNCATE
        opened = await self.open(path, flags, 0o644)
        if opened.kind != sftp.HANDLE:
            return opened.code
        answer = await self.ask(sftp.WRITE, s(opened.text), struct.pack(">Q", 0), s(data))
        await self.ask(sftp.CLOSE, s(opened.text))
        return answer.code

    async def list(self, path: bytes) -> set[bytes] | int:
        """A directory's names, or the code of the refusal."""
        opened = await self.ask(sftp.OPENDIR, s(path))
        if opened.kind != sftp.HANDLE:
            return opened.code
        names: set[bytes] = set()
        while (answer := await self.ask(sftp.READDIR, s(opened.text))).kind == sftp.NAME:
            names.update(answer.names)
        await self.ask(sftp.CLOSE, s(opened.text))
        return names - {b".", b".."}

    async def extended(self, name: bytes, *parts: bytes) -> Answer:
        return await self.ask(sftp.EXTENDED, s(name), *parts)


def s(value: bytes) -> bytes:
    """A string as it travels."""
    return sftp.string(value)


def word(value: int) -> bytes:
    """A uint32."""
    return struct.pack(">I", value)


def attributes(**values: int) -> bytes:
    """Attributes as they travel: ``mode=``, ``size=``, ``uid=``."""
    uid = values.pop("uid", None)
    return sftp.Attributes(ids=None if uid is None else (uid, uid), **values).encode()
