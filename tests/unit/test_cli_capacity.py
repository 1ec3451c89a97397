"""``vmkernel capacity``: what `ray start` is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmkernel.cli.capacity import capacity


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKERNEL_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("VMKERNEL_MAX_CONCURRENT_VMS", "7")


def test_as_ray_takes_it() -> None:
    said = CliRunner().invoke(capacity, ["--json"])
    assert said.output == '{"vm_slot": 7}\n'
    assert json.loads(said.output) == {"vm_slot": 7}


def test_a_users_own_limit_is_what_counts_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKERNEL_MAX_VMS_PER_USER", "3")
    assert CliRunner().invoke(capacity, ["--json"]).output == '{"vm_slot": 3}\n'
    monkeypatch.setenv("VMKERNEL_MAX_VMS_PER_USER", "9")
    assert CliRunner().invoke(capacity, ["--json"]).output == '{"vm_slot": 7}\n'


def test_for_people(tmp_path: Path) -> None:
    lines = CliRunner().invoke(capacity).output.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["limit:", "7"], ["used:", "0"], ["free:", "7"], ["waiting:", "0"],
        ["file:", str(tmp_path / "run" / "slots")],
    ]  # fmt: skip
