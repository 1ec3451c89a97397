"""Where kernels go: `Cluster`, a `Reservation` of one slot on a `Host`.  Floor 5.

The face of `vmkernel.cluster.placer`, the child process that speaks with Ray.  Everything here
belongs to the event loop of the driver's thread (`vmkernel.cluster.driver`); nothing blocks it, and
each question has a time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Collection
from typing import IO, Any, NamedTuple

import msgspec

import vmkernel
from vmkernel.cluster.joining import (
    WRONG_TOKEN,
    last_words,
    refused,
    start_placer,
    why_not_joined,
)
from vmkernel.cluster.placer import LENGTH
from vmkernel.errors import VmCapacityError, VmError
from vmkernel.settings import Settings

JOIN_TIMEOUT = 45.0
"""Seconds: Ray's import (2 s, on a busy host 10 s) and its own attempts, of which a wrong token
takes 20 s."""
CALL_TIMEOUT = 15.0
"""Seconds for what Ray's head or an idle host answers in milliseconds."""
ACTOR_TIMEOUT = 60.0
"""Seconds until a host's actor is up: 4 s, a process that imports Ray."""
SLICE = 1.0
"""Seconds between two looks at the cluster while a kernel waits for a slot."""


class HostLostError(Exception):
    """The host, its actor or the whole cluster is surely gone; ``str`` says what and why."""


class HostSilentError(Exception):
    """No answer in time: the host may live, or not."""


class HostFailedError(Exception):
    """The host answered with an error of its own: a mistake of ours, there or here."""


HOST_ERRORS = (HostLostError, HostSilentError, HostFailedError)
_ERRORS = {"dead": HostLostError, "silent": HostSilentError}


class HostFacts(NamedTuple):
    """A node of the cluster that has VM slots."""

    node_id: str
    ip: str
    name: str
    slots: int
    alive: bool


class Cluster:
    """A Ray cluster, joined through a child process.  `join` makes one, `close` leaves it."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, log: IO[bytes]):
        self.interface = 0
        """Of `vmkernel.cluster.hostactor`: what a host must have, too."""
        self._process = process
        self._channel = channel
        self._log = log
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._lost = ""
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None
        self._hosts: list[Host] = []
        self._hosts_read = 0.0
        self._background: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        state = self._lost or "joined"
        return f"<Cluster: placer {self._process.pid}, {state}, {len(self._asked)} questions>"

    @classmethod
    async def join(cls, settings: Settings) -> Cluster:
        """Become part of the cluster that the setting ``cluster_address`` names.

        Raises:
            VmError: Ray is missing, nobody answers, the token is wrong, or versions differ.
        """
        cluster = cls(*start_placer())
        try:
            reader, cluster._writer = await asyncio.open_connection(sock=cluster._channel)
            cluster._listening = asyncio.create_task(cluster._listen(reader))
            await cluster._join(settings.cluster_address)
        except BaseException as error:
            told = cluster.log_tail()
            await cluster.close()
            if isinstance(error, HostLostError | HostSilentError | HostFailedError):
                raise why_not_joined(settings.cluster_address, str(error), told) from error
            raise
        return cluster

    async def _join(self, address: str) -> None:
        """As `join`; what keeps us out may be seen before Ray gives up, 20 s later or never."""
        host, _, port = address.rpartition(":")
        if host and await refused(host.strip("[]"), int(port)):
            raise HostFailedError("the connection is refused")
        asking = asyncio.create_task(self.ask("join", address, seconds=JOIN_TIMEOUT))
        try:
            while not (await asyncio.wait([asking], timeout=0.25))[0]:
                if WRONG_TOKEN.search(told := self.log_tail()):
                    raise HostFailedError(last_words(told))
            self.interface = (await asking)["interface"]
        finally:
            asking.cancel()

    @property
    def lost(self) -> str:
        """Why the cluster cannot be asked any more; "" while it can."""
        return self._lost

    async def ask(self, method: str, *arguments: Any, seconds: float = CALL_TIMEOUT) -> Any:
        """Ask the placer.

        Raises:
            HostLostError: what was asked about is gone, or the placer is.
            HostSilentError: no answer within *seconds*.
            HostFailedError: the answer is an error.
        """
        if self._lost or self._writer is None:
            raise HostLostError(self._lost or "the cluster is not joined")
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        data = msgspec.msgpack.encode([number, method, arguments], enc_hook=str)
        self._writer.write(LENGTH.pack(len(data)) + data)
        try:
            async with asyncio.timeout(seconds):
                kind, value = await answer
        except TimeoutError as error:
            raise HostSilentError(f"no answer within {seconds:g} s") from error
        finally:
            self._asked.pop(number, None)
        if kind == "ok":
            return value
        raise _ERRORS.get(kind, HostFailedError)(str(value))

    async def hosts(self, *, age: float = 0.0) -> list[Host]:
        """Every node that has VM slots, as it was at most *age* seconds ago."""
        if not self._hosts_read or time.monotonic() - self._hosts_read > age:
            rows = await self.ask("hosts")
            self._hosts = [Host(self, HostFacts(**row)) for row in rows]
            self._hosts_read = time.monotonic()
        return self._hosts

    async def host(self, node_id: str) -> Host:
        """The host of this id.  Raises HostLostError: there is none, or it is dead."""
        for age in (30.0, 0.0):
            for host in await self.hosts(age=age):
                if host.facts.node_id == node_id and host.facts.alive:
                    return host
        raise HostLostError("its node is no longer part of the cluster")

    async def reserve(
        self,
        kernel_id: str,
        *,
        avoid: Collection[str] = (),
        only: str = "",
        timeout: float | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Reservation:
        """One VM slot, on the host with the most free ones; waits until there is one.

        *avoid* are ids of nodes that are not to be taken, *only* the id of the one that is.
        *timeout* is in seconds (None: for ever); *say* is told what is waited for.  When it is
        cancelled, nothing stays reserved.

        Raises:
            VmCapacityError: none became free in time.
            HostLostError, HostSilentError, HostFailedError: the cluster cannot be asked.
        """
        end = None if timeout is None else time.monotonic() + timeout
        key = secrets.token_hex(16)
        node_id = ""
        try:
            await self.ask("reserve", key, kernel_id, list(avoid), only)
            wait = 0.2
            while not node_id:
                left = wait if end is None else min(wait, max(0.0, end - time.monotonic()))
                node_id = await self.ask(
                    "await_reservation", key, left, seconds=left + CALL_TIMEOUT
                )
                wait = SLICE
                if not node_id:
                    slots = await self.slots_in_words()
                    if end is not None and time.monotonic() >= end:
                        raise VmCapacityError(
                            f"No VM slot became free in the cluster within "
                            f"{round(timeout or 0, 1):g} s: {slots}",
                            hint="run the cell again to wait again, end kernels that nobody needs "
                            "(`vmkernel ps --cluster`), or raise cluster_wait",
                        )
                    say(f"waiting for a VM slot in the cluster: {slots}")
            host = await self.host(node_id)
        except BaseException:
            self.release_soon(key)
            raise
        return Reservation(self, key, host)

    async def slots_in_words(self) -> str:
        """Like "3 of 12 taken on 2 hosts"; as Ray counts them."""
        hosts = [host for host in await self.hosts(age=SLICE / 2) if host.facts.alive]
        if not hosts:
            return "it has no VM host yet"
        slots = await self.ask("slots")
        plural = "" if len(hosts) == 1 else "s"
        taken = slots["total"] - slots["free"]
        return f"{taken} of {slots['total']} taken on {len(hosts)} host{plural}"

    def release_soon(self, key: str) -> None:
        """Give a reservation back without waiting for the answer."""
        task = asyncio.get_running_loop().create_task(self._release(key))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _release(self, key: str) -> None:
        # Reservations of a placer that is gone are gone as well
        with contextlib.suppress(HostLostError, HostSilentError, HostFailedError):
            await self.ask("release", key)

    def log_tail(self) -> str:
        """The last of what Ray's libraries wrote on their standard error."""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self._log.fileno()).st_size
            return os.pread(self._log.fileno(), 8192, max(0, size - 8192)).decode(errors="replace")
        return ""

    def forget(self) -> None:
        """In a process that was forked off: let go of the parent's socket.

        The placer ends when the last copy of it is closed, and the child may outlive the parent.
        """
        self._channel.close()

    async def close(self) -> None:
        """Leave the cluster; whatever is reserved is given back by that."""
        self._lost = self._lost or "the cluster was left"
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])
        self._fail_questions()
        if self._writer is not None:
            self._writer.close()
        self._channel.close()
        # It ends at the end of the socket; nothing that Ray does can keep it from that.
        for _ in range(100):
            if self._process.poll() is not None:
                break
            await asyncio.sleep(0.02)
        else:
            self._process.kill()
            self._process.wait()
        self._log.close()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                number, kind, value = msgspec.msgpack.decode(await reader.readexactly(length))
                answer = self._asked.get(number)
                if answer is not None and not answer.done():
                    answer.set_result((kind, value))
        except (OSError, EOFError):
            self._lost = "the process that speaks with Ray ended: " + (
                last_words(self.log_tail()) or "it was killed"
            )
            self._fail_questions()

    def _fail_questions(self) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_result(("dead", self._lost))


class Host:
    """A VM host of the cluster, and the actor that starts kernels on it."""

    def __init__(self, cluster: Cluster, facts: HostFacts) -> None:
        self.cluster = cluster
        self.facts = facts

    def __repr__(self) -> str:
        state = "" if self.facts.alive else ", dead"
        return f"<Host {self.facts.ip}: {self.facts.slots} slots{state}>"

    @property
    def label(self) -> str:
        """How people know it: name and address."""
        name, ip = self.facts.name, self.facts.ip
        return ip if name in ("", ip) else f"{name} ({ip})"

    async def call(
        self, method: str, *arguments: Any, timeout: float, make: bool = False, **options: Any
    ) -> Any:
        """Call a method of `vmkernel.cluster.hostactor.KernelHost` there.

        With *make*, the actor is made where there is none (the first time, or because it had
        nothing to do for long): seconds more.

        Raises:
            HostLostError: the host or its actor is surely gone.
            HostSilentError: no answer within *timeout* seconds.
            HostFailedError: the method raised.
        """
        node_id, ip = self.facts.node_id, self.facts.ip
        # The placer's own limit comes first: its answer says more
        return await self.cluster.ask(
            "host", node_id, ip, make, method, arguments, options, timeout, seconds=timeout + 2
        )

    async def ready(self) -> dict[str, Any]:
        """Have the actor up, and return what it tells of the host (``KernelHost.hello``).

        Raises:
            VmError: the vmkernel there is missing or of another interface.
            HostLostError, HostSilentError: as `call`.
        """
        facts: dict[str, Any] = await self.call("hello", timeout=ACTOR_TIMEOUT, make=True)
        if facts.get("interface") != self.cluster.interface:
            raise VmError(
                f"The host {self.label} has vmkernel {facts.get('version')}, which does not work "
                f"with the {vmkernel.__version__} here",
                hint="install the same version on all hosts, then restart Ray there",
            )
        return facts


class Reservation:
    """A VM slot of the cluster, kept until it is released or this process ends."""

    def __init__(self, cluster: Cluster, key: str, host: Host) -> None:
        self._cluster = cluster
        self._key = key
        self.host = host

    def __repr__(self) -> str:
        return f"<Reservation {self._key[:8]} on {self.host.label}>"

    async def release(self) -> None:
        """Give the slot back; idempotent, never fails."""
        await self._cluster._release(self._key)
