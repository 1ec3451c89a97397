"""Hosts and kernels for tests that break something."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmhost import VmHost, seconds_until

# The client of the Jupyter tests; --import-mode=importlib makes no directory importable.
sys.path.insert(0, str(Path(__file__).parent.parent / "jupyter"))

from kernel_client import Kernel


@pytest.fixture(scope="session")
def spec(minimal_image: str, session_dir: Path) -> str:
    """The name of a kernelspec without options: the environment says what is wanted."""
    from vmkernel.cli.install import install_kernelspec

    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    install_kernelspec(kernels, name="vmsandbox-faults", options={})
    # The template that all clones of these tests need: building it has a test of its own.
    with _checked(VmHost(session_dir)) as host:
        kernel = Kernel("vmsandbox-faults", env=host.env)
        try:
            kernel.run("", seconds=400)
            host.share_facts()
        finally:
            kernel.shut_down()
    return "vmsandbox-faults"


@pytest.fixture
def host(session_dir: Path) -> Iterator[VmHost]:
    """A host of the test's own; nothing of it may be left at the end."""
    with _checked(VmHost(session_dir)) as host:
        yield host


@pytest.fixture(scope="module")
def module_host(session_dir: Path) -> Iterator[VmHost]:
    """A host that a module's tests share."""
    with _checked(VmHost(session_dir)) as host:
        yield host


@contextmanager
def _checked(host: VmHost) -> Iterator[VmHost]:
    yield host
    seconds_until(lambda: not host.left(), 5)
    left = host.left()
    host.clear()
    assert not left
