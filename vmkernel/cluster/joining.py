"""The process that speaks with Ray: its start, and why it could not join the cluster.  Floor 5."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import vmkernel
from vmkernel.errors import VmError

PROBE_TIMEOUT = 2.0
"""Seconds for a machine to refuse or take a connection."""
WRONG_TOKEN = re.compile("InvalidAuthToken|Unauthenticated|AuthenticationError")
"""What Ray writes on its standard error, once a second, while it tries a token in vain."""


def start_placer() -> tuple[subprocess.Popen[bytes], socket.socket, IO[bytes]]:
    """The child process, our end of the socket to it, and what it writes.  Raises VmError."""
    ours, theirs = socket.socketpair()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the cluster
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vmkernel.cluster.placer"],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                # Ray puts it on the search path of its workers: nothing of the user's
                cwd=Path(vmkernel.__file__).parent.parent,
                start_new_session=True,  # a Ctrl-C in the terminal is not for it
            )
    except OSError as error:
        ours.close()
        log.close()
        raise VmError(
            f"The process that speaks with Ray cannot be started: {error}",
            hint="the host may be out of processes or memory (`vmkernel doctor`)",
        ) from error
    return process, ours, log


def last_words(text: str) -> str:
    """The last line of what Ray wrote, without its time and thread."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^\[[^]]*\] ", "", lines[-1])[:300] if lines else ""


def why_not_joined(address: str, reason: str, told: str) -> VmError:
    """What a failed join means, and what to do; *told* is what Ray wrote on its own."""
    where = "of this host" if address == "auto" else f"at {address}"
    if "ImportError" in reason or "ModuleNotFoundError" in reason:
        if "a directory is named ray" in reason:
            return VmError(
                f"Ray cannot be imported: {reason.partition(': ')[2]} is found in its place",
                hint="rename that directory, or take it out of PYTHONPATH",
            )
        return VmError(
            f"Kernels on a cluster need Ray, which cannot be imported here: {reason}",
            hint="pip install 'vmkernel[ray]'",
        )
    everything = f"{reason}\n{told}"
    if WRONG_TOKEN.search(everything):
        return VmError(
            f"The Ray cluster {where} refuses this host's token",
            hint="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or the file RAY_AUTH_TOKEN_PATH, "
            "~/.ray/auth_token) to the token that the head was started with",
        )
    if "ersion mismatch" in everything:
        return VmError(
            f"The Ray cluster {where} has another version of Ray or of Python: "
            + " ".join(reason.split()),
            hint="use the same versions of Ray and Python on all hosts",
        )
    return VmError(
        f"No Ray cluster answers {where}: {last_words(told) or reason}",
        hint="start Ray on this host (`ray start --address=HEAD:6379`, docs/cluster.md), and set "
        "cluster_address or RAY_ADDRESS when it has several",
    )


async def refused(ip: str, port: int) -> bool:
    """Whether that machine lives and says that nobody listens there."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            _, writer = await asyncio.open_connection(ip, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return False
