"""What a hostile kernel shows, in a real front end: no script of it runs (setting `outputs`).

The same notebook runs on a kernel that filters nothing, where each attack that is said to be proven
must set its mark; so each can fail.  What people show every day is there all the same.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from attacks import ATTACKS, HOST, PRELUDE, PROVEN
from lab import Lab, Notebook
from playwright.sync_api import Locator, Route, expect
from playwright.sync_api import TimeoutError as NotInTime

pytestmark = [pytest.mark.browser, pytest.mark.vm, pytest.mark.timeout(600)]

SECRET = "Rumpelstilzchen"
SETTLED = 2000
"""Milliseconds that a page with nothing to do is given for what its outputs may have begun."""
# Presses what a person might: links, buttons, the boxes of widgets' errors, vega's menu.
PRESS = """() => {
    const outputs = [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output')];
    const targets = new Set(outputs.flatMap(output => [...output.querySelectorAll(
        'a, area, button, b, input, mtext, svg text, [onclick], [data-commandlinker-command], '
        + '.jupyter-widgets-error-widget')]));
    for (const target of targets) {
        target.focus?.();
        target.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}));
    }
    return targets.size;
}"""
# Cells that are out of sight are not drawn.
DRAW_ALL = """() => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.notebookConfig = {...notebook.notebookConfig, windowingMode: 'none'};
}"""
# But for widgets: of a model that the page has no more, each is waited for, one after the other.
DRAWN = """() => window.jupyterapp.shell.currentWidget.content.widgets.every(
    cell => !cell.model.outputs?.length || cell.node.querySelector('.jp-OutputArea-output')
    || /^# (widget|base)-|^some_name/.test(cell.model.sharedModel.source))"""


class Marks:
    """The marks that were set on the pages of a browser's context."""

    def __init__(self, lab: Lab) -> None:
        self._set: set[str] = set()
        self._page = lab.page
        context = lab.page.context
        context.expose_binding("__mark", lambda _source, name: self._set.add(name))
        context.route(f"{HOST}**", self._asked_for)
        context.on("dialog", lambda dialog: dialog.accept())

    def _asked_for(self, route: Route) -> None:
        address = urlsplit(route.request.url)
        name = address.path.split("/")[1]
        if name == "static":  # JupyterLab's own files, whose place has been moved
            name = "base-href"
        if name != "vega-reads-files" or SECRET in address.query:
            self._set.add(name)
        # An answer without content: a page that was to be left stays
        route.fulfill(status=204)

    def take(self) -> set[str]:
        """The marks, which are none afterwards, when the page has done what it had begun."""
        self._page.wait_for_timeout(SETTLED)
        taken, self._set = self._set, set()
        return taken


def write_notebook(path: Path, kernel: str) -> None:
    sources = [PRELUDE, *(attack.source for attack in ATTACKS), "some_name = 1", "some_name"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    spec = {"kernelspec": {"name": kernel, "display_name": kernel}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)


def run_all(lab: Lab, notebook: Notebook) -> None:
    """Run the cells, answering the one that asks."""
    lab.page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    notebook.panel.locator(".jp-Stdin-input").press("Enter")
    notebook.cell(len(ATTACKS) + 2).finish()
    notebook.wait_idle()


def ask_for_help(lab: Lab, notebook: Notebook) -> None:
    """Shift+Tab for an inspection, Tab for completions."""
    cell = notebook.cell(len(ATTACKS) + 2)
    cell.editor.click()
    lab.page.keyboard.press("Control+End")
    lab.page.keyboard.press("Shift+Tab")
    expect(lab.page.locator(".jp-Tooltip")).to_contain_text("doc")
    lab.page.keyboard.press("Escape")
    items = lab.page.locator(".jp-Completer-item")
    for _ in range(5):  # JupyterLab waits a second for a kernel's answer, and shows nothing then
        cell.editor.click()
        lab.page.keyboard.press("Control+End")
        lab.page.keyboard.press("Tab")
        with suppress(AssertionError):
            expect(items.first).to_be_visible(timeout=5000)
            break
    assert items.count()
    lab.page.keyboard.press("Escape")


def press_all(lab: Lab) -> None:
    lab.page.evaluate(DRAW_ALL)
    with suppress(NotInTime):  # widgets without a model hold the drawing up: what is there then
        lab.page.wait_for_function(DRAWN, timeout=20_000)
    lab.page.evaluate(PRESS)
    lab.page.evaluate(PRESS)  # what the first has brought to light: an error's text


def attack(lab: Lab, marks: Marks, kernel: str) -> tuple[set[str], set[str], str]:
    """Run, press, ask; then save and open anew.  Returns the marks of both, and the file."""
    path = lab.server.root / f"outputs-{kernel}.ipynb"
    (lab.server.root / "secret.csv").write_text(f"word\n{SECRET}\n")
    write_notebook(path, kernel)
    lab.load(path.name)
    notebook = lab.current()
    notebook.wait_idle()
    run_all(lab, notebook)
    press_all(lab)
    ask_for_help(lab, notebook)
    first = marks.take()
    lab.calm_down()
    lab.command("docmanager:save")
    lab.load(path.name)
    notebook = lab.current()
    notebook.wait_idle()
    press_all(lab)
    again = marks.take()
    lab.command("notebook:shutdown-kernel")
    lab.load()
    return first, again, path.read_text()


def tried(book: str) -> list[str]:
    """The cells that came to their end, by their attack's name."""
    cells = nbformat.reads(book, as_version=4).cells[1:-2]
    return [
        attack.name
        for attack, cell in zip(ATTACKS, cells, strict=True)
        if any("tried" in output.get("text", "") for output in cell.outputs)
    ]


@pytest.fixture(scope="module")
def marks(lab: Lab) -> Marks:
    return Marks(lab)


@pytest.fixture(scope="module")
def trusted_kernel(kernel_name: str, request: pytest.FixtureRequest) -> str:
    """A kernelspec that filters nothing."""
    if os.environ.get("KERNEL_UNDER_TEST") == "plain":
        return kernel_name
    from vmkernel.cli.install import install_kernelspec

    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    options = {"recipe": "datascience", "memory": "1G", "outputs": "trusted"}
    install_kernelspec(kernels, name="trusted", options=options)
    return "trusted"


def test_safe_nothing_runs(lab: Lab, marks: Marks, kernel_name: str):
    """Neither at once, nor when everything is pressed, nor from the notebook that was saved."""
    if os.environ.get("KERNEL_UNDER_TEST") == "plain":
        pytest.skip("plain ipykernel has no such policy")
    first, again, book = attack(lab, marks, kernel_name)
    assert tried(book) == [attack.name for attack in ATTACKS]
    assert (first, again) == (set(), set())
    assert "VMKERNEL_OUTPUTS=trusted" in book


def test_trusted_each_proven_attack_runs(lab: Lab, marks: Marks, trusted_kernel: str):
    """The same notebook: so each of them would have been seen."""
    first, again, book = attack(lab, marks, trusted_kernel)
    assert sorted(PROVEN - first - again) == []
    assert "not shown" not in book


def in_cell(notebook: Notebook, source: str) -> Locator:
    return notebook.run(source).box


def test_safe_tables_pictures_and_texts_are_shown(notebook: Notebook):
    box = in_cell(
        notebook,
        "import pandas as pd\npd.DataFrame({'n': [1, 2]}).style.highlight_max(color='red')",
    )
    marked = box.locator("td", has_text="2")
    expect(marked).to_have_css("background-color", "rgb(255, 0, 0)")

    box = in_cell(
        notebook,
        "%config InlineBackend.figure_formats = ['png', 'svg']\n"
        "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2]); plt.title('Ä < B');",
    )
    picture = box.locator(".jp-RenderedSVG img, .jp-RenderedImage img")
    assert picture.first.evaluate("i => i.decode().then(() => i.naturalWidth)") > 100

    box = in_cell(notebook, "from IPython.display import *\nLatex(r'$\\frac{1}{x^2}$')")
    expect(box.locator("mjx-container mjx-mfrac")).to_have_count(1)

    box = in_cell(notebook, f"Markdown({_TEXT!r})")
    expect(box.locator("h1")).to_contain_text("Head")
    expect(box.locator("li code")).to_have_text("a < b")
    expect(box.locator("td a")).to_have_attribute("href", "https://example.org")
    expect(box.locator("mjx-container")).to_have_count(1)

    box = in_cell(notebook, "Audio([0.0, 0.5] * 400, rate=8000)")
    assert box.locator("audio").evaluate(
        "a => new Promise(ok => { a.preload = 'auto'; a.onloadeddata = () => ok(a.duration);"
        " a.load(); })"
    ) == pytest.approx(0.1)
    box = in_cell(notebook, "Video(data=b'xxxx', embed=True, mimetype='video/mp4')")
    expect(box.locator("video")).to_have_count(1)


def test_safe_widgets_and_charts_are_shown(notebook: Notebook):
    box = in_cell(
        notebook,
        "import ipywidgets as w\nslider = w.IntSlider(3)\nout = w.Output()\n"
        "with out:\n    display(Markdown('**inside**'))\n"
        "w.Tab([slider, w.HTML('<b>bold</b>'), out], titles=['a', 'b', 'c'])",
    )
    tabs = box.locator(".lm-TabBar-tab")
    expect(tabs).to_have_text(["a", "b", "c"])
    expect(box.locator(".widget-readout")).to_have_text("3")
    tabs.nth(1).click()
    expect(box.locator(".widget-html b")).to_have_text("bold")
    tabs.nth(2).click()
    expect(box.locator(".widget-output strong")).to_have_text("inside")

    box = in_cell(
        notebook, "a, b = w.IntSlider(1), w.IntProgress(0)\nlink = w.jslink((a, 'value'), "
        "(b, 'value'))\na.value = 40\nw.HBox([a, b])",
    )  # fmt: skip
    expect(box.locator(".progress-bar")).to_have_attribute("style", re.compile("width: 40%"))

    box = in_cell(notebook, _CHART)
    expect(box.locator(".vega-embed canvas, .vega-embed svg").first).to_be_visible()


_TEXT = """\
# Head

* `a < b`

| c | d |
|---|---|
| 1 | [web](https://example.org) |

$x^2$
"""
_CHART = """display({'application/vnd.vegalite.v5+json': {
    '$schema': 'https://vega.github.io/schema/vega-lite/v5.json',
    'data': {'values': [{'x': 1, 'y': 2}, {'x': 2, 'y': 1}]}, 'mark': 'bar',
    'encoding': {'x': {'field': 'x', 'type': 'ordinal'},
                 'y': {'field': 'y', 'type': 'quantitative'}}}}, raw=True)"""
