"""What is asked of the model: each study returns rows, for the page and its plots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from simulation import erlang
from simulation.cluster import Cluster, Setup, quantile, waited
from simulation.figures import NONE, Figures

Rows = list[dict[str, Any]]
HOLD = 1800.0
"""Seconds that a kernel lives, on the average: half an hour"""
LOADS = (0.7, 0.8, 0.9, 0.95, 0.98)


def theory(figures: Figures, seed: int, size: float) -> Rows:
    """The model without any times of its own, beside Erlang C: the same queue?"""
    rows = []
    for hosts, slots, load in ((1, 3, 0.8), (10, 1, 0.8), (20, 1, 0.9), (10, 20, 0.95)):
        for order in ("fifo", "ray"):
            setup = Setup(hosts=hosts, slots=slots, order=order, pool=0)
            waits, _ = _steady(setup, NONE, seed, load, 100.0, int(60_000 * size))
            servers = hosts * slots
            rows.append(
                {
                    "slots": servers, "load": load, "order": order,
                    "mean": _mean(waits), "mean_theory": erlang.mean_wait(servers, load, 100.0),
                    "waited": waited(waits), "waited_theory": erlang.waits(servers, load),
                    "p99": quantile(waits, 0.99),
                    "p99_theory": erlang.wait_quantile(servers, load, 100.0, 0.99),
                }
            )  # fmt: skip
    return rows


def load(figures: Figures, seed: int, size: float) -> Rows:
    """Waiting time against load, for 10 to 1,000 hosts of 20 slots, in Ray's order and in turn."""
    rows = []
    for hosts in (10, 100, 1000) if size > 0.01 else (10,):
        for part in LOADS:
            for order in ("ray", "fifo") if hosts == 10 else ("ray",):
                setup = Setup(hosts=hosts, order=order)
                kernels = int((40_000 + 20 * setup.hosts * 2) * size)
                waits, cluster = _steady(setup, figures, seed, part, HOLD, kernels)
                rows.append(
                    {
                        "hosts": hosts, "slots": cluster.capacity, "load": part, "order": order,
                        "kernels": len(waits), "mean": _mean(waits), "waited": waited(waits),
                        "p95": quantile(waits, 0.95), "p99": quantile(waits, 0.99),
                        "p999": quantile(waits, 0.999),
                        "theory": erlang.mean_wait(cluster.capacity, part, HOLD),
                        "head_busy": cluster.head.busy / cluster.env.now,
                    }
                )  # fmt: skip
    return rows


def slots(figures: Figures, seed: int, size: float) -> Rows:
    """How many slots there must be so that 99 of 100 wait less than a second, for so many users.

    By theory alone, which the model agrees with: users who each have a kernel half of the time.
    """
    rows = []
    for busy in (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000):
        need = busy + 1
        while erlang.wait_quantile(need, busy / need, HOLD, 0.99) > 1.0:
            need += max(1, need // 500)
        rows.append({"kernels": busy, "slots": need, "more": need / busy - 1})
    return rows


def herd(figures: Figures, seed: int, size: float) -> Rows:
    """A class of 200: all within a minute, or within two seconds, on hosts of 20 slots."""
    rows = []
    for hosts, within, pool, watchers in (
        (12, 60.0, 1, None), (12, 60.0, 0, None), (12, 2.0, 0, None), (12, 2.0, 1, None),
        (12, 2.0, 4, None), (12, 2.0, 16, None), (3, 2.0, 1, None), (9, 2.0, 1, None),
        (9, 2.0, 1, 32),
    ):  # fmt: skip
        setup = Setup(hosts=hosts, pool=pool, watchers=watchers)
        cluster = Cluster(setup, figures, seed)
        for _ in range(200):
            cluster.come(cluster.rng.expovariate(1 / HOLD), after=cluster.rng.uniform(0, within))
        cluster.env.run(4 * HOLD)
        firsts = sorted(cluster.firsts())
        rows.append(
            {
                "hosts": hosts, "slots": cluster.capacity, "within": within, "pool": pool,
                "watchers": watchers or "all", "median": quantile(firsts, 0.5),
                "p95": quantile(firsts, 0.95), "most": firsts[-1],
                "firsts": [round(one, 3) for one in firsts],
            }
        )  # fmt: skip
    return rows


def death(figures: Figures, seed: int, size: float) -> Rows:
    """One of ten hosts dies, and is back ten minutes later: waiting time, minute by minute."""
    rows = []
    for part in (0.8, 0.9, 0.95):
        runs = max(2, int(20 * size))
        waits: dict[int, list[float]] = {}
        lost = queued = 0
        for run in range(runs):
            cluster = Cluster(Setup(), figures, seed + run)
            cluster.poisson(part, HOLD, 7200.0)
            cluster.lose(cluster.hosts[0], 3600.0, seen=figures.given_up, back=600.0)
            queue: list[int] = []

            def look(cluster: Cluster = cluster, queue: list[int] = queue) -> Any:
                while True:
                    yield cluster.env.timeout(10.0)
                    queue.append(cluster.head.waiting if cluster.env.now > 3600 else 0)

            cluster.env.process(look())
            cluster.env.run(7200.0)
            lost += sum(one.outcome == "lost" for one in cluster.told)
            queued += max(queue)
            for one in cluster.told:
                # Who waits still has waited so long at least
                slot = cluster.env.now - one.asked if one.slot is None else one.slot
                waits.setdefault(int(one.asked // 60), []).append(slot)
        minutes = [[minute - 60, _mean(waits[minute])] for minute in sorted(waits) if minute >= 50]
        after = [wait for minute in range(60, 72) for wait in waits.get(minute, [])]
        rows.append(
            {
                "load": part, "lost": lost / runs, "queue": queued / runs, "mean": _mean(after),
                "p95": quantile(after, 0.95), "minutes": minutes,
            }
        )  # fmt: skip
    return rows


def lease(figures: Figures, seed: int, size: float) -> Rows:
    """A host is cut off for a while, with a lease and without: what its VMs keep from others."""
    rows = []
    for cut in (60.0, 300.0, 1800.0):
        for leased in (True, False):
            setup = Setup(hosts=3)
            runs = max(2, int(20 * size))
            waits: list[float] = []
            refused = tries = asked = 0
            for run in range(runs):
                cluster = Cluster(setup, figures, seed + run)
                cluster.poisson(0.85, HOLD, 7200.0)
                kept = 0.0 if leased else HOLD
                cluster.lose(cluster.hosts[0], 3600.0, figures.given_up, cut, kept)
                cluster.env.run(9000.0)
                after = [one for one in cluster.told if 3600 + cut <= one.asked < 7200]
                asked += len(after)
                tries += sum(max(0, one.tries - 1) for one in after)
                refused += sum(one.outcome == "refused" for one in after)
                waits += [one.slot for one in after if one.slot is not None]
            rows.append(
                {
                    "cut": cut, "lease": leased, "mean": _mean(waits),
                    "p95": quantile(waits, 0.95), "refusals": tries / asked,
                    "refused": refused / asked,
                }
            )  # fmt: skip
    return rows


def disagreement(figures: Figures, seed: int, size: float) -> Rows:
    """Slots are taken by VMs that Ray does not count: tries, and who is refused in the end."""
    rows = []
    for foreign in (0.0, 0.02, 0.05, 0.1, 0.2):
        for part in (0.5, 0.7, 0.8):
            setup = Setup(foreign=foreign)
            cluster = Cluster(setup, figures, seed)
            kernels = int(20_000 * size)
            until = kernels * HOLD / (part * cluster.capacity)
            cluster.poisson(part, HOLD, until)
            cluster.env.run(until)
            since = [one for one in cluster.told if one.asked > until * 0.1]
            told = [one for one in since if one.outcome == "refused" or one.slot is not None]
            waits = [one.slot for one in told if one.slot is not None]
            rows.append(
                {
                    "foreign": foreign, "load": part, "true_load": part / (1 - foreign),
                    "again": sum(one.tries > 1 for one in told) / len(told),
                    "refused": sum(one.outcome == "refused" for one in told) / len(told),
                    "mean": _mean(waits), "p99": quantile(waits, 0.99),
                }
            )  # fmt: skip
    return rows


def pool(figures: Figures, seed: int, size: float) -> Rows:
    """Time to the first result against the rate of starts on a host, by the size of its pool."""
    rows = []
    for members in (0, 1, 2, 4):
        for a_minute in (1, 6, 15, 30, 60, 120):
            setup = Setup(hosts=1, slots=200, processors=2, pool=members)
            cluster = Cluster(setup, replace(figures, reserve=0.0), seed)
            until = max(60.0, 2000 * size / a_minute * 60)
            # Short lives: the host is never full, so only the start counts
            part = a_minute / 60 * 60 / cluster.capacity
            cluster.poisson(part, 60.0, until, filled=False)
            cluster.env.run(until)
            firsts = cluster.firsts(until * 0.1)
            rows.append(
                {
                    "pool": members, "a_minute": a_minute, "mean": _mean(firsts),
                    "median": quantile(firsts, 0.5), "p95": quantile(firsts, 0.95),
                }
            )  # fmt: skip
    return rows


STUDIES: dict[str, Callable[[Figures, int, float], Rows]] = {
    "theory": theory, "load": load, "slots": slots, "herd": herd, "death": death,
    "lease": lease, "disagreement": disagreement, "pool": pool,
}  # fmt: skip


def _steady(
    setup: Setup, figures: Figures, seed: int, load: float, hold: float, kernels: int
) -> tuple[list[float], Cluster]:
    """The waits of so many kernels, without the beginning, when the queue was empty."""
    cluster = Cluster(setup, figures, seed)
    until = max(kernels * hold / (load * cluster.capacity), hold)
    cluster.poisson(load, hold, until)
    cluster.env.run(until)
    return cluster.waits(until * 0.2), cluster


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
