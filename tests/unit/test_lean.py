"""The engine's shortcuts: the same cells and the same results as IPython's own long way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ipykernel.ipkernel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from vmkernel.guest.lean import Shortcuts

CELLS = [
    "1+1", "", "\n\n", "x = 1\ny = x", "%time 1", "a = %who_ls", "!ls", "f = !ls", "!!ls", "x?",
    "?x", "x??", "print('100%')", "print('what?')", "# why?", ",f a b", ";f a b", "/f 1", "  /f 1",
    "f(a\n,b)", "x = [1\n, 2]", "a / b", "a; b", "%%bash\nls", ">>> 1", "In [1]: 1", "    indented",
    "if x:\n    !ls", "await f()", "async def f(): pass", "s = 'await'", "(", "'",
    "a = '''\n!x\n'''",
    "exit", "def f():\n    return 5 % 3", "x = a\\\n  ,b", "lambda: 1", "\u2028/x", "é = 'ü'",
]  # fmt: skip


@pytest.fixture(scope="module")
def shells() -> Iterator[tuple[InteractiveShell, InteractiveShell]]:
    """One with shortcuts and one without."""
    config = Config()
    config.HistoryManager.hist_file = ":memory:"
    known = vars(ipykernel.ipkernel)["_accepts_parameters"]
    lean, usual = InteractiveShell(config=config), InteractiveShell(config=config)
    lean.shortcuts = Shortcuts(lean)
    yield lean, usual
    ipykernel.ipkernel._accepts_parameters = known


def way(shell: InteractiveShell, cell: str) -> Any:
    """What a cell becomes, and whether it awaits, as ipykernel and IPython ask for it."""
    if hasattr(shell, "shortcuts"):
        shell.shortcuts.forget()
    answers = []
    for _ in range(2):
        try:
            transformed = shell.transform_cell(cell)
        except Exception as error:
            answers.append(type(error))
            continue
        awaits = shell.should_run_async(cell, transformed_cell=transformed)
        answers.append((transformed, awaits))
    return answers


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_becomes_what_it_always_becomes(shells, cell):
    lean, usual = shells
    assert way(lean, cell) == way(usual, cell)


@given(st.text(alphabet="ab1 =%!?,;/\n\t'\"#()\\:>"))
@settings(max_examples=300, deadline=None)
def test_no_special_character_is_overlooked(cell):
    manager = TransformerManager()
    lines = (cell + "\n").splitlines(keepends=True)
    try:
        usual = manager.do_token_transforms(lines)
    except IndexError:  # IPython's own, on text that is no Python ("=\\\n%\\")
        return
    shortcuts = Shortcuts.__new__(Shortcuts)
    shortcuts._manager = manager
    shortcuts._usual_transformers = list(manager.token_transformers)
    assert shortcuts._do_token_transforms(lines) == usual


def test_a_transformer_of_the_users_is_asked(shells):
    lean, _ = shells
    lean.input_transformers_post.append(lambda lines: [line.replace("ab", "cd") for line in lines])
    try:
        assert way(lean, "ab")[0][0] == "cd\n"
    finally:
        lean.input_transformers_post.clear()


def test_a_second_request_with_the_same_text_is_looked_at_anew(shells):
    lean, _ = shells
    lean.shortcuts.forget()
    assert lean.transform_cell("x y") == "x y\n"  # once, as in a request that fails in between
    lean.input_transformers_post.append(lambda lines: ["changed\n"])
    try:
        lean.shortcuts.forget()
        assert lean.transform_cell("x y") == "changed\n"
    finally:
        lean.input_transformers_post.clear()


@pytest.mark.parametrize("value", [1, True, 1.5, 2j, "text", b"bytes", None, [1], {"a": 1}, object])
def test_a_value_looks_as_always(shells, value):
    lean, usual = shells
    assert lean.display_formatter.format(value) == usual.display_formatter.format(value)
    only = {"include": ["text/html"]}
    assert lean.display_formatter.format(value, **only) == usual.display_formatter.format(
        value, **only
    )


def test_a_formatter_of_the_users_is_asked(shells):
    lean, _ = shells
    html = lean.display_formatter.formatters["text/html"]
    for kind in (int, object):
        html.for_type(kind, lambda value: f"<b>{value}</b>")
        assert lean.display_formatter.format(7)[0]["text/html"] == "<b>7</b>"
        html.pop(kind)
    html.for_type("builtins.int", lambda value: f"<i>{value}</i>")
    assert lean.display_formatter.format(7)[0]["text/html"] == "<i>7</i>"
    html.pop("builtins.int", None)
    html.pop(int, None)
    assert lean.display_formatter.format(7)[0] == {"text/plain": "7"}


def test_a_semicolon_silences(shells):
    for cell in ("1", "1;", "1; # why", "';'", "'a;b'", "f(1); 2", ""):
        answers = [bool(s.displayhook.semicolon_at_end_of_expression(cell)) for s in shells]
        assert answers[0] == answers[1], cell


def test_parameters_are_asked_for_once(shells):
    lean, _ = shells
    ask = ipykernel.ipkernel._accepts_parameters
    names = ["cell_id", "cell_meta"]
    first = ask(lean.run_cell_async, names)
    assert bool(first["cell_id"])
    assert ask(lean.run_cell_async, names) is first
