"""Talking to the pool's server, and starting one: for kernels and commands.  Light imports."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmkernel.environment import plain
from vmkernel.pool import handover

if TYPE_CHECKING:
    from vmkernel.settings import Settings

ANSWER_SECONDS = 10.0
LOG_CAP = 1 << 20
"""Bytes of the server's log, beyond which the next server begins it anew."""


def want(path: bytes, arguments: list[str]) -> bool:
    """Ask for a member for kernels like this one, soon; whether a server has heard it.

    One that has heard it may keep none for kernels like this one.
    """
    try:
        sock = handover.connect(path)
    except (OSError, ValueError):
        return False
    with contextlib.closing(sock):
        request = _packed(arguments)
        try:
            handover.send(sock, handover.WANTED, [request])
            return bool(sock.recv(1))  # nothing: it is about to end
        except TimeoutError:  # it hangs
            return True
        except OSError:
            return False
        finally:
            os.close(request)


def ask(path: bytes, kind: bytes) -> dict[str, Any] | None:
    """What the server says to ``STATUS`` or ``STOP``; None when there is none that answers."""
    import json

    try:
        sock = handover.connect(path)
    except (OSError, ValueError):
        return None
    with contextlib.closing(sock):
        try:
            handover.send(sock, kind, [])
            sock.settimeout(ANSWER_SECONDS)  # members take a moment to end
            data = b""
            while part := sock.recv(65536):
                data += part
            answer: dict[str, Any] = json.loads(data)
        except (OSError, ValueError):
            return None
    return answer


def start_server(path: bytes, arguments: list[str], settings: Settings) -> None:
    """Start a server that fills the pool for kernels like this one.  Raises OSError.

    If there is one already, the new one finds that out and ends.
    """
    log_path = settings.state_dir / "pool.log"
    log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with contextlib.suppress(OSError):
        if log_path.stat().st_size > LOG_CAP:
            flags |= os.O_TRUNC
    request = _packed(arguments)
    try:
        pid = os.posix_spawn(
            "/bin/sh",
            # Not our child: nobody here would wait for it
            ["sh", "-c", '"$@" &', "sh", sys.executable, "-P", "-m", "vmkernel.pool",
             os.fsdecode(path)],
            # One arena for all threads: glibc would give each its own, in each member
            {**plain(os.environ), "MALLOC_ARENA_MAX": "1"},
            setsid=True,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, request, 3),  # a shell gives its background no stdin
                (os.POSIX_SPAWN_OPEN, 1, str(log_path), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )  # fmt: skip
    finally:
        os.close(request)
    os.waitpid(pid, 0)  # the shell, which ends at once


def _packed(arguments: list[str]) -> int:
    """A request of ours for kernels to come, to which this one's secrets are of no use."""
    environ = plain(os.environ)
    return handover.pack(arguments, {os.fsencode(n): os.fsencode(v) for n, v in environ.items()})


def remove_stale(path: Path) -> None:
    """Remove the socket of a server that was killed; nothing when one lives."""
    import fcntl

    with contextlib.suppress(OSError):
        lock = os.open(f"{path}.lock", os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a server holds it while it lives
            path.unlink()
        finally:
            os.close(lock)


def sockets_of(settings: Settings) -> list[Path]:
    """The sockets of all pools of this user, also of those that have died."""
    place = os.fsdecode(handover.place(dict(os.environb), "", ""))
    directories = {settings.runtime_dir, Path(place).parent} if place else {settings.runtime_dir}
    found = (path for directory in directories for path in directory.glob("pool-*"))
    return sorted(path for path in found if path.is_socket())
