"""What the figures were taken on: a figure without its machine says nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vmkernel.settings import load_settings

_PACKAGES = ("vmkernel", "ipykernel", "ipython", "jupyter_client", "pyzmq", "msgspec")


def calibrate() -> float:
    """Milliseconds of a fixed pure-Python loop, the best of five: how fast is this core just now?

    The same loop at the begin and the end of a run, and on two machines, tells how far their
    absolute times may be compared at all.
    """
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        total = 0
        for number in range(300_000):
            total += number
        best = min(best, time.perf_counter() - begun)
    return round(best * 1000, 2)


def load() -> float:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def describe() -> dict[str, Any]:
    """Processor, memory, versions."""
    facts = _proc_lines("/proc/meminfo", "/proc/cpuinfo")
    settings = load_settings()
    return {
        "processor": facts.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_mib": int(facts.get("MemTotal", "0").split()[0]) // 1024,
        "system": _system(),
        "linux": platform.release(),
        "python": platform.python_version(),
        "qemu": _qemu(),
        "recipe": settings.recipe,
        "accelerator": settings.accelerator,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _proc_lines(*paths: str) -> dict[str, str]:
    lines: dict[str, str] = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            lines[name.strip()] = value.strip()
    return lines


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _qemu() -> str:
    program = load_settings().qemu
    path = shutil.which(program)
    if path is None:
        return "not found"
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    return done.stdout.partition("\n")[0].strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
