"""JupyterLab's everyday: launcher, cells, outputs, questions, interrupt, restart, help."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from lab import Lab, Notebook
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.vm, pytest.mark.timeout(400)]

TABS = 10


def test_launcher_card_has_the_logo_and_starts_a_notebook(lab: Lab, kernel_name: str):
    from jupyter_client.kernelspec import KernelSpecManager

    spec = KernelSpecManager().get_kernel_spec(kernel_name)
    card = lab.launcher_card(kernel_name, spec.display_name)
    logo = card.locator("img.jp-Launcher-kernelIcon")
    expect(logo).to_have_attribute("src", re.compile(f"/kernelspecs/{kernel_name}/logo-"))
    # A picture that the browser cannot draw has no size of its own.
    assert logo.evaluate("img => img.decode().then(() => img.naturalWidth)") >= 32

    card.click()
    notebook = lab.current()
    notebook.wait_idle()
    expect(notebook.toolbar.locator(".jp-KernelName")).to_have_text(spec.display_name)
    assert notebook.run("6 * 7").text == "42"
    lab.close_notebook()


def test_run_shows_streams_and_result(notebook: Notebook):
    cell = notebook.run("import sys\nprint('one')\nprint('two', file=sys.stderr)\n'three'")
    assert cell.text.split() == ["one", "two", "'three'"]
    expect(cell.box.locator("[data-mime-type='application/vnd.jupyter.stderr']")).to_have_text(
        "two\n"
    )


def test_output_is_shown_while_the_cell_runs(notebook: Notebook):
    # The question holds the cell, so what is seen meanwhile was shown before its end.
    cell = notebook.start("print('begun')\ninput('go on? ')\nprint('done')")
    expect(cell.outputs.first).to_have_text("begun\n")
    expect(cell.prompt).to_have_text("[*]:")
    cell.box.locator(".jp-Stdin-input").press("Enter")
    cell.finish()
    expect(cell.outputs.last).to_have_text("done\n")


def test_error_is_shown_in_colours(notebook: Notebook):
    cell = notebook.run("def half(n):\n    return n / 0\nhalf(8)")
    error = cell.outputs.last
    expect(error).to_contain_text("ZeroDivisionError: division by zero")
    expect(error.locator(".ansi-red-fg").first).to_have_text(re.compile("^-+$"))
    text = error.inner_text()
    assert "return n / 0" in text
    assert "\x1b" not in text
    assert "[0;" not in text


def test_table_and_picture_are_shown(notebook: Notebook):
    cell = notebook.run(
        "import pandas as pd\n"
        "pd.DataFrame({'n': [1, 2], 'name': ['Ada', 'Grace']}, index=['a', 'b'])"
    )
    table = cell.box.locator(".jp-RenderedHTMLCommon table.dataframe")
    expect(table.locator("th")).to_have_text(["", "n", "name", "a", "b"])
    expect(table.locator("td")).to_have_text(["1", "Ada", "2", "Grace"])

    cell = notebook.run(
        "import matplotlib.pyplot as plt\nplt.plot([1, 4, 2])\nplt.title('Three points');"
    )
    picture = cell.box.locator(".jp-RenderedImage img[src^='data:image/png']")
    assert picture.evaluate("img => img.decode().then(() => img.naturalWidth)") > 200


def test_display_is_updated_from_a_later_cell(notebook: Notebook):
    first = notebook.run("handle = display('before', display_id=True)")
    expect(first.outputs).to_have_text("'before'")
    notebook.run("handle.update('after')")
    expect(first.outputs).to_have_text("'after'")


def test_input_box_gives_its_text_to_the_cell(notebook: Notebook):
    cell = notebook.start("name = input('Who? ')\nprint(f'Hello {name}')")
    expect(cell.box.locator(".jp-Stdin-prompt")).to_have_text("Who? ")
    box = cell.box.locator(".jp-Stdin-input")
    box.fill("Zoë")
    box.press("Enter")
    cell.finish()
    expect(cell.outputs.last).to_have_text("Hello Zoë\n")


def test_password_box_hides_what_is_typed(notebook: Notebook):
    cell = notebook.start("import getpass\nprint(len(getpass.getpass('Secret: ')))")
    box = cell.box.locator(".jp-Stdin-input")
    expect(box).to_have_attribute("type", "password")
    box.fill("s3cret")
    box.press("Enter")
    cell.finish()
    expect(cell.outputs.last).to_have_text("6\n")
    assert "s3cret" not in cell.text


def test_progress_by_carriage_returns_stays_on_one_line(notebook: Notebook):
    cell = notebook.start(
        "import sys\n"
        "for percent in range(0, 101, 10):\n"
        "    print(f'\\r{percent:3d} %|' + '#' * (percent // 10), end='', flush=True)\n"
        "    if percent == 50: input()\n"
    )
    expect(cell.outputs.first).to_have_text(" 50 %|#####")
    cell.box.locator(".jp-Stdin-input").press("Enter")
    cell.finish()
    expect(cell.outputs.last).to_contain_text("100 %|##########")
    assert "90 %" not in cell.text


def test_interrupt_button_stops_a_loop_and_keeps_the_state(notebook: Notebook):
    notebook.run("kept = 'still here'")
    cell = notebook.start("print('looping')\nwhile True:\n    pass")
    expect(cell.outputs.first).to_have_text("looping\n")
    notebook.toolbar.locator("[data-command='notebook:interrupt-kernel']").click()
    cell.finish()
    expect(cell.outputs.last).to_contain_text("KeyboardInterrupt")
    assert notebook.run("kept").text == "'still here'"


def test_tab_offers_completions(notebook: Notebook):
    notebook.run("import collections")
    cell = notebook.add()
    cell.type("collections.")
    popup = notebook.page.locator(".jp-Completer:not(.lm-mod-hidden)")
    names = popup.locator(".jp-Completer-match")
    # JupyterLab waits one second for an answer; the first of all may take longer, and a person
    # presses the key again.
    for _ in range(TABS):
        cell.editor.press("Tab")
        with suppress(AssertionError):
            expect(names.filter(has_text="Counter")).to_be_visible(timeout=3000)
            break
    expect(names.filter(has_text="Counter")).to_be_visible()
    # Typing on narrows it down, Enter takes it.
    cell.page.keyboard.type("Ordered")
    expect(names).to_have_text(["OrderedDict"])
    cell.page.keyboard.press("Enter")
    expect(popup).to_have_count(0)
    expect(cell.editor).to_have_text("collections.OrderedDict")
    cell.run()
    assert cell.finish().text == "collections.OrderedDict"


def test_shift_tab_shows_the_tooltip(notebook: Notebook):
    cell = notebook.add()
    cell.type("print(")
    cell.editor.press("Shift+Tab")
    expect(notebook.page.locator(".jp-Tooltip")).to_contain_text("sep")


def test_kernel_usage_panel_shows_memory_and_cpu(lab: Lab, notebook: Notebook):
    lab.page.get_by_role("tab", name="Kernel Usage").click()
    panel = lab.page.locator(".jp-KernelUsage-view")
    expect(panel).to_contain_text(re.compile(r"Memory: [\d.]+ [MG]B"))
    expect(panel).to_contain_text(re.compile(r"CPU: [\d.]+"))
    expect(panel).to_contain_text(re.compile(r"used on \d+ CPU"))
    # It is the kernel's own figure: the process id is the one that Python knows.
    expect(panel).to_contain_text(f"Process ID: {notebook.run('import os; os.getpid()').text}")
    lab.page.get_by_role("tab", name="Kernel Usage").click()


def test_restart_button_gives_a_fresh_kernel(lab: Lab, notebook: Notebook):
    notebook.run("lost = 1")
    notebook.toolbar.locator("[data-command='notebook:restart-kernel']").click()
    lab.dialog("Restart")
    notebook.wait_idle()
    cell = notebook.run("'lost' in globals()")
    assert cell.text == "False"
    assert cell.number == 1
