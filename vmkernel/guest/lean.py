"""What every cell pays for in IPython and ipykernel, and need not.

Where it stands: used by ``guest.engine`` on the shell that it has built.  Nothing here changes what
a cell does; each shortcut is taken only where its result is known to be the same.  Measured on
``1+1``, whose time in an emulated VM is all such overhead (shares of the engine's part of it):

* ipykernel asks for the parameters of ``run_cell_async`` anew for each cell, by ``inspect``: 7 %.
* ipykernel transforms a cell to see whether it awaits something; if not, IPython transforms it
  again and asks again: 9 %.
* Whether a cell awaits is found by compiling it.  Without the words it cannot: 4 %.
* Magics are looked for by tokenising the cell.  Without their characters there are none: 5 %.
* So is a semicolon at its end, when there is a result to show: 6 %.
* A result is offered to a dozen formatters.  A number or a string has no more to it than its repr,
  unless somebody registered a formatter for its type: 12 %.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import ipykernel.ipkernel
from IPython.core.autocall import IPyAutocall
from IPython.core.formatters import DisplayFormatter, PlainTextFormatter
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.macro import Macro
from IPython.lib import pretty

# What IPython.core.inputtransformer2 reacts to: % ! ? anywhere (magics, system commands, help,
# with or without assignment), and , ; / where a line begins (its three ways of quoting a call).
_SPECIAL = re.compile(r"[%!?]|^\s*[,;/]", re.MULTILINE)
# Types without any _repr_…_ method; object, in which they end, has none either.
_SCALARS = frozenset((bool, bytes, complex, float, int, str))


# One line of plain characters that nothing in there reacts to, nor to its beginning
_PLAIN = re.compile(r"(?!.*In \[)(?![\s,;/>.])[ -~]+\n?")
_NAME = re.compile(r"[\w.*]*")  # what IPython.core.splitinput takes for a function's name


class Shortcuts:
    """The shortcuts on one shell.  ``forget()`` before each request."""

    def __init__(self, shell: Any) -> None:
        self._shell_class = type(shell)
        self._shell = shell
        self._known: tuple[str, str] | None = None
        shell.transform_cell = self._transform_cell
        shell.should_run_async = self._should_run_async
        manager = shell.input_transformer_manager
        self._manager: Any = None
        if type(manager) is TransformerManager:
            self._manager = manager
            self._usual_transformers = list(manager.token_transformers)
            manager.do_token_transforms = self._do_token_transforms
            self._usual_steps = _steps(shell)
        hook_class = type(shell.displayhook)
        shell.displayhook.semicolon_at_end_of_expression = lambda cell: (
            ";" in cell and hook_class.semicolon_at_end_of_expression(cell)
        )
        display = shell.display_formatter
        if type(display) is DisplayFormatter:
            self._display = display
            self._usual_formatters = {type(formatter) for formatter in _formatters(display)}
            display.format = self._format
        _remember_parameters()

    def forget(self) -> None:
        """A new request: what an earlier one was transformed to may be different by now."""
        self._known = None

    def _transform_cell(self, raw_cell: str) -> str:
        known, self._known = self._known, None
        if known is not None and known[0] == raw_cell:
            return known[1]
        cell = self._as_it_is(raw_cell)
        if cell is None:
            cell = self._shell_class.transform_cell(self._shell, raw_cell)
        self._known = (raw_cell, cell)
        return cell

    def _as_it_is(self, raw_cell: str) -> str | None:
        """One line that IPython does not change; None: it may.

        The first word of a single line is looked up: magics need no %, macros are put in.
        """
        if self._manager is None or _SPECIAL.search(raw_cell) or not _PLAIN.fullmatch(raw_cell):
            return None
        shell = self._shell
        name = _NAME.match(raw_cell).group()  # type: ignore[union-attr]  # always matches
        magics = shell.magics_manager.magics
        if (
            (name in shell.user_ns and isinstance(shell.user_ns[name], (Macro, IPyAutocall)))
            or name in magics["line"]
            or name in magics["cell"]
            or raw_cell.rstrip("\n").endswith("# PYTHON-MODE")  # Emacs
            or shell.autocall
            or _steps(shell) != self._usual_steps
        ):
            return None
        line = raw_cell.removesuffix("\n")
        shell.prefilter_manager.shell._last_input_line = line
        return line + "\n"

    def _should_run_async(
        self, raw_cell: str, *, transformed_cell: Any = None, preprocessing_exc_tuple: Any = None
    ) -> bool:
        if transformed_cell is not None and not (
            "await" in transformed_cell or "async" in transformed_cell
        ):
            return False
        answer: bool = self._shell_class.should_run_async(
            self._shell,
            raw_cell,
            transformed_cell=transformed_cell,
            preprocessing_exc_tuple=preprocessing_exc_tuple,
        )
        if answer:
            self._known = None  # it is run as it is, and user code may run meanwhile
        return answer

    def _do_token_transforms(self, lines: list[str]) -> list[str]:
        manager = self._manager
        usual = manager.token_transformers == self._usual_transformers
        if usual and not _SPECIAL.search("".join(lines)):
            return lines
        result: list[str] = TransformerManager.do_token_transforms(manager, lines)
        return result

    def _format(self, obj: Any, include: Any = None, exclude: Any = None) -> Any:
        display = self._display
        if type(obj) in _SCALARS and not include and not exclude and self._is_plain(obj):
            text = _plain_text(display.formatters["text/plain"], obj)
            if text is None:  # an int too long to write: the formatter has told so
                return {}, {}
            if isinstance(text, str):
                return {"text/plain": text}, {}
        return DisplayFormatter.format(display, obj, include=include, exclude=exclude)

    def _is_plain(self, obj: Any) -> bool:
        """Whether no formatter but the one for plain text has anything to say to this value."""
        kinds = type(obj).__mro__
        for formatter in _formatters(self._display):
            if type(formatter) not in self._usual_formatters:
                return False
            if type(formatter) is PlainTextFormatter:
                continue
            values = formatter._trait_values  # without a call for each; what was asked for is there
            try:
                by_type, by_name = values["type_printers"], values["deferred_printers"]
                singletons = values["singleton_printers"]
            except KeyError:
                return False
            for kind in kinds:
                if kind in by_type or (by_name and (kind.__module__, kind.__name__) in by_name):
                    return False
            if id(obj) in singletons:
                return False
        return True


def _plain_text(formatter: Any, obj: Any) -> Any:
    if type(formatter) is PlainTextFormatter and formatter.pprint:
        printers = formatter.type_printers
        if printers.get(type(obj)) is pretty._repr_pprint and id(obj) not in (
            formatter.singleton_printers
        ):
            with suppress(ValueError):  # of an int too long to write, which the formatter tells
                return repr(obj)  # in one line, as the repr of such a value is
    return formatter(obj)


def _steps(shell: Any) -> list[Any]:
    """All that a cell of one line goes through."""
    manager, prefilter = shell.input_transformer_manager, shell.prefilter_manager
    return [
        manager,
        *manager.cleanup_transforms,
        *manager.line_transforms,
        *manager.token_transformers,
        *shell.input_transformers_post,
        prefilter,
        *prefilter._transformers,
        *prefilter._checkers,
        prefilter._handlers.get("normal"),
    ]


def _formatters(display: DisplayFormatter) -> tuple[Any, ...]:
    return (
        display.ipython_display_formatter,
        display.mimebundle_formatter,
        *display.formatters.values(),
    )


def _remember_parameters() -> None:
    """ipykernel's question is always about the same two functions."""
    ask = getattr(ipykernel.ipkernel, "_accepts_parameters", None)
    if ask is None or hasattr(ask, "answers"):
        return
    answers: dict[tuple[Any, ...], Any] = {}

    def remembered(method: Any, names: list[str]) -> Any:
        key = (getattr(method, "__func__", method), *names)
        if key not in answers:
            answers[key] = ask(method, names)
        return answers[key]

    remembered.answers = answers  # type: ignore[attr-defined]
    ipykernel.ipkernel._accepts_parameters = remembered
