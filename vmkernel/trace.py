"""Time stamps of a kernel's start, for ``script/bench --waterfall``.

Off, and then no more than a comparison, unless ``begin`` was called with the file that the
environment variable VMKERNEL_TRACE names.  One line a step: CLOCK_MONOTONIC in ns (the same clock
for every process of the host), and the step's name.
"""

from __future__ import annotations

import os
import time

VARIABLE = "VMKERNEL_TRACE"
_fd = -1


def begin(path: str) -> None:
    """Append stamps to the file ``path`` from now on; no file, no stamps."""
    global _fd
    if path:
        _fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def mark(step: str) -> None:
    """Note that ``step`` has been reached."""
    if _fd >= 0:
        os.write(_fd, f"{time.monotonic_ns()} {step}\n".encode())
