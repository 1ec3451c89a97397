"""Notebooks run by commands: ``jupyter nbconvert --execute`` and ``papermill`` with parameters."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from kernel_client import kernel_environment

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

PATIENCE = 300
COLOURS = re.compile(r"\x1b\[[\d;]*m")


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m …`` to its end, whatever that is."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=cwd,
        env=kernel_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def write(path: Path, kernel: str, *cells: str, parameters: str = "") -> Path:
    """A notebook with these cells; *parameters* is a cell that papermill replaces."""
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}}
    )
    if parameters:
        book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    book.cells += map(nbformat.v4.new_code_cell, cells)
    nbformat.write(book, path)
    return path


def outputs(path: Path) -> list[Any]:
    """The outputs of each code cell."""
    return [cell.outputs for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def text(cell: list[Any]) -> str:
    """What a cell printed and gave."""
    parts = [it.text if it.output_type == "stream" else it.data["text/plain"] for it in cell]
    return "".join(parts)


def test_nbconvert_executes_into_a_notebook(small_spec: str, tmp_path: Path):
    write(tmp_path / "in.ipynb", small_spec, "x = 6\nprint('six')", "x * 7")
    done = run("jupyter", "nbconvert", "--execute", "--to", "notebook", "--output", "out.ipynb",
               "in.ipynb", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = outputs(tmp_path / "out.ipynb")
    assert text(first) == "six\n"
    assert text(second) == "42"
    assert second[0].execution_count == 2


def test_nbconvert_executes_into_html(small_spec: str, tmp_path: Path):
    write(tmp_path / "in.ipynb", small_spec,
          "from IPython.display import HTML\nHTML('<b id=bold>in bold</b>')", "1 / 0")  # fmt: skip
    done = run("jupyter", "nbconvert", "--execute", "--allow-errors", "--to", "html", "in.ipynb",
               cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "in.html").read_text()
    assert "in bold</b>" in page
    assert "ZeroDivisionError" in page
    assert '<span class="ansi-red-fg">' in page


def test_nbconvert_fails_on_an_error_and_shows_it(small_spec: str, tmp_path: Path):
    write(tmp_path / "in.ipynb", small_spec, "def broken():\n    raise KeyError('lost')\nbroken()")
    done = run("jupyter", "nbconvert", "--execute", "--to", "notebook", "--output", "out.ipynb",
               "in.ipynb", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert "KeyError: 'lost'" in COLOURS.sub("", done.stderr)
    assert not (tmp_path / "out.ipynb").exists()


def test_papermill_gives_parameters_of_every_kind(small_spec: str, tmp_path: Path):
    write(tmp_path / "in.ipynb", "python3", "print(repr((n, ratio, flag, name, items)))",
          parameters="n = 1\nratio = flag = name = items = None")  # fmt: skip
    done = run("papermill", "in.ipynb", "out.ipynb", "-k", small_spec,
               "-p", "n", "3", "-p", "ratio", "0.5", "-p", "flag", "True", "-r", "name", "3",
               "-y", "items: [1, two]", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    given, injected, asked = outputs(tmp_path / "out.ipynb")
    assert given == injected == []
    assert text(asked) == "(3, 0.5, True, '3', [1, 'two'])\n"
    book = nbformat.read(tmp_path / "out.ipynb", 4)
    assert book.metadata.papermill.parameters == {
        "n": 3, "ratio": 0.5, "flag": True, "name": "3", "items": [1, "two"],
    }  # fmt: skip
    assert book.metadata.papermill.exception is None
    assert "injected-parameters" in book.cells[1].metadata.tags


def test_papermill_stops_at_an_error_and_keeps_what_was_done(small_spec: str, tmp_path: Path):
    write(tmp_path / "in.ipynb", small_spec, "print('before')", "1 / divisor", "print('never')",
          parameters="divisor = 1")  # fmt: skip
    done = run("papermill", "in.ipynb", "out.ipynb", "-k", small_spec, "-p", "divisor", "0",
               "--log-output", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert "PapermillExecutionError" in done.stderr
    assert "ZeroDivisionError: division by zero" in done.stderr
    book = nbformat.read(tmp_path / "out.ipynb", 4)
    assert book.metadata.papermill.exception is True
    # papermill puts a cell that says so at the top, and marks the place.
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    by_source = {cell.source: cell for cell in code}
    assert text(by_source["print('before')"].outputs) == "before\n"
    (error,) = by_source["1 / divisor"].outputs
    assert (error.output_type, error.ename) == ("error", "ZeroDivisionError")
    assert by_source["print('never')"].outputs == []
    assert by_source["print('never')"].execution_count is None
