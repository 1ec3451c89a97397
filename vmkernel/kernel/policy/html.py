"""HTML that shows and cannot act: parsed and written anew by nh3 (ammonia, html5ever).

What is plain already (`tags`) stays as it is.  Style sheets do not go through nh3: they are cut
out, written anew by `css` and put first.  What the renderers of a front end do with the text is
seen to afterwards, on what nh3 wrote: MathJax looks for TeX in all HTML, and joins what stood
around tags that are gone.
"""

from __future__ import annotations

import re
from typing import Any

from vmkernel.kernel.policy import css, disarm, elements, tags
from vmkernel.kernel.policy.jsontypes import RefusedError

# Their text is no text for people.
_GONE = set(
    "script style noscript iframe object embed applet template math textarea select noembed "
    "noframes xmp plaintext title head link meta base foreignobject frameset".split()
)
_SCHEMES = {"http", "https", "mailto", "data"}

LARGEST = 2_000_000
"""Characters of HTML that is not plain: what is larger would keep the kernel busy for seconds."""
DEEPEST = 1000
"""Open elements: parsing takes time by their square."""
_PLAIN_STYLE = re.compile(r"<style(?: scoped| type=\"text/css\")?>[^<]*</style>")

# For telling people what went; nothing depends on it.
_NOTABLE = (
    ("script", re.compile(r"<script\b|\bon[a-z]{3,20}\s*+=|javascript:", re.IGNORECASE)),
    ("frames and embedded documents", re.compile(r"<(?:i?frame|object|embed)\b", re.IGNORECASE)),
    ("forms", re.compile(r"<(?:form|button|select|textarea)\b", re.IGNORECASE)),
    (
        "images and media from the network",
        re.compile(
            r"<(?:img|video|audio|source)\b[^<>]{0,300}?\bsrc\s*+=\s*+[\"']?\s*+(?:https?:)?//",
            re.IGNORECASE,
        ),
    ),
)  # fmt: skip


def clean(text: str) -> tuple[str, list[str]]:
    """The HTML that may be shown, and kinds of things that went."""
    rest = _without_plain_sheets(text)
    if rest is not None and tags.all_plain(rest):
        return disarm.tex_in_text(text), []
    if len(text) > LARGEST or tags.depth(text) > DEEPEST:
        raise RefusedError("it is too large or nested too deep to be looked into")
    import nh3

    removed = [kind for kind, pattern in _NOTABLE if pattern.search(text)]
    sheets = ""
    found, text = _style_sheets(text)
    if found:
        rules = [css.sheet(sheet) for sheet in found]
        sheets = "".join(f"<style>\n{rule}\n</style>\n" for rule in rules if rule)
    options = _options()
    text = nh3.clean(text, **options)
    for _ in range(3):  # a parser may read its own words in another way: until it does not
        again = nh3.clean(text, **options)
        if again == text:
            break
        text = again
    else:
        text = nh3.clean_text(text)
    return sheets + disarm.tex_in_text(text), removed


def _style_sheets(text: str) -> tuple[list[str], str]:
    """The style sheets of a text, and the text without them."""
    if "<style" not in text:
        return [], text
    sheets: list[str] = []
    rest: list[str] = []
    at = 0
    while (begin := text.find("<style", at)) >= 0:
        rest.append(text[at:begin])
        content = text.find(">", begin) + 1
        end = text.find("</style", content) if content else -1
        if end < 0:
            sheets.append(text[content:] if content else "")
            return sheets, "".join(rest)
        sheets.append(text[content:end])
        at = text.find(">", end) + 1
        if not at:
            return sheets, "".join(rest)
    rest.append(text[at:])
    return sheets, "".join(rest)


def _without_plain_sheets(text: str) -> str | None:
    """The text without style sheets; None when one of them must not stay as it is."""
    if "<style" not in text:
        return text
    for sheet in _style_sheets(text)[0]:
        if not set(sheet).isdisjoint("\"'<\\") or tags.squeezed(sheet) != tags.squeezed(
            css.sheet(sheet)
        ):
            return None
    return _PLAIN_STYLE.sub("", text)


def _options() -> dict[str, Any]:
    return {
        "tags": set(elements.TAGS),
        "clean_content_tags": _GONE,
        "attributes": {tag: set(names) for tag, names in elements.ATTRIBUTES.items()},
        "attribute_filter": elements.attribute,
        "url_schemes": _SCHEMES,
        "link_rel": "noopener noreferrer",
        "set_tag_attribute_values": {"input": {"type": "checkbox"}},
    }
