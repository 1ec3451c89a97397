"""Text that a front end gives to a renderer: what would be more than text there is broken.

What is broken gets an invisible character (U+2060, word joiner) where it would begin to mean
something: ``<script>`` is no tag for any HTML parser when its ``<`` is not followed by a letter,
and looks the same, in code, too.  So no renderer's idea of what is code need be known here.
"""

from __future__ import annotations

import re

JOINER = "\u2060"

_TAG = re.compile(r"<(?=[A-Za-z/!?])")
# What makes links, attributes, styles or loads code in MathJax 2 to 4 and in KaTeX, with the names
# by which these could be reached otherwise.  A link to the web is left.
_TEX = re.compile(
    r"\\(?=(?:url|class|cssId|style|data|html[A-Za-z]*|mmlToken|require|setOptions|csname|"
    r"includegraphics|catcode|special)(?![A-Za-z])"
    r"|href(?![A-Za-z])(?!\s*\{\s*https?://[^{}\\\s%$\"'<>]*\})"
    r"|unicode\s*\["
    r"|bbox\s*\[(?![\w\s#.,%-]*\]))"
)
_MATH = re.compile(r"\$|\\[(\[]|\\begin\b", re.IGNORECASE)


def tags(text: str) -> str:
    """Text in which nothing can be an HTML tag, comment or declaration."""
    return _TAG.sub("<" + JOINER, text) if "<" in text else text


def tex(text: str) -> str:
    """TeX that can do nothing but typeset."""
    return _TEX.sub("\\\\" + JOINER, text) if "\\" in text else text


def has_math(text: str) -> bool:
    """Whether a front end may look for TeX in it."""
    return _MATH.search(text) is not None


def tex_in_text(text: str) -> str:
    """As `tex`, for text in which TeX stands between ``$`` or the like, if there is any."""
    return tex(text) if "\\" in text and has_math(text) else text
