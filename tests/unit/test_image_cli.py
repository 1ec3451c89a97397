"""``vmkernel image``, run as a process: what it prints and its exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from vmkernel.image.recipe import load_recipe
from vmkernel.image.store import FILES, FORMAT, FileRecord, Manifest


def vmkernel(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    return subprocess.run(
        [sys.executable, "-c", "from vmkernel.cli.app import main; main()", "image", *arguments],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory with an image of small files in it."""
    directory = tmp_path / ".local/share/vmkernel/images/minimal"
    directory.mkdir(parents=True)
    files = {}
    for name in FILES:
        (directory / name).write_text(name)
        digest = hashlib.sha256(name.encode()).hexdigest()
        files[name] = FileRecord(size=len(name), sha256=digest)
    manifest = Manifest(
        format=FORMAT, recipe=load_recipe("minimal"), kernel_release="6.12",
        python_version="3.13.5", debian_suite="trixie", created="2026-01-01T00:00:00+00:00",
        files=files,
    )  # fmt: skip
    (directory / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return tmp_path


def test_list_shows_images_and_recipes_without_one(home: Path) -> None:
    lines = vmkernel(home, "list").stdout.splitlines()
    assert lines[0].split()[:2] == ["NAME", "STATE"]
    assert ["minimal", "built"] in [line.split()[:2] for line in lines]
    assert any(line.startswith("datascience") and "not built" in line for line in lines)


def test_list_as_json(home: Path) -> None:
    found = json.loads(vmkernel(home, "list", "--json").stdout)
    assert [image["name"] for image in found["images"]] == ["minimal"]
    assert found["images"][0]["state"] == "built"
    assert "datascience" in found["recipes_not_built"]
    (home / ".local/share/vmkernel/images/minimal/vmlinuz").unlink()
    found = json.loads(vmkernel(home, "list", "--json").stdout)
    assert found["images"][0]["state"] == "damaged"
    assert "vmlinuz" in found["images"][0]["error"]


def test_verify_ends_with_1_and_names_the_file(home: Path) -> None:
    assert vmkernel(home, "verify").returncode == 0
    path = home / ".local/share/vmkernel/images/minimal/vmlinuz"
    path.write_text(path.read_text().upper())
    result = vmkernel(home, "verify", "minimal")
    assert result.returncode == 1
    assert "vmlinuz has changed" in result.stderr
    assert "--force" in result.stderr


def test_rm(home: Path) -> None:
    assert vmkernel(home, "rm", "minimal").returncode == 0
    result = vmkernel(home, "rm", "minimal")
    assert result.returncode == 1
    assert "no image 'minimal'" in result.stderr


def test_build_tells_what_is_there_and_what_is_no_recipe(home: Path) -> None:
    assert "there already" in vmkernel(home, "build", "minimal").stdout
    result = vmkernel(home, "build", "minimal", "nosuch")
    assert result.returncode == 1
    assert "no recipe 'nosuch'" in result.stderr
    assert "datascience" in result.stderr
    assert vmkernel(home, "build", "--security-mirror", "http://x.example").returncode == 2


def test_progress_on_a_terminal_is_one_line(tmp_path: Path) -> None:
    code = (
        "from vmkernel.cli.image_build import ProgressLine\n"
        "with ProgressLine('x') as line:\n"
        "    for i in range(5): line.show('phase' + 'long' * 100, i / 4)\n"
    )
    outer, inner = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=inner, check=True, timeout=60)
    os.close(inner)
    shown = os.read(outer, 100_000).decode()
    os.close(outer)
    assert "\n" not in shown
    assert shown.count("\r") == 6
    assert shown.endswith("\r\x1b[K")
    plain = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert plain.stderr.count("\n") == 1
