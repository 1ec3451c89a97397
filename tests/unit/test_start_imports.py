"""What a kernel imports as it starts, by name: each module more would be milliseconds."""

from __future__ import annotations

import subprocess
import sys

BEFORE_QEMU = """
import vmkernel.kernel.launch
from vmkernel.imports import import_without
import_without("typing_extensions", "msgspec")
import vmkernel.host.start, vmkernel.host.waking, vmkernel.image.store
import vmkernel.vm.loading, vmkernel.vm.tsc
"""
AFTER = """
import_without("ssl", "asyncio")
import asyncio
import vmkernel.kernel.serve, vmkernel.host.guest
"""
SHOW = "import sys; print(*sys.modules)"

LATER = {"asyncio", "logging", "zmq", "subprocess", "inspect", "random", "pickle", "concurrent"}
"""While QEMU starts."""
WITH_A_REASON = {
    "ctypes", "difflib", "shutil", "sqlite3", "tempfile", "tomllib",
    "vmkernel.host.inotify", "vmkernel.host.reaper", "vmkernel.host.schema",
    "vmkernel.vm.absent", "vmkernel.vm.build",
}  # fmt: skip
"""By who needs them, when he does."""
NEVER = {
    "argparse", "email", "glob", "http", "importlib.metadata", "importlib.resources", "ipykernel",
    "IPython", "jupyter_client", "jupyter_core", "multiprocessing", "numpy", "psutil", "qemu",
    "ssl", "tornado", "traitlets", "typing_extensions", "urllib.request",
}  # fmt: skip


def imported(statements: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", statements + SHOW],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split()) - imported_by_itself()


def imported_by_itself() -> set[str]:
    """Where site-packages have .pth files with code, say."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SHOW], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_before_qemu_is_started() -> None:
    found = imported(BEFORE_QEMU)
    assert sorted(found & (LATER | WITH_A_REASON | NEVER)) == []
    assert not {name for name in found if name.startswith(("vmkernel.guest", "vmkernel.cli"))}


def test_until_it_serves() -> None:
    found = imported(BEFORE_QEMU + AFTER)
    assert found >= LATER
    assert sorted(found & (WITH_A_REASON | NEVER)) == []
    assert not {name for name in found if name.startswith(("vmkernel.cli", "vmkernel.guest"))}
