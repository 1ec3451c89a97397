"""The warm pool's policy: what it decides, with a clock and VMs that are only numbers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vmkernel.host.pool import (
    LONGEST_PAUSE,
    MAX_STARTING,
    QUIET_SECONDS,
    STALLED_SECONDS,
    Place,
    Pool,
)


def filled(size: int, now: float = 0.0, max_idle: float = 600.0) -> Pool[int]:
    pool: Pool[int] = Pool(size, max_idle)
    for member in range(size):
        pool.starting(member)
        assert pool.ready(member, now + member)
    return pool


def test_an_empty_pool_fills_two_at_a_time() -> None:
    pool: Pool[int] = Pool(3, 600)
    assert pool.decide(0, free=5, waiting=0).start == 2
    pool.starting(1)
    pool.starting(2)
    assert pool.decide(0, free=3, waiting=0).start == 0
    pool.ready(1, 1)
    assert pool.decide(1, free=3, waiting=0).start == 1
    pool.starting(3)
    assert repr(pool) == "<Pool size=3 starting=2 idle=1 leaving=0>"


def test_it_takes_no_more_than_what_is_free() -> None:
    pool: Pool[int] = Pool(3, 600)
    assert pool.decide(0, free=0, waiting=0).start == 0
    assert pool.decide(0, free=1, waiting=0).start == 1


def test_the_freshest_is_handed_out_and_the_place_filled_at_once() -> None:
    pool = filled(2)
    assert pool.take() == 1
    assert pool.decide(5, free=1, waiting=0) == (1, [], 600)
    assert pool.take() == 0
    assert pool.take() is None


def test_it_yields_to_whoever_waits_and_only_as_much_as_is_needed() -> None:
    pool = filled(3)
    assert pool.decide(10, free=1, waiting=1).end == [], "there is a slot: it is on its way"
    assert pool.decide(10, free=0, waiting=2).end == [0, 1], "those that are idle longest"
    assert pool.decide(10, free=0, waiting=2).end == [], "two are leaving already"
    pool.gone(0)
    assert pool.decide(10, free=1, waiting=2).end == []
    assert pool.decide(10, free=0, waiting=4).end == [2]


def test_a_waiter_with_a_lower_limit_gets_a_slot_too() -> None:
    pool = filled(2)
    decision = pool.decide(10, free=2, waiting=1)
    assert decision == (0, [], 10 + STALLED_SECONDS)
    assert pool.decide(11.9, free=2, waiting=1).end == []
    assert pool.decide(12, free=2, waiting=1).end == [0]
    pool.gone(0)
    assert pool.decide(13, free=3, waiting=1) == (0, [], 14)
    assert pool.decide(13.5, free=2, waiting=0).end == []
    assert pool.decide(13.6, free=2, waiting=1).look_again == 13.6 + STALLED_SECONDS


def test_a_member_that_starts_is_given_up_unless_one_of_ours_hopes_for_it() -> None:
    pool: Pool[int] = Pool(2, 600)
    pool.starting(1)
    pool.starting(2)
    assert pool.decide(0, free=0, waiting=2, hoping=2).end == []
    assert pool.decide(0, free=0, waiting=2, hoping=1).end == [2]
    assert not pool.ready(2, 1), "it is leaving"
    assert pool.ready(1, 1)


def test_it_stays_small_while_anyone_waits_and_a_moment_after() -> None:
    pool = filled(1)
    pool.decide(10, free=0, waiting=1)
    pool.gone(0)
    assert pool.decide(11.5, free=1, waiting=1).start == 0
    decision = pool.decide(11.6, free=1, waiting=0)
    assert decision.start == 0
    assert decision.look_again == pytest.approx(11.5 + QUIET_SECONDS)
    assert pool.decide(12.5, free=1, waiting=0).start == 1


def test_a_pool_that_is_never_of_use_stops_trying_often() -> None:
    """Somebody waits each two seconds for an hour: fill, yield, fill, yield."""
    starts = _hour(of_use=False)
    assert starts < 12 + 3600 / LONGEST_PAUSE


def test_a_pool_that_is_of_use_is_quick_again() -> None:
    assert _hour(of_use=True) > 600


def _hour(*, of_use: bool) -> int:
    pool: Pool[int] = Pool(1, 600)
    numbers = itertools.count()
    for tick in range(3600 * 2):
        now = tick / 2
        waiting = int(tick % 8 == 0)
        decision = pool.decide(now, free=1 - len(pool._members), waiting=waiting)
        for member in decision.end:
            pool.gone(member)
        for _ in range(decision.start):
            member = next(numbers)
            pool.starting(member)
            pool.ready(member, now)
        if of_use and tick % 8 == 7 and pool.take() is not None:
            pool.used()
    return next(numbers)


def test_a_start_that_fails_is_put_off_longer_each_time() -> None:
    pool: Pool[int] = Pool(1, 600)
    now, pauses = 0.0, []
    for member in range(9):
        assert pool.decide(now, free=9, waiting=0).start == 1
        pool.starting(member)
        pool.failed(member, now)
        again = pool.decide(now, free=9, waiting=0).look_again
        assert again is not None
        pauses.append(again - now)
        now = again
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_members_age_out_and_are_replaced() -> None:
    pool = filled(2, max_idle=100)
    assert pool.decide(99, free=0, waiting=0) == (0, [], 100)
    assert pool.decide(100, free=0, waiting=0) == (0, [0], 101)
    pool.gone(0)
    assert pool.decide(100.5, free=1, waiting=0) == (1, [], 101)


def test_a_dead_member_is_replaced_and_not_handed_out() -> None:
    pool = filled(2)
    pool.gone(1)
    assert pool.decide(3, free=1, waiting=0).start == 1
    assert pool.take() == 0
    assert pool.take() is None


class PoolMachine(RuleBasedStateMachine):
    """A host with a few slots; the pool, other people's VMs, and waiters in turn."""

    @initialize(
        slots=strategies.integers(1, 5),
        size=strategies.integers(1, 4),
        max_idle=strategies.sampled_from([5.0, 1e6]),
    )
    def begin(self, slots: int, size: int, max_idle: float) -> None:
        self.now = 0.0
        self.slots = slots
        self.others = 0
        self.waiting = 0
        self.hoping = 0
        self.pool: Pool[int] = Pool(size, max_idle)
        self.out: list[int] = []
        self.dead: set[int] = set()
        self.leaving: list[int] = []
        self.starting: list[int] = []
        self.numbers = itertools.count()

    @property
    def free(self) -> int:
        held = len(self.pool._members) + len(self.out) + self.others
        return self.slots - held

    @rule(seconds=strategies.floats(0.01, 30))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def decide(self) -> None:
        before = self.pool.count(Place.IDLE)
        leaving = self.pool.count(Place.LEAVING)
        starting = self.pool.count(Place.STARTING)
        decision = self.pool.decide(
            self.now, free=self.free, waiting=self.waiting, hoping=self.hoping
        )
        assert decision.start <= max(0, self.free)
        assert not (decision.start and self.waiting)
        assert not self.dead & set(decision.end)
        assert len(set(decision.end)) == len(decision.end)
        if decision.look_again is not None:
            assert decision.look_again >= self.now
        promised = min(self.hoping, starting)
        need = self.waiting - promised - self.free - leaving
        if need > 0:
            assert len(decision.end) >= min(need, before + starting - promised)
        aged = [m for m in decision.end if m not in self.starting]
        assert len(decision.end) <= max(need, 1 if self.waiting else 0) + len(aged)
        for member in decision.end:
            self.leaving.append(member)
            if member in self.starting:
                self.starting.remove(member)
        for _ in range(decision.start):
            member = next(self.numbers)
            self.pool.starting(member)
            self.starting.append(member)
        # Nothing changed: whoever asks again at the same moment hears nothing new.
        again = self.pool.decide(self.now, free=self.free, waiting=self.waiting, hoping=self.hoping)
        assert again.end == []
        assert again.start <= 0 or self.pool.count(Place.STARTING) < MAX_STARTING

    @precondition(lambda self: self.starting)
    @rule(how=strategies.sampled_from(["ready", "failed", "refused"]))
    def a_start_ends(self, how: str) -> None:
        member = self.starting.pop(0)
        if how == "ready":
            assert self.pool.ready(member, self.now)
        else:
            getattr(self.pool, how)(member, self.now)

    @precondition(lambda self: self.leaving)
    @rule()
    def an_end_is_done(self) -> None:
        member = self.leaving.pop(0)
        assert not self.pool.ready(member, self.now)
        self.pool.gone(member)

    @rule()
    def a_request_takes_one(self) -> None:
        idle = self.pool.count(Place.IDLE)
        member = self.pool.take()
        assert (member is None) == (idle == 0)
        if member is not None:
            assert member not in self.dead
            assert member not in self.leaving
            self.out.append(member)
            self.pool.used()

    @precondition(lambda self: self.out)
    @rule()
    def a_request_is_done(self) -> None:
        self.out.pop()

    @precondition(lambda self: self.pool.count(Place.IDLE))
    @rule()
    def a_member_dies(self) -> None:
        member = next(iter(self.pool._idle_since))
        self.dead.add(member)
        self.pool.gone(member)

    @rule(hoping=strategies.booleans())
    def somebody_comes(self, hoping: bool) -> None:
        if self.free > 0 and not self.waiting:
            self.others += 1
        else:
            self.waiting += 1
            self.hoping += hoping

    @precondition(lambda self: self.waiting and self.free > 0)
    @rule()
    def a_waiter_is_served(self) -> None:
        self.waiting -= 1
        self.hoping = min(self.hoping, self.waiting)
        self.others += 1

    @precondition(lambda self: self.others)
    @rule()
    def somebody_leaves(self) -> None:
        self.others -= 1

    @invariant()
    def it_never_has_more_than_it_should(self) -> None:
        if hasattr(self, "pool"):
            kept = self.pool.count(Place.IDLE) + self.pool.count(Place.STARTING)
            assert kept <= self.pool.size
            assert self.pool.count(Place.STARTING) <= MAX_STARTING
            assert self.free >= 0

    def teardown(self) -> None:
        """When all is quiet the pool is full again, in bounded time."""
        if not hasattr(self, "pool"):
            return
        self.others = self.waiting = self.hoping = 0
        self.out.clear()
        while self.leaving:
            self.an_end_is_done()
        for _ in range(20):
            for member in self.starting:
                self.pool.ready(member, self.now)
            self.starting.clear()
            self.now += LONGEST_PAUSE
            decision = self.pool.decide(self.now, free=self.free, waiting=0)
            for member in decision.end:
                self.pool.gone(member)
            for _ in range(decision.start):
                self.starting.append(next(self.numbers))
                self.pool.starting(self.starting[-1])
        if self.pool.max_idle == 1e6:
            assert self.pool.count(Place.IDLE) == min(self.pool.size, self.slots)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
