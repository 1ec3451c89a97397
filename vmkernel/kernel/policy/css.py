"""Style sheets and declarations that colour and lay out their own output, and nothing else.

Written anew from what fits narrow patterns: no addresses (they would carry data out), no positions
over the page, no selectors outside outputs.  What does not fit is left out; a front end does the
same with what it does not know.
"""

from __future__ import annotations

import re

_PROPERTY = re.compile(
    r"(?:background(?:-(?:clip|color|image|origin|position|repeat|size))?|color(?:-scheme)?|opacity"
    r"|border(?:-[a-z-]+)?|padding(?:-[a-z-]+)?|margin(?:-[a-z-]+)?|outline(?:-[a-z]+)?"
    r"|(?:min-|max-)?(?:width|height|inline-size|block-size)|box-sizing|aspect-ratio"
    r"|font(?:-[a-z-]+)?|line-height|letter-spacing|text-[a-z-]+|vertical-align|white-space"
    r"|word-[a-z]+|overflow(?:-[a-z]+)?|direction|unicode-bidi|hyphens|tab-size|quotes|content"
    r"|display|float|clear|visibility|list-style(?:-[a-z]+)?|table-layout|caption-side|empty-cells"
    r"|flex(?:-[a-z]+)?|grid(?:-[a-z-]+)?|align-[a-z]+|justify-[a-z]+|place-[a-z]+|order"
    r"|(?:row-|column-)?gap|columns?(?:-[a-z-]+)?|cursor|user-select|pointer-events|z-index"
    r"|position|top|left|right|bottom|inset(?:-[a-z-]+)?|transform(?:-origin)?"
    r"|fill(?:-[a-z]+)?|stroke(?:-[a-z]+)?|stop-[a-z]+|clip-rule|paint-order|shape-rendering"
    r"|dominant-baseline|text-anchor|--(?!jp-)[A-Za-z0-9_-]+)"
)
_FUNCTIONS = frozenset(
    "rgb rgba hsl hsla hwb lab lch oklab oklch color-mix linear-gradient radial-gradient "
    "conic-gradient repeating-linear-gradient repeating-radial-gradient calc min max clamp var "
    "minmax repeat fit-content light-dark counter rotate".split()
)
# No two of its alternatives begin alike, nor do two starts of _FUNCTION see the same text: a guest
# writes what these patterns search, and one that goes back and forth would stop the kernel.
_VALUE = re.compile(
    r"""(?:[A-Za-z0-9_ .,%#()+*/!:\u0080-\U0010ffff-]++|"[^"\\<>{};\n]*+"|'[^'\\<>{};\n]*+')++"""
)
_FUNCTION = re.compile(r"(?<![A-Za-z0-9_-])([A-Za-z0-9_-]*+)\(")
_STICKY = ("top", "left", "right", "bottom", "inset")
_MOST_RULES = 5000
_COMMENT = re.compile(r"/\*.*?(?:\*/|\Z)", re.DOTALL)
_SELECTOR = re.compile(r"[A-Za-z0-9_\s.#:>+~*()-]+")
# What outputs are known to be styled by: pandas, its Styler, scikit-learn, pygments, xarray, dask.
_OWN = re.compile(r"(?:#T_|#sk-|\.sk-|\.dataframe\b|\.highlight\b|\.xr-|\.dask-)")
_FOREIGN = re.compile(r"[.#](?:jp-|lm-|p-|jupyter|cm-|CodeMirror|monaco)")
SCOPE = ".jp-RenderedHTMLCommon "
"""Before a selector of which nothing is known: JupyterLab's class of HTML outputs."""
_CONDITION = re.compile(r"@media [A-Za-z0-9 ():,.-]+")


def declarations(text: str) -> str:
    """What may stay of the declarations of a ``style`` attribute or of a rule."""
    kept: dict[str, str] = {}
    for piece in _COMMENT.sub(" ", text).split(";"):
        name, _, value = piece.partition(":")
        name, value = name.strip(), " ".join(value.split())
        if not name.startswith("--"):
            name = name.lower()
        if value and _PROPERTY.fullmatch(name) and _is_harmless(name, value):
            kept.pop(name, None)
            kept[name] = value
    if "sticky" not in kept.get("position", ""):  # from elsewhere they would move it over others
        kept = {key: kept[key] for key in kept if not key.startswith(_STICKY)}
    return "; ".join(f"{name}: {value}" for name, value in kept.items())


def _is_harmless(name: str, value: str) -> bool:
    if len(value) > 2000 or not _VALUE.fullmatch(value) or not _balanced(value):
        return False
    lower = value.lower()
    if any((found or "") not in (*_FUNCTIONS, "") for found in _FUNCTION.findall(lower)):
        return False
    if name == "position":
        return lower.removesuffix("!important").strip() in ("static", "relative", "sticky")
    if name == "z-index":
        lower = lower.removesuffix("!important").strip()
        return re.fullmatch(r"-?\d", lower) is not None
    if name == "transform":
        return lower.startswith(("rotate(", "none"))
    if name.startswith(("margin", "inset", *_STICKY)):
        return "-" not in lower and "(" not in lower  # nor out of the output's own place
    return True


def _balanced(value: str) -> bool:
    depth = 0
    for sign in re.sub(r"\"[^\"]*\"|'[^']*'", "", value):
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            return False
    return depth == 0


def without_comments(text: str) -> str:
    """CSS without its comments."""
    return _COMMENT.sub(" ", text)


def sheet(text: str) -> str:
    """What may stay of a style sheet."""
    return "\n".join(_rules(without_comments(text), nested=False))


def _rules(text: str, nested: bool) -> list[str]:
    rules: list[str] = []
    at = 0
    while len(rules) < _MOST_RULES:
        begin = text.find("{", at)
        if begin < 0:
            return rules
        head = text[at:begin].rpartition(";")[2].rpartition("}")[2].strip()
        end = _block_end(text, begin)
        body = text[begin + 1 : end]
        at = end + 1
        if head.startswith("@"):
            head = " ".join(head.split())
            if not nested and _CONDITION.fullmatch(head) and _balanced(head):
                inner = "\n".join(_rules(body, nested=True))
                if inner:
                    rules.append(f"{head} {{\n{inner}\n}}")
            continue
        selectors = _selectors(head)
        kept = declarations(body) if "{" not in body else ""
        if selectors and kept:
            rules.append(f"{selectors} {{ {kept}; }}")
    return rules


def _block_end(text: str, begin: int) -> int:
    depth = 0
    for match in re.compile("[{}]").finditer(text, begin):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _selectors(text: str) -> str:
    kept = []
    for selector in text.split(","):
        selector = " ".join(selector.split())
        if (
            selector.startswith(SCOPE)
            and _SELECTOR.fullmatch(selector.removeprefix(SCOPE))
            and not _FOREIGN.search(selector.removeprefix(SCOPE))
            and _balanced(selector)
        ):
            kept.append(selector)
        elif (
            _SELECTOR.fullmatch(selector) and not _FOREIGN.search(selector) and _balanced(selector)
        ):
            kept.append(selector if _OWN.match(selector) else SCOPE + selector)
    return ", ".join(kept)
