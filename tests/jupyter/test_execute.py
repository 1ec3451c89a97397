"""execute_request in all its options, and what a cell can show."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
from kernel_client import Kernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


def count(kernel: Kernel) -> int:
    """The execution count now; asking for it does not change it."""
    return int(kernel.run("", silent=True).reply["execution_count"])


# --- the options of a request ---


def test_a_cell_counts_and_tells_what_it_runs(kernel: Kernel) -> None:
    before = count(kernel)
    cell = kernel.run("6 * 7")
    assert cell.types == ["execute_input", "execute_result"]
    (shown,) = cell.contents("execute_input")
    assert shown == {"code": "6 * 7", "execution_count": before + 1}
    (result,) = cell.contents("execute_result")
    assert result["execution_count"] == before + 1
    assert cell.reply["execution_count"] == before + 1
    assert cell.reply["user_expressions"] == {}
    states = [c["execution_state"] for c in cell.contents("status")]
    assert states == ["busy", "idle"]
    assert cell.messages[0]["msg_type"] == "status"
    assert cell.messages[-1]["msg_type"] == "status"


def test_silent_shows_neither_input_nor_result_and_does_not_count(kernel: Kernel) -> None:
    before = count(kernel)
    cell = kernel.run("x = 5; x", silent=True)
    assert cell.types == []
    assert cell.status == "ok"
    assert count(kernel) == before
    assert kernel.run("x").result == "5"


def test_store_history_false_does_not_count(kernel: Kernel) -> None:
    before = count(kernel)
    assert kernel.run("'not in history'", store_history=False).result == "'not in history'"
    assert count(kernel) == before
    history = kernel.request(
        "history_request", {"hist_access_type": "tail", "n": 5, "output": False, "raw": True}
    ).reply["history"]
    assert not any("not in history" in entry[2] for entry in history)


def test_user_expressions(kernel: Kernel) -> None:
    cell = kernel.run("a = 3", user_expressions={"double": "a * 2", "wrong": "1 / 0"})
    double = cell.reply["user_expressions"]["double"]
    assert (double["status"], double["data"]) == ("ok", {"text/plain": "6"})
    wrong = cell.reply["user_expressions"]["wrong"]
    assert (wrong["status"], wrong["ename"]) == ("error", "ZeroDivisionError")


def test_metadata_of_the_reply(kernel: Kernel) -> None:
    (reply,) = kernel.run("1").replies
    assert reply["msg_type"] == "execute_reply"
    assert reply["parent_header"]["msg_type"] == "execute_request"
    assert kernel.run("1/0").status == "error"


def test_the_headers_date_is_now(kernel: Kernel) -> None:
    cell = kernel.run("import time; print(time.time())")
    assert abs(float(cell.stdout) - time.time()) < 10
    for message in cell.messages:
        assert abs(message["header"]["date"].timestamp() - time.time()) < 10


def test_one_cell_has_started_when_the_one_before_it_has_ended(kernel: Kernel) -> None:
    """Front ends show how long a cell ran: reply's date less ``metadata.started``, of one clock."""
    cells = [kernel.send("import time; time.sleep(0.1)") for _ in range(10)]
    ended = None
    for cell in cells:
        (reply,) = kernel.finish(cell).replies
        started = datetime.fromisoformat(reply["metadata"]["started"])
        assert ended is None or started >= ended
        ended = reply["header"]["date"]
        assert 0.1 <= (ended - started).total_seconds() < 5


def test_a_syntax_error(kernel: Kernel) -> None:
    cell = kernel.run("for in x")
    assert cell.status == "error"
    assert cell.error["ename"] == "SyntaxError"
    assert cell.types == ["execute_input", "error"]


# --- errors and the queue ---


def test_an_error_has_a_coloured_traceback(kernel: Kernel) -> None:
    cell = kernel.run("def f(x):\n    return 1 / x\nf(0)")
    for content in (cell.error, cell.reply):
        assert content["ename"] == "ZeroDivisionError"
        assert content["evalue"] == "division by zero"
        assert "\x1b[" in "".join(content["traceback"])
    assert "----> 3" in cell.traceback.replace("\x1b[32m", "").replace("\x1b[39m", "")
    assert cell.status == "error"


def test_errors_that_chain_and_group(kernel: Kernel) -> None:
    cell = kernel.run(
        "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e"
    )
    assert cell.error["ename"] == "KeyError"
    assert "direct cause" in cell.traceback
    assert "ZeroDivisionError" in cell.traceback
    cell = kernel.run("raise ExceptionGroup('several', [ValueError(1), TypeError(2)])")
    assert cell.reply["ename"] == "ExceptionGroup"
    assert "TypeError: 2" in cell.stderr  # IPython prints these


def test_an_error_aborts_what_is_queued(kernel: Kernel) -> None:
    before = count(kernel)
    wrong = kernel.send("import time; time.sleep(0.5); 1/0")
    queued = [kernel.send(f"print({i})") for i in range(5)]
    kernel.finish(wrong)
    for cell in queued:
        kernel.finish(cell)
        assert cell.status == "aborted"
        assert cell.types == []
        assert cell.replies[0]["metadata"]["status"] == "aborted"
    assert kernel.run("'after'").result == "'after'"
    assert count(kernel) == before + 2


def test_without_stop_on_error_the_queue_goes_on(kernel: Kernel) -> None:
    wrong = kernel.send("import time; time.sleep(0.5); 1/0", stop_on_error=False)
    queued = [kernel.send(f"print({i})") for i in range(3)]
    assert kernel.finish(wrong).status == "error"
    for i, cell in enumerate(queued):
        assert kernel.finish(cell).stdout == f"{i}\n"


def test_an_error_does_not_abort_other_requests(kernel: Kernel) -> None:
    wrong = kernel.send("import time; time.sleep(0.5); 1/0")
    info = kernel.ask("kernel_info_request")
    complete = kernel.ask("complete_request", {"code": "zi", "cursor_pos": 2})
    dropped = kernel.send("print('never')")
    kernel.finish(wrong)
    assert kernel.finish(info).status == "ok"
    assert kernel.finish(complete).reply["matches"] == ["zip"]
    assert kernel.finish(dropped).status == "aborted"


def test_two_hundred_queued_cells_keep_their_order(kernel: Kernel) -> None:
    kernel.run("seen = []")
    cells = [kernel.send(f"seen.append({i}); print({i})") for i in range(200)]
    for i, cell in enumerate(cells):
        kernel.finish(cell)
        assert cell.stdout == f"{i}\n"
    counts = [cell.reply["execution_count"] for cell in cells]
    assert counts == list(range(counts[0], counts[0] + 200))
    assert kernel.run("seen == list(range(200))").result == "True"


def test_an_error_in_the_middle_of_a_long_queue(kernel: Kernel) -> None:
    before = count(kernel)
    kernel.send("import time; time.sleep(1)")
    cells = [kernel.send("1/0" if i == 20 else f"print({i})") for i in range(60)]
    for cell in cells:
        kernel.finish(cell)
    assert [cell.status for cell in cells] == ["ok"] * 20 + ["error"] + ["aborted"] * 39
    assert count(kernel) == before + 22


# --- what a cell shows ---


def test_display_comes_while_the_cell_runs(kernel: Kernel) -> None:
    cell = kernel.run("import time\ndisplay('early')\ntime.sleep(2)\ndisplay('late')")
    early, late = (t for t, m in zip(cell.times, cell.messages, strict=True)
                   if m["msg_type"] == "display_data")  # fmt: skip
    assert late - early > 1.5


def test_the_input_is_told_while_the_cell_runs(kernel: Kernel) -> None:
    cell = kernel.run("import time; time.sleep(2)")
    moments = dict(zip((m["msg_type"] for m in cell.messages), cell.times, strict=True))
    assert cell.times[-1] - moments["execute_input"] > 1.5


def test_rich_results(kernel: Kernel) -> None:
    cell = kernel.run(
        "class Rich:\n"
        "    def _repr_html_(self): return '<b>b</b>'\n"
        "    def _repr_markdown_(self): return '**b**', {'note': 1}\n"
        "    def _repr_png_(self): return b'\\x89PNG\\r\\n\\x1a\\n'\n"
        "    def __repr__(self): return 'b'\n"
        "Rich()"
    )
    (content,) = cell.contents("execute_result")
    data = content["data"]
    assert data["text/plain"] == "b"
    assert data["text/html"] == "<b>b</b>"
    assert data["text/markdown"] == "**b**"
    assert data["image/png"].strip() == "iVBORw0KGgo="
    assert content["metadata"] == {"text/markdown": {"note": 1}}


def test_display_update_and_clear(kernel: Kernel) -> None:
    cell = kernel.run(
        "from IPython.display import HTML, clear_output, display, update_display\n"
        "handle = display('first', display_id='here')\n"
        "update_display('second', display_id='here')\n"
        "clear_output(wait=True)\n"
        "display(HTML('<i>i</i>'))\n"
    )
    assert cell.types[1:] == [
        "display_data", "update_display_data", "clear_output", "display_data"
    ]  # fmt: skip
    shown = cell.contents("display_data", "update_display_data")
    assert [c["data"]["text/plain"] for c in shown[:2]] == ["'first'", "'second'"]
    assert shown[0]["transient"] == shown[1]["transient"] == {"display_id": "here"}
    assert shown[2]["data"]["text/html"] == "<i>i</i>"
    assert cell.contents("clear_output") == [{"wait": True}]
    # from a later cell
    later = kernel.run("handle.update('third')")
    (update,) = later.contents("update_display_data")
    assert update["transient"] == {"display_id": "here"}


def test_output_formats_that_json_does_not_know(kernel: Kernel) -> None:
    cell = kernel.run("display({'application/json': {'n': float('nan'), 1: (2, 3)}}, raw=True)")
    assert cell.status == "ok"
    assert cell.types == ["execute_input", "display_data"]
    assert kernel.run("display({'text/plain': 'lone \\udc80'}, raw=True)").status == "ok"
    assert kernel.run("1").result == "1"


def test_a_large_result(kernel: Kernel) -> None:
    cell = kernel.run("from IPython.display import HTML\nHTML('h' * 20_000_000)")
    (content,) = cell.contents("execute_result")
    assert len(content["data"]["text/html"]) == 20_000_000


def test_names_of_earlier_results(kernel: Kernel) -> None:
    number = kernel.run("'kept'").reply["execution_count"]
    assert kernel.run("_").result == "'kept'"
    assert kernel.run(f"_{number}, Out[{number}], In[{number}]").result == (
        "('kept', 'kept', \"'kept'\")"
    )


# --- IPython ---


def test_top_level_await(kernel: Kernel) -> None:
    assert kernel.run("import asyncio\nawait asyncio.sleep(0.1, 'slept')").result == "'slept'"
    cell = kernel.run("async with asyncio.timeout(0.1): await asyncio.sleep(9)")
    assert cell.error["ename"] == "TimeoutError"
    assert kernel.run("await asyncio.gather(*(asyncio.sleep(0, i) for i in range(3)))").result == (
        "[0, 1, 2]"
    )


def test_a_task_lives_between_cells(kernel: Kernel) -> None:
    kernel.run(
        "import asyncio\nticks = 0\n"
        "async def tick():\n"
        "    global ticks\n"
        "    while True:\n"
        "        ticks += 1\n"
        "        await asyncio.sleep(0.05)\n"
        "ticker = asyncio.create_task(tick())"
    )
    kernel.listen(1.0)
    assert int(kernel.run("ticks").result) > 3
    kernel.run("ticker.cancel()")


MAGICS = {
    "%pwd": lambda cell: cell.result == "'/home/user'",
    "%env HOME": lambda cell: cell.result == "'/home/user'",
    "a, b = 1, 'x'\n%who": lambda cell: "a" in cell.stdout,
    "!echo from the shell": lambda cell: cell.stdout == "from the shell\r\n",
    "files = !printf 'a\\nb\\n'\nfiles": lambda cell: cell.result == "['a', 'b']",
    "%%bash\necho out; echo err >&2": lambda cell: (cell.stdout, cell.stderr) == ("out\n", "err\n"),
    "%%capture held\nprint('inside'); display(1)": lambda cell: cell.stdout == "",
    "held.stdout": lambda cell: cell.result == "'inside\\n'",
    "%%writefile note.txt\nwords": lambda cell: "Writing note.txt" in cell.stdout,
    "%cat note.txt": lambda cell: "words" in cell.stdout,
    "%%writefile prog.py\nvalue = 41 + 1\nprint('ran')": lambda cell: cell.status == "ok",
    "%run prog.py": lambda cell: cell.stdout == "ran\n",
    "import prog; prog.value": lambda cell: cell.result == "42",
    "%timeit -n 3 -r 2 sum(range(100))": lambda cell: "per loop" in cell.stdout,
    "%%time\nx = 1": lambda cell: "Wall time" in cell.stdout,
    "%load_ext autoreload": lambda cell: cell.status == "ok",
    "%autoreload 2": lambda cell: cell.status == "ok",
    "%%html\n<b>b</b>": lambda cell: cell.types[1:] == ["display_data"],
    "%lsmagic": lambda cell: cell.status == "ok",
    "%nosuchmagic": lambda cell: "not found" in cell.stderr,
    "%history -n 1": lambda cell: cell.status == "ok",
    "%%python3\nimport sys; print(sys.version_info[0])": lambda cell: cell.stdout == "3\n",
    "%%bash\nexit 3": lambda cell: cell.error["ename"] == "CalledProcessError",
    "%system echo caught": lambda cell: cell.result == "['caught']",
    "%reset -f": lambda cell: cell.status == "ok",
    "held": lambda cell: cell.error["ename"] == "NameError",
}


def test_magics(kernel: Kernel) -> None:
    for code, right in MAGICS.items():
        cell = kernel.run(code)
        assert right(cell), f"{code!r}: {cell.contents('stream', 'error')} {cell}"


def test_pip_without_a_network_says_so(kernel: Kernel) -> None:
    cell = kernel.run("%pip install --no-input surely-no-such-package", seconds=200)
    assert cell.stdout + cell.stderr
    text = (cell.stdout + cell.stderr).lower()
    assert "no matching distribution" in text
    assert "name resolution" in text
    assert "the-setting-network-is-none" in text  # `!pip` has no more than that
    assert "(setting network: none)" in cell.stderr
    assert "VMKERNEL_NETWORK=packages" in cell.stderr
    assert cell.times[-1] < 100


def test_the_pager(kernel: Kernel) -> None:
    cell = kernel.run("zip?")
    (payload,) = cell.reply["payload"]
    assert payload["source"] == "page"
    assert "zip" in payload["data"]["text/plain"]
    assert payload["start"] == 0


def test_set_next_input(kernel: Kernel) -> None:
    cell = kernel.run("get_ipython().set_next_input('1 + 1')")
    (payload,) = cell.reply["payload"]
    assert payload == {"source": "set_next_input", "text": "1 + 1", "replace": False}
    kernel.run("%%writefile loaded.py\nloaded = True")
    (payload,) = kernel.run("%load loaded.py").reply["payload"]
    assert "loaded = True" in payload["text"]


def test_completion_and_inspection(kernel: Kernel) -> None:
    kernel.run("astral_𝒳 = 'x'; astral_other = 3")
    # cursor positions count characters, astral ones too
    code = "'👾👾'; astral_o"
    reply = kernel.request("complete_request", {"code": code, "cursor_pos": len(code)}).reply
    assert reply["matches"] == ["astral_other"]
    assert (reply["cursor_start"], reply["cursor_end"]) == (len(code) - 8, len(code))
    reply = kernel.request(
        "inspect_request", {"code": "astral_other", "cursor_pos": 3, "detail_level": 0}
    ).reply
    assert reply["found"]
    assert "int" in reply["data"]["text/plain"]
    reply = kernel.request("is_complete_request", {"code": "if x:"}).reply
    assert reply == {"status": "incomplete", "indent": "    "}


@pytest.mark.parametrize("code", ["1/0; 1", "raise SystemExit", "import sys; sys.exit(3)"])
def test_an_error_or_exit_keeps_the_state(kernel: Kernel, code: str) -> None:
    kernel.run("held = 'on'")
    assert kernel.run(code).status == "error"
    assert kernel.run("held").result == "'on'"


def test_an_unknown_request_is_answered(kernel: Kernel) -> None:
    """Plain ipykernel leaves it unanswered; nobody must wait for us, or find us stuck."""
    cell = kernel.ask("no_such_request")
    kernel.wait(lambda: cell.idle, "idle")
    assert kernel.run("1").result == "1"


def test_wrongly_signed_messages_are_dropped(kernel: Kernel) -> None:
    session = kernel.raw.session
    key, session.key = session.key, b"wrong"
    try:
        forged = kernel.send("forged = True")
    finally:
        session.key = key
    assert kernel.run("'forged' in globals()").result == "False"
    assert not forged.replies


def test_exit(kernel: Kernel) -> None:
    """The last test of this module: it ends the kernel, as it does plain ipykernel."""
    cell = kernel.run("exit(keep_kernel=True)")
    assert cell.reply["payload"] == [{"source": "ask_exit", "keepkernel": True}]
    kernel.listen(1)
    assert kernel.run("1 + 1").result == "2"
    cell = kernel.run("exit")
    assert cell.status == "ok"
    assert cell.reply["payload"] == [{"source": "ask_exit", "keepkernel": False}]
    assert kernel.manager.provisioner.process.wait(20) == 0
