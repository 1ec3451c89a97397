"""What the guest kernel and the machine use, read from /proc (proc(5)).

The figures are those of ipykernel's ``usage_reply``, which takes them from psutil; the agent does
without.  CPU use is that since the last question, in per cent of one processor.

A process's exact share of the memory is told under a lock of that process's, which it may hold for
as long as it waits for its turn: among a thousand others, or for memory, for seconds each.  The
agent cannot wait so long.  Then it is estimated by counters that take no lock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

MOST_PROCESSES = 256
"""How many of the kernel's processes are looked at: reading each one's memory takes a while."""
PATIENCE = 0.5
"""Seconds after which memory is only estimated."""
CROWD = 64
"""Processes that want to run."""
_TICKS = os.sysconf("SC_CLK_TCK")
_MEMORY = {
    "total": ("MemTotal",), "available": ("MemAvailable",), "free": ("MemFree",),
    "active": ("Active",), "inactive": ("Inactive",), "buffers": ("Buffers",),
    "cached": ("Cached", "SReclaimable"), "shared": ("Shmem",), "slab": ("Slab",),
}  # fmt: skip


class Meter:
    """Measures, and remembers what it needs to know at the next question."""

    def __init__(self) -> None:
        self._asked = 0.0
        self._spent: dict[tuple[int, int], int] = {}
        self._machine = (0, 0)

    def measure(self, kernel_pid: int) -> dict[str, Any]:
        """The fields of `messages.Usage`.  ``kernel_pid`` is 0 where there is no kernel."""
        now, first = time.monotonic(), not self._asked
        elapsed, self._asked = now - self._asked, now
        processes = list(_tree(kernel_pid)) if kernel_pid else []
        # A pid may have been given again: its start tells
        spent = {(pid, start): ticks for pid, start, ticks in processes}
        used = sum(max(0, spent[key] - self._spent.get(key, 0)) for key in spent)
        self._spent = spent
        (busy_then, total_then), self._machine = self._machine, _machine_ticks()
        busy, passed = self._machine[0] - busy_then, self._machine[1] - total_then
        machine = _memory()
        in_need = _runnable() > CROWD or machine["available"] < machine["total"] / 16
        deadline = now if in_need else now + PATIENCE
        return {
            "pid": kernel_pid,
            "kernel_cpu": 0.0 if first else round(100 * used / _TICKS / max(elapsed, 0.01), 1),
            "kernel_memory": min(
                sum(_memory_of(pid, deadline) for pid, _, _ in processes), machine["total"]
            ),
            "machine_cpu": None if first or not passed else round(100 * busy / passed, 1),
            "cpu_count": os.cpu_count() or 1,
            "memory": machine,
        }


def _tree(root: int) -> Iterator[tuple[int, int, int]]:
    """Pid, start time and CPU ticks of a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    facts: dict[int, tuple[int, int, int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # Fields from the third on; the second is the name, in parentheses, whatever it holds
            fields = file.read().rpartition(b")")[2].split()
            pid = int(name)
            children.setdefault(int(fields[1]), []).append(pid)
            facts[pid] = (pid, int(fields[19]), int(fields[11]) + int(fields[12]))
    waiting = [root]
    for _ in range(MOST_PROCESSES):
        if not waiting:
            return
        pid = waiting.pop(0)
        if pid in facts:
            yield facts[pid]
        waiting += children.get(pid, ())


def _memory_of(pid: int, deadline: float) -> int:
    """A process's share of the memory, bytes: what it shares is divided among the sharers.

    After the deadline, all that is not from a file.
    """
    exact = time.monotonic() < deadline
    name, keys = ("smaps_rollup", (b"Pss:",)) if exact else ("status", (b"RssAnon:", b"RssShmem:"))
    with suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as file:
        fields = (line.split() for line in file)
        return sum(int(field[1]) * 1024 for field in fields if field and field[0] in keys)
    return 0


def _runnable() -> int:
    """How many processes and threads want to run now."""
    with open("/proc/loadavg") as file:
        return int(file.read().split()[3].partition("/")[0])


def _machine_ticks() -> tuple[int, int]:
    """Time spent by all processors since boot: busy, and in total."""
    with open("/proc/stat", "rb") as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]  # iowait is idle, too
    return sum(ticks) - idle, sum(ticks)


def _memory() -> dict[str, Any]:
    """The machine's memory, bytes, under the names that psutil gives."""
    lines = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            lines[name] = int(value.split()[0]) * 1024
    memory: dict[str, Any] = {
        name: sum(lines.get(part, 0) for part in parts) for name, parts in _MEMORY.items()
    }
    memory["used"] = memory["total"] - memory["available"]
    memory["percent"] = round(100 * memory["used"] / memory["total"], 1)
    return memory
