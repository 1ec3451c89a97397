"""What a terminal obeys when it reads it, and whether a text has any of it."""

from __future__ import annotations

import re

OBEYED = {
    "title": "\x1b]0;evil\x07",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "link": "\x1b]8;;http://evil.invalid\x1b\\",
    "clear": "\x1b[2J",
    "home": "\x1b[H",
    "above": "\x1b[99A",
    "alternate": "\x1b[?1049h",
    "question": "\x1b[6n",
    "device": "\x1bP$q m\x1b\\",
    "application": "\x1b_evil\x1b\\",
    "reset": "\x1bc",
    "one-byte": "\x9b2J",
    "charset": "\x1b(0",
    "answerback": "\x05",
}
COLOUR = "\x1b[31m"


def obeyed(shown: str) -> list[str]:
    """Controls in a text, but for colours, ends of lines, our own line of progress, and a way up.

    A text may go up to lines that it has written itself; nothing here writes ten.
    """
    left = re.sub(r"\x1b\[(?:[0-9;]*m|[0-9]A)|\r+\n|\r(?:vmkernel: [^\x1b\r]*)?\x1b\[K", "", shown)
    return re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f].{0,9}", left)
