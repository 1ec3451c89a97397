"""A notebook gives the same messages in a microVM as on plain ipykernel, one by one.

compare.py is the tool; what it does not compare, and which differences are meant, is there. Each
notebook here is about one part of what a kernel does (notebooks/*.ipy).
"""

from __future__ import annotations

import base64
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import compare
import nbformat
import pytest
from compare import Difference, Heard, Message, Normaliser, Step, Transcript, differences, normal

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

REAL_WORK = ("real_work", "real_work_more")
WITH_PACKAGES = (*REAL_WORK, "widgets", "displays")
OTHERS = sorted({path.stem for path in compare.NOTEBOOKS.glob("*.ipy")} - {*WITH_PACKAGES})
ERRORS = """
ValueError KeyError SyntaxError RuntimeError AssertionError IndexError NameError SyntaxError Custom
StopIteration SystemExit FileNotFoundError KeyError
"""


def notebook(*names: str) -> list[Step]:
    return [step for name in names for step in compare.steps_of(compare.NOTEBOOKS / f"{name}.ipy")]


def same(steps: list[Step], kernel: str, plain: str) -> Transcript:
    """Run the steps on both kernels; the plain one's transcript, when the other's is the same."""
    one, ours = compare.record_both((plain, kernel), steps)
    unknown = compare.surprises(differences(one, ours))
    shown = [f"{steps[difference.step - 1]}\n{difference}" for difference in unknown[:30]]
    assert not unknown, f"{len(unknown)} differences (one: plain)\n" + "\n".join(shown)
    return one


def contents(transcript: Transcript, *types: str) -> list[Message]:
    found = [heard for step in transcript for heard in step if heard.msg_type in types]
    return [heard.body["content"] for heard in found]


# Displays, payloads and comms that `outputs = safe` does not show: docs/outputs.md.
TRUSTED = ("comms", "display", "magics", "payloads", "streams")


@pytest.mark.parametrize("name", OTHERS)
def test_a_notebook_has_the_same_messages(
    name: str, small_spec: str, plain_spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in TRUSTED:
        monkeypatch.setenv("VMKERNEL_OUTPUTS", "trusted")
    steps = notebook(name)
    transcript = same(steps, small_spec, plain_spec)
    assert sum(map(len, transcript)) > 3 * len(steps)  # it heard something


def test_a_notebook_of_real_work_has_the_same_messages(
    datascience_kernel: str, plain_spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPLBACKEND")  # figures in the notebook, as for everyone
    steps = notebook(*WITH_PACKAGES)
    assert len(steps) >= 100
    transcript = same(steps, datascience_kernel, plain_spec)
    # The comparison saw what it was to see.
    names = [content["ename"] for content in contents(transcript, "error")]
    assert names[: len(ERRORS.split())] == ERRORS.split()
    text = sum(len(content["text"]) for content in contents(transcript, "stream"))
    assert text > 2_500_000
    shown = contents(transcript, "display_data", "execute_result")
    assert sum("image/png" in content["data"] for content in shown) >= 7
    assert len(contents(transcript, "comm_open")) > 20


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


def test_the_tool_on_the_command_line(small_spec: str, tmp_path: Path) -> None:
    """An .ipynb file; and it finds a difference where there is one."""
    cells = [nbformat.v4.new_code_cell(code) for code in ("print(6 * 7)", "import os; os.getpid()")]
    path = tmp_path / "note.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    tool = [sys.executable, str(compare.NOTEBOOKS.parent / "compare.py"), str(path)]
    command = [*tool, "--kernels", small_spec, small_spec]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "note.ipynb: 2 steps" in done.stdout, done.stderr
    if os.environ.get("KERNEL_UNDER_TEST") == "plain":  # two processes of one machine
        assert done.returncode == 1
        assert "execute_result/content/data/text/plain" in done.stdout
    else:  # two clones of one template
        assert done.returncode == 0, done.stdout


# --- the comparison itself ---


def heard(msg_type: str, parent: str = "1", channel: str = "iopub", **content: object) -> Heard:
    return Heard(channel, msg_type, parent, {"content": content, "metadata": {}, "buffers": []})


STREAM = heard("stream", name="stdout", text="42\n")
CHANGED = {
    "text": heard("stream", name="stdout", text="other"),
    "name": heard("stream", name="stderr", text="42\n"),
    "type": heard("display_data", name="stdout", text="42\n"),
    "parent": heard("stream", "2", name="stdout", text="42\n"),
    "channel": heard("stream", channel="control", name="stdout", text="42\n"),
    "key": heard("stream", name="stdout", text="42\n", more=1),
    "value's type": heard("stream", name="stdout", text=42),
    "metadata": Heard("iopub", "stream", "1", {**STREAM.body, "metadata": {"k": 1}}),
    "buffers": Heard("iopub", "stream", "1", {**STREAM.body, "buffers": ["00"]}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_the_comparison_sees_a_difference(what: str) -> None:
    assert differences([[STREAM]], [[copy.deepcopy(STREAM)]]) == []
    found = differences([[STREAM]], [[CHANGED[what]]])
    assert found
    assert all(difference.step == 1 for difference in found)


def test_the_comparison_sees_lost_and_reordered_messages() -> None:
    both = [STREAM, CHANGED["type"]]
    for wrong in (both[:1], both[::-1], [*both, STREAM], []):
        assert differences([both], [wrong])
    # What comes first on two sockets is chance.
    reply = heard("execute_reply", channel="shell")
    assert not differences([[STREAM, reply]], [[reply, STREAM]])


def test_a_meant_difference_is_named_in_the_documentation() -> None:
    page = (compare.NOTEBOOKS.parents[2] / "docs" / "parity.md").read_text()
    for known in compare.KNOWN:
        assert f"| `{known.name}` |" in page, known
    names = re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)
    assert sorted(names) == sorted({known.name for known in compare.KNOWN})
    assert compare.surprises([Difference(1, "iopub stream/content/text", "a", "b")])


def _stream(text: str) -> Message:
    return {"name": "stdout", "text": text}


def _shown(mime: str, data: bytes) -> Message:
    return {"data": {mime: base64.b64encode(data).decode()}, "metadata": {}}


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
    (_stream("Wall time: 3.07 ms"), _stream("Wall time: 12 µs")),
    (_shown("image/png", compare.PNG + b"one"), _shown("image/png", compare.PNG + b"two")),
]
SEEN = [
    (_stream("/tmp/ipykernel_1/98.py:1"), _stream("/tmp/ipykernel_1/99.py:1")),
    (_stream("/lib/python3.11/json/a.py:3"), _stream("/lib/python3.11/json/a.py:4")),
    (_stream("\x1b[31mred\x1b[0m"), _stream("red")),
    (_stream("3 4"), _stream("4 4")),
    (_shown("image/png", compare.PNG + b"one"), _shown("image/png", b"none")),
    (_shown("image/png", compare.PNG + b"one"), _shown("image/jpeg", compare.PNG + b"one")),
]


@pytest.mark.parametrize(("one", "other"), FORGIVEN)
def test_what_must_differ_is_forgiven(one: Message, other: Message) -> None:
    assert normal(one) == normal(other)


@pytest.mark.parametrize(("one", "other"), SEEN)
def test_nothing_else_is_forgiven(one: Message, other: Message) -> None:
    assert normal(one) != normal(other)


def test_identifiers_are_numbered_and_streams_are_joined() -> None:
    def message(name: str, text: str) -> tuple[str, Message]:
        return "iopub", {
            "header": {"msg_type": "stream"}, "msg_type": "stream", "parent_header": {},
            "content": {"name": name, "text": text}, "metadata": {},
        }  # fmt: skip

    one, two = "0f" * 16, "12345678-1234-1234-1234-123456789abc"
    texts = [one, two, one]
    came = Normaliser().messages([message("stdout", text) for text in texts], [])
    assert [one.body["content"]["text"] for one in came] == ["<id 0><id 1><id 0>"]
    came = Normaliser().messages([message(name, "x") for name in ("stdout", "stderr")], [])
    assert len(came) == 2
