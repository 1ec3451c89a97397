"""VMs that run, as the process table alone shows them: who finds them needs no record.

Floor 4, under ``host.registry`` (whose new database begins with them) and ``host.reaper``.  A QEMU
of ours says in its ``-name`` which VM it is and on which record (``vmkernel-<vm_id>.<tag>``); its
command line has memory, processors and paths, its parent is the runner.
"""

from __future__ import annotations

import json
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmkernel.host import processes
from vmkernel.host.processes import ProcessIdentity
from vmkernel.host.registry import VmRecord, new_record, vm_dir
from vmkernel.models import VmState

if TYPE_CHECKING:
    from vmkernel.settings import Settings

YOUNG = 10.0
"""Seconds for which nothing is held against what has no owner and no row: its maker is at it."""

_BEFORE_QEMU = ("setpriv", "sh", "env", "nice", "systemd-run", "unshare", "bwrap")
_NAME = re.compile(r"vmkernel-(vm-[0-9a-f]{8})\.([0-9a-f]{8})")


def find_qemus(settings: Settings, *, enclosing: bool = False) -> dict[ProcessIdentity, str]:
    """Every QEMU of this record's VMs, and which VM it is.

    ``enclosing``: also what is around one, or about to become one.
    """
    tag = processes.tag_of(settings.database_file)
    found = {}
    for pid in processes.own_processes():
        words = processes.arguments(pid)
        # From the last exec on: what starts and encloses QEMU carries its arguments, too.
        if "-name" not in words[:-1]:
            continue
        if Path(words[0]).name in _BEFORE_QEMU and not enclosing:
            continue
        name = _NAME.fullmatch(words[words.index("-name") + 1])
        identity = processes.identify(pid)
        if name and name[2] == tag and identity:
            found[identity] = name[1]
    return found


def owner(qemu: ProcessIdentity) -> ProcessIdentity | None:
    """The runner that started this QEMU, if it lives.

    Not merely the parent: who adopted an orphan (init, a user's systemd) is that, too.
    """
    pid = qemu.pid
    while parent := processes.parent(pid):
        if not any(_NAME.fullmatch(word) for word in processes.arguments(parent)):
            return processes.identify(parent) if processes.has_pidfd(parent, pid) else None
        pid = parent  # bubblewrap around QEMU, or what became it
    return None


def age(process: ProcessIdentity) -> float:
    """Seconds since it was started."""
    since_boot = process.start_time / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot


def find_running(settings: Settings) -> list[VmRecord]:
    """A record for each VM that runs, as far as the process table tells it."""
    return [
        _describe(settings, vm_id, qemu, runner)
        for qemu, vm_id in find_qemus(settings).items()
        if (runner := owner(qemu)) or age(qemu) > YOUNG
    ]


def find_orphans(settings: Settings) -> dict[ProcessIdentity, str]:
    """Every QEMU of this record's VMs whose runner is dead, and which VM it is."""
    return {
        qemu: vm_id
        for qemu, vm_id in find_qemus(settings).items()
        if age(qemu) > YOUNG and owner(qemu) is None
    }


def _describe(
    settings: Settings, vm_id: str, qemu: ProcessIdentity, runner: ProcessIdentity | None
) -> VmRecord:
    words = processes.arguments(qemu.pid)
    options = dict(pairwise(words))
    fields: dict[str, Any] = {
        "vm_id": vm_id,
        "state": VmState.RUNNING if runner else VmState.ORPHANED,
        "created": time.time() - age(qemu),
        "started": time.time() - age(qemu),
        "runner_pid": runner.pid if runner else 0,
        "runner_start": runner.start_time if runner else 0,
        "qemu_pid": qemu.pid,
        "qemu_start": qemu.start_time,
        "accelerator": options.get("-accel", "").partition(",")[0],
        "memory": _number(options.get("-m", "")),
        "vcpus": _number(options.get("-smp", "")) or 1,
        "log_dir": str(settings.state_dir / "logs" / vm_id),
        "slot": _slot(settings, {qemu.pid, runner.pid if runner else qemu.pid}),
        **_from_paths(words),
    }
    if runner:
        fields |= _from_runner(settings, vm_id, runner)
    return new_record(**fields)


def _from_paths(words: list[str]) -> dict[str, str]:
    """Which template and recipe: both are directories' names."""
    found = {}
    for word in words:
        if match := re.search(r"\bmem-path=([^,]+)", word):
            found["template"] = Path(match[1]).parent.name
        elif word.startswith("{") and '"root"' in word:
            try:
                found["recipe"] = Path(json.loads(word)["file"]["filename"]).parent.name
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _from_runner(settings: Settings, vm_id: str, runner: ProcessIdentity) -> dict[str, str]:
    """What the runner's command line tells: a detached one, or a notebook's kernel."""
    words = processes.arguments(runner.pid)
    if any(word.endswith("run_vm.py") for word in words):
        return {"directory": str(vm_dir(settings, vm_id))}
    for flag, file in pairwise(words):
        if flag in ("-f", "--connection-file"):
            kernel = Path(file).stem.removeprefix("kernel-")
            return {"kernel_id": kernel, "connection_file": file}
    return {}


def _slot(settings: Settings, pids: set[int]) -> int | None:
    from vmkernel.errors import VmError
    from vmkernel.host.capacity import Semaphore

    try:  # not vm_slots(), which names holders by the record
        slots = Semaphore(settings.semaphore_file, settings.max_concurrent_vms)
        return next((held.slot for held in slots.holders() if held.pid in pids), None)
    except VmError:
        return None


def _number(word: str) -> int:
    digits = re.match(r"\d+", word)
    return int(digits[0]) if digits else 0
