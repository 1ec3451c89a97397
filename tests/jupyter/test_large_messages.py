"""A buffer of 100 MB goes both ways through a comm, and the wrapper holds little more than it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from kernel_client import Kernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

SIZE = 100_000_000
ROOM = 64 << 20
"""Bytes besides the message that its way through the wrapper may take."""

TARGET = f"""
def target(comm, message):
    length = [len(buffer) for buffer in message["buffers"]]
    del message["buffers"][:]
    comm.send({{"length": length}}, buffers=[bytes({SIZE})])
get_ipython().kernel.comm_manager.register_target("large", target)
"""


def memory(pid: int, name: str) -> int:
    """A figure of a process's /proc/PID/status, bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(os.environ.get("KERNEL_UNDER_TEST") == "plain", reason="about the wrapper")
def test_a_hundred_megabytes_there_and_back(kernel: Kernel) -> None:
    assert kernel.run(TARGET).status == "ok"
    before = memory(kernel.pid, "VmRSS")
    Path(f"/proc/{kernel.pid}/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    content = {"comm_id": "l-1", "target_name": "large", "data": {}}
    cell = kernel.ask("comm_open", content, buffers=[bytes(SIZE)])
    kernel.wait(lambda: "comm_msg" in cell.types, "the answer on the comm")
    (answer,) = (message for message in cell.messages if message["msg_type"] == "comm_msg")
    assert answer["content"]["data"] == {"length": [SIZE]}
    assert [len(buffer) for buffer in answer["buffers"]] == [SIZE]
    # One way after the other: what came of the front end may still be there when the answer does
    assert memory(kernel.pid, "VmHWM") - before < 2 * SIZE + ROOM
