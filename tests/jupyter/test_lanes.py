"""Requests to subshells at the edges: comms between lanes, a subshell that ends under its cell."""

from __future__ import annotations

import psutil
import pytest
from kernel_client import Cell, Kernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

OPEN = """
import threading
from comm import create_comm
one = create_comm(target_name="t", comm_id="c-{name}")
@one.on_msg
def heard(message):
    print("in", threading.current_thread().name)
"""


def subshell(kernel: Kernel) -> str:
    reply = kernel.request("create_subshell_request", channel="control").reply
    return str(reply["subshell_id"])


def execute(kernel: Kernel, code: str, subshell_id: str) -> Cell:
    content = {"code": code, "silent": False, "allow_stdin": False}
    return kernel.ask("execute_request", content, subshell_id=subshell_id)


def test_a_comm_message_for_no_subshell_reaches_the_one_that_has_the_comm(kernel: Kernel) -> None:
    mine = subshell(kernel)
    opened = kernel.finish(execute(kernel, OPEN.format(name="s"), mine))
    assert opened.status == "ok"
    cell = kernel.ask("comm_msg", {"comm_id": "c-s", "data": {}})
    kernel.wait(lambda: cell.idle and cell.stdout, "the comm's callback", 30)
    assert cell.stdout == f"in subshell-{mine}\n"
    kernel.request("delete_subshell_request", {"subshell_id": mine}, "control")


def test_a_subshell_that_is_deleted_leaves_no_request_without_an_end(kernel: Kernel) -> None:
    mine = subshell(kernel)
    waits = execute(kernel, "print('on')\nimport asyncio\nawait asyncio.sleep(600)", mine)
    kernel.wait_output(waits, "on")
    behind = execute(kernel, "1", mine)
    deleted = kernel.request("delete_subshell_request", {"subshell_id": mine}, "control")
    assert deleted.status == "ok"
    assert "deleted" in kernel.finish(waits, 30).error["evalue"]
    assert kernel.finish(behind, 30).status in ("aborted", "error")
    assert kernel.run("6 * 7").result == "42"


def test_a_guest_that_asks_and_does_not_listen_fills_no_memory(kernel: Kernel) -> None:
    code = """
import threading, time
from ipykernel.kernelapp import IPKernelApp
from ipykernel.thread import CONTROL_THREAD_NAME
from vmkernel.guest.session import encode_body
port = IPKernelApp.instance().kernel.port
(control,) = [t for t in threading.enumerate() if t.name == CONTROL_THREAD_NAME]
control.io_loop.add_callback(time.sleep, 600)
question = {"id": "i" * 1000, "command": "info", "arguments": []}
body = encode_body(["vm", "vm_request", "", {}, question])
for _ in range(20_000):
    port.send(body)
print("asked")
"""
    wrapper = psutil.Process(kernel.pid)
    before = wrapper.memory_info().rss
    cell = kernel.run(code)
    assert cell.stdout == "asked\n", cell
    kernel.run("1")
    assert wrapper.memory_info().rss - before < 12 << 20
