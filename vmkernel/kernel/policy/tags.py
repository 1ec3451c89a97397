"""HTML whose every tag is written so plainly that all parsers read it alike, and may stay as it is.

Most displays are of this kind (pandas' tables are), and large: they need not be parsed and written
anew.  Only elements of the HTML namespace whose content is parsed as usual are taken here, so no
tag can change what the next one means.
"""

from __future__ import annotations

import re
from collections.abc import Container
from functools import lru_cache
from html import unescape

from vmkernel.kernel.policy import disarm, elements

_SPACE = "[ \t\n\r\f]"  # HTML's; \s has more, of which a browser would not think as space
_ATTRIBUTE = (
    f"{_SPACE}+(?P<name>[A-Za-z][A-Za-z-]{{0,40}})"
    "(?:=(?:\"(?P<double>[^\"<>\x00]*)\"|'(?P<single>[^'<>\x00]*)'|(?P<bare>[A-Za-z0-9_.%#-]+)))?"
)
_ATTRIBUTES = re.compile(_ATTRIBUTE)
_PLAIN = re.compile(
    "<(?P<tag>[A-Za-z][A-Za-z0-9]*)(?P<all>(?:"
    + re.sub(r"\?P<\w+>", "?:", _ATTRIBUTE)
    + f")*+){_SPACE}*+/?>"
)
_END = re.compile(f"</(?P<tag>[A-Za-z][A-Za-z0-9]*){_SPACE}*>")
_NAMES = elements.PLAIN_TAGS
_NAME = re.compile("<(/?)([A-Za-z][A-Za-z0-9-]{0,30})")
_ENDING = frozenset(
    "br img input hr col source wbr meta link base embed area track p li td th tr dt dd".split()
)
_SHORT = 256
TAG = re.compile("<[A-Za-z/!?][^>]*>?")
"""From where a tag may begin to where it ends, unless a value has a ``>``."""


def is_plain(tag: str) -> bool:
    """Whether a tag is harmless and cannot be understood in two ways."""
    return _known(tag) if len(tag) <= _SHORT else _is_plain(tag)


def _is_plain(tag: str) -> bool:
    end = _END.fullmatch(tag)
    if end is not None:
        return end["tag"].lower() in _NAMES
    begin = _PLAIN.fullmatch(tag)
    if begin is None:
        return False
    name = begin["tag"].lower()
    if name not in _NAMES:
        return False
    allowed = elements.ATTRIBUTES["*"] | elements.ATTRIBUTES.get(name, frozenset())
    for found in _ATTRIBUTES.finditer(begin["all"]):
        key = found["name"].lower()
        value = unescape(found["double"] or found["single"] or found["bare"] or "")
        if key not in allowed or key == "target":
            return False
        kept = elements.attribute(name, key, value)
        if kept is None or not _same(key, value, kept):
            return bool(kept is None and not value)
    return True


def _same(key: str, before: str, after: str) -> bool:
    if key == "style":
        return '"' not in before and "'" not in before and squeezed(before) == squeezed(after)
    return before.split() == after.split()


def squeezed(text: str) -> str:
    """Style without what is a matter of taste in it."""
    return re.sub(r"[\s;]+", "", text)


_known = lru_cache(maxsize=4096)(_is_plain)


def only_plain(text: str, also: Container[str] = ()) -> str:
    """A text in which every tag that is not plain, nor one of *also*, is broken."""
    if "<" not in text:
        return text
    return TAG.sub(
        lambda tag: tag[0] if tag[0] in also or is_plain(tag[0]) else disarm.tags(tag[0]), text
    )


def depth(text: str) -> int:
    """How many elements are open at once, at most; those that end by themselves do not count."""
    opened: dict[str, int] = {}
    now = most = 0
    for slash, tag in _NAME.findall(text):
        name = tag.lower()
        if name in _ENDING:
            continue
        if not slash:
            opened[name] = opened.get(name, 0) + 1
            now += 1
            most = max(most, now)
        elif opened.get(name):
            opened[name] -= 1
            now -= 1
    return most


def all_plain(text: str) -> bool:
    """Whether each tag in a text is plain."""
    return all(map(is_plain, set(TAG.findall(text))))
