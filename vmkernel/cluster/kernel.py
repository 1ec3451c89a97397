"""One kernel of a cluster, as its front end sees it: waits for a slot, runs somewhere, ends.

Floor 5.  A `ClusterKernel` has the relay that front ends are connected to for its whole life, while
the kernel behind it may be started several times, on several hosts.  It belongs to the loop of
`vmkernel.cluster.driver`; only ``exit_code`` is read from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import signal
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vmkernel.cluster.placement import (
    Host,
    HostFailedError,
    HostLostError,
    HostSilentError,
    Reservation,
    backoff,
)
from vmkernel.cluster.relay import Relay
from vmkernel.errors import VmCapacityError, VmError, VmGuestError, VmHostLostError

if TYPE_CHECKING:
    from vmkernel.cluster.driver import Driver
    from vmkernel.cluster.lease import HostLink
    from vmkernel.settings import Settings

MOST_TRIES = 5
"""Hosts that are asked, when one after the other has no slot after all."""
START_TIMEOUT = 330.0
"""Seconds until a host has a VM for us: its own limits (boot_timeout for a first template) are
shorter."""
CALL_TIMEOUT = 5.0
"""Seconds for what a host does at once."""
WATCH = 10.0
"""Seconds of one question whether the kernel has ended yet, while it is being shut down."""
KEPT = 10.0
"""Seconds for which the slot of a kernel that died is kept for its restart."""
AVOID_WAIT = 10.0
"""Seconds to wait for a slot elsewhere than on the hosts that are avoided."""
LOST_CODE = 255
"""The exit code of a kernel whose host was lost."""

_HOST_ERRORS = (HostLostError, HostSilentError, HostFailedError)
_log = logging.getLogger(__name__)


class State(enum.Enum):
    """Where a kernel is in its life."""

    NEW = "new"
    PLACING = "placing"
    """waits for a slot, or is being started"""
    FAILED = "failed"
    """no slot; tries again when somebody has work for it"""
    RUNNING = "running"
    ENDED = "ended"


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


class ClusterKernel:
    """A kernel and its relay.  `launch` may be called again after it ended; `close` is the end."""

    def __init__(self, kernel_id: str, driver: Driver, settings: Settings) -> None:
        self.kernel_id = kernel_id
        self.lease = settings.cluster_lease
        self.exit_code: int | None = None
        """None while it is alive, which it is as well while it waits for a slot."""
        self.state = State.NEW
        self._driver = driver
        self._settings = settings
        self._relay: Relay | None = None
        self._order: Order | None = None
        self._placing: asyncio.Task[None] | None = None
        self._reservation: Reservation | None = None
        self._release: asyncio.TimerHandle | None = None
        self._running: Running | None = None
        self._starts = 0
        self._shutdown = False
        self._watching: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    def __repr__(self) -> str:
        where = f" on {self._running.host.label}" if self._running else ""
        return f"<ClusterKernel {self.kernel_id}: {self.state.value}{where}>"

    @property
    def shell(self) -> tuple[str, int]:
        """Where it listens, on its host."""
        assert self._running is not None
        return str(self._running.info["ip"]), int(self._running.info["shell_port"])

    def statistics(self) -> dict[str, Any]:
        """What `RayProvisioner.get_provisioner_info` tells of it."""
        running = self._running
        return {
            "state": self.state.value,
            "host": running.host.facts._asdict() if running else None,
            "remote_id": running.name if running else None,
            "remote": running.info if running else None,
            "starts": self._starts,
        }

    async def launch(
        self, info: Mapping[str, Any], order: Order, failure: VmError | None = None
    ) -> dict[str, Any]:
        """Open the relay if there is none, begin to look for a slot, and return at once.

        *info* is the front end's connection information; returned with the ports that are bound.
        With a *failure*, nothing is begun: it is the answer to every cell until the next launch.
        Raises VmError: the ports cannot be bound.
        """
        self._driver.enter(self)
        if self._relay is None:
            relay = Relay(info)
            relay.on_work = self._on_work
            relay.on_shutdown = self._on_shutdown
            await relay.open()
            self._relay = relay
        else:
            self._relay.waiting()
        self._order = order if failure is None else None
        if failure is None:
            self._begin()
        else:
            self.exit_code = None
            self._fail(failure)
        return self._relay.info

    async def adopt(self, info: Mapping[str, Any], order: Order, told: Mapping[str, Any]) -> None:
        """Take over a kernel that another process started (`statistics` is what that one *told*).

        Raises VmError: the ports are taken, or the kernel cannot be reached any more.
        """
        self._driver.enter(self)
        self._order = order
        self._relay = relay = Relay(info)
        relay.on_work = self._on_work
        relay.on_shutdown = self._on_shutdown
        await relay.open()
        self._starts = int(told["starts"])
        cluster = await self._driver.cluster(self._settings)
        try:
            host = await cluster.host(told["host"]["node_id"])
            states = await host.call("renew", [told["remote_id"]], timeout=CALL_TIMEOUT)
        except _HOST_ERRORS as error:
            raise VmHostLostError(f"The kernel's host cannot be reached: {error}") from error
        if states.get(told["remote_id"], {}).get("state") != "running":
            raise VmHostLostError(f"The kernel does not run on {host.label} any more")
        self.exit_code, self.state = None, State.PLACING
        await self._run(told["remote_id"], host, dict(told["remote"]))
        self._driver.spawn(self._reserve_again(host))

    async def signal(self, signum: int) -> None:
        """Send a signal to the kernel's process; before there is one, an end is its end."""
        if self._running is None:
            if signum in (signal.SIGTERM, signal.SIGKILL):
                self._on_shutdown(False)
            return
        with contextlib.suppress(*_HOST_ERRORS):
            await self._running.host.call(
                "signal", self._running.name, int(signum), timeout=CALL_TIMEOUT
            )

    def watch_shutdown(self) -> None:
        """It was asked to shut down: learn at once when it has."""
        self._shutdown = True
        if self._running is None:
            self._on_shutdown(False)
        elif self._watching is None:
            self._watching = self._driver.spawn(self._watch(self._running))

    async def end(self) -> None:
        """Kill it, whatever it does; idempotent."""
        self._shutdown = True
        await self._stop_placing()
        running = self._running
        if running is None:
            self._finish(0 if self.exit_code is None else self.exit_code)
            return
        running.link.remove(running.name)
        try:
            await running.host.call("end", running.name, kill=True, timeout=CALL_TIMEOUT)
        except _HOST_ERRORS:
            running.link.abandon(running.name)
        if self._running is running:
            self._finish(-signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit code, when it has ended."""
        await self._over.wait()
        return self.exit_code or 0

    async def close(self) -> None:
        """End it, and give everything back; idempotent."""
        await self.end()
        await self._give_back()
        if self._relay is not None:
            relay, self._relay = self._relay, None
            await relay.close()
        self._driver.leave(self)

    # --- what the host's link says (`vmkernel.cluster.lease.Leased`) ---

    def ended(self, exit_code: int) -> None:
        """Its process ended, on a host that lives."""
        if self._running is None:
            return
        host = self._running.host.label
        if not self._shutdown and self._relay is not None:
            why = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
            self._relay.fail(
                VmGuestError(
                    f"The kernel on {host} ended ({why})",
                    hint="restart the kernel; its log is on that host (`vmkernel logs`)",
                    code_ran="unknown",
                )
            )
        self._finish(exit_code)
        # Its restart goes to the same host, if it comes soon
        self._release = asyncio.get_running_loop().call_later(
            KEPT, lambda: self._driver.spawn(self._give_back())
        )

    def lost(self, why: str) -> None:
        """Its host is gone, or was given up."""
        if self._running is None:
            return
        if self._relay is not None:
            self._relay.fail(
                VmHostLostError(
                    f"The VM's host was lost: {why}",
                    hint="restart the kernel: it gets a VM on another host; what it had in memory "
                    "is gone",
                    code_ran="unknown",
                )
            )
        self._driver.spawn(self._give_back())
        self._finish(LOST_CODE)

    def silent(self, seconds: float) -> None:
        """There has been no contact with its host for that long."""
        if self._relay is not None and self._running is not None:
            self._relay.warn(
                f"no contact with {self._running.host.label} for {seconds:.0f} s; the kernel is "
                f"given up after {self.lease:g} s"
            )

    # --- placing ---

    def _begin(self) -> None:
        self.exit_code, self.state = None, State.PLACING
        self._over.clear()
        self._shutdown = False
        self._placing = self._driver.spawn(self._place())

    def _fail(self, error: VmError) -> None:
        """Have every request answered with *error*, for now: a cell tries to place it again."""
        self.state = State.FAILED
        if self._relay is not None:
            self._relay.fail(error)

    def _on_work(self) -> None:
        if self.state is State.FAILED and self._relay is not None and self._order is not None:
            self._relay.waiting()
            self._begin()

    def _on_shutdown(self, restart: bool) -> None:
        """Asked to end before there is a kernel; a restart begins by that, too."""
        if self._placing is not None:
            self._placing.cancel()
        if self._running is None:
            self._finish(0)

    async def _place(self) -> None:
        try:
            await self._try_hosts()
        except VmError as error:
            self._fail(error)
        except _HOST_ERRORS as error:
            self._fail(
                VmError(
                    f"The cluster does not answer: {error}",
                    hint="run the cell again to try again; `ray status` on the head says what is "
                    "wrong there",
                )
            )
        except Exception as error:
            _log.exception("a kernel could not be placed")
            self._fail(VmError(f"The kernel could not be placed: {type(error).__name__}: {error}"))

    async def _try_hosts(self) -> None:
        """Start on one host after the other, until one has a VM."""
        assert self._relay is not None
        wait = self._settings.cluster_wait
        end = None if wait is None else time.monotonic() + wait
        told = ""
        for attempt in range(1, MOST_TRIES + 1):
            reservation = await self._reserve(end)
            self._relay.say(f"starting a VM on {reservation.host.label}")
            try:
                answer = await self._start(reservation.host)
            except _HOST_ERRORS as error:
                answer = {"refused": "host", "message": str(error)}
            if "info" in answer:
                return
            await self._give_back()
            self._driver.avoid(reservation.host)
            told = f"{reservation.host.label}: {answer.get('message') or answer.get('error')}"
            if "error" in answer:
                problem = VmError(told, hint=str(answer.get("hint") or ""))
            else:
                problem = VmCapacityError(
                    f"{attempt} hosts of the cluster had no VM slot after all, the last one {told}",
                    hint="VMs that the cluster does not count may run there (`vmkernel ps`): give "
                    "the cluster the slots that it may have (`vmkernel capacity`)",
                )
            if attempt == MOST_TRIES:
                raise problem
            self._relay.say(f"{told}; trying another host")
            await asyncio.sleep(backoff(attempt))

    async def _reserve(self, end: float | None) -> Reservation:
        """The slot that is kept, or a new one; not where there was none a moment ago."""
        assert self._relay is not None
        if self._release is not None:
            self._release.cancel()
            self._release = None
        kept = self._reservation
        if kept is not None:
            if not kept.host.cluster.lost and kept.host.facts.alive:
                return kept
            await self._give_back()
        self._relay.say("joining the cluster")
        cluster = await self._driver.cluster(self._settings)
        avoid = self._driver.avoided()
        name = f"vmkernel-{self.kernel_id}"
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            # Nobody is avoided for long: the others may be full, and stay so
            part = min(left, AVOID_WAIT) if avoid and left is not None else left
            part = AVOID_WAIT if avoid and part is None else part
            try:
                self._reservation = await cluster.reserve(
                    name, avoid=avoid, timeout=part, say=self._relay.say
                )
                return self._reservation
            except VmCapacityError:
                if not avoid or part == left:
                    raise
                avoid = frozenset()

    async def _start(self, host: Host) -> dict[str, Any]:
        """Ask *host* for a kernel; its answer, with "info" when it has started one."""
        assert self._order is not None
        assert self._relay is not None
        self._starts += 1
        name = self.kernel_id if self._starts == 1 else f"{self.kernel_id}.{self._starts}"
        local = self._relay.info
        request = {
            "kernel_id": name,
            "kernel_name": self._order.kernel_name,
            "key": _text(local.get("key", "")),
            "signature_scheme": local.get("signature_scheme", "hmac-sha256"),
            "env": self._order.env,
            "cwd": self._order.cwd,
            "lease": self.lease,
            "argv": self._order.argv,
        }
        link = await self._driver.link(self._settings, host)
        answer: dict[str, Any] = {}
        try:
            answer = await host.call("start", request, timeout=START_TIMEOUT, make=True)
            if "info" in answer:
                await self._run(name, host, answer["info"])
                for note in answer.get("notes", ()):
                    self._relay.warn(note)
        finally:
            # Also when this is cancelled in the midst of it: the host may have started it
            if self._running is None and "refused" not in answer and "error" not in answer:
                link.abandon(name)
        return answer

    async def _run(self, name: str, host: Host, info: dict[str, Any]) -> None:
        """A kernel runs there: connect, and renew its lease from now on."""
        assert self._relay is not None
        link = await self._driver.link(self._settings, host)
        self._running = Running(name, host, link, info)
        self.state = State.RUNNING
        link.add(name, self)
        await self._relay.connect(info)

    async def _reserve_again(self, host: Host) -> None:
        """A slot for a kernel that runs already: its former reservation ended with its owner."""
        with contextlib.suppress(VmError, *_HOST_ERRORS):
            reservation = await host.cluster.reserve(
                f"vmkernel-{self.kernel_id}", only=host.facts.node_id, timeout=self.lease
            )
            if self._running is None:
                await reservation.release()
            else:
                self._reservation = reservation

    # --- the end ---

    async def _watch(self, running: Running) -> None:
        """Ask the host until the kernel has ended; the link's renewals would be too slow."""
        with contextlib.suppress(*_HOST_ERRORS):
            while self._running is running:
                code = await running.host.call("wait", running.name, WATCH, timeout=WATCH + 5)
                if code is not None and self._running is running:
                    running.link.remove(running.name)
                    self._finish(code)

    def _finish(self, exit_code: int) -> None:
        """It has ended."""
        if self._running is not None:
            self._running.link.remove(self._running.name)
        self._running, self._watching = None, None
        self.state = State.ENDED
        self.exit_code = exit_code
        self._over.set()

    async def _stop_placing(self) -> None:
        placing, self._placing = self._placing, None
        if placing is not None and placing is not asyncio.current_task():
            placing.cancel()
            await asyncio.wait([placing])

    async def _give_back(self) -> None:
        """Release the slot; idempotent."""
        if self._release is not None:
            self._release.cancel()
            self._release = None
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            await reservation.release()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
