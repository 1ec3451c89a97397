"""What keeps the user's code and the agent apart inside the VM.

The VM is the wall; this is the door to the engine room.  Cells are an ordinary user's, and what an
ordinary user can do to Linux is bounded here: so that the agent lives and answers whatever runs,
and a guest kernel can be put in the place of one that was brought down.  Nothing of it is to be
noticed by Python: processes, threads, shared memory, debuggers and loopback sockets work as on any
other machine.  All of it happens once, in the memory template, and costs a clone nothing.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

SYSCTL = {
    # What was needed is loaded; a module is code of the kernel's, and some are made to be asked for
    "kernel/modules_disabled": "1",
    "kernel/kexec_load_disabled": "1",
    # Favourite tools of exploits against the kernel, which nobody's notebook needs
    "kernel/unprivileged_bpf_disabled": "1",  # until reboot, where Debian's 2 could be undone
    "kernel/io_uring_disabled": "2",
    "vm/unprivileged_userfaultfd": "0",
    "kernel/perf_event_paranoid": "3",
    "dev/tty/ldisc_autoload": "0",
    "dev/tty/legacy_tiocsti": "0",
    # A user namespace makes anybody root over parts of the kernel that are written for root
    "user/max_user_namespaces": "0",
    # Where the kernel lies in memory, and what it says, is not told
    "kernel/kptr_restrict": "2",
    "kernel/dmesg_restrict": "1",
    # Links and files that others put into /tmp, as systemd sets it on Debian
    "fs/protected_hardlinks": "1",
    "fs/protected_symlinks": "1",
    "fs/protected_fifos": "1",
    "fs/protected_regular": "2",
    "fs/suid_dumpable": "0",
    "kernel/randomize_va_space": "2",
    "kernel/sysrq": "0",
    # A program could be named that the kernel runs as root; dumps are written only if `ulimit -c`
    # asks for them, since the soft limit is 0
    "kernel/core_pattern": "core",
    # What memory is held by no process, no process's end gives back: System V segments end with
    # their users, and queues (32,000 of 16 KiB each, else) are few
    "kernel/shm_rmid_forced": "1",
    "kernel/msgmni": "64",
}
"""Linux, Documentation/admin-guide/sysctl.  One that this kernel lacks is passed over.

Left alone: Yama's ptrace_scope, as `debugpy --pid`, py-spy and gdb attach to one's own processes,
and the agent's are another user's.
"""

RUN_SIZE = 16 << 20
"""Bytes that /run may take: /run/lock is writable, and what lies there lies in memory."""
RUN_FILES = 4096
MOST_PROCESSES = 1 << 14
"""Processes and threads of the user at most; Linux's own limit is smaller below 4 GiB of memory.

Half of what there can be: the agent must always be able to make one.
"""
PRIORITY = 1
"""Of real time: above all that is not."""
LAST_WAIT = 10.0
"""Seconds in which the user's processes have to be gone once they were killed."""

MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 2, 4, 32, 4096  # mount(2)
MNT_DETACH = 2  # umount2(2)
_MCL_CURRENT, _MCL_ONFAULT = 1, 4  # mlockall(2)
_PR_SET_NO_NEW_PRIVS = 38  # prctl(2)

_libc = ctypes.CDLL(None, use_errno=True)


def close_doors() -> None:
    """Set what holds for the whole machine.  As root, once, when all is mounted and loaded."""
    for name, value in SYSCTL.items():
        with suppress(OSError):  # this kernel lacks it, or has it locked already
            Path("/proc/sys", name).write_text(value)
    mount("/", MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV)
    mount(
        "/run",
        MS_REMOUNT | MS_NOSUID | MS_NODEV,
        f"mode=0755,size={RUN_SIZE},nr_inodes={RUN_FILES}",
    )


def mount(target: str, flags: int, options: str = "", source: str = "none") -> None:
    """mount(2).  Raises OSError."""
    arguments = (os.fsencode(source), os.fsencode(target), None, flags, options.encode())
    if _libc.mount(*arguments[:3], ctypes.c_ulong(flags), arguments[4]):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def unmount(target: str) -> None:
    """umount2(2), though somebody may still be there.  Raises OSError."""
    if _libc.umount2(os.fsencode(target), MNT_DETACH):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def stand_above() -> None:
    """Let this process go before all others, and keep in memory what it uses.

    For the agent, once it has loaded what it needs.  A thousand spinning processes would otherwise
    get a thousand turns for one of its own, and one that is short of memory would have its code
    read from the disk again and again.  Its forks are ordinary processes.
    """
    policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
    os.sched_setscheduler(0, policy, os.sched_param(PRIORITY))
    if _libc.mlockall(_MCL_CURRENT | _MCL_ONFAULT):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "mlockall")


def bind_user() -> None:
    """Limit this process and all that come of it.  In a fork of the agent's, while it is root."""
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    most = MOST_PROCESSES if most == resource.RLIM_INFINITY else min(most, MOST_PROCESSES)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    # No program can give back what was given up, should one with such a bit ever be there
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "PR_SET_NO_NEW_PRIVS")


def end_the_others() -> None:
    """End every process of this one's user but this one, and wait until they are gone.

    One that forks all the time escapes neither: kill(2) holds off forks while it goes round, and
    whoever is about to fork finds the signal first.
    """
    deadline = time.monotonic() + LAST_WAIT
    while True:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        if not _others() or time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _others() -> bool:
    me, user = os.getpid(), os.geteuid()
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != me:
            with suppress(FileNotFoundError, ProcessLookupError):
                if os.stat(f"/proc/{name}").st_uid == user:
                    return True
    return False
