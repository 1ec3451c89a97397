"""What a test session left behind: processes that belong to it, and files in its directory.

Every process of a session carries the session's directory in its environment or on its command
line (VMKERNEL_RUNTIME_DIR), wherever it was re-parented to; so it can be told from a VM that the
user runs beside the tests.  Network namespaces and links carry a name that was noted in that
directory before they were made (`note_network`).
"""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


def processes_of(session_dir: Path) -> list[psutil.Process]:
    """The living processes of the session, without this one and those above it."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    mark = str(session_dir)
    found = []
    for process in psutil.process_iter():
        if process.pid in mine:
            continue
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if _is_resource_tracker(process):
                continue
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(mark in word for word in words):
            found.append(process)
    return found


def _is_resource_tracker(process: psutil.Process) -> bool:
    # multiprocessing's own helper; it ends with the interpreter, after the last test.
    return "multiprocessing.resource_tracker" in " ".join(process.cmdline())


def describe(process: psutil.Process) -> str:
    """One line: pid and command line, shortened."""
    try:
        return f"pid {process.pid}: {' '.join(process.cmdline())[:160]}"
    except psutil.NoSuchProcess:
        return f"pid {process.pid}: (just gone)"


def files_in(runtime_dir: Path) -> list[str]:
    """What should be gone when no VM runs: sockets, pipes, and each VM's own files.

    Plain files at the top (the semaphore file, locks) and empty directories there are furniture.
    """
    if not runtime_dir.is_dir():
        return []
    left = []
    for path in sorted(runtime_dir.rglob("*")):
        mode = path.lstat().st_mode
        at_top = path.parent == runtime_dir
        if not (at_top and (stat.S_ISREG(mode) or stat.S_ISDIR(mode))):
            left.append(f"{stat.filemode(mode)} {path}")
    return left


def note_network(session_dir: Path, prefix: str) -> None:
    """Namespaces, bridges and links whose names begin like this are the session's."""
    (session_dir / "networks").mkdir(exist_ok=True)
    (session_dir / "networks" / prefix).touch()


def networks_of(session_dir: Path) -> Iterator[tuple[str, str]]:
    """The session's namespaces (``netns``) and links (``link``) that are there, by name."""
    noted = tuple(path.name for path in (session_dir / "networks").glob("*"))
    for kind, directory in (("netns", "/run/netns"), ("link", "/sys/class/net")):
        if noted and Path(directory).is_dir():
            found = sorted(path.name for path in Path(directory).iterdir())
            yield from ((kind, name) for name in found if name.startswith(noted))


def remove_networks(session_dir: Path) -> None:
    """Take them away.  With a namespace goes its end of a link, and with that the other."""
    for kind, name in networks_of(session_dir):
        subprocess.run(["ip", kind, "del", name], capture_output=True, check=False)


def find(session_dir: Path, patience: float = 5.0) -> list[str]:
    """Everything left behind, one line each; what is about to end gets *patience* seconds."""
    deadline = time.monotonic() + patience
    while (left := processes_of(session_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    networks = (" ".join(network) for network in networks_of(session_dir))
    return [*map(describe, left), *files_in(session_dir / "run"), *networks]
