#!/usr/bin/env python3
"""What the workspace costs: throughput beside the host's own, and what an idle kernel has more.

    python tests/bench/workspace.py [--recipe minimal] [--megabytes 100] [--files 1000]

The same code runs in a cell, in the workspace and in the guest's own disk, and here.  Each figure
is the best of three.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vmhost import RunningVm
from vmkernel.host.start import Label
from vmkernel.settings import load_settings

WORK = """
import json, os, time
def once(megabytes, files, where):
    os.makedirs(where, exist_ok=True)
    figures = {}
    def timed(name, work):
        begin = time.perf_counter(); work(); figures[name] = time.perf_counter() - begin
    block = os.urandom(1 << 20)
    def write():
        with open(f"{where}/large", "wb") as f:
            for _ in range(megabytes): f.write(block)
    def read():
        with open(f"{where}/large", "rb") as f:
            while f.read(1 << 20): pass
    def make():
        for n in range(files):
            with open(f"{where}/{n}.txt", "w") as f: f.write("small")
    def look():
        for n in range(files): os.stat(f"{where}/{n}.txt")
    def fetch():
        for n in range(files):
            with open(f"{where}/{n}.txt") as f: f.read()
    def drop():
        for n in range(files): os.remove(f"{where}/{n}.txt")
    timed("write", write); timed("read", read); timed("create", make)
    timed("listdir", lambda: os.listdir(where)); timed("stat", look); timed("read small", fetch)
    timed("remove", drop); os.remove(f"{where}/large")
    return figures
"""


async def measure(options: argparse.Namespace) -> None:
    """Print the tables."""
    top = Path(tempfile.mkdtemp(prefix="vmk-bench-", dir="/var/tmp"))
    environ = {**os.environ, "VMKERNEL_RECIPE": options.recipe, "VMKERNEL_WORKSPACE": "rw"}
    settings = load_settings(environ=environ)
    arguments = f"{options.megabytes}, {options.files}"
    found: dict[str, list[dict[str, float]]] = {"workspace": [], "guest's disk": [], "host": []}
    names: dict[str, object] = {}
    exec(WORK, names)
    try:
        vm = RunningVm(settings)
        vm.start.label = Label("bench", directory=str(top))
        async with vm:
            await vm.run(WORK)
            for _ in range(options.rounds):
                for title, where in (("workspace", "bench"), ("guest's disk", "/home/user/bench")):
                    code = f"print(json.dumps(once({arguments}, {where!r})))"
                    found[title].append(json.loads(await vm.run(code, 600)))
                once = names["once"]
                assert callable(once)
                found["host"].append(once(options.megabytes, options.files, str(top / "host")))
        print(f"{'':12}" + "".join(f"{title:>16}" for title in found))
        for name in found["host"][0]:
            best = {title: min(run[name] for run in runs) for title, runs in found.items()}
            words = [_in_words(name, seconds, options) for seconds in best.values()]
            print(f"{name:12}" + "".join(f"{word:>16}" for word in words))
        await _start_and_idle(options, top)
    finally:
        shutil.rmtree(top)


def _in_words(name: str, seconds: float, options: argparse.Namespace) -> str:
    if name in ("read", "write"):
        return f"{options.megabytes / seconds:.0f} MB/s"
    if name == "listdir":
        return f"{1000 * seconds:.1f} ms"
    return f"{1e6 * seconds / options.files:.0f} us each"


async def _start_and_idle(options: argparse.Namespace, top: Path) -> None:
    """From the start to a first result, and what QEMU and its owner then have of their own."""
    (top / "data.csv").write_text("a,b\n")
    for choice, use in (("none", False), ("ro", False), ("ro", True)):
        environ = {**os.environ, "VMKERNEL_RECIPE": options.recipe, "VMKERNEL_WORKSPACE": choice}
        settings = load_settings(environ=environ)
        starts, memory, servers = [], [], []
        for _ in range(options.starts):
            vm = RunningVm(settings)
            vm.start.label = Label("bench", directory=str(top))
            begin = time.perf_counter()
            async with vm:
                await vm.run("1+1")
                starts.append(time.perf_counter() - begin)
                if use:
                    await vm.run("open('data.csv').read()")
                await asyncio.sleep(1)
                memory.append(_private(vm.guest.vm.process.qemu_pid))
                gate = vm.start.gate
                servers.append(_family(gate.server_pid) if gate and gate.server_pid else 0.0)
        print(
            f"workspace {choice}{', used' if use else ''}: first result "
            f"{1000 * statistics.median(starts):.0f} ms, "
            f"QEMU {statistics.median(memory):.1f} MiB private, "
            f"server {statistics.median(servers):.1f} MiB"
        )


def _private(pid: int) -> float:
    """MiB that are this process's alone (proc(5), smaps_rollup)."""
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in fields if line.startswith("Private_")) / 1024


def _family(pid: int) -> float:
    """The same of a process and all below it."""
    import psutil

    process = psutil.Process(pid)
    return sum(_private(each.pid) for each in (process, *process.children(recursive=True)))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="minimal")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=9)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
