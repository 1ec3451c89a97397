"""JupyterLab as a person uses it: a page in Chromium, a notebook in it, cells, outputs.

Playwright waits for what a step needs (a button that can be clicked, a text that appears), so
nothing here sleeps. What is tested is done with mouse and keyboard; only the arrangement around it
(opening a notebook, closing it) goes by JupyterLab's own commands.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import nbformat
from lab_server import LabServer
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

PATIENCE = 60.0
"""Seconds for anything that is bound to happen, on a loaded machine without KVM."""

expect.set_options(timeout=PATIENCE * 1000)


# As script/setup looks for them.
_BROWSERS = ("chromium", "google-chrome", "google-chrome-stable")


def chromium_path() -> str | None:
    """Where Chromium is, if it is."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    """Headless Chromium, ended at the end."""
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; it sees nothing but our own server.
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=False)
        try:
            yield browser
        finally:
            browser.close()


class Cell:
    """A code cell of an open notebook."""

    def __init__(self, notebook: Notebook, index: int) -> None:
        self.page = notebook.page
        self.index = index
        self.box = notebook.panel.locator(".jp-Notebook-cell").nth(index)
        self.editor = self.box.locator(".jp-InputArea-editor .cm-content")
        self.prompt = self.box.locator(".jp-InputArea-prompt")
        self.outputs = self.box.locator(".jp-OutputArea-output")

    def type(self, text: str) -> None:
        """Type at the cursor, key by key."""
        self.editor.click()
        self.page.keyboard.press("Control+End")
        self.page.keyboard.type(text)

    def run(self) -> None:
        """Shift+Enter."""
        self.editor.press("Shift+Enter")

    def finish(self) -> Cell:
        """Wait until the cell has a number, that is, until its reply has come."""
        expect(self.prompt).to_have_text(re.compile(r"\[\d+\]:"))
        return self

    def run_again(self) -> Cell:
        """Control+Enter, which stays on the cell; wait until the new reply has come."""
        before = self.number
        self.editor.press("Control+Enter")
        expect(self.prompt).not_to_have_text(re.compile(rf"\[({before}|\*| )\]:"))
        return self

    @property
    def number(self) -> int:
        """The execution count shown."""
        return int(self.prompt.inner_text().strip("[]: \n"))

    @property
    def text(self) -> str:
        """All output as text."""
        return "\n".join(self.outputs.all_inner_texts()).strip()


class Notebook:
    """A notebook that is open in JupyterLab; its kernel is there."""

    def __init__(self, page: Page, panel: Locator) -> None:
        self.page = page
        self.panel = panel
        self.toolbar = panel.locator(".jp-NotebookPanel-toolbar")

    def wait_idle(self) -> None:
        """Wait until the kernel is there, connected, and has nothing to do."""
        # The indicator in the toolbar shows "idle" also where there is no kernel yet.
        self.page.wait_for_function(
            """() => {
                const widget = window.jupyterapp?.shell?.currentWidget;
                const kernel = widget?.sessionContext?.session?.kernel;
                return kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
            }""",
            timeout=PATIENCE * 1000,
        )

    def last_cell(self) -> Cell:
        """The cell at the end."""
        return self.cell(self.panel.locator(".jp-Notebook-cell").count() - 1)

    def cell(self, index: int) -> Cell:
        """The cell at a place."""
        return Cell(self, index)

    def add(self, source: str = "") -> Cell:
        """The cell at the end, with this source and nothing else in it."""
        cell = self.last_cell()
        cell.editor.click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.press("Delete")
        self.page.keyboard.insert_text(source)
        return cell

    def start(self, source: str) -> Cell:
        """Run a new cell at the end with Shift+Enter, which makes the next one."""
        cell = self.add(source)
        cell.run()
        return cell

    def run(self, source: str) -> Cell:
        """Run a new cell and wait until its kernel is done with it."""
        return self.start(source).finish()

    def wait_result(self, source: str, expected: str) -> None:
        """Run a cell, again and again until its text is this.

        For what the page sends in its own time: widgets hold a change back until the kernel is
        done with the one before.
        """
        cell = self.run(source)
        for _ in range(20):
            if cell.text == expected:
                return
            cell.run_again()
        assert cell.text == expected


class Lab:
    """JupyterLab in a page of its own."""

    def __init__(self, page: Page, server: LabServer) -> None:
        self.page = page
        self.server = server
        self.errors: list[str] = []
        page.on("console", self._note)
        page.set_default_timeout(PATIENCE * 1000)
        self.load()

    def load(self, path: str = "") -> None:
        """Load the page anew, with the launcher in front, or a notebook."""
        place = f"lab/tree/{path}" if path else "lab"
        self.page.goto(f"{self.server.url}/{place}?token={self.server.token}&reset")
        expect(self.page.locator("#jupyterlab-splash")).to_have_count(0)
        in_front = ".jp-NotebookPanel" if path else ".jp-Launcher-body"
        expect(self.page.locator(in_front).first).to_be_visible()

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def command(self, name: str, **arguments: Any) -> None:
        """One of JupyterLab's own commands, until its end."""
        self.page.evaluate(
            """([name, arguments, patience]) => Promise.race([
                window.jupyterapp.commands.execute(name, arguments).then(() => null),
                new Promise((_, fail) => setTimeout(
                    () => fail(new Error(`not within ${patience} s: ${name}`)), patience * 1000)),
            ])""",
            [name, arguments, PATIENCE],
        )

    def launcher_card(self, kernel: str, display_name: str) -> Locator:
        """The card that starts a notebook on this kernel; a launcher must be open.

        Other tests have kernels of the same display name.
        """
        section = self.page.locator(".jp-Launcher-section").filter(
            has=self.page.get_by_role("heading", name="Notebook", exact=True)
        )
        picture = self.page.locator(f'img[src*="/kernelspecs/{kernel}/"]')
        cards = section.locator(".jp-LauncherCard").filter(has=picture)
        return cards.filter(has_text=display_name)

    def current(self) -> Notebook:
        """The notebook in front."""
        panel = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        expect(panel).to_have_count(1)
        return Notebook(self.page, panel)

    def open_notebook(self, name: str, kernel: str, *sources: str) -> Notebook:
        """A new notebook with these cells, in front, its kernel ready."""
        spec = {"kernelspec": {"name": kernel, "display_name": kernel}}
        cells = [nbformat.v4.new_code_cell(source) for source in (*sources, "")]
        book = nbformat.v4.new_notebook(cells=cells, metadata=spec)
        nbformat.write(book, self.server.root / name)
        self.command("docmanager:open", path=name, factory="Notebook")
        notebook = self.current()
        notebook.wait_idle()
        return notebook

    def close_notebook(self) -> None:
        """End the kernel of what is in front, and close it without asking whether to save it."""
        self.command("notebook:shutdown-kernel")
        self.page.evaluate("window.jupyterapp.shell.currentWidget.dispose()")

    def close_and_open_again(self) -> Notebook:
        """Close what is in front without saving it, and open it anew; its kernel goes on."""
        path = self.page.evaluate(
            """() => {
                const widget = window.jupyterapp.shell.currentWidget;
                const path = widget.context.path;
                widget.dispose();
                return path;
            }"""
        )
        self.command("docmanager:open", path=path, factory="Notebook")
        notebook = self.current()
        notebook.wait_idle()
        return notebook

    def calm_down(self) -> None:
        """Away with dialogs and running cells; nothing to do as a rule."""
        dialog = self.page.locator(".jp-Dialog")
        while dialog.count():
            dialog.first.press("Escape")
        self.page.evaluate(
            """() => {
                const widget = window.jupyterapp.shell.currentWidget;
                const kernel = widget?.sessionContext?.session?.kernel;
                return kernel?.status === 'busy' ? kernel.interrupt() : null;
            }"""
        )

    def dialog(self, button: str) -> None:
        """Answer the dialog that has come up."""
        dialog = self.page.locator(".jp-Dialog")
        dialog.locator("button").filter(has_text=re.compile(f"^{button}$")).click()
        expect(dialog).to_have_count(0)


class Debugger:
    """JupyterLab's debugger: a notebook's button for it, and the sidebar."""

    def __init__(self, lab: Lab, notebook: Notebook) -> None:
        self.page = lab.page
        self.button = notebook.toolbar.locator(".jp-DebuggerBugButton")
        self.sidebar = lab.page.locator(".jp-DebuggerSidebar")
        self.variables = self.sidebar.locator(".jp-DebuggerVariables-body:not(.lm-mod-hidden)")
        self.frames = self.sidebar.locator(".jp-DebuggerCallstackFrame")
        self.here = lab.page.locator(".jp-NotebookPanel .jp-DebuggerEditor-highlight")

    def switch_on(self) -> None:
        """Press the button, as soon as it can be, and wait for the sidebar."""
        expect(self.button).to_have_attribute("aria-disabled", "false")
        self.button.click()
        expect(self.button).to_have_attribute("aria-pressed", "true")
        expect(self.sidebar).to_be_visible()

    def set_breakpoint(self, cell: Cell, line: int) -> None:
        """Click beside the line (counted from 1)."""
        # The first element is CodeMirror's own, for measuring.
        place = cell.box.locator(".cm-breakpoint-gutter .cm-gutterElement").nth(line)
        for _ in range(5):  # a click that comes before the editor's extension is not heard
            place.click()
            with suppress(AssertionError):
                expect(place.locator(".cm-breakpoint-icon")).to_be_visible(timeout=5000)
                return
        raise AssertionError(f"no breakpoint in line {line}")

    def do(self, command: str) -> None:
        """Press one of the call stack's buttons."""
        self.sidebar.locator(f"[data-command='debugger:{command}']").click()

    def variable(self, name: str) -> Locator:
        """A variable's value as shown."""
        item = self.variables.locator("jp-tree-item").filter(
            has=self.page.locator(".jp-DebuggerVariables-name", has_text=name)
        )
        return item.locator(".jp-DebuggerVariables-detail")
