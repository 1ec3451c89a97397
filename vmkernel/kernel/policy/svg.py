"""SVG pictures, read by expat and written anew from what is known to be only drawn.

JupyterLab shows them in an <img>, where no script runs; VS Code and nbconvert put them into the
page.  So scripts, event handlers, foreign objects, animations (they can change an address after it
was checked), documents from elsewhere and whatever is not SVG are left out.
"""

from __future__ import annotations

import re
from xml.parsers import expat

from vmkernel.kernel.policy import css, elements

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_XML = "http://www.w3.org/XML/1998/namespace"
_ELEMENTS = frozenset(
    "svg g defs symbol use path rect circle ellipse line polyline polygon text tspan textPath "
    "title desc clipPath mask pattern linearGradient radialGradient stop marker image a style "
    "switch filter feGaussianBlur "
    "feOffset feBlend feColorMatrix feComposite feFlood feMerge feMergeNode "
    "feMorphology feComponentTransfer feFuncR feFuncG feFuncB feFuncA feDropShadow".split()
)
_ATTRIBUTE = re.compile(
    r"(?:id|class|d|x|y|[xy][12]|c[xy]|f[xyr]|r|r[xy]|d[xy]|points|width|height|viewBox|version|"
    r"transform|preserveAspectRatio|overflow|display|visibility|opacity|color|cursor|direction|"
    r"(?:fill|stroke|stop|font|text|letter|word|marker|clip|mask|flood|color|dominant|alignment|"
    r"baseline|shape|image|paint|vector|writing|glyph|pointer)-[a-z-]+|fill|stroke|mask|filter|"
    r"offset|gradientUnits|gradientTransform|spreadMethod|clipPathUnits|maskUnits|"
    r"maskContentUnits|patternUnits|patternContentUnits|patternTransform|markerUnits|markerWidth|"
    r"markerHeight|refX|refY|orient|rotate|textLength|lengthAdjust|startOffset|method|spacing|"
    r"in|in2|result|mode|values|type|operator|k[1-4]|stdDeviation|filterUnits|primitiveUnits|"
    r"radius|tableValues|slope|intercept|amplitude|exponent|role|aria-[a-z]+|lang|space)"
)
_STYLES = re.compile(
    r"(?:fill|stroke|stop|font|text|letter|word|marker|clip|flood|dominant|alignment|baseline|"
    r"shape|paint|vector)(?:-[a-z-]+)?|opacity|color|display|visibility|white-space|mask|filter|"
    r"overflow|isolation|mix-blend-mode|line-height"
)
_LOCAL = re.compile(r"url\(\s*['\"]?#[A-Za-z0-9_.:-]+['\"]?\s*\)")
_VALUE = re.compile(r"[A-Za-z0-9_\s.,%#()+*/!:'\"-]*")
_FUNCTIONS = re.compile(r"(?<![A-Za-z-])([A-Za-z-]*+)\(")
_HARMLESS_FUNCTIONS = frozenset(
    "rgb rgba hsl hsla calc matrix translate scale rotate skewx skewy var".split()
) | {""}
_SELECTOR = re.compile(r"[.#]?[A-Za-z][A-Za-z0-9_-]*(?:\s+[.#]?[A-Za-z][A-Za-z0-9_-]*)*")
_FOR_ALL = re.compile(r"stroke-line(?:join|cap)")
_RASTER = re.compile(
    r"\s*data:image/(?:png|jpe?g|gif|webp);base64,[A-Za-z0-9+/=\s]*", re.IGNORECASE
)
_ROOT = re.compile(r"<svg\b[^>]*")
_DEEPEST = 200
_MOST_RULES = 5000


class NoSvgError(ValueError):
    """It is no SVG, or one that nobody should read."""


def clean(text: str) -> tuple[str, list[str]]:
    """The picture that may be shown, and kinds of things that went.  Raises NoSvgError."""
    root = _ROOT.search(text)
    if root is not None and "xmlns=" not in root[0]:  # front ends help such a picture, too
        xlink = "" if "xmlns:xlink=" in root[0] else f' xmlns:xlink="{_XLINK}"'
        at = root.start() + len("<svg")
        text = f'{text[:at]} xmlns="{_SVG}"{xlink}{text[at:]}'
    writer = _Writer()
    parser = expat.ParserCreate("utf-8", " ")
    parser.buffer_text = True
    parser.ordered_attributes = True
    parser.StartElementHandler = writer.start
    parser.EndElementHandler = writer.end
    parser.CharacterDataHandler = writer.text
    parser.EntityDeclHandler = writer.entity
    try:
        parser.Parse(text.strip().encode("utf-8", "replace"), True)
    except expat.ExpatError as error:
        raise NoSvgError(str(error)) from None
    if not writer.out:
        raise NoSvgError("nothing of it can be shown")
    return "".join(writer.out), sorted(writer.removed)


class _Writer:
    """Writes the elements that expat reads, less what must not be there."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.removed: set[str] = set()
        self._open: list[str] = []
        self._skipped = 0
        """How deep within an element that is left out, with all in it"""
        self._style: list[str] | None = None

    def entity(self, *_: object) -> None:
        raise NoSvgError("it declares entities")

    def start(self, full_name: str, attributes: list[str]) -> None:
        namespace, _, name = full_name.rpartition(" ")
        wrong_root = not self._open and not self._skipped and (name != "svg" or bool(self.out))
        inside_text = bool(self._open) and self._open[-1] in ("title", "desc", "style")
        if (
            self._skipped
            or namespace != _SVG
            or name not in _ELEMENTS
            or wrong_root
            or inside_text
            or len(self._open) >= _DEEPEST
        ):
            if not self._skipped and name in ("script", "foreignObject", "handler", "iframe"):
                self.removed.add("script")
            self._skipped += 1
            return
        if name == "style":
            self._style = []
            self._open.append(name)
            return
        pairs = []
        for key, value in zip(attributes[::2], attributes[1::2], strict=True):
            kept = self._attribute(name, key, value)
            if kept is not None:
                pairs.append(kept)
        if not self._open:
            pairs = [f'xmlns="{_SVG}"', f'xmlns:xlink="{_XLINK}"', *pairs]
        self._open.append(name)
        self.out.append(f"<{' '.join([name, *pairs])}>")

    def end(self, _name: str) -> None:
        if self._skipped:
            self._skipped -= 1
            return
        name = self._open.pop()
        if name == "style":
            rules = _sheet("".join(self._style or []))
            self._style = None
            if rules:
                self.out.append(f'<style type="text/css">{rules}</style>')
            return
        self.out.append(f"</{name}>")

    def text(self, data: str) -> None:
        if self._skipped or not self._open:
            return
        if self._style is not None:
            self._style.append(data)
        else:
            self.out.append(_escape(data))

    def _attribute(self, element: str, full_name: str, value: str) -> str | None:
        namespace, _, name = full_name.rpartition(" ")
        if name == "href" and namespace in ("", _XLINK):
            if element == "image":
                harmless = _RASTER.fullmatch(value) is not None
            elif element == "a":
                harmless = re.match(r"(?:https?://|mailto:|#)", value) is not None
            else:
                harmless = re.fullmatch(r"#[A-Za-z0-9_.:-]+", value) is not None
            if not harmless:
                self.removed.add("addresses in a picture")
                return None
            return f"{'xlink:' if namespace else ''}href={_quoted(value)}"
        if namespace == _XML and name in ("space", "lang"):
            return f"xml:{name}={_quoted(value)}"
        if namespace:
            return None
        if name == "style":
            kept = _declarations(value)
            return f"style={_quoted(kept)}" if kept else None
        if name.lower().startswith("on"):
            self.removed.add("script")
            return None
        if not _ATTRIBUTE.fullmatch(name) or (name == "class" and elements.is_foreign(value)):
            return None
        if name == "id" and elements.is_foreign(value):
            return None
        if not _harmless(value):
            return None
        return f"{name}={_quoted(value)}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _quoted(text: str) -> str:
    text = _escape(text).replace('"', "&quot;")
    return '"' + text.replace("\n", "&#10;").replace("\t", "&#9;").replace("\r", "&#13;") + '"'


def _harmless(value: str) -> bool:
    """Whether a value names nothing outside the picture."""
    rest = _LOCAL.sub("", value)
    return all(found.lower() in _HARMLESS_FUNCTIONS for found in _FUNCTIONS.findall(rest)) and (
        "\\" not in rest and "javascript:" not in rest.lower()
    )


def _declarations(text: str, allowed: re.Pattern[str] = _STYLES) -> str:
    kept = []
    for piece in text.split(";"):
        name, _, value = piece.partition(":")
        name, value = name.strip().lower(), " ".join(value.split())
        rest = _LOCAL.sub("", value)
        if (
            allowed.fullmatch(name)
            and value
            and _VALUE.fullmatch(rest)
            and rest.count("(") == rest.count(")")
            and rest.count("'") % 2 == 0 == rest.count('"') % 2
            and _harmless(value)
        ):
            kept.append(f"{name}: {value}")
    return "; ".join(kept)


def _sheet(text: str) -> str:
    """Rules for the picture's own elements; ``*`` as matplotlib writes it, to join lines."""
    rules = []
    text = css.without_comments(text)
    for rule in text.split("}")[:_MOST_RULES]:
        head, brace, body = rule.rpartition("{")
        if not brace or "{" in head:
            continue
        names = [" ".join(name.split()) for name in head.split(",")]
        if names == ["*"]:
            kept = _declarations(body, _FOR_ALL)
        else:
            names = [n for n in names if _SELECTOR.fullmatch(n) and not elements.is_foreign(n)]
            kept = _declarations(body) if names else ""
        if kept:
            rules.append(f"{', '.join(names)}{{{kept}}}")
    return "".join(rules)
