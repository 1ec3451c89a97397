"""The thread behind every kernel of a cluster in this process: relays, leases, clusters.  Floor 5.

A front end's own event loop may be closed between two calls (nbclient), be blocked by a handler, or
be one of several; what keeps a kernel alive cannot depend on it.  So `Driver.get` has one daemon
thread with an event loop of its own, made when the first kernel starts and ended a while after the
last one.  A process that is forked off has none of it and gets its own.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import threading
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from vmkernel.cluster.lease import HostLink
from vmkernel.cluster.placement import HOST_ERRORS, Cluster, Host
from vmkernel.errors import VmError

if TYPE_CHECKING:
    from vmkernel.cluster.kernel import ClusterKernel
    from vmkernel.settings import Settings

LINGER = 60.0
"""Seconds that thread and cluster are kept after the last kernel: the next one starts at once."""
READY_INTERVAL = 5.0
"""Seconds between two looks for hosts that are new."""
HELLO_INTERVAL = 60.0
"""Seconds after which a host that is ready is asked again; an actor that ended itself for want of
kernels is made again by that."""
AVOID = 20.0
"""Seconds for which a host that had no slot after all is not asked again."""
EXIT_TIMEOUT = 8.0
"""Seconds at most that the end of the process is held up for kernels nobody shut down."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Driver:
    """One per process: `get`.  `run` brings coroutines into its loop; all else belongs to it."""

    _lock = threading.Lock()
    _instance: Driver | None = None

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._clusters: dict[str, Cluster] = {}
        self._joining: dict[str, asyncio.Task[Cluster]] = {}
        self._links: dict[tuple[str, str], HostLink] = {}
        self._kernels: set[ClusterKernel] = set()
        self._avoided: dict[str, float] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._claimed = 0.0
        """When `get` was called last: a kernel is about to `enter`"""
        self._closing: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._serve, name="vmkernel-driver", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Driver: {len(self._kernels)} kernels, {len(self._links)} hosts>"

    @classmethod
    def get(cls) -> Driver:
        """The driver of this process."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls()
                atexit.register(cls._instance.stop)
            cls._instance._claimed = time.monotonic()
            return cls._instance

    @classmethod
    def _forget(cls) -> None:
        """In a process that was forked off: thread and lock are the parent's."""
        cls._lock = threading.Lock()
        if cls._instance is not None:
            atexit.unregister(cls._instance.stop)
            for cluster in cls._instance._clusters.values():
                cluster.forget()
        cls._instance = None

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Run *coroutine* in the driver's loop, from any thread."""
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            raise

    async def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Await *coroutine*, which runs in the driver's loop, in the caller's."""
        return await asyncio.wrap_future(self.submit(coroutine))

    def spawn(self, coroutine: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """A task of the driver's loop that nobody need hold; call it there."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def stop(self) -> None:
        """End every kernel and the thread; idempotent.  Waits EXIT_TIMEOUT seconds at most."""
        with Driver._lock:
            if Driver._instance is self:
                Driver._instance = None
        atexit.unregister(self.stop)
        if not self._thread.is_alive():
            return
        if threading.current_thread() is self._thread:
            self.spawn(self._close())
            return
        with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError, RuntimeError):
            self.submit(self._close()).result(EXIT_TIMEOUT)
        self._thread.join(1.0)

    # Below: in the driver's loop

    def enter(self, kernel: ClusterKernel) -> None:
        """A kernel that needs the driver, until `leave`."""
        self._kernels.add(kernel)
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None

    def leave(self, kernel: ClusterKernel) -> None:
        """It is no more; the last one ends thread and clusters a while later."""
        self._kernels.discard(kernel)
        if not self._kernels and self._closing is None:
            self._closing = self._loop.call_later(LINGER, self._retire)

    def _retire(self) -> None:
        # Under the lock: a kernel that starts now has either entered or gets a new driver
        with Driver._lock:
            self._closing = None
            if self._kernels or Driver._instance is not self:
                return
            if time.monotonic() - self._claimed < LINGER:
                self._closing = self._loop.call_later(LINGER, self._retire)
                return
            Driver._instance = None
        self.stop()

    async def cluster(self, settings: Settings) -> Cluster:
        """The cluster of these settings, joined once for all kernels.  Raises VmError."""
        address = settings.cluster_address
        cluster = self._clusters.get(address)
        if cluster is not None and not cluster.lost:
            return cluster
        joining = self._joining.get(address)
        if joining is None:
            joining = self._joining[address] = self.spawn(self._join(settings))
            joining.add_done_callback(lambda _: self._joining.pop(address))
        # One attempt for all that wait, whichever of them gives up
        return await asyncio.shield(joining)

    async def _join(self, settings: Settings) -> Cluster:
        former = self._clusters.pop(settings.cluster_address, None)
        if former is not None:
            await former.close()
        cluster = self._clusters[settings.cluster_address] = await Cluster.join(settings)
        self.spawn(self._keep_ready(cluster))
        return cluster

    async def link(self, settings: Settings, host: Host) -> HostLink:
        """The contact with one host, which renews the leases of this process's kernels on it."""
        key = (settings.cluster_address, host.facts.node_id)
        link = self._links.get(key)
        if link is None or link.closed:

            async def again() -> Host:
                return await (await self.cluster(settings)).host(host.facts.node_id)

            link = self._links[key] = HostLink(host, again)
            self.spawn(link.run())
        return link

    def avoid(self, host: Host) -> None:
        """It had no slot, though Ray thought so: let the next kernels go elsewhere for a while."""
        self._avoided[host.facts.node_id] = time.monotonic() + AVOID

    def avoided(self) -> frozenset[str]:
        """The ids of the nodes that are to be avoided now."""
        now = time.monotonic()
        self._avoided = {node: end for node, end in self._avoided.items() if end > now}
        return frozenset(self._avoided)

    async def _keep_ready(self, cluster: Cluster) -> None:
        """Have the actors of all hosts up before a kernel needs them."""
        seen: dict[str, float] = {}
        while not cluster.lost:
            with contextlib.suppress(*HOST_ERRORS):
                for host in await cluster.hosts():
                    node = host.facts.node_id
                    due = time.monotonic() - seen.get(node, -HELLO_INTERVAL) >= HELLO_INTERVAL
                    if host.facts.alive and host.facts.slots and due and self._kernels:
                        seen[node] = time.monotonic()
                        self.spawn(self._make_ready(host))
            await asyncio.sleep(READY_INTERVAL)

    async def _make_ready(self, host: Host) -> None:
        try:
            await host.ready()
        except (VmError, *HOST_ERRORS) as error:
            _log.warning("The VM host %s is not ready: %s", host.label, error)

    async def _close(self) -> None:
        kernels = [asyncio.ensure_future(kernel.close()) for kernel in self._kernels]
        if kernels:
            await asyncio.wait(kernels, timeout=EXIT_TIMEOUT / 2)
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        for cluster in self._clusters.values():
            await cluster.close()
        self._loop.call_soon(self._loop.stop)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            rest = asyncio.all_tasks(self._loop)
            for task in rest:
                task.cancel()
            if rest:
                self._loop.run_until_complete(asyncio.wait(rest, timeout=1))
        finally:
            self._loop.close()


os.register_at_fork(after_in_child=Driver._forget)
