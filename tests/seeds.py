"""What the tests of SEEDS' rows share: racing processes, a QEMU with a fault, a look around."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil

from vmhost import VmHost
from vmkernel import VmManager, VmNotFoundError
from vmkernel.host import processes
from vmkernel.host.processes import ProcessIdentity
from vmkernel.vm.qemu import find_qemu

REPOSITORY = Path(__file__).resolve().parents[1]

_RACER = """
import asyncio, json, sys
from vmkernel import *
from vmkernel import VmManager
from vmkernel.settings import load_settings

def say(*what):
    print(json.dumps([str(each) for each in what]), flush=True)

{functions}

async def main():
    loop = asyncio.get_running_loop()
    async with VmManager(load_settings()) as manager:
        say("ready")
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            name, *words = json.loads(line)
            await globals()["do_" + name](manager, words)

asyncio.run(main())
"""


class Racers:
    """Python processes with a `VmManager` each, that do the same thing at one moment.

    ``actions``: by name, the body of a coroutine function with ``manager``, ``words`` and
    ``say(...)``, whose line ends an action.
    """

    def __init__(self, host: VmHost, count: int, **actions: str) -> None:
        functions = "\n".join(
            f"async def do_{name}(manager, words):\n"
            + textwrap.indent(textwrap.dedent(body).strip(), "    ")
            for name, body in actions.items()
        )
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", _RACER.format(functions=functions)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **host.env, "PYTHONPATH": str(REPOSITORY)},
            )
            for _ in range(count)
        ]
        assert self.answers() == [["ready"]] * count

    @property
    def pid(self) -> int:
        """Of the first."""
        return self._processes[0].pid

    def __enter__(self) -> Racers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()  # they end of themselves, and their VMs
        for process in self._processes:
            try:
                process.wait(30)
            finally:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()

    def kill(self) -> None:
        """SIGKILL, all of them."""
        for process in self._processes:
            process.kill()
            process.wait()

    def ask(
        self, action: str, *words: str, numbered: bool = False, only: int | None = None
    ) -> None:
        """Let them do it, or one of them; ``numbered``: each gets its number as the first word."""
        for number, process in enumerate(self._processes):
            if only not in (None, number):
                continue
            assert process.stdin is not None
            line = json.dumps([action, *([str(number)] if numbered else []), *words])
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def answers(self, seconds: float = 60, only: int | None = None) -> list[list[str]]:
        """What each of them said in one line."""
        deadline = time.monotonic() + seconds
        found = []
        for number, process in enumerate(self._processes):
            if only not in (None, number):
                continue
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
            assert ready, f"process {number} says nothing"
            line = process.stdout.readline()
            assert line, f"process {number} has ended"
            found.append(json.loads(line))
        return found

    def do(
        self, action: str, *words: str, numbered: bool = False, only: int | None = None
    ) -> list[list[str]]:
        """Ask, and wait for the answers."""
        self.ask(action, *words, numbered=numbered, only=only)
        return self.answers(only=only)


def fake_qemu(directory: Path, fault: str) -> str:
    """A program that is QEMU for whoever asks what it is and can, and else does ``fault``.

    The shell's ``$REAL`` is the real one.
    """
    real = find_qemu("qemu-system-x86_64", os.environ["PATH"])
    script = directory / "qemu-system-x86_64"
    script.write_text(
        f"#!/bin/sh\nREAL={real}\n"
        'case "$1" in --version|-object) exec "$REAL" "$@";; esac\n'
        f"{fault}\n"
    )
    script.chmod(0o755)
    return str(script)


def runners(host: VmHost) -> list[int]:
    """The pids of this host's living runner processes."""
    database = str(host.settings().database_file.resolve())
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if database in words and any(word.endswith("run_vm.py") for word in words):
            found.append(process.pid)
    return sorted(found)


def living(host: VmHost) -> list[str]:
    """What runs, and holds a slot: gone with the processes, without clean-up by anyone."""
    return [
        *(f"runner {pid}" for pid in runners(host)),
        *(f"QEMU {pid}" for pid in host.qemus()),
        *["a slot"] * host.slots().used,
    ]


async def nothing_is_left(host: VmHost, seconds: float = 5) -> None:
    """No process, slot, socket, directory, nor a row that says that something runs."""
    deadline = time.monotonic() + seconds
    while left := [*host.left(), *map(str, runners(host)), *host.records()]:
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.05)


def identity(process: ProcessIdentity | None) -> ProcessIdentity:
    """A process that is on record, and alive."""
    assert process is not None
    assert processes.is_alive(process)
    return process


async def kept_vm(manager: VmManager, **settings: Any) -> str:
    """The id of a VM on record that does not run."""
    vm = await manager.create_vm(keep=True, **settings)
    await manager.stop_vm(vm)
    return vm.vm_id


async def kept_on(host: VmHost) -> str:
    """The same, by a manager of its own."""
    async with VmManager(host.settings()) as manager:
        return await kept_vm(manager)


async def destroy_on(host: VmHost, vm_id: str) -> None:
    """Destroy it, if it is still there, by a manager of its own."""
    async with VmManager(host.settings()) as manager:
        with contextlib.suppress(VmNotFoundError):
            await manager.destroy_vm(vm_id)
