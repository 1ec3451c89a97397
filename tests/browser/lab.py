"""JupyterLab as a person uses it: a page in Chromium, a notebook in it, cells, outputs.

Playwright waits for what a step needs (a button that can be clicked, a text that appears), so
nothing here sleeps. What is tested is done with mouse and keyboard; only the arrangement around it
(opening a notebook, closing it) goes by JupyterLab's own commands.
"""

from __future__ import annotations

import re
from typing import Any

import nbformat
from lab_server import LabServer
from playwright.sync_api import Locator, Page, expect

PATIENCE = 60.0
"""Seconds for anything that is bound to happen, on a loaded machine without KVM."""

expect.set_options(timeout=PATIENCE * 1000)


class Cell:
    """A code cell of an open notebook."""

    def __init__(self, notebook: Notebook, index: int) -> None:
        self.page = notebook.page
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
                const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel;
                return kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
            }""",
            timeout=PATIENCE * 1000,
        )

    def last_cell(self) -> Cell:
        """The cell at the end."""
        return Cell(self, self.panel.locator(".jp-Notebook-cell").count() - 1)

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

    def value(self, expression: str) -> str:
        """What Python says."""
        return self.run(expression).text.splitlines()[-1]


class Lab:
    """JupyterLab in a page of its own."""

    def __init__(self, page: Page, server: LabServer) -> None:
        self.page = page
        self.server = server
        self.errors: list[str] = []
        page.on("console", self._note)
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(f"{server.url}/lab?token={server.token}&reset")
        expect(page.locator("#jupyterlab-splash")).to_have_count(0)
        expect(page.locator(".jp-Launcher-body").first).to_be_visible()

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

    def launcher_card(self, display_name: str) -> Locator:
        """The card that starts a notebook on this kernel; a launcher must be open."""
        section = self.page.locator(".jp-Launcher-section").filter(
            has=self.page.get_by_role("heading", name="Notebook", exact=True)
        )
        return section.locator(".jp-LauncherCard").filter(has_text=display_name)

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

    def dialog(self, button: str) -> None:
        """Answer the dialog that has come up."""
        dialog = self.page.locator(".jp-Dialog")
        dialog.locator("button").filter(has_text=re.compile(f"^{button}$")).click()
        expect(dialog).to_have_count(0)
