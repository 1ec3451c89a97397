"""``jupyter console --kernel vmsandbox`` in a terminal, as a person uses it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pexpect
import pytest
from kernel_client import PATIENCE, kernel_environment

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

PROMPT = r"In \[\d+\]: "


@pytest.fixture(scope="module")
def console(small_spec: str) -> Iterator[pexpect.spawn[str]]:
    """A console whose kernel has answered."""
    child = pexpect.spawn(
        sys.executable,
        ["-m", "jupyter", "console", "--kernel", small_spec, "--simple-prompt"],
        env={**kernel_environment(), "TERM": "dumb"},
        encoding="utf-8",
        timeout=PATIENCE,
    )
    child.expect(PROMPT)
    yield child
    child.close(force=True)


def enter(console: pexpect.spawn[str], line: str) -> str:
    """Type a line; what is shown before the next prompt."""
    console.sendline(line)
    console.expect(PROMPT)
    return str(console.before)


def test_the_banner_names_the_accelerator(console: pexpect.spawn[str]) -> None:
    assert "every cell runs in a microVM" in str(console.before)
    assert "accelerator: " in str(console.before)


def test_a_cell_has_its_result(console: pexpect.spawn[str]) -> None:
    assert "Out[" in enter(console, "6 * 7")


def test_the_cell_runs_in_the_guest(console: pexpect.spawn[str]) -> None:
    shown = enter(console, "print(open('/proc/version').read())")
    assert "Linux version" in shown
    assert os.uname().release not in shown


def test_input_is_asked_in_the_terminal(console: pexpect.spawn[str]) -> None:
    console.sendline("name = input('who? ')")
    console.expect("who\\? ")
    console.sendline("me")
    console.expect(PROMPT)
    assert "'me'" in enter(console, "name")


def test_control_c_ends_a_loop(console: pexpect.spawn[str]) -> None:
    console.sendline("exec(\"print('run' + 'ning')\\nwhile True: pass\")")
    console.expect("running")
    console.sendintr()
    console.expect("KeyboardInterrupt")
    console.expect(PROMPT)
    assert "'me'" in enter(console, "name")


def test_exit_ends_console_and_kernel(console: pexpect.spawn[str]) -> None:
    console.sendline("exit")
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0
