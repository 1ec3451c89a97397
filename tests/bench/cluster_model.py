"""A cluster as discrete events: how long people wait for a kernel, by load, size, pool and faults.

A model of what vmkernel.cluster does, in simpy's terms, with the figures that were measured on one
machine (docs/performance.md, tests/cluster).  Requests come at random; Ray's queue serves whom it
looks at first, not who came first; a host starts as many kernels at once as it has processors;
what dies takes its kernels along, whose people start again.  ``script/simulate`` runs it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import simpy

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class Figures:
    """Seconds, measured: medians on 2 cores without KVM; docs/scale.md has each one's source."""

    reserve: float = 0.006  # a placement group, made and granted
    call: float = 0.002  # a call of the host's actor
    start: float = 0.34  # spawn to first result, past the pool
    start_busy: float = 0.25  # of it on a processor
    pooled: float = 0.054  # from the pool
    refill: float = 0.5  # of a processor, for a pool's member
    refused: float = 3.2  # until a host has said that it has no slot
    host_dead: float = 15.0  # until Ray takes a dead host's slots off
    lost_told: float = 4.0  # until a dead host's people are told
    lease: float = 30.0
    retry: float = 0.5  # how often Ray's queue is looked through


@dataclass(frozen=True)
class Scene:
    """What is simulated; rates per second, times in seconds."""

    hosts: int = 10
    slots: int = 24  # of each host
    cores: int = 8
    pool: int = 0  # kernels that wait ready on each host
    load: float = 0.8  # of all slots, as people ask for them
    session: float = 2700.0  # how long a kernel is kept, mean
    lasting: str = "exponential"  # or "lognormal", whose tail is longer
    seconds: float = 4 * 3600.0
    warm_up: float = 3600.0
    herd: int = 0  # people who come within 15 s, when it has warmed up
    dies: int = 0  # hosts that die then
    cut_off: int = 0  # hosts that are cut off then, for ten minutes
    others: float = 0.0  # share of each host's slots that others hold, of whom Ray knows nothing
    seed: int = 1
    figures: Figures = field(default_factory=Figures)


class Host:
    """One VM host: slots as the semaphore file has them, processors, a pool."""

    def __init__(self, env: simpy.Environment, scene: Scene) -> None:
        self.env = env
        self.scene = scene
        self.free = scene.slots  # as Ray counts
        self.really = scene.slots - round(scene.slots * scene.others)  # as the file counts
        self.cpu = simpy.Resource(env, scene.cores)
        self.ready = scene.pool
        self.alive = True
        self.sessions: set[simpy.Process] = set()
        self.avoided_until = 0.0

    def begin(self) -> Iterator[simpy.Event]:
        """Start one kernel, to its first result."""
        figures = self.scene.figures
        pooled = self.ready > 0
        if pooled:
            self.ready -= 1
            self.env.process(self._refill())
        with self.cpu.request() as turn:
            yield turn
            yield self.env.timeout(figures.pooled if pooled else figures.start_busy)
        if not pooled:
            yield self.env.timeout(figures.start - figures.start_busy)

    def _refill(self) -> Iterator[simpy.Event]:
        with self.cpu.request() as turn:
            yield turn
            yield self.env.timeout(self.scene.figures.refill)
        if self.really > self.ready:  # who waits ready gives way to who asks
            self.ready += 1


class Cluster:
    """All hosts, Ray's queue before them, and the people."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.random = random.Random(scene.seed)
        self.env = simpy.Environment()
        self.hosts = [Host(self.env, scene) for _ in range(scene.hosts)]
        self.head = simpy.Resource(self.env, 1)  # Ray's head makes one reservation at a time
        self.queue: list[simpy.Event] = []
        self.asked = self.env.event()
        """There is somebody in the queue"""
        self.waits: list[float] = []
        """From the wish for a kernel to its first result, of those who came after the warm-up"""
        self.queued: list[float] = []
        """Of it, in Ray's queue"""
        self.again: list[float] = []
        """The same of those who had lost theirs, from the loss"""
        self.gave_up = 0
        self.refusals = 0
        self.busy = 0.0

    def run(self) -> dict[str, Any]:
        """Let the time pass; what came of it."""
        scene, env = self.scene, self.env
        # As it is after a long time, or a cluster that is nearly full would take days to get there
        for _ in range(round(min(scene.load, 0.99) * scene.hosts * scene.slots)):
            env.process(self._person(0.0))
        env.process(self._arrivals())
        env.process(self._look_again())
        if scene.herd:
            env.process(self._herd())
        if scene.dies or scene.cut_off:
            env.process(self._fault())
        env.run(scene.warm_up + scene.seconds)
        return {
            "requests": len(self.waits),
            "wait": _spread(self.waits),
            "queued": _spread(self.queued),
            "waited at all": sum(w > scene.figures.reserve * 4 for w in self.queued)
            / max(1, len(self.queued)),
            "again": _spread(self.again),
            "gave up": self.gave_up,
            "refusals": self.refusals,
            "still waiting": len(self.queue),
        }

    def _arrivals(self) -> Iterator[simpy.Event]:
        scene = self.scene
        rate = scene.load * scene.hosts * scene.slots / scene.session
        while True:
            yield self.env.timeout(self.random.expovariate(rate))
            self.env.process(self._person(self.env.now))

    def _herd(self) -> Iterator[simpy.Event]:
        yield self.env.timeout(self.scene.warm_up)
        for _ in range(self.scene.herd):
            self.env.process(self._person(self.env.now, self.random.uniform(0, 15)))

    def _person(
        self, since: float, later: float = 0.0, lost: bool = False
    ) -> Iterator[simpy.Event]:
        """Asks for a kernel, uses it, and starts again if it is lost."""
        env, scene, figures = self.env, self.scene, self.scene.figures
        if later:
            yield env.timeout(later)
            since = env.now
        began, tries = env.now, 0
        while True:
            host = yield from self._reserve()
            if self._really_there(host):
                break
            self.refusals += 1
            yield env.timeout(figures.refused)
            host.avoided_until = env.now + 20.0
            self._give_back(host)
            tries += 1
            if tries >= 5:
                self.gave_up += 1
                return
            yield env.timeout(self.random.uniform(0.1, 0.2) * 2**tries)
        queued = env.now - began
        yield env.timeout(figures.call)
        host.really -= 1
        me = env.active_process
        host.sessions.add(me)
        try:
            yield from host.begin()
            if since >= scene.warm_up:
                self.queued.append(queued)
                (self.again if lost else self.waits).append(env.now - since)
            yield env.timeout(self._session())
        except simpy.Interrupt as fault:
            host.sessions.discard(me)
            yield env.timeout(fault.cause)
            # Whose host died does not think of how it was left: its slots come back with it
            env.process(self._person(env.now - fault.cause, lost=True))
            return
        host.sessions.discard(me)
        host.really += 1
        self._give_back(host)

    def _session(self) -> float:
        mean = self.scene.session
        if self.scene.lasting == "exponential":
            return self.random.expovariate(1 / mean)
        sigma = 1.5
        return self.random.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)

    def _really_there(self, host: Host) -> bool:
        return host.alive and host.really > 0

    def _reserve(self) -> Any:
        """Ray's part: a slot on the host that has most of them free, or the queue."""
        with self.head.request() as turn:
            yield turn
            yield self.env.timeout(self.scene.figures.reserve)
        while True:
            host = self._best()
            if host is not None:
                host.free -= 1
                return host
            granted = self.env.event()
            self.queue.append(granted)
            if not self.asked.triggered:
                self.asked.succeed()
            yield granted

    def _best(self) -> Host | None:
        now = self.env.now
        open_ = [h for h in self.hosts if h.alive and h.free > 0 and h.avoided_until <= now]
        if not open_:
            return None
        # Of many equal ones any: a sample is as good, and quick with a thousand hosts
        few = open_ if len(open_) < 20 else self.random.sample(open_, 20)
        return max(few, key=lambda host: host.free)

    def _give_back(self, host: Host) -> None:
        if host.alive:
            host.free += 1

    def _look_again(self) -> Iterator[simpy.Event]:
        """Ray looks through its queue from time to time, and not in order of arrival."""
        while True:
            if not self.queue:  # nobody to look for: no need to let time tick
                self.asked = self.env.event()
                yield self.asked
            yield self.env.timeout(self.scene.figures.retry)
            room = sum(host.free for host in self.hosts if host.alive)
            for _ in range(min(room, len(self.queue))):
                self.queue.pop(self.random.randrange(len(self.queue))).succeed()

    def _fault(self) -> Iterator[simpy.Event]:
        scene, figures = self.scene, self.scene.figures
        yield self.env.timeout(scene.warm_up)
        chosen = self.random.sample(self.hosts, scene.dies + scene.cut_off)
        for number, host in enumerate(chosen):
            dies = number < scene.dies
            host.alive = False  # a reservation on it would fail; some do, see `refused`
            host.free = host.really = 0
            told = figures.lost_told if dies else figures.lease + 2
            for session in list(host.sessions):
                session.interrupt(told)
            host.sessions.clear()
        yield self.env.timeout(max(figures.host_dead, 600.0))
        for host in chosen[scene.dies :]:  # the plug is in again
            host.alive, host.free, host.really = True, scene.slots, scene.slots


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"n": 0}
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {
        "n": len(ordered), "mean": statistics.fmean(ordered), "median": at(0.5),
        "p95": at(0.95), "p99": at(0.99), "most": ordered[-1],
    }  # fmt: skip


def erlang_c(servers: int, load: float) -> float:
    """The share of those who have to wait, in M/M/c with ``load`` of the servers used."""
    offered = load * servers
    blocked = 1.0
    for number in range(1, servers + 1):  # Erlang B, by its recursion
        blocked = offered * blocked / (number + offered * blocked)
    return blocked / (1 - load * (1 - blocked))


def mean_wait(servers: int, load: float, session: float) -> float:
    """Mean wait of all in M/M/c, in seconds."""
    return erlang_c(servers, load) * session / (servers * (1 - load))


# --- the questions of docs/scale.md ---


def by_load(quick: bool) -> list[dict[str, Any]]:
    """Waiting against load, for 10, 100 and 1,000 hosts of 24 slots."""
    loads = (0.8, 0.95) if quick else (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.02)
    sizes = (10,) if quick else (10, 100, 1000)
    found = []
    for hosts in sizes:
        for load in loads:
            scene = Scene(
                hosts=hosts, load=load, seconds=3600.0 if hosts > 100 or quick else 4 * 3600.0
            )
            found.append({"hosts": hosts, "load": load, **Cluster(scene).run()})
    return found


def by_slots(quick: bool) -> list[dict[str, Any]]:
    """240 slots as many small hosts or few large ones, one of which dies."""
    shapes = ((10, 24),) if quick else ((60, 4), (30, 8), (10, 24), (5, 48), (3, 80))
    return [
        {"hosts": hosts, "slots": slots, "load": load,
         **Cluster(Scene(hosts=hosts, slots=slots, load=load, dies=1, seconds=3600.0)).run()}
        for hosts, slots in shapes
        for load in (0.6, 0.8)
    ]  # fmt: skip


def herd(quick: bool) -> list[dict[str, Any]]:
    """People who come within 15 s, to ten hosts that are nearly empty, by size of the pool."""
    found = []
    for herd_of in (200,) if quick else (100, 200, 400):
        for pool in (0, 4) if quick else (0, 1, 2, 4, 8):
            scene = Scene(load=0.15, pool=pool, herd=herd_of, cores=2, seconds=900.0)
            found.append({"pool": pool, "herd": herd_of, **Cluster(scene).run()})
    return found


def faults(quick: bool) -> list[dict[str, Any]]:
    """A host dies, or is cut off: when those it had go on elsewhere."""
    found = []
    for hosts in (10,) if quick else (10, 100, 1000):
        for load in (0.6, 0.9):
            for name in ("dies", "cut_off"):
                scene = replace(Scene(hosts=hosts, load=load, seconds=1800.0), **{name: 1})
                found.append({"hosts": hosts, "load": load, "fault": name, **Cluster(scene).run()})
    return found


def others(quick: bool) -> list[dict[str, Any]]:
    """Slots that Ray knows nothing of: what the refusals cost."""
    shares = (0.0, 0.25) if quick else (0.0, 0.125, 0.25, 0.5)
    return [
        {"others": share, "load": load,
         **Cluster(Scene(others=share, load=load, seconds=3600.0)).run()}
        for share in shares
        for load in (0.5, 0.7)
    ]  # fmt: skip


QUESTIONS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "load": by_load, "slots": by_slots, "herd": herd, "faults": faults, "others": others,
}  # fmt: skip


def draw(found: dict[str, list[dict[str, Any]]], directory: Path) -> None:
    """The plots of docs/scale.md."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for hosts in sorted({row["hosts"] for row in found["load"]}):
        rows = [row for row in found["load"] if row["hosts"] == hosts]
        loads = [row["load"] for row in rows]
        left.plot(loads, [row["wait"]["p95"] for row in rows], "o-", label=f"{hosts:,} hosts, p95")
        right.plot(loads, [row["waited at all"] * 100 for row in rows], "o-", label=f"{hosts:,}")
        servers = hosts * Scene.slots
        below = [load for load in loads if load < 1]
        right.plot(below, [erlang_c(servers, load) * 100 for load in below], ":", color="grey")
    left.set(yscale="log", xlabel="load", ylabel="s", title="Wish to first result")
    right.set(xlabel="load", ylabel="%", title="Who waits in the queue (dotted: Erlang C)")
    left.legend()
    right.legend(title="hosts")
    figure.savefig(directory / "scale-load.png", dpi=110)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for herd_of in sorted({row["herd"] for row in found["herd"]}):
        rows = [row for row in found["herd"] if row["herd"] == herd_of]
        axes[0].plot([row["pool"] for row in rows], [row["wait"]["median"] for row in rows],
                     "o-", label=f"{herd_of}, median")  # fmt: skip
        axes[0].plot([row["pool"] for row in rows], [row["wait"]["p95"] for row in rows],
                     "s--", label=f"{herd_of}, p95", alpha=0.6)  # fmt: skip
    axes[0].set(yscale="log", xlabel="ready kernels on each of 10 hosts", ylabel="s",
                title="People who come within 15 s")  # fmt: skip
    axes[0].legend(fontsize=7)
    for fault in ("dies", "cut_off"):
        rows = [row for row in found["faults"] if row["fault"] == fault and row["again"]["n"]]
        names = [f"{row['hosts']:,}\n{row['load']:.0%}" for row in rows]
        shift = 0.2 if fault == "dies" else -0.2
        axes[1].bar([i - shift for i in range(len(rows))], [row["again"]["p95"] for row in rows],
                    0.4, label=fault.replace("_", " "))  # fmt: skip
        axes[1].set_xticks(range(len(rows)), names, fontsize=7)
    axes[1].set(ylabel="s", title="A host is lost: p95 until its people go on (hosts, load)")
    axes[1].legend()
    figure.savefig(directory / "scale-faults.png", dpi=110)


def table(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    """A Markdown table of some of what was found."""
    head = [*keys, "requests", "median s", "p95 s", "p99 s", "in the queue %", "refusals"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        wait = row["wait"]
        lines.append("| " + " | ".join([
            *(str(row[key]) for key in keys), f"{row['requests']:,}",
            *(f"{wait[name]:.2f}" if wait["n"] else "" for name in ("median", "p95", "p99")),
            f"{100 * row['waited at all']:.1f}", str(row["refusals"]),
        ]) + " |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small clusters, seconds")
    parser.add_argument("--only", choices=QUESTIONS, action="append")
    parser.add_argument("--output", type=Path, default=Path("bench-output/scale"))
    parser.add_argument("--into-docs", action="store_true", help="plots into docs/, too")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in options.only or QUESTIONS:
        began = time.monotonic()
        found[name] = QUESTIONS[name](options.quick)
        print(f"{name} ({time.monotonic() - began:.0f} s)\n", file=sys.stderr)
        keys = [key for key in ("hosts", "slots", "load", "fault", "pool", "herd", "others")
                if key in found[name][0]]  # fmt: skip
        print(table(found[name], keys), "\n")
    told = {"figures": asdict(Figures()), "found": found}
    (options.output / "scale.json").write_text(json.dumps(told, indent=1))
    if not options.only:
        draw(found, DOCS if options.into_docs else options.output)


if __name__ == "__main__":
    main()
