"""Widgets: the core ones work as they are, and none of them brings script into the page.

The messages of the core widgets are real: ipywidgets makes them, and a comm takes them down.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import comm
import ipywidgets
import pytest
from comm.base_comm import BaseComm
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets.widgets.widget import _registry

from vmkernel.kernel.policy import Outputs

BASE = "@jupyter-widgets/base"
CONTROLS = "@jupyter-widgets/controls"
IMG = "<img src=x onerror=alert(1)>"

Sent = tuple[str, dict[str, Any], dict[str, Any], list[Any]]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sent]]:
    """What ipywidgets says to its front end."""
    said: list[Sent] = []

    class Recorder(BaseComm):
        def publish_msg(
            self,
            msg_type: str,
            data: Any = None,
            metadata: Any = None,
            buffers: Any = None,
            **keys: Any,
        ) -> None:
            content = {"comm_id": self.comm_id, "data": data or {}, **keys}
            content = json.loads(json.dumps(content))  # as it comes over the wire
            said.append((msg_type, content, metadata or {}, buffers or []))

    monkeypatch.setattr(comm, "create_comm", Recorder)
    yield said
    ipywidgets.Widget.close_all()


def make(cls: type[ipywidgets.Widget]) -> ipywidgets.Widget:
    other = ipywidgets.IntText(1), ipywidgets.IntText(2)
    special: dict[str, Any] = {
        "Link": lambda: cls((other[0], "value"), (other[1], "value")),
        "DirectionalLink": lambda: cls((other[0], "value"), (other[1], "value")),
        "Image": lambda: cls(value=b"\x89PNG\r\n\x1a\n", width=3),
        "Audio": lambda: cls(value=b"RIFF", format="wav"),
        "Video": lambda: cls(value=b"mp4", format="mp4"),
        "HTML": lambda: cls("<b>bold</b> a &lt; b", description="d"),
        "HTMLMath": lambda: cls("<i>x</i> $x^2$"),
        "Label": lambda: cls("$x < 2$"),
        "Text": lambda: cls("<script> is what I typed"),
        "Dropdown": lambda: cls(options=["a", "<b>"], value="a", description="pick"),
        "SelectionSlider": lambda: cls(options=["a", "b"]),
        "SelectionRangeSlider": lambda: cls(options=["a", "b"]),
        "ToggleButtons": lambda: cls(options=["a", "b"], icons=["check", "plus"]),
        "Button": lambda: cls(description="go", icon="check", tooltip="a & b"),
        "Tab": lambda: cls([other[0]], titles=["one"]),
        "Accordion": lambda: cls([other[0]], titles=["one"]),
    }
    return special.get(cls.__name__, cls)()


def test_every_core_widget_passes_as_it_is(sent: list[Sent]) -> None:
    outputs = Outputs("safe")
    made = [make(cls) for _, cls in list(_registry.items()) if is_core(cls)]
    assert len(made) > 50
    made[0].layout = ipywidgets.Layout(width="50%", border="1px solid red", grid_gap="1px")
    slider = ipywidgets.IntSlider(description="s")
    slider.value = 7
    ipywidgets.HBox([slider])
    for message in sent:
        pass_unchanged(outputs, message)
    assert len(sent) > 100
    assert outputs.notice() == ""


def is_core(cls: type) -> bool:
    return cls.__module__.startswith("ipywidgets.") and cls.__name__ not in ("Widget", "CoreWidget")


def pass_unchanged(outputs: Outputs, message: Sent) -> None:
    msg_type, content, metadata, buffers = message
    done = outputs.iopub(msg_type, (content, metadata, buffers), "cell", {})
    assert done is not None, (content, outputs.notice())
    assert done[0] == content
    assert done[1] == metadata
    assert list(done[2]) == buffers


def test_tqdm_in_a_notebook_passes_as_it_is(sent: list[Sent]) -> None:
    from tqdm.notebook import tqdm

    outputs = Outputs("safe")
    for _ in tqdm(range(3), display=False):
        pass
    assert sent
    for message in sent:
        pass_unchanged(outputs, message)


# --- attacks ---


def open_widget(policy: Outputs, comm_id: str = "a1", **state: Any) -> dict[str, Any] | None:
    """The state of a widget as the front end gets it; None when it is refused."""
    full = {
        "_model_module": CONTROLS, "_model_module_version": "2.0.0", "_model_name": "TextModel",
        "_view_module": CONTROLS, "_view_module_version": "2.0.0", "_view_name": "TextView",
        **state,
    }  # fmt: skip
    content = {
        "comm_id": comm_id, "target_name": "jupyter.widget",
        "data": {"state": full, "buffer_paths": []},
    }  # fmt: skip
    done = policy.iopub("comm_open", (content, {"version": "2.1.0"}, ()), "cell", {})
    return None if done is None else done[0]["data"]["state"]


def update(policy: Outputs, comm_id: str = "a1", **state: Any) -> dict[str, Any] | None:
    content = {"comm_id": comm_id, "data": {"method": "update", "state": state, "buffer_paths": []}}
    done = policy.iopub("comm_msg", (content, {}, ()), "cell", {})
    return None if done is None else done[0]["data"]["state"]


HTML = {"_model_name": "HTMLModel", "_view_name": "HTMLView"}


@pytest.mark.parametrize(
    "state",
    [
        {"_model_module": "anywidget", "_model_name": "AnyModel", "_esm": "alert(1)"},
        {"_view_module": "anywidget"},
        {"_model_module": "@jupyter-widgets/controls/../x"},
        {"_model_module": ["@jupyter-widgets/controls"]},
        {"_model_module_version": "../../evil@1.0.0"},
        {"_view_module_version": "<img src=x onerror=alert(1)>"},
        {"_view_name": IMG}, {"_model_name": IMG}, {"_model_name": "constructor"},
        {"_view_name": "HTMLView"}, {"_view_name": "HTMLMathView"},
        {"_model_name": ["HTMLModel"]},
    ],
)  # fmt: skip
def test_widgets_that_bring_code_are_refused(state: dict[str, Any]) -> None:
    outputs = Outputs("safe")
    assert open_widget(outputs, **state) is None
    assert "a widget" in outputs.notice()
    assert update(outputs, value=IMG) is None  # and so is all that follows


def test_comms_of_other_targets_are_refused() -> None:
    outputs = Outputs("safe")
    for target in ("evil", "jupyter.widget.control", None, 1):
        content = {"comm_id": "x1", "target_name": target, "data": {}}
        assert outputs.iopub("comm_open", (content, {}, ()), "cell", {}) is None
    content = {"comm_id": "x2", "target_name": "jupyter.widget", "target_module": "http://evil"}
    assert outputs.iopub("comm_open", (content, {}, ()), "cell", {}) is None


@pytest.mark.parametrize("model", ["HTMLModel", "HTMLMathModel"])
def test_html_of_widgets_is_cleaned_at_first_and_later(model: str) -> None:
    outputs = Outputs("safe")
    names = {"_model_name": model, "_view_name": model.replace("Model", "View")}
    state = open_widget(outputs, **names, value=f"<b>x</b>{IMG}")
    assert state is not None
    assert state["value"] == "<b>x</b><img>"
    assert update(outputs, value=f"<i>y</i>{IMG}") == {"value": "<i>y</i><img>"}
    assert update(outputs, value=[IMG, {"toString": IMG}]) == {"value": ""}
    assert "script" in outputs.notice()


def test_a_widget_cannot_become_another() -> None:
    outputs = Outputs("safe")
    open_widget(outputs, **HTML, value="x")
    assert update(outputs, _model_name="TextModel", value=IMG) is None
    assert update(outputs, value=IMG) == {"value": "<img>"}
    assert open_widget(outputs, value=IMG) is None  # nor by its id
    open_widget(outputs, "b1", value=IMG)
    assert update(outputs, "b1", _view_name="HTMLView") is None
    assert update(outputs, "b1", _view_module="evil") is None


def test_what_nobody_knows_is_taken_for_html() -> None:
    assert update(Outputs("safe"), "never-opened", value=IMG) == {"value": "<img>"}


def test_descriptions_labels_and_classes() -> None:
    outputs = Outputs("safe")
    state = open_widget(
        outputs, description=f"<b>d</b>{IMG}", description_allow_html=True,
        tooltip=[IMG],
        _dom_classes=["mine", "jp-Dialog", 3, "widget-interact"],
        icon="x\" onclick=1",
        readout_format=IMG, value="<b> typed", layout=f"IPY_MODEL_{IMG}", tabbable=None,
    )  # fmt: skip
    assert state is not None
    assert state["description"] == f"<b>d</b>{IMG}".replace("<img", "<\u2060img")
    assert state["tooltip"] == ""
    assert state["_dom_classes"] == ["mine", "widget-interact"]
    assert state["icon"] == ""
    assert state["readout_format"] == "<\u2060img src=x onerror=alert(1)>"
    assert state["value"] == "<b> typed"
    assert state["layout"] is None
    label = open_widget(
        outputs, "b1", _model_name="LabelModel", _view_name="LabelView",
        value=r"$\href{javascript:alert(1)}{x}$",
    )  # fmt: skip
    assert label is not None
    assert r"\href" not in label["value"]


def test_styles_load_nothing() -> None:
    state = open_widget(
        Outputs("safe"), _model_module=BASE, _model_name="LayoutModel", _view_module=BASE,
        _view_name="LayoutView", border="url(http://evil)", width="calc(1px + 2px)",
        grid_template_areas='"a b"', object_fit="image-set('http://evil')",
    )  # fmt: skip
    assert state is not None
    assert state["border"] is None
    assert state["object_fit"] is None
    assert state["width"] == "calc(1px + 2px)"
    assert state["grid_template_areas"] == '"a b"'


def test_pictures_by_address_are_in_the_message() -> None:
    outputs = Outputs("safe")
    image = {"_model_name": "ImageModel", "_view_name": "ImageView", "format": "url"}
    for comm_id, value, kept in (
        ("a1", b"http://evil", "png"),
        ("a2", b"data:image/png;base64,", "url"),
    ):
        content = {
            "comm_id": comm_id, "target_name": "jupyter.widget",
            "data": {
                "state": {
                    "_model_module": CONTROLS, "_model_module_version": "2.0.0",
                    "_view_module": CONTROLS, "_view_module_version": "2.0.0", **image,
                },
                "buffer_paths": [["value"]],
            },
        }  # fmt: skip
        done = outputs.iopub("comm_open", (content, {}, [memoryview(value)]), "cell", {})
        assert done is not None
        assert done[0]["data"]["state"]["format"] == kept
        assert done[0]["data"]["buffer_paths"] == [["value"]]


def test_an_output_widgets_outputs_go_through_the_policy() -> None:
    outputs = Outputs("safe")
    names = {
        "_model_module": "@jupyter-widgets/output", "_model_name": "OutputModel",
        "_view_module": "@jupyter-widgets/output", "_view_name": "OutputView",
        "_model_module_version": "1.0.0", "_view_module_version": "1.0.0",
    }  # fmt: skip
    shown = [
        {"output_type": "display_data", "metadata": {},
         "data": {"text/html": f"a{IMG}", "application/javascript": "1"}},
        {"output_type": "stream", "name": "stdout", "text": "a\x1b]0;t\x07b"},
        {"output_type": "error", "ename": "E", "evalue": "\x1b[2J", "traceback": [7, "t"]},
        {"output_type": "evil"}, 7,
    ]  # fmt: skip
    kept = [
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": "a<img>"}},
        {"output_type": "stream", "name": "stdout", "text": "ab"},
        {"output_type": "error", "ename": "E", "evalue": "", "traceback": ["t"]},
    ]
    state = open_widget(outputs, **names, outputs=shown)
    assert state is not None
    assert state["outputs"] == kept
    assert update(outputs, outputs=shown) == {"outputs": kept}
    assert update(outputs, outputs={"0": shown[0]}) == {"outputs": []}


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        (("text", "value"), ("html", "value"), False),
        (("html", "value"), ("text", "value"), False),  # a link of two directions
        (("text", "value"), ("out", "outputs"), False),
        (("text", "value"), ("text2", "_view_name"), False),
        (("text", "value"), ("text2", "description"), False),
        (("text", "value"), ("nobody", "value"), False),
        (("text", "value"), ("label", "value"), False),
        (("slider", "value"), ("label", "value"), True),
        (("text", "value"), ("text2", "value"), True),
    ],
)
def test_links_between_widgets(source: Any, target: Any, allowed: bool) -> None:
    outputs = Outputs("safe")
    open_widget(outputs, "html", **HTML)
    for name in ("text", "text2"):
        open_widget(outputs, name, value=IMG)
    open_widget(outputs, "label", _model_name="LabelModel", _view_name="LabelView")
    open_widget(outputs, "slider", _model_name="IntSliderModel", _view_name="IntSliderView")
    ends = {
        "source": [f"IPY_MODEL_{source[0]}", source[1]],
        "target": [f"IPY_MODEL_{target[0]}", target[1]],
    }
    link = {"_model_name": "LinkModel", "_view_name": None, "_view_module": None}
    assert (open_widget(outputs, "link", **link, **ends) is not None) == allowed
    open_widget(outputs, "link2", **link)
    assert (update(outputs, "link2", **ends) is not None) == allowed


def test_states_for_a_page_that_was_loaded_again() -> None:
    outputs = Outputs("safe")
    open_widget(outputs, "html1", **HTML)
    outputs.heard("comm_open", {"comm_id": "ctl", "target_name": "jupyter.widget.control"})
    entry = {"model_module": CONTROLS, "model_module_version": "2.0.0"}
    data = {
        "method": "update_states",
        "states": {
            "html1": {**entry, "model_name": "HTMLModel", "state": {"value": IMG}},
            "evil1": {**entry, "model_module": "anywidget", "model_name": "AnyModel", "state": {}},
            "text1": {**entry, "model_name": "TextModel",
                      "state": {"_view_name": "HTMLView", "value": IMG}},
            "html2": {**entry, "model_name": "TextModel", "state": {"_model_name": "HTMLModel"}},
        },
        "buffer_paths": [["evil1", "state", "x"], ["html1", "state", "y"]],
    }  # fmt: skip
    buffers = [b"1", b"2"]
    done = outputs.iopub("comm_msg", ({"comm_id": "ctl", "data": data}, {}, buffers), "", {})
    assert done is not None
    cleaned = done[0]["data"]
    assert cleaned["states"].keys() == {"html1", "vmkernel-refused"}
    assert cleaned["states"]["html1"]["state"] == {"value": "<img>"}
    assert cleaned["buffer_paths"][1] == ["html1", "state", "y"]  # still the second buffer's
    assert outputs.iopub("comm_msg", ({"comm_id": "ctl", "data": {"x": IMG}}, {}, ()), "", {}) == (
        {"comm_id": "ctl", "data": {}}, {}, (),
    )  # fmt: skip


def test_a_front_ends_own_comm_is_answered() -> None:
    outputs = Outputs("safe")
    outputs.heard("comm_open", {"comm_id": "own1", "target_name": "my.extension"})
    content = {"comm_id": "own1", "data": {"answer": [1, {"a": "<b>"}]}}
    assert outputs.iopub("comm_msg", (content, {}, (b"x",)), "", {}) == (content, {}, (b"x",))


def test_memory_of_comms_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vmkernel.kernel.policy import widgets

    monkeypatch.setattr(widgets, "_MOST_COMMS", 50)
    outputs = Outputs("safe")
    for number in range(200):
        assert open_widget(outputs, f"w{number}", **HTML) is not None
    assert len(outputs._policy().comms._kinds) == 50
    assert update(outputs, "w1", value=IMG) == {"value": "<img>"}  # forgotten, and still clean


states = st.dictionaries(
    st.sampled_from(
        """value description tooltip outputs source target _model_name _view_name _model_module
        layout children _dom_classes icon format _options_labels __proto__""".split()
    ),
    st.recursive(
        st.none() | st.integers() | st.sampled_from([IMG, "HTMLView", "TextModel", BASE, "url",
                                                     "IPY_MODEL_<b>", "IPY_MODEL_a1", "value"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
        max_leaves=6,
    ),
    max_size=8,
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(["open", "update"]), states), max_size=5))
@settings(deadline=None)
def test_no_state_brings_a_handler(steps: list[tuple[str, dict[str, Any]]]) -> None:
    outputs = Outputs("safe")
    kinds: dict[str, tuple[str, str]] = {}
    for step, state in steps:
        done = open_widget(outputs, **state) if step == "open" else update(outputs, **state)
        if done is None:
            continue
        model = str(done.get("_model_name") or kinds.get("a1", ("", ""))[0])
        view = str(done.get("_view_name") or kinds.get("a1", ("", ""))[1])
        if step == "open":
            kinds["a1"] = (model, view)
        if "HTMLView" in view or not model:
            assert "onerror" not in str(done.get("value"))
        assert not re.search("<[a-z]", str(done.get("description")))
        assert "__proto__" not in done
