"""Text from a guest, made fit for a terminal or a notebook: what it says stays, what it does goes.

A terminal obeys what is written to it: it sets titles and the clipboard (OSC 52), answers questions
as if somebody typed (DECRQSS, ENQ), moves to lines that others wrote, changes its character set.
The sequences are those of ECMA-48 and of xterm (https://invisible-island.net/xterm/ctlseqs).

Kept are colour (SGR) and what moves within the lines that the text itself has written, as progress
bars do: ``\\r``, ``\\b``, EL, CUF, CUB, CHA, and CUU as far as the text came down before.

Bidirectional controls stay in a guest's own text, where languages written from right to left need
them and where they reach no further than a line; in `plain_text`, which is quoted among words of
ours, they go.  Floor 1: knows nothing of settings or messages.
"""

from __future__ import annotations

import re

# C0 but \b \t \n \v \f \r (\v and \f are white space, at most one line down), DEL, C1.
_OBEYED = re.compile("[\x00-\x07\x0e-\x1f\x7f-\x9f]")
_OBEYED_ASCII = bytes({*range(0x20), 0x7F} - {*b"\b\t\n\v\f\r"})

_STRING_END = re.compile("[\x07\x18\x1a\x1b\n\x9c]")
# OSC, DCS, SOS, PM, APC and screen's title, up to what ends them.  A terminal would go on after a
# newline; we do not, as text that somebody wants to read should not vanish behind a stray byte.
_STRING = "(?P<string>(?:\x1b[\\]PX^_k]|[\x90\x98\x9d-\x9f])[^\x07\x18\x1a\x1b\n\x9c]*)"
_CSI = "(?P<csi>(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~])"
_SEQUENCE = re.compile(
    f"{_CSI}|{_STRING}"
    "|(?P<half>(?:\x1b(?:[ -/]*|\\[[0-?]*[ -/]*)|\x9b[0-?]*[ -/]*)\\Z)"
    "|\x1b[NO].|\x1b[ -/]*[0-~]|(?:\x1b\\[|\x9b)[0-?]*[ -/]*|[\x00-\x07\x0e-\x1f\x7f-\x9f]"
)
_KEPT = re.compile("\x1b\\[(?:[0-9;:]{0,128}m|[0-9]{0,4}[KCDG])")
# The first that is not kept, or not without a closer look.
_DOUBTFUL = re.compile(f"(?!{_KEPT.pattern}){_OBEYED.pattern}")
_COLOUR = re.compile("\x1b\\[([0-9;:]*)m")
_UP = re.compile("\x1b\\[([0-9]{0,4})A")
# What no notebook shows and no reader misses: modes such as cursor, paste and keypad, character
# sets, bells.
_COSMETIC = re.compile(
    "\x1b\\[[?>=<][0-?]*[ -/]*[A-Za-z]|\x1b[()*+][0-~]|\x1b[=>\\\\]|[\x00-\x07\x0e-\x1f\x7f]"
)
_PIECE = 1 << 17
_HALF_LIMIT = 256
"""Characters of an unfinished sequence that are kept until its rest comes."""

_MOST_KEPT = 100_000
"""Half as many sequences are looked at in one text of which some must go."""

_UNPRINTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class TerminalFilter:
    """The filter of one stream, which may be cut anywhere, also within a sequence.

    Feed it the text's pieces in order; it keeps at most some hundred characters back.
    """

    __slots__ = ("_coloured", "_depth", "_half", "_in_string", "removed")

    def __init__(self) -> None:
        self.removed = False
        """Whether something was taken out of which a terminal would have shown an effect"""
        self._half = ""
        self._in_string = False
        self._depth = 0
        """Lines that this text has come down from where it began: so far it may go up"""
        self._coloured = False

    def feed(self, text: str) -> str:
        """What may be shown of the next piece."""
        if not self._half and not self._in_string and is_harmless(text):
            self._depth += text.count("\n")
            return text
        text, self._half = self._half + text, ""
        if not self._in_string and _DOUBTFUL.search(text) is None:
            self._depth += text.count("\n")
            self._note_colour(text)
            return text
        if self._in_string:
            end = _STRING_END.search(text)
            if end is None:
                return ""
            self._in_string = False
            # An escape may begin what comes next, and a newline is text; the others only end it.
            text = text[end.start() if end[0] in "\x1b\n" else end.end() :]
        kept = self._without_sequences(text)
        self._note_colour(kept)
        return kept

    def flush(self) -> str:
        """What is to follow the last piece: an end to colours that the text left on."""
        self._half, self._in_string = "", False
        coloured, self._coloured = self._coloured, False
        return "\x1b[0m" if coloured else ""

    def _without_sequences(self, text: str) -> str:
        kept: list[str] = []
        at = 0
        for match in _SEQUENCE.finditer(text):
            if len(kept) > _MOST_KEPT:  # no person's: none of the rest is looked at one by one
                self.removed = True
                text = text[:at] + _SEQUENCE.sub("", text[at:])
                break
            before = text[at : match.start()]
            self._depth += before.count("\n")
            kept.append(before)
            at = match.end()
            kept.append(self._kept(match, at == len(text)))
        self._depth += text.count("\n", at)
        kept.append(text[at:])
        return "".join(kept)

    def _kept(self, match: re.Match[str], is_last: bool) -> str:
        """What stays of a sequence."""
        sequence = match[0]
        kind = match.lastgroup
        if kind == "half":
            # One that is too long is dropped, and what comes next is text.
            self._half = sequence if len(sequence) <= _HALF_LIMIT else ""
            return ""
        if kind == "string":
            self._in_string = is_last
        elif kind == "csi":
            if _KEPT.fullmatch(sequence):
                return sequence
            up = _UP.fullmatch(sequence)
            if up is not None:
                wanted = int(up[1] or 1) or 1
                lines = min(wanted, self._depth)
                self._depth -= lines
                if lines == wanted:
                    return sequence
                self.removed = True
                return f"\x1b[{lines}A" if lines else ""
        if not _COSMETIC.fullmatch(sequence):
            self.removed = True
        return ""

    def _note_colour(self, text: str) -> None:
        at = text.rfind("\x1b[")
        while at >= 0:
            colour = _COLOUR.match(text, at)
            if colour is not None:
                self._coloured = bool(colour[1].strip("0"))
                return
            at = text.rfind("\x1b[", 0, at)


def is_harmless(text: str) -> bool:
    """Whether there is nothing in it that a terminal obeys; a quick scan."""
    if not text.isascii():
        return _OBEYED.search(text) is None
    # Half the time of a regular expression's search; piece by piece, the copies stay in the cache.
    for at in range(0, len(text), _PIECE):
        data = text[at : at + _PIECE].encode()
        if len(data.translate(None, _OBEYED_ASCII)) != len(data):
            return False
    return True


def terminal_text(text: str) -> str:
    """A whole text as `TerminalFilter` leaves it, its colours ended."""
    if is_harmless(text):
        return text
    stream = TerminalFilter()
    return stream.feed(text) + stream.flush()


def plain_text(text: str) -> str:
    """A guest's words without any sequence, to be quoted in what we say ourselves.

    Of controls, newline and tab stay; ``\\r`` becomes a newline, since it would let the rest of a
    line be written over the line's beginning.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _SEQUENCE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return _UNPRINTED.sub("", text)
