"""What a guest did that no correct guest does: counted by kind, said once of each kind.

Such messages are dropped, as long as the stream that they came by can be trusted.  The log belongs
to the Jupyter server or to the runner, and a guest can be odd as often as it likes: so each kind is
one line, and the end is one line with the figures.  A kind is the host's word, never the guest's.
"""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger("vmkernel")

_MOST_DETAIL = 120


class Oddities:
    """The counts of one kernel, or of one VM."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Oddities {self.in_words() or 'none'}>"

    def note(self, kind: str, detail: object = "") -> None:
        """One more of this kind; ``detail``, which may be the guest's, is logged with the first."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            more = f": {detail!r:.{_MOST_DETAIL}}" if detail else ""
            log.warning("dropped, and not logged again: %s%s", kind, more)

    @property
    def total(self) -> int:
        """How many of all kinds."""
        return self.counts.total()

    def in_words(self) -> str:
        """The counts by kind, the most frequent first; "" when there are none."""
        return ", ".join(f"{kind}: {count}" for kind, count in self.counts.most_common())

    def log_total(self) -> None:
        """At the end: the figures, if there are any that the log has not told yet."""
        if self.total > len(self.counts):
            log.warning("dropped of what the guest sent: %s", self.in_words())
