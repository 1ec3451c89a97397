"""The search for a host that starts a kernel: a slot, a start, and if need be the next host.

Ray's count of slots is a forecast; the truth is each host's semaphore file.  So a host may say no
to a slot that Ray gave us: then the slot is given back, and another host is asked.  Floor 5;
belongs to the loop of `vmkernel.cluster.driver`.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import random
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vmkernel.cluster.placement import (
    HOST_ERRORS,
    Cluster,
    Host,
    HostLostError,
    Reservation,
)
from vmkernel.errors import VmCapacityError, VmError

if TYPE_CHECKING:
    from vmkernel.cluster.driver import Driver
    from vmkernel.cluster.lease import HostLink
    from vmkernel.settings import Settings

MOST_TRIES = 5
"""Hosts that are asked, when one after the other has no slot after all."""
START_TIMEOUT = 100.0
"""Seconds until a host has a slot for us, or says that it has none: its own limit is 60 (a template
is made behind the slot).  A host that is silent for so long is given up for another."""
AVOID_WAIT = 10.0
"""Seconds to wait for a slot elsewhere than on the hosts that are avoided."""


class Order(NamedTuple):
    """What is to be started."""

    kernel_name: str
    argv: list[str]
    env: dict[str, str]
    cwd: str


class Running(NamedTuple):
    """A kernel that runs on a host."""

    name: str
    host: Host
    link: HostLink
    info: dict[str, Any]
    notes: list[str]


class Search:
    """Finds a host for one kernel, again and again, and keeps its reservation."""

    def __init__(self, kernel_id: str, driver: Driver, settings: Settings) -> None:
        self.starts = 0
        """How often the kernel was started, or a host was asked to."""
        self._kernel_id = kernel_id
        self._driver = driver
        self._settings = settings
        self._reservation: Reservation | None = None
        self._release: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Search for {self._kernel_id}: {self.starts} starts, {self._reservation}>"

    async def find(
        self, order: Order, local: Mapping[str, Any], say: Callable[[str], None]
    ) -> Running:
        """Start on one host after the other, until one has a VM.

        *local* is the front end's connection information, whose key the kernel gets; *say* is told
        what is waited for.  When this is cancelled, the host is told to end what it may have begun.

        Raises:
            VmCapacityError: no slot in time, or none where Ray said that there were some.
            VmError: the cluster cannot be joined, or the kernel cannot be started.
            HostLostError, HostSilentError, HostFailedError: the cluster cannot be asked.
        """
        wait = self._settings.cluster_wait
        end = None if wait is None else time.monotonic() + wait
        attempt = 0
        while True:
            reservation = await self._reserve(end, say)
            say(f"starting a VM on {reservation.host.label}")
            try:
                answer = await self._start(reservation.host, order, local)
            except HOST_ERRORS as error:
                answer = {"refused": "host", "message": str(error)}
            if isinstance(answer, Running):
                return answer
            await self.give_back()
            self._driver.avoid(reservation.host)
            attempt += 1
            told = f"{reservation.host.label}: {answer.get('message') or answer.get('error')}"
            if attempt == MOST_TRIES:
                raise _refusal(answer, told)
            say(f"{told}; trying again")
            await asyncio.sleep(backoff(attempt))

    async def hold(self, host: Host, runs: Callable[[], bool]) -> None:
        """Have a slot for a kernel that runs on *host* already: its former owner has ended.

        *runs* tells, when there is one, whether it is still needed.
        """
        with contextlib.suppress(VmError, *HOST_ERRORS):
            await self.give_back()
            reservation = await host.cluster.reserve(
                self._kernel_id,
                only=host.facts.node_id,
                timeout=self._settings.cluster_lease,
            )
            if runs() and self._reservation is None:
                self._reservation = reservation
            else:
                await reservation.release()

    def keep_for(self, seconds: float) -> None:
        """Give the slot back after this time, if nobody takes it up before."""
        self._keep()
        if self._reservation is None:
            return
        self._release = asyncio.get_running_loop().call_later(
            seconds, lambda: self._driver.spawn(self.give_back())
        )

    async def give_back(self) -> None:
        """Release the slot; idempotent."""
        self._keep()
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            await reservation.release()

    def _keep(self) -> None:
        if self._release is not None:
            self._release.cancel()
            self._release = None

    async def _reserve(self, end: float | None, say: Callable[[str], None]) -> Reservation:
        """The slot that is kept, or a new one; not where there was none a moment ago."""
        self._keep()
        kept = self._reservation
        if kept is not None and not kept.host.cluster.lost and kept.host.facts.alive:
            return kept
        await self.give_back()
        say("joining the cluster")
        for last in (False, True):
            cluster = await self._driver.cluster(self._settings)
            try:
                self._reservation = await self._reserve_in(cluster, end, say)
                return self._reservation
            except HostLostError:
                if last or not cluster.lost:
                    raise
        raise AssertionError

    async def _reserve_in(
        self, cluster: Cluster, end: float | None, say: Callable[[str], None]
    ) -> Reservation:
        avoid = self._driver.avoided()
        alive = {host.facts.node_id for host in await cluster.hosts(age=5.0) if host.facts.alive}
        if alive <= avoid:
            avoid = frozenset()
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            part = left
            if avoid:  # not for long: the others may be full, and stay so
                part = AVOID_WAIT if left is None else min(left, AVOID_WAIT)
            try:
                return await cluster.reserve(self._kernel_id, avoid=avoid, timeout=part, say=say)
            except VmCapacityError:
                if part == left:
                    raise
                avoid = frozenset()

    async def _start(
        self, host: Host, order: Order, local: Mapping[str, Any]
    ) -> Running | dict[str, Any]:
        """Ask *host* for a kernel; what it answered, when it has not started one."""
        self.starts += 1
        # A name for each attempt: one that was given up is never mistaken for the next
        name = self._kernel_id if self.starts == 1 else f"{self._kernel_id}.{self.starts}"
        request = {
            "kernel_id": name,
            "kernel_name": order.kernel_name,
            "key": _text(local.get("key", "")),
            "signature_scheme": local.get("signature_scheme", "hmac-sha256"),
            "env": order.env,
            "cwd": order.cwd,
            "lease": self._settings.cluster_lease,
            "argv": order.argv,
            "owner": _owner(),
        }
        link = await self._driver.link(self._settings, host)
        settled = False
        try:
            answer: dict[str, Any] = await host.call(
                "start", request, timeout=START_TIMEOUT, make=True
            )
            settled = True
        finally:
            if not settled:  # the host may have started it, or be about to
                link.abandon(name)
        if "info" not in answer:
            return answer
        return Running(name, host, link, answer["info"], list(answer.get("notes", ())))


def backoff(attempt: int) -> float:
    """Seconds before the next try after the *attempt*-th (from 1): doubling, with jitter."""
    return 0.2 * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)


def _refusal(answer: Mapping[str, Any], told: str) -> VmError:
    """What the last of the hosts' refusals means."""
    if "error" in answer:
        return VmError(told, hint=str(answer.get("hint") or ""))
    return VmCapacityError(
        f"{MOST_TRIES} times a host of the cluster had no VM slot after all; the last one was "
        f"{told}",
        hint="VMs that the cluster does not count may run there (`vmkernel ps`): give the cluster "
        "the slots that it may have (`vmkernel capacity`)",
    )


def _owner() -> str:
    """Who starts kernels here, for those who look at a host (`vmkernel ps --cluster`)."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = "?"
    return f"{user}@{socket.gethostname()}"


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
