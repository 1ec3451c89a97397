"""The suite's own watchman: a session that leaves something behind fails and says what."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import leftovers
import netcluster
from prerequisites import missing

TESTS = Path(__file__).parents[1]


def _session(tmp_path: Path, test: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_inner.py").write_text("import os, socket, subprocess, sys\n" + test)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", TESTS.parent / "pyproject.toml", "-p", "conftest",
         "-p", "no:cacheprovider", tmp_path / "test_inner.py"],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_clean_session_passes_and_its_directory_is_gone(tmp_path):
    done = _session(tmp_path, "def test_it(session_dir): open('told', 'w').write(str(session_dir))")
    assert done.returncode == 0, done.stdout
    assert not Path((tmp_path / "told").read_text()).exists()


def test_a_process_left_behind_fails_the_session_and_is_ended(tmp_path):
    done = _session(
        tmp_path,
        "def test_it():\n"
        "    child = subprocess.Popen(['sleep', '50'], start_new_session=True)\n"
        "    open('told', 'w').write(str(child.pid))\n",
    )
    assert done.returncode == 1
    assert "1 passed" in done.stdout
    assert "left behind" in done.stdout
    assert "sleep 50" in done.stdout
    pid = int((tmp_path / "told").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_a_socket_left_behind_fails_the_session(tmp_path):
    done = _session(
        tmp_path,
        "def test_it(settings):\n"
        "    directory = settings.runtime_dir / 'vms' / 'vm-1'\n"
        "    directory.mkdir(parents=True)\n"
        "    with socket.socket(socket.AF_UNIX) as s: s.bind(str(directory / 'port'))\n",
    )
    assert done.returncode == 1
    assert "vms/vm-1/port" in done.stdout


def test_a_network_namespace_left_behind_fails_the_session_and_is_removed(tmp_path):
    if reason := netcluster.why_not():
        missing(reason)
    name = f"vmkleft{os.getpid()}"
    done = _session(
        tmp_path,
        "import leftovers\n"
        "def test_it(session_dir):\n"
        f"    leftovers.note_network(session_dir, '{name}')\n"
        f"    subprocess.run(['ip', 'netns', 'add', '{name}'], check=True)\n"
        f"    subprocess.run(['ip', 'netns', 'add', 'x{name}'], check=True)\n",
    )
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True)
    subprocess.run(["ip", "netns", "del", f"x{name}"], check=True)
    assert done.returncode == 1
    assert f"netns {name}\n" in done.stdout
    assert [line.split()[0] for line in names.stdout.splitlines() if name in line] == [f"x{name}"]


def test_furniture_is_no_leftover(tmp_path):
    (tmp_path / "slots").touch()
    (tmp_path / "vms").mkdir()
    assert leftovers.files_in(tmp_path) == []
    assert leftovers.files_in(tmp_path / "nowhere") == []
