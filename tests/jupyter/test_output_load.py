"""Much output at once: a write's short way keeps order, owner and liveness, and loses nothing."""

from __future__ import annotations

import ast

import pytest
from kernel_client import Cell, Kernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


def arrival(cell: Cell, text: str) -> float:
    """When *text* came, in seconds after the cell was sent."""
    for moment, message in zip(cell.times, cell.messages, strict=True):
        if message["msg_type"] == "stream" and text in message["content"]["text"]:
            return moment
    raise AssertionError(f"{text!r} did not come")


def test_prints_and_what_is_written_to_the_descriptor_keep_their_order(kernel: Kernel) -> None:
    cell = kernel.run(
        "import os, time\n"
        "for i in range(100):\n"
        "    for j in range(20): print(f'print {i}.{j}')\n"
        "    os.write(1, f'write {i}\\n'.encode())\n"
        "    time.sleep(0.002)\n"
    )
    wanted = [
        line for i in range(100) for line in [*(f"print {i}.{j}" for j in range(20)), f"write {i}"]
    ]
    assert cell.stdout.splitlines() == wanted


def test_prints_and_children_keep_their_order(kernel: Kernel) -> None:
    cell = kernel.run(
        "import subprocess\n"
        "for i in range(10):\n"
        "    for j in range(500): print(f'print {i}.{j}')\n"
        "    _ = subprocess.run(['echo', f'child {i}'])\n"
    )
    wanted = [
        line for i in range(10) for line in [*(f"print {i}.{j}" for j in range(500)), f"child {i}"]
    ]
    assert cell.stdout.splitlines() == wanted


def test_the_last_line_of_many_does_not_wait_for_the_next(kernel: Kernel) -> None:
    cell = kernel.run("for i in range(2_000): print(i)\nimport time; time.sleep(3)")
    assert cell.stdout.split() == [str(i) for i in range(2_000)]
    assert cell.times[-1] - arrival(cell, "\n1999\n") > 1.5


def test_tasks_and_cells_print_much_in_turns(kernel: Kernel) -> None:
    first = kernel.run(
        "import asyncio\n"
        "async def talk():\n"
        "    for i in range(300):\n"
        "        print('task', i)\n"
        "        print('more', i)\n"
        "        await asyncio.sleep(0)\n"
        "task = asyncio.create_task(talk())"
    )
    second = kernel.run(
        "for i in range(300):\n    print('cell', i)\n    await asyncio.sleep(0)\nawait task"
    )
    kernel.wait_output(first, "more 299")
    assert first.stdout == "".join(f"task {i}\nmore {i}\n" for i in range(300))
    assert second.stdout == "".join(f"cell {i}\n" for i in range(300))


def test_a_child_forked_among_prints_has_its_own_words_only(kernel: Kernel) -> None:
    cell = kernel.run(
        "import os, sys\n"
        "for i in range(50): print('before', i)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    for i in range(50): print('child', i)\n"
        "    sys.stdout.flush()\n"
        "    os._exit(0)\n"
        "_ = os.waitpid(pid, 0)\n"
        "for i in range(50): print('after', i)\n"
    )
    wanted = [f"{word} {i}" for word in ("before", "child", "after") for i in range(50)]
    assert cell.stdout.splitlines() == wanted


def test_long_text_of_all_planes_arrives(kernel: Kernel) -> None:
    cell = kernel.run("print('é漢👾 \\\\ \"\\n' * 400_000, end='')")
    assert cell.stdout == 'é漢👾 \\ "\n' * 400_000
    cell = kernel.run("print('\\ud800' * 5_000)")
    assert cell.stdout == "\\ud800" * 5_000 + "\n"


def test_a_write_of_the_users_own_takes_the_place_of_ours(kernel: Kernel) -> None:
    cell = kernel.run(
        "import sys\n"
        "usual, seen = sys.stdout.write, []\n"
        "def write(text):\n"
        "    seen.append(text)\n"
        "    return usual(text.upper())\n"
        "sys.stdout.write = write\n"
        "print('one'); print('two')\n"
        "sys.stdout.write = usual\n"
        "print('three', seen)"
    )
    assert cell.stdout == "ONE\nTWO\nthree ['one', '\\n', 'two', '\\n']\n"


def test_ipython_has_kept_what_was_printed(kernel: Kernel) -> None:
    """As `%notebook` wants it; not what children wrote, as in plain ipykernel."""
    cell = kernel.run(
        "import subprocess, sys\nprint('one')\nsubprocess.run(['echo', 'child'])\nprint('two')\n"
        "print('wrong', file=sys.stderr)\n'result'"
    )
    assert cell.stdout == "one\nchild\ntwo\n"
    kept = kernel.run(
        "[(o.output_type, ''.join(o.bundle.get('stream', o.bundle.get('text/plain'))))\n"
        " for o in get_ipython().history_manager.outputs[len(In) - 2]]"
    )
    assert sorted(ast.literal_eval(str(kept.result))) == [
        ("err_stream", "wrong\n"), ("execute_result", "'result'"), ("out_stream", "one\ntwo\n"),
    ]  # fmt: skip
    kept = kernel.run("get_ipython().history_manager.outputs[len(In) - 3][-1].output_type")
    assert kept.result == "'execute_result'"
