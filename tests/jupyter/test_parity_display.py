"""PARITY "Display": what is large or binary comes whole.  The rest is in test_execute.py."""

from __future__ import annotations

import pytest
from kernel_client import Kernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]
OUTPUTS = "trusted"  # comms of targets that no front end knows

MEGABYTES = 100


def test_a_result_of_a_hundred_megabytes(kernel: Kernel) -> None:
    # Not by the formatter, which would make copies that a small guest has no memory for.
    cell = kernel.run(
        "from IPython.display import publish_display_data\n"
        f"publish_display_data({{'text/plain': 'x' * {MEGABYTES << 20}}})"
    )
    assert cell.status == "ok", cell.reply
    (content,) = cell.contents("display_data")
    text = content["data"]["text/plain"]
    assert len(text) == MEGABYTES << 20
    assert text.count("x") == len(text)
    assert kernel.run("1 + 1").result == "2"


def test_binary_buffers_of_many_megabytes(kernel: Kernel) -> None:
    cell = kernel.run(
        "from comm import create_comm\n"
        "comm = create_comm(target_name='t', comm_id='large')\n"
        "comm.send({'n': 1}, buffers=[bytes(range(256)) * 40_000, b'', memoryview(b'abc')])"
    )
    assert cell.status == "ok", cell.reply
    (message,) = (m for m in cell.messages if m["msg_type"] == "comm_msg")
    assert [bytes(b) for b in message["buffers"]] == [bytes(range(256)) * 40_000, b"", b"abc"]


def test_a_display_is_updated_by_a_later_cell_and_by_a_thread(kernel: Kernel) -> None:
    first = kernel.run("handle = display('one', display_id='mine')")
    second = kernel.run("handle.update('two')")
    third = kernel.run(
        "import threading\n"
        "thread = threading.Thread(target=handle.update, args=['three'])\n"
        "thread.start(); thread.join()"
    )
    shown = [
        (content["data"]["text/plain"], content["transient"])
        for cell in (first, second, third)
        for content in cell.contents("display_data", "update_display_data")
    ]
    assert shown == [(f"'{word}'", {"display_id": "mine"}) for word in ("one", "two", "three")]


def test_clear_output_keeps_its_place(kernel: Kernel) -> None:
    cell = kernel.run(
        "from IPython.display import clear_output\n"
        "for i in range(20):\n"
        "    print(i, flush=True)\n"
        "    clear_output(wait=True)\n"
        "print('end')"
    )
    assert cell.types == ["execute_input", *["stream", "clear_output"] * 20, "stream"]
    assert [content["wait"] for content in cell.contents("clear_output")] == [True] * 20
