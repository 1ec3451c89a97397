"""JupyterLab's debugger: a breakpoint set by a click, variables, steps, and on."""

from __future__ import annotations

import pytest
from lab import Debugger, Lab, Notebook
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.vm, pytest.mark.timeout(400)]

SOURCE = """\
def area(width, height):
    product = width * height
    product += 1
    return product

print(area(6, 7))"""


@pytest.fixture(scope="module")
def debugger(lab: Lab, module_notebook: Notebook) -> Debugger:
    """The debugger, switched on."""
    debugger = Debugger(lab, module_notebook)
    debugger.switch_on()
    return debugger


def test_stops_at_a_breakpoint_shows_variables_steps_and_goes_on(
    debugger: Debugger, notebook: Notebook
):
    cell = notebook.add(SOURCE)
    debugger.set_breakpoint(cell, line=3)
    cell.run()

    expect(debugger.here).to_have_text("    product += 1")
    expect(debugger.variable("product")).to_have_text("42")
    expect(debugger.variable("width")).to_have_text("6")
    expect(debugger.frames.first).to_contain_text("area")
    expect(cell.prompt).to_have_text("[*]:")

    debugger.do("next")
    expect(debugger.here).to_have_text("    return product")
    expect(debugger.variable("product")).to_have_text("43")

    debugger.do("continue")
    cell.finish()
    assert cell.text == "43"
    expect(debugger.here).to_have_count(0)


def test_globals_are_shown_between_cells(debugger: Debugger, notebook: Notebook):
    notebook.run("answer = 6 * 7\nnames = ['Ada', 'Grace']")
    debugger.sidebar.get_by_label("Scope").select_option("Globals")
    expect(debugger.variable("answer")).to_have_text("42")


def test_off_again_cells_run_through(debugger: Debugger, notebook: Notebook):
    debugger.button.click()
    expect(debugger.button).to_have_attribute("aria-pressed", "false")
    assert notebook.run("area(2, 3)").text == "7"
