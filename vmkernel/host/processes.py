"""Who is who in the process table: a process is its pid *and* its start time.

A pid alone may have passed to another process since it was written down; the pair cannot (the
start time is in clock ticks since the host's boot). Signals go through a pidfd, which is bound to
the process itself, so nothing can change hands between the check and the kill.
Reads /proc/PID/stat by itself: importing psutil would cost every kernel start tens of
milliseconds. Source: proc(5), pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vmkernel.vm.wall import VM_UIDS


class ProcessIdentity(NamedTuple):
    """One process for good: ``start_time`` in clock ticks since boot."""

    pid: int
    start_time: int


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has this pid now; None when there is none, or it is only a zombie.

    A zombie counts as dead: its descriptors, and with them its slot, are gone.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # "pid (name) state ppid …": the name may hold spaces and parentheses, so from the last one.
    fields = status[status.rfind(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return ProcessIdentity(pid, int(fields[19]))  # field 22 of proc(5)


def identify_self() -> ProcessIdentity:
    """This process."""
    identity = identify(os.getpid())
    assert identity is not None, "/proc shows the reading process alive"
    return identity


@functools.cache
def boot_id() -> str:
    """Which boot of the host this is: pids and start times mean something within it only."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # random(4)


def parent(pid: int) -> int | None:
    """The pid of its parent: of the process that has adopted it, when its own is dead."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return int(status[status.rfind(b")") + 2 :].split()[1])


def has_pidfd(pid: int, of: int) -> bool:
    """Whether it holds a pidfd of the process ``of``: who started a QEMU does, who adopts does not.

    Source: proc(5), /proc/PID/fdinfo; the line "Pid:" is there since Linux 5.3.
    """
    try:
        for entry in os.scandir(f"/proc/{pid}/fdinfo"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if f"\nPid:\t{of}\n".encode() in Path(entry.path).read_bytes():
                    return True
    except OSError:
        pass
    return False


def lock_holders(path: Path) -> list[int]:
    """The processes that hold a lock for writing on the file, by /proc/locks; for a message."""
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    # "7: POSIX  ADVISORY  WRITE 1234 fe:00:5678 120 120"; with "->" in it: somebody who waits.
    fields = [line.split() for line in lines if "->" not in line]
    return [
        int(words[4])
        for words in fields
        if words[3] == "WRITE" and words[5].endswith(f":{inode}") and int(words[4]) > 0
    ]


def is_alive(identity: ProcessIdentity | None) -> bool:
    """Whether this very process still lives; False for None (it was never started)."""
    return identity is not None and identify(identity.pid) == identity


def arguments(pid: int) -> list[str]:
    """Its command line; empty when it is gone, is a zombie or a kernel thread."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in line.split(b"\0")[:-1]]


def describe(pid: int) -> str:
    """A few words for a message: program and user; "" when nothing is known."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        uid = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return ""
    if uid == os.geteuid():
        return name
    import pwd

    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return f"{name}, user {user}"


def own_processes() -> Iterator[int]:
    """The pids of all processes of this user; of root's VMs, too, which have users of their own."""
    uid = os.geteuid()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                owner = entry.stat().st_uid
                if owner == uid or (uid == 0 and owner in VM_UIDS):
                    yield int(entry.name)


def kill(identity: ProcessIdentity, *, wait: float = 1.0) -> bool:
    """SIGKILL this very process and wait for its end, at most ``wait`` seconds.

    True when it is dead afterwards, or was already. Never touches another process of that pid.
    False when it may not be killed (another user's) or does not die (in uninterruptible sleep).
    """
    try:
        pidfd = os.pidfd_open(identity.pid)
    except OSError:
        return not is_alive(identity)
    try:
        if not is_alive(identity):  # from here on the pidfd is the process that was checked
            return True
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _ends(pidfd, wait)
    finally:
        os.close(pidfd)


def wait_ended(identity: ProcessIdentity, seconds: float = 1.0) -> bool:
    """Wait for the end of this very process; whether it has ended."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except OSError:
        return not is_alive(identity)
    try:
        return not is_alive(identity) or _ends(pidfd, seconds)
    finally:
        os.close(pidfd)


def _ends(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)  # readable once it ended
    return bool(poll.poll(seconds * 1000))


def tag_of(database_file: Path) -> str:
    """Eight hexadecimal digits in the ``-name`` of every QEMU that this record of VMs is about.

    By it a VM is found in the process table when it is not on record (yet, or any more).
    """
    import hashlib

    return hashlib.sha256(os.fsencode(database_file.resolve())).hexdigest()[:8]
