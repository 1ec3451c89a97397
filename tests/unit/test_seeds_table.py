"""docs/seeds.md names, for each row of what the manager owes, tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [f"A{number}" for number in range(1, 11)] + [f"B{number}" for number in range(1, 12)]


def test_each_row_has_its_tests_and_each_test_its_row() -> None:
    table = (ROOT / "docs" / "seeds.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \|.*\| (.*) \|$", table, re.MULTILINE))
    del rows["row"]
    assert list(rows) == ROWS
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row, shown in rows.items():
        named = re.findall(r"`(test_\w+)`", shown)
        assert any(name.startswith(f"test_{row}_") for name in named), row
        for name in named:
            assert f"def {name}(" in code, f"{row}: there is no {name}"
        for path in re.findall(r"`(tests/\S+\.py)`", shown):
            assert (ROOT / path).is_file(), path
    for path in (ROOT / "tests" / "manager").glob("test_*.py"):
        for name, row in re.findall(r"def (test_([AB]\d+)_\w+)\(", path.read_text()):
            assert f"`{name}`" in rows[row], f"{name} is missing in row {row}"
