"""The model of docs/scale.md: held against queueing theory, and against itself."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import pytest

from simulation import erlang, figures, studies
from simulation.cluster import Cluster, Setup, waited
from simulation.hosts import Free, Host

MEASURED = figures.measured()


def steady(setup: Setup, load: float, kernels: int, seed: int) -> list[float]:
    cluster = Cluster(setup, figures.NONE, seed)
    until = kernels / (load * cluster.capacity)
    cluster.poisson(load, 1.0, until)
    cluster.env.run(until)
    return cluster.waits(until * 0.2)


def test_erlang_c_agrees_with_its_tables():
    # One server: the share that waits is the load; textbook: 2 Erlangs on 3 servers, 4/9
    assert erlang.waits(1, 0.7) == pytest.approx(0.7)
    assert erlang.waits(3, 2 / 3) == pytest.approx(4 / 9)
    assert erlang.mean_wait(1, 0.5, 10.0) == pytest.approx(10.0)
    assert erlang.wait_quantile(1, 0.5, 1.0, 0.5) == 0.0


@pytest.mark.parametrize(("hosts", "slots", "load"), [(1, 3, 0.6), (4, 2, 0.7)])
def test_without_times_of_its_own_it_is_the_queue_that_erlang_solved(hosts, slots, load):
    setup = Setup(hosts=hosts, slots=slots, order="fifo", pool=0)
    runs = [steady(setup, load, 6000, seed) for seed in range(10)]
    means = [statistics.mean(waits) for waits in runs]
    error = 3.5 * statistics.stdev(means) / len(means) ** 0.5
    expected = erlang.mean_wait(hosts * slots, load, 1.0)
    assert error < expected / 2, "too few kernels to tell anything"
    assert statistics.mean(means) == pytest.approx(expected, abs=error)
    shares = statistics.mean(waited(waits) for waits in runs)
    assert shares == pytest.approx(erlang.waits(hosts * slots, load), abs=0.06)


def test_a_seed_gives_the_same_run_again():
    told = []
    for seed in (5, 5, 6):
        cluster = Cluster(Setup(hosts=3, slots=4), MEASURED, seed)
        cluster.poisson(0.9, 100.0, 1000.0)
        cluster.env.run(1000.0)
        told.append(cluster.told)
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize("order", ["ray", "fifo"])
def test_no_host_ever_has_more_vms_than_slots_and_all_are_given_back(order):
    cluster = Cluster(Setup(hosts=3, slots=4, order=order, foreign=0.1), MEASURED, 2)

    def watch():
        while True:
            yield cluster.env.timeout(0.5)
            for host in cluster.hosts:
                assert 0 <= host.used <= host.slots
                assert 0 <= host.counted <= host.slots

    cluster.env.process(watch())
    cluster.poisson(1.1, 20.0, 400.0)
    cluster.lose(cluster.hosts[1], 100.0, seen=2.0, back=60.0)
    cluster.env.run(2000.0)
    assert {one.outcome for one in cluster.told} <= {"ran", "lost", "refused"}
    assert any(one.outcome == "lost" for one in cluster.told)
    assert cluster.head.waiting == 0
    assert cluster.head.free.total == cluster.capacity
    assert sum(host.used for host in cluster.hosts) <= 1  # the others' VMs, but for the dead host's


def test_kernels_are_spread_and_avoided_hosts_are_left_out():
    cluster = Cluster(Setup(hosts=4, slots=5), MEASURED, 1)
    for _ in range(8):
        cluster.come(1000.0)
    cluster.env.run(10.0)
    assert [host.used for host in cluster.hosts] == [2, 2, 2, 2]
    hosts = [Host(cluster.env, number, 1, 1, 0) for number in range(3)]
    free = Free(hosts, cluster.rng)
    assert free.take({0, 2}) is hosts[1]
    assert free.take({0, 2}) is None
    assert free.total == 2


def test_who_comes_when_a_slot_is_free_and_none_waits_gets_it_in_milliseconds():
    cluster = Cluster(Setup(hosts=1, slots=1, pool=1), MEASURED, 1)
    cluster.come(10.0)
    cluster.env.run(5.0)
    assert cluster.told[0].slot == pytest.approx(MEASURED.reserve + MEASURED.call)
    expected = cluster.told[0].slot + MEASURED.start_ready
    assert cluster.told[0].first == pytest.approx(expected)


def test_a_full_cluster_refuses_in_time_when_there_is_a_limit():
    cluster = Cluster(Setup(hosts=1, slots=1, wait=60.0), MEASURED, 1)
    cluster.come(1000.0)
    cluster.come(1.0, after=10.0)
    cluster.env.run(500.0)
    assert [one.outcome for one in cluster.told] == ["waits", "gave up"]


def test_a_host_that_is_full_of_others_vms_is_asked_once_and_then_left_out():
    cluster = Cluster(Setup(hosts=2, slots=4), MEASURED, 3)
    cluster.hosts[0].used = 4  # all of them others'
    for number in range(4):
        cluster.come(1000.0, after=1.0 + number)
    cluster.env.run(60.0)
    assert all(one.slot is not None for one in cluster.told)
    assert sum(one.tries for one in cluster.told) <= 4 + 2
    assert cluster.hosts[1].used == 4


def test_a_dead_hosts_kernels_are_asked_for_again_elsewhere():
    cluster = Cluster(Setup(hosts=2, slots=4), MEASURED, 1)
    for _ in range(4):
        cluster.come(1000.0)
    cluster.lose(cluster.hosts[0], 100.0, seen=MEASURED.given_up, back=10_000.0)
    cluster.env.run(200.0)
    assert [one.outcome for one in cluster.told].count("lost") == 2
    again = [one for one in cluster.told if one.asked > 100]
    assert [round(one.asked) for one in again] == [132, 132]
    assert cluster.hosts[1].used == 4


def test_waiting_kernels_that_are_not_watched_at_once_learn_late():
    slow = replace(MEASURED, tick=0.1)
    firsts = {}
    for watchers in (None, 2):
        setup = Setup(hosts=1, slots=4, watchers=watchers)
        cluster = Cluster(setup, slow, 1)
        for _ in range(40):
            cluster.come(5.0)
        cluster.env.run(600.0)
        assert all(one.outcome == "ran" for one in cluster.told)
        firsts[watchers] = max(cluster.firsts())
    assert firsts[2] > firsts[None] + 5


def test_every_study_runs_small():
    began = time.monotonic()
    for name, study in studies.STUDIES.items():
        rows = study(MEASURED, 1, 0.002)
        assert rows, name
        assert len({tuple(row) for row in rows}) == 1, f"{name}: all rows have the same columns"
    assert time.monotonic() - began < 60  # some seconds, where nothing else runs
