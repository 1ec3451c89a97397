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
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmkernel.cluster.placement import HOST_ERRORS, Host
from vmkernel.cluster.relay import Relay
from vmkernel.cluster.search import Order, Running, Search
from vmkernel.errors import VmError, VmGuestError, VmHostLostError

if TYPE_CHECKING:
    from vmkernel.cluster.driver import Driver
    from vmkernel.settings import Settings

CALL_TIMEOUT = 5.0
"""Seconds for what a host does at once."""
WATCH = 10.0
"""Seconds of one question whether the kernel has ended yet, while it is being shut down."""
KEPT = 10.0
"""Seconds for which the slot of a kernel that died is kept for its restart."""
LOST_CODE = 255
"""The exit code of a kernel whose host was lost."""

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


class ClusterKernel:
    """A kernel and its relay.  `launch` may be called again after it ended; `close` is the end."""

    def __init__(
        self,
        kernel_id: str,
        driver: Driver,
        settings: Settings,
        kernel_info: Mapping[str, Any] | None = None,
    ) -> None:
        """*kernel_info* is what is known of the kernel before it is there."""
        self.kernel_id = kernel_id
        self.lease = settings.cluster_lease
        self.exit_code: int | None = None
        """None while it is alive, which it is as well while it waits for a slot."""
        self.state = State.NEW
        self._driver = driver
        self._settings = settings
        self._kernel_info = kernel_info
        self._relay: Relay | None = None
        self._order: Order | None = None
        self._placing: asyncio.Task[None] | None = None
        self._running: Running | None = None
        self._search = Search(kernel_id, driver, settings)
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
            "starts": self._search.starts,
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
        await self._stop_placing()
        if self._relay is None:
            self._relay = await self._open(info)
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
        self._relay = await self._open(info)
        self._search.starts = int(told["starts"])
        if told["host"] is None:  # it waited for a slot
            self._begin()
            return
        cluster = await self._driver.cluster(self._settings)
        try:
            host = await cluster.host(told["host"]["node_id"])
            states = await host.call("renew", [told["remote_id"]], timeout=CALL_TIMEOUT)
        except HOST_ERRORS as error:
            raise VmHostLostError(f"The kernel's host cannot be reached: {error}") from error
        if states.get(told["remote_id"], {}).get("state") != "running":
            raise VmHostLostError(f"The kernel does not run on {host.label} any more")
        self.exit_code, self.state = None, State.PLACING
        link = await self._driver.link(self._settings, host)
        await self._run(Running(told["remote_id"], host, link, dict(told["remote"]), []))
        self._driver.spawn(self._search.hold(host, lambda: self._running is not None))

    async def _open(self, info: Mapping[str, Any]) -> Relay:
        relay = Relay(info, kernel_info=self._kernel_info)
        relay.on_work = self._on_work
        relay.on_shutdown = self._on_shutdown
        try:
            await relay.open()
        except BaseException:
            self._driver.leave(self)
            raise
        return relay

    async def signal(self, signum: int) -> None:
        """Send a signal to the kernel's process; before there is one, an end is its end."""
        if signum in (signal.SIGTERM, signal.SIGKILL):
            self.watch_shutdown()
        if self._running is None:
            return
        with contextlib.suppress(*HOST_ERRORS):
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
        except HOST_ERRORS:
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
        await self._search.give_back()
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
                    f"The kernel on {host} ended: {why}",
                    hint="restart the kernel; its log is on that host (`vmkernel logs`)",
                    code_ran="unknown",
                )
            )
        self._finish(exit_code)

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
        self._finish(LOST_CODE)
        self._driver.spawn(self._search.give_back())

    def moved(self, host: Host) -> None:
        """The cluster was joined anew, by another process: what was reserved went with the old."""
        if self._running is not None:
            self._running = self._running._replace(host=host)
            self._driver.spawn(self._search.hold(host, lambda: self._running is not None))

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
        else:  # it was being connected to
            self._driver.spawn(self.end())

    async def _place(self) -> None:
        try:
            assert self._order is not None
            assert self._relay is not None
            await self._run(await self._search.find(self._order, self._relay.info, self._relay.say))
        except VmError as error:
            await self._let_go()
            self._fail(error)
        except HOST_ERRORS as error:
            self._fail(
                VmError(
                    f"The cluster does not answer: {error}",
                    hint="run the cell again to try again; `ray status` on the head says what is "
                    "wrong there",
                )
            )
        except Exception as error:
            _log.exception("a kernel could not be placed")
            await self._let_go()
            self._fail(VmError(f"The kernel could not be placed: {type(error).__name__}: {error}"))

    async def _run(self, running: Running) -> None:
        """A kernel runs there: connect, and renew its lease from now on."""
        assert self._relay is not None
        self._running = running
        self.state = State.RUNNING
        running.link.add(running.name, self)
        await self._relay.connect(running.info)
        for note in running.notes:
            self._relay.warn(note)

    async def _let_go(self) -> None:
        """It runs, but not for us: it could not be connected to."""
        running, self._running = self._running, None
        if running is not None:
            running.link.abandon(running.name)
            await self._search.give_back()

    # --- the end ---

    async def _watch(self, running: Running) -> None:
        """Ask the host until the kernel has ended; the link's renewals would be too slow."""
        with contextlib.suppress(*HOST_ERRORS):
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
        self._search.keep_for(KEPT)  # its restart goes to the same host, if it comes soon

    async def _stop_placing(self) -> None:
        placing, self._placing = self._placing, None
        if placing is not None and placing is not asyncio.current_task():
            placing.cancel()
            await asyncio.wait([placing])
