"""The HTML elements and attributes that may be shown, and what may stand in an attribute.

Left out, and why: frames and objects are documents of their own; forms ask for what people
would give to their notebook; ids, names and classes of the front end's own would be taken for
it (DOM clobbering), and `data-` attributes run JupyterLab's commands; addresses that a browser
loads by itself would carry data out of a guest that has no network.
"""

from __future__ import annotations

import re

from vmkernel.kernel.policy import css

_TEXT = (
    "a abbr address article aside b bdi bdo blockquote br caption center cite code col colgroup dd "
    "del details dfn div dl dt em figcaption figure font footer h1 h2 h3 h4 h5 h6 header hr i ins "
    "kbd label li main mark meter nav ol p pre progress q rp rt ruby s samp section small span "
    "strike strong sub summary sup table tbody td tfoot th thead time tr tt u ul var"
)
_MEDIA = "img audio video source"
# No title, desc, foreignObject or style: where HTML begins again inside SVG, parsers have differed.
_SVG = "svg g path circle ellipse line polyline polygon rect text tspan"
_OTHER = "input"  # only check boxes, which unfold scikit-learn's and xarray's displays
TAGS = frozenset(f"{_TEXT} {_MEDIA} {_SVG} {_OTHER}".split())
PLAIN_TAGS = frozenset(f"{_TEXT} {_MEDIA}".split()) - {"wbr"}
"""Those of HTML's namespace whose content is parsed as usual."""
_ON_ALL = "align bgcolor border class color dir face height hidden id lang nowrap size span style "
ATTRIBUTES: dict[str, frozenset[str]] = {
    "*": frozenset(
        (_ON_ALL + "title valign width aria-hidden aria-label aria-describedby role").split()
    ),
    "a": frozenset({"href", "target", "download"}),
    "audio": frozenset("src controls autoplay loop muted preload".split()),
    "video": frozenset("src controls autoplay loop muted preload poster playsinline".split()),
    "source": frozenset({"src", "type"}),
    "img": frozenset({"src", "alt"}),
    "blockquote": frozenset(),
    "td": frozenset({"colspan", "rowspan", "headers", "scope"}),
    # halign is no attribute of HTML's, but pandas writes it
    "th": frozenset({"colspan", "rowspan", "headers", "scope", "abbr", "halign"}),
    "table": frozenset({"cellpadding", "cellspacing", "frame", "rules", "summary"}),
    "col": frozenset({"span"}),
    "ol": frozenset({"start", "type", "reversed"}),
    "li": frozenset({"value"}),
    "details": frozenset({"open"}),
    "input": frozenset({"checked", "disabled"}),
    "label": frozenset({"for"}),
    "meter": frozenset("value min max low high optimum".split()),
    "progress": frozenset({"value", "max"}),
    "time": frozenset({"datetime"}),
} | {
    name: frozenset(
        "viewBox x y x1 y1 x2 y2 cx cy r rx ry d points transform fill stroke stroke-width "
        "stroke-linecap stroke-linejoin stroke-dasharray stroke-miterlimit fill-opacity "
        "stroke-opacity fill-rule opacity text-anchor font-size font-family font-weight dx dy "
        "dominant-baseline preserveAspectRatio version".split()
    )
    for name in _SVG.split()
}
# Raster images and media; an SVG in <img> runs no script and loads nothing.
_IMAGE = re.compile(
    r"data:image/(?:png|jpe?g|gif|webp|bmp|avif|svg\+xml)(?:;charset=[\w-]+|;utf8)?[;,]",
    re.IGNORECASE,
)
_SOUND = re.compile(r"data:(?:audio|video)/[\w.+-]+(?:;codecs=[\w.,-]+)?;base64,", re.IGNORECASE)
# A first part that is no scheme and no host, as a file's name may be: with blanks, in any script.
_RELATIVE = re.compile(r"(?:#|[\w.~%][\w .~%(),+@&!'-]*(?:[/?#]|\Z))[^:\\]*")
_DOWNLOAD = re.compile(r"[\w(][\w .()+-]{0,100}")
_LINK = re.compile(r"(?:https?://|mailto:)", re.IGNORECASE)
# Ids make names of the page's script (DOM clobbering); these belong to displays that need them.
_ID = re.compile(r"(?:T_|sk-|section-|fn|footnote)[A-Za-z0-9_-]{0,200}")
# What belongs to the front end's own interface, and has behaviour there.
_FOREIGN_CLASS = re.compile(
    r"(?:jp-|lm-|p-|jupyter|cm-|CodeMirror|monaco|MathJax|mjx|widget|modal|fa-spin|sidebar)",
    re.IGNORECASE,
)


def attribute(tag: str, name: str, value: str) -> str | None:
    """What may stay of an attribute that the tag may have; None for nothing."""
    if name == "class":
        return " ".join(word for word in value.split() if not is_foreign(word)) or None
    if name == "style":
        return css.declarations(value) or None
    if name in ("id", "for"):
        return value if _ID.fullmatch(value) else None
    if name == "href":
        return value if is_link(value) else None
    if name == "download":  # what a person clicks on is saved, not opened in the front end
        return value if _DOWNLOAD.fullmatch(value) else ""
    if name == "target":
        return "_blank" if value == "_blank" else None
    if name in ("src", "poster"):
        wanted = _SOUND if tag in ("audio", "video", "source") and name == "src" else _IMAGE
        return value if wanted.match(value[:100]) else None
    if tag == "input" and name == "type":
        return "checkbox"
    if "(" in value and "url(" in value.lower():  # SVG's paints
        return None
    return value


def is_foreign(names: str) -> bool:
    """Whether one of these classes, ids or selectors is of the front end's own interface."""
    return any(_FOREIGN_CLASS.match(name.lstrip(".#")) for name in names.split())


def is_link(value: str) -> bool:
    """Whether an address may be offered to click on: of the web, or below the page."""
    value = value.strip()
    return bool(_LINK.match(value) or _RELATIVE.fullmatch(value) or not value)
