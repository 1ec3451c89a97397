"""input() and its relatives: asked in the guest, answered in the front end."""

from __future__ import annotations

import pytest
from kernel_client import Client, Kernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


def answer(client: Client, text: str) -> None:
    """What the user types."""
    client.raw.input(text)


def test_input(kernel: Kernel) -> None:
    cell = kernel.send("name = input('Your name: ')\nprint('Hello', name)", allow_stdin=True)
    assert kernel.wait_question(cell) == {"prompt": "Your name: ", "password": False}
    (question,) = cell.questions
    assert question["msg_type"] == "input_request"
    assert question["parent_header"]["msg_id"] == cell.msg_id
    answer(kernel, "Ζωή 👾")
    kernel.finish(cell)
    assert cell.stdout == "Hello Ζωή 👾\n"


def test_several_in_one_cell(kernel: Kernel) -> None:
    cell = kernel.send("[input(f'{i}? ') for i in range(3)]", allow_stdin=True)
    for i in range(3):
        assert kernel.wait_question(cell, i + 1)["prompt"] == f"{i}? "
        answer(kernel, f"answer {i}")
    assert kernel.finish(cell).result == "['answer 0', 'answer 1', 'answer 2']"


def test_a_long_answer(kernel: Kernel) -> None:
    cell = kernel.send("len(input())", allow_stdin=True)
    kernel.wait_question(cell)
    answer(kernel, "x" * 2_000_000)
    assert kernel.finish(cell).result == "2000000"


def test_a_password(kernel: Kernel) -> None:
    cell = kernel.send("import getpass; getpass.getpass('Secret: ')", allow_stdin=True)
    assert kernel.wait_question(cell) == {"prompt": "Secret: ", "password": True}
    answer(kernel, "xyzzy")
    assert kernel.finish(cell).result == "'xyzzy'"


@pytest.mark.parametrize("code", ["input()", "import getpass; getpass.getpass()"])
def test_not_where_the_front_end_allows_none(kernel: Kernel, code: str) -> None:
    cell = kernel.run(code, allow_stdin=False)
    assert cell.error["ename"] == "StdinNotImplementedError"
    assert not cell.questions


def test_what_was_printed_before_is_seen_first(kernel: Kernel) -> None:
    cell = kernel.send(
        "import sys\nprint('one')\nprint('two', file=sys.stderr)\ninput('three? ')",
        allow_stdin=True,
    )
    kernel.wait_question(cell)
    kernel.wait_output(cell, "one")
    kernel.wait(lambda: "two" in cell.stderr, "stderr")
    answer(kernel, "yes")
    kernel.finish(cell)


def test_output_flows_while_a_question_is_open(kernel: Kernel) -> None:
    cell = kernel.send(
        "import threading, time\n"
        "def talk():\n"
        "    for i in range(5):\n"
        "        print('tick', i)\n"
        "        time.sleep(0.1)\n"
        "threading.Thread(target=talk).start()\n"
        "input('? ')",
        allow_stdin=True,
    )
    kernel.wait_question(cell)
    kernel.wait_output(cell, "tick 4")
    answer(kernel, "done")
    assert kernel.finish(cell).result == "'done'"


def test_end_of_file(kernel: Kernel) -> None:
    cell = kernel.send("input()", allow_stdin=True)
    kernel.wait_question(cell)
    answer(kernel, "\x04")
    assert kernel.finish(cell).error["ename"] == "EOFError"


def test_an_interrupt_ends_the_question(kernel: Kernel) -> None:
    cell = kernel.send("input('? ')", allow_stdin=True)
    kernel.wait_question(cell)
    kernel.interrupt()
    kernel.finish(cell)
    assert cell.error["ename"] == "KeyboardInterrupt"
    # Typed too late: it answers neither the next question nor breaks anything.
    answer(kernel, "late")
    assert kernel.run("1 + 1").result == "2"
    cell = kernel.send("input('again? ')", allow_stdin=True)
    kernel.wait_question(cell)
    answer(kernel, "in time")
    assert kernel.finish(cell).result == "'in time'"


def test_cells_behind_a_question_wait(kernel: Kernel) -> None:
    cell = kernel.send("x = input('? ')", allow_stdin=True)
    later = kernel.send("x")
    kernel.wait_question(cell)
    kernel.listen(0.5)
    assert not later.replies
    answer(kernel, "typed")
    assert kernel.finish(later).result == "'typed'"


def test_pdb(kernel: Kernel) -> None:
    cell = kernel.send(
        "def f(x):\n    import pdb; pdb.set_trace()\n    return x + 1\nf(41)", allow_stdin=True
    )
    prompt = kernel.wait_question(cell)["prompt"]
    assert "db" in prompt
    answer(kernel, "p x")
    kernel.wait_question(cell, 2)
    kernel.wait_output(cell, "41")
    answer(kernel, "c")
    assert kernel.finish(cell).result == "42"


def test_debug_after_an_error(kernel: Kernel) -> None:
    assert kernel.run("def g(secret): 1/0\ng('xyzzy')").status == "error"
    cell = kernel.send("%debug", allow_stdin=True)
    assert "ipdb" in kernel.wait_question(cell)["prompt"]
    answer(kernel, "p secret")
    kernel.wait_question(cell, 2)
    kernel.wait_output(cell, "xyzzy")
    answer(kernel, "q")
    assert kernel.finish(cell).status == "ok"


def test_an_interrupt_in_pdb(kernel: Kernel) -> None:
    cell = kernel.send("import pdb; pdb.set_trace()", allow_stdin=True)
    kernel.wait_question(cell)
    kernel.interrupt()
    # pdb takes an interrupt as a new, empty line or as its end, by version
    kernel.wait(lambda: cell.done or len(cell.questions) > 1, "pdb's reaction")
    if not cell.done:
        answer(kernel, "q")
        kernel.finish(cell)
    assert kernel.run("1 + 1").result == "2"


def test_the_front_end_that_runs_the_cell_is_asked(kernel: Kernel) -> None:
    with kernel.another_client() as other:
        cell = other.send("input('who? ')", allow_stdin=True)
        other.wait_question(cell)
        kernel.listen(0.3)
        assert not kernel.of(cell.msg_id).questions
        answer(other, "me")
        assert other.finish(cell).result == "'me'"


def test_programs_that_read_standard_input_find_its_end(kernel: Kernel) -> None:
    """With plain ipykernel some wait for ever: its standard input is what the front end left."""
    assert kernel.run("import subprocess; subprocess.run(['cat']).returncode").result == "0"
    assert kernel.run("import sys; sys.stdin.read()").result == "''"
    assert kernel.run("%%bash\ncat; echo done").stdout == "done\n"
