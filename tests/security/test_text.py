"""What a terminal would obey is taken out of a guest's text; what people read stays.

The judge is `Terminal`, a terminal of the tests' own: it follows the state machine that xterm and
DEC's terminals have (https://vt100.net/emu/dec_ansi_parser), and says what it was told to do.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkernel import text

pieces = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.text(alphabet="\x1b[]PX^_k0123456789;:?>mKACDGJH \x07\\\n\r\b\x9b\x9d\x90\x9c\x18\x05"),
        st.sampled_from(
            ["\x1b[", "\x1b]0;t", "\x1b\\", "\x1b[31m", "\x1b[2J", "\x1b[1A", "\x1b[5A", "\x9b2J"]
        ),
    ),
    max_size=12,
)


class Terminal:
    """Obeys a text: ``done`` has each command, ``row`` is below where it began."""

    def __init__(self, written: str) -> None:
        self.done: list[str] = []
        self.rows: list[int] = []
        row = at = 0
        while at < len(written):
            sign = written[at]
            at += 1
            if sign == "\n":
                row += 1
            elif sign == "\x1b" or "\x80" <= sign <= "\x9f":
                match = re.compile(r"\[([0-9:;<=>?]*[ -/]*)([@-~])").match(written, at)
                if sign == "\x1b" and match is not None:
                    at = match.end()
                    if match[2] == "A":
                        row -= int(match[1] or 1) or 1
                    command = match[2] if not re.search(r"[^0-9:;]", match[1]) else match[0]
                    self.done.append(command)
                else:
                    self.done.append(f"{sign!r}{written[at : at + 1]!r}")
            elif (sign < " " and sign not in "\b\t\v\f\r") or sign == "\x7f":
                self.done.append(repr(sign))
            self.rows.append(row)


@pytest.mark.parametrize(
    "kept",
    [
        "plain\ttext\n",
        "\x1b[31;1mred\x1b[0m \x1b[38;2;1;2;3mrgb\x1b[38:5:9m",
        " 40%|####      | 4/10\r 50%|#####     | 5/10\r",  # tqdm
        "\x1b[2K\r\x1b[32m━━━━\x1b[0m 100%",  # rich
        "a\b\x1b[1Cb\x1b[2Dc\x1b[5Gd\x1b[Ke",
        "outer\n\x1b[Ainner\n\n\x1b[2A",  # tqdm's nested bars go back to lines of their own
        "\u05d0\u202b\u05d1\u202c é ü 漢字 🙂",
    ],
)
def test_what_people_print_stays(kept: str) -> None:
    stream = text.TerminalFilter()
    assert stream.feed(kept) == kept
    assert not stream.removed


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("\x1b]0;title\x07a", "a"),
        ("\x1b]0;title\x1b\\a", "a"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;ZXZpbA==\x07a", "a"),  # the clipboard
        ('\x1bP$q"p\x1b\\a', "a"),  # DECRQSS: the terminal would type the answer
        ("\x1b_Gf=100;AAAA\x1b\\a", "a"),
        ("\x1b^pm\x1b\\a\x1bXsos\x1b\\b\x1bktitle\x1b\\c", "abc"),
        ("\x9d0;title\x9ca\x9b2Jb\x90q\x9cc\x85d", "abcd"),
        ("\x1b[2J\x1b[H\x1b[3Ja", "a"),
        ("\x1b[6na\x1b[c\x1b[>c\x05", "a"),  # reports
        ("\x1b[21t\x1b[8;1;1ta", "a"),  # window
        ("\x1bca\x1b7\x1b8\x1bD\x1bM", "a"),
        ("\x1b(0lqk\x1b(B\x0e\x0f", "lqk"),
        ("\x1b[?1049ha\x1b[?25l", "a"),
        ("\x1b[>4;1ma\x1b[1 qb\x1b[?0K", "ab"),
        ("\x1b[99999Ca\x1b[9;9Kb", "ab"),
        ("\x1b[1Aa", "a"),  # above where it began
        ("a\n\x1b[9Ab", "a\n\x1b[1Ab"),
        ("\x1b\x1b]0;x\x07[2Ja", "[2Ja"),  # what is left must not become a sequence
        ("\x1b[\x1b[31m2Ja", "\x1b[31m2Ja"),
        ("\x1b]0;never ended\nnext line", "\nnext line"),
        ("bell\x07 nul\x00 del\x7f", "bell nul del"),
        ("\x1b[31", ""),
    ],
)
def test_what_a_terminal_would_obey_goes(given: str, left: str) -> None:
    assert text.TerminalFilter().feed(given) == left
    for cut in range(1, len(given)):  # in two messages it is the same
        stream = text.TerminalFilter()
        assert stream.feed(given[:cut]) + stream.feed(given[cut:]) == left, cut


@pytest.mark.parametrize("given", ["\x1b]0;t\x07", "\x1b[2J", "\x1b[2", "\x1b[1A", "\x9b1m"])
def test_what_was_shown_in_another_way_is_known(given: str) -> None:
    stream = text.TerminalFilter()
    stream.feed(given)
    stream.feed("J")
    assert stream.removed


@given(pieces)
def test_the_output_commands_nothing_else(parts: list[str]) -> None:
    stream = text.TerminalFilter()
    terminal = Terminal("".join(stream.feed(part) for part in parts) + stream.flush())
    assert set(terminal.done) <= set("mKACDG")
    assert min(terminal.rows, default=0) >= 0


@given(pieces)
def test_once_is_enough_and_cuts_do_not_matter(parts: list[str]) -> None:
    whole = text.TerminalFilter().feed("".join(parts))
    stream = text.TerminalFilter()
    assert "".join(stream.feed(part) for part in parts) == whole
    assert text.TerminalFilter().feed(whole) == whole
    assert text.terminal_text(text.terminal_text(whole)) == text.terminal_text(whole)


@given(pieces)
def test_plain_text_has_no_control_at_all(parts: list[str]) -> None:
    plain = text.plain_text("".join(parts))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain)
    assert text.plain_text(plain) == plain


def test_plain_text_keeps_the_words() -> None:
    assert text.plain_text("a\r\nb\rc\x1b[31md\x1b]0;t\x07e\u202ef\n\tg") == "a\nb\ncdef\n\tg"


def test_an_unfinished_sequence_takes_no_memory() -> None:
    stream = text.TerminalFilter()
    for begin in ("\x1b]0;", "\x1b[", "\x1b "):
        stream.feed(begin)
        for _ in range(1000):
            stream.feed("1" * 1000 if begin == "\x1b[" else " " * 1000)
            assert len(stream._half) <= 256
        assert stream.feed("\n").endswith("\n")


def test_a_flood_of_sequences_is_taken_out_as_a_whole() -> None:
    stream = text.TerminalFilter()
    assert stream.feed("a\x1b[5n" * 200_000) == "a" * 200_000
    assert stream.removed


def test_colours_left_on_are_ended() -> None:
    stream = text.TerminalFilter()
    stream.feed("\x1b[8mhidden \x1b[K")
    assert stream.flush() == "\x1b[0m"
    stream.feed("\x1b[8mhidden\x1b[0m")
    assert stream.flush() == ""
