"""`vmkernel run`, `exec`, `logs` in a real terminal, which does not obey what a guest writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from cli_host import MAIN
from vmhost import VmHost
from vmkernel.host.start import log_dir

PATIENCE = 90

OBEYED = {
    "title": "\x1b]0;evil\x07",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "link": "\x1b]8;;http://evil.invalid\x1b\\",
    "clear": "\x1b[2J",
    "home": "\x1b[H",
    "above": "\x1b[99A",
    "alternate": "\x1b[?1049h",
    "question": "\x1b[6n",
    "device": "\x1bP$q m\x1b\\",
    "application": "\x1b_evil\x1b\\",
    "reset": "\x1bc",
    "one-byte": "\x9b2J",
    "charset": "\x1b(0",
    "answerback": "\x05",
}
"""What a terminal does when it reads it."""
COLOUR = "\x1b[31m"
CODE = f"""
import sys
for name, sequence in {OBEYED!r}.items():
    print(name, sequence + "after")
sys.stdout.write("\\x1b"); sys.stdout.flush(); print("]0;split\\x07")
print("{COLOUR.encode("unicode_escape").decode()}red", end="\\x1b[0m\\n")
print("\\x1b]2;stderr\\x07", file=sys.stderr)
print(input("\\x1b]2;prompt\\x07name? "))
raise ValueError("\\x1b]2;traceback\\x07")
"""


def in_terminal(host: VmHost, *words: str, answer: str = "", **env: str) -> str:
    """All that the command writes to its terminal."""
    child = pexpect.spawn(
        sys.executable, ["-c", MAIN, *words], env={**os.environ, **host.env, **env},
        encoding="utf-8", timeout=PATIENCE, dimensions=(50, 200), echo=False,
    )  # fmt: skip
    shown = ""
    if answer:
        child.expect_exact("name? ")
        shown = child.before + child.after
        child.sendline(answer)
    child.expect(pexpect.EOF)
    child.close()
    return shown + child.before


def obeyed(shown: str) -> list[str]:
    """Controls in a text, but for colours, the end of a line, and our own line of progress."""
    left = re.sub(r"\x1b\[[0-9;]*m|\r\n|\r(?:vmkernel: [^\x1b\r]*)?\x1b\[K", "", shown)
    return re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f].{0,9}", left)


@pytest.fixture(scope="module")
def host(template: str, session_dir: Path) -> Iterator[VmHost]:
    host = VmHost(session_dir)
    yield host
    host.clear()


def test_logs_shows_no_control_and_a_pipe_gets_them(host: VmHost):
    directory = log_dir(host.settings(), "ended")
    directory.mkdir(parents=True)
    text = "".join(f"{name} {sequence}after\r\n" for name, sequence in OBEYED.items())
    # So long that a sequence and a character are cut by the command's own reading in pieces
    text = text + "ä" * ((1 << 16) - 60) + "\x1b]0;cut" * 20 + "\x07 end\n"
    (directory / "console.log").write_text(text, newline="")
    shown = in_terminal(host, "logs", "ended", "--which", "console")
    piped = subprocess.run(
        [sys.executable, "-c", MAIN, "logs", "ended", "--which", "console"],
        env={**os.environ, **host.env}, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    assert obeyed(shown) == []
    assert shown.count("after") == len(OBEYED)
    assert shown.rstrip().endswith(" end")
    assert piped.stdout.decode() == text


def test_an_error_that_quotes_a_guest_is_text():
    code = (
        "from vmkernel.cli.output import say_error\nfrom vmkernel.errors import VmError\n"
        "say_error(VmError('it said: \\x1b]0;title\\x07\\x1b[2Jhello', hint='\\x9b2J', ))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stderr == "vmkernel: error: it said: hello\nWhat to do: \n"
