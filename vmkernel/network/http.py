"""HTTP/1.1 messages over byte streams, by h11: no I/O of its own, and strict.

h11 is the parser of httpcore and uvicorn: small, typed, without dependencies, and made for those
who bring their own I/O, as the guest's end is a stream of the multiplexer's.  It refuses what
request smuggling lives on: bare line feeds in headers, spaces before colons, two lengths, unknown
codings. Whole proxies were looked at: proxy.py brings threads, plug-ins and 15 MiB, mitmproxy a
certificate authority, and both would still need the policy, the multiplexer and the package gateway
that are here.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable

import h11

MOST_HEADER = 32 << 10
"""Bytes of a request's or response's head."""
HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
     b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip
"""Headers that are meant for the next machine only (RFC 9110, 7.6.1)."""

Headers = list[tuple[bytes, bytes]]
Send = Callable[[bytes], Awaitable[object]]
Receive = Callable[[], Awaitable[bytes | bytearray]]


class BrokenError(Exception):
    """The peer does not speak HTTP, or hung up in the middle; the text says what was wrong."""


class Link:
    """One HTTP/1.1 connection, either role."""

    def __init__(self, role: type[h11.SERVER] | type[h11.CLIENT], receive: Receive, send: Send):
        self.h11 = h11.Connection(role, max_incomplete_event_size=MOST_HEADER)
        self.head = False
        """Whether the guest wants no body (a HEAD request)"""
        self._receive = receive
        self._send = send

    async def next(self) -> h11.Event | type[h11.PAUSED]:
        """What came next.  Raises BrokenError."""
        try:
            while True:
                event = self.h11.next_event()
                if event is not h11.NEED_DATA:
                    return event  # type: ignore[return-value]
                if self.h11.they_are_waiting_for_100_continue:
                    await self.send(h11.InformationalResponse(status_code=100, headers=[]))
                self.h11.receive_data(bytes(await self._receive()))
        except h11.RemoteProtocolError as error:
            raise BrokenError(str(error)) from None
        except OSError as error:
            raise BrokenError(error.strerror or str(error)) from None

    async def send(self, event: h11.Event) -> None:
        """Send one.  Raises BrokenError."""
        if self.head and isinstance(event, h11.Data):
            return
        try:
            data = self.h11.send(event)
            if data:
                await self._send(data)
        except h11.LocalProtocolError as error:
            raise BrokenError(str(error)) from None
        except OSError as error:
            raise BrokenError(error.strerror or str(error)) from None


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers that go on to the other side."""
    headers = list(headers)
    named = {
        word.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for word in value.split(b",")
    }
    return [
        (name, value)
        for name, value in headers
        if name.lower() not in HOP_BY_HOP and name.lower() not in named
    ]


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The value of the header of this name (in lower case), b"" without one."""
    return next((value for key, value in headers if key.lower() == name), b"")


def reason_of(text: str) -> bytes:
    """Words as a response's reason phrase: clients show that, if anything."""
    return re.sub(rb"[^\x20-\x7e]", b"?", text.encode("ascii", "replace")[:300])
