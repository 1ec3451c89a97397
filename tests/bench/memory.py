"""How much memory kernels take, all their processes together.

PSS (proc(5), smaps_rollup) divides each shared page among the processes that map it, so the sum
over processes counts no page twice.  It is only fair while several kernels live: with one, that
one pays alone for what every further kernel shares (libraries, the template's pages).  Hence the
*marginal* cost: what a further kernel adds, from N = 1 to N = 5.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from subject import process_tree

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Footprint:
    """Memory of some processes, in MiB; ``by_program`` is the PSS by program name."""

    pss: float = 0.0
    private: float = 0.0
    processes: int = 0
    by_program: dict[str, float] = field(default_factory=dict)

    def minus(self, other: Footprint, kernels: int) -> Footprint:
        """The share of one of ``kernels`` kernels in the difference."""
        names = self.by_program.keys() | other.by_program.keys()
        return Footprint(
            (self.pss - other.pss) / kernels,
            (self.private - other.private) / kernels,
            (self.processes - other.processes) // kernels,
            {
                name: round(
                    (self.by_program.get(name, 0.0) - other.by_program.get(name, 0.0)) / kernels, 2
                )
                for name in sorted(names)
            },
        )


def footprint(roots: Iterable[int]) -> Footprint:
    """The memory of the processes ``roots`` and of all their descendants."""
    total = Footprint()
    for pid in [pid for root in roots for pid in process_tree(root)]:
        try:
            program = Path(f"/proc/{pid}/comm").read_text().strip()
            sizes = _rollup(pid)
        except OSError:
            continue  # it ended meanwhile
        pss = sizes["Pss"] / 1024
        total.pss += pss
        total.private += sizes["Private_Dirty"] / 1024  # clean: the file's, shared with the next
        total.processes += 1
        total.by_program[program] = round(total.by_program.get(program, 0.0) + pss, 2)
    return total


def idle_cpu(roots: Iterable[int], seconds: float) -> float:
    """Percent of one core that the processes use while nobody asks anything of them."""
    pids = [pid for root in roots for pid in process_tree(root)]
    before, begun = _cpu(pids), time.monotonic()
    time.sleep(seconds)
    return 100.0 * (_cpu(pids) - before) / (time.monotonic() - begun)


def _rollup(pid: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0])
    return sizes


def _cpu(pids: Iterable[int]) -> float:
    ticks = 0
    for pid in pids:
        try:
            # After the name in parentheses; utime and stime are fields 14 and 15 of proc(5).
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICK
