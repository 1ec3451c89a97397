"""The outputs of running code, on this command's own stdout and stderr, as they come. Floor 5."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vmkernel.text import TerminalFilter, plain_text

if TYPE_CHECKING:
    from vmkernel.models import Output, RunError

_STDOUT, _STDERR = 1, 2


class Abandoned(BaseException):
    """A signal came while a write was blocked: what is left of the output is given up."""


class Streams:
    """Where outputs go. ``show`` is for the event loop: it never raises, and what cannot be
    written is told by ``on_failure(OSError)``, once; everything after that is dropped.

    A terminal obeys what is written to it, so it gets no more of a guest's control sequences than a
    notebook does. A pipe or a file gets the bytes as they are, as from any program.
    """

    def __init__(
        self,
        on_failure: Callable[[OSError], None],
        *,
        results: bool = False,
        script: bool = False,
        trusted: bool = False,
    ) -> None:
        """``results``: the value of the last expression is shown, too.  ``script``: the code itself
        has told why it exits.  ``trusted``: also a terminal gets everything."""
        self.blocked = False
        """Whether nobody takes what we write: then a signal's handler may raise `Abandoned`."""
        self.error_shown = False
        self._on_failure = on_failure
        self._results = results
        self._script = script
        self._dropping = False
        self._colours = os.isatty(_STDERR) and not os.environ.get("NO_COLOR")
        self._filters = {
            fd: TerminalFilter() for fd in (_STDOUT, _STDERR) if not trusted and os.isatty(fd)
        }

    def show(self, output: Output) -> None:
        """Write one output."""
        content = output.content
        if output.msg_type == "stream":
            fd = _STDERR if content.get("name") == "stderr" else _STDOUT
            self.write(fd, str(content.get("text", "")))
        elif output.msg_type == "error":
            self._show_error(str(content.get("ename")), str(content.get("evalue", "")),
                             content.get("traceback"))  # fmt: skip
        elif output.msg_type.endswith("display_data") or (
            self._results and output.msg_type == "execute_result"
        ):
            text = as_text(content.get("data"))
            if text is not None:
                self.write(_STDOUT, text + "\n")

    def show_end(self, error: RunError | None, exit_code: int) -> None:
        """Write of the run's error what no output has told."""
        if error is None or self.error_shown:
            return
        if error.name == "GuestKernelDied":
            if exit_code >= 128:  # a signal; a status it gave itself is no news
                self.write(_STDERR, f"vmkernel: {error.value}\n")
        else:
            self._show_error(error.name, error.value, error.traceback)

    def _show_error(self, name: str, value: str, traceback: Any) -> None:
        self.error_shown = True
        if name == "SystemExit":
            if not self._script and not _is_status(value):
                self.write(_STDERR, value + "\n")
            return
        lines = [str(line) for line in traceback] if isinstance(traceback, list) else []
        if not lines and name:
            lines = [f"{name}: {value}"]
        if lines:
            text = "\n".join(lines)
            self.write(_STDERR, (text if self._colours else plain_text(text)) + "\n")

    def write(self, fd: int, text: str) -> None:
        """Write all of *text*, however slowly it is read."""
        if fd in self._filters:
            text = self._filters[fd].feed(text)
        self._write(fd, text)

    def close(self) -> None:
        """The code has ended: leave a terminal no colour of its."""
        for fd, stream in self._filters.items():
            self._write(fd, stream.flush())

    def _write(self, fd: int, text: str) -> None:
        data = memoryview(text.encode("utf-8", "replace"))
        try:
            while data and not self._dropping:
                if not select.select([], [fd], [], 0)[1]:
                    self._wait_until_writable(fd)
                # So much goes into a pipe that is writable without a wait (pipe(7))
                data = data[os.write(fd, data[: select.PIPE_BUF]) :]
        except Abandoned:
            self._dropping = True
        except OSError as error:
            self._dropping = True
            self._on_failure(error)

    def _wait_until_writable(self, fd: int) -> None:
        self.blocked = True
        try:
            select.select([], [fd], [])
        finally:
            self.blocked = False


def as_text(data: object) -> str | None:
    """A MIME bundle's ``text/plain``; None when it has none."""
    text = data.get("text/plain") if isinstance(data, dict) else None
    if isinstance(text, list):  # nbformat allows lines, too
        text = "".join(map(str, text))
    return text if isinstance(text, str) else None


def _is_status(value: str) -> bool:
    try:
        int(value or "0")
    except ValueError:
        return value in ("None", "True", "False")
    return True
