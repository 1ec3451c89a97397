"""Files in JupyterLab: a workspace that is written to, questions before copies, uploads, links."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, Notebook
from lab_server import LabServer
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.vm, pytest.mark.timeout(400)]

DATA = "city,year,visitors\n" + "".join(
    f"{city},{year},{visitors + 40 * (year - 2020)}\n"
    for city, visitors in (("Athens", 310), ("Oslo", 120), ("Turin", 180))
    for year in range(2020, 2026)
)


@pytest.fixture(scope="module")
def project(server: LabServer) -> Path:
    """The directory of the notebook, with a CSV in it."""
    directory = server.root / "project"
    directory.mkdir()
    (directory / "visitors.csv").write_text(DATA)
    return directory


@pytest.fixture(scope="module", autouse=True)
def spec(kernel_name: str) -> str:
    """A kernelspec whose workspace may be written to, and which asks before it copies.

    Before anything else: the page knows the kernelspecs that were there when it was loaded.
    """
    from jupyter_client.kernelspec import KernelSpecManager

    old = Path(KernelSpecManager().get_kernel_spec(kernel_name).resource_dir)
    new = old.with_name("vmsandbox-rw")
    new.mkdir()
    told = json.loads((old / "kernel.json").read_text())
    told["display_name"] = "Python (microVM, rw)"
    told["env"] = {"VMKERNEL_WORKSPACE": "rw", "VMKERNEL_FILES": "ask"}
    (new / "kernel.json").write_text(json.dumps(told))
    return new.name


@pytest.fixture(scope="module")
def module_notebook(lab: Lab, spec: str, project: Path) -> Iterator[Notebook]:
    """A notebook in the project's directory."""
    notebook = lab.open_notebook("project/visitors.ipynb", spec)
    yield notebook
    lab.close_notebook()


def test_a_csv_is_read_plotted_and_a_result_is_in_the_file_browser(
    lab: Lab, notebook: Notebook, project: Path
):
    lab.command("filebrowser:go-to-path", path="project")
    items = lab.page.locator("#filebrowser .jp-DirListing-item")
    expect(items.filter(has_text="visitors.csv")).to_be_visible()
    expect(items.filter(has_text="growth.csv")).to_have_count(0)
    cell = notebook.run(
        "import os, pandas as pd\n"
        "data = pd.read_csv('visitors.csv').pivot(index='year', columns='city')['visitors']\n"
        "data.plot(figsize=(5, 2)); print(os.getcwd())"
    )
    picture = cell.box.locator("img[src^='data:image/png']")
    assert picture.evaluate("img => img.decode().then(() => img.naturalWidth)") > 200
    assert str(project) in cell.text
    notebook.run("data.pct_change().dropna().round(3).to_csv('growth.csv')").finish()
    lab.command("filebrowser:refresh")
    result = items.filter(has_text="growth.csv")
    expect(result).to_be_visible()
    rows = list(csv.DictReader((project / "growth.csv").open()))
    assert [row["year"] for row in rows] == ["2021", "2022", "2023", "2024", "2025"]
    assert rows[0]["Athens"] == "0.129"
    # What is written on the host meanwhile is seen at once
    (project / "visitors.csv").write_text(DATA + "Bergen,2025,70\n")
    assert notebook.run("len(pd.read_csv('visitors.csv'))").text == "19"
    result.dblclick()  # JupyterLab's own view of the file
    viewer = lab.page.locator(".jp-CSVViewer:not(.lm-mod-hidden)")
    expect(viewer).to_be_visible()
    lab.page.evaluate("window.jupyterapp.shell.currentWidget.dispose()")


def test_a_copy_asks_in_the_cell(notebook: Notebook, project: Path, tmp_path: Path):
    (tmp_path / "outside.txt").write_text("from afar")
    cell = notebook.start(
        f"%vm put {tmp_path}/outside.txt /tmp/\nprint(open('/tmp/outside.txt').read())"
    )
    prompt = cell.box.locator(".jp-Stdin-prompt")
    expect(prompt).to_have_text(
        f"Copy {tmp_path}/outside.txt (9 bytes) from this host into the VM? [y/N] "
    )
    answer = cell.box.locator(".jp-Stdin-input")
    answer.fill("y")
    answer.press("Enter")
    assert "from afar" in cell.finish().text
    cell = notebook.start("%vm put " + f"{tmp_path}/outside.txt /tmp/again")
    cell.box.locator(".jp-Stdin-input").press("Enter")
    assert "the copy was not agreed to" in cell.finish().text


def test_an_upload_arrives(lab: Lab, notebook: Notebook, tmp_path: Path):
    data = bytes(range(256)) * 2000
    (tmp_path / "up load.bin").write_bytes(data)
    cell = notebook.run("import ipywidgets\nup = ipywidgets.FileUpload()\nup")
    button = cell.box.locator("button.widget-upload")
    with lab.page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files(tmp_path / "up load.bin")
    expect(button).to_contain_text("(1)")
    notebook.wait_result(
        "[(f.name, f.size, bytes(f.content) == bytes(range(256)) * 2000) for f in up.value]",
        f"[('up load.bin', {len(data)}, True)]",
    )


def test_links_open_and_download_what_the_cell_wrote(lab: Lab, notebook: Notebook):
    cell = notebook.run(
        "from IPython.display import FileLink, HTML, display\n"
        "_ = open('my résumé.txt', 'w').write('short')\n"
        'link = \'<a class="x" href="my résumé.txt" download>d</a>\'\n'
        "display(FileLink('my résumé.txt'), HTML(link))"
    )
    links = cell.box.locator(".jp-RenderedHTMLCommon a")
    expect(links.first).to_have_attribute("href", re.compile(r"/files/project/my%20r"))
    with lab.page.expect_download() as download:
        links.last.click()
    assert download.value.path().read_text() == "short"
    links.first.click()  # JupyterLab opens it as a document
    expect(lab.page.locator(".jp-FileEditor .cm-content")).to_have_text("short")
    lab.page.evaluate("window.jupyterapp.shell.currentWidget.dispose()")
