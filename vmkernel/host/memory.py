"""A limit on the memory of a process that reads what a guest says.

The last defence: :mod:`vmkernel.protocol.bounds` refuses what would grow beyond measure, and what
gets past all else ends in a MemoryError here and with it the VM (`vm.ports`), where without a limit
the host would look for a victim.  QEMU has a limit of its own (`vm.limits`).
"""

from __future__ import annotations

import resource
import sys

MOST_IN_RUNNER = 1 << 30
"""Bytes.  A runner needs 30 MB, and for the largest message that is legal about 700 MB."""
MOST_IN_WRAPPER = 3 << 29
"""Bytes; a wrapper kernel also cleans what it passes on."""
FEWEST_DIGITS = 640
"""Of an integer: converting takes time by the square of them.  Python allows no smaller limit."""


def limit_memory(most: int) -> None:
    """Have a limit of ``most`` bytes, where there is none that is lower, and no long integers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft == resource.RLIM_INFINITY or soft > limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    sys.set_int_max_str_digits(FEWEST_DIGITS)
