"""ipywidgets in JupyterLab: every core widget from Python to the browser and back.

One notebook shows all of them, in a dictionary ``w`` of Python's. A test sets one in Python, looks
at it in the page, uses it there with mouse or keyboard, and asks Python what it has become.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from lab import Lab, Notebook
from playwright.sync_api import Locator, expect

pytestmark = [pytest.mark.browser, pytest.mark.vm, pytest.mark.timeout(400)]

Show = Callable[[Locator], None]
Use = Callable[[Locator], None]


class Widget(NamedTuple):
    """A widget, how it is set in Python, and how in the browser."""

    name: str
    make: str
    """The arguments of its constructor."""
    assign: str
    """A value that Python gives it; or, with a semicolon, a statement about ``it``."""
    shown: Show
    """Asserts that the page shows this."""
    use: Use | None = None
    """What a person does with it; nothing where there is nothing to do."""
    read: Any = None
    """What Python reads then, by way of JSON."""
    look: str = "it.value"
    """What Python reads."""


# Looking at one in the page. *inside*: where in the widget; nowhere means its own element.


def part(box: Locator, inside: str) -> Locator:
    return box.locator(inside).last if inside else box


def text(expected: str, inside: str = "") -> Show:
    return lambda box: expect(part(box, inside)).to_contain_text(expected)


def value(expected: str, inside: str = "input") -> Show:
    return lambda box: expect(part(box, inside)).to_have_value(expected)


def attribute(name: str, expected: str, inside: str = "") -> Show:
    return lambda box: expect(part(box, inside)).to_have_attribute(name, re.compile(expected))


def count(inside: str, expected: int) -> Show:
    return lambda box: expect(box.locator(inside)).to_have_count(expected)


def checked(inside: str = "input") -> Show:
    return lambda box: expect(part(box, inside)).to_be_checked()


def active(inside: str = "") -> Show:
    return lambda box: expect(part(box, inside)).to_have_class(re.compile(r"\bmod-active\b"))


def chosen(*expected: str) -> Show:
    return lambda box: expect(box.locator("select")).to_have_values(list(expected))


def controls() -> Show:
    return lambda box: expect(box).to_have_js_property("controls", True)


def colors(*expected: str) -> Show:
    def shown(box: Locator) -> None:
        for index, color in enumerate(expected):
            tag = box.locator(".jupyter-widget-colortag").nth(index)
            expect(tag).to_have_css("background-color", color)

    return shown


def tags(*expected: str) -> Show:
    return lambda box: expect(box.locator("div.jupyter-widget-tag")).to_have_text(list(expected))


# Using one.


def press(key: str, inside: str, times: int = 1) -> Use:
    def use(box: Locator) -> None:
        for _ in range(times):
            part(box, inside).press(key)

    return use


def fill(words: str, inside: str = "input") -> Use:
    def use(box: Locator) -> None:
        part(box, inside).fill(words)
        part(box, inside).press("Tab")

    return use


def click(inside: str = "") -> Use:
    return lambda box: part(box, inside).click()


def select(*labels: str) -> Use:
    def use(box: Locator) -> None:
        box.locator("select").select_option(label=list(labels))

    return use


def upload(name: str, content: bytes) -> Use:
    def use(box: Locator) -> None:
        with box.page.expect_file_chooser() as chooser:
            box.click()
        chooser.value.set_files({"name": name, "mimeType": "text/plain", "buffer": content})

    return use


def add_tag(words: str) -> Use:
    def use(box: Locator) -> None:
        box.click()  # the field for a new one comes out of hiding
        box.locator("input").fill(words)
        box.locator("input").press("Enter")

    return use


HANDLE = ".noUi-handle"
LOW, HIGH = ".noUi-handle-lower", ".noUi-handle-upper"
PNG = (
    "__import__('base64').b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNg"
    "YGD4DwABBAEAX+XDSwAAAABJRU5ErkJggg==')"
)

TWO = "children=[widgets.Label('in a'), widgets.Label('in b')]"

WIDGETS = [
    Widget("IntSlider", "value=3, max=10", "7", text("7", ".widget-readout"),
           press("ArrowRight", HANDLE, 2), 9),
    Widget("FloatSlider", "value=1.0, max=2, step=0.5", "1.5", text("1.50", ".widget-readout"),
           press("ArrowLeft", HANDLE), 1.0),
    Widget("FloatLogSlider", "value=10, base=10, min=0, max=4, step=1", "1000",
           text("1.00e+3", ".widget-readout"), press("ArrowRight", HANDLE), 10000.0),
    Widget("IntRangeSlider", "value=(2, 5), max=10", "(3, 8)", text("3 – 8", ".widget-readout"),
           press("ArrowLeft", HIGH), [3, 7]),
    Widget("FloatRangeSlider", "value=(0.0, 1.0), max=4, step=0.5", "(1.0, 3.0)",
           text("1.00 – 3.00", ".widget-readout"), press("ArrowRight", LOW), [1.5, 3.0]),
    Widget("SelectionSlider", "options=['a', 'b', 'c']", "'b'", text("b", ".widget-readout"),
           press("ArrowRight", HANDLE), "c"),
    Widget("SelectionRangeSlider", "options=['a', 'b', 'c', 'd'], index=(0, 1)", "('b', 'c')",
           text("b-c", ".widget-readout"), press("ArrowRight", HIGH), ["b", "d"]),
    Widget("IntProgress", "value=1, max=4", "3", attribute("style", "width: 75%", ".progress-bar")),
    Widget("FloatProgress", "value=0.1, max=1.0", "0.25",
           attribute("style", "width: 25%", ".progress-bar")),
    Widget("IntText", "value=1", "-12", value("-12"), fill("34"), 34),
    Widget("FloatText", "value=1.0", "2.25", value("2.25"), fill("-0.5"), -0.5),
    Widget("BoundedIntText", "value=1, max=9", "5", value("5"), fill("12"), 9),
    Widget("BoundedFloatText", "value=1.0, max=9.5", "5.5", value("5.5"), fill("7.25"), 7.25),
    Widget("ToggleButton", "description='press'", "True", active(), click(), False),
    Widget("Checkbox", "description='tick'", "True", checked(), click("input"), False),
    Widget("Valid", "value=False", "True", count(".fa-check", 1)),
    Widget("Dropdown", "options=['tea', 'milk', 'rum']", "'milk'", value("milk", "select"),
           select("rum"), "rum"),
    Widget("RadioButtons", "options=['tea', 'milk', 'rum']", "'milk'",
           checked("label:has-text('milk') input"), click("label:has-text('rum') input"), "rum"),
    Widget("Select", "options=['tea', 'milk', 'rum']", "'milk'", value("milk", "select"),
           select("rum"), "rum"),
    Widget("ToggleButtons", "options=['tea', 'milk', 'rum']", "'milk'",
           active("button:has-text('milk')"),
           click("button:has-text('rum')"), "rum"),
    Widget("SelectMultiple", "options=['tea', 'milk', 'rum']", "('milk',)", chosen("milk"),
           select("tea", "rum"), ["tea", "rum"]),
    Widget("Text", "value='a'", "'Grüße'", value("Grüße"), fill("naïve 😀"), "naïve 😀"),
    Widget("Textarea", "value='a'", "'one\\ntwo'", value("one\ntwo", "textarea"),
           fill("three\nfour", "textarea"), "three\nfour"),
    Widget("Password", "value='a'", "'secret'", value("secret"), fill("geheim"), "geheim"),
    Widget("Combobox", "options=['Paul', 'John']", "'John'", value("John"), fill("Ringo"), "Ringo"),
    Widget("Label", "value='a'", "'a label'", text("a label")),
    Widget("HTML", "value='a'", "'<b>bold</b>'", text("bold", "b")),
    Widget("HTMLMath", "value='a'", "'$x^2$'", count("mjx-container", 1)),
    Widget("Image", f"value={PNG}, width=30", "it.width = '55';", attribute("width", "^55$")),
    Widget("Audio", "value=b'x', controls=False", "it.controls = True;", controls()),
    Widget("Video", "value=b'x', controls=False", "it.controls = True;", controls()),
    Widget("Button", "description='push'", "it.description = 'pushed';", text("pushed"),
           click(), 1, "len(clicks)"),
    Widget("Play", "max=9999, interval=100", "it.playing = True;", count(".fa-pause", 1),
           click("button:has(.fa-pause)"), False, "it.playing"),
    Widget("DatePicker", "", "date(2024, 2, 29)", value("2024-02-29"), fill("2025-12-31"),
           "2025-12-31"),
    Widget("TimePicker", "", "time(12, 30)", value("12:30"), fill("07:15"), "07:15:00"),
    Widget("DatetimePicker", "", "datetime(2024, 2, 29, 12, 30, tzinfo=timezone.utc)",
           value("2024-02-29T12:30"), fill("2025-12-31T23:45"), "2025-12-31 23:45:00+00:00"),
    Widget("NaiveDatetimePicker", "", "datetime(2024, 2, 29, 12, 30)", value("2024-02-29T12:30"),
           fill("2025-12-31T23:45"), "2025-12-31 23:45:00"),
    Widget("ColorPicker", "value='#ff0000'", "'#00ff00'", value("#00ff00", "input[type='color']"),
           fill("#0000ff", "input[type='text']"), "#0000ff"),
    Widget("TagsInput", "value=['a']", "['a', 'b']", tags("a", "b"), add_tag("c"), ["a", "b", "c"]),
    Widget("ColorsInput", "value=['red']", "['red', 'blue']",
           colors("rgb(255, 0, 0)", "rgb(0, 0, 255)"), add_tag("green"),
           ["red", "blue", "green"]),
    Widget("IntsInput", "value=[1]", "[1, 2]", tags("1", "2"), add_tag("3"), [1, 2, 3]),
    Widget("FloatsInput", "value=[1.5]", "[1.5, 2.5]", tags("1.5", "2.5"), add_tag("3"),
           [1.5, 2.5, 3.0]),
    Widget("FileUpload", "", "it.description = 'send';", text("send"),
           upload("note.txt", b"Zo\xc3\xab"), ["note.txt", "Zoë"],
           "[it.value[0].name, bytes(it.value[0].content).decode()]"),
    Widget("Accordion", f"{TWO}, titles=('A', 'B')",
           "it.selected_index = 1;", text("in b"), click(".lm-Widget:has-text('A') >> nth=0"), 0,
           "it.selected_index"),
    Widget("Tab", f"{TWO}, titles=('A', 'B')",
           "it.selected_index = 1;", text("in b"), click(".lm-TabBar-tab:has-text('A')"), 0,
           "it.selected_index"),
    Widget("Stack", f"{TWO}, selected_index=0",
           "it.selected_index = 1;", text("in b")),
    Widget("Box", "", "it.children = [widgets.Label('in it')];", text("in it")),
    Widget("HBox", "", "it.children = [widgets.Label('in it')];", text("in it")),
    Widget("VBox", "", "it.children = [widgets.Label('in it')];", text("in it")),
    Widget("GridBox", "", "it.children = [widgets.Label('in it')];", text("in it")),
    Widget("Output", "", "it.append_stdout('captured');", text("captured")),
]  # fmt: skip
# Controller needs a gamepad; the others are arrangements of widgets that are here.
OTHERS = {
    "Controller", "AppLayout", "GridspecLayout", "TwoByTwoLayout", "interactive",
}  # fmt: skip
BY_NAME = {widget.name: widget for widget in WIDGETS}


class Gallery:
    """The notebook's widgets."""

    def __init__(self, notebook: Notebook) -> None:
        made = "".join(f"w['{it.name}'] = widgets.{it.name}({it.make})\n" for it in WIDGETS)
        notebook.run(
            "import json\nfrom datetime import date, datetime, time, timezone\n"
            "import ipywidgets as widgets\nw, clicks = {}, []\n"
            f"{made}"
            "w['Button'].on_click(clicks.append)\n"
            "for name, it in w.items():\n"
            "    it.add_class(f'test-{name}')"
        )
        self.cell = notebook.run("widgets.VBox([*w.values()])")

    def box(self, name: str) -> Locator:
        """A widget in the page."""
        return self.cell.box.locator(f".test-{name}")


@pytest.fixture(scope="module")
def gallery(module_notebook: Notebook) -> Gallery:
    return Gallery(module_notebook)


@pytest.mark.parametrize("name", [widget.name for widget in WIDGETS])
def test_widget_goes_to_the_browser_and_back(gallery: Gallery, notebook: Notebook, name: str):
    widget = BY_NAME[name]
    change = widget.assign if widget.assign.endswith(";") else f"it.value = {widget.assign}"
    notebook.run(f"it = w[{name!r}]; {change}")
    widget.shown(gallery.box(name))
    if widget.use:
        widget.use(gallery.box(name))
        notebook.wait_result(
            f"print(json.dumps({widget.look}, default=str))", json.dumps(widget.read)
        )


def test_no_core_widget_is_forgotten(notebook: Notebook):
    found = notebook.run(
        "import ipywidgets, json\n"
        "found = [name for name, it in vars(ipywidgets).items() if isinstance(it, type)\n"
        "         and issubclass(it, ipywidgets.DOMWidget)\n"
        "         and it.class_traits()['_view_name'].default_value]\n"
        "print(json.dumps(found))"
    )
    assert {*json.loads(found.text)} - OTHERS == {*BY_NAME}


def test_interact_slider_moves_the_plot(notebook: Notebook):
    cell = notebook.run(
        "import matplotlib.pyplot as plt\nfrom ipywidgets import IntSlider, interact\n"
        "@interact(n=IntSlider(1, 1, 9))\n"
        "def draw(n):\n"
        "    plt.figure(figsize=(3, 2)); plt.bar(range(n), range(1, n + 1)); plt.show()\n"
        "    print(f'{n} bars')"
    )
    picture = cell.box.locator("img[src^='data:image/png']")
    expect(picture).to_have_count(1)
    before = picture.get_attribute("src")
    cell.box.locator(HANDLE).press("ArrowRight")
    expect(cell.box.locator(".jp-OutputArea").last).to_contain_text("2 bars")
    expect(picture).to_have_count(1)
    assert picture.get_attribute("src") != before


def test_button_calls_python_while_no_cell_runs(notebook: Notebook):
    cell = notebook.run(
        "import ipywidgets\n"
        "button, out = ipywidgets.Button(description='count'), ipywidgets.Output()\n"
        "def count(_, seen=[]):\n"
        "    seen.append(1)\n"
        "    with out: print('clicked', len(seen))\n"
        "button.on_click(count)\n"
        "ipywidgets.VBox([button, out])"
    )
    button = cell.box.get_by_role("button", name="count")
    button.click()
    expect(cell.box.locator(".jupyter-widget-output, .widget-output")).to_contain_text("clicked 1")
    button.click()
    expect(cell.box.locator(".jupyter-widget-output, .widget-output")).to_contain_text("clicked 2")


def test_progress_bar_moves_while_the_cell_runs(notebook: Notebook):
    cell = notebook.start(
        "from ipywidgets import IntProgress\nbar = IntProgress(max=10)\ndisplay(bar)\n"
        "for step in range(11):\n"
        "    bar.value = step\n"
        "    if step == 4: input('half way?')"
    )
    bar = cell.box.locator(".progress-bar")
    expect(bar).to_have_attribute("style", re.compile("width: 40%"))
    cell.box.locator(".jp-Stdin-input").press("Enter")
    cell.finish()
    expect(bar).to_have_attribute("style", re.compile("width: 100%"))


def test_thread_updates_a_widget_after_the_cells_end(notebook: Notebook):
    cell = notebook.run(
        "import threading\nfrom ipywidgets import Label\n"
        "label, go_on = Label('waiting'), threading.Event()\n"
        "def work():\n    go_on.wait()\n    label.value = 'from a thread'\n"
        "threading.Thread(target=work, daemon=True).start()\nlabel"
    )
    expect(cell.box.locator(".widget-label")).to_have_text("waiting")
    notebook.run("go_on.set()")
    expect(cell.box.locator(".widget-label")).to_have_text("from a thread")


def test_a_notebook_opened_anew_finds_its_widgets_in_the_kernel(lab: Lab, notebook: Notebook):
    notebook.run("from ipywidgets import IntSlider\nkept = IntSlider(3, 0, 9)\nkept")
    index = notebook.last_cell().index - 1
    # Not saved: where the slider stands is known to the kernel alone.
    lab.command("docmanager:save")
    notebook.run("kept.value = 7")
    lab.close_and_open_again()
    cell = notebook.cell(index)
    expect(cell.box.locator(".widget-readout")).to_have_text("7")
    cell.box.locator(HANDLE).press("ArrowRight")
    notebook.wait_result("print(kept.value)", "8")
