"""Queueing theory, to hold the model against: the M/M/c queue (Erlang C).

Requests come at random (Poisson), at *load* times what *servers* can serve; each holds a server for
a time that is exponentially distributed, with mean *hold*.
"""

from __future__ import annotations

import math


def waits(servers: int, load: float) -> float:
    """The probability that who comes has to wait (Erlang's C), by the recursion of his B."""
    offered = servers * load
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    return blocked / (1 - load * (1 - blocked))


def mean_wait(servers: int, load: float, hold: float) -> float:
    """Seconds that one waits on the average, those who do not wait included."""
    return waits(servers, load) * hold / (servers * (1 - load))


def wait_quantile(servers: int, load: float, hold: float, share: float) -> float:
    """Seconds that this *share* of requests waits at most, when served in order of arrival."""
    waiting = waits(servers, load)
    if 1 - waiting >= share:
        return 0.0
    return math.log(waiting / (1 - share)) * hold / (servers * (1 - load))
