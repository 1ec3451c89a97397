"""The proxy's process: ``run_proxy.py PORT_FD NEWS_FD ORDERS_FD``.

It ends when the guest's port does, and with its owner: the other end of the news' socket is the
owner's alone, so whatever becomes of him, this end says so.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import time
from typing import NoReturn

from vmkernel.network import wire
from vmkernel.network.dial import Dialer
from vmkernel.network.packages import Gateway
from vmkernel.network.policy import Policy
from vmkernel.network.proxy import Proxy
from vmkernel.protocol import mux

MOST_MEMORY = 1 << 30
"""Bytes of data: windows of all streams, read and parsed pages of an index, and Python."""
SAME_AGAIN = 30.0
"""Seconds in which the same news are told once."""
MOST_NEWS = 20
"""News within that time."""
MOST_SAME = 512


class Teller:
    """Tells the owner, and not too often: a guest may scan all ports of all hosts."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._told: dict[tuple[str, str], float] = {}
        self._begin = 0.0
        self._count = 0
        self._left_out = 0

    def __call__(self, kind: str, where: str, why: str) -> None:
        """One piece of news."""
        now = time.monotonic()
        if now - self._begin > SAME_AGAIN:
            self._begin, self._count = now, 0
            self._told.clear()
        key = (kind, where[:300])
        if key in self._told:
            return
        if self._count >= MOST_NEWS and kind != "broken":
            self._left_out += 1
            return
        if len(self._told) < MOST_SAME:
            self._told[key] = now
        self._count += 1
        news = wire.News(kind, where[:300], why[:300], self._left_out)  # type: ignore[arg-type]
        self._left_out = 0
        try:
            self._sock.send(wire.encode(news) + b"\n")
        except BlockingIOError:
            self._left_out += 1
        except OSError:
            os._exit(0)


async def serve(port: int, news: socket.socket, orders: wire.Orders) -> NoReturn:
    """Be the proxy until the guest's or the owner's end."""
    loop = asyncio.get_running_loop()
    tell = Teller(news)
    policy = Policy(orders.mode, orders.allow, orders.deny)
    dialer = Dialer(policy)
    proxy = Proxy(policy, dialer, Gateway(orders.pip, dialer, tell), tell)

    def lost(error: Exception | None) -> None:
        if error is not None:
            tell("broken", "the guest", str(error))
        os._exit(0)

    def hear() -> None:
        try:
            if news.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        os._exit(0)

    loop.add_reader(news, hear)
    mux.Mux(port, orders.marker, lost, proxy.on_stream)
    await asyncio.Event().wait()
    raise AssertionError


def main(arguments: list[str]) -> NoReturn:
    """Serve with the descriptors that the owner has named."""
    port, news_fd, orders_fd = map(int, arguments)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with its owner
    os.umask(0o077)
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    with open(orders_fd, "rb") as file:
        orders = wire.decode_orders(file.read())
    os.environ.clear()
    os.environ.update(orders.environment)
    news = socket.socket(fileno=news_fd)
    news.setblocking(False)
    asyncio.run(serve(port, news, orders))
    raise AssertionError
