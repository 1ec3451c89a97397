"""What a warm pool does next: decided here, done in ``keeper.py``.

A pool keeps some VMs ready, so that a request gets one at once. This module knows no VM, no clock
and no event loop: it is told what happened and what the host looks like, and answers whom to
start and whom to end. So every course of events can be played through in a test.

The rules, in the order in which they win:

1. A member that died is forgotten, and never handed out.
2. Whoever waits for a slot on this host, in whatever process, gets one of ours: the member that
   has been idle longest is ended, as many members as there are waiters without a free slot. One
   that is still starting is given up, too, unless a request of our own hopes for it.
3. A member that has been idle for ``max_idle`` seconds is ended; a fresh one takes its place.
4. What is missing is started, while slots are free and nobody waits.

Against thrashing (yield, refill, yield): a pool that had to yield stays small for a second, for
two after the next time, up to a minute; a member that is handed out proves that the pool is of
use, and makes it quick again. The same goes for members that cannot be started.
"""

from __future__ import annotations

from enum import Enum
from typing import Generic, NamedTuple, TypeVar

MAX_STARTING = 2
"""How many members are started at once: each takes a processor for as long as it starts."""
QUIET_SECONDS = 1.0
"""How long nobody must have waited before the pool fills again."""
STALLED_SECONDS = 2.0
"""How long somebody waits beside a free slot until it is clear that he may not have it."""
LONGEST_PAUSE = 60.0
"""How long a pool that yields again and again stays small, at most."""

M = TypeVar("M")


class Place(Enum):
    """Where a member is in its life; a member that was handed out is a member no more."""

    STARTING = "starting"
    IDLE = "idle"
    LEAVING = "leaving"
    """It is being ended; until that is done it has its slot."""


class Decision(NamedTuple, Generic[M]):
    """What is to be done now."""

    start: int
    """How many members to start."""
    end: list[M]
    """Members to end; one that is still starting is to be given up."""
    look_again: float | None
    """When time alone changes the answer; None: not before something happens."""


class Pool(Generic[M]):
    """The members of a warm pool of ``size`` and what to do with them; times are in seconds.

    ``M`` is whatever stands for a member: hashable, each one used once.
    """

    def __init__(self, size: int, max_idle: float) -> None:
        self.size = size
        self.max_idle = max_idle
        self._members: dict[M, Place] = {}
        self._idle_since: dict[M, float] = {}  # in the order in which they became idle
        self._not_before = float("-inf")
        self._pause = QUIET_SECONDS
        self._waited_for_since: float | None = None

    # --- what happened ---

    def starting(self, member: M) -> None:
        """A start was begun."""
        assert member not in self._members, "each member is used once"
        self._members[member] = Place.STARTING

    def ready(self, member: M, now: float) -> bool:
        """A start went well: the member is idle. False when it is to be ended after all."""
        if self._members.get(member) is not Place.STARTING:
            return False
        self._members[member] = Place.IDLE
        self._idle_since[member] = now
        return True

    def refused(self, member: M, now: float) -> None:
        """There was no slot for a start, or somebody waits: try again a little later."""
        self.gone(member)
        self._not_before = max(self._not_before, now + QUIET_SECONDS)

    def failed(self, member: M, now: float) -> None:
        """A start failed: the next one is put off, longer each time."""
        self.gone(member)
        self._put_off(now)

    def take(self) -> M | None:
        """Hand out the freshest member; it is the caller's from now on. None: there is none."""
        if not self._idle_since:
            return None
        member = next(reversed(self._idle_since))
        self.gone(member)
        return member

    def postpone(self, until: float) -> None:
        """Start nothing before that moment; one in the past: start as soon as may be."""
        self._not_before = until

    def used(self) -> None:
        """A member that was handed out served a request: the pool is of use."""
        self._pause = QUIET_SECONDS

    def leaving(self, member: M) -> None:
        """Its end was begun, by whomever; it holds its slot until it is ``gone``."""
        self._idle_since.pop(member, None)
        self._members[member] = Place.LEAVING

    def gone(self, member: M) -> None:
        """It died, was ended or is another's; again is harmless."""
        self._members.pop(member, None)
        self._idle_since.pop(member, None)

    # --- what it looks like ---

    def count(self, place: Place) -> int:
        """How many members are there."""
        return sum(1 for found in self._members.values() if found is place)

    def __repr__(self) -> str:
        counts = " ".join(f"{place.value}={self.count(place)}" for place in Place)
        return f"<Pool size={self.size} {counts}>"

    # --- what to do ---

    def decide(self, now: float, *, free: int, waiting: int, hoping: int = 0) -> Decision[M]:
        """What to do, when so many slots of this host are ``free`` and so many requests wait.

        ``hoping``: how many of the requests that wait would take a member of ours. Members to be
        ended are counted as leaving from here on; each start is to be told by ``starting``.
        """
        starting = [m for m, place in self._members.items() if place is Place.STARTING]
        idle = list(self._idle_since)
        end = [m for m in idle if now - self._idle_since[m] >= self.max_idle]
        idle = idle[len(end) :]
        promised = min(hoping, len(starting))
        wanted = waiting - promised - free - self.count(Place.LEAVING) - len(end)
        if self._stalled(now, waiting) and wanted <= 0:
            wanted = 1
        if waiting:
            self._not_before = max(self._not_before, now + QUIET_SECONDS)
        if wanted > 0:
            # Of those that start the newest have the longest way to go.
            given = (idle + starting[promised:][::-1])[:wanted]
            if given:
                self._put_off(now)
            end += given
        for member in end:
            self.leaving(member)
        missing = self.size - self.count(Place.IDLE) - self.count(Place.STARTING)
        begun = self.count(Place.STARTING)  # some of which may not have taken their slot yet
        room = min(missing, free - begun, MAX_STARTING - begun)
        start = max(0, room) if not waiting and now >= self._not_before else 0
        return Decision(start, end, self._look_again(now, missing > 0 and not waiting))

    def _put_off(self, now: float) -> None:
        self._not_before = max(self._not_before, now + self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _stalled(self, now: float, waiting: int) -> bool:
        """Whether somebody has waited for long; if so, begin to count anew."""
        since = self._waited_for_since
        stalled = bool(waiting) and since is not None and now - since >= STALLED_SECONDS
        if not waiting:
            self._waited_for_since = None
        elif since is None or stalled:
            self._waited_for_since = now
        return stalled

    def _look_again(self, now: float, missing: bool) -> float | None:
        times = [since + self.max_idle for since in self._idle_since.values()]
        if self._members and self._waited_for_since is not None:
            times.append(self._waited_for_since + STALLED_SECONDS)
        if missing and self._not_before > now:
            times.append(self._not_before)
        return min(times, default=None)
