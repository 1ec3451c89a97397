"""The hosts of the model, and Ray's head with its count of slots and its queue."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Collection, Generator
from typing import Any

import simpy

from simulation.figures import Figures

Steps = Generator[simpy.Event, Any, Any]


class Host:
    """A VM host: the slots of its semaphore file, its processors, and its ready pool."""

    def __init__(
        self, env: simpy.Environment, number: int, slots: int, processors: int, pool: int
    ) -> None:
        self.number = number
        self.slots = slots
        self.used = 0
        """What the semaphore file counts: our VMs and others'"""
        self.counted = slots
        """What Ray believes to be free"""
        self.alive = True
        self.lives = 1
        """Raised when it comes back from the dead: what was before is no business of the new one"""
        self.ready = pool
        self.owed = 0
        """Members of the pool that are not made, since the host is full"""
        self.processors = simpy.Resource(env, processors)
        self.kernels: set[simpy.Process] = set()

    def __repr__(self) -> str:
        return f"<Host {self.number}: {self.used} of {self.slots}, Ray: {self.counted} free>"


class Free:
    """Hosts by how many slots Ray believes to be free on them: the one with the most comes first.

    So does Ray's SPREAD with groups of one bundle.
    """

    def __init__(self, hosts: Collection[Host], rng: random.Random) -> None:
        most = max(host.slots for host in hosts)
        self._rows: list[list[Host]] = [[] for _ in range(most + 1)]
        self._place: dict[int, int] = {}
        self._rng = rng
        self.total = 0
        for host in hosts:
            self.total += host.counted
            self._put(host)

    def take(self, avoid: Collection[int]) -> Host | None:
        """A slot on some host with the most free ones, which is not among *avoid*."""
        for row in reversed(self._rows[1:]):
            if row:
                host = row[self._rng.randrange(len(row))]
                if host.number in avoid:
                    others = [other for other in row if other.number not in avoid]
                    if not others:
                        continue
                    host = self._rng.choice(others)
                self._change(host, -1)
                return host
        return None

    def give(self, host: Host) -> None:
        """A slot of *host* is free again, as Ray sees it."""
        self._change(host, 1)

    def remove(self, host: Host) -> None:
        """Ray knows that the host is dead."""
        self._drop(host)
        self.total -= host.counted

    def add(self, host: Host) -> None:
        """A host joins."""
        self.total += host.counted
        self._put(host)

    def _change(self, host: Host, by: int) -> None:
        self._drop(host)
        host.counted += by
        self.total += by
        self._put(host)

    def _put(self, host: Host) -> None:
        row = self._rows[host.counted]
        self._place[host.number] = len(row)
        row.append(host)

    def _drop(self, host: Host) -> None:
        row, place = self._rows[host.counted], self._place.pop(host.number)
        last = row.pop()
        if last is not host:
            row[place] = last
            self._place[last.number] = place


class Request:
    """One that waits for a slot: `granted` succeeds with the host."""

    def __init__(self, env: simpy.Environment, avoid: Collection[int]) -> None:
        self.granted = env.event()
        self.avoid = avoid
        self.retry = 0.0
        self.withdrawn = False


class Head:
    """Ray's head: one thing at a time.

    In ``order`` "ray", as `GcsPlacementGroupManager` does it: each request has a time from which it
    may be tried; a try that fails puts it off, by 0.1 s and then half as much again, 1 s at most;
    what is due is tried when a new request comes and at each tick.  So a slot that becomes free
    is seen at the next tick, and who comes before that takes it.  In order "fifo" a free slot goes
    to who has waited longest, at once.
    """

    def __init__(
        self, env: simpy.Environment, free: Free, figures: Figures, order: str = "ray"
    ) -> None:
        self.free = free
        self.busy = 0.0
        """Seconds for which it worked"""
        self.waiting = 0
        self._env = env
        self._figures = figures
        self._fifo = order == "fifo"
        self._queue: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()
        self._working = False
        if not self._fifo:
            env.process(self._tick())

    def ask(self, avoid: Collection[int] = ()) -> Request:
        """Ask for a slot."""
        request = Request(self._env, avoid)
        self.waiting += 1
        self._push(self._env.now, request)
        self._look()
        return request

    def withdraw(self, request: Request) -> None:
        """It is not wanted any more."""
        request.withdrawn = True
        self.waiting -= 1

    def release(self, host: Host) -> None:
        """A slot is free again."""
        self.free.give(host)
        if self._fifo:
            self._look()

    def _push(self, due: float, request: Request) -> None:
        heapq.heappush(self._queue, (due, next(self._numbers), request))

    def _look(self) -> None:
        if not self._working and self._queue:
            self._working = True
            self._env.process(self._work())

    def _tick(self) -> Steps:
        while True:
            yield self._env.timeout(self._figures.tick)
            self._look()

    def _work(self) -> Steps:
        figures, env = self._figures, self._env
        while self._queue and (self._fifo or self._queue[0][0] <= env.now):
            if self._fifo and not self.free.total:
                break
            due, _, request = heapq.heappop(self._queue)
            if request.withdrawn:
                continue
            host = self.free.take(request.avoid)
            took = figures.look if host is None else figures.reserve
            if took:
                self.busy += took
                yield env.timeout(took)
            if host is None:
                if self._fifo:  # only hosts that it avoids have one
                    self._push(due, request)
                    break
                retry = request.retry * figures.retry_factor or figures.retry_first
                request.retry = min(retry, figures.retry_most)
                self._push(env.now + request.retry, request)
            elif request.withdrawn:
                self.free.give(host)
            else:
                self.waiting -= 1
                request.granted.succeed(host)
        self._working = False
