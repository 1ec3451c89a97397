"""The package index as the guest sees it, ``http://packages.vmkernel/simple/``.

The indexes that pip is configured for on the host are asked from here, with the host's certificates
and passwords, of which the guest sees nothing; and what they say is one page for it.  So there is
no TLS in a slow guest, no question of certificates there, and nothing to be reached but what an
index has named: a file's URL is a token, made when a page named it.

A directory of the host's is an index, too (``file:``, ``find-links``): of it only files named as
wheels and archives are given out that lie, links followed, below it; or below its parent, where it
is called ``simple``, as mirrors are laid out.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import re
import ssl
import stat
import urllib.parse
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
import msgspec

from vmkernel.network import simple
from vmkernel.network.dial import (
    Connection,
    Dialer,
    UnreachableError,
    connect_by_name,
    connect_through,
    secure,
    upstream_proxy,
)
from vmkernel.network.http import BrokenError, Headers, Link, header, reason_of
from vmkernel.network.pipconfig import directory_of, roots_of
from vmkernel.network.policy import GATEWAY, RefusedError, parse_target
from vmkernel.network.simple import File, PageError
from vmkernel.protocol import mux

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmkernel.network.pipconfig import Index, PipConfig

MOST_PAGE = 32 << 20
"""Bytes of an index's page."""
PAGES_AT_ONCE = 3
"""Read, made and sent: pip asks for one after another, and a page lies whole in memory."""
MOST_TOKENS = 200_000
MOST_REDIRECTS = 5
ANSWER_SECONDS = 60.0
"""Within which an index has to answer; and to go on, in the middle of a file."""
_PROJECT = re.compile(r"/simple/([A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?)/?\Z")
_FILE = re.compile(r"/files/([0-9a-f]{40})/([^/]{1,300})\Z")
_GIVEN = frozenset((b"content-type", b"content-length", b"etag", b"last-modified"))


class Known(msgspec.Struct):
    """A file that a page has named."""

    url: str
    filename: str
    has_metadata: bool
    index: Index


class FetchError(Exception):
    """An index did not give what was asked for; the text is for people and has no password."""

    def __init__(self, text: str, status: int = 502) -> None:
        super().__init__(text)
        self.status = status


class Gateway:
    """Answers requests for ``http://packages.vmkernel/…``."""

    def __init__(
        self, config: PipConfig, dialer: Dialer, tell: Callable[[str, str, str], None]
    ) -> None:
        self._config = config
        self._dialer = dialer
        self._tell = tell
        self._secret = os.urandom(32)
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self._pages = asyncio.Semaphore(PAGES_AT_ONCE)

    async def serve(self, method: bytes, path: bytes, headers: Headers, link: Link) -> None:
        """Answer one request.  Raises BrokenError when the guest must see that it is not whole."""
        text = path.decode("latin-1").partition("?")[0]
        try:
            if method not in (b"GET", b"HEAD"):
                raise FetchError("the package index is for reading", 405)
            if found := _PROJECT.match(text):
                wants_json = simple.JSON_TYPE.encode() in header(headers, b"accept")
                async with self._pages:
                    await self._page(simple.project_name(found.group(1)), link, json=wants_json)
            elif found := _FILE.match(text):
                await self._file(found.group(1), urllib.parse.unquote(found.group(2)), link)
            else:
                raise FetchError("there is /simple/PROJECT/, and the files that it names", 404)
        except FetchError as error:
            if link.h11.our_state is not h11.SEND_RESPONSE:
                raise BrokenError(str(error)) from None
            text = f"vmkernel: {error}"
            await _say(link, error.status, "text/plain", f"{text}\n".encode(), reason_of(text))

    # --- pages ---

    async def _page(self, name: str, link: Link, *, json: bool) -> None:
        indexes = self._config.indexes
        for text in self._config.problems:
            self._tell("failed", "packages", text)
        if not indexes:
            raise FetchError("pip is configured for no index on the host", 404)
        answers = await asyncio.gather(*(self._files(each, name) for each in indexes))
        files: dict[str, File] = {}
        problems = [answer for answer in answers if isinstance(answer, FetchError)]
        for answer in answers:
            if not isinstance(answer, FetchError):
                for file in answer:
                    files.setdefault(file.filename, file)
        for problem in problems:
            if problem.status != 404:
                self._tell("failed", "packages", str(problem))
        if not files and problems:
            worst = max(problems, key=lambda problem: problem.status != 404)
            raise worst if worst.status != 404 else FetchError(f"no index has {name!r}", 404)
        if json:
            body = simple.make_json(name, list(files.values()))
            await _say(link, 200, simple.JSON_TYPE, body)
        else:
            await _say(
                link, 200, "text/html; charset=utf-8", simple.make_html(name, [*files.values()])
            )

    async def _files(self, index: Index, name: str) -> list[File] | FetchError:
        """What this index has of a project, with URLs for the guest."""
        try:
            if index.url.startswith("file:"):
                found = await asyncio.to_thread(_local_files, index, name)
            else:
                url = index.url if index.links else f"{index.url.rstrip('/')}/{name}/"
                base, head, body = await self._fetch(url, index)
                kind = header(head, b"content-type").decode("latin-1")
                found = simple.read_page(body, kind, base)
        except FetchError as error:
            return error
        except (PageError, OSError) as error:
            return FetchError(f"the index {index.url}: {error}")
        given = []
        for file in found:
            if not file.url.startswith(("http://", "https://", "file:")):
                continue
            if file.url.startswith("file:") and not index.url.startswith("file:"):
                continue  # an index elsewhere does not name files of this host
            metadata = file.core_metadata or file.dist_info_metadata
            token = self._remember(Known(file.url, file.filename, bool(metadata), index))
            file.url = f"http://{GATEWAY}/files/{token}/{urllib.parse.quote(file.filename)}"
            file.core_metadata, file.dist_info_metadata = metadata, False
            given.append(file)
        return given

    def _remember(self, known: Known) -> str:
        text = f"{known.index.url}\n{known.url}"
        token = hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()[:40]
        self._known[token] = known
        self._known.move_to_end(token)
        if len(self._known) > MOST_TOKENS:
            self._known.popitem(last=False)
        return token

    # --- files ---

    async def _file(self, token: str, filename: str, link: Link) -> None:
        known = self._known.get(token)
        if known is None:
            raise FetchError("this file was named by no page; ask for /simple/PROJECT/ first", 404)
        suffix = filename.removeprefix(known.filename)
        if suffix not in ("", ".metadata") or (suffix and not known.has_metadata):
            raise FetchError("no page has named this file", 404)
        if known.url.startswith("file:"):
            await _send_local(known, suffix, link)
            return
        url = urllib.parse.urlsplit(known.url)
        url = url._replace(path=url.path + suffix, fragment="")
        server, response, writer, _ = await self._ask(urllib.parse.urlunsplit(url), known.index)
        try:
            headers = [(k, v) for k, v in response.headers.raw_items() if k.lower() in _GIVEN]
            await link.send(
                h11.Response(
                    status_code=200,
                    reason=b"OK",
                    headers=[*headers, (b"Cache-Control", b"no-store"), (b"Connection", b"close")],
                )
            )
            while not link.head and isinstance(event := await _next(server), h11.Data):
                await link.send(event)
            await link.send(h11.EndOfMessage())
        finally:
            writer.close()

    # --- asking an index ---

    async def _fetch(self, url: str, index: Index) -> tuple[str, Headers, bytes]:
        """A page: its last URL, headers, body.  Raises FetchError."""
        server, response, writer, last = await self._ask(url, index, simple.ACCEPT)
        body = bytearray()
        try:
            while not isinstance(event := await _next(server), h11.EndOfMessage):
                assert isinstance(event, h11.Data)
                body += event.data
                if len(body) > MOST_PAGE:
                    raise FetchError(f"{_bare(url)}: a page of more than {MOST_PAGE >> 20} MiB")
        finally:
            writer.close()
        return last, response.headers.raw_items(), bytes(body)

    async def _ask(
        self, url: str, index: Index, accept: str = "*/*"
    ) -> tuple[Link, h11.Response, asyncio.StreamWriter, str]:
        """A response with status 200, redirections followed.  Raises FetchError."""
        for _ in range(MOST_REDIRECTS + 1):
            parts = urllib.parse.urlsplit(url)
            connection = await self._connect(parts, index)
            _, writer = connection
            try:
                server, response = await self._request(parts, connection, index, accept)
                if response.status_code == 200:
                    return server, response, writer, url
                place = header(response.headers.raw_items(), b"location")
                if response.status_code not in (301, 302, 303, 307, 308) or not place:
                    status = response.status_code
                    raise FetchError(
                        f"{_bare(url)} answered {status}", 404 if status in (404, 410) else 502
                    )
            except BaseException:
                writer.close()
                raise
            writer.close()
            try:
                url = urllib.parse.urljoin(url, place.decode("latin-1"))
            except ValueError:
                raise FetchError(f"{_bare(url)}: a redirection to nowhere") from None
        raise FetchError(f"{_bare(url)}: redirected too often")

    async def _request(
        self, parts: urllib.parse.SplitResult, connection: Connection, index: Index, accept: str
    ) -> tuple[Link, h11.Response]:
        reader, writer = connection

        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        server = Link(h11.CLIENT, lambda: reader.read(mux.PIECE), send)
        headers = [
            ("Host", parts.netloc.rpartition("@")[2]),
            ("User-Agent", "vmkernel"),
            ("Accept", accept),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        if index.user and _origin(parts) == _origin(urllib.parse.urlsplit(index.url)):
            words = base64.b64encode(f"{index.user}:{index.password}".encode()).decode()
            headers.append(("Authorization", f"Basic {words}"))
        target = urllib.parse.quote(parts.path or "/", safe="/%!$&'()*+,;=:@~")
        if parts.query:
            target += "?" + urllib.parse.quote(parts.query, safe="/?%!$&'()*+,;=:@~")
        where = _bare(urllib.parse.urlunsplit(parts))
        try:
            request = h11.Request(method="GET", target=target, headers=headers)
            await server.send(request)
            await server.send(h11.EndOfMessage())
            async with asyncio.timeout(ANSWER_SECONDS):
                while isinstance(event := await server.next(), h11.InformationalResponse):
                    pass
        except (BrokenError, h11.LocalProtocolError) as error:
            raise FetchError(f"{where}: {error}") from None
        except TimeoutError:
            raise FetchError(f"{where} did not answer in {ANSWER_SECONDS:g} s") from None
        if not isinstance(event, h11.Response):
            raise FetchError(f"{where}: it ended without a response")
        return server, event

    async def _connect(self, parts: urllib.parse.SplitResult, index: Index) -> Connection:
        """To the index as the host would; to any other host see `Dialer.connect_beside`."""
        where = _bare(urllib.parse.urlunsplit(parts))
        try:
            name, port = parts.hostname or "", parts.port
        except ValueError:
            raise FetchError(f"{where}: a URL that is none") from None
        if parts.scheme not in ("http", "https") or not name:
            raise FetchError(f"{where}: a URL that is none")
        port = port or (443 if parts.scheme == "https" else 80)
        trusted = _origin(parts) == _origin(urllib.parse.urlsplit(index.url))
        try:
            proxy = self._config.proxy or upstream_proxy(parts.scheme, name)
            if not trusted:
                text = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
                home = urllib.parse.urlsplit(index.url).hostname or ""
                connection = await self._dialer.connect_beside(home, *parse_target(text), proxy)
            elif proxy:
                connection = await connect_through(proxy, name, port)
            else:
                connection = await connect_by_name(name, port)
            if parts.scheme == "https":
                connection = await secure(connection, await self._context(name, port), name)
        except (RefusedError, UnreachableError) as error:
            raise FetchError(f"{where}: {error}") from None
        return connection

    async def _context(self, name: str, port: int) -> ssl.SSLContext:
        unchecked = any(each in (name, f"{name}:{port}") for each in self._config.trusted_hosts)
        if unchecked not in self._contexts:
            try:
                context = await asyncio.to_thread(_make_context, self._config)
            except (OSError, ssl.SSLError) as error:
                raise UnreachableError(f"the host's certificates: {error}") from None
            if unchecked:  # as the host's owner has told pip
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._contexts[unchecked] = context
        return self._contexts[unchecked]


def _make_context(config: PipConfig) -> ssl.SSLContext:
    if config.cert and Path(config.cert).is_dir():
        context = ssl.create_default_context(capath=config.cert)
    else:
        context = ssl.create_default_context(cafile=config.cert or None)
    if config.client_cert:
        context.load_cert_chain(config.client_cert)
    return context


async def _next(server: Link) -> Any:
    """What comes next of a body.  Raises FetchError."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            event = await server.next()
    except BrokenError as error:
        raise FetchError(f"the index broke off: {error}") from None
    except TimeoutError:
        raise FetchError("the index did not go on") from None
    if not isinstance(event, h11.Data | h11.EndOfMessage):
        raise FetchError("the index hung up in the middle")
    return event


def _origin(parts: urllib.parse.SplitResult) -> tuple[str, str, int]:
    with suppress(ValueError):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return parts.scheme, parts.hostname or "", port
    return "", "", 0


def _bare(url: str) -> str:
    """A URL for people: without password, query and fragment."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")
    )[:300]


# --- indexes on this host's disk ---


def _local_files(index: Index, name: str) -> list[File]:
    """What a directory has of a project.  Raises FetchError, OSError."""
    directory = directory_of(index)
    page: Path | None = None
    if not index.links:
        page = directory / name / "index.html"
    elif urllib.parse.urlsplit(index.url).path.endswith((".html", ".htm")):
        page = Path(urllib.parse.unquote(urllib.parse.urlsplit(index.url).path))
    if page is not None:
        if page.is_file():
            return simple.read_page(page.read_bytes(), "text/html", page.as_uri())
        directory = page.parent
    try:
        names = sorted(os.listdir(directory))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        raise FetchError(f"the index {index.url} does not have {name!r}", 404) from None
    begin = name.replace("-", "")
    return [
        File(each, (directory / each).as_uri())
        for each in names
        if simple.is_file_name(each)
        and simple.project_name(each).replace("-", "").startswith(begin)
    ]


def _open_local(known: Known, suffix: str) -> int:
    """A descriptor of a file that a local index has named.  Raises FetchError."""
    path = Path(urllib.parse.unquote(urllib.parse.urlsplit(known.url).path) + suffix)
    refused = FetchError(f"the file {known.filename}{suffix} is not below its index", 404)
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(roots_of(known.index)) or not simple.is_file_name(
            path.name.removesuffix(".metadata")
        ):
            raise refused
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise refused from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise refused
    return fd


async def _send_local(known: Known, suffix: str, link: Link) -> None:
    fd = await asyncio.to_thread(_open_local, known, suffix)
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        await link.send(_response(200, "application/octet-stream", size))
        while size and not link.head:
            data = await asyncio.to_thread(file.read, min(size, 8 * mux.PIECE))
            if not data:
                raise BrokenError("the file became shorter")
            size -= len(data)
            await link.send(h11.Data(data=data))
        await link.send(h11.EndOfMessage())


def _response(status: int, kind: str, size: int, reason: bytes = b"OK") -> h11.Response:
    headers = [
        ("Content-Type", kind),
        ("Content-Length", str(size)),
        ("Cache-Control", "no-store"),
        ("Connection", "close"),
    ]
    return h11.Response(status_code=status, headers=headers, reason=reason)


async def _say(link: Link, status: int, kind: str, body: bytes, reason: bytes = b"OK") -> None:
    await link.send(_response(status, kind, len(body), reason))
    await link.send(h11.Data(data=body))
    await link.send(h11.EndOfMessage())
