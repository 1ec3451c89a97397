"""Displays that people expect, under `outputs = safe`: bars, uploads, links, payloads.

That magics, pictures, tables and media say what plain ipykernel says is notebooks/files.ipy and
notebooks/displays.ipy (test_notebook_equals_plain.py).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel_client import Kernel, StartKernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def lab(datascience_kernel: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    """A kernel with packages; tqdm comes by `vmkernel cp`."""
    with start_kernel(datascience_kernel, env={"MPLBACKEND": ""}) as kernel:
        vm = kernel.run(
            "import os, socket, sys; os.mkdir('/home/user/lib'); print(socket.gethostname())"
        ).stdout.strip()
        spec = importlib.util.find_spec("tqdm")
        assert spec is not None
        assert spec.origin
        command = ["from vmkernel.cli.app import main; main()", "cp"]
        source = str(Path(spec.origin).parent)
        subprocess.run(
            [sys.executable, "-c", *command, source, f"{vm}:lib/tqdm"],
            check=True, capture_output=True,
        )  # fmt: skip
        kernel.run("sys.path.insert(0, '/home/user/lib')")
        yield kernel


def on_screen(text: str) -> list[str]:
    """What a terminal or a notebook shows of it at the end."""
    lines = text.replace("\x1b[A", "").split("\n")
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines if line.strip()]


def html(kernel: Kernel, code: str) -> str:
    (content,) = kernel.run(code).contents("execute_result")
    return str(content["data"]["text/html"])


# --- tqdm ---


def test_a_bar_of_tqdm_is_drawn_over_itself(lab: Kernel) -> None:
    cell = lab.run("from tqdm import tqdm\nfor _ in tqdm(range(50), desc='work', mininterval=0): 1")
    assert cell.stderr.count("\r") > 10
    (line,) = on_screen(cell.stderr)
    assert re.match(r"work: 100%\|█{5,}\| 50/50 \[", line)


def test_tqdm_chooses_widgets_where_there_are_widgets(lab: Kernel) -> None:
    cell = lab.run(
        "from tqdm.auto import tqdm as auto\n"
        "for _ in auto(range(20), desc='more', mininterval=0): 1"
    )
    assert "vmkernel:" not in cell.stderr
    models = [
        content["data"]["state"]["_model_name"]
        for content in cell.contents("comm_open")
        if "_model_name" in content["data"]["state"]
    ]
    assert {"HBoxModel", "FloatProgressModel", "HTMLModel"} <= set(models)
    (shown,) = cell.contents("display_data")
    assert "application/vnd.jupyter.widget-view+json" in shown["data"]
    values = [
        content["data"]["state"]["value"]
        for content in cell.contents("comm_msg")
        if "value" in content["data"].get("state", {})
    ]
    assert 20 in values
    assert any("20/20" in str(value) for value in values)


def test_pandas_and_tqdm(lab: Kernel) -> None:
    cell = lab.run(
        "import pandas as pd\ntqdm.pandas(desc='rows')\n"
        "pd.Series(range(5)).progress_apply(lambda x: x * 2).sum()"
    )
    assert cell.result.endswith("20)") or cell.result == "20"
    assert "rows: 100%" in cell.stderr


# --- uploads ---


def test_an_upload_of_a_widget_arrives(lab: Kernel) -> None:
    cell = lab.run("import ipywidgets\nup = ipywidgets.FileUpload(accept='.csv')\nup")
    assert "vmkernel:" not in cell.stderr
    comm_id = lab.run("print(up.comm.comm_id)").stdout.strip()
    data = bytes(range(256)) * 4000
    state: dict[str, Any] = {
        "value": [{"name": "data é.csv", "type": "text/csv", "size": len(data),
                   "last_modified": 1_700_000_000_000, "error": ""}],
    }  # fmt: skip
    lab.ask(
        "comm_msg",
        {
            "comm_id": comm_id,
            "data": {"method": "update", "state": state, "buffer_paths": [["value", 0, "content"]]},
        },
        buffers=[data],
    )
    cell = lab.run(
        "(f,) = up.value\nprint(f.name, f.size, bytes(f.content) == bytes(range(256)) * 4000)"
    )
    assert cell.stdout == f"data é.csv {len(data)} True\n"


# --- links ---


def test_links_to_files_stay_and_can_download(kernel: Kernel) -> None:
    kernel.run("from IPython.display import HTML, FileLink, FileLinks\nimport pathlib")
    kernel.run("for n in ('a b é.csv', 'plain.csv'): _ = pathlib.Path(n).write_text('x')")
    assert html(kernel, "FileLink('plain.csv')") == (
        '<a href="plain.csv" target="_blank" rel="noopener noreferrer">plain.csv</a><br>'
    )
    assert 'href="a b é.csv"' in html(kernel, "FileLink('a b é.csv')")
    assert 'href="./plain.csv"' in html(kernel, "FileLinks('.')")
    shown = html(kernel, 'HTML(\'<a href="plain.csv" class="x" target="_top" download>get</a>\')')
    assert re.search(r'<a href="plain.csv" class="x" download=""', shown)
    assert "_top" not in shown
    for bad in ("javascript:alert(1)", "//else.where/x", "/api/contents", "data:text/html,x"):
        assert "href" not in html(kernel, f'HTML(\'<a class="x" href="{bad}" download>get</a>\')')


# --- what asks the front end for something ---


def test_load_and_recall_bring_the_next_cell(kernel: Kernel) -> None:
    kernel.run("%%writefile s.py\nx = 1")
    payload = kernel.run("%load s.py").reply["payload"]
    assert payload == [
        {"source": "set_next_input", "text": "# %load s.py\nx = 1\n", "replace": True}
    ]
    (payload,) = kernel.run("%recall 1").reply["payload"]
    assert payload["replace"] is False


def test_edit_starts_no_editor_on_the_host(kernel: Kernel) -> None:
    cell = kernel.run("%edit s.py")
    assert cell.reply["payload"] == []
    assert "a request to the front end (edit" in cell.stderr


def test_script_is_left_out_with_a_word(kernel: Kernel) -> None:
    cell = kernel.run("%%javascript\nalert(1)")
    assert "not shown: application/javascript" in cell.stderr
    cell = kernel.run("%%html\n<script>alert(1)</script><b>stays</b>")
    assert "<b>stays</b>" in cell.contents("display_data")[0]["data"]["text/html"]
    assert "script" in cell.stderr


def test_a_backend_that_is_not_there_is_named(lab: Kernel) -> None:
    assert "widget" in lab.run("%matplotlib widget").error["evalue"]
    cell = lab.run("%matplotlib inline\nimport matplotlib.pyplot as plt\n_ = plt.plot([1, 2])")
    assert "image/png" in cell.contents("display_data")[0]["data"]
