"""What a person is told while a VM is waited for: on stderr, and only when it lasts. Floor 5."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time

import click

_PATIENCE_AT_TERMINAL = 0.4
_PATIENCE = 2.0
_BETWEEN_LINES = 5.0
"""Seconds: a log is not to be filled with percentages"""


class Waiting:
    """``with Waiting() as waiting: … on_progress=waiting.show``, in an event loop.

    On a terminal one line, written over, and gone at the end; elsewhere a line now and then.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._text = ""
        self._shown = ""
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Waiting:
        if not self._quiet:
            patience = _PATIENCE_AT_TERMINAL if self._terminal else _PATIENCE
            self._timer = asyncio.get_running_loop().call_later(patience, self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._quiet = None, True
        if self._terminal and self._shown:
            self._write("\r\x1b[K")

    def show(self, text: str) -> None:
        """What is being waited for now."""
        self._text = text
        if self._timer is None:  # patience is at its end
            self._draw()

    def _begin(self) -> None:
        self._timer = None
        self._draw()

    def _draw(self) -> None:
        if self._quiet or not self._text or self._text == self._shown:
            return
        if self._terminal:
            width = 80
            with contextlib.suppress(OSError):
                width = os.get_terminal_size(sys.stderr.fileno()).columns
            # Cut to the terminal's width: a line that wraps cannot be written over
            self._write(f"\rvmkernel: {self._text}"[: max(10, width)] + "\x1b[K")
        else:
            now = time.monotonic()
            if now - self._last < _BETWEEN_LINES:
                return
            self._last = now
            self._write(f"vmkernel: {self._text}\n")
        self._shown = self._text

    @staticmethod
    def _write(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody is there to be told
            click.echo(text, nl=False, err=True)
