"""What a process inherits and a kernel's start should not change: what limits it, and where it is.

A kernel of the pool is a child of the server, so it has the server's; a launcher that has others
starts its kernel itself, and no limit is lost, or escaped, by a pool.
"""

from __future__ import annotations

import os
from pathlib import Path

_SPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_STATUS = frozenset(
    "Uid Gid Groups NoNewPrivs Seccomp Seccomp_filters CapPrm CapEff CapBnd CapAmb "
    "Cpus_allowed Mems_allowed".split()
)
_OURS = ("Max data size", "Max open files")
"""Limits of which a kernel changes the soft one by itself (`host.memory`, `host.descriptors`)."""


def surroundings(pid: int) -> tuple[object, ...] | None:
    """All of it, to be compared; None, equal to nobody's, when the process is gone."""
    proc = Path("/proc", str(pid))
    try:
        return (
            *((proc / "ns" / name).readlink() for name in _SPACES),
            (proc / "root").readlink(),
            (proc / "cgroup").read_bytes(),
            (proc / "oom_score_adj").read_bytes(),
            os.getpriority(os.PRIO_PROCESS, pid),
            *_limits((proc / "limits").read_text()),
            *(
                line
                for line in (proc / "status").read_text().splitlines()
                if line.partition(":")[0] in _STATUS
            ),
        )
    except OSError:
        return None


def _limits(text: str) -> list[str]:
    lines = []
    for line in text.splitlines()[1:]:
        name, values = line[:26].strip(), line[26:].split()
        lines.append(f"{name} {values[1]}" if name in _OURS else f"{name} {values[:2]}")
    return lines
