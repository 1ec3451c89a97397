"""Tells whoever started the kernel how its VM's start goes: the protocol of sd_notify(3).

Datagrams of ``NAME=value`` lines to the Unix socket that VMKERNEL_NOTIFY_SOCKET names (``@…`` in
the abstract namespace): ``READY=1`` when the VM has its slot, ``STATUS=…`` what is waited for, and
``ERRNO=…`` with a STATUS, and what to do (`HINT`), when there will be no VM.  Not systemd's own
variable, which a Jupyter server that runs as a service hands on to its kernels.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress

from vmkernel.settings import NOTIFY_SOCKET

VARIABLE = NOTIFY_SOCKET
CAPACITY = errno.EAGAIN
"""ERRNO when no slot became free."""
MOST = 1000
"""Characters of a status or hint."""
HINT = "X_VMKERNEL_HINT"
"""The protocol leaves names that begin with X_ to us."""


def notify(status: str = "", *, ready: bool = False, error: int = 0, hint: str = "") -> None:
    """Send what is given; nothing where nobody wants to know, or nobody is there any more."""
    place = os.environ.get(VARIABLE)
    if not place:
        return
    lines = [f"STATUS={_in_a_line(status)}"] if status else []
    if error:
        lines += [f"ERRNO={error}", f"{HINT}={_in_a_line(hint)}"]
    if ready:
        lines.append("READY=1")
    address = f"\0{place[1:]}" if place.startswith("@") else place
    with (
        suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
    ):
        sock.sendto("\n".join(lines).encode(errors="replace"), address)


def _in_a_line(text: str) -> str:
    return " ".join(text.split())[:MOST]
