"""What ``vmkernel run`` and ``exec`` are given to run: a file, ``-c CODE``, or standard input.

A `Source` says what the code is; `Source.plan` what a guest is sent for it. Floor 5.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vmkernel.errors import VmError

_SUFFIXES = {".py": "python", ".ipy": "python", ".sh": "bash", ".bash": "bash"}


class Plan(NamedTuple):
    """What a guest is sent, in this order."""

    file: str
    """Where the code lies in the guest, or "" for nowhere."""
    text: str
    """What lies there."""
    prologue: str
    """A cell that goes before, or "" for none."""
    code: str


class Source(NamedTuple):
    """Code, and how it came."""

    code: str
    name: str
    """As ``sys.argv[0]`` has it: a file's name, ``-c``, or ``-`` for standard input."""
    path: Path | None
    arguments: tuple[str, ...]

    @property
    def language(self) -> str | None:
        """The language that the file's name or first line tells; None when they do not."""
        if self.path is None:
            return None
        known = _SUFFIXES.get(self.path.suffix.lower())
        first = self.code.partition("\n")[0]
        if known is None and first.startswith("#!"):
            program = PurePosixPath(first.removeprefix("#!").split()[-1]).name if first[2:] else ""
            known = {"sh": "bash", "bash": "bash"}.get(program)
            known = known or ("python" if program.startswith("python") else None)
        return known

    def plan(self, language: str, *, engine: bool) -> Plan:
        """How to run it as a script of its own in a guest that speaks *language*.

        *engine*: the guest kernel is our own (``guest.engine``) and knows what a script is.

        In Python the code is a cell that a prologue has made a script's process of; for bash it is
        a script of another bash; in any other language it is a cell, without arguments.

        Raises VmError when there are arguments that the language's kernel cannot be given.
        """
        file = self.path.name if self.path is not None else ""
        if language == "python":
            argv = [self.name, *self.arguments]
            prologue = _python_prologue(argv, file, engine=engine)
            return Plan(file, self.code, prologue, self.code)
        if language == "bash":
            if file:
                words = ["bash", "--", file, *self.arguments]
            else:
                words = ["bash", "-c", self.code, "bash", *self.arguments]
            return Plan(file, self.code, "", shlex.join(words) + " </dev/null")
        if self.arguments:
            raise VmError(
                f"a kernel of the language {language!r} cannot be given arguments",
                hint="put them into the environment (--env NAME), or into the code",
            )
        return Plan("", "", "", self.code)


def read_source(file: str | None, code: str | None, arguments: tuple[str, ...]) -> Source:
    """The code of a FILE, of ``-c`` (which wins), or of standard input (FILE is ``-``).

    Raises VmError when it cannot be read.
    """
    if code is not None:
        return Source(code, "-c", None, arguments)
    assert file is not None, "the command's options saw to it"
    try:
        if file == "-":
            return Source(_text(sys.stdin.buffer.read()), "-", None, arguments)
        path = Path(file)
        return Source(_text(path.read_bytes()), path.name, path, arguments)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise VmError(
            f"{'standard input' if file == '-' else file} cannot be read: {reason}",
            hint="name a file with code in it, or give the code itself with -c",
        ) from error


def _text(data: bytes) -> str:
    # As Python reads a source file: any kind of line end, a byte order mark
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _python_prologue(argv: list[str], file: str, *, engine: bool) -> str:
    # The script finds its globals empty
    call = f"prepare({argv!r}, {file!r}, {os.isatty(0)!r})"
    if engine:
        return f"from vmkernel.guest.script import prepare; {call}; del prepare"
    text = Path(__file__).parents[1].joinpath("guest", "script.py").read_text(encoding="utf-8")
    return f"exec({text + call!r}, {{'__name__': 'script'}})"
