"""The model: kernels that want a VM slot of a cluster, as discrete events (simpy).

`Cluster.session` is the life of one kernel: it asks Ray's head, starts on the host that it gets,
asks elsewhere when that host has no slot after all, runs, and ends, with its host if that dies.
Time is in seconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import simpy

from simulation.figures import Figures
from simulation.hosts import Free, Head, Host, Request, Steps

_WAITED = 0.01
"""Seconds above which a request is said to have waited."""


@dataclass(frozen=True)
class Setup:
    """A cluster."""

    hosts: int = 10
    slots: int = 20
    processors: int = 8
    pool: int = 1
    """Kernels that wait ready on each host (setting ``pool_size``)"""
    order: str = "ray"
    foreign: float = 0.0
    """Share of slots that VMs have which Ray does not count"""
    wait: float | None = None
    """Seconds after which one gives up (setting ``cluster_wait``)"""
    watchers: int | None = None
    """How many waiting kernels one driver can watch at once, each for a second; None: all"""


@dataclass
class Told:
    """What became of one request."""

    asked: float
    slot: float | None = None
    """Seconds until it had a slot on a host that it could use"""
    first: float | None = None
    """Seconds until its first result"""
    tries: int = 0
    outcome: str = "waits"
    """then "ran", "lost", "refused" or "gave up" """


@dataclass
class Cluster:
    """The cluster `setup`, with `figures`; what its requests met with is in `told`."""

    setup: Setup
    figures: Figures
    seed: int = 1
    told: list[Told] = field(default_factory=list)

    def __post_init__(self) -> None:
        setup = self.setup
        self.rng = random.Random(self.seed)
        self.env = simpy.Environment()
        self.hosts = [
            Host(self.env, number, setup.slots, setup.processors, setup.pool)
            for number in range(setup.hosts)
        ]
        self.head = Head(self.env, Free(self.hosts, self.rng), self.figures, setup.order)
        self._avoided: dict[int, float] = {}
        self._watchers = simpy.Resource(self.env, setup.watchers) if setup.watchers else None
        for number in range(round(setup.foreign * setup.hosts * setup.slots)):
            self.hosts[number % setup.hosts].used += 1

    @property
    def capacity(self) -> int:
        """Slots of all hosts."""
        return self.setup.hosts * self.setup.slots

    # --- who comes ---

    def poisson(self, load: float, hold: float, until: float, *, filled: bool = True) -> None:
        """Requests at random, until a time; as many VMs run at the beginning as will later."""
        rate = load * self.capacity / hold
        if filled:
            for _ in range(round(min(load, 1.0) * self.capacity)):
                self.come(self.rng.expovariate(1 / hold))

        def arrive() -> Steps:
            while self.env.now < until:
                yield self.env.timeout(self.rng.expovariate(rate))
                self.come(self.rng.expovariate(1 / hold))

        self.env.process(arrive())

    def come(self, hold: float, after: float = 0.0) -> None:
        """One request, which keeps its VM for *hold* seconds."""

        def later() -> Steps:
            yield self.env.timeout(after)
            yield self.env.process(self.session(hold))

        self.env.process(later() if after else self.session(hold))

    # --- one kernel's life ---

    def session(self, hold: float, again: bool = True) -> Steps:
        """The life of a kernel; when its host is lost, its user asks for another (*again*)."""
        told = Told(self.env.now)
        self.told.append(told)
        host = yield from self._place(told)
        if host is None:
            return
        this, life = self.env.active_process, host.lives
        host.kernels.add(this)
        began = self.env.now
        try:
            yield from self._start(host)
            told.first = self.env.now - told.asked
            yield self.env.timeout(hold)
            told.outcome = "ran"
        except simpy.Interrupt as cut:
            told.outcome = "lost"
            # The front end sees it so much later; the slot's fate is its host's
            yield self.env.timeout(cut.cause)
            if again:
                self.env.process(self.session(max(0.0, hold - (self.env.now - began))))
            return
        finally:
            host.kernels.discard(this)
        if self.figures.end:
            yield self.env.timeout(self.figures.end)
        if host.alive and host.lives == life:
            self._leave(host)
            self.head.release(host)

    def _place(self, told: Told) -> Steps:
        figures = self.figures
        while told.tries < figures.tries:
            host = yield from self._reserve(told)
            if host is None:
                told.outcome = "gave up"
                return None
            told.tries += 1
            life = host.lives
            if figures.call:
                yield self.env.timeout(figures.call)
            if not host.alive:  # the call fails when Ray knows
                yield self.env.timeout(figures.node_death)
            elif host.used < host.slots:
                host.used += 1
                told.slot = self.env.now - told.asked
                return host
            else:
                yield self.env.timeout(figures.refusal)
            if host.alive and host.lives == life:
                self.head.release(host)
            self._avoided[host.number] = self.env.now + figures.avoid
            jitter = self.rng.uniform(0.5, 1.5)
            yield self.env.timeout(figures.backoff * 2 ** (told.tries - 1) * jitter)
        told.outcome = "refused"
        return None

    def _reserve(self, told: Told) -> Steps:
        now = self.env.now
        self._avoided = {host: end for host, end in self._avoided.items() if end > now}
        avoid = frozenset(self._avoided)
        if avoid and len(avoid) >= sum(host.alive for host in self.hosts):
            avoid = frozenset()
        end = None if self.setup.wait is None else told.asked + self.setup.wait
        part = 10.0 if avoid else None  # the others may be full, and stay so
        while True:
            request = self.head.ask(avoid)
            yield from self._watch(request, part, end)
            if request.granted.triggered:
                return request.granted.value
            self.head.withdraw(request)
            if end is not None and self.env.now >= end:
                return None
            avoid, part = frozenset(), None

    def _watch(self, request: Request, part: float | None, end: float | None) -> Steps:
        """Until it is granted, and the driver sees that; or for so long."""
        granted = request.granted
        limits = [moment for moment in (end, part and self.env.now + part) if moment is not None]
        limit = min(limits, default=None)
        if self._watchers is None:
            left = [] if limit is None else [self.env.timeout(max(0.0, limit - self.env.now))]
            yield granted | left[0] if left else granted
            return
        turn = 0.2
        while limit is None or self.env.now < limit:
            with self._watchers.request() as watcher:
                yield watcher
                if not granted.triggered:
                    yield granted | self.env.timeout(turn)
            if granted.triggered:
                return
            turn = 1.0

    def _start(self, host: Host) -> Steps:
        """From the pool, or past it; a free processor is needed for either."""
        figures = self.figures
        took = figures.start
        if host.ready:
            host.ready -= 1
            took = figures.start_ready
            self.env.process(self._refill(host))
        if took:
            with host.processors.request() as processor:
                yield processor
                yield self.env.timeout(took)

    def _refill(self, host: Host) -> Steps:
        yield self.env.timeout(self.figures.refill_pause)
        with host.processors.request() as processor:
            yield processor
            yield self.env.timeout(self.figures.start)
        if host.used < host.slots:
            host.ready += 1
        else:  # a member gives way to who needs its slot: made when there is one
            host.owed += 1

    def _leave(self, host: Host) -> None:
        """A slot of the host's is free again."""
        host.used -= 1
        if host.owed:
            host.owed -= 1
            self.env.process(self._refill(host))

    # --- trouble ---

    def lose(self, host: Host, at: float, seen: float, back: float, kept: float = 0.0) -> None:
        """The host dies, or is cut off, at a time.

        *seen* seconds later its kernels' front ends know; *back* seconds later it is part of the
        cluster again, and has been told, or has found, that nobody wants its kernels: then (if it
        was cut off) those that are left keep their slots for *kept* seconds more.
        """

        def happen() -> Steps:
            yield self.env.timeout(at)
            host.alive = False
            victims = len(host.kernels)
            for kernel in list(host.kernels):
                kernel.interrupt(seen)
            yield self.env.timeout(self.figures.node_death)
            self.head.free.remove(host)
            yield self.env.timeout(max(0.0, back - self.figures.node_death))
            host.alive, host.used = True, 0
            host.ready, host.owed = self.setup.pool, 0
            host.lives += 1
            host.counted = host.slots
            if kept:  # orphans: the semaphore file counts them, Ray does not
                host.used = victims
            self.head.free.add(host)
            if kept:
                for _ in range(victims):
                    self.env.process(self._orphan(host, self.rng.expovariate(1 / kept)))

        self.env.process(happen())

    def _orphan(self, host: Host, left: float) -> Steps:
        yield self.env.timeout(left)
        self._leave(host)

    # --- what came of it ---

    def waits(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Seconds until a slot, of those that came within this time."""
        return [
            one.slot for one in self.told if since <= one.asked < until and one.slot is not None
        ]

    def firsts(self, since: float = 0.0) -> list[float]:
        """Seconds until the first result, of those that came since."""
        return [one.first for one in self.told if one.asked >= since and one.first is not None]


def quantile(values: list[float], share: float) -> float:
    """The value that this *share* does not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def waited(values: list[float]) -> float:
    """The share that waited at all."""
    return sum(value > _WAITED for value in values) / len(values) if values else 0.0
