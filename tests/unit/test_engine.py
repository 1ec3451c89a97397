"""The Python engine over a socket pair: what it says to the host, message by message.

The same engine is tested in real VMs in tests/jupyter; here its rules are shown without one.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enginehost import Engine
from vmkernel.protocol import messages


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine()
    engine.wake(JPY_SESSION_NAME="a.ipynb")
    yield engine
    engine.close()


def types(answers: list[messages.FromGuest]) -> list[str]:
    return [answer.msg_type for answer in answers]


def text(answers: list[messages.FromGuest], name: str = "stdout") -> str:
    return "".join(a.content["text"] for a in answers if a.content.get("name") == name)


def test_no_cell_runs_before_the_wake_up(tmp_path: Path) -> None:
    engine = Engine()
    try:
        mark = tmp_path / "ran"
        engine.cell(f"open({str(mark)!r}, 'w')")
        engine.wake()
        assert text(engine.run("print('awake')")) == "awake\n"
        assert not mark.exists()
    finally:
        engine.close()


def test_a_cell_is_input_result_reply_idle(engine: Engine) -> None:
    answers = engine.run("6*7")
    assert types(answers) == ["execute_input", "execute_result", "execute_reply", "status"]
    assert answers[1].content["data"] == {"text/plain": "42"}
    assert answers[2].channel == "shell"
    assert len({answer.parent_id for answer in answers}) == 1


def test_rehearsals_leave_no_trace(engine: Engine) -> None:
    fresh = Engine()
    try:
        fresh.wake()
        answers = fresh.run("(_, In, Out)", store_history=False)
        assert answers[0].content["execution_count"] == 1
        assert text(fresh.run("%who")) == "Interactive namespace is empty.\n"
    finally:
        fresh.close()


def test_the_session_name_is_known(engine: Engine) -> None:
    assert text(engine.run("print(__session__)")) == "a.ipynb\n"


def test_sources_of_output_keep_their_order(engine: Engine) -> None:
    code = "import os\nprint('a')\nos.system('echo b')\nprint('c')\nos.write(1, b'd\\n');"
    assert text(engine.run(code)) == "a\nb\nc\nd\n"


def test_output_appears_while_the_cell_runs(engine: Engine) -> None:
    msg_id = engine.cell("import time\nprint('first')\ntime.sleep(2)\nprint('last')")
    assert engine.receive().msg_type == "execute_input"
    began = time.monotonic()
    assert engine.receive().content["text"] == "first\n"
    rest = engine.until_idle(msg_id)
    assert text(rest) == "last\n"
    assert time.monotonic() - began > 0.5, "the first line came only with the last"


def test_much_output_is_coalesced_and_complete(engine: Engine) -> None:
    answers = engine.run("for n in range(100_000): print(n)")
    assert text(answers) == "".join(f"{n}\n" for n in range(100_000))
    assert len(answers) < 100


def test_a_split_character_stays_whole(engine: Engine) -> None:
    code = "import os, time\nfor b in '🐍é'.encode(): os.write(1, bytes([b])); time.sleep(.02)"
    assert text(engine.run(code)) == "🐍é"


def test_a_forked_child_prints_through_its_parent(engine: Engine) -> None:
    code = (
        "import os\npid = os.fork()\nif not pid: print('child'); os._exit(0)\nos.waitpid(pid, 0);"
    )
    assert text(engine.run(code)) == "child\n"


def test_silent_stores_and_shows_nothing(engine: Engine) -> None:
    answers = engine.run("6*7", silent=True, store_history=False)
    assert types(answers) == ["execute_reply", "status"]


def test_user_expressions_are_answered(engine: Engine) -> None:
    answers = engine.run("x = 5", user_expressions={"a": "x*2", "b": "1/0"})
    reply = next(a for a in answers if a.msg_type == "execute_reply").content
    assert reply["user_expressions"]["a"]["data"]["text/plain"] == "10"
    assert reply["user_expressions"]["b"]["ename"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import asyncio; await asyncio.sleep(60)",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "input('name? ')",
        "while True: print('x' * 1000)",
    ],
)
def test_an_interrupt_ends_the_cell_and_nothing_else(engine: Engine, code: str) -> None:
    engine.run("kept = 1")
    msg_id = engine.cell(code)
    assert engine.receive().msg_type == "execute_input"
    time.sleep(0.3)
    engine.process.send_signal(signal.SIGINT)
    answers = engine.until_idle(msg_id)
    error = next(a for a in answers if a.msg_type == "error").content["ename"]
    assert error in ("KeyboardInterrupt", "CancelledError")
    assert text(engine.run("print(kept)")) == "1\n"


def test_an_interrupt_while_idle_does_nothing(engine: Engine) -> None:
    engine.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert text(engine.run("print('still here')")) == "still here\n"


def test_interrupts_in_the_midst_of_output_break_no_frame(engine: Engine) -> None:
    for _ in range(20):
        msg_id = engine.cell("while True: print('y' * 100_000)")
        engine.receive()
        time.sleep(0.02)
        engine.process.send_signal(signal.SIGINT)
        engine.until_idle(msg_id)
    assert text(engine.run("print('whole')")) == "whole\n"


def test_input_asks_and_gets_an_answer(engine: Engine) -> None:
    msg_id = engine.cell("name = input('name? '); print('hello', name)")
    while (question := engine.receive()).msg_type != "input_request":
        pass
    assert question.channel == "stdin"
    assert question.content == {"prompt": "name? ", "password": False}
    engine.send("input_reply", {"value": "Grüße"}, "stdin")
    assert text(engine.until_idle(msg_id)) == "hello Grüße\n"


def test_input_that_is_not_allowed_is_an_error(engine: Engine) -> None:
    answers = engine.run("input()", allow_stdin=False)
    assert [a.content["ename"] for a in answers if a.msg_type == "error"] == [
        "StdinNotImplementedError"
    ]


def test_content_that_json_cannot_hold_arrives_all_the_same(engine: Engine) -> None:
    code = (
        "from IPython.display import publish_display_data as p\n"
        "p({'application/json': {'big': 10**40, 'nan': float('nan'), 'lone': '\\ud800'}})"
    )
    answers = engine.run(code)
    (shown,) = [a.content for a in answers if a.msg_type == "display_data"]
    assert shown["data"]["application/json"] == {"big": 10**40, "nan": None, "lone": "\\ud800"}
    assert types(answers)[-2:] == ["execute_reply", "status"]


def test_buffers_travel_beside_the_body(engine: Engine) -> None:
    answers = engine.run(
        "import comm\nc = comm.create_comm(target_name='t', buffers=[b'x' * 3_000_000])"
    )
    assert "comm_open" in types(answers)


@pytest.mark.parametrize(
    ("msg_type", "content", "field"),
    [
        ("complete_request", {"code": "import os; os.pa", "cursor_pos": 16}, "matches"),
        ("inspect_request", {"code": "print", "cursor_pos": 3, "detail_level": 0}, "found"),
        ("is_complete_request", {"code": "for i in x:"}, "indent"),
        ("comm_info_request", {}, "comms"),
        (
            "history_request",
            {"hist_access_type": "tail", "output": False, "raw": True, "n": 1},
            "history",
        ),
    ],
)
def test_the_editors_questions_are_answered(
    engine: Engine, msg_type: str, content: dict[str, Any], field: str
) -> None:
    answers = engine.until_idle(engine.send(msg_type, content))
    assert types(answers) == [msg_type.replace("_request", "_reply"), "status"]
    assert answers[0].content[field]


@pytest.mark.parametrize("jedi", [True, False])
def test_an_attribute_is_completed_without_its_dot(engine: Engine, jedi: bool) -> None:
    engine.run(f"import os\n%config Completer.use_jedi = {jedi}")
    answers = engine.until_idle(
        engine.send("complete_request", {"code": "os.pardi", "cursor_pos": 8})
    )
    content = answers[0].content
    assert content["matches"] == ["pardir"]
    assert (content["cursor_start"], content["cursor_end"]) == (3, 8)
    item = content["metadata"]["_jupyter_types_experimental"][0]
    assert (item["text"], item["start"]) == ("pardir", 3)


def test_a_dead_kernel_closes_its_port() -> None:
    engine = Engine()
    try:
        engine.wake()
        engine.cell("import os; os._exit(3)")
        with contextlib.suppress(ConnectionResetError):
            while engine.sock.recv(1 << 16):
                pass
        assert engine.process.wait(30) == 3
    finally:
        engine.close()


# --- what is heard while a cell runs ---


def subshell(engine: Engine) -> str:
    answers = engine.until_idle(engine.send("create_subshell_request", {}, "control"))
    assert types(answers) == ["create_subshell_reply", "status"]
    return str(answers[0].content["subshell_id"])


def test_a_subshell_answers_while_the_main_shell_is_blocked(engine: Engine) -> None:
    one = subshell(engine)
    main = engine.cell("import time; time.sleep(2); print('m')")
    code = {"code": "print('s'); 6*7", "silent": False}
    answers = engine.until_idle(engine.send("execute_request", code, subshell_id=one))
    assert text([a for a in answers if a.parent_id != main]) == "s\n"
    assert "status" not in [a.msg_type for a in answers if a.parent_id == main]
    assert text(engine.until_idle(main)) == "m\n"
    listed = engine.until_idle(engine.send("list_subshell_request", {}, "control"))
    assert listed[0].content == {"status": "ok", "subshell_id": [one]}
    for status in ("ok", "error"):
        gone = engine.until_idle(
            engine.send("delete_subshell_request", {"subshell_id": one}, "control")
        )
        assert gone[0].content["status"] == status


def test_input_in_a_subshell(engine: Engine) -> None:
    one = subshell(engine)
    code = {"code": "input('who? ')", "silent": False, "allow_stdin": True}
    msg_id = engine.send("execute_request", code, subshell_id=one)
    while engine.receive().msg_type != "input_request":
        pass
    engine.send("input_reply", {"value": "me"}, "stdin", subshell_id=one, msg_id=msg_id)
    answers = engine.until_idle(msg_id)
    assert [a.content["data"]["text/plain"] for a in answers if "data" in a.content] == ["'me'"]


def test_a_comm_message_reaches_a_cell_that_awaits_it(engine: Engine) -> None:
    engine.run(
        "import asyncio, comm\n"
        "came = asyncio.Future()\n"
        "comm.get_comm_manager().register_target('t', lambda c, m: came.set_result(7))\n"
        "await asyncio.sleep(0)"
    )
    msg_id = engine.cell("print(await came)")
    while (said := engine.receive()).msg_type != "awaiting":
        pass
    assert (said.channel, said.parent_id) == ("vm", msg_id)
    engine.send("comm_open", {"comm_id": "c", "target_name": "t", "data": {}})
    answers = engine.until_idle(msg_id)
    assert text(answers) == "7\n"
    assert {a.parent_id for a in answers} == {msg_id}  # no status of the comm message's own


def test_a_cell_that_awaits_nothing_says_so_of_none(engine: Engine) -> None:
    assert "awaiting" not in types(engine.run("import time; time.sleep(0.05)"))


def test_vm_asks_the_host(engine: Engine) -> None:
    msg_id = engine.cell("%vm info a b")
    while (question := engine.receive()).channel != "vm":
        pass
    assert question.content["command"] == "info"
    assert question.content["arguments"] == ["a", "b"]
    reply = {"status": "ok", "text": "slot 3"}
    engine.send("vm_reply", reply, "vm", msg_id=question.content["id"])
    assert text(engine.until_idle(msg_id)) == "slot 3\n"


def test_vm_can_be_interrupted(engine: Engine) -> None:
    msg_id = engine.cell("%vm")
    while engine.receive().channel != "vm":
        pass
    engine.process.send_signal(signal.SIGINT)
    errors = [a for a in engine.until_idle(msg_id) if a.msg_type == "error"]
    assert errors[0].content["ename"] == "KeyboardInterrupt"


def test_an_interrupts_traceback_ends_in_the_users_code(engine: Engine) -> None:
    msg_id = engine.cell("import time\nprint('on', flush=True)\ntime.sleep(30)")
    while engine.receive().msg_type != "stream":
        pass
    time.sleep(0.2)
    engine.process.send_signal(signal.SIGINT)
    (error,) = [a for a in engine.until_idle(msg_id) if a.msg_type == "error"]
    shown = "\n".join(error.content["traceback"])
    assert "time" in shown
    assert "port.py" not in shown


def test_a_threads_output_belongs_to_the_cell_that_runs_or_ran_last(engine: Engine) -> None:
    starter = engine.cell(
        "import threading, time\n"
        "go = threading.Event()\n"
        "def work():\n    time.sleep(0.5); print('late', flush=True); go.wait(); print('later')\n"
        "thread = threading.Thread(target=work); thread.start()"
    )
    assert text(engine.until_idle(starter)) == ""
    late = engine.receive()
    assert (late.parent_id, late.content["text"]) == (starter, "late\n")
    msg_id = engine.cell("go.set(); thread.join()")
    assert text([a for a in engine.until_idle(msg_id) if a.parent_id == msg_id]) == "later\n"


def test_cells_run_in_a_real_main_module(engine: Engine) -> None:
    code = (
        "import sys; main = sys.modules['__main__']\n"
        "print(type(main).__name__, vars(main) is globals(), __doc__)"
    )
    assert text(engine.run(code)).startswith("module True Automatically created module for IPython")


def test_a_context_variable_lives_from_cell_to_cell(engine: Engine) -> None:
    engine.run("from contextvars import ContextVar; v = ContextVar('v', default='d')")
    engine.run("_ = v.set('s')")
    assert text(engine.run("print(v.get())")) == "s\n"


ALARM = """
import os, signal
def on_alarm(*_):
    {handler}
signal.signal(signal.SIGALRM, on_alarm)
signal.setitimer(signal.ITIMER_REAL, {first})
try:
    {code}
finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
"""


def test_a_signal_handler_that_prints_in_the_midst_of_output_breaks_no_frame(
    engine: Engine,
) -> None:
    handler = "print('tick', flush=True); signal.setitimer(signal.ITIMER_REAL, .05)"
    code = "for _ in range(20): print('x' * 1_000_000, flush=True)"
    msg_id = engine.cell(ALARM.format(handler=handler, first=0.05, code=code))
    time.sleep(1)  # the host is slow, and writing to the port takes a while
    said = text(engine.until_idle(msg_id))
    assert said.count("x") == 20_000_000
    assert "tick" in said


def test_a_signal_handler_that_raises_in_the_midst_of_output_breaks_no_frame(
    engine: Engine,
) -> None:
    handler = "raise TimeoutError"
    code = "for _ in range(20): print('x' * 1_000_000, flush=True)"
    msg_id = engine.cell(ALARM.format(handler=handler, first=0.5, code=code))
    time.sleep(1)
    errors = [a for a in engine.until_idle(msg_id) if a.msg_type == "error"]
    assert [error.content["ename"] for error in errors] == ["TimeoutError"]
    assert text(engine.run("print('still there')")) == "still there\n"


def test_a_signal_handler_may_flush_whatever_it_comes_upon(engine: Engine) -> None:
    handler = "print('tick', flush=True); signal.setitimer(signal.ITIMER_REAL, .0005)"
    code = "for _ in range(5_000): os.write(1, b'x\\n'); print('y', flush=True)"
    said = text(engine.run(ALARM.format(handler=handler, first=0.0005, code=code)))
    assert said.count("x") == said.count("y") == 5_000
    assert "tick" in said


def test_a_control_request_that_would_wait_for_the_control_thread_fails(engine: Engine) -> None:
    code = {"code": "%vm", "silent": False}
    answers = engine.until_idle(engine.send("execute_request", code, "control"))
    assert "RuntimeError" in [a.content["ename"] for a in answers if a.msg_type == "error"]


def test_the_debugger_stops_at_a_breakpoint(engine: Engine) -> None:
    count = 0

    def ask(command: str, **arguments: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        request = {"type": "request", "seq": count, "command": command, "arguments": arguments}
        answers = engine.until_idle(engine.send("debug_request", request, "control"))
        (reply,) = [a.content for a in answers if a.msg_type == "debug_reply"]
        assert reply["success"], reply
        return dict(reply.get("body") or {})

    ask("initialize", clientID="t", adapterID="", pathFormat="path", linesStartAt1=True)
    ask("attach")
    code = "a = 20\nb = a + 1\nprint(b)"
    path = ask("dumpCell", code=code)["sourcePath"]
    ask("setBreakpoints", breakpoints=[{"line": 2}], source={"path": path})
    ask("configurationDone")
    cell = engine.cell(code)
    while True:
        event = engine.receive()
        if event.msg_type == "debug_event" and event.content["event"] == "stopped":
            break
    thread = event.content["body"]["threadId"]
    frame = ask("stackTrace", threadId=thread)["stackFrames"][0]
    assert frame["line"] == 2
    shown = ask("richInspectVariables", variableName="a", frameId=frame["id"])
    assert shown["data"]["text/plain"] == "20"
    rest = engine.send(
        "debug_request",
        {"type": "request", "seq": 99, "command": "continue", "arguments": {"threadId": thread}},
        "control",
    )
    done = engine.until_idle(cell)
    assert "21\n" in text(done)
    if not any(a.parent_id == rest and a.msg_type == "status" for a in done):
        engine.until_idle(rest)
    ask("disconnect", restart=False, terminateDebuggee=True)
