"""Markdown of which no renderer gets more than formatted text, links and inline pictures.

Front ends parse Markdown each in its own way (marked, markdown-it, mistune) and JupyterLab puts
mathematics back *after* parsing, so nothing here trusts an idea of what is code, a link or a
formula.  Wherever any reading could give a tag, a link or an attribute, it is plain and harmless,
or broken by an invisible character (`disarm`), which leaves code readable.
"""

from __future__ import annotations

import re
from html import unescape

from vmkernel.kernel.policy import disarm, elements, tags
from vmkernel.kernel.policy.disarm import JOINER

_MAYBE_TAG = re.compile("<(?=[A-Za-z/!?])[^<>\n]*>?")
# A formula or a code span must not begin within a tag that is kept, nor a placeholder of one.
_ODD_IN_TAG = frozenset("&$\\`@{}\n")
_AUTOLINK = re.compile(
    r"<(?:https?://[A-Za-z0-9_.~:/?#!*+,;=%-]+|[A-Za-z0-9_.+-]+@[A-Za-z0-9.-]+)>", re.IGNORECASE
)
_PICTURE = re.compile(
    r"!\[[^\[\]()<>\"'$\\@`\n]*\]\(data:image/(?:png|jpe?g|gif|webp);base64,[A-Za-z0-9+/=]+\)"
)
# Where an address may begin: after ``](`` and ``]:``, over quote and list marks of a next line.
_BEFORE_ADDRESS = re.compile(r"\][ \t\r\n]{0,9}[(:][\s<>*+|-]*")
_LONGEST_SCHEME = 300
_MOST_ADDRESSES = 4000
"""Half as many are looked at; those that come after do not link."""
# What would be an attribute, were it within a tag: JupyterLab puts formulas, quotes and all, back
# into titles.  Only where there may be formulas: elsewhere it is code that people copy.
_ATTRIBUTE = re.compile(
    r"(?<![\w-])(on[a-z]++|data-[a-z-]++|style|href|src|srcset|srcdoc|action|formaction|class|id|name|is)(?=\s*+=)",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """The Markdown that may be shown."""
    math = disarm.has_math(text)
    parts: list[str] = []
    at = 0
    for match in _MAYBE_TAG.finditer(text):
        tag = match[0]
        parts.append(_between(text[at : match.start()], math))
        at = match.end()
        if _AUTOLINK.fullmatch(tag) or (_ODD_IN_TAG.isdisjoint(tag) and tags.is_plain(tag)):
            parts.append(tag)
        else:
            parts.append("<" + JOINER + _between(tag[1:], math))
    parts.append(_between(text[at:], math))
    cleaned = _links("".join(parts))
    return disarm.tex(cleaned) if math else cleaned


def _between(text: str, math: bool) -> str:
    if math and "=" in text:
        text = _ATTRIBUTE.sub(rf"\1{JOINER}", text)
    return text


def _links(text: str) -> str:
    """Break pictures that are not in the text itself, and addresses that are not of the web."""
    if "![" in text:
        text = _outside(_PICTURE, text)
    if "]" not in text:
        return text
    parts: list[str] = []
    at = 0
    for match in _BEFORE_ADDRESS.finditer(text):
        parts.append(text[at : match.end()])
        at = match.end()
        if len(parts) > _MOST_ADDRESSES:
            parts.append(JOINER)
            continue
        before = text[match.start() - 4096 if match.start() > 4096 else 0 : match.start()]
        if not _may_be_address(text[at : at + _LONGEST_SCHEME]) and not _is_picture(
            before, text, at
        ):
            parts.append(JOINER)
    parts.append(text[at:])
    return "".join(parts)


def _outside(keep: re.Pattern[str], text: str) -> str:
    parts: list[str] = []
    at = 0
    for match in keep.finditer(text):
        parts += [text[at : match.start()].replace("![", f"!{JOINER}["), match[0]]
        at = match.end()
    parts.append(text[at:].replace("![", f"!{JOINER}["))
    return "".join(parts)


def _is_picture(before: str, text: str, at: int) -> bool:
    """Whether this address is that of a picture that is kept."""
    begin = before.rfind("![")
    return begin >= 0 and _PICTURE.match(text, at - (len(before) - begin) - 2) is not None


def _may_be_address(text: str) -> bool:
    """Whether what stands here is no address, or one that people may click on."""
    for _ in range(8):
        decoded = unescape(text)
        if decoded == text:
            break
        text = decoded
    else:
        return False
    text = re.sub(r"[\x00-\x20\x7f-\xa0\\]", "", text)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if scheme is not None:
        return elements.is_link(text) and scheme[1].lower() in ("http", "https", "mailto")
    return not text.startswith(("/", "?"))
