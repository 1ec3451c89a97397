"""Fixtures of the cluster tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def plain_spec() -> str:
    """A kernelspec of plain ipykernel on this Python."""
    from ipykernel.kernelspec import install

    install(user=True, kernel_name="plain")
    return "plain"
