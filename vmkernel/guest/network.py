"""The guest's way to the network: a proxy's address on loopback, whose streams go to the host.

This machine has no network device.  What connects to `ADDRESS` speaks HTTP to a proxy, which is a
process on the host; each connection is a stream of port "network" (`vmkernel.protocol.mux`).
Nothing is decided here, least of all who may be reached.

The agent listens from the moment on in which the host says that this VM has a network; the first
connection makes it fork this process, which gives up root and is neither root's nor the cells'
user's.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import socket
from contextlib import suppress
from typing import NoReturn

from vmkernel.guest import guard
from vmkernel.guest.port import open_port
from vmkernel.protocol import mux

ADDRESS = ("127.0.0.1", 3128)
USER = "nobody"
AUTHORITIES = "/run/vmkernel/authorities.pem"
"""Where the certificates lie that the host trusts."""
NO_INDEX = "https://the-setting-network-is-none.vmkernel/simple/"
"""What pip cannot find, and names, where there is no network: no such name exists anywhere."""
NO_NETWORK = """\
vmkernel: this kernel has no network (setting network: none), so nothing can be installed from a
package index. Whoever runs the host may open the index to it and to nothing else:
VMKERNEL_NETWORK=packages, or `vmkernel install --set network=packages` (docs/network.md)."""
BACKLOG = 256
IDLE = 24 * 3600.0
"""Seconds after which a connection on which nothing moves is forgotten; the host's are shorter."""
OOM_SCORE = "-900"  # the cells' processes go first


class Network:
    """What the agent has of it: the listening socket, and the process once there is one."""

    def __init__(self) -> None:
        self.pid = 0
        self.listener: socket.socket | None = None
        self._marker = b""

    @property
    def fd(self) -> int:
        """Readable when somebody connects and there is no process for it yet; else -1."""
        return -1 if self.pid or self.listener is None else self.listener.fileno()

    def open(self, marker: bytes, authorities: bytes) -> None:
        """Begin, or begin anew with another ``marker``: the host's end is a new one."""
        if authorities:
            with open(AUTHORITIES, "wb") as file:
                file.write(authorities)
            os.chmod(AUTHORITIES, 0o644)
        self._marker = marker
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        if self.listener is None:
            listener = socket.create_server(ADDRESS, backlog=BACKLOG)
            listener.setblocking(False)
            self.listener = listener

    def start(self) -> None:
        """Fork the process: somebody has connected."""
        assert self.listener is not None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _be_nobody({0, 1, 2, self.listener.fileno(), port := open_port("network")})
                asyncio.run(_serve(port, self._marker, self.listener))
            finally:
                os._exit(1)

    def disown(self) -> None:
        """In a fork of the agent: the listening socket is not for the user's code."""
        if self.listener is not None:
            self.listener.close()

    def ended(self) -> None:
        """The process died: the host's end could not make sense of another one's words."""
        self.pid = 0
        if self.listener is not None:
            self.listener.close()
            self.listener = None


def _be_nobody(kept: set[int]) -> None:
    """Give up root, and everything of the agent's but these descriptors."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(OOM_SCORE)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with suppress(OSError):  # the listing's own
                os.close(int(name))
    guard.bind_user()
    user = pwd.getpwnam(USER)
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    os.chdir("/")


async def _serve(port: int, marker: bytes, listener: socket.socket) -> NoReturn:
    def lost(error: Exception | None) -> None:
        os._exit(0)  # connections end with it

    streams = mux.Mux(port, marker, lost)
    free = asyncio.Semaphore(mux.MOST_STREAMS)
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    while True:
        await free.acquire()  # who connects meanwhile waits in the backlog
        connection, _ = await loop.sock_accept(listener)
        task = loop.create_task(_carry(streams, connection, free))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _carry(streams: mux.Mux, connection: socket.socket, free: asyncio.Semaphore) -> None:
    stream = streams.open()
    try:
        reader, writer = await asyncio.open_connection(sock=connection, limit=mux.PIECE)
        await mux.join(stream, reader, writer, IDLE)
    finally:
        stream.reset()
        free.release()
