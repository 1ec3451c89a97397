"""What the model is made of: the times that were measured, and where each is from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PERFORMANCE = Path(__file__).parents[2] / "docs" / "performance.json"


@dataclass(frozen=True)
class Figures:
    """Seconds, except where it says otherwise."""

    # docs/performance.json: one host, emulation (TCG)
    start: float = 0.340
    """Spawn to first result, past the pool; processor time of one core, near enough."""
    start_ready: float = 0.054
    """The same from the ready pool."""
    refill_pause: float = 1.5
    """From a hand-over until the pool begins its next member, which takes `start`."""
    end: float = 0.027

    # script/scale --real: one Ray head and one raylet of 2.60 on two cores
    reserve: float = 0.0031
    """What the head (and a raylet) take for one placement group, when many are asked for."""
    look: float = 0.0002
    """What the head takes to find that a waiting group still finds no slot."""
    call: float = 0.0018
    """One call of a host's actor."""

    # Ray's source: GcsPlacementGroupManager
    tick: float = 1.0
    """How often the head looks at what waits, when nothing else makes it."""
    retry_first: float = 0.1
    retry_most: float = 1.0
    retry_factor: float = 1.5

    # vmkernel/cluster: search.py, hosted.py, lease.py
    refusal: float = 3.0
    """How long a host that has no slot after all waits for one before it says so."""
    tries: int = 5
    backoff: float = 0.2
    """Before the second try; doubles, with jitter of a half."""
    avoid: float = 20.0
    """For which a host that said no is not asked again, by that driver."""
    renewal: float = 2.0
    lease: float = 30.0
    slack: float = 2.0

    # tests/cluster/test_cluster.py bounds these; Ray's health check is 5 times 3 s
    node_death: float = 20.0
    """From a host's power cut until Ray's head knows of it."""

    @property
    def given_up(self) -> float:
        """From a silent host's last answer until its kernels are given up."""
        return self.lease + self.slack


NONE = Figures(
    start=0, start_ready=0, refill_pause=0, end=0, reserve=0, look=0, call=0, refusal=0, backoff=0
)
"""Everything takes no time: what remains is the queue, for which there is a theory."""


def measured(path: Path = PERFORMANCE) -> Figures:
    """The figures, with the starts and the end of the run that docs/performance.md shows."""
    figures = json.loads(path.read_text())["figures"]
    return Figures(
        start=round(figures["start_first"]["vmsandbox"]["median"], 3),
        start_ready=round(figures["start_first"]["vmsandbox+pool"]["median"], 3),
        end=round(figures["shutdown"]["vmsandbox"]["median"], 3),
    )
