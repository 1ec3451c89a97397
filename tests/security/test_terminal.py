"""`vmkernel run`, `exec`, `logs` in a real terminal, which does not obey what a guest writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from cli_host import MAIN
from escapes import COLOUR, OBEYED, obeyed
from vmhost import VmHost
from vmkernel.host.start import log_dir

PATIENCE = 90

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


@pytest.fixture(scope="module")
def host(template: str, session_dir: Path) -> Iterator[VmHost]:
    host = VmHost(session_dir)
    yield host
    host.clear()


@pytest.mark.vm
def test_safe_a_terminal_is_not_moved_by_what_code_writes(host: VmHost):
    shown = in_terminal(host, "run", "-c", CODE, answer="me", VMKERNEL_OUTPUTS="safe")
    assert obeyed(shown) == []
    assert COLOUR + "red" in shown
    assert "me\r\n" in shown  # the terminal's own echo before it depends on who is quicker
    assert "ValueError" in shown
    assert shown.count("after") == len(OBEYED)


@pytest.mark.vm
def test_trusted_everything_comes_as_it_is(host: VmHost):
    shown = in_terminal(host, "run", "-c", CODE, answer="me", VMKERNEL_OUTPUTS="trusted")
    for name, sequence in OBEYED.items():
        assert f"{name} {sequence}after" in shown, name
    for title in ("\x1b]0;split\x07", "\x1b]2;stderr\x07", "\x1b]2;prompt\x07"):
        assert title in shown
    assert "\x1b]2;traceback\x07" in shown


@pytest.mark.vm
def test_a_pipe_gets_the_bytes_and_exec_is_as_run(host: VmHost):
    env = {**os.environ, **host.env, "VMKERNEL_OUTPUTS": "safe"}
    command = [sys.executable, "-c", MAIN]
    subprocess.run([*command, "start", "-q", "here"], env=env, check=True, timeout=PATIENCE)
    code = "import sys\nprint('\\x1b]0;title\\x07')\nsys.exit('\\x1b]0;end\\x07')"
    piped = subprocess.run([*command, "exec", "here", "-c", code], env=env, capture_output=True,
                           text=True, timeout=PATIENCE)  # fmt: skip
    shown = in_terminal(host, "exec", "here", "-c", code, VMKERNEL_OUTPUTS="safe")
    subprocess.run([*command, "rm", "-f", "here"], env=env, check=True, timeout=PATIENCE)
    assert "\x1b]0;title\x07" in piped.stdout
    assert "\x1b]0;end\x07" in piped.stderr
    assert obeyed(shown) == []


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
