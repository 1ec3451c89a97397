"""An unmodified ipykernel in a VM, behind the relay: the yardstick of the Python engine.

What every Python kernel must do is in the other files of this directory, which run against this
one with KERNEL_UNDER_TEST=relay.  Here is a part of each thing that the relay has to carry.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_client import Kernel, StartKernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def relay(relay_kernel: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    """A running kernel, shared by the module's tests."""
    with start_kernel(relay_kernel) as kernel:
        kernel.run("1")  # the template is there
        yield kernel


def test_it_is_ipykernel_as_it_comes(relay: Kernel) -> None:
    assert relay.request("kernel_info_request").reply["implementation"] == "ipython"
    code = "import sys; print([name for name in sys.modules if name.startswith('vmkernel')])"
    assert relay.run(code).stdout == "[]\n"


def test_streams_of_python_and_of_its_children(relay: Kernel) -> None:
    cell = relay.run("import os, sys; print('one'); print('two', file=sys.stderr); 6*7")
    assert (cell.stdout, cell.stderr, cell.result) == ("one\n", "two\n", "42")
    assert relay.run("!echo three; echo four >&2").stdout.split() == ["three", "four"]
    cell = relay.run("for n in range(20_000): print(n)")
    assert cell.stdout == "".join(f"{n}\n" for n in range(20_000))
    assert cell.messages[-1]["content"] == {"execution_state": "idle"}


def test_a_display_is_updated(relay: Kernel) -> None:
    relay.run("h = display('before', display_id='d')")
    cell = relay.run("h.update('after')")
    assert cell.types == ["execute_input", "update_display_data"]
    (content,) = cell.contents("update_display_data")
    assert content["transient"] == {"display_id": "d"}


def test_input(relay: Kernel) -> None:
    cell = relay.send("print('hello', input('name? '))", allow_stdin=True)
    assert relay.wait_question(cell) == {"prompt": "name? ", "password": False}
    relay.raw.input("Grüße")
    assert relay.finish(cell).stdout == "hello Grüße\n"


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import asyncio; await asyncio.sleep(300)",
        "import subprocess; subprocess.run(['sleep', '300'])",
        "input()",
    ],
)
def test_an_interrupt_ends_the_cell_and_nothing_else(relay: Kernel, code: str) -> None:
    relay.run("held = 'on'")
    cell = relay.send(f"print('begun')\n{code}", allow_stdin=True)
    relay.wait_output(cell, "begun")
    relay.listen(0.5)
    relay.interrupt()
    relay.finish(cell, 30)
    assert cell.error["ename"] in ("KeyboardInterrupt", "CancelledError")
    assert relay.run("print(held)").stdout == "on\n"


def test_an_error_stops_what_is_queued(relay: Kernel) -> None:
    failing = relay.send("import time; time.sleep(0.5); 1/0")
    queued = [relay.send(f"print({n})") for n in range(5)]
    for cell in (failing, *queued):
        relay.finish(cell)
    assert failing.error["ename"] == "ZeroDivisionError"
    assert [cell.status for cell in queued] == ["aborted"] * 5
    assert relay.run("print('on')").stdout == "on\n"


def test_comms_both_ways_with_buffers(relay: Kernel) -> None:
    relay.run(
        "def opened(comm, message):\n"
        "    comm.send({'got': [len(b) for b in message['buffers']]}, buffers=message['buffers'])\n"
        "get_ipython().kernel.comm_manager.register_target('echo', opened)"
    )
    session = relay.raw.session
    content = {"comm_id": "c1", "target_name": "echo", "data": {}}
    message = session.msg("comm_open", content)
    session.send(relay.raw.shell_channel.socket, message, buffers=[b"abc", b"x" * 2_000_000])
    opened = relay.of(message["header"]["msg_id"])
    relay.wait(lambda: opened.contents("comm_msg"), "the comm's answer")
    assert opened.contents("comm_msg")[0]["data"] == {"got": [3, 2_000_000]}


def test_a_comm_message_reaches_a_cell_that_awaits_it(relay: Kernel) -> None:
    relay.run(
        "import asyncio\ncame = asyncio.Event()\n"
        "get_ipython().kernel.comm_manager.register_target('come', lambda *_: came.set())"
    )
    cell = relay.send("print('waits'); await asyncio.wait_for(came.wait(), 60); print('came')")
    relay.wait_output(cell, "waits")
    relay.ask("comm_open", {"comm_id": "c2", "target_name": "come", "data": {}})
    assert relay.finish(cell).stdout.split() == ["waits", "came"]


def test_a_subshell_answers_while_a_cell_runs(relay: Kernel) -> None:
    reply = relay.request("create_subshell_request", {}, "control").reply
    cell = relay.send("print('begun'); import time; time.sleep(300)")
    relay.wait_output(cell, "begun")
    session = relay.raw.session
    message = session.msg("execute_request", {"code": "print('beside')", "silent": False})
    message["header"]["subshell_id"] = reply["subshell_id"]
    session.send(relay.raw.shell_channel.socket, message)
    beside = relay.finish(relay.of(message["header"]["msg_id"]))
    assert (beside.status, beside.stdout) == ("ok", "beside\n")
    assert not cell.idle
    relay.interrupt()
    assert relay.finish(cell).error["ename"] == "KeyboardInterrupt"


def test_the_debugger_is_reached(relay: Kernel) -> None:
    info = relay.request("kernel_info_request").reply
    assert "debugger" in info["supported_features"]
    content = {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}}
    reply = relay.request("debug_request", content, "control").reply
    assert reply["success"]
    assert reply["body"]["isStarted"] is False


def test_twins_differ(relay: Kernel, relay_kernel: str, start_kernel: StartKernel) -> None:
    code = (
        "import os, platform, random, secrets, tempfile, uuid\n"
        "print(random.random(), os.urandom(8).hex(), secrets.token_hex(), uuid.uuid1().node,"
        " tempfile.mktemp(), platform.node())"
    )
    with start_kernel(relay_kernel) as twin:
        mine, its = relay.run(code).stdout.split(), twin.run(code).stdout.split()
        assert len(mine) == len(its) == 6
        assert not set(mine) & set(its)


def test_a_kernel_that_died_is_replaced(relay: Kernel) -> None:
    cell = relay.run("import os; open('kept', 'w').write('content'); os._exit(5)")
    assert "exit status 5" in cell.error["evalue"]
    cell = relay.run("print(open('kept').read(), 'held' in dir(), 'os' in dir())")
    assert cell.stdout == "content False False\n"
    assert "TZ" in relay.run("import os; print(*os.environ)").stdout.split()
