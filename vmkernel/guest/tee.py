"""IPython's own record of what cells printed, of which `%notebook` makes a notebook.

Where it stands: on the shell that ``guest.engine`` has built.  IPython puts a function of its own
in the place of ``sys.stdout.write`` while a cell runs, which looks at seven attributes for each of
a print's two writes: under emulation, 20 us a print, twice what the print itself takes.  The
streams know what was written; they tell it here when they publish it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from IPython.core.history import HistoryOutput

from vmkernel.guest.streams import PortStream

_TYPES = {"stdout": "out_stream", "stderr": "err_stream"}


class Tee:
    """The record of one shell."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._usual = shell._tee
        shell._tee = self._tee
        log_output = shell.displayhook.log_output

        def note_before(format_dict: dict[str, Any]) -> None:
            """A result comes after what was printed before it."""
            for name in _TYPES:
                stream = getattr(sys, name)
                if isinstance(stream, PortStream):
                    stream.note()
            log_output(format_dict)

        shell.displayhook.log_output = note_before

    @contextmanager
    def _tee(self, channel: str) -> Iterator[None]:
        stream = getattr(sys, channel)
        if type(stream) is not PortStream:  # the user's
            with self._usual(channel=channel):
                yield
            return
        before = stream.keep(functools.partial(self.keep, channel, self._shell.execution_count))
        try:
            yield
        finally:
            stream.keep(before)

    def keep(self, channel: str, execution_count: int, texts: list[str]) -> None:
        """Note what a cell wrote."""
        texts = [text for text in texts if text]
        if not texts:
            return
        kind = _TYPES[channel]
        outputs = self._shell.history_manager.outputs[execution_count]
        if not outputs or outputs[-1].output_type != kind:
            outputs.append(HistoryOutput(output_type=kind, bundle={"stream": []}))
        outputs[-1].bundle["stream"].extend(texts)
