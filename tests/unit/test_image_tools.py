"""Running the tools of a build: failures told, nothing left running, their words understood."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmkernel.errors import ImageError
from vmkernel.image import debian, pipwords, python
from vmkernel.image.tools import ToolFailed, Tools, require_tools


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path / "state/build.log")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ends(pid: int) -> bool:
    """Whether the process ends in a moment: SIGKILL's effect on a grandchild is not waited for."""
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.02)
    return False


def wait_for(path: Path) -> int:
    for _ in range(200):
        if path.exists() and path.read_text().strip():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_lines_are_handed_on_and_logged_for_the_owner_alone(tools: Tools) -> None:
    lines: list[str] = []
    tools.run(["sh", "-c", "echo one; echo two >&2"], on_line=lines.append)
    assert lines == ["one", "two"]
    text = tools.log_path.read_text()
    assert "two\n" in text
    assert "echo one" in text
    assert tools.log_path.stat().st_mode & 0o077 == 0


def test_a_failure_carries_the_last_words(tools: Tools) -> None:
    with pytest.raises(ToolFailed, match=r"sh ended with 3\n(.*\n)*last") as caught:
        tools.run(["sh", "-c", "seq 1000; echo last; exit 3"])
    assert len(caught.value.lines) == 60
    with pytest.raises(ToolFailed, match="signal 9"):
        tools.run(["sh", "-c", "kill -9 $$"])
    tools.run(["false"], allow_failure=True)


def test_a_full_disk_is_told_from_other_failures(tools: Tools) -> None:
    with pytest.raises(OSError, match="No space left"):
        tools.run(["sh", "-c", "echo 'tar: x: Cannot write: No space left on device'; exit 2"])


def test_an_exception_ends_the_tool_and_its_children(tools: Tools, tmp_path: Path) -> None:
    child = tmp_path / "child"

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tools.run(["sh", "-c", f"sleep 60 & echo $! >{child}; echo go; wait"], on_line=interrupt)
    assert ends(wait_for(child))


def test_helpers_beside_end_with_the_body(tools: Tools, tmp_path: Path) -> None:
    command = ["sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 60"]

    def body() -> None:
        with tools.beside([command]):
            wait_for(tmp_path / "pid")
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert ends(wait_for(tmp_path / "pid"))
    with tools.beside([["sh", "-c", f"sleep 0.3; echo done >{tmp_path}/done"]]):
        pass
    assert (tmp_path / "done").exists()


def test_helpers_beside_tell_of_a_full_disk(tools: Tools) -> None:
    full = "print(OSError(28, 'No space left on device'))"

    def body() -> None:
        with tools.beside([[sys.executable, "-c", full]]):
            pass

    with pytest.raises(OSError, match="No space left"):
        body()


def test_a_killed_builder_takes_its_tool_with_it(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from vmkernel.image.tools import Tools\n"
        f"Tools(Path({str(tmp_path / 'log')!r})).run(\n"
        f"    ['sh', '-c', 'echo $$ >{tmp_path}/pid; exec sleep 60'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as builder:
        pid = wait_for(tmp_path / "pid")
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    assert ends(pid)


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    require_tools(["sh", "tar"])
    with pytest.raises(ImageError) as caught:
        require_tools(["sh", "no-such-tool-1", "no-such-tool-2"])
    assert "no-such-tool-1, no-such-tool-2" in str(caught.value)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("vmkernel.image.tools._MORE_PATH", ())
    with pytest.raises(ImageError, match=r"mkfs\.erofs") as caught:
        require_tools(["mkfs.erofs"])
    assert "erofs-utils" in caught.value.hint


def test_a_missing_program_is_an_image_error(tools: Tools) -> None:
    with pytest.raises((ImageError, ToolFailed), match="no-such-tool"):
        tools.run(["no-such-tool"])


def test_what_apt_says_is_understood() -> None:
    said = """\
Err:1 http://m.example/d trixie InRelease
E: Failed to fetch http://m.example/d/InRelease  Could not connect (111: Connection refused)
E: Some index files failed to download. They have been ignored, or old ones used instead.
E: mmdebstrap failed to run
""".splitlines()
    assert debian.explain_failure(said) == (
        "download failed: http://m.example/d/InRelease: Could not connect (111: Connection refused)"
    )
    said = ["E: Unable to locate package nosuch", "E: setup failed: E: apt-get ... failed"]
    assert debian.explain_failure(said) == "Debian trixie has no package nosuch"
    assert debian.explain_failure(["x", "E: something else"]) == "something else"
    assert debian.explain_failure(["last words"]) == "last words"
    assert debian.explain_failure([])


def test_what_pip_says_is_understood() -> None:
    what, hint = pipwords.explain_failure(
        [
            "ERROR: Could not find a version that satisfies the requirement nosuch==1 (from x)",
            "ERROR: No matching distribution found for nosuch==1",
        ]
    )
    assert "nosuch==1" in what
    assert "python.requirements" in hint
    what, hint = pipwords.explain_failure(
        [
            "WARNING: Retrying … NewConnectionError: Failed to establish a new connection",
            "ERROR: No matching distribution found for numpy",
        ]
    )
    assert "not reached" in what
    assert "pip config" in hint
    assert pipwords.explain_failure([])[0]


def test_scripts_of_pip_get_the_guests_interpreter() -> None:
    root = "/home/x/images/.tmp-a-1/root"
    short = f"#!{root}/usr/bin/python3.13\nimport sys\n".encode()
    assert python.guest_script(short, root) == b"#!/usr/bin/python3.13\nimport sys\n"
    long = f"#!/bin/sh\n'''exec' {root}/usr/bin/python3.13 \"$0\" \"$@\"\n' '''\nimport sys\n"
    assert python.guest_script(long.encode(), root) == b"#!/usr/bin/python3.13\nimport sys\n"
    binary = bytes(range(256))
    assert python.guest_script(binary, root) == binary


def test_the_builders_environment_does_not_lead_pip_astray(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"PIP_TARGET": "/x", "PIP_INDEX_URL": "http://i.example", "PYTHONPATH": "/p",
                        "LD_PRELOAD": "x.so", "PIP_USER": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "usr/bin").mkdir(parents=True)
    os.symlink("python3.13", tmp_path / "usr/bin/python3")
    interpreter = python.GuestPython(tmp_path)
    assert interpreter.version == "3.13"
    environment = interpreter.environment()
    assert environment["PIP_INDEX_URL"] == "http://i.example"
    assert environment["PYTHONHOME"] == str(tmp_path / "usr")
    assert not environment.keys() & {"PIP_TARGET", "PYTHONPATH", "LD_PRELOAD", "PIP_USER"}
