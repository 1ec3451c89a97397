"""Notebook 7, which the same server serves: a cell, its plot, a widget, an interrupt."""

from __future__ import annotations

import nbformat
import pytest
from lab import PATIENCE, Notebook
from lab_server import LabServer
from playwright.sync_api import Browser, expect

pytestmark = [pytest.mark.browser, pytest.mark.vm, pytest.mark.timeout(400)]


@pytest.fixture
def notebook(browser: Browser, server: LabServer, kernel_name: str) -> Notebook:
    """An empty notebook in Notebook 7."""
    spec = {"kernelspec": {"name": kernel_name, "display_name": kernel_name}}
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()], metadata=spec)
    nbformat.write(book, server.root / "seven.ipynb")
    page = browser.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(f"{server.url}/notebooks/seven.ipynb?token={server.token}")
    notebook = Notebook(page, page.locator(".jp-NotebookPanel"))
    notebook.wait_idle()
    return notebook


def test_notebook_7_runs_cells_widgets_and_interrupts(notebook: Notebook):
    assert notebook.run("6 * 7").text == "42"

    cell = notebook.run(
        "from ipywidgets import interact\n@interact(n=(1, 9))\ndef show(n=3):\n    print(n * '#')"
    )
    shown = cell.box.locator(".jp-OutputArea-output .jp-OutputArea-output").last
    expect(shown).to_have_text("###\n")
    cell.box.locator(".noUi-target").click()  # its middle
    expect(cell.box.locator(".widget-readout")).to_have_text("5")
    expect(shown).to_have_text("#####\n")

    cell = notebook.start("print('looping')\nwhile True:\n    pass")
    expect(cell.outputs.first).to_have_text("looping\n")
    notebook.page.locator("[data-command='notebook:interrupt-kernel']").click()
    cell.finish()
    expect(cell.outputs.last).to_contain_text("KeyboardInterrupt")
