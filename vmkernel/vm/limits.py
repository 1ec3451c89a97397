"""What one QEMU may take of the host, and how it is held to that.

Where it stands: ``vm.qemu`` starts QEMU behind what this module says; `vmkernel doctor` tells.

Always: no core dumps, and a limit on memory that can be written to, so that a QEMU which grows
without end fails by itself.  It is RLIMIT_DATA and not RLIMIT_AS: most of QEMU's address space is
reserved and never used (64 MiB for each thread that allocates), and grows with the host's
processors.

With the setting ``cpu_quota``, where systemd runs with the cpu controller of cgroup v2: a transient
scope, by ``systemd-run --scope``.  That asks the manager to put itself into a new scope and then
becomes the program by exec (systemd, src/run/run.c, start_transient_scope): process id, parent,
parent-death signal and descriptors stay.  It is not run elsewhere; there a quota means low
priority: a VM yields to everybody else, and may take what they leave.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

NICE = 10
"""Priority (nice(1)) of a VM with a quota that nothing can hold it to."""
DATA_MIB = 2048
"""What QEMU may have of writable memory beyond the guest's.  Measured (QEMU 7.2, TCG, 1 and 4
vCPUs, heavy disk traffic from eight threads): 584 MiB at most, 128 of them for translated code; the
stacks of 64 threads for the disks, its most, are 512."""
MEMORY_MIB = 512
"""What it may really use beyond the guest's: measured 185 MiB at most.  What it has read and
written of files counts, too, in a cgroup, but is given back when it gets tight."""
TASKS = 256
"""Threads: processors, the disks' (64 at most), and a few."""

SETPRIV = "/usr/bin/setpriv"
"""Of util-linux, an essential package of Debian and Ubuntu."""
_SYSTEMD_RUN = "/usr/bin/systemd-run"
_DIE_WITH_PARENT = (SETPRIV, "--pdeathsig", "KILL")
_START = 'ulimit -c 0; ulimit -d {data} 2>/dev/null; {tasks}cd / && [ "$PPID" = "$0" ] && exec "$@"'


class Limits(msgspec.Struct, frozen=True):
    """For one VM: its guest's memory in MiB, and per cent of one processor (None: no limit)."""

    memory: int
    cpu_quota: int | None = None


class Holder(NamedTuple):
    """Who holds a VM to its quota: systemd's manager of the system or of the user, or nobody."""

    manager: Literal["system", "user"] | None
    evidence: str
    """For people: what was found, or what is missing."""


def find_holder(uid: int, environ: Mapping[str, str], root: Path = Path("/")) -> Holder:
    """Look who can hold a VM of this user to a quota.  ``root``: where the host's files lie."""
    if not (root / "run/systemd/system").is_dir():  # sd_booted(3)
        return Holder(None, "systemd does not run here")
    if not (root / _SYSTEMD_RUN[1:]).is_file():
        return Holder(None, f"{_SYSTEMD_RUN} is missing")
    cgroup = root / "sys/fs/cgroup"
    if not (cgroup / "cgroup.controllers").is_file():
        return Holder(None, "the host's cgroups are not of version 2 alone")
    manager: Literal["system", "user"] = "system"
    if uid != 0:
        manager = "user"
        runtime = environ.get("XDG_RUNTIME_DIR", "")
        if not runtime or not (root / runtime[1:] / "systemd/private").exists():
            return Holder(None, "no systemd user manager (XDG_RUNTIME_DIR) for this session")
        cgroup = cgroup / f"user.slice/user-{uid}.slice/user@{uid}.service"
    try:
        controllers = (cgroup / "cgroup.controllers").read_text().split()
    except OSError:
        controllers = []
    if "cpu" not in controllers:
        return Holder(None, f"systemd's {manager} manager has no cpu controller")
    return Holder(manager, f"a scope of systemd's {manager} manager")


def start_command(
    argv: Sequence[str],
    limits: Limits,
    holder: Holder | None,
    parent: int,
    user: Sequence[str] = (),
) -> list[str]:
    """The command that becomes ``argv`` under these limits, if ``parent`` still is its parent.

    ``holder`` is needed with a quota only.  ``user``: options of setpriv for another user.  It dies
    with its parent (PR_SET_PDEATHSIG).
    """
    data = (limits.memory + DATA_MIB) << 10
    # Where the user has nothing but this VM
    tasks = f"{limit_tasks()}; " if user else ""
    start = ["--", "/bin/sh", "-c", _START.format(data=data, tasks=tasks), str(parent)]
    if limits.cpu_quota is None:
        return [*_DIE_WITH_PARENT, *user, *start, *argv]
    # Later versions of systemd-run replace $NAME in the words of the command, unasked
    if holder is None or holder.manager is None or any("$" in word for word in argv):
        return [*_DIE_WITH_PARENT, *user, *start, "/usr/bin/nice", "-n", str(NICE), *argv]
    # As another user systemd-run would not be heard.  The signal is forgotten with a change of
    # user; who loses its parent in that instant is found by its name (`host.reaper`)
    become = [*_DIE_WITH_PARENT, *user, "--"] if user else []
    return [
        *_DIE_WITH_PARENT,
        *start,
        _SYSTEMD_RUN,
        f"--{holder.manager}",
        "--scope",
        "--quiet",
        "--collect",
        "--no-ask-password",
        "--description=vmkernel VM",
        f"--property=CPUQuota={limits.cpu_quota}%",
        f"--property=MemoryMax={limits.memory + MEMORY_MIB}M",
        f"--property=TasksMax={TASKS}",
        "--",
        *become,
        *argv,
    ]


def limit_tasks() -> str:
    """A shell's command for it; bash and dash have different letters."""
    return f"ulimit -u {TASKS} 2>/dev/null || ulimit -p {TASKS}"


def start_environment(limits: Limits, holder: Holder | None) -> dict[str, str]:
    """The environment of that command."""
    environ = {"LC_ALL": "C"}
    if limits.cpu_quota is not None and holder is not None and holder.manager == "user":
        environ["XDG_RUNTIME_DIR"] = os.environ["XDG_RUNTIME_DIR"]  # where its manager is found
    return environ


def describe(limits: Limits, holder: Holder) -> str:
    """What the quota means on this host, for people."""
    if limits.cpu_quota is None:
        return "no limit"
    share = f"{limits.cpu_quota} % of one processor"
    if holder.manager is None:
        return f"low priority (nice {NICE}); {share} cannot be held to: {holder.evidence}"
    return f"at most {share} ({holder.evidence})"
