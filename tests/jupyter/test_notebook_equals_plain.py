"""A notebook of real work has the same outputs in a microVM as on plain ipykernel.

What is compared: for each cell its execution count and its outputs in order, with their types,
MIME types, texts, metadata, names and values of errors, and tracebacks. What is not, and why, is
in `normal` and nowhere else.
"""

from __future__ import annotations

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

SUBSTITUTIONS = (
    # IPython names a cell's file after the kernel's process and the cell's text.
    (re.compile(r"/tmp/ipykernel_\d+/\d+\.py"), "<cell>"),
    # Where a library lies differs between the host's environment and the guest's image.
    (re.compile(r"(File )(\x1b\[\d+m)?[~/][^\s:,]*?/(?=(site|dist)-packages|python3)"), r"\1"),
    (re.compile(r"0x[0-9a-f]{6,}"), "0x…"),
)


def cells_of(path: Path) -> list[str]:
    """The cells of a percent-format file."""
    return [part.strip("\n") for part in path.read_text().split("# %%\n")[1:]]


def notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook with these cells."""
    cells = [nbformat.v4.new_code_cell(source) for source in cells_of(path)]
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
    """An output without what must differ between two machines and two Python versions."""
    output = copy.deepcopy(dict(output))
    if output["output_type"] == "error":
        # The frames' source lines and the error stay; markers below a line (3.11 and later draw
        # them differently) and colours, which follow them, do not.
        lines = "\n".join(output["traceback"])
        lines = re.sub(r"\x1b\[[\d;]*m", "", lines)
        output["traceback"] = [
            line.rstrip() for line in lines.splitlines() if not re.fullmatch(r"[\s~^]*", line)
        ]
    data = output.get("data", {})
    for mime in data:
        if mime.startswith("image/png") and len(data[mime]) > 100:
            # The pixels depend on the fonts that are installed.
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
    book = notebook(NOTEBOOKS / "real_work.ipy")
    assert len(book.cells) >= 30
    ours = execute(book, datascience_kernel, tmp_path)
    plain = execute(book, plain_spec, tmp_path)
    found = differences(ours, plain)
    assert not found, "\n".join(found)
    # The comparison saw what it was to see.
    outputs = [output for cell in ours.cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {
        "stream", "display_data", "execute_result", "error",
    }  # fmt: skip
    assert sum(len(output.get("text", "")) for output in outputs) > 2_500_000
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4


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


def test_errors_are_compared_beyond_colours_and_markers() -> None:
    def error(line: str) -> Output:
        return {"output_type": "error", "ename": "E", "evalue": "v", "traceback": [line]}

    assert normal(error("\x1b[31mE\x1b[0m: v")) == normal(error("E: v\n   ~~^~~"))
    assert normal(error("E: v")) != normal(error("E: w"))
