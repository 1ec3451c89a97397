"""The control channel: it answers whatever the main shell does; nothing on it waits for ever."""

import time

import pytest
from kernel_client import Kernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

# Holds the interpreter's lock for minutes, so that no thread of the guest kernel runs.
GREEDY = "import re\nprint('on', flush=True)\nre.match('(a+)+$', 'a' * 60 + 'b')"


def test_control_is_answered_while_a_cell_runs(kernel: Kernel) -> None:
    cell = kernel.send("import time\nprint('on', flush=True)\ntime.sleep(3)")
    kernel.wait_output(cell, "on")
    for msg_type in ("kernel_info_request", "usage_request", "list_subshell_request"):
        assert kernel.request(msg_type, channel="control").replies
    assert not cell.done
    assert kernel.finish(cell).status == "ok"


def test_control_is_answered_while_code_lets_no_thread_run(kernel: Kernel) -> None:
    cell = kernel.send(GREEDY)
    kernel.wait_output(cell, "on")
    time.sleep(0.5)  # what is heard comes before what lets no thread run
    stuck = kernel.ask("debug_request", {"type": "request", "seq": 1, "command": "debugInfo"},
                       "control")  # fmt: skip
    for msg_type in ("kernel_info_request", "usage_request"):
        assert kernel.request(msg_type, channel="control").replies
    assert not cell.done
    assert not stuck.done
    kernel.interrupt()
    assert kernel.finish(cell).error["ename"] == "KeyboardInterrupt"
    assert kernel.finish(stuck).reply["success"]


def test_an_unknown_control_request_is_an_error_that_says_so(kernel: Kernel) -> None:
    reply = kernel.request("fly_request", channel="control").reply
    assert reply["status"] == "error"
    assert "fly_request" in reply["evalue"]


def test_a_message_id_that_is_in_use_costs_who_uses_it_again(kernel: Kernel) -> None:
    cell = kernel.send("import time\nprint('on', flush=True)\ntime.sleep(2)\nprint('end')")
    kernel.wait_output(cell, "on")
    message = kernel.raw.session.msg("list_subshell_request", {})
    message["header"]["msg_id"] = cell.msg_id
    kernel.raw.control_channel.send(message)
    kernel.wait(lambda: len(cell.replies) == 2, "both replies")
    replies = {reply["msg_type"]: reply["content"] for reply in cell.replies}
    assert replies["list_subshell_reply"]["status"] == "error"
    assert "id of its own" in "".join(replies["list_subshell_reply"]["traceback"])
    assert replies["execute_reply"]["status"] == "ok"
    assert cell.stdout == "on\nend\n"


def test_requests_of_the_debugger_are_served_one_at_a_time(kernel: Kernel) -> None:
    request = {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}}
    asked = [kernel.ask("debug_request", request, "control") for _ in range(6)]
    began = time.monotonic()
    for cell in asked:
        assert kernel.finish(cell).reply["success"]
        states = [m["content"]["execution_state"] for m in cell.messages]
        assert states == ["busy", "idle"]
    assert time.monotonic() - began < 60
    order = sorted(
        (m["header"]["date"], number) for number, cell in enumerate(asked) for m in cell.messages
    )
    assert [number for _, number in order] == [n for n in range(6) for _ in range(2)]
