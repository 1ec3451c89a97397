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
  connection.  A file that was being read is opened again at the next server
  (`host.workspace_reads`); another handle of a server that is gone is an I/O error.

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
from vmkernel.host.workspace import Share
from vmkernel.host.workspace_policy import Policy, RefusedError
from vmkernel.host.workspace_requests import Requests
from vmkernel.host.workspace_server import OPEN_FILES, ServerProcess
from vmkernel.protocol import sftp

log = logging.getLogger("vmkernel")

MOST_PENDING = 64
"""Requests that are with the server; then the guest is not read."""
MOST_HANDLES = OPEN_FILES - 16
PATIENCE = 15.0
"""Seconds without any answer after which a server is replaced."""
IDLE = 60.0
"""Seconds after which a server that nobody uses is ended."""
MOST_FAILURES = 3
"""Servers that end before their first word, one after another; then there is a pause."""
PAUSE = 10.0
MOST_STARTS = 5
"""Servers started in `PAUSE` seconds."""
AT_ONCE = 32
"""Packets of a guest's that are served in a row."""
_NEWS_EVERY = 30.0
_BUFFER = 1 << 20


class _Pending(msgspec.Struct):
    number: int
    """The guest's."""
    expected: tuple[int, ...]
    then: Callable[[memoryview], bytes | None]
    """What the answer becomes for the guest; None: another request has taken its place."""
    again: Callable[[], None] | None = None
    """What is to be done when the server ends before it has answered; None: it failed."""


class Gate(asyncio.Protocol):
    """One guest's way to one directory.  ``tell`` says a line in the cell that runs."""

    def __init__(self, share: Share, tell: Callable[[str], None] = lambda text: None) -> None:
        """Raises OSError when the directory cannot be opened."""
        self.share = share
        self._policy = Policy(share, self._news)
        self.statistics = self._policy.statistics
        self._requests = Requests(self._policy, self)
        self.problem = ""
        """Why the server did not start, the last time"""
        self._tell = tell
        self._told_at: dict[str, float] = {}
        # It is followed when it is renamed, and there is no other in its place
        self._directory = os.open(share.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        found = os.fstat(self._directory)
        self.root = sftp.Attributes(
            found.st_size,
            (0, 0),
            found.st_mode & (stat.S_IFMT(found.st_mode) | 0o777),
            (int(found.st_atime) & 0xFFFFFFFF, int(found.st_mtime) & 0xFFFFFFFF),
        )
        self._guest: asyncio.Transport | None = None
        self._reader = sftp.Reader()
        self._waiting: deque[memoryview] = deque()
        self._more: asyncio.Handle | None = None
        self._guest_choked = False
        self._server: _Server | None = None
        self._server_choked = False
        self._pending: dict[int, _Pending] = {}
        self._next = 0
        self.looking = False
        """Whether a file is looked at before it is opened: what comes next must not overtake it"""
        self._watch: asyncio.TimerHandle | None = None
        self._last = 0.0
        self._failures = 0
        self._not_before = 0.0
        self._starts: deque[float] = deque()
        self._closed = False

    def __repr__(self) -> str:
        state = "server" if self._server is not None else "no server"
        return (
            f"<Gate {self.share.path} {'rw' if self.share.writable else 'ro'} {state} "
            f"pending={len(self._pending)} handles={self._requests.handles}>"
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
            self._break(error)
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
        """Serve what waits, as far as there is room; not all in one turn of the event loop."""
        for _ in range(AT_ONCE):
            if not self._waiting or self._full:
                break
            self._receive(self._waiting.popleft())
        else:
            if self._more is None:
                self._more = asyncio.get_running_loop().call_soon(self._go_on)
        self._regulate()

    def _go_on(self) -> None:
        self._more = None
        self._work()

    def _break(self, error: ProtocolError) -> None:
        """No word of it can be trusted any more; the kernel goes on without its workspace."""
        self.statistics.malformed += 1
        log.warning("the guest of the workspace %s broke the protocol: %s", self.share.path, error)
        self._waiting.clear()
        if self._guest is not None:
            self._guest.abort()
        self._drop_server()

    @property
    def _full(self) -> bool:
        return (
            len(self._pending) >= MOST_PENDING
            or self.looking
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

    def reply(self, answer: bytes) -> None:
        """To the guest."""
        if self._guest is not None and not self._guest.is_closing():
            self._guest.write(answer)

    def _receive(self, data: memoryview) -> None:
        kind, packet = data[0], sftp.Packet(data)
        number = packet.number()
        self.statistics.requests += 1
        if kind == sftp.INIT:  # sshfs says it once, while its template is made
            self._break(ProtocolError("it begins anew"))
            return
        try:
            self._requests.serve(kind, number, packet)
        except RefusedError as refusal:
            self.statistics.refused += 1
            self.reply(sftp.status(number, refusal.code, str(refusal).encode()))
        except ProtocolError:
            self.statistics.malformed += 1
            self.reply(sftp.status(number, sftp.BAD_MESSAGE))

    @property
    def has_server(self) -> bool:
        """Whether one runs."""
        return self._server is not None

    def _news(self, text: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told_at.get(text, -_NEWS_EVERY) >= _NEWS_EVERY:
            self._told_at[text] = now
            self._tell(f"vmkernel: {text}\n")

    # --- the server's side ---

    def send(
        self,
        number: int,
        kind: int,
        expected: tuple[int, ...],
        then: Callable[[memoryview], bytes | None],
        *parts: bytes,
        again: Callable[[], None] | None = None,
    ) -> None:
        """Pass a request on, as `host.workspace_requests` wants it.

        Raises RefusedError when there is no server to be had.
        """
        if kind in (sftp.OPEN, sftp.OPENDIR):
            opening = sum(sftp.HANDLE in other.expected for other in self._pending.values())
            if self._requests.handles + opening >= MOST_HANDLES:
                raise RefusedError(sftp.FAILURE, "too many open files")
        server = self._need_server()
        loop = asyncio.get_running_loop()
        if not self._pending:
            self._last = loop.time()
        self._next = (self._next + 1) & 0xFFFFFFFF
        self._pending[self._next] = _Pending(number, expected, then, again)
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
        except RefusedError as refusal:  # in the second step of a request
            answer = sftp.status(pending.number, refusal.code, str(refusal).encode())
        except ProtocolError:
            self.reply(sftp.status(pending.number, sftp.BROKEN))
            raise
        if answer is not None:
            self.reply(answer)

    def after_answers(self) -> None:
        """There may be room for more requests."""
        self._work()

    def _need_server(self) -> _Server:
        if self._server is None:
            loop = asyncio.get_running_loop()
            now = loop.time()
            while self._starts and now - self._starts[0] > PAUSE:
                self._starts.popleft()
            if now < self._not_before or len(self._starts) >= MOST_STARTS:
                raise RefusedError(sftp.BROKEN, self.problem)
            self._starts.append(now)
            try:
                process = ServerProcess(self._path_now(), writable=self.share.writable)
            except OSError as error:
                self.on_server_end(None, f"it could not be started: {error}")
                raise RefusedError(sftp.BROKEN, "no server") from error
            self.statistics.servers += 1
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
        self._server_choked = self.looking = False
        self._requests.forget()
        pending, self._pending = self._pending, {}
        lost = [request for request in pending.values() if request.again is None]
        for request in lost:
            self.reply(sftp.status(request.number, sftp.BROKEN))
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
        for request in pending.values():
            if request.again is not None:
                try:
                    request.again()
                except RefusedError as refusal:
                    self.reply(sftp.status(request.number, refusal.code))
        self._work()

    def _drop_server(self) -> None:
        server, self._server = self._server, None
        self._pending.clear()
        self._requests.forget()
        self._server_choked = self.looking = False
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
        elif not self._pending and not self._requests.handles and silent >= IDLE:
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
