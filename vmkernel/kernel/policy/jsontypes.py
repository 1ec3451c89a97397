"""Displays that are JSON for a renderer of the front end: maps, Vega charts, plotly figures.

Each is walked as a whole: what renderers load from elsewhere, run or take as HTML goes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from vmkernel.kernel.policy import disarm

DEEPEST = 100
"""Levels of nesting; a renderer's own recursion ends not far behind."""

Json = Any
Change = Callable[[str, Any], Any]


class RefusedError(ValueError):
    """It holds what cannot be taken out of it: why, for people."""


def walk(value: Json, change: Change, key: str = "", depth: int = 0) -> Json:
    """A copy in which ``change(key, value)`` has seen each value; what it returns is walked.

    ``key`` is that of the nearest object.  Raises RefusedError when it is nested too deep.
    """
    if depth > DEEPEST:
        raise RefusedError("it is nested too deep")
    value = change(key, value)
    if isinstance(value, dict):
        copy = {}
        for name, item in value.items():
            if name == "__proto__":  # in JavaScript it would be what all objects inherit
                continue
            changed = walk(item, change, str(name), depth + 1)
            if changed is not DROP:
                copy[str(name)] = changed
        return copy
    if isinstance(value, list | tuple):
        walked = (walk(item, change, key, depth + 1) for item in value)
        return [item for item in walked if item is not DROP]
    return value


DROP = object()
"""Returned by a change: the value goes."""


def plain(value: Json) -> Json:
    """JSON for a tree view: nothing in it means anything.  Raises RefusedError (depth)."""
    return walk(value, lambda _, item: item)


def geojson(value: Json) -> Json:
    """A map's shapes: JupyterLab's viewer makes HTML of the properties."""
    return walk(
        _object(value), lambda _, item: disarm.tags(item) if isinstance(item, str) else item
    )


_ADDRESS = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*:)?//|\s*(?:https?|file|ftp|blob|javascript):")
# What expressions of Vega have been broken out with, and what no chart needs.
_ESCAPE = re.compile(
    r"\b(?:constructor|prototype|__proto__|toString|toJSON|valueOf|globalThis|setTimeout|"
    r"setInterval|lassoAppend|vlSelectionTuples|setdata|__define[A-Za-z]*+__|__lookup[A-Za-z]*+__|"
    r"ownerDocument|defaultView|parentNode|currentTarget|contextView)\b"
    # Words that people use, too: only where something is called or taken of them
    r"|\b(?:eval|Function|window|document|dataflow|import|fetch|self|top|parent)\s*+[.(\[]"
    r"|\.\s*+(?:eval|Function|dataflow|__)\b|\bevent\s*+\.\s*+(?:view|item|dataflow)\b"
    r"|\\[xu]"  # a letter written so that this list would not find its word
)
# An event leads to the page: expressions get of it what charts use, and never as a whole.
_EVENT = re.compile(
    r"\bevent\b(?!\s*+\.\s*+(?:(?:shift|alt|ctrl|meta)Key|key|code|type|buttons?|which|x|y|"
    r"(?:client|page|offset|screen|movement|delta)[XY]|deltaMode|wheelDelta|touches|"
    r"changedTouches)\b)"
)
_EXPRESSIONS = frozenset(
    "expr signal update init test filter calculate events on between clear toggle zoom translate "
    "markname react force".split()
)
_DATA = frozenset({"values", "datasets"})


def vega(value: Json) -> Json:
    """A Vega or Vega-Lite specification without what is loaded, and options for vega-embed.

    Raises RefusedError: a mark that shows pictures (their addresses are computed), data from
    elsewhere, or an expression with words that only an attack has.
    """

    def change(key: str, item: Any) -> Any:
        if key == "usermeta":
            return DROP
        if key in _DATA and isinstance(item, list | dict | str):
            return _Opaque(walk(item, _row))
        if item == "image" and key not in ("description", "title", "text"):
            raise RefusedError("it shows pictures from computed addresses")
        if key == "url" and not (isinstance(item, str) and item.startswith("data:")):
            raise RefusedError("it loads data or pictures from elsewhere")
        if isinstance(item, str) and _ESCAPE.search(item) and key not in ("description", "$schema"):
            raise RefusedError("an expression in it has words of the page's script")
        expression = key in _EXPRESSIONS or key.endswith("Expr")
        if expression and isinstance(item, str) and _EVENT.search(item):
            raise RefusedError("an expression in it takes more of an event than charts need")
        if key == "href" and isinstance(item, str) and not re.match(r"https?://", item):
            return DROP
        if isinstance(item, dict) and not _ESCAPE_KEYS.isdisjoint(item):
            raise RefusedError("it has names of the page's script")
        return item

    def unwrap(_: str, item: Any) -> Any:
        return item.value if isinstance(item, _Opaque) else item

    return walk(walk(_object(value), change), unwrap)


def _row(key: str, item: Any) -> Any:
    """Data mean nothing, but a tooltip shows a field of this name as a picture."""
    return DROP if key == "image" and isinstance(item, str) else item


_ESCAPE_KEYS = frozenset("constructor prototype __proto__ toString valueOf toJSON".split())


class _Opaque:
    def __init__(self, value: Any) -> None:
        self.value = value


_PLOTLY_CONFIG = frozenset(
    "responsive displayModeBar displaylogo scrollZoom staticPlot doubleClick showTips "
    "showAxisRangeEntryBoxes showAxisDragHandles autosizable fillFrame frameMargins locale".split()
)
_PLOTLY_LOADED = frozenset(
    "source sourceattribution url src geojson topojsonurl plotlyserverurl basemap".split()
)


def plotly(value: Json) -> Json:
    """A plotly figure: data, layout, frames and what of its configuration is only looks."""
    figure = _object(value)
    kept: dict[str, Any] = {
        name: figure[name] for name in ("data", "layout", "frames") if name in figure
    }
    config = figure.get("config")
    if isinstance(config, dict):
        kept["config"] = {
            name: config[name]
            for name in sorted(_PLOTLY_CONFIG & config.keys())
            if isinstance(config[name], bool | int | float | str)
        }

    def change(key: str, item: Any) -> Any:
        if not isinstance(item, str):
            return item
        name = key.lower()
        if (name in _PLOTLY_LOADED or ("://" in item[:64] and name in ("style", "tiles"))) and (
            _ADDRESS.match(item) or item.startswith("data:image/svg")
        ):
            return DROP
        # Plotly knows some tags in texts; those that are plain stay.
        return _texts(item) if "<" in item else item

    return walk(kept, change)


def _texts(text: str) -> str:
    from vmkernel.kernel.policy import tags

    if "javascript:" in text.lower():
        return disarm.tags(text)
    # <extra> is plotly's own: the part of a hover text that stands in a box of its own
    return tags.only_plain(text, ("<extra>", "</extra>"))


def widget_view(value: Json) -> Json:
    """The reference to a widget's model."""
    view = _object(value)
    model_id = view.get("model_id")
    if not isinstance(model_id, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", model_id):
        raise RefusedError("it names no model")
    return {
        "version_major": view.get("version_major")
        if isinstance(view.get("version_major"), int)
        else 2,
        "version_minor": view.get("version_minor")
        if isinstance(view.get("version_minor"), int)
        else 0,
        "model_id": model_id,
    }


def _object(value: Json) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RefusedError("it is no JSON object")
    return value
