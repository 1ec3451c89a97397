"""Reading a file of the workspace, also across the end of a server.

A read that fails is the end of the file to the guest's sshfs: its `wait_chunk` forgets the error of
the first piece (libfuse/sshfs issue 224), so a cell would take half a file for the whole.  So a
read whose server ended is asked of the next one, of the same file, opened again; and where that
cannot be, or the disk fails, the cell is told.

Where it stands: under `host.workspace_requests`.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import msgspec

from vmkernel.errors import ProtocolError
from vmkernel.host.workspace import Place
from vmkernel.host.workspace_policy import Policy, RefusedError
from vmkernel.protocol import sftp

MOST_READ = 128 << 10
"""Bytes that one request may read: an answer may come short."""
TRIES = 2
"""Servers that are asked, one after another, to go on with a file."""

_WORD = struct.Struct(">I")
NOTHING = sftp.Attributes().encode()


class Link(Protocol):
    """What the requests need of the gate."""

    root: sftp.Attributes
    """The workspace's own, as they were"""
    looking: bool
    """Whether a file is looked at before it is opened: what comes next must not overtake it"""

    @property
    def has_server(self) -> bool:
        """Whether one runs."""

    def reply(self, answer: bytes) -> None:
        """To the guest."""

    def send(
        self,
        number: int,
        kind: int,
        expected: tuple[int, ...],
        then: Callable[[memoryview], bytes | None],
        *parts: bytes,
        again: Callable[[], None] | None = None,
    ) -> None:
        """To the server; ``then`` makes of its answer, of an ``expected`` kind, the guest's.

        Where that is None, another request has taken its place.  ``again`` is called in place of a
        failure when the server ends before it has answered.  Raises RefusedError.
        """


class Handle(msgspec.Struct):
    """A file or directory that the guest has open."""

    server: bytes
    """The server's; "" when it went with a server, and is to be opened again."""
    kind: int
    """What the request was that opened it: OPEN or OPENDIR."""
    writable: bool
    place: Place
    limit: int
    """How long the file may become."""
    generation: int = 0
    looks: tuple[object, ...] = ()
    """How a file looked that is open for reading"""
    held: list[tuple[int, Callable[[], None]]] | None = None
    """What waits while it is opened again, with the guest's numbers"""


class Reads:
    """What is read for one guest."""

    def __init__(self, policy: Policy, link: Link) -> None:
        self._policy = policy
        self._link = link

    def read(self, number: int, handle: Handle, offset: int, size: int) -> None:
        """Serve one request.  Raises RefusedError."""

        def again() -> None:
            self.read(number, handle, offset, size)

        if handle.held is not None:
            handle.held.append((number, again))
            return
        if not handle.server:
            handle.held = [(number, again)]
            self._reopen(number, handle, TRIES)
            return

        def read(answer: memoryview) -> bytes:
            if answer[0] == sftp.STATUS:
                if code_of(answer) != sftp.END_OF_FILE:
                    self._tell(handle)
                return status_for(number, answer)
            fields = sftp.Packet(answer)
            fields.number()
            data = fields.string()
            fields.end()
            if len(data) > size:
                raise ProtocolError("more than was asked for")
            return sftp.packet(sftp.DATA, number, sftp.string(data))

        self._link.send(
            number, sftp.READ, (sftp.DATA, sftp.STATUS), read,
            sftp.string(handle.server), struct.pack(">QI", offset, size),
            again=again,
        )  # fmt: skip

    def _reopen(self, number: int, handle: Handle, tries: int) -> None:
        """Open the same file at a new server, then do what was held; ``number`` is the first's.

        Raises RefusedError, the answer to that one.
        """
        target = sftp.string(encode(handle.place))

        def again() -> None:
            self._reopen(number, handle, tries - 1)

        def opened(answer: memoryview) -> None:
            if answer[0] != sftp.HANDLE:
                raise RefusedError(sftp.BROKEN)
            fields = sftp.Packet(answer)
            fields.number()
            handle.server = bytes(fields.string())
            fields.end()
            held, handle.held = handle.held or [], None
            for waiting, request in held:
                try:
                    request()
                except RefusedError as refusal:
                    self._link.reply(sftp.status(waiting, refusal.code))

        def looked(answer: memoryview) -> None:
            there = sftp.Attributes()
            if answer[0] == sftp.ATTRS:
                fields = sftp.Packet(answer)
                fields.number()
                there = fields.attributes()
            # Another file by now, or another content: halves of two are worse than none
            if not stat.S_ISREG(there.mode or 0) or appearance(there) != handle.looks:
                raise RefusedError(sftp.BROKEN)
            ask(sftp.OPEN, sftp.HANDLE, opened, _WORD.pack(sftp.PFLAG_READ), NOTHING)

        def ask(kind: int, answer: int, then: Callable[[memoryview], None], *more: bytes) -> None:
            def carefully(answer: memoryview) -> None:
                with giving_up():
                    then(answer)

            kinds = (answer, sftp.STATUS)
            self._link.send(number, kind, kinds, carefully, target, *more, again=again)

        @contextmanager
        def giving_up() -> Iterator[None]:
            try:
                yield
            except (RefusedError, ProtocolError):  # the answer to the first
                self._give_up(number, handle)
                raise

        with giving_up():
            if not handle.looks or not tries:  # what was being written is not known
                raise RefusedError(sftp.BROKEN)
            ask(sftp.LSTAT, sftp.ATTRS, looked)

    def _give_up(self, number: int, handle: Handle) -> None:
        """Nobody will read it on: answer all that waits but the first."""
        held, handle.held, handle.looks = handle.held or [], None, ()
        for waiting, _ in held:
            if waiting != number:
                self._link.reply(sftp.status(waiting, sftp.BROKEN))
        self._tell(handle)

    def _tell(self, handle: Handle) -> None:
        name = handle.place[-1].decode(errors="replace")
        self._policy.news(
            f"reading {name!r} in the workspace failed: what was read of it may end too soon"
        )


def appearance(attributes: sftp.Attributes) -> tuple[object, ...]:
    """What tells a file from what it was."""
    return (attributes.size, attributes.mode, attributes.times and attributes.times[1])


def encode(place: Place) -> bytes:
    """The path, as the server has it."""
    return b"/".join((sftp.ROOT, *place))


def code_of(answer: memoryview) -> int:
    """A status' code; -1: it is none."""
    if answer[0] != sftp.STATUS or len(answer) < 9:
        return -1
    (code,) = _WORD.unpack_from(answer, 5)
    return int(code)


def status_for(number: int, answer: memoryview) -> bytes:
    """The server's status, without its words: those are none of the guest's business."""
    code = code_of(answer)
    if code < 0:
        raise ProtocolError("a status without a code")
    return sftp.status(number, code if code <= sftp.UNSUPPORTED else sftp.FAILURE)
