"""What a template's guest is answered when it mounts the workspace that its clones will have.

sshfs asks who it speaks with and whether the directory is there.  Nothing else is served: a
template has no workspace, but one that is mounted (`guest.workspace`).
"""

from __future__ import annotations

import asyncio
import socket
import stat

from vmkernel.errors import ProtocolError
from vmkernel.protocol import sftp


class _Answers(asyncio.Protocol):
    def __init__(self) -> None:
        self._reader = sftp.Reader()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for request in self._reader.feed(data):
                self._transport.write(answer(request))
        except ProtocolError:
            self._transport.abort()  # the guest's agent will say that there is no workspace


def answer(request: memoryview) -> bytes:
    """The answer to one packet of a template's sshfs.  Raises ProtocolError."""
    kind, number = request[0], sftp.Packet(request).number()
    if kind == sftp.INIT:
        return sftp.hello()
    if kind in (sftp.LSTAT, sftp.STAT):
        found = sftp.Attributes(4096, (0, 0), stat.S_IFDIR | 0o755, (0, 0))
        return sftp.packet(sftp.ATTRS, number, found.encode())
    return sftp.status(number, sftp.FAILURE)


async def answer_mount(sock: socket.socket) -> asyncio.BaseTransport:
    """Answer on this socket until the transport is closed, which has to be before the socket is."""
    transport, _ = await asyncio.get_running_loop().create_connection(_Answers, sock=sock)
    return transport
