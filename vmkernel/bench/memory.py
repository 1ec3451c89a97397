"""How much memory kernels take, all their processes together, and how much processor time.

PSS (proc(5), smaps_rollup) divides each shared page among the processes that map it, so the sum
over processes counts no page twice.  It is only fair while several kernels live: with one, that
one pays alone for what every further kernel shares (libraries, the template's pages).  Hence the
*marginal* cost: what a further kernel adds, from 1 to N at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Footprint:
    """Memory of some processes, in MiB; ``by_program`` is the PSS by what the process is."""

    pss: float = 0.0
    private: float = 0.0
    """Written to by one process alone (private dirty)."""
    processes: int = 0
    by_program: dict[str, float] = field(default_factory=dict)

    def minus(self, other: Footprint, kernels: int) -> Footprint:
        """The share of one of ``kernels`` kernels in the difference."""
        names = self.by_program.keys() | other.by_program.keys()
        return Footprint(
            (self.pss - other.pss) / kernels,
            (self.private - other.private) / kernels,
            round((self.processes - other.processes) / kernels),
            {
                name: round(
                    (self.by_program.get(name, 0.0) - other.by_program.get(name, 0.0)) / kernels, 2
                )
                for name in sorted(names)
            },
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        values = asdict(self)
        return values | {"pss": round(self.pss, 2), "private": round(self.private, 2)}


def footprint(pids: Iterable[int]) -> Footprint:
    """The memory of these processes."""
    total = Footprint()
    for pid in pids:
        try:
            sizes = _rollup(pid)
            program = role(pid)
        except OSError:
            continue  # it ended meanwhile
        pss = sizes["Pss"] / 1024
        total.pss += pss
        total.private += sizes["Private_Dirty"] / 1024  # clean: the file's, shared with the next
        total.processes += 1
        total.by_program[program] = round(total.by_program.get(program, 0.0) + pss, 2)
    return total


Mappings = dict[str, dict[str, float]]
"""MiB resident, proportional and private, by process and kind of memory."""


def mappings(pids: Iterable[int]) -> Mappings:
    """What the memory of these processes is."""
    found: Mappings = {}
    for pid in pids:
        try:
            who = role(pid)
            lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
        except OSError:
            continue
        sizes: dict[str, float] = {}
        for line in lines:
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):  # a mapping's own line: addresses, rights, …, path
                words = rest.split(None, 4)
                kind = _kind(words[0], words[4].strip() if len(words) > 4 else "")
                empty = {"rss": 0.0, "pss": 0.0, "private": 0.0}
                sizes = found.setdefault(f"{who}: {kind}", empty)
            elif first in _SIZES:
                sizes[_SIZES[first]] += int(rest.split()[0]) / 1024
    return found


def further_mappings(one: Mappings, many: Mappings, kernels: int) -> Mappings:
    """The share of one of ``kernels`` kernels in the difference, the largest first."""
    nothing = {"rss": 0.0, "pss": 0.0, "private": 0.0}
    found = {
        name: {
            key: round((sizes[key] - one.get(name, nothing)[key]) / kernels, 2) for key in nothing
        }
        for name, sizes in many.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["pss"]))


_SIZES = {"Rss:": "rss", "Pss:": "pss", "Private_Dirty:": "private"}


def _kind(rights: str, path: str) -> str:
    if path.startswith("["):
        return path.strip("[]").partition(":")[0]
    if not path:
        return "translated code" if "w" in rights and "x" in rights else "anonymous"
    if "/templates/" in path or path.endswith("/ram"):
        return "guest's memory"
    return "files" if "w" not in rights else "files, written to"


def role(pid: int) -> str:
    """What a kernel's process is: its program's name, or for several of Python which."""
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    if name.startswith("qemu"):
        return "qemu"
    if is_history(pid):
        return "history"
    return name


def is_history(pid: int) -> bool:
    """Whether this is the process that writes a kernel's history, and ends a while after."""
    try:
        return b"history_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def processor_seconds(pids: Iterable[int]) -> float:
    """Processor time that the processes have used until now."""
    total = 0.0
    for pid in pids:
        try:
            threads = list(Path(f"/proc/{pid}/task").iterdir())
            total += sum(_thread_seconds(thread) for thread in threads)
        except OSError:
            continue
    return total


def idle_cpu(pids: list[int], seconds: float) -> float:
    """Percent of one core that the processes use while nobody asks anything of them."""
    before, begun = processor_seconds(pids), time.monotonic()
    time.sleep(seconds)
    return 100.0 * (processor_seconds(pids) - before) / (time.monotonic() - begun)


def _thread_seconds(thread: Path) -> float:
    # Nanoseconds, where stat counts in ticks of 10 ms, most of which an idle kernel never fills
    try:
        return int((thread / "schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:  # a Linux without CONFIG_SCHED_INFO, or the thread ended
        if not (thread / "stat").exists():
            return 0.0
    # After the name in parentheses; utime and stime are fields 14 and 15 of proc(5).
    fields = (thread / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _rollup(pid: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0])
    if "Pss" not in sizes:  # a process that is just ending has no memory left
        raise ProcessLookupError(pid)
    return sizes
