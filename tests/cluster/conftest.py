"""Fixtures of the cluster tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from netcluster import NetCluster, why_not
from prerequisites import missing
from relayrig import Rig


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


@pytest.fixture(scope="session")
def ray_spec(minimal_image: str, template: str) -> str:
    """The cluster's kernelspec, and the one that its hosts run; a template is there."""
    from vmkernel.cli.install import install_kernelspec

    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    install_kernelspec(kernels, name="vmsandbox", options={})
    install_kernelspec(kernels, name="vmsandbox-ray", options={}, on_hosts="vmsandbox")
    return "vmsandbox-ray"


@pytest.fixture(scope="module")
def cluster(session_dir: Path, ray_spec: str) -> Iterator[NetCluster]:
    """A gateway and three hosts of two slots each."""
    if reason := why_not():
        missing(f"no cluster in namespaces: {reason}")
    with NetCluster(session_dir, [2, 2, 2], VMKERNEL_CLUSTER_LEASE="12") as cluster:
        yield cluster
    assert not cluster.left()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A relay in a thread, which has no kernel yet."""
    rig = Rig()
    yield rig
    rig.close()
