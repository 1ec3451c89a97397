"""Fixtures of the cluster tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def plain_spec() -> str:
    """A kernelspec of plain ipykernel on this Python."""
    from ipykernel.kernelspec import install

    install(user=True, kernel_name="plain")
    return "plain"


@pytest.fixture(scope="session")
def cluster_spec(minimal_image: str, template: str) -> str:
    """What hosts of the cluster run: a kernelspec on the small image, whose template is there."""
    from vmkernel.cli.install import install_kernelspec

    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    install_kernelspec(kernels, name="vmsandbox-cluster", options={})
    return "vmsandbox-cluster"
