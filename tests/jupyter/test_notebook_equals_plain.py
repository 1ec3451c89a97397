"""A notebook of real work has the same outputs in a microVM as on plain ipykernel.

What is compared: for each cell its execution count and its outputs in order, with their types,
MIME types, texts, metadata, names and values of errors, and tracebacks with their colours. What is
not, and why, is in `normal` and nowhere else.
"""

from __future__ import annotations

import base64
import copy
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent / "notebooks"
pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

Output = dict[str, Any]

PNG = b"\x89PNG\r\n\x1a\n"
ERRORS = """
ValueError KeyError SyntaxError RuntimeError AssertionError IndexError NameError SyntaxError Custom
StopIteration SystemExit FileNotFoundError KeyError
"""

# A path begins here: at a word's start, or after a colour.
_PATH = r"(?:(?<=\x1b\[\dm)|(?<=\x1b\[\d\dm)|(?<![\w./~-]))[/~][\w./~-]*"
SUBSTITUTIONS = (
    # IPython names a cell's file after the kernel's process and the cell's text.
    (re.compile(r"/tmp/ipykernel_\d+/(\d+)\.py"), r"<process>/\1.py"),
    # Where libraries lie differs between the host's environment and the guest's image.
    (re.compile(rf"{_PATH}/(?:site|dist)-packages/"), "<packages>/"),
    (re.compile(rf"{_PATH}/lib/python3\.\d+/"), "<library>/"),
    # Objects lie elsewhere.
    (re.compile(r"\b0x[0-9a-f]{6,}"), "0x…"),
)


def cells_of(path: Path) -> list[str]:
    """The cells of a percent-format file."""
    return [part.strip("\n") for part in path.read_text().split("# %%\n")[1:]]


def notebook(*paths: Path) -> nbformat.NotebookNode:
    """A notebook with these files' cells."""
    cells = [nbformat.v4.new_code_cell(source) for path in paths for source in cells_of(path)]
    return nbformat.v4.new_notebook(cells=cells)


def execute(book: nbformat.NotebookNode, kernel: str, directory: Path) -> nbformat.NotebookNode:
    """Run it on a kernel, going on after errors."""
    book = copy.deepcopy(book)
    resources = {"metadata": {"path": str(directory)}}
    NotebookClient(
        book, kernel_name=kernel, timeout=300, startup_timeout=300, allow_errors=True,
        resources=resources,
    ).execute()  # fmt: skip
    return book


def normal(output: Output) -> Output:
    """An output without what must differ between two kernels that do the same."""
    output = copy.deepcopy(dict(output))
    data = output.get("data", {})
    for mime in data:
        if mime == "image/png" and base64.b64decode(data[mime]).startswith(PNG):
            # The pixels depend on how the libraries were built, down to the fonts.
            data[mime] = "<a picture>"
    return _substitute(output)


def _substitute(value: Any) -> Any:
    if isinstance(value, str):
        for pattern, replacement in SUBSTITUTIONS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, dict):
        return {key: _substitute(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item) for item in value]
    return value


def differences(ours: nbformat.NotebookNode, plain: nbformat.NotebookNode) -> list[str]:
    """Where two executed notebooks differ, a line each."""
    found = []
    assert len(ours.cells) == len(plain.cells)
    for number, (one, other) in enumerate(zip(ours.cells, plain.cells, strict=True), 1):
        name = f"cell {number} ({one.source.splitlines()[0]!r})"
        if one.execution_count != other.execution_count:
            found.append(f"{name}: count {one.execution_count}, not {other.execution_count}")
        mine, theirs = (_joined(map(normal, cell.outputs)) for cell in (one, other))
        if mine != theirs:
            found.append(f"{name}:\n   ours:  {_short(mine)}\n   plain: {_short(theirs)}")
    return found


def _joined(outputs: Iterable[Output]) -> list[Output]:
    """Neighbours of one stream as one: where a stream is cut is a matter of time, and front ends
    join the pieces."""
    joined: list[Output] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output["output_type"] == last.get("output_type") == "stream" and (
            output["name"] == last["name"]
        ):
            last["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def _short(outputs: list[Output]) -> str:
    text = repr(outputs)
    return text if len(text) < 3000 else f"{text[:1500]} … {text[-1400:]}"


def test_a_notebook_of_real_work_has_the_same_outputs(
    datascience_kernel: str, plain_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under pytest ipykernel does not read descriptors 1 and 2, and would show no child's output.
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.delenv("MPLBACKEND")  # figures in the notebook, as for everyone
    book = notebook(*sorted(NOTEBOOKS.glob("*.ipy")))
    assert len(book.cells) >= 80
    directories = tmp_path / "ours", tmp_path / "plain"
    for directory in directories:
        directory.mkdir()
    ours = execute(book, datascience_kernel, directories[0])
    plain = execute(book, plain_spec, directories[1])
    found = differences(ours, plain)
    assert not found, "\n".join(found)
    # The comparison saw what it was to see.
    outputs = [output for cell in ours.cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {
        "stream", "display_data", "execute_result", "error",
    }  # fmt: skip
    assert [output.ename for output in outputs if "ename" in output] == ERRORS.split()
    assert sum(len(output.get("text", "")) for output in outputs) > 2_500_000
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
    # What the cells wrote they wrote in the guest.
    assert (directories[1] / "table.csv").exists()
    assert not list(directories[0].iterdir())


def test_jupyter_execute_runs_a_notebook(small_spec: str, tmp_path: Path) -> None:
    path = tmp_path / "note.ipynb"
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("print(6 * 7)")],
        metadata={"kernelspec": {"name": small_spec, "display_name": "x", "language": "python"}},
    )
    nbformat.write(book, path)
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", "--timeout=200", str(path)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    (cell,) = nbformat.read(path, as_version=4).cells
    assert cell.outputs[0].text == "42\n"


@pytest.mark.parametrize(
    "change",
    [
        {"text": "other"},
        {"name": "stderr"},
        {"output_type": "display_data", "data": {"text/plain": "42\n"}, "metadata": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_comparison_sees_a_difference(change: Output) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", execution_count=1)])
    stream = {"output_type": "stream", "name": "stdout", "text": "42\n"}
    book.cells[0].outputs = [nbformat.from_dict(stream)]
    other = copy.deepcopy(book)
    assert differences(book, other) == []
    other.cells[0].outputs = [nbformat.from_dict({**stream, **change})]
    assert len(differences(book, other)) == 1


def test_the_comparison_sees_lost_and_reordered_outputs() -> None:
    outputs = [
        nbformat.from_dict({"output_type": "stream", "name": name, "text": name})
        for name in ("stdout", "stderr")
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])
    for wrong in (outputs[:1], outputs[::-1], [*outputs, outputs[0]]):
        other = copy.deepcopy(book)
        other.cells[0].outputs = wrong
        assert differences(book, other)


def _stream(text: str) -> Output:
    return {"output_type": "stream", "name": "stdout", "text": text}


def _shown(mime: str, data: bytes) -> Output:
    content = {mime: base64.b64encode(data).decode()}
    return {"output_type": "display_data", "data": content, "metadata": {}}


FORGIVEN = [
    (_stream("/tmp/ipykernel_1/99.py:1"), _stream("/tmp/ipykernel_23/99.py:1")),
    (_stream("<object at 0x7f00deadbeef>"), _stream("<object at 0x7fffdeadbee0>")),
    (
        _stream("File \x1b[32m/root/.venv/lib/python3.11/site-packages/pandas/a.py:3"),
        _stream("File \x1b[32m/usr/local/lib/python3.13/dist-packages/pandas/a.py:3"),
    ),
    (
        _stream("File ~/.pyenv/versions/3.11.7/lib/python3.11/json/a.py:3"),
        _stream("File /usr/lib/python3.13/json/a.py:3"),
    ),
    (_shown("image/png", PNG + b"one"), _shown("image/png", PNG + b"two")),
]
SEEN = [
    (_stream("/tmp/ipykernel_1/98.py:1"), _stream("/tmp/ipykernel_1/99.py:1")),
    (_stream("/lib/python3.11/json/a.py:3"), _stream("/lib/python3.11/json/a.py:4")),
    (_stream("\x1b[31mred\x1b[0m"), _stream("red")),
    (_shown("image/png", PNG + b"one"), _shown("image/png", b"none")),
    (_shown("image/png", PNG + b"one"), _shown("image/jpeg", PNG + b"one")),
]


@pytest.mark.parametrize(("one", "other"), FORGIVEN)
def test_what_must_differ_is_forgiven(one: Output, other: Output) -> None:
    assert normal(one) == normal(other)


@pytest.mark.parametrize(("one", "other"), SEEN)
def test_nothing_else_is_forgiven(one: Output, other: Output) -> None:
    assert normal(one) != normal(other)
