"""An interrupt reaches whatever the cell does, in both of Jupyter's ways, and costs no state.

jupyter_client sends an ``interrupt_request`` or, where the kernelspec says so, SIGINT to the
wrapper's whole process group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_client import Cell, Kernel, StartKernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

INTERRUPTED = "KeyboardInterrupt"
PROMPT = 10.0
"""Seconds within which an interrupted cell has ended; on a quiet machine it takes a twentieth."""


@pytest.fixture(scope="module")
def signalled(signal_spec: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    """A running kernel that its front end interrupts by SIGINT to its process group."""
    with start_kernel(signal_spec) as kernel:
        assert kernel.manager.kernel_spec.interrupt_mode == "signal"
        yield kernel


def interrupt_when(kernel: Kernel, cell: Cell, sign: str) -> None:
    """Interrupt once the cell has printed *sign*, and a moment has passed."""
    kernel.wait_output(cell, sign)
    kernel.listen(0.3)
    assert not cell.idle
    kernel.manager.interrupt_kernel()
    kernel.finish(cell, PROMPT)


BUSY = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(300)",
    "await": "import asyncio; await asyncio.sleep(300)",
    "gather": "import asyncio; await asyncio.gather(asyncio.sleep(300), asyncio.sleep(300))",
    "subprocess": "import subprocess; subprocess.run(['sleep', '300'])",
    "lock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "join": "import threading, time\nt = threading.Thread(target=time.sleep, args=[20], "
    "daemon=True)\nt.start()\nt.join()",
    "queue": "import queue; queue.Queue().get()",
    "select": "import select; select.select([], [], [])",
    "C": "import ctypes; ctypes.CDLL(None).sleep(300); 1 + 1",
    "prints": "i = 0\nwhile True:\n    i += 1\n    print(i)",
    "flushes": "while True: print('x', flush=True)",
    "displays": "while True: display(1)",
}


def interrupted(kernel: Kernel, what: str) -> Cell:
    """Run one of the above, interrupt it, and see that it was only this cell that ended."""
    kernel.run("held = 'on'")
    cell = kernel.send(f"print('begin')\n{BUSY[what]}")
    interrupt_when(kernel, cell, "begin")
    # IPython shows a cancelled await as what it is.
    right = ("KeyboardInterrupt", "CancelledError") if "await" in BUSY[what] else (INTERRUPTED,)
    assert cell.reply["ename"] in right
    assert cell.error["ename"] in right
    assert kernel.run("held").result == "'on'"
    return cell


@pytest.mark.parametrize("what", BUSY)
def test_a_busy_cell(kernel: Kernel, what: str) -> None:
    interrupted(kernel, what)


@pytest.mark.parametrize("what", ["loop", "sleep", "await", "subprocess", "prints"])
def test_a_busy_cell_by_a_signal(signalled: Kernel, what: str) -> None:
    interrupted(signalled, what)


def test_a_shell_command(kernel: Kernel) -> None:
    """IPython's own way: no error, the command's end is in _exit_code."""
    cell = kernel.send("!echo begin; sleep 300")  # who says it is there to be interrupted
    interrupt_when(kernel, cell, "begin")
    assert cell.status == "ok"
    assert int(kernel.run("_exit_code").result) != 0


def test_a_script_cell(kernel: Kernel) -> None:
    cell = kernel.send("%%bash\necho begin\nsleep 300")
    interrupt_when(kernel, cell, "begin")
    assert cell.status == "error"
    assert kernel.run("1 + 1").result == "2"


def test_children_end_with_their_cell(kernel: Kernel) -> None:
    for code in ("import subprocess; subprocess.run(['sleep', '1234'])", "!sleep 1234"):
        interrupt_when(kernel, kernel.send(f"print('begin')\n{code}"), "begin")
    left = kernel.run("import subprocess; subprocess.run(['pgrep', '-f', '[s]leep 1234'], "
                      "capture_output=True).stdout")  # fmt: skip
    if left.status == "ok":  # pgrep is not in every image
        assert left.result == "b''"


def test_a_cell_may_catch_it(kernel: Kernel) -> None:
    cell = kernel.send(
        "import time\nprint('begin')\n"
        "try:\n    time.sleep(300)\nexcept KeyboardInterrupt:\n    print('caught')"
    )
    interrupt_when(kernel, cell, "begin")
    assert cell.status == "ok"
    assert cell.stdout == "begin\ncaught\n"


@pytest.mark.skipif(
    os.environ.get("KERNEL_UNDER_TEST") == "plain", reason="CPython drops most of them"
)
def test_a_cell_that_leaves_closing_files_to_python(kernel: Kernel) -> None:
    """What CPython clears while it closes a file is raised again, and once."""
    kernel.run("import pickle, time\nwith open('big', 'wb') as f: f.write(bytes(1 << 20))")
    for i in range(8):
        cell = kernel.send("print('begin')\nwhile True: open('big', 'rb').read()")
        kernel.wait_output(cell, "begin")
        kernel.listen(0.1 + 0.013 * i)
        kernel.manager.interrupt_kernel()
        kernel.finish(cell, PROMPT)
        assert cell.reply["ename"] == INTERRUPTED
        assert (cell.stderr, cell.stdout) == ("", "begin\n")
    cell = kernel.send(
        "caught = []\nprint('begin')\n"
        "try:\n    while True: open('big', 'rb').read()\n"
        "except KeyboardInterrupt as error: caught.append(error)\n"
        "end = time.monotonic() + 3\n"
        "while time.monotonic() < end:\n"
        "    try: open('big', 'rb').read()\n"
        "    except KeyboardInterrupt as error: caught.append(error)\n"
        "repr(caught), type(pickle.loads(pickle.dumps(caught[0]))) is KeyboardInterrupt"
    )
    interrupt_when(kernel, cell, "begin")
    assert cell.result == "('[KeyboardInterrupt()]', True)"
    kernel.run("import os; os.remove('big')")


def test_a_cell_that_goes_on_is_interrupted_again(kernel: Kernel) -> None:
    cell = kernel.send(
        "import time\nfor i in range(2):\n    try:\n        print('round', i)\n"
        "        time.sleep(300)\n    except KeyboardInterrupt:\n        pass\n"
        "print('round 2')\ntime.sleep(300)"
    )
    for i in range(2):
        kernel.wait_output(cell, f"round {i}")
        kernel.listen(0.2)
        kernel.manager.interrupt_kernel()
    interrupt_when(kernel, cell, "round 2")
    assert cell.reply["ename"] == "KeyboardInterrupt"


def ignored_when_idle(kernel: Kernel) -> None:
    kernel.run("held = 'on'")
    for _ in range(3):
        kernel.manager.interrupt_kernel()
        kernel.listen(0.3)
    assert kernel.run("held").result == "'on'"
    assert kernel.run("import time; time.sleep(0.5); 'slept'").result == "'slept'"


def test_when_idle_it_does_nothing(kernel: Kernel) -> None:
    ignored_when_idle(kernel)


def test_when_idle_a_signal_does_nothing(signalled: Kernel) -> None:
    ignored_when_idle(signalled)


def test_a_signal_ends_a_question(signalled: Kernel) -> None:
    cell = signalled.send("input('? ')", allow_stdin=True)
    signalled.wait_question(cell)
    signalled.manager.interrupt_kernel()
    assert signalled.finish(cell, PROMPT).error["ename"] == INTERRUPTED


def test_queued_cells_are_aborted(kernel: Kernel) -> None:
    cell = kernel.send("print('begin'); import time; time.sleep(300)")
    queued = [kernel.send("print('never')") for _ in range(3)]
    interrupt_when(kernel, cell, "begin")
    for one in queued:
        assert kernel.finish(one).status == "aborted"
    assert kernel.run("1 + 1").result == "2"


def test_interrupts_hit_no_cell_but_their_own(kernel: Kernel) -> None:
    """Interrupts that come just when a cell ends by itself."""
    for i in range(15):
        cell = kernel.send(f"import time; time.sleep({0.02 * (i % 5)}); {i}")
        kernel.listen(0.02 * (i % 4) + 0.05)
        kernel.manager.interrupt_kernel()
        kernel.finish(cell)
        after = kernel.run("'unharmed'")
        assert after.status == "ok", after.reply
        assert after.result == "'unharmed'"


def test_a_task_of_an_earlier_cell_survives(kernel: Kernel) -> None:
    kernel.run(
        "import asyncio\nticks = 0\n"
        "async def tick():\n"
        "    global ticks\n"
        "    while True:\n"
        "        ticks += 1\n"
        "        await asyncio.sleep(0.05)\n"
        "ticker = asyncio.create_task(tick())"
    )
    cell = kernel.send("print('begin')\nawait asyncio.sleep(300)")
    interrupt_when(kernel, cell, "begin")
    before = int(kernel.run("ticks").result)
    kernel.listen(0.5)
    assert int(kernel.run("ticks").result) > before
    kernel.run("ticker.cancel()")


@pytest.mark.parametrize("mode", ["message", "signal"])
def test_while_waiting_for_a_slot(
    mode: str, small_spec: str, signal_spec: str, start_kernel: StartKernel, tmp_path: Path
) -> None:
    env = {
        "VMKERNEL_MAX_CONCURRENT_VMS": "1",
        "VMKERNEL_SEMAPHORE_FILE": str(tmp_path / "slots"),
    }
    name = {"message": small_spec, "signal": signal_spec}[mode]
    with start_kernel(name, env=env) as holder:
        assert holder.run("1").result == "1"
        with start_kernel(name, env=env) as waiter:
            cell = waiter.send("print('it ran')")
            waiter.wait(lambda: "waiting for a VM slot" in cell.stderr, "the place in the queue")
            began = time.monotonic()
            waiter.manager.interrupt_kernel()
            waiter.finish(cell, PROMPT)
            assert time.monotonic() - began < 5
            assert cell.reply["ename"] == "KeyboardInterrupt"
            assert "did not run" in cell.reply["evalue"]
            assert cell.types[-3:] == ["clear_output", "execute_input", "error"]
            # It left the queue, and comes back for the next cell.
            again = waiter.send("print('it ran')")
            waiter.wait(lambda: "waiting for a VM slot" in again.stderr, "the place in the queue")
            holder.shut_down()
            waiter.finish(again)
            assert again.stdout == "it ran\n"


@pytest.mark.skipif(
    os.environ.get("KERNEL_UNDER_TEST") == "plain", reason="plain ipykernel offers nothing"
)
def test_a_cell_that_ignores_interrupts_is_ended_by_another_one(kernel: Kernel) -> None:
    """The interrupt escalates: what it will cost is said first, and the VM's files stay."""
    kernel.run("open('kept', 'w').write('kept'); lost = 1")
    cell = kernel.send(
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\nwhile True: time.sleep(0.05)"
    )
    kernel.wait_output(cell, "deaf")
    kernel.interrupt()
    kernel.wait(lambda: "Interrupt it once more" in cell.stderr, "the offer")
    assert not cell.done
    kernel.interrupt()
    kernel.finish(cell)
    assert "was ended" in cell.traceback
    assert "files are still there" in cell.traceback
    assert kernel.run("print(open('kept').read())").stdout == "kept\n"
    assert kernel.run("lost").error["ename"] == "NameError"


def test_a_cell_that_heeds_the_interrupt_hears_of_no_other(kernel: Kernel) -> None:
    cell = kernel.send("import time\nprint('on', flush=True)\ntime.sleep(60)")
    kernel.wait_output(cell, "on")
    kernel.interrupt()
    kernel.finish(cell)
    kernel.listen(11)
    assert cell.stderr == ""
    assert kernel.run("1+1").stderr == ""
