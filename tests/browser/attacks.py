"""Ways to run script in a front end from what a kernel sends: the cells of ``attacks.txt``.

Each says ``m``, a piece of JavaScript that sets the attack's mark (``__mark``, which the test gives
to every frame and window of the page), or has ``url`` asked for, an address that sets it, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

HOST = "http://marks.invalid/"
"""Where nobody is; a request for a path there sets the mark of that name."""

PRELUDE = """
import base64, json, uuid
_kernel = get_ipython().kernel

def raw(kind, content, metadata=None, buffers=None):
    _kernel.session.send(_kernel.iopub_socket, kind, content, parent=_kernel.get_parent(),
                         metadata=metadata or {}, buffers=buffers)

def show(data, metadata=None, kind="display_data", **transient):
    raw(kind, {"data": data, "metadata": metadata or {}, "transient": transient})

def html(text):
    show({"text/html": text, "text/plain": "plain"})

def markdown(text):
    show({"text/markdown": text, "text/plain": "plain"})

def vega(spec, **options):
    kind = "application/vnd.vegalite.v5+json"
    show({kind: spec, "text/plain": "chart"}, {kind: {"embed_options": options}})

def chart(**more):
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json", "width": 80, "height": 40,
        "data": {"values": [{"x": 1, "y": 2}, {"x": 2, "y": 1}]}, "mark": "point",
        "encoding": {"x": {"field": "x", "type": "quantitative"},
                     "y": {"field": "y", "type": "quantitative"}}} | more

def widget(model, view, module="@jupyter-widgets/controls", version="2.0.0", show_it=True, **state):
    comm = uuid.uuid4().hex
    state = {"_model_module": module, "_model_module_version": version, "_model_name": model,
             "_view_module": module, "_view_module_version": version, "_view_name": view, **state}
    raw("comm_open", {"comm_id": comm, "target_name": "jupyter.widget",
                      "data": {"state": state, "buffer_paths": []}}, {"version": "2.1.0"})
    if show_it:
        view_widget(comm)
    return comm

def view_widget(comm):
    show({"application/vnd.jupyter.widget-view+json":
          {"model_id": comm, "version_major": 2, "version_minor": 0}, "text/plain": "widget"})

def update(comm, method="update", **state):
    raw("comm_msg", {"comm_id": comm, "data":
        {"method": method, "state": state, "buffer_paths": []}})
"""
"""The first cell: what the others use."""


class Attack(NamedTuple):
    """A cell, and what holds it off where nothing is filtered (empty: nothing does)."""

    name: str
    blocked: str
    code: str

    @property
    def source(self) -> str:
        """The cell as it is run."""
        mark = f"m, url = \"__mark('{self.name}')\", '{HOST}{self.name}'"
        return f"# {self.name}\n{mark}\n{self.code}\nprint('tried')"


_CELL = re.compile(r"^%% (\S+)(?: \| (.+))?\n((?:(?!%% ).*\n)*)", re.MULTILINE)
ATTACKS = [
    Attack(name, blocked, code.strip())
    for name, blocked, code in _CELL.findall(Path(__file__).with_suffix(".txt").read_text())
]
PROVEN = {attack.name for attack in ATTACKS if not attack.blocked}
"""Those that run where nothing is filtered."""
