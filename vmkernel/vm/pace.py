"""How fast a guest may send what nobody asked for.

While a cell runs, its output goes as fast as front ends take it.  What comes at other times
(threads that a cell left behind, comms, questions, plain noise) is paid for from an account that
fills at a steady rate; when it is empty, the port is not read until it is not, and the guest's
writes block.  Nothing is dropped.  A Jupyter server drops above 1,000 messages a second by itself.
"""

from __future__ import annotations

RATE = 500.0
"""Messages a second, for ever: more than any widget or progress bar sends."""
BURST = 2000.0
"""Messages at once."""
BYTES_PER_MESSAGE = 64 << 10
"""A larger message counts for several: at RATE, 32 MB a second."""
QUESTION = 50.0
"""What counts for so many: a prompt shown to a person before the last was answered."""
LONGEST_PAUSE = 5.0
"""Seconds.  An account that is further in the red stays there."""


def price(size: int) -> float:
    """What a message of ``size`` bytes costs."""
    return 1.0 + size / BYTES_PER_MESSAGE


class Account:
    """Fills with time up to ``burst``.  ``now`` is any clock in seconds that goes forward."""

    def __init__(self, now: float, rate: float = RATE, burst: float = BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def __repr__(self) -> str:
        return f"<Account {self._left:.0f} of {self._burst:.0f}>"

    def take(self, cost: float, now: float) -> float:
        """Pay; for how many seconds to read no more, 0 while there is something left."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - cost
        self._at = now
        return min(LONGEST_PAUSE, max(0.0, -self._left / self._rate))
