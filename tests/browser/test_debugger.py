"""JupyterLab's debugger: a breakpoint set by a click, variables, steps, and on."""

from __future__ import annotations

import pytest
from lab import Lab, Notebook
from playwright.sync_api import Locator, expect

pytestmark = [pytest.mark.browser, pytest.mark.vm, pytest.mark.timeout(400)]

SOURCE = """\
def area(width, height):
    product = width * height
    product += 1
    return product

print(area(6, 7))"""


class Debugger:
    """JupyterLab's sidebar for it."""

    def __init__(self, lab: Lab, notebook: Notebook) -> None:
        self.page = lab.page
        self.button = notebook.toolbar.locator(".jp-DebuggerBugButton")
        self.sidebar = lab.page.locator(".jp-DebuggerSidebar")
        self.variables = self.sidebar.locator(".jp-DebuggerVariables-body:not(.lm-mod-hidden)")
        self.frames = self.sidebar.locator(".jp-DebuggerCallstackFrame")
        self.here = lab.page.locator(".jp-NotebookPanel .jp-DebuggerEditor-highlight")

    def do(self, command: str) -> None:
        """Press one of the call stack's buttons."""
        self.sidebar.locator(f"[data-command='debugger:{command}']").click()

    def variable(self, name: str) -> Locator:
        """A variable's value as shown."""
        item = self.variables.locator("jp-tree-item").filter(
            has=self.page.locator(".jp-DebuggerVariables-name", has_text=name)
        )
        return item.locator(".jp-DebuggerVariables-detail")


@pytest.fixture(scope="module")
def debugger(lab: Lab, notebook: Notebook) -> Debugger:
    """The debugger, switched on."""
    debugger = Debugger(lab, notebook)
    expect(debugger.button).to_have_attribute("aria-disabled", "false")
    debugger.button.click()
    expect(debugger.button).to_have_attribute("aria-pressed", "true")
    expect(debugger.sidebar).to_be_visible()
    return debugger


def test_stops_at_a_breakpoint_shows_variables_steps_and_goes_on(
    debugger: Debugger, notebook: Notebook
):
    cell = notebook.add(SOURCE)
    gutter = cell.box.locator(".cm-breakpoint-gutter .cm-gutterElement")
    gutter.nth(3).click()  # the first is CodeMirror's own measure, so the third line
    expect(gutter.nth(3).locator(".cm-breakpoint-icon")).to_be_visible()
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
