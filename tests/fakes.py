"""Processes that do nothing, under any name: what the record of VMs may be about."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vmkernel.host import processes
from vmkernel.host.processes import ProcessIdentity
from vmkernel.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[1]
DEAD = {"runner_pid": os.getpid(), "runner_start": 1}
"""A runner whose pid is another process's by now."""

Start = Callable[..., subprocess.Popen[bytes]]


class Processes:
    """Starts them, and ends what it started."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, *arguments: str, name: str = "sleep", settled: bool = True
    ) -> subprocess.Popen[bytes]:
        """A child with this command line; ``settled``: it has it already."""
        program = [name, "-c", "read line", *arguments]  # a builtin: no second process
        child = subprocess.Popen(program, executable="/bin/sh", stdin=subprocess.PIPE)
        self._started.append(child)
        while settled and not processes.arguments(child.pid):
            time.sleep(0.001)  # Popen returns in the midst of execve
        return child

    def qemu(
        self, settings: Settings, vm_id: str, *arguments: str, tag: str = ""
    ) -> subprocess.Popen[bytes]:
        """A child that says it is this VM's QEMU."""
        tag = tag or processes.tag_of(settings.database_file)
        name = f"vmkernel-{vm_id}.{tag}"
        return self.start("-name", name, *arguments, name="/usr/bin/qemu-system-x86_64")

    def end(self) -> None:
        """Kill and reap them all."""
        for child in self._started:
            child.kill()
            child.communicate()


def identity(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    """Pid and start time of a child that lives."""
    found = processes.identify(process.pid)
    assert found is not None
    return found


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process with vmkernel; it begins with a line on its standard input."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(children: list[subprocess.Popen[str]], seconds: float = 60) -> list[str]:
    """Let them begin at once; what each printed.  None may fail or complain."""
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=seconds) for child in children]
    assert [
        (child.returncode, errors) for child, (_, errors) in zip(children, outputs, strict=True)
    ] == [(0, "")] * len(children), outputs
    return [output for output, _ in outputs]
