"""What a test needs of the machine and may not find."""

from __future__ import annotations

import os

import pytest


def missing(what: str) -> None:
    """A prerequisite is missing: a failure in CI, a skip on a desk."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} (CI=true: a missing prerequisite is a failure)")
    pytest.skip(what)
