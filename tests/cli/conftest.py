"""Hosts for the command's tests, on which commands are run and VMs are left to nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli_host import MAIN, left
from vmhost import VmHost, seconds_until


@pytest.fixture(scope="module")
def host(template: str, session_dir: Path) -> Iterator[VmHost]:
    """A host that a module's tests share: each of its VMs is its test's own, unless it says so."""
    with checked(VmHost(session_dir)) as host:
        yield host


@pytest.fixture
def own_host(template: str, session_dir: Path) -> Iterator[VmHost]:
    """A host of the test's own."""
    with checked(VmHost(session_dir)) as host:
        yield host


@contextmanager
def checked(host: VmHost) -> Iterator[VmHost]:
    """Nothing may be left on the host at the end."""
    yield host
    seconds_until(lambda: not left(host), 10)
    found = left(host)
    host.clear()
    assert not found


@pytest.fixture
def run(host: VmHost) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run(words…, stdin="…", cwd=…)``: `vmkernel run` to its end."""

    def run(
        *words: str, stdin: str = "", cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", MAIN, "run", *words],
            env={**os.environ, **host.env, **env},
            input=stdin, capture_output=True, text=True, timeout=60, cwd=cwd,
        )  # fmt: skip

    return run
