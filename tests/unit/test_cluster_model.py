"""The model of docs/scale.md: right where theory knows the answer, the same for the same seed."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from cluster_model import QUESTIONS, Cluster, Figures, Scene, erlang_c, mean_wait

# Nothing takes time but to wait for a slot
AT_ONCE = Figures(
    reserve=1e-9, call=0.0, start=0.0, start_busy=0.0, pooled=0.0, refill=0.0, retry=1.0
)


def test_erlang_c_is_that_of_the_textbooks():
    assert erlang_c(1, 0.7) == pytest.approx(0.7)  # M/M/1: the load itself
    assert erlang_c(2, 0.75) == pytest.approx(0.642857, rel=1e-5)
    assert mean_wait(1, 0.5, 10.0) == pytest.approx(10.0)


@pytest.mark.parametrize(("slots", "load"), [(4, 0.7), (24, 0.9)])
def test_waiting_is_that_of_queueing_theory(slots: int, load: float):
    scene = Scene(
        hosts=1, slots=slots, load=load, session=600.0, seconds=1_500_000.0, warm_up=20_000.0,
        figures=AT_ONCE,
    )  # fmt: skip
    found = Cluster(scene).run()
    # The mean is the same in whatever order the queue is served
    assert found["wait"]["mean"] == pytest.approx(mean_wait(slots, load, 600.0), rel=0.2)
    assert found["waited at all"] == pytest.approx(erlang_c(slots, load), rel=0.12)


def test_a_seed_gives_the_same_again_and_another_does_not():
    scene = Scene(hosts=3, slots=4, load=0.9, seconds=3600.0)
    assert Cluster(scene).run() == Cluster(scene).run()
    assert Cluster(scene).run() != Cluster(replace(scene, seed=2)).run()


def test_no_host_has_more_kernels_than_slots_and_a_pool_helps():
    slow = Scene(hosts=2, slots=30, cores=2, load=0.1, herd=40, seconds=600.0)
    without, with_pool = Cluster(slow), Cluster(replace(slow, pool=8))
    before, after = without.run(), with_pool.run()
    assert after["wait"]["median"] < before["wait"]["median"] / 2
    for cluster in (without, with_pool):
        assert all(0 <= host.free <= 30 and 0 <= host.really <= 30 for host in cluster.hosts)


def test_who_lost_a_host_goes_on_elsewhere():
    found = Cluster(Scene(hosts=5, slots=10, load=0.5, dies=1, seconds=1800.0)).run()
    assert found["again"]["n"] > 0
    assert found["again"]["median"] >= Figures().lost_told
    assert found["still waiting"] == 0


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_question_of_the_page_is_answered(name: str):
    for row in QUESTIONS[name](True):
        assert row["wait"]["n"] > 0
