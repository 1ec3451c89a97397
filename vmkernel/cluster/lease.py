"""Contact with one VM host: the leases of this process's kernels on it, and what silence means.

One call every `INTERVAL` seconds renews all of them, and its answer tells which kernels ended.  A
host that is surely gone (Ray says so, or its machine refuses the kernel's port) costs its kernels
at once; one that is only silent may come back until the lease is over, after which it has ended
them itself.  Floor 5; belongs to the loop of `vmkernel.cluster.driver`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from vmkernel.cluster.joining import refused
from vmkernel.cluster.placement import (
    Host,
    HostFailedError,
    HostLostError,
    HostSilentError,
)
from vmkernel.errors import VmError

INTERVAL = 2.0
"""Seconds between two renewals."""
TIMEOUT = 3.0
"""Seconds for the answer to one."""
TOLD_AFTER = 10.0
"""Seconds of silence after which the notebook is told."""
SLACK = 2.0
"""Seconds that we wait longer than the host does: it must have ended the kernel when we say so."""
ABANDONED_FOR = 600.0
"""Seconds for which a host that was given up is told to end what runs there for us."""

_log = logging.getLogger(__name__)


class Leased(Protocol):
    """A kernel on the host, as the link sees it."""

    lease: float

    @property
    def shell(self) -> tuple[str, int]:
        """Address and port at which the kernel listens."""

    def ended(self, exit_code: int) -> None:
        """It ended, on a host that lives."""

    def lost(self, why: str) -> None:
        """Its host is gone, or given up."""

    def moved(self, host: Host) -> None:
        """It is where it was; *host* is to be asked about it from now on."""

    def silent(self, seconds: float) -> None:
        """There has been no contact for that long; once."""


class HostLink:
    """Renews the leases of all kernels of this process on one host, as long as it has any."""

    def __init__(self, host: Host, again: Callable[[], Awaitable[Host]]) -> None:
        """*again* finds the host anew, when the process that speaks with Ray was lost."""
        self.host = host
        self.closed = False
        self._again = again
        self._kernels: dict[str, Leased] = {}
        self._abandoned: dict[str, float] = {}
        self._heard = time.monotonic()
        self._told = False
        self._wake = asyncio.Event()

    def __repr__(self) -> str:
        return f"<HostLink {self.host.label}: {len(self._kernels)} kernels>"

    def add(self, kernel_id: str, kernel: Leased) -> None:
        """A kernel that was started there just now."""
        self._heard = time.monotonic()
        self._kernels[kernel_id] = kernel
        self._wake.set()

    def remove(self, kernel_id: str) -> None:
        """It ended, or is being ended by who calls."""
        self._kernels.pop(kernel_id, None)

    def abandon(self, kernel_id: str) -> None:
        """Nobody here wants it any more: the host is told so as soon as it answers."""
        self._kernels.pop(kernel_id, None)
        self._abandoned[kernel_id] = time.monotonic() + ABANDONED_FOR
        self._wake.set()

    async def run(self) -> None:
        """Renew until there is nothing to renew, nor to end."""
        try:
            while True:
                if not self._kernels and not self._abandoned:
                    self._wake.clear()
                    await self._wake.wait()
                    self._heard = time.monotonic()
                started = time.monotonic()
                try:
                    await self._once()
                except Exception:  # the next round, or every kernel there would end by its lease
                    _log.exception("the leases on %s were not renewed", self.host.label)
                await asyncio.sleep(max(0.1, INTERVAL - (time.monotonic() - started)))
        finally:
            self.closed = True

    async def _once(self) -> None:
        ids = list(self._kernels)
        if ids and not await self._renew(ids):
            return
        await self._end_abandoned()

    async def _renew(self, ids: list[str]) -> bool:
        """Renew, and see to what is told; whether the host has answered."""
        try:
            states = await self.host.call("renew", ids, timeout=TIMEOUT)
        except HostLostError as error:
            if not await self._found_again():
                self._abandoned.clear()
                self._lose(ids, str(error))
            return False
        except (HostSilentError, HostFailedError) as error:
            await self._judge_silence(ids, str(error))
            return False
        self._heard = time.monotonic()
        self._told = False
        for kernel_id, state in states.items():
            self._take(kernel_id, state)
        return True

    async def _end_abandoned(self) -> None:
        """Tell the host; again in the next round where that fails."""
        now = time.monotonic()
        self._abandoned = {name: end for name, end in self._abandoned.items() if end > now}
        names = list(self._abandoned)
        answers = await asyncio.gather(
            *(self.host.call("end", name, kill=True, timeout=TIMEOUT) for name in names),
            return_exceptions=True,
        )
        lost = any(isinstance(answer, HostLostError) for answer in answers)
        if lost and await self._found_again():
            return
        for name, answer in zip(names, answers, strict=True):
            if not isinstance(answer, HostSilentError | HostFailedError):
                self._abandoned.pop(name, None)

    def _take(self, kernel_id: str, state: dict[str, object]) -> None:
        kernel = self._kernels.get(kernel_id)
        if kernel is None or state.get("state") == "running":
            return
        del self._kernels[kernel_id]
        if state.get("why"):
            kernel.lost(f"{self.host.label} ended it: {state['why']}")
        elif state.get("state") == "ended":
            code = state.get("exit_code")
            kernel.ended(code if isinstance(code, int) else 1)
        else:
            kernel.lost(f"{self.host.label} knows nothing of it any more")

    async def _found_again(self) -> bool:
        """Whether it was not the host that was lost, but our own way to ask Ray."""
        if not self.host.cluster.lost:
            return False
        try:
            self.host = await self._again()
            for kernel in self._kernels.values():
                kernel.moved(self.host)
        except HostLostError:
            return False
        except (VmError, HostSilentError, HostFailedError) as error:
            await self._judge_silence(list(self._kernels), str(error))
        return True

    async def _judge_silence(self, ids: list[str], why: str) -> None:
        silence = time.monotonic() - self._heard
        kernels = {name: self._kernels[name] for name in ids if name in self._kernels}
        told = await asyncio.gather(*(refused(*kernel.shell) for kernel in kernels.values()))
        for (name, kernel), gone in zip(kernels.items(), told, strict=True):
            if gone:
                self._lose([name], f"the kernel is gone, and its host does not answer ({why})")
            elif silence >= kernel.lease + SLACK:
                self._lose([name], f"it has not been heard of for {silence:.0f} s")
                self._abandoned[name] = time.monotonic() + ABANDONED_FOR
        if silence >= TOLD_AFTER and not self._told:
            self._told = True
            for name in ids:
                if name in self._kernels:
                    self._kernels[name].silent(silence)

    def _lose(self, ids: list[str], why: str) -> None:
        for name in ids:
            kernel = self._kernels.pop(name, None)
            if kernel is not None:
                kernel.lost(f"{self.host.label}: {why}")
