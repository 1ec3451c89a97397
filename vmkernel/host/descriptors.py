"""How many files a wrapper kernel may open.

libzmq is silent about a connection that it cannot accept for want of descriptors: the kernel would
live, and no front end would ever hear of it.  So a limit that is too low is told before that.
"""

from __future__ import annotations

import resource

from vmkernel.errors import VmError

FEWEST = 64
"""A kernel with its VM and one front end has some 45 open while the VM starts."""
PLENTY = 4096


def want_descriptors() -> None:
    """Raise this process's soft limit, as far as the hard one lets it.  Raises VmError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= PLENTY:
        return
    most = PLENTY if hard == resource.RLIM_INFINITY else min(PLENTY, hard)
    if most < FEWEST:
        raise VmError(
            f"this process may have {most} files open, and a kernel needs {FEWEST}",
            hint="raise the limit where Jupyter is started: ulimit -n 1024",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
