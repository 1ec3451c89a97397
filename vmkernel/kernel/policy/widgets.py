"""Comms: only of the core widgets, and of these only what their views do not run or load.

The views are those of @jupyter-widgets/base 6, controls 5 and output 6 (ipywidgets 8); what they
put into the page as HTML are the values of HTML and HTMLMath, and descriptions that allow it; Label
and descriptions are searched for TeX.  Every other package of widgets is code of somebody's, and
anywidget's is even in the state.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from vmkernel.kernel.policy import disarm, elements, html, jsontypes, tags
from vmkernel.kernel.policy.jsontypes import RefusedError

TARGET = "jupyter.widget"
CONTROL = "jupyter.widget.control"
_MODULES = frozenset(
    {"@jupyter-widgets/base", "@jupyter-widgets/controls", "@jupyter-widgets/output"}
)
# What a loader may make an address of (nbconvert's takes packages from a CDN by name and version).
_VERSION = re.compile(r"[\^~]?\d{1,3}(?:\.(?:\d{1,3}|\*)){0,2}|\*")
_CLASS = re.compile(r"[A-Z][A-Za-z]{0,60}(?:Model|View)")
_ID = re.compile(r"(?!__)[A-Za-z0-9_-]{1,128}")
_LOADED = re.compile(r"url|image|src|element|expression|\\", re.IGNORECASE)
_MOST_COMMS = 65_536
"""Comms whose kind is known; of those before, each value is taken for HTML."""
# Kinds of comms that are no model's class; "" stands for what is not known.
_REFUSED = "?"
_FOREIGN = "*"
_ASKED = "+"
_HTML_MODELS = frozenset({"HTMLModel", "HTMLMathModel"})
_HTML_VIEWS = frozenset({"HTMLView", "HTMLMathView"})
_TEXTS = frozenset({"description", "description_tooltip", "tooltip"})
_LINKS = frozenset({"LinkModel", "DirectionalLinkModel"})
_LINKED = frozenset(
    "value index min max step disabled selected_index continuous_update interval playing "
    "_playing repeat visible lower upper".split()
)
_UNLINKED = _HTML_MODELS | {"OutputModel", *_LINKS}
_WRITTEN = frozenset(
    "TextModel TextareaModel PasswordModel ComboboxModel TagsInputModel LabelModel".split()
)
"""Models whose value is a text as somebody wrote it."""
_SHOWN = frozenset(
    "_options_labels titles tooltips placeholder options description description_tooltip "
    "tooltip".split()
)
"""Traits that views show as text, or are seen to below.  In all others a ``<`` is an error, and
ipywidgets' box for errors takes its message for HTML."""

Outputs = Callable[[Any], tuple[Any, list[str]]]


class Comms:
    """The comms of a kernel, and what may be said on them.

    ``outputs`` cleans what an Output widget shows.  Methods return content and buffers, or None
    when the message must not be passed on, and kinds of things that went.
    """

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        self._kinds: OrderedDict[str, str] = OrderedDict()

    def opened_by_front_end(self, content: dict[str, Any]) -> None:
        """The front end opened a comm: what the guest answers there is for code of its own."""
        comm_id, target = content.get("comm_id"), content.get("target_name")
        if isinstance(comm_id, str) and not _CLASS.fullmatch(self._kinds.get(comm_id, "")):
            self._note(comm_id, {CONTROL: CONTROL, TARGET: _ASKED}.get(str(target), _FOREIGN))

    def _note(self, comm_id: str, kind: str) -> None:
        self._kinds[comm_id] = kind
        self._kinds.move_to_end(comm_id)
        if len(self._kinds) > _MOST_COMMS:
            self._kinds.popitem(last=False)

    def knows(self, comm_id: Any) -> bool:
        """Whether the front end may be told of this comm."""
        return self._kinds.get(comm_id, _REFUSED) != _REFUSED

    def message(
        self, msg_type: str, content: dict[str, Any], buffers: Sequence[Any]
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """What may be passed on of a ``comm_open``, ``comm_msg`` or ``comm_close``."""
        comm_id, data = content.get("comm_id"), content.get("data")
        if not isinstance(comm_id, str) or not _ID.fullmatch(comm_id):
            return None, ["a comm without an id"]
        kind = self._kinds.get(comm_id, "")
        if msg_type == "comm_open":
            return self._open(comm_id, content, buffers)
        if kind == _REFUSED:
            return None, []
        if kind == _FOREIGN:
            return {"comm_id": comm_id, "data": data if isinstance(data, dict) else {}}, []
        removed: list[str] = []
        if not isinstance(data, dict):
            data = {}
        try:
            if kind == CONTROL:
                data = self._control(data, buffers, removed)
            else:
                data = self._data(data, kind, comm_id, buffers, removed)
        except RefusedError as error:
            return None, [*removed, str(error)]
        return {"comm_id": comm_id, "data": data}, removed

    def _open(
        self, comm_id: str, content: dict[str, Any], buffers: Sequence[Any]
    ) -> tuple[dict[str, Any] | None, list[str]]:
        data = content.get("data")
        removed: list[str] = []
        try:
            if content.get("target_name") != TARGET or content.get("target_module"):
                raise RefusedError("comms of other targets than core widgets'")
            if not isinstance(data, dict) or not isinstance(data.get("state"), dict):
                raise RefusedError("a widget without a state")
            state = data["state"]
            if not {"_model_module", "_model_name"} <= state.keys():
                raise RefusedError("a widget of no known package")
            known = self._kinds.get(comm_id, _ASKED)
            if known not in (_ASKED, _REFUSED, state["_model_name"]):  # ids are not used again
                raise RefusedError("a widget that wants to be another")
            cleaned = self._data({**data, "method": "update"}, _ASKED, comm_id, buffers, removed)
        except RefusedError as error:
            self._note(comm_id, _REFUSED)
            return None, [*removed, str(error)]
        del cleaned["method"]
        opened: dict[str, Any] = {"comm_id": comm_id, "target_name": TARGET, "data": cleaned}
        if "target_module" in content:
            opened["target_module"] = None
        return opened, removed

    def _data(
        self,
        data: dict[str, Any],
        kind: str,
        comm_id: str,
        buffers: Sequence[Any],
        removed: list[str],
    ) -> dict[str, Any]:
        method = data.get("method")
        if method == "custom":
            content = jsontypes.walk(data.get("content"), _broken)
            return {"method": "custom", "content": None if content is jsontypes.DROP else content}
        if method not in ("update", "echo_update"):
            return {}
        state = data.get("state")
        state = state if isinstance(state, dict) else {}
        paths = _paths(data.get("buffer_paths"), buffers)
        _check_names(state)
        kind = self._known(comm_id, kind, state.get("_model_name"), state.get("_view_name"))
        if kind in _LINKS or not kind:
            self._check_link(state)
        cleaned = self._state(state, kind, removed)
        _check_addresses(cleaned, paths, buffers)
        result = {"method": method, "state": cleaned, "buffer_paths": paths}
        return result if "buffer_paths" in data else {**result, "buffer_paths": []}

    def _known(self, comm_id: str, kind: str, model: Any, view: Any) -> str:
        """The model's class, of which a front end has made the model: it never changes.

        "" where it is not known, and each value is taken for HTML.
        """
        known = kind
        if kind == _ASKED and isinstance(model, str):
            known = model
            self._note(comm_id, known)
        elif kind in ("", _ASKED):
            known = ""
        elif model not in (None, kind):
            raise RefusedError("a widget that wants to be another")
        if view in _HTML_VIEWS and known not in _HTML_MODELS:
            raise RefusedError("a widget with the view of another")
        return known

    def _control(
        self, data: dict[str, Any], buffers: Sequence[Any], removed: list[str]
    ) -> dict[str, Any]:
        """All widgets' states at once, for a page that was loaded again."""
        if data.get("method") != "update_states" or not isinstance(data.get("states"), dict):
            return {}
        states: dict[str, Any] = {}
        for model_id, entry in data["states"].items():
            if not isinstance(entry, dict) or not _ID.fullmatch(model_id):
                continue
            state = entry.get("state")
            state = state if isinstance(state, dict) else {}
            names = {
                "_model_name": entry.get("model_name"),
                "_model_module": entry.get("model_module"),
                "_model_module_version": entry.get("model_module_version"),
            }
            try:
                _check_names(state)
                _check_names(names)
                kind = self._known(
                    model_id,
                    self._kinds.get(model_id, ""),
                    names["_model_name"],
                    state.get("_view_name"),
                )
                if state.get("_model_name", kind) not in (kind, names["_model_name"]):
                    raise RefusedError("a widget of two kinds")
                self._check_link(state)
                cleaned = self._state(state, kind, removed)
            except RefusedError as error:
                removed.append(str(error))
                continue
            states[model_id] = {**{key[1:]: names[key] for key in names}, "state": cleaned}
        paths = _paths(data.get("buffer_paths"), buffers)
        if any(path[0] not in states for path in paths if path):
            # Paths and buffers belong together by their order: what was refused had some.
            paths = [path if path[0] in states else _nowhere(states) for path in paths]
        return {"method": "update_states", "states": states, "buffer_paths": paths}

    def _check_link(self, state: dict[str, Any]) -> None:
        """``jslink``: the page copies a trait of one model to another's, and nobody looks."""
        ends = [state.get("source"), state.get("target")]
        if ends == [None, None]:
            return
        kinds = []
        for end in ends:
            if not (isinstance(end, list) and len(end) == 2 and end[1] in _LINKED):
                raise RefusedError("a link between widgets' traits that are not plain values")
            model = end[0].removeprefix("IPY_MODEL_") if isinstance(end[0], str) else ""
            kinds.append(self._kinds.get(model, ""))
        if not all(_CLASS.fullmatch(kind) and kind not in _UNLINKED for kind in kinds) or (
            "LabelModel" in kinds and not (_WRITTEN - {"LabelModel"}).isdisjoint(kinds)
        ):
            raise RefusedError("a link to a widget that shows HTML, TeX or outputs")

    # --- states ---

    def _state(self, state: dict[str, Any], model: str, removed: list[str]) -> dict[str, Any]:
        return {
            str(key): self._trait(str(key), value, model, removed)
            for key, value in state.items()
            if key != "__proto__"
        }

    def _trait(self, key: str, value: Any, model: str, removed: list[str]) -> Any:
        if key == "outputs":
            outputs, gone = self._outputs(value if isinstance(value, list) else [])
            removed += gone
            return outputs
        if key in _SHOWN or (key == "value" and model in _WRITTEN | _HTML_MODELS | {""}):
            value = jsontypes.plain(value)
        else:
            value = jsontypes.walk(value, _broken)
            value = None if value is jsontypes.DROP else value
        styles = model.endswith("StyleModel") or model in ("LayoutModel", "")
        if styles and key != "value" and key not in _SHOWN:
            value = _without_addresses(value)
        if key == "_dom_classes" and isinstance(value, list):
            names = (name for name in value if isinstance(name, str))
            return [n for n in names if n.startswith("widget-") or not elements.is_foreign(n)]
        if not isinstance(value, str):
            if key in _TEXTS or (key == "value" and model in _HTML_MODELS | {""}):
                if value is None or isinstance(value, bool | int | float):
                    return value
                return ""  # a list of texts would be made one, and HTML
            return [_in_label(item) for item in value] if _is_labels(key, value) else value
        if key == "value" and (model in _HTML_MODELS or not model):
            value, gone = html.clean(value)
            removed += gone
        elif key in _TEXTS:
            # Text, unless description_allow_html says other: right for both
            value = disarm.tex_in_text(tags.only_plain(value))
        elif key == "value" and model == "LabelModel":
            value = disarm.tex_in_text(value)
        elif key == "icon":
            value = value if re.fullmatch(r"[a-z0-9 -]*", value) and not _ui(value) else ""
        return value


def _ui(names: str) -> bool:
    return elements.is_foreign(names)


def _is_labels(key: str, value: Any) -> bool:
    return key in ("_options_labels", "titles", "tooltips") and isinstance(value, list)


def _in_label(item: Any) -> Any:
    return disarm.tex_in_text(item) if isinstance(item, str) else item


def _check_names(state: dict[str, Any]) -> None:
    for key, pattern in (
        ("_model_name", _CLASS), ("_view_name", _CLASS),
        ("_model_module_version", _VERSION), ("_view_module_version", _VERSION),
    ):  # fmt: skip
        value = state.get(key)
        if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
            raise RefusedError("a widget of no known class")
    for key in ("_model_module", "_view_module"):
        value = state.get(key)
        if value is not None and not (isinstance(value, str) and value in _MODULES):
            name = (
                value if isinstance(value, str) and re.fullmatch(r"[\w@/.-]{1,60}", value) else ""
            )
            raise RefusedError(f"a widget of the package {name or 'that is none'}")


def _broken(_: str, item: Any) -> Any:
    if not isinstance(item, str):
        return item
    if item.startswith("IPY_MODEL_") and not _ID.fullmatch(item.removeprefix("IPY_MODEL_")):
        return jsontypes.DROP
    return disarm.tags(item)


def _without_addresses(value: Any) -> Any:
    def change(_: str, item: Any) -> Any:
        if isinstance(item, str) and "(" in item and _LOADED.search(item):
            return jsontypes.DROP
        return item

    changed = jsontypes.walk(value, change)
    return None if changed is jsontypes.DROP else changed


def _paths(paths: Any, buffers: Sequence[Any]) -> list[list[str | int]]:
    if not isinstance(paths, list) or len(paths) > len(buffers):
        return []
    if not all(
        isinstance(path, list)
        and 0 < len(path) <= jsontypes.DEEPEST
        and all(isinstance(step, str | int) and step != "__proto__" for step in path)
        for path in paths
    ):
        raise RefusedError("a widget's state with buffers that belong nowhere")
    return paths


def _nowhere(states: dict[str, Any]) -> list[str | int]:
    states.setdefault("vmkernel-refused", {
        "model_name": "LayoutModel", "model_module": "@jupyter-widgets/base",
        "model_module_version": "2.0.0", "state": {},
    })  # fmt: skip
    return ["vmkernel-refused", "state", "buffer"]


def _check_addresses(
    state: dict[str, Any], paths: list[list[str | int]], buffers: Sequence[Any]
) -> None:
    """Pictures, sounds and films by address (format "url") only where it is a data: URL."""
    if state.get("format") != "url":
        return
    value = state.get("value")
    for path, buffer in zip(paths, buffers, strict=False):
        if path == ["value"]:
            value = bytes(buffer[:64]).decode("ascii", "replace")
    if not (isinstance(value, str) and re.match(r"data:(?:image|audio|video)/", value)):
        state["format"] = "png"
