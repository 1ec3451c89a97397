"""From a cell in a VM to a Jupyter client: what comes under ``safe``, and that ``trusted`` is all.

The rest of the policy's tests are in test_policy.py; here it is seen that every way out of a guest
goes through it, and that a kernelspec can say ``trusted``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "jupyter"))

from kernel_client import Kernel

from vmkernel.cli.install import install_kernelspec

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def kernels(template: str) -> Iterator[dict[str, Kernel]]:
    """A kernel of each policy: the default, and one whose kernelspec was asked for the other."""
    directory = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    started: dict[str, Kernel] = {}
    try:
        for name, options in (("safe", {}), ("trusted", {"outputs": "trusted"})):
            spec = f"vmsandbox-{name}"
            options = {"recipe": template, "memory": "512M", **options}
            install_kernelspec(directory, name=spec, options=options)
            started[name] = Kernel(spec)
        yield started
    finally:
        for kernel in started.values():
            kernel.shut_down()


CELLS = {
    "html": (
        "from IPython.display import HTML, display\n"
        "display(HTML('<b>kept</b><script>evil()</script>'))",
        "evil",
    ),
    "update": (
        "h = display(HTML('x'), display_id=True)\n"
        "h.update(HTML('<b>kept</b><img src=x onerror=evil()>'))",
        "evil",
    ),
    "result": ("HTML('<b>kept</b><iframe src=\"javascript:evil()\"></iframe>')", "evil"),
    "javascript": (
        "from IPython.display import Javascript, Markdown; display('kept', Javascript('evil()'))",
        "evil()",
    ),
    "markdown": ("Markdown('kept [x](javascript:evil())')", "(javascript"),
    "stream": ("print('kept \\x1b]0;evil\\x07')", "evil"),
    "error": ("raise ValueError('kept ' + bytes([27, 93, 48, 59, 101, 7]).decode())", "\\x1b]0;e"),
    "comm": (
        "from comm import create_comm; create_comm(target_name='evil').send({}); print('kept')",
        "comm_msg",
    ),
    "payload": (
        "ip = get_ipython(); print('kept')\n"
        "ip.payload_manager.write_payload({'source': 'edit_magic', 'filename': '/etc/passwd'})",
        "edit_magic', 'filename",
    ),
    "lying": (
        "k = get_ipython().kernel\n"
        "k._publish_execute_input('ev' 'il', k.get_parent(), 7); print('kept')",
        "'evil'",
    ),
}


@pytest.mark.parametrize("way", CELLS)
def test_every_way_out_of_the_guest(kernels: dict[str, Kernel], way: str) -> None:
    code, evil = CELLS[way]
    heard: dict[str, str] = {}
    for policy, kernel in kernels.items():
        kernel.run("from IPython.display import *")
        cell = kernel.run(code)
        heard[policy] = str(
            [
                (message["msg_type"], message["content"])
                for message in cell.messages
                if not (message["msg_type"] == "execute_input" and way != "lying")
            ]
            + [cell.reply]
        )
        assert "kept" in heard[policy]
    assert evil not in heard["safe"]
    if way != "lying":  # the host knows better under either
        assert evil in heard["trusted"]
    assert ("VMKERNEL_OUTPUTS=trusted" in heard["safe"]) == (
        way not in ("markdown", "error", "lying")
    )
    assert "VMKERNEL_OUTPUTS" not in heard["trusted"]


def test_a_question_is_cleaned(kernels: dict[str, Kernel]) -> None:
    for policy, expected in (("safe", "name? "), ("trusted", "\x1b]0;evil\x07name? ")):
        cell = kernels[policy].send("input('\\x1b]0;evil\\x07name? ')", allow_stdin=True)
        kernels[policy].wait_question(cell)
        assert cell.questions[0]["content"]["prompt"] == expected
        kernels[policy].raw.input("Ada")
        kernels[policy].finish(cell)


def test_what_was_asked_for_is_cleaned(kernels: dict[str, Kernel]) -> None:
    code = (
        "class A:\n    def _repr_html_(self): return '<b>kept</b><script>evil()</script>'\na = A()"
    )
    for policy, evil in (("safe", False), ("trusted", True)):
        cell = kernels[policy].run(code, user_expressions={"x": "a"})
        html = cell.reply["user_expressions"]["x"]["data"]["text/html"]
        assert "kept" in html
        assert ("evil" in html) == evil


def test_set_next_input_and_pages_work(kernels: dict[str, Kernel]) -> None:
    cell = kernels["safe"].run("get_ipython().set_next_input('x = 1')\nint?")
    sources = [item["source"] for item in cell.reply["payload"]]
    assert sorted(sources) == ["page", "set_next_input"]
