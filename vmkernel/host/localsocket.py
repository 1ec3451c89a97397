"""The socket by which other processes of the user reach a VM's owner: its name, and who may enter.

Where it stands: apart from ``host.wire``, what is said over it, as a kernel opens its socket before
anybody has anything to say.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmkernel.errors import ProtocolError

CONTROL_SOCKET = "control.sock"
"""Its name in the VM's directory."""
CREDENTIALS = struct.Struct("3i")
"""A peer's, as unix(7) has them in struct ucred: pid, uid, gid."""


@contextmanager
def short_path(directory: Path) -> Iterator[str]:
    """A path of that directory that leaves room for a name: unix(7) allows a socket 107 bytes."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextmanager
def bound_in(directory: Path) -> Iterator[socket.socket]:
    """A socket in a VM's directory, which is made if need be; its parent is the user's alone.

    To be listened on inside, as Python 3.13 looks at the path that it was bound to.  It is the
    caller's, unless there is an exception.  Raises OSError.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with short_path(directory) as path:
            sock.bind(f"{path}/{CONTROL_SOCKET}")
            os.chmod(f"{path}/{CONTROL_SOCKET}", 0o600)  # noqa: PTH101
            yield sock
    except BaseException:
        sock.close()
        raise


def check_peer(sock: socket.socket) -> None:
    """The directory lets nobody else in; this is the second lock.  Raises ProtocolError."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _, uid, _ = CREDENTIALS.unpack(raw)
    if uid not in (0, os.geteuid()):
        raise ProtocolError(f"user id {uid} has no business here")
