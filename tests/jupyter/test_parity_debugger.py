"""PARITY "Debugger": a session as JupyterLab's, with breakpoints in cells.

The protocol is the Debug Adapter Protocol's, in debug_request and debug_event
(https://jupyter-client.readthedocs.io/en/stable/messaging.html, "Debug request").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from kernel_client import Kernel, Message, StartKernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

CODE = """\
def add(a, b):
    total = a + b
    return total

result = add(2, 3)
print('result', result)
"""

_numbers = itertools.count(1)


def ask(kernel: Kernel, command: str, arguments: Message | None = None) -> Message:
    """Send a command of the Debug Adapter Protocol; its answer, which is a success."""
    content = {"type": "request", "seq": next(_numbers), "command": command}
    content["arguments"] = arguments or {}
    reply = kernel.request("debug_request", content, channel="control").reply
    assert reply.get("success", True), reply
    return reply


def wait_stopped(kernel: Kernel) -> int:
    """Wait for the next "stopped" event; the thread that stopped."""
    event: list[Message] = []

    def stopped() -> bool:
        event[:] = [one for one in kernel.events if one.get("event") == "stopped"]
        return bool(event)

    kernel.wait(stopped, "stopped")
    kernel.events.clear()
    return int(event[0]["body"]["threadId"])


def frames(kernel: Kernel, thread: int) -> list[Message]:
    found: list[Message] = ask(kernel, "stackTrace", {"threadId": thread})["body"]["stackFrames"]
    return found


def locals_of(kernel: Kernel, frame: int) -> dict[str, str]:
    scopes = ask(kernel, "scopes", {"frameId": frame})["body"]["scopes"]
    reference = next(scope["variablesReference"] for scope in scopes if scope["name"] == "Locals")
    found = ask(kernel, "variables", {"variablesReference": reference})["body"]["variables"]
    return {variable["name"]: variable["value"] for variable in found}


@pytest.fixture(scope="module")
def debugged(small_spec: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    """A kernel with a debugger attached."""
    with start_kernel(small_spec) as kernel:
        kernel.run("given = {'a': [1, 2]}")
        info: dict[str, Any] = kernel.request("kernel_info_request").reply
        assert "debugger" in info["supported_features"]
        assert ask(kernel, "debugInfo")["body"]["isStarted"] is False
        options = {"clientID": "test", "clientName": "test", "adapterID": "",
                   "pathFormat": "path", "linesStartAt1": True, "columnsStartAt1": True,
                   "supportsVariableType": True, "supportsVariablePaging": True,
                   "supportsRunInTerminalRequest": True, "locale": "en"}  # fmt: skip
        assert ask(kernel, "initialize", options)["success"] is True
        assert ask(kernel, "attach")["success"] is True
        yield kernel
        ask(kernel, "disconnect", {"restart": False, "terminateDebuggee": True})
        assert ask(kernel, "debugInfo")["body"]["isStarted"] is False
        assert kernel.run("1 + 1").result == "2"


@pytest.fixture
def source(debugged: Kernel) -> Iterator[str]:
    """The path of the code above, with a breakpoint in its second line."""
    path = str(ask(debugged, "dumpCell", {"code": CODE})["body"]["sourcePath"])
    places = {"source": {"path": path}, "breakpoints": [{"line": 2}], "sourceModified": False}
    (place,) = ask(debugged, "setBreakpoints", places)["body"]["breakpoints"]
    assert (place["verified"], place["line"]) == (True, 2)
    ask(debugged, "configurationDone")
    debugged.events.clear()
    yield path
    ask(debugged, "setBreakpoints", {**places, "breakpoints": []})


def test_the_state_of_the_session(debugged: Kernel, source: str) -> None:
    body = ask(debugged, "debugInfo")["body"]
    assert body["isStarted"] is True
    assert [one["source"] for one in body["breakpoints"]] == [source]
    assert source.startswith(body["tmpFilePrefix"])
    assert source.endswith(body["tmpFileSuffix"])
    assert ask(debugged, "source", {"source": {"path": source}})["body"]["content"] == CODE


def test_a_breakpoint_stops_steps_and_goes_on(debugged: Kernel, source: str) -> None:
    cell = debugged.send(CODE)
    thread = wait_stopped(debugged)
    assert not cell.idle
    top, caller = frames(debugged, thread)[:2]
    assert (top["name"], top["line"], top["source"]["path"]) == ("add", 2, source)
    assert caller["line"] == 5
    assert locals_of(debugged, top["id"]) == {"a": "2", "b": "3"}

    ask(debugged, "next", {"threadId": thread})
    thread = wait_stopped(debugged)
    top = frames(debugged, thread)[0]
    assert top["line"] == 3
    assert locals_of(debugged, top["id"])["total"] == "5"
    value = ask(debugged, "evaluate", {"expression": "total * 2", "frameId": top["id"]})
    assert value["body"]["result"] == "10"
    assert thread in ask(debugged, "debugInfo")["body"]["stoppedThreads"]

    arguments = {"srcVariableName": "total", "dstVariableName": "copied", "srcFrameId": top["id"]}
    ask(debugged, "copyToGlobals", arguments)
    rich = {"variableName": "total", "frameId": top["id"]}
    assert ask(debugged, "richInspectVariables", rich)["body"]["data"]["text/plain"] == "5"

    ask(debugged, "continue", {"threadId": thread})
    debugged.finish(cell)
    assert cell.stdout == "result 5\n"
    assert debugged.run("copied").result == "5"


def test_variables_while_nothing_is_stopped(debugged: Kernel) -> None:
    debugged.run("given = {'a': [1, 2]}")
    found = ask(debugged, "inspectVariables")["body"]["variables"]
    assert {"name": "given", "type": "dict"}.items() <= next(
        one for one in found if one["name"] == "given"
    ).items()
    body = ask(debugged, "richInspectVariables", {"variableName": "given"})["body"]
    assert body["data"]["text/plain"] == "{'a': [1, 2]}"


def test_a_cell_without_a_breakpoint_runs_through(debugged: Kernel) -> None:
    assert debugged.run("[n * n for n in range(4)]").result == "[0, 1, 4, 9]"
    assert debugged.run("1 / 0").error["ename"] == "ZeroDivisionError"


def test_modules_are_listed(debugged: Kernel) -> None:
    modules = ask(debugged, "modules", {"startModule": 0, "moduleCount": 5})["body"]
    assert modules["totalModules"] >= len(modules["modules"])
