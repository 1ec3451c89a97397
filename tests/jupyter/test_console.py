"""``jupyter console`` in a terminal: what a person types, and what appears."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from kernel_client import kernel_environment

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

PATIENCE = 120
# Escape sequences of a terminal: colours, cursor, titles (ECMA-48).
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][AB0]|\x1b[=>]|\x1b\][^\x07]*\x07")
_COLOUR = r"(?:\x1b\[[\d;]*m)*"


class Terminal:
    """A console that runs in a pseudo-terminal."""

    def __init__(self, kernel: str, *, simple: bool = True) -> None:
        """*simple*: a prompt that reads lines, and draws no menus around them."""
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "jupyter", "console", f"--kernel={kernel}",
             f"--ZMQTerminalInteractiveShell.simple_prompt={simple}"],
            env={
                **kernel_environment(),
                "TERM": "dumb" if simple else "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody here tells where the cursor is
                "NO_COLOR": "1",
            },
            encoding="utf-8",
            timeout=PATIENCE,
            dimensions=(50, 120),
        )  # fmt: skip

    def expect(self, pattern: str) -> str:
        """Wait for *pattern*; what came before it and it, without escapes."""
        self.child.expect(pattern)
        return _ESCAPES.sub("", str(self.child.before) + str(self.child.after))

    def prompt(self) -> str:
        """Wait for the next prompt; the text before it."""
        return self.expect(rf"In \[{_COLOUR}\d+{_COLOUR}\]: ")

    def type(self, line: str) -> str:
        """Type a line at the prompt; what appears until the next one."""
        self.child.sendline(line)
        return self.prompt()


@pytest.fixture(scope="module")
def terminal(small_spec: str) -> Iterator[Terminal]:
    terminal = Terminal(small_spec)
    banner = terminal.prompt()
    assert "every cell runs in a microVM" in banner
    assert "accelerator: " in banner
    yield terminal
    terminal.child.close(force=True)


def test_a_sum(terminal: Terminal) -> None:
    assert re.search(r"Out\[\d+\]: 2\b", terminal.type("1 + 1"))
    assert "microVM" in terminal.type("print(2 * '=', 'microVM')")


def test_it_runs_in_the_vm(terminal: Terminal) -> None:
    seen = terminal.type("import os; print('version', os.uname().release)")
    assert f"version {os.uname().release}" not in seen
    assert re.search(r"version \d+\.\d+", seen)


def test_an_error(terminal: Terminal) -> None:
    assert "ZeroDivisionError: division by zero" in terminal.type("1 / 0")


def test_input(terminal: Terminal) -> None:
    terminal.child.sendline("name = input('Your name? ')")
    terminal.expect(r"Your name\? $")
    terminal.type("Ada")
    assert "Hello Ada" in terminal.type("print('Hello', name)")


def test_a_copy_asks_in_the_console(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("from the host")
    terminal.child.sendline(f"%vm put {tmp_path}/f.txt")
    terminal.expect(r"f.txt \(13 bytes\) from this host into the VM\? \[y/N\] $")
    assert "is in the VM as" in terminal.type("y")
    assert "from the host" in terminal.type("print(open('f.txt').read())")


def test_output_appears_while_the_cell_runs(terminal: Terminal) -> None:
    terminal.child.sendline("import time; print('ear' + 'ly'); time.sleep(3); print('la' + 'te')")
    assert "late" not in terminal.expect("early")
    assert "late" in terminal.prompt()


def test_ctrl_c_ends_a_loop_and_keeps_the_state(terminal: Terminal) -> None:
    terminal.type("held = 'on'")
    terminal.child.sendline(r"""exec("print('be' + 'gin')\nwhile True: pass")""")
    terminal.expect("begin")
    # A signal that comes in the instant in which the console goes to wait for the next message
    # locks the console up: its handler waits for a thread that waits for a lock which the main
    # thread holds (jupyter_core's run_sync, any kernel).  A person is not that quick.
    time.sleep(1)
    terminal.child.sendintr()
    assert "KeyboardInterrupt" in terminal.prompt()
    assert "'on'" in terminal.type("held")


def test_the_death_of_the_guest_kernel_is_told(terminal: Terminal) -> None:
    assert "variables are lost" in terminal.type("import os; os._exit(5)")
    assert "NameError" in terminal.type("held")


def test_exit(terminal: Terminal) -> None:
    """The last test on the shared terminal."""
    terminal.child.sendline("exit")
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    assert terminal.child.exitstatus == 0


def test_several_lines_at_the_full_prompt(small_spec: str) -> None:
    """Enter asks the kernel whether the cell is complete, and goes on to the next line if not."""
    terminal = Terminal(small_spec, simple=False)
    try:
        terminal.prompt()
        for line, sign in (
            ("for i in range(3):", r"\.\.\.: "),
            ("print('li' + 'ne', i)", r"\.\.\.: "),
            ("", "line 2"),
        ):
            terminal.child.send(line + "\r")
            terminal.expect(sign)
        terminal.prompt()
        terminal.child.send("import ma\t")  # completed as far as it goes, or offered
        terminal.expect("mailbox|marshal|math")
    finally:
        terminal.child.close(force=True)
