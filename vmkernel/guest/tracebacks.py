"""Tracebacks as IPython draws them, ten times sooner.

Where it stands: used by ``guest.engine`` on the shell that it has built, beside ``guest.lean``.  An
error or an interrupt ends in IPython's coloured traceback.  Drawing one takes 27 ms on a real
processor, half a second in an emulated VM, and nearly all of that is work whose result is known:

* It is drawn twice, the second time for the history (``_format_exception_for_storage``).
* ``inspect.getmodule`` looks for a cell's file in all loaded modules, five times; none has it.
* The colours of some 200 token types are chosen anew each time (``Terminal256Formatter``).

And a traceback ends in the user's code: an interrupt's last frame, our signal handler, is cut off.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
from typing import Any

import stack_data
from pygments.formatters.terminal256 import Terminal256Formatter

from vmkernel.guest.port import Interrupts

_KEPT_STYLES = 8
READ_ONLY = """\
vmkernel: the host's directory is here for reading (setting workspace: ro). To let cells write
there, on the host: VMKERNEL_WORKSPACE=rw, or `vmkernel install --set workspace=rw`
(docs/workspace.md). Or write to ~, which goes with this VM; `%vm get` brings out what stays."""
"""Said of any file system that is for reading: a guest has no other."""
NO_MODULE = ""  # the name of no module in sys.modules


class Tracebacks:
    """The shortcuts on one shell.  ``forget()`` before each request."""

    def __init__(self, shell: Any) -> None:
        self._shell_class = type(shell)
        self._shell = shell
        self._shown: tuple[BaseException, Any] | None = None
        shell._showtraceback = self._show
        shell._format_exception_for_storage = self._format_for_storage
        shell._get_exc_info = self._get_exc_info
        self._compiler_class = type(shell.compile)
        shell.compile.cache = self._cache
        keep_colours()

    def forget(self) -> None:
        """A new request: hold on to no exception, and with it to no frame."""
        self._shown = None

    def _get_exc_info(self, exc_tuple: Any = None) -> Any:
        kind, value, trace = self._shell_class._get_exc_info(self._shell, exc_tuple)
        read_only = isinstance(value, OSError) and value.errno == errno.EROFS
        if read_only and READ_ONLY not in getattr(value, "__notes__", ()):
            value.add_note(READ_ONLY)
        if isinstance(value, KeyboardInterrupt):
            inner = trace
            while inner is not None and inner.tb_next is not None:
                if inner.tb_next.tb_frame.f_code is Interrupts.handle.__code__:
                    inner.tb_next = None
                    break
                inner = inner.tb_next
        return kind, value, trace

    def _show(self, etype: Any, evalue: Any, stb: Any) -> None:
        self._shown = (evalue, stb)
        self._shell_class._showtraceback(self._shell, etype, evalue, stb)

    def _format_for_storage(self, exception: BaseException, *args: Any, **kwargs: Any) -> Any:
        shown, self._shown = self._shown, None
        if shown is not None and shown[0] is exception:
            return {
                "ename": type(exception).__name__,
                "evalue": str(exception),
                "traceback": shown[1],
            }
        return self._shell_class._format_exception_for_storage(
            self._shell, exception, *args, **kwargs
        )

    def _cache(self, *args: Any, **kwargs: Any) -> str:
        """Name and keep a cell's source; and tell ``inspect`` that its file is no module's."""
        name: str = self._compiler_class.cache(self._shell.compile, *args, **kwargs)
        path = os.path.normcase(os.path.abspath(name))
        if path not in inspect.modulesbyfile and not os.path.exists(path):
            inspect.modulesbyfile[path] = NO_MODULE
        return name


def keep_colours() -> None:
    """Let the colours of a style be chosen once."""
    usual = Terminal256Formatter._setup_styles
    if hasattr(usual, "chosen"):
        return
    chosen: dict[tuple[Any, ...], dict[str, tuple[str, str]]] = {}

    def setup_styles(formatter: Any) -> None:
        if type(formatter) is not Terminal256Formatter:
            usual(formatter)
            return
        key = (formatter.style, formatter.usebold, formatter.useunderline, formatter.useitalic)
        if key not in chosen:
            usual(formatter)
            if len(chosen) >= _KEPT_STYLES:
                chosen.clear()
            chosen[key] = formatter.style_string
        formatter.style_string = dict(chosen[key])

    setup_styles.chosen = chosen  # type: ignore[attr-defined]
    Terminal256Formatter._setup_styles = setup_styles
    # The same style with the same marking of what was executing is the same style
    stack_data.style_with_executing_node = functools.lru_cache(maxsize=_KEPT_STYLES)(
        stack_data.style_with_executing_node
    )
