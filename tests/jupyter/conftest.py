"""Kernelspecs and running kernels for tests that speak Jupyter's protocol.

A running kernel is shared by the tests of a module: a start costs more than a cell, and a kernel
that serves many tests in a row is nearer to what users do.

With KERNEL_UNDER_TEST=plain the same tests run against plain ipykernel instead: what they expect
of ours is what Jupyter users have. (Tests that are about VMs fail then.) With
KERNEL_UNDER_TEST=relay it is an unmodified ipykernel in a VM, behind the relay.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# --import-mode=importlib does not make a test's own directory importable.
sys.path.insert(0, str(Path(__file__).parent))

from kernel_client import Kernel, StartKernel

from vmkernel.cli.install import install_kernelspec

SMALL_MEMORY = "512M"


def _kernels_dir() -> Path:
    return Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"


@pytest.fixture(scope="session")
def small_spec(minimal_image: str, plain_spec: str, request: pytest.FixtureRequest) -> str:
    """The name of a kernelspec on the small image with little memory; its template is there."""
    if os.environ.get("KERNEL_UNDER_TEST") == "plain":
        return plain_spec
    if os.environ.get("KERNEL_UNDER_TEST") == "relay":
        name = str(request.getfixturevalue("relay_kernel"))
    else:
        name = "vmsandbox-small"
        options = {"recipe": minimal_image, "memory": SMALL_MEMORY}
        install_kernelspec(_kernels_dir(), name=name, options=options)
    # Not every client here is as patient as a first start is long.
    kernel = Kernel(name)
    try:
        assert kernel.run("1 + 1").result == "2"
    finally:
        kernel.shut_down()
    return name


@pytest.fixture(scope="session")
def signal_spec(small_spec: str) -> str:
    """As small_spec, but front ends interrupt it by SIGINT."""
    target = install_kernelspec(
        _kernels_dir(),
        name="vmsandbox-signal",
        options={"recipe": "minimal", "memory": SMALL_MEMORY},
    )
    spec = json.loads((target / "kernel.json").read_text())
    spec["interrupt_mode"] = "signal"
    (target / "kernel.json").write_text(json.dumps(spec))
    return "vmsandbox-signal"


@pytest.fixture(scope="session")
def plain_spec() -> str:
    """The name of a kernelspec of plain ipykernel on this Python: what ours is compared with."""
    from ipykernel.kernelspec import install

    install(user=True, kernel_name="plain")
    return "plain"


@pytest.fixture(scope="session")
def start_kernel() -> StartKernel:
    """``with start_kernel(name, …) as kernel:`` a kernel that is shut down at the end."""

    @contextmanager
    def start(name: str, **options: Any) -> Iterator[Kernel]:
        kernel = Kernel(name, **options)
        try:
            yield kernel
        finally:
            kernel.shut_down()

    return start


@pytest.fixture(scope="module")
def kernel(
    small_spec: str, start_kernel: StartKernel, request: pytest.FixtureRequest
) -> Iterator[Kernel]:
    """A running kernel on the small image, shared by the module's tests.

    A module whose displays and comms are not for the eyes of a user says ``OUTPUTS = "trusted"``.
    """
    outputs = getattr(request.module, "OUTPUTS", "safe")
    with start_kernel(small_spec, env={"VMKERNEL_OUTPUTS": outputs}) as kernel:
        yield kernel
