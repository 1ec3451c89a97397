"""PARITY "Subshells": made, listed, ended; and one answers while a cell runs in the main shell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_client import Cell, Kernel, Message

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

BUSY = "print('begin')\nimport time\nwhile not globals().get('stop'): time.sleep(0.02)"


def control(kernel: Kernel, verb: str, **content: str) -> Message:
    return kernel.request(f"{verb}_subshell_request", dict(content), channel="control").reply


@pytest.fixture
def subshell(kernel: Kernel) -> Iterator[str]:
    """The id of a subshell of the test's own."""
    reply = control(kernel, "create")
    assert reply["status"] == "ok"
    yield str(reply["subshell_id"])
    control(kernel, "delete", subshell_id=reply["subshell_id"])


def send(kernel: Kernel, subshell: str, code: str, **options: object) -> Cell:
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {},
               "allow_stdin": False, "stop_on_error": True, **options}  # fmt: skip
    return kernel.ask("execute_request", content, subshell_id=subshell)


def run(kernel: Kernel, subshell: str, code: str, **options: object) -> Cell:
    return kernel.finish(send(kernel, subshell, code, **options))


def test_create_list_and_delete(kernel: Kernel) -> None:
    assert "kernel subshells" in kernel.request("kernel_info_request").reply["supported_features"]
    assert control(kernel, "list")["subshell_id"] == []
    ids = [control(kernel, "create")["subshell_id"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert sorted(control(kernel, "list")["subshell_id"]) == sorted(ids)
    for subshell_id in ids:
        assert control(kernel, "delete", subshell_id=subshell_id)["status"] == "ok"
    assert control(kernel, "list")["subshell_id"] == []
    assert control(kernel, "delete", subshell_id=ids[0])["status"] == "error"
    assert kernel.run("1 + 1").result == "2"


def test_it_shares_variables_and_the_count(kernel: Kernel, subshell: str) -> None:
    kernel.run("shared = 1")
    cell = run(kernel, subshell, "shared += 1; print('from the subshell'); shared")
    assert cell.result == "2"
    assert cell.stdout == "from the subshell\n"
    assert cell.replies[0]["parent_header"]["subshell_id"] == subshell
    after = kernel.run("shared")
    assert after.result == "2"
    assert after.reply["execution_count"] == cell.reply["execution_count"] + 1


def test_it_answers_while_a_cell_runs(kernel: Kernel, subshell: str) -> None:
    main = kernel.send(BUSY)
    kernel.wait_output(main, "begin")
    assert run(kernel, subshell, "6 * 7").result == "42"
    complete = kernel.ask("complete_request", {"code": "zi", "cursor_pos": 2}, subshell_id=subshell)
    assert kernel.finish(complete).reply["matches"] == ["zip"]
    inspect = kernel.ask(
        "inspect_request", {"code": "len", "cursor_pos": 3, "detail_level": 0}, subshell_id=subshell
    )
    assert kernel.finish(inspect).reply["found"]
    assert not main.idle
    run(kernel, subshell, "stop = True")
    assert kernel.finish(main).status == "ok"
    kernel.run("del stop")


def test_output_is_filed_under_its_own_cell(kernel: Kernel, subshell: str) -> None:
    talk = "import time\nfor i in range(20): print('{}', i, flush=True); time.sleep(0.02)"
    main = kernel.send(talk.format("main"))
    other = send(kernel, subshell, talk.format("other"))
    for cell, name in ((kernel.finish(main), "main"), (kernel.finish(other), "other")):
        assert cell.stdout == "".join(f"{name} {i}\n" for i in range(20))


def test_an_error_aborts_its_own_queue_only(kernel: Kernel, subshell: str) -> None:
    main = [kernel.send(f"import time; time.sleep(0.3); print({i})") for i in range(3)]
    wrong = send(kernel, subshell, "import time; time.sleep(0.3); 1 / 0")
    behind = send(kernel, subshell, "print('never')")
    assert kernel.finish(wrong).status == "error"
    assert kernel.finish(behind).status == "aborted"
    assert [kernel.finish(cell).stdout for cell in main] == ["0\n", "1\n", "2\n"]


def test_input_in_a_subshell(kernel: Kernel, subshell: str) -> None:
    cell = send(kernel, subshell, "print('hello', input('name? '))", allow_stdin=True)
    assert kernel.wait_question(cell)["prompt"] == "name? "
    assert kernel.run("1 + 1").result == "2"  # the main shell goes on meanwhile
    kernel.raw.input("Ada")
    assert kernel.finish(cell).stdout == "hello Ada\n"


def test_an_interrupt_is_for_the_main_shell(kernel: Kernel, subshell: str) -> None:
    main = kernel.send("print('begin')\nwhile True: pass")
    kernel.wait_output(main, "begin")
    other = send(kernel, subshell, "print('other')\nimport time; time.sleep(2); 'unharmed'")
    kernel.wait_output(other, "other")
    kernel.interrupt()
    assert kernel.finish(main, 30).reply["ename"] == "KeyboardInterrupt"
    assert kernel.finish(other).result == "'unharmed'"


def test_await_in_a_subshell(kernel: Kernel, subshell: str) -> None:
    assert run(kernel, subshell, "import asyncio; await asyncio.sleep(0.1, 'slept')").result == (
        "'slept'"
    )


def test_an_unknown_subshell_harms_nothing(kernel: Kernel) -> None:
    """Plain ipykernel leaves the request unanswered; here that is not asked for."""
    send(kernel, "no-such-subshell", "1")
    kernel.listen(0.5)
    assert kernel.run("1 + 1").result == "2"
