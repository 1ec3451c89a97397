"""This command's standard input, for code in a guest that asks for it. Floor 5."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

_CHUNK = 1 << 16
_ASKS_FOR_BYTES = "\0vmkernel stdin"
"""The prompt by which a script's ``sys.stdin`` asks (``STDIN`` in ``guest/script.py``)."""


END = "\x04"
"""What makes ipykernel's input() raise EOFError."""


class Stdin:
    """Answers a guest's input requests; called in a thread, where it may block.

    ``say(text)`` shows a prompt.  `give_up`, from any thread, ends a wait: the guest sees the end
    of its input.
    """

    def __init__(self, say: Callable[[str], None], fd: int = 0) -> None:
        self._say = say
        self._fd = fd
        self._left = b""
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def close(self) -> None:
        """Give the descriptors back; nobody may be waiting."""
        os.close(self._woken)
        os.close(self._wake)

    def give_up(self) -> None:
        """End a wait that is under way, and every later one at once."""
        os.write(self._wake, b"x")

    def __call__(self, prompt: str, password: bool) -> str:
        """What was typed; ``END`` at the end of the input."""
        if prompt == _ASKS_FOR_BYTES:
            # A sign before it: a kernel takes a lone ^D for the end of input
            return "=" + self._bytes().decode("latin-1")
        if prompt:
            self._say(prompt)
        if password and os.isatty(self._fd):
            return self._secret()
        return self._line()

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            piece = self._bytes()
            if not piece:
                if not line:
                    return END
                break
            piece, newline, rest = piece.partition(b"\n")
            line += piece + newline
            self._left = rest + self._left
        return line.removesuffix(b"\n").decode("utf-8", "replace")

    def _secret(self) -> str:
        """A line that the terminal does not show (termios(3): ECHO off, the line's end shown)."""
        import termios

        before = termios.tcgetattr(self._fd)
        silent = list(before)
        silent[3] = (silent[3] & ~termios.ECHO) | termios.ECHONL
        termios.tcsetattr(self._fd, termios.TCSADRAIN, silent)
        try:
            return self._line()
        finally:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, before)

    def _bytes(self) -> bytes:
        """What there is, at least a byte; none at the end."""
        data, self._left = self._left, b""
        if data:
            return data
        readable, _, _ = select.select([self._fd, self._woken], [], [])
        if self._woken in readable:
            return b""
        try:
            return os.read(self._fd, _CHUNK)
        except OSError:  # closed, or its terminal is gone
            return b""
