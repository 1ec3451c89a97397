"""PARITY "Comms": opened from both sides, both ways, with buffers, whatever the kernel does."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_client import Cell, Kernel, Message

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]
OUTPUTS = "trusted"  # comms of targets that no front end knows

TARGET = """
from comm import get_comm_manager
opened, seen = [], []
def target(comm, message):
    opened.append(comm)
    seen.append(("open", message["content"]["data"]))
    comm.send({"welcome": message["content"]["data"]})
    @comm.on_msg
    def echo(message):
        seen.append(("msg", message["content"]["data"]))
        print("heard", message["content"]["data"])
        comm.send({"echo": message["content"]["data"]}, buffers=message["buffers"])
    @comm.on_close
    def closed(message):
        seen.append(("close", message["content"]["data"]))
get_comm_manager().register_target("target", target)
"""


def say(kernel: Kernel, msg_type: str, comm_id: str, data: Message, **options: Any) -> Cell:
    """Send a comm message and wait until the kernel is done with it: nothing replies to it."""
    content = {"comm_id": comm_id, "data": data}
    if msg_type == "comm_open":
        content["target_name"] = "target"
    cell = kernel.ask(msg_type, content, **options)
    kernel.wait(lambda: cell.idle, f"the end of {msg_type}")
    assert not cell.replies
    return cell


def infos(kernel: Kernel, **content: str) -> dict[str, Message]:
    comms: dict[str, Message] = kernel.request("comm_info_request", content).reply["comms"]
    return comms


def test_the_kernel_opens_one(kernel: Kernel) -> None:
    cell = kernel.run(
        "from comm import create_comm\n"
        "comm = create_comm(target_name='front', data={'n': 1}, metadata={'m': 2},\n"
        "                   comm_id='k-1', buffers=[b'\\0\\1'])\n"
        "comm.send({'n': 2}, metadata={'m': 3}, buffers=[b'\\2', b'\\3'])\n"
    )
    assert cell.types == ["execute_input", "comm_open", "comm_msg"]
    first, second = (m for m in cell.messages if m["msg_type"].startswith("comm_"))
    assert first["content"]["target_name"] == "front"
    assert first["content"]["data"] == {"n": 1}
    assert first["metadata"] == {"m": 2}
    assert [bytes(buffer) for buffer in first["buffers"]] == [b"\0\1"]
    assert second["content"] == {"comm_id": "k-1", "data": {"n": 2}}
    assert [bytes(buffer) for buffer in second["buffers"]] == [b"\2", b"\3"]
    kernel.run("got = []; comm.on_msg(got.append)")
    say(kernel, "comm_msg", "k-1", {"from": "front end"}, buffers=[b"\xff" * 3])
    code = "[(m['content']['data'], [bytes(b) for b in m['buffers']]) for m in got]"
    assert kernel.run(code).result == "[({'from': 'front end'}, [b'\\xff\\xff\\xff'])]"
    assert infos(kernel)["k-1"] == {"target_name": "front"}
    assert kernel.run("comm.close({'bye': 1})").types == ["execute_input", "comm_close"]
    assert "k-1" not in infos(kernel)


def test_the_front_end_opens_one(kernel: Kernel) -> None:
    kernel.run(TARGET)
    cell = say(kernel, "comm_open", "f-1", {"hello": 1})
    assert cell.contents("comm_msg") == [{"comm_id": "f-1", "data": {"welcome": {"hello": 1}}}]
    assert infos(kernel, target_name="target") == {"f-1": {"target_name": "target"}}
    assert infos(kernel, target_name="other") == {}
    cell = say(kernel, "comm_msg", "f-1", {"n": [1, None]}, buffers=[b"abc" * 100_000])
    assert cell.stdout == "heard {'n': [1, None]}\n"
    (message,) = (m for m in cell.messages if m["msg_type"] == "comm_msg")
    assert message["content"]["data"] == {"echo": {"n": [1, None]}}
    assert bytes(message["buffers"][0]) == b"abc" * 100_000
    say(kernel, "comm_close", "f-1", {"bye": 2})
    assert kernel.run("seen").result == (
        "[('open', {'hello': 1}), ('msg', {'n': [1, None]}), ('close', {'bye': 2})]"
    )
    assert infos(kernel) == {}


def test_an_unknown_target_is_closed_again(kernel: Kernel) -> None:
    content = {"comm_id": "u-1", "target_name": "nobody", "data": {}}
    cell = kernel.ask("comm_open", content)
    kernel.wait(lambda: cell.idle, "the end")
    assert [c["comm_id"] for c in cell.contents("comm_close")] == ["u-1"]


def test_an_error_in_a_callback_is_shown_and_harms_nothing(kernel: Kernel) -> None:
    kernel.run("from comm import create_comm; comm = create_comm(target_name='t', comm_id='e-1')")
    kernel.run("def wrong(message): 1 / 0\ncomm.on_msg(wrong)")
    cell = say(kernel, "comm_msg", "e-1", {})
    assert "ZeroDivisionError" in cell.stdout + cell.stderr
    assert kernel.run("1 + 1").result == "2"


@pytest.mark.parametrize(
    "code",
    [
        "import threading; threading.Timer(0.5, comm.send, [{'late': 1}]).start()",
        "import asyncio\n"
        "timer = asyncio.get_running_loop().call_later(0.5, comm.send, {'late': 1})",
    ],
    ids=["thread", "event loop"],
)
def test_the_kernel_speaks_while_no_cell_runs(kernel: Kernel, code: str) -> None:
    kernel.run("from comm import create_comm; comm = create_comm(target_name='t', comm_id='l-1')")
    cell = kernel.run(code + "; None")
    kernel.wait(lambda: cell.contents("comm_msg"), "the message of a callback")
    assert cell.contents("comm_msg")[0]["data"] == {"late": 1}
    kernel.run("comm.close()")


def test_many_messages_keep_their_order(kernel: Kernel) -> None:
    kernel.run(TARGET)
    say(kernel, "comm_open", "m-1", {})
    cells = [
        kernel.ask("comm_msg", {"comm_id": "m-1", "data": {"n": n}}, buffers=[bytes([n]) * 10_000])
        for n in range(100)
    ]
    kernel.wait(lambda: cells[-1].idle, "the last message's end")
    for n, cell in enumerate(cells):
        (message,) = (m for m in cell.messages if m["msg_type"] == "comm_msg")
        assert message["content"]["data"] == {"echo": {"n": n}}
        assert bytes(message["buffers"][0]) == bytes([n]) * 10_000
    code = "[data['n'] for kind, data in seen if kind == 'msg'] == list(range(100))"
    assert kernel.run(code).result == "True"
    say(kernel, "comm_close", "m-1", {})


def test_a_message_arrives_while_a_cell_awaits_it(kernel: Kernel) -> None:
    kernel.run("from comm import create_comm; comm = create_comm(target_name='t', comm_id='a-1')")
    cell = kernel.send(
        "import asyncio\n"
        "answer = asyncio.get_running_loop().create_future()\n"
        "comm.on_msg(lambda message: answer.set_result(message['content']['data']))\n"
        "comm.send({'question': 1})\n"
        "print(await asyncio.wait_for(answer, 60))"
    )
    kernel.wait(lambda: cell.contents("comm_msg"), "the question")
    kernel.ask("comm_msg", {"comm_id": "a-1", "data": {"answer": 42}})
    assert kernel.finish(cell).stdout == "{'answer': 42}\n"
    assert cell.status == "ok"


def test_a_message_waits_while_a_cell_computes(kernel: Kernel) -> None:
    kernel.run(TARGET)
    say(kernel, "comm_open", "w-1", {})
    cell = kernel.send("print('begin')\nimport time; time.sleep(1.5); print(len(seen))")
    kernel.wait_output(cell, "begin")
    message = kernel.ask("comm_msg", {"comm_id": "w-1", "data": {}})
    assert kernel.finish(cell).stdout == "begin\n1\n"
    kernel.wait(lambda: message.idle, "the message's end")
    assert kernel.run("len(seen)").result == "2"
    say(kernel, "comm_close", "w-1", {})


def test_what_an_error_aborts_is_no_comm_message(kernel: Kernel) -> None:
    kernel.run(TARGET)
    say(kernel, "comm_open", "x-1", {})
    wrong = kernel.send("import time; time.sleep(0.5); 1 / 0")
    message = kernel.ask("comm_msg", {"comm_id": "x-1", "data": {"n": 1}})
    dropped = kernel.send("print('never')")
    kernel.wait(lambda: message.idle, "the message's end")
    assert kernel.finish(wrong).status == "error"
    assert kernel.finish(dropped).status == "aborted"
    assert message.contents("comm_msg")[0]["data"] == {"echo": {"n": 1}}
    say(kernel, "comm_close", "x-1", {})
