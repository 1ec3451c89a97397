"""Makes the next cell of a guest kernel what a script's process is to a script.

Where it stands: imported by ``guest.engine``, so that a template has it; called by a cell that
``vmkernel run`` sends before the code (``cli.script``), which brings this file's text along for a
kernel that is no engine of ours.  A cell differs from a script in this, and each is mended here:

* ``sys.argv``, ``__file__``, the file's name in tracebacks, ``exit``;
* ``sys.stdin`` is the command's standard input, byte for byte, and ``input()`` reads from it;
* ``asyncio.run()`` works: code without a top-level ``await`` does not see the kernel's event loop;
* at the end threads are waited for and ``atexit`` functions run;
* ``sys.exit("text")`` writes the text to stderr, and nothing advises how to leave IPython.
"""

from __future__ import annotations

import asyncio
import atexit
import io
import logging
import os
import sys
import threading
import weakref
from typing import Any

import IPython
from IPython.core import interactiveshell

STDIN = "\0vmkernel stdin"
"""As the prompt of an input request: give me what there is of standard input (``cli.stdin``)."""


class Stdin(io.RawIOBase):
    """The command's standard input, asked for piece by piece."""

    name, mode = "<stdin>", "rb"

    def __init__(self, ask: Any, terminal: bool) -> None:
        self._ask = ask
        self._terminal = terminal
        self._left = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """Whether the command's is."""
        return self._terminal

    def readinto(self, buffer: Any) -> int:
        """Take what there is, or wait for something; 0 at the end."""
        if not self._left:
            # One character for each byte, after a sign, since a lone ^D means the end to a kernel
            self._left = self._ask(STDIN)[1:].encode("latin-1")
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


class Script:
    """What is done before the code and after it."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._begun = False
        self._hidden: tuple[Any, Any] | None = None

    def prepare(self, argv: list[str], file: str, terminal: bool) -> None:
        """Mend all that can be mended before."""
        shell, kernel = self._shell, self._shell.kernel
        sys.argv = argv
        names = shell.user_ns
        names["exit"] = names["quit"] = sys.exit
        if file:
            names["__file__"] = file = os.path.abspath(file)
        code_name = file or ("<stdin>" if argv[0] == "-" else f"<{argv[0]}>")
        shell.compile.get_code_name = lambda *_: code_name
        shell.compile.format_code_name = lambda name: None  # not "Cell In[2]"
        raw = Stdin(kernel.raw_input, terminal)
        sys.stdin = sys.__stdin__ = io.TextIOWrapper(  # type: ignore[misc]
            io.BufferedReader(raw), encoding="utf-8", errors="surrogateescape"
        )
        kernel.raw_input = self.ask  # what a cell finds as input()
        usual = interactiveshell.warn
        interactiveshell.warn = lambda text, *rest, **more: (
            None if str(text).startswith("To exit:") else usual(text, *rest, **more)
        )
        # What the kernel and its libraries do at their end is none of the script's business
        atexit._clear()
        atexit.register(logging.shutdown)
        atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined]
        children = sys.modules.get("multiprocessing.util")
        if children is not None:
            atexit.register(children._exit_function)
        shell.events.register("pre_run_cell", self.begin)
        shell.events.register("post_run_cell", self.end)

    @staticmethod
    def ask(prompt: object = "") -> str:
        """As the built-in ``input``."""
        sys.stdout.write(str(prompt))
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError("EOF when reading a line")
        return line.removesuffix("\n")

    def begin(self, info: Any) -> None:
        """The code is about to run."""
        self._begun = True
        cell = info.transformed_cell or info.raw_cell
        if ("await" in cell or "async" in cell) and not compiles(cell):
            return  # it needs the kernel's event loop
        policy = asyncio.get_event_loop_policy()
        self._hidden = asyncio._get_running_loop(), policy
        asyncio._set_running_loop(None)
        asyncio.set_event_loop_policy(type(policy)())

    def end(self, result: Any) -> None:
        """The code has run."""
        if not self._begun:
            return  # it was the prologue itself
        try:
            error = getattr(result, "error_in_exec", None)
            if isinstance(error, SystemExit):
                if not isinstance(error.code, int | None):
                    print(error.code, file=sys.stderr)
                    error.code = 1
                error.args = (int(error.code or 0),)
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        finally:
            if self._hidden is not None:
                loop, policy = self._hidden
                asyncio.set_event_loop_policy(policy)
                asyncio._set_running_loop(loop)


def compiles(cell: str) -> bool:
    """Whether it is Python as in a file, which knows no ``await`` outside a function."""
    try:
        compile(cell, "<script>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def prepare(argv: list[str], file: str, terminal: bool) -> None:
    """Prepare this guest kernel for one script, which lies in ``file`` ("": in none).

    ``terminal``: the command's standard input is one.
    """
    Script(IPython.get_ipython()).prepare(argv, file, terminal)
