"""A connection to a host outside: looked up once, judged by every address, made to one of those.

A name that resolves to a public address now and to a private one a moment later gains nothing: what
is connected to is the address that was judged, and nobody looks it up again.  Where the host itself
needs a proxy (``HTTPS_PROXY`` and friends), that proxy is asked for that address.  Only a name that
the host's owner has written into `network_allow`, or that a package index uses, may be left to it.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
import socket
import ssl
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress

from vmkernel.network.policy import (
    Address,
    Host,
    Policy,
    RefusedError,
    address_problem,
    is_local_name,
    is_only_here,
)

LOOKUP_SECONDS = 10.0
CONNECT_SECONDS = 15.0
MOST_LOOKUPS = 16
"""At once; the others wait."""
MOST_ADDRESSES = 32
MOST_TRIES = 4
"""Addresses of a name that are tried, one after another."""
LIMIT = 64 << 10
"""Bytes that are read ahead from a server."""
_LONGEST_ANSWER = 16 << 10

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Lookup = Callable[[str, int], Awaitable[list[str]]]


class UnreachableError(Exception):
    """It may be reached, and cannot; the text says why."""


class Dialer:
    """Makes connections that a policy permits."""

    def __init__(self, policy: Policy, lookup: Lookup | None = None) -> None:
        """``lookup``: another resolver than the host's."""
        self._policy = policy
        self._lookup = lookup or look_up
        self._lookups = asyncio.Semaphore(MOST_LOOKUPS)

    async def connect(self, host: Host, port: int) -> Connection:
        """A connection, if it may be.  Raises RefusedError, UnreachableError."""
        self._policy.judge(host, port)
        proxy = upstream_proxy("https", str(host))
        written = self._policy.has_written(host, port)
        try:
            addresses = await self.addresses(host, port)
        except UnreachableError:
            if not proxy or not written:
                raise
            addresses = []  # a name of the host's owner's own choice, which that proxy may know
        for address in addresses:
            self._policy.judge_address(address, port)
        if proxy:
            return await _through(proxy, addresses, host if written else None, port)
        return await connect_to(addresses, port)

    async def connect_beside(self, index: str, host: Host, port: int, proxy: str) -> Connection:
        """A connection to what a package index has named, whatever the setting opens.

        It must be public, or where the index itself is not, no more private than that: an index in
        a company's network may keep its files on another machine of it.  ``index``: its host.
        Raises RefusedError, UnreachableError.
        """
        if isinstance(host, str) and is_local_name(host):
            raise RefusedError("a name of this machine itself")
        try:
            addresses = await self.addresses(host, port)
        except UnreachableError:
            if not proxy:
                raise
            addresses = []  # as pip on the host would
        for address in addresses:
            self._policy.judge_denied(address)
            problem = address_problem(address)
            if problem and (is_only_here(address) or not await self._is_private(index)):
                raise RefusedError(f"{address} is {problem}")
        if proxy:
            return await _through(proxy, addresses, host, port)
        return await connect_to(addresses, port)

    async def _is_private(self, host: str) -> bool:
        addresses = await self.addresses(host.strip("[]"), 0)
        return any(address_problem(address) for address in addresses)

    async def addresses(self, host: Host, port: int) -> list[Address]:
        """What the name resolves to; an address is its own.  Raises UnreachableError."""
        if not isinstance(host, str):
            return [host]
        try:
            async with self._lookups, asyncio.timeout(LOOKUP_SECONDS):
                found = await self._lookup(host, port)
        except TimeoutError:
            raise UnreachableError(f"its name was not found in {LOOKUP_SECONDS:g} s") from None
        except (OSError, UnicodeError) as error:
            raise UnreachableError(f"its name was not found ({error})") from None
        return [ipaddress.ip_address(text.partition("%")[0]) for text in found[:MOST_ADDRESSES]]


async def _through(
    proxy: str, addresses: list[Address], host: Host | None, port: int
) -> Connection:
    """By the host's own proxy, to an address that was judged.

    ``host``: a name by which it may be asked, too, if it does not let addresses through.
    """
    problem = UnreachableError("its name has no address")
    for target in [*addresses[:1], *([host] if host is not None else [])]:
        try:
            return await connect_through(proxy, str(target), port)
        except UnreachableError as error:
            problem = error
    raise problem


async def look_up(host: str, port: int) -> list[str]:
    """Ask the host's resolver."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def connect_to(addresses: list[Address], port: int) -> Connection:
    """A connection to the first of them that answers.  Raises UnreachableError."""
    problem = "its name has no address"
    for address in addresses[:MOST_TRIES]:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await asyncio.open_connection(str(address), port, limit=LIMIT)
        except TimeoutError:
            problem = f"{address} did not answer in {CONNECT_SECONDS:g} s"
        except OSError as error:
            problem = f"{address}: {error.strerror or error}"
    raise UnreachableError(problem)


async def connect_by_name(host: str, port: int) -> Connection:
    """A connection to a host that the host's own configuration names.  Raises UnreachableError."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await asyncio.open_connection(host.strip("[]"), port, limit=LIMIT)
    except TimeoutError:
        raise UnreachableError(f"{host} did not answer in {CONNECT_SECONDS:g} s") from None
    except (OSError, UnicodeError) as error:
        raise UnreachableError(f"{host}: {error}") from None


def upstream_proxy(scheme: str, host: str) -> str:
    """The proxy by which this host itself would reach that one, "" for none."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return ""
    if urllib.request.proxy_bypass_environment(host):  # type: ignore[attr-defined]
        return ""
    proxies = urllib.request.getproxies_environment()
    return proxies.get(scheme) or proxies.get("all") or ""


async def connect_through(proxy: str, host: str, port: int) -> Connection:
    """A tunnel by the host's own proxy (RFC 9110, CONNECT).  Raises UnreachableError."""
    url = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    name = f"the host's proxy {url.hostname}"
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UnreachableError(f"{name} is of a kind that is not known here ({url.scheme})")
    reader, writer = await connect_by_name(
        url.hostname, url.port or (443 if url.scheme == "https" else 80)
    )
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            if url.scheme == "https":
                await writer.start_tls(ssl.create_default_context(), server_hostname=url.hostname)
            target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
            if url.username is not None:
                words = f"{urllib.parse.unquote(url.username)}:"
                words += urllib.parse.unquote(url.password or "")
                token = base64.b64encode(words.encode()).decode()
                lines.append(f"Proxy-Authorization: Basic {token}")
            writer.write("\r\n".join([*lines, "", ""]).encode())
            answer = await reader.readuntil(b"\r\n\r\n")
        words_ = answer[:_LONGEST_ANSWER].split(None, 2)
        if len(words_) < 2 or words_[1] != b"200":
            status = words_[1][:3].decode("latin-1") if len(words_) > 1 else "nothing"
            raise UnreachableError(f"{name} answered {status}")
    except (OSError, TimeoutError, ssl.SSLError, asyncio.IncompleteReadError,
            asyncio.LimitOverrunError) as error:  # fmt: skip
        writer.close()
        raise UnreachableError(f"{name}: {error}") from None
    except UnreachableError:
        writer.close()
        raise
    return reader, writer


async def secure(connection: Connection, context: ssl.SSLContext, host: str) -> Connection:
    """The same connection with TLS.  Raises UnreachableError."""
    reader, writer = connection
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await writer.start_tls(context, server_hostname=host)
    except (OSError, TimeoutError, ssl.SSLError) as error:
        with suppress(OSError):
            writer.close()
        raise UnreachableError(f"{host}: {error or 'no TLS in time'}") from None
    return reader, writer
