"""Tracebacks drawn the short way: the same as IPython's own, to the letter."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import stack_data
from IPython.core.interactiveshell import InteractiveShell
from pygments.formatters.terminal256 import Terminal256Formatter
from traitlets.config import Config

from vmkernel.guest.tracebacks import Tracebacks

CELLS = [
    "1/0",
    "def f(n):\n    x = n\n    return f(n - 1) if n else x / 0\nf(3)",
    "f(2)",
    "import json\njson.loads('{')",
    "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e",
    "try:\n    1/0\nexcept ZeroDivisionError:\n    undefined_name",
    "def deep(n):\n    return deep(n + 1)\ndeep(0)",
    "raise KeyboardInterrupt",
    "raise ExceptionGroup('several', [ValueError(1), TypeError(2)])",
    "x = (",
    "if True:\nprint(1)",
    "exec('1/0')",
    "class E(Exception):\n    def _render_traceback_(self):\n        return ['mine']\nraise E",
    "import collections\ncollections.OrderedDict(1)",
    "%no_such_magic",
    "f(2)",
]


class Recorder:
    """A shell that notes the tracebacks it would show."""

    def __init__(self) -> None:
        config = Config()
        config.HistoryManager.hist_file = ":memory:"
        config.InteractiveShell.colors = "linux"
        self.shell = InteractiveShell(config=config)
        self.shell.user_module.__dict__["__name__"] = "__main__"
        self.shown: list[Any] = []

    def run(self, cells: list[str]) -> list[Any]:
        """Everything shown and stored for these cells."""
        results = []
        for cell in cells:
            self.shown.clear()
            self.shell.run_cell(cell, store_history=True)
            stored = dict(self.shell.history_manager.exceptions)
            self.shell.history_manager.exceptions.clear()
            results.append((cell, list(self.shown), stored))
        return results


@pytest.fixture(scope="module")
def ways() -> Any:
    """All cells the long way, then the short way, in one process."""
    usual, short = Recorder(), Recorder()
    setup, style = Terminal256Formatter._setup_styles, stack_data.style_with_executing_node
    known = dict(inspect.modulesbyfile)
    usual.shell._showtraceback = lambda etype, evalue, stb: usual.shown.append(stb)
    expected = usual.run(CELLS)

    class Shell(InteractiveShell):
        def _showtraceback(self, etype: Any, evalue: Any, stb: Any) -> None:
            short.shown.append(stb)

    short.shell.__class__ = Shell
    tracebacks = Tracebacks(short.shell)
    yield expected, short.run(CELLS), short, tracebacks
    Terminal256Formatter._setup_styles = setup
    stack_data.style_with_executing_node = style
    inspect.modulesbyfile.clear()
    inspect.modulesbyfile.update(known)


@pytest.mark.parametrize("number", range(len(CELLS)))
def test_a_traceback_is_drawn_as_always(ways, number):
    expected, drawn, _, _ = ways
    assert drawn[number] == expected[number]


def test_most_cells_showed_one(ways):
    expected = ways[0]
    assert sum(bool(shown) for _, shown, _ in expected) >= len(CELLS) - 3


def test_no_exception_is_held_after_its_request(ways):
    _, _, short, tracebacks = ways
    short.shell.run_cell("1/0")
    tracebacks.forget()
    assert tracebacks._shown is None


def test_a_file_that_exists_is_left_to_inspect(ways, tmp_path):
    _, _, short, _ = ways
    path = tmp_path / "module.py"
    path.write_text("x = 1\n")
    short.shell.compile.get_code_name = lambda *args: str(path)
    try:
        assert short.shell.compile.cache("1", 1) == str(path)
    finally:
        del short.shell.compile.get_code_name
    assert str(path) not in inspect.modulesbyfile
