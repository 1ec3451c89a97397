"""MIME bundles: what a display is made of, type by type, by a list of those that may be shown."""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable
from typing import Any

from vmkernel import text as terminal
from vmkernel.kernel.policy import disarm, jsontypes
from vmkernel.kernel.policy.jsontypes import RefusedError

Cleaned = tuple[Any, list[str]]

_SCRIPT_LINK = re.compile(r"(javascript|vbscript)(?=:)", re.IGNORECASE)


def plain(value: str) -> str:
    """Text that a front end shows with its colours, and in which it makes links of addresses."""
    if not terminal.is_harmless(value):
        value = terminal.TerminalFilter().feed(value)
    return without_script_links(value)


def without_script_links(value: str) -> str:
    """JupyterLab makes a link of whatever looks like an address in a text."""
    if "://" in value and _SCRIPT_LINK.search(value):
        value = _SCRIPT_LINK.sub(rf"\1{disarm.JOINER}", value)
    return value


def _html(value: Any) -> Cleaned:
    from vmkernel.kernel.policy import html  # here and below: most kernels show text alone

    return html.clean(_string(value))


def _markdown(value: Any) -> Cleaned:
    from vmkernel.kernel.policy import markdown

    return markdown.clean(_string(value)), []


def _svg(value: Any) -> Cleaned:
    from vmkernel.kernel.policy import svg

    try:
        return svg.clean(_string(value))
    except svg.NoSvgError as error:
        raise RefusedError(str(error)) from None


def _picture(signatures: tuple[bytes, ...]) -> Callable[[Any], Cleaned]:
    def clean(value: Any) -> Cleaned:
        text = _string(value)
        begin = text[:64].translate(_NO_SPACE)
        # Front ends put it into an address: base64, and nothing else.
        if not _is_base64(text):
            raise RefusedError("it is not base64")
        begin = begin[: len(begin) // 4 * 4]
        if not binascii.a2b_base64(begin).startswith(signatures):
            raise RefusedError("it is not a picture of that type")
        return text, []

    return clean


_NO_SPACE = {ord(sign): None for sign in " \t\r\n"}
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n\r"


def _is_base64(text: str) -> bool:
    return text.isascii() and not text.encode().translate(None, _BASE64)


def _json(clean: Callable[[Any], Any]) -> Callable[[Any], Cleaned]:
    return lambda value: (clean(value), [])


def _text(clean: Callable[[str], str]) -> Callable[[Any], Cleaned]:
    return lambda value: (clean(_string(value)), [])


def _string(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "".join(value)  # nbformat's lists of lines
    if not isinstance(value, str):
        raise RefusedError("it is no text")
    return value


_TYPES: dict[str, Callable[[Any], Cleaned]] = {
    "text/plain": _text(plain),
    "text/html": _html,
    "text/markdown": _markdown,
    "text/latex": _text(disarm.tex),
    "text/csv": _text(plain),
    "text/tab-separated-values": _text(plain),
    "image/png": _picture((b"\x89PNG\r\n\x1a\n",)),
    "image/jpeg": _picture((b"\xff\xd8",)),
    "image/gif": _picture((b"GIF8",)),
    "image/webp": _picture((b"RIFF",)),
    "image/bmp": _picture((b"BM",)),
    "image/svg+xml": _svg,
    "application/json": _json(jsontypes.plain),
    "application/geo+json": _json(jsontypes.geojson),
    "application/vnd.plotly.v1+json": _json(jsontypes.plotly),
    "application/vnd.jupyter.widget-view+json": _json(jsontypes.widget_view),
    "application/vnd.jupyter.stdout": _text(plain),
    "application/vnd.jupyter.stderr": _text(plain),
}
_VEGA = re.compile(r"application/vnd\.vega(?:lite)?\.v[1-9]\+json")
_OWN = re.compile(r"(?!width|height|__)[A-Za-z0-9_.-]{1,64}")
_MOST_TYPES = 64
_NAME = re.compile(r"[A-Za-z0-9!#$&^_.+/-]{1,127}")


def clean(
    data: Any, metadata: Any, *, empty_note: bool = True
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """A bundle's data and metadata as they may be shown, and kinds of things that went.

    When nothing is left of a bundle that had something, it becomes a text that says so.
    """
    kept: dict[str, Any] = {}
    removed: list[str] = []
    items = list(data.items())[:_MOST_TYPES] if isinstance(data, dict) else []
    for name, value in items:
        cleaner = _TYPES.get(name)
        if cleaner is None and isinstance(name, str) and _VEGA.fullmatch(name):
            cleaner = _json(jsontypes.vega)
        if cleaner is None:
            removed.append(said_name(name))
            continue
        try:
            kept[name], gone = cleaner(value)
            removed += gone
        except RefusedError as error:
            removed.append(f"{name} ({terminal.plain_text(str(error))[:200]})")
    if items and not kept and empty_note:
        kept["text/plain"] = f"[not shown by vmkernel: {', '.join(removed)[:500]}]"
    return kept, _metadata(metadata, kept), removed


def said_name(name: Any) -> str:
    """A type's name as it may be told to people."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    return "an output of no known type"


def _metadata(metadata: Any, kept: dict[str, Any]) -> dict[str, Any]:
    """What renderers know: sizes and backgrounds of pictures, how far JSON is unfolded."""
    if not isinstance(metadata, dict):
        return {}
    cleaned = _known(metadata)
    for name in kept:
        own = metadata.get(name)
        if isinstance(own, dict) and (known := _known(own)):
            cleaned[name] = known
    return cleaned


def _known(metadata: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key in ("width", "height"):
        size = metadata.get(key)
        if (
            isinstance(size, int | float) and not isinstance(size, bool) and 0 <= size <= 100_000
        ) or (
            isinstance(size, str) and re.fullmatch(r"\d{1,5}(?:\.\d{1,3})?(?:px|%|em|pt)?", size)
        ):
            known[key] = size
    for key in ("unconfined", "expanded", "isolated"):
        if isinstance(metadata.get(key), bool):
            known[key] = metadata[key]
    for key, value in metadata.items():  # somebody's own: what cannot be more than a number
        if key not in known and isinstance(value, bool | int | float) and _OWN.fullmatch(str(key)):
            known[key] = value
    if metadata.get("needs_background") in ("light", "dark"):
        known["needs_background"] = metadata["needs_background"]
    for key in ("root", "alt"):
        if isinstance(metadata.get(key), str):
            known[key] = disarm.tags(terminal.plain_text(metadata[key][:1000])).replace('"', "'")
    return known
