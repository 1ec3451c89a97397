"""What is printed arrives: whoever prints it, live, in order, whole, and not in too many pieces."""

from __future__ import annotations

import re
import time

import pytest
from kernel_client import Cell, Kernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


def arrival(cell: Cell, text: str) -> float:
    """When *text* came, in seconds after the cell was sent."""
    for moment, message in zip(cell.times, cell.messages, strict=True):
        if message["msg_type"] == "stream" and text in message["content"]["text"]:
            return moment
    raise AssertionError(f"{text!r} did not come in one piece: {cell.contents('stream')}")


WRITERS = {
    "print": "print('{}')",
    "stderr": "import sys; print('{}', file=sys.stderr)",
    "write(1)": "import os; os.write(1, b'{}\\n')",
    "puts": "import ctypes; libc = ctypes.CDLL(None); libc.puts(b'{}'); libc.fflush(None)",
    "subprocess": "import subprocess; subprocess.run(['echo', '{}'])",
    "shell": "!echo {}",
    "thread": "import threading; t = threading.Thread(target=print, args=('{}',)); "
    "t.start(); t.join()",
    "logging": "import logging; logging.warning('{}')",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_output_comes_while_the_cell_runs(kernel: Kernel, writer: str) -> None:
    code = "\n".join(
        (WRITERS[writer].format("early"), "import time; time.sleep(1.5)",
         WRITERS[writer].format("late"))
    )  # fmt: skip
    cell = kernel.run(code)
    assert cell.status == "ok"
    assert arrival(cell, "late") - arrival(cell, "early") > 1.0


def test_a_subprocess_is_heard_while_it_runs(kernel: Kernel) -> None:
    command = "echo early; sleep 1.5; echo late; echo wrong >&2"
    cell = kernel.run(f"import subprocess; x = subprocess.run({command!r}, shell=True)")
    assert cell.stdout == "early\nlate\n"
    assert cell.stderr == "wrong\n"
    assert arrival(cell, "late") - arrival(cell, "early") > 1.0


def test_stdout_and_stderr_take_turns(kernel: Kernel) -> None:
    cell = kernel.run(
        "import sys\nfor i in range(5):\n    print('out', i)\n    print('err', i, file=sys.stderr)"
    )
    texts = [(c["name"], c["text"]) for c in cell.contents("stream")]
    assert cell.stdout == "".join(f"out {i}\n" for i in range(5))
    assert cell.stderr == "".join(f"err {i}\n" for i in range(5))
    assert {name for name, _ in texts} == {"stdout", "stderr"}


def test_order_of_output_and_display(kernel: Kernel) -> None:
    cell = kernel.run(
        "import subprocess\n"
        "print('one')\ndisplay('two')\nsubprocess.run(['echo', 'three'])\nprint('four')\n"
        "display('five')\n!echo six\nprint('seven')\n'eight'"
    )
    seen = ""
    for content in cell.contents("stream", "display_data", "execute_result"):
        seen += content["text"] if "text" in content else content["data"]["text/plain"] + "\n"
    assert re.findall(r"\w+", seen) == "one two three four five six seven eight".split()


def test_order_of_print_and_what_children_write(kernel: Kernel) -> None:
    """A flush between the two settles the order, as with plain ipykernel."""
    cell = kernel.run(
        "import subprocess\n"
        "for i in range(5):\n"
        "    print('python', i, flush=True)\n"
        "    _ = subprocess.run(['echo', f'child {i}'])"
    )
    assert cell.stdout == "".join(f"python {i}\nchild {i}\n" for i in range(5))


def test_a_progress_bar_moves(kernel: Kernel) -> None:
    cell = kernel.run(
        "import time\n"
        "for i in range(0, 101, 20):\n"
        "    print(f'\\r{i:3} %', end='', flush=True)\n"
        "    time.sleep(0.3)\n"
    )
    assert cell.stdout == "".join(f"\r{i:3} %" for i in range(0, 101, 20))
    moments = [arrival(cell, f"{i:3} %") for i in range(0, 101, 20)]
    assert moments == sorted(moments)
    assert len(set(moments)) >= 5


def test_a_thread_that_outlives_its_cell_is_heard(kernel: Kernel) -> None:
    """Under the cell that runs then, as with plain ipykernel 7; the test holds only: not lost."""
    first = kernel.run(
        "import threading, time\n"
        "def talk():\n"
        "    print('begin')\n"
        "    go_on.wait(60)\n"
        "    print('late words')\n"
        "go_on = threading.Event()\n"
        "thread = threading.Thread(target=talk)\n"
        "thread.start()\n"
        "time.sleep(0.5)"
    )
    second = kernel.run("go_on.set(); thread.join(); print('of the second')")
    kernel.wait(lambda: "late words" in first.stdout + second.stdout, "the thread's last words")
    assert first.stdout.startswith("begin\n")
    assert "of the second\n" in second.stdout


def test_a_thread_prints_while_no_cell_runs(kernel: Kernel) -> None:
    cell = kernel.run(
        "import threading\nt = threading.Timer(1.0, print, ['still here'])\nt.start()"
    )
    assert cell.stdout == ""
    kernel.wait_output(cell, "still here")


def test_a_task_prints_under_the_cell_that_started_it(kernel: Kernel) -> None:
    first = kernel.run(
        "import asyncio\n"
        "async def talk():\n"
        "    for i in range(4):\n"
        "        print('task', i)\n"
        "        await asyncio.sleep(0.3)\n"
        "task = asyncio.create_task(talk())"
    )
    second = kernel.run("print('between'); await task")
    kernel.wait_output(first, "task 3")
    assert first.stdout == "".join(f"task {i}\n" for i in range(4))
    assert second.stdout == "between\n"


def test_a_late_child_prints_after_its_cell(kernel: Kernel) -> None:
    cell = kernel.run(
        "import subprocess\nchild = subprocess.Popen(['sh', '-c', 'sleep 1; echo from the child'])"
    )
    assert cell.idle
    kernel.wait_output(cell, "from the child")
    kernel.run("child.wait()")


TEXT = "Zürich, Ελλάδα, 日本語, 👩‍🚀 and 🏴󠁧󠁢󠁳󠁣󠁴󠁿, \u200f\u05e2\u05d1\u05e8\u05d9\u05ea"


@pytest.mark.parametrize(
    "code",
    [
        "print({!r})",
        "import os; _ = os.write(1, {!r}.encode())",
        "import subprocess; _ = subprocess.run(['echo', {!r}])",
    ],
    ids=["print", "write(1)", "subprocess"],
)
def test_every_character_arrives(kernel: Kernel, code: str) -> None:
    assert kernel.run(code.format(TEXT)).stdout.rstrip("\n") == TEXT


def test_a_character_that_is_written_in_pieces_arrives_whole(kernel: Kernel) -> None:
    cell = kernel.run(
        "import os, time\n"
        "for byte in 'é漢👾'.encode():\n"
        "    os.write(1, bytes([byte]))\n"
        "    time.sleep(0.25)\n"
    )
    assert cell.stdout == "é漢👾"


def test_bytes_that_are_no_text_do_no_harm(kernel: Kernel) -> None:
    cell = kernel.run("import os; _ = os.write(1, b'before \\xff\\xfe\\x00 after\\n')")
    assert cell.stdout == "before \ufffd\ufffd after\n"  # no NUL under outputs = safe
    assert kernel.run("print('\\ud800 alone')").status == "ok"
    assert kernel.run("print('fine')").stdout == "fine\n"


def test_ten_megabytes_of_lines_are_all_there(kernel: Kernel) -> None:
    count, rest = 50_000, "x" * 200
    cell = kernel.run(f"rest = 'x' * 200\nfor i in range({count}):\n    print(f'{{i:05}} ' + rest)")
    assert cell.status == "ok"
    lines = cell.stdout.splitlines()
    assert len(lines) == count
    assert all(line == f"{i:05} {rest}" for i, line in enumerate(lines))


def test_ten_megabytes_at_once(kernel: Kernel) -> None:
    cell = kernel.run("print('0123456789' * 1_000_000)")
    assert cell.stdout == "0123456789" * 1_000_000 + "\n"


def test_megabytes_from_a_child_are_all_there(kernel: Kernel) -> None:
    cell = kernel.run("!seq 1 100000")
    # A pseudo-terminal ends lines with \r\n, and so does plain ipykernel.
    assert cell.stdout.split() == [str(i) for i in range(1, 100_001)]
    cell = kernel.run("import subprocess; x = subprocess.run(['seq', '1', '100000'])")
    assert cell.stdout.split() == [str(i) for i in range(1, 100_001)]


def test_megabytes_from_two_threads_are_all_there(kernel: Kernel) -> None:
    cell = kernel.run(
        "import threading\n"
        "def talk(name):\n"
        "    for i in range(5_000):\n"
        "        print(f'{name}{i}\\n', end='')\n"
        "threads = [threading.Thread(target=talk, args=[name]) for name in 'ab']\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    lines = cell.stdout.split()
    for name in "ab":
        mine = [line for line in lines if line.startswith(name)]
        assert mine == [f"{name}{i}" for i in range(5_000)]
    assert len(lines) == 10_000


def test_flushed_prints_do_not_flood_the_server(kernel: Kernel) -> None:
    """A Jupyter server drops messages above 1,000 a second (iopub_msg_rate_limit)."""
    cell = kernel.run("for i in range(5_000): print(i, flush=True)")
    assert cell.stdout.split() == [str(i) for i in range(5_000)]
    moments = [t for t, m in zip(cell.times, cell.messages, strict=True)
               if m["msg_type"] == "stream"]  # fmt: skip
    most = max(sum(start <= moment < start + 1 for moment in moments) for start in moments)
    assert most < 1000, f"{most} messages in one second, {len(moments)} in all"


@pytest.mark.parametrize(
    "code",
    [
        "import os\npid = os.fork()\nif pid == 0:\n  print('child', flush=True)\n  os._exit(0)\n"
        "os.waitpid(pid, 0)\nprint('parent')",
        "import multiprocessing\n"
        "p = multiprocessing.get_context('fork').Process(target=print, args=['child'])\n"
        "p.start(); p.join()\nprint('parent')",
    ],
    ids=["fork", "multiprocessing"],
)
def test_a_forked_child_is_heard_once(kernel: Kernel, code: str) -> None:
    cell = kernel.run(code)
    assert cell.status == "ok"
    kernel.wait_output(cell, "child")
    assert sorted(cell.stdout.split()) == ["child", "parent"]
    # The child had neither the port nor the front end: the kernel goes on undisturbed.
    assert kernel.run("1 + 1").result == "2"


def test_a_pool_of_processes_works(kernel: Kernel) -> None:
    cell = kernel.run(
        "import multiprocessing\n"
        "def job(i):\n"
        "    print('job', i, flush=True)\n"
        "    return i * i\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    print(pool.map(job, range(6)))"
    )
    assert cell.status == "ok"
    assert "[0, 1, 4, 9, 16, 25]" in cell.stdout
    kernel.listen(0.5)
    assert sorted(re.findall(r"job (\d)", cell.stdout)) == list("012345")


def test_an_unfinished_line_is_shown(kernel: Kernel) -> None:
    cell = kernel.send("print('no newline', end=''); import time; time.sleep(2)")
    kernel.wait_output(cell, "no newline")
    assert not cell.idle
    kernel.finish(cell)


def test_a_front_end_that_reads_slowly_loses_nothing(kernel: Kernel) -> None:
    cell = kernel.send("for i in range(20_000): print(i, 'y' * 1000)")
    time.sleep(4)  # meanwhile everything on the way fills up, and the guest waits
    kernel.finish(cell)
    assert [line.split()[0] for line in cell.stdout.splitlines()] == [str(i) for i in range(20_000)]


def test_flushes_keep_the_order_of_the_two_streams(kernel: Kernel) -> None:
    cell = kernel.run(
        "import sys\n"
        "for i in range(20):\n"
        "    print('out', i, flush=True)\n"
        "    print('err', i, file=sys.stderr, flush=True)"
    )
    text = "".join(content["text"] for content in cell.contents("stream"))
    assert text == "".join(f"out {i}\nerr {i}\n" for i in range(20))


def test_flushed_text_comes_before_what_is_shown_after_it(kernel: Kernel) -> None:
    cell = kernel.run(
        "from IPython.display import clear_output\n"
        "print('one', flush=True)\nclear_output()\nprint('two', flush=True)\n"
        "print('three', flush=True)\ndisplay('four')\nprint('five')\n1/0"
    )
    seen = []
    for message in cell.messages:
        content = message["content"]
        seen += content["text"].split() if "text" in content else [message["msg_type"]]
    wanted = "one clear_output two three display_data five error"
    assert [word for word in seen if word in wanted.split()] == wanted.split()
