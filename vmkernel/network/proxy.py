"""The forward proxy that a guest speaks to: one request on each connection, judged, then done.

CONNECT makes a tunnel (TLS, and whatever else has a port on the list); a request with a whole URL
is sent on as plain HTTP; the name `policy.GATEWAY` is the package index.  After one request a
connection ends, so that there is no second one which could be smuggled behind the first or be for
another host. What goes to a server is written anew from what was understood: method, path, the host
that was judged, end-to-end headers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import h11

from vmkernel.network.clienthello import TlsCheck
from vmkernel.network.dial import Connection, Dialer, UnreachableError
from vmkernel.network.http import MOST_HEADER, BrokenError, Link, end_to_end, header, reason_of
from vmkernel.network.policy import GATEWAY, ClosedError, Host, Policy, RefusedError, parse_target
from vmkernel.protocol import mux

if TYPE_CHECKING:
    from vmkernel.network.packages import Gateway

MOST_HEADERS = 256
REQUEST_SECONDS = 60.0
"""Within which a request's head has to be there."""
IDLE_SECONDS = 900.0
"""After which a response, or a request's body, of which nothing moves is given up."""
TUNNEL_SECONDS = 4 * 3600.0
"""The same for a tunnel."""
_URL = re.compile(rb"(?i)http://([^/?#]*)(/[^#]*|\?[^#]*)?(?:#.*)?\Z")
_VISIBLE = re.compile(rb"[\x21-\x7e]+\Z")

Tell = Callable[[str, str, str], None]
"""tell(kind, where, why): the owner is to know of it; kind: see `wire.News`."""


class Answer(Exception):  # noqa: N818 - an answer that comes early, no error of ours
    """What the guest is answered instead of what it asked for."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Proxy:
    """Serves streams."""

    def __init__(self, policy: Policy, dialer: Dialer, gateway: Gateway, tell: Tell) -> None:
        self._policy = policy
        self._dialer = dialer
        self._gateway = gateway
        self._tell = tell
        self._tasks: set[asyncio.Task[None]] = set()

    def on_stream(self, stream: mux.Stream) -> None:
        """The guest opened one."""
        task = asyncio.get_running_loop().create_task(self._serve(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: stream.release())

    async def _serve(self, stream: mux.Stream) -> None:
        """Until the request is done or the guest gave it up."""
        work = asyncio.ensure_future(self._serve_request(stream))
        lost = asyncio.ensure_future(stream.lost())
        try:
            await asyncio.wait((work, lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            lost.cancel()
            for result in await asyncio.gather(work, lost, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, OSError | BrokenError):
                    self._tell("failed", "the proxy", repr(result))
            stream.reset()

    async def _serve_request(self, stream: mux.Stream) -> None:
        link = Link(h11.SERVER, stream.receive, stream.send)
        try:
            try:
                async with asyncio.timeout(REQUEST_SECONDS):
                    request = await link.next()
                if not isinstance(request, h11.Request):
                    return  # it hung up without a word
                await self._perform(request, link, stream)
            except TimeoutError:
                raise Answer(408, "no request came in time") from None
            except BrokenError as error:
                if link.h11.our_state is h11.SEND_RESPONSE:
                    raise Answer(400, f"this is no request to a proxy: {error}") from None
                if link.h11.our_state is not h11.IDLE:
                    raise
                raise Answer(400, f"this is no request to a proxy: {error}") from None
        except Answer as answer:
            await _answer(link, answer)
        stream.end()
        with suppress(OSError):  # what it still says is heard out: a reset would take its answer
            async with asyncio.timeout(5):
                while await stream.receive():
                    pass

    async def _perform(self, request: h11.Request, link: Link, stream: mux.Stream) -> None:
        if not _VISIBLE.match(request.target) or not _VISIBLE.match(request.method):
            raise Answer(400, "a request line that is none")
        if request.method == b"CONNECT":
            await self._tunnel(request, link, stream)
            return
        found = _URL.match(request.target)
        if found is None:
            raise Answer(400, "a proxy is asked for http://HOST/…, or by CONNECT")
        authority, path = found.group(1).decode(), found.group(2) or b"/"
        if not path.startswith(b"/"):
            path = b"/" + path
        headers = [(name, value) for name, value in request.headers.raw_items()]
        names = [name.lower() for name, _ in headers]
        if (
            len(headers) > MOST_HEADERS
            or sum(len(name) + len(value) for name, value in headers) > MOST_HEADER
        ):
            raise Answer(431, "too many headers")
        if b"transfer-encoding" in names and b"content-length" in names:
            raise Answer(400, "a body of two lengths (Content-Length and Transfer-Encoding)")
        try:
            host, port = parse_target(authority, 80)
        except RefusedError as error:
            raise self._refuse(authority, error) from None
        said = header(headers, b"host").decode("latin-1")
        if said and said.lower() != authority.lower():
            with suppress(RefusedError):
                if parse_target(said, 80) == (host, port):
                    said = authority
            if said != authority:
                raise self._refuse(authority, f"its Host header names another one, {said[:200]!r}")
        link.head = request.method == b"HEAD"
        if host == GATEWAY:
            await self._gateway.serve(request.method, path, headers, link)
            return
        connection = await self._connect(host, port)
        await _forward(request, path, _authority(host, port), link, connection)

    async def _tunnel(self, request: h11.Request, link: Link, stream: mux.Stream) -> None:
        text = request.target.decode()
        try:
            host, port = parse_target(text)
            if host == GATEWAY:
                raise RefusedError("the package index is there without TLS: http://")
        except RefusedError as error:
            raise self._refuse(text, error) from None
        where = _authority(host, port)
        reader, writer = await self._connect(host, port)
        try:
            if not isinstance(await link.next(), h11.EndOfMessage):
                raise Answer(400, "a CONNECT with a body")
            await stream.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            first = bytearray(link.h11.trailing_data[0])
            if port == 443 and isinstance(host, str) and self._policy.mode == "allow":
                problem = await _greeting_problem(stream, first, host)
                if problem:
                    self._refuse(where, problem)
                    writer.transport.abort()
                    stream.reset()
                    return
            writer.write(first)
            await mux.join(stream, reader, writer, TUNNEL_SECONDS)
        finally:
            writer.close()

    async def _connect(self, host: Host, port: int) -> Connection:
        where = _authority(host, port)
        try:
            return await self._dialer.connect(host, port)
        except RefusedError as error:
            raise self._refuse(where, error) from None
        except UnreachableError as error:
            raise Answer(502, f"{where} cannot be reached: {error}") from None

    def _refuse(self, where: str, why: object) -> Answer:
        self._tell("closed" if isinstance(why, ClosedError) else "refused", where, str(why))
        return Answer(403, f"{where} refused: {why}")


async def _greeting_problem(stream: mux.Stream, held: bytearray, host: str) -> str:
    """What is wrong with a client's first words, "" for nothing; they are added to ``held``."""
    check = TlsCheck(host)
    data = bytes(held)
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            while check.feed(data):
                data = bytes(await stream.receive())
                if not data:
                    break
                held += data
    except TimeoutError:
        return "no TLS greeting in time"
    return check.problem


def _authority(host: Host, port: int) -> str:
    text = str(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


async def _answer(link: Link, answer: Answer) -> None:
    """Say in words what is the matter; clients show a CONNECT's reason, if anything."""
    reason = reason_of(f"vmkernel: {answer.reason}")
    body = reason + b"\n(docs/network.md; settings network and network_allow)\n"
    with suppress(BrokenError):
        await link.send(
            h11.Response(
                status_code=answer.status,
                reason=reason,
                headers=[
                    ("Content-Type", "text/plain; charset=ascii"),
                    ("Content-Length", str(len(body))),
                    ("Connection", "close"),
                ],
            )
        )
        if link.h11.our_state is h11.SEND_BODY:
            await link.send(h11.Data(data=body))
            await link.send(h11.EndOfMessage())


async def _forward(
    request: h11.Request, path: bytes, authority: str, link: Link, connection: Connection
) -> None:
    """The request to its server, the response to the guest.  Raises Answer, BrokenError."""
    reader, writer = connection

    async def send(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    server = Link(h11.CLIENT, lambda: reader.read(mux.PIECE), send)
    headers = [
        (name, value)
        for name, value in end_to_end(request.headers.raw_items())
        if name.lower() not in (b"host", b"expect")
    ]
    if any(name.lower() == b"transfer-encoding" for name, _ in request.headers):
        headers.append((b"Transfer-Encoding", b"chunked"))
    headers = [
        (b"Host", authority.removesuffix(":80").encode()),
        *headers,
        (b"Connection", b"close"),
    ]

    loop = asyncio.get_running_loop()
    sending: asyncio.Future[Any] | None = None
    try:
        async with asyncio.timeout(IDLE_SECONDS) as clock:

            def moved() -> None:
                clock.reschedule(loop.time() + IDLE_SECONDS)

            def give_up(upload: asyncio.Future[Any]) -> None:
                if not upload.cancelled() and upload.exception() is not None:
                    writer.transport.abort()  # the server waits for what does not come

            try:
                request = h11.Request(method=request.method, target=path, headers=headers)
                await server.send(request)
                sending = asyncio.ensure_future(_upload(link, server, moved))
                sending.add_done_callback(give_up)
                response = await _final_response(server)
            except (BrokenError, h11.LocalProtocolError) as error:
                raise Answer(502, f"{authority} gave no answer that is one: {error}") from None
            await _relay(server, response, link, moved)
    except TimeoutError:
        if link.h11.our_state is h11.SEND_RESPONSE:
            raise Answer(504, f"{authority} did not go on") from None
        raise BrokenError("the server did not go on") from None
    finally:
        if sending is not None:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        writer.close()


async def _upload(link: Link, server: Link, moved: Callable[[], None]) -> None:
    """The request's body to the server."""
    while True:
        event = await link.next()
        moved()
        if not isinstance(event, h11.Data):
            await server.send(h11.EndOfMessage())  # without trailers
            return
        await server.send(event)


async def _final_response(server: Link) -> h11.Response:
    while True:
        event = await server.next()
        if isinstance(event, h11.Response):
            return event
        if not isinstance(event, h11.InformationalResponse) or event.status_code == 101:
            raise BrokenError("it ended without a response")


async def _relay(
    server: Link, response: h11.Response, link: Link, moved: Callable[[], None]
) -> None:
    """Pass a response and its body on.  Raises BrokenError: the guest must see the cut."""
    headers = end_to_end(response.headers.raw_items())
    await link.send(
        h11.Response(
            status_code=response.status_code,
            reason=bytes(response.reason),
            headers=[*headers, (b"Connection", b"close")],
        )
    )
    while True:
        event = await server.next()
        moved()
        if isinstance(event, h11.EndOfMessage):
            await link.send(h11.EndOfMessage())
            return
        if not isinstance(event, h11.Data):
            raise BrokenError("the server hung up in the middle")
        await link.send(event)
