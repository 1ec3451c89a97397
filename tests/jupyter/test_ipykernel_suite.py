"""ipykernel's own released tests, as far as they know the kernel by its messages only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import ipykernel_suite
import pytest

from prerequisites import missing
from vmkernel.host.reaper import sweep
from vmkernel.settings import load_settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(2000)]

IMPLEMENTATION = {"plain": "ipython", "relay": "ipython"}


@pytest.fixture(scope="module")
def sources(minimal_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    version = ipykernel_suite.image_version(minimal_image)
    try:
        yield ipykernel_suite.fetch(tmp_path_factory.mktemp("suite"), version)
    except ipykernel_suite.NoSourcesError as error:
        missing(str(error))
    sweep(load_settings())  # the suite kills its kernels; the next start would see to that


def test_it_passes(small_spec: str, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKERNEL_OUTPUTS", "trusted")  # comms of targets of its own
    implementation = IMPLEMENTATION.get(os.environ.get("KERNEL_UNDER_TEST", ""), "vmsandbox")
    done = ipykernel_suite.run(small_spec, sources, implementation=implementation)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 50, done.stdout


def test_it_fails_on_another_kernel_than_was_meant(small_spec: str, sources: Path) -> None:
    """Else a kernelspec that is not found would let the real python3 pass for ours."""
    done = ipykernel_suite.run(small_spec, sources, files=(), implementation="no such kernel")
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout
