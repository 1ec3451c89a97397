"""The yardstick: the parity tests hold for an unmodified ipykernel in a VM, behind the relay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(700)]

HERE = Path(__file__).parent


@pytest.mark.skipif("KERNEL_UNDER_TEST" in os.environ, reason="it is the tests of another kernel")
@pytest.mark.usefixtures("relay_image")
def test_the_parity_tests_hold_behind_the_relay() -> None:
    names = ("comms", "subshells", "display", "debugger")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--timeout=200", "-p", "no:cacheprovider",
         *(str(HERE / f"test_parity_{name}.py") for name in names)],
        cwd=HERE.parents[1], env={**os.environ, "KERNEL_UNDER_TEST": "relay"},
        capture_output=True, text=True, timeout=680,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
