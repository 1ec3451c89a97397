"""The history on the host: real processes, real files, and IPython's own reading beside ours."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ipykernel.ipkernel import IPythonKernel
from IPython.core.history import HistoryManager
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from vmkernel.kernel import history as history_module
from vmkernel.kernel.history import History
from vmkernel.settings import Settings

PATIENCE = 60.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "history.sqlite"


@pytest.fixture
async def start(file: Path) -> AsyncIterator[Callable[..., History]]:
    """``start(*options)``: the history of one more kernel, closed at the test's end."""
    begun: list[History] = []

    def start(*options: str, **settings: Any) -> History:
        begun.append(History(Settings(history_file=file, **settings), options))
        return begun[-1]

    yield start
    for history in begun:
        await history.close()
    await gone()


async def until(condition: Callable[[], Any], what: str = "", seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what or condition
        await asyncio.sleep(0.02)


def helpers() -> list[psutil.Process]:
    """The history processes that this test process started, and their pids."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "vmkernel.kernel.history_process" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


async def gone() -> None:
    def living() -> list[psutil.Process]:
        for process in helpers():
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, 0)
        return helpers()

    await until(lambda: not living(), "the history's processes end")


def rows(file: Path, sql: str = "SELECT session, line, source_raw FROM history") -> list[Any]:
    with closing(sqlite3.connect(file, timeout=PATIENCE)) as db:
        return db.execute(sql).fetchall()


def stored(file: Path) -> list[str]:
    """The code of all lines that are on disk."""
    try:
        return [code for _, _, code in rows(file)]
    except sqlite3.OperationalError:  # not there yet
        return []


async def ask(history: History, kind: str, **content: Any) -> list[Any]:
    """The history of a good answer."""
    reply = await history.query({"hist_access_type": kind, "raw": True, "output": False, **content})
    assert reply["status"] == "ok", reply
    return reply["history"]


# --- what it gives ---


async def test_kernels_share_it(start, file):
    first = start()
    first.record(1, "a = 'first'")
    first.record(2, "b = 'é 漢 😀 \\0'")
    assert await ask(first, "tail", n=5) == [[1, 1, "a = 'first'"], [1, 2, "b = 'é 漢 😀 \\0'"]]
    second = start()
    second.record(1, "c = 'second'")
    assert await ask(second, "tail", n=2) == [[1, 2, "b = 'é 漢 😀 \\0'"], [2, 1, "c = 'second'"]]
    # Who asks sees the own session last
    first.record(3, "d")
    assert await ask(first, "tail", n=2) == [[1, 2, "b = 'é 漢 😀 \\0'"], [1, 3, "d"]]
    assert await ask(second, "search", pattern="*'first'*") == [[1, 1, "a = 'first'"]]


async def test_the_file_is_the_users_alone(start, file):
    history = start()
    history.record(1, "secret")
    await ask(history, "tail")
    assert file.stat().st_mode & 0o777 == 0o600
    await history.close()
    await gone()
    assert [path.name for path in file.parent.iterdir()] == ["history.sqlite"]


async def test_it_answers_as_ipykernel_does(start, file, tmp_path):
    """Every kind of question, answered by do_history on IPython's manager of the same file."""
    old = start()
    for line, code in enumerate(("x = 1", "%time x", "x = 1", "print('other')"), 1):
        old.record(line, code)
    await ask(old, "tail")
    history = start("--HistoryManager.db_log_output=True")
    cells = [
        "x = 1",
        "!ls",
        "x?",
        "def f():\n    return 7\n",
        "f()",
        "x = 1",
        "%%bash\necho 1",
        "é",
    ]
    for line, code in enumerate(cells, 1):
        history.record(line, code)
    history.output(5, "7")
    await ask(history, "tail")

    shutil.copy(file, tmp_path / "plain.sqlite")
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    plain = HistoryManager(shell, hist_file=tmp_path / "plain.sqlite")
    plain.db.execute("DELETE FROM sessions WHERE session = ?", (plain.session_number,))
    plain.db.execute("DELETE FROM history WHERE session = 2")
    plain.db.execute("DELETE FROM output_history WHERE session = 2")
    plain.db.commit()
    plain.session_number, plain.db_log_output = 2, True
    for line, code in enumerate(cells, 1):
        plain.store_inputs(line, shell.transform_cell(code), code)
    plain.output_hist_reprs[5] = "7"
    plain.store_output(5)
    plain.writeout_cache()
    kernel = SimpleNamespace(shell=SimpleNamespace(history_manager=plain))
    questions: list[dict[str, Any]] = [
        {"hist_access_type": "tail", "n": n} for n in (1, 3, 7, 100, None)
    ]
    for session, (begin, end) in itertools.product(
        (0, -1, 1, 2, 9), ((0, None), (1, 3), (2, 0), (-2, None), (1, -1), (5, 99))
    ):
        questions.append(
            {"hist_access_type": "range", "session": session, "start": begin, "stop": end}
        )
    for pattern, n, unique in itertools.product(
        ("*", "x*", "*é*", "nothing", "[!", None), (None, 2), (False, True)
    ):
        questions.append(
            {"hist_access_type": "search", "pattern": pattern, "n": n, "unique": unique}
        )
    questions += [{"hist_access_type": "range"}, {"hist_access_type": "other"}]
    compared = 0
    try:
        for question, raw, output in itertools.product(questions, (True, False), (True, False)):
            asked = {**question, "raw": raw, "output": output}
            wanted = IPythonKernel.do_history(kernel, **asked)
            wanted["history"] = [
                [session or 2, line, list(entry) if isinstance(entry, tuple) else entry]
                for session, line, entry in wanted["history"]
            ]
            assert await history.query(asked) == wanted, asked
            compared += len(wanted["history"])
    finally:
        plain.end_session()
    assert compared > 500


@pytest.mark.parametrize(
    "question",
    [
        {"hist_access_type": "tail", "n": "many"},
        {"hist_access_type": "tail", "n": 1 << 70},
        {"hist_access_type": "range", "session": [1]},
        {"hist_access_type": "search", "pattern": "*" * 60_000},
    ],
)
async def test_a_question_without_sense_moves_no_file_away(start, file, question):
    """The HistoryManager takes any complaint of SQLite's for damage."""
    history = start()
    history.record(1, "one")
    reply = await history.query(question)
    assert reply["status"] == "error"
    assert await ask(history, "tail") == [[1, 1, "one"]]
    assert list(file.parent.iterdir()) == [file]


async def test_what_is_not_kept(start, file):
    """As plain IPython: blank cells have no number, exit is nothing to remember."""
    history = start()
    for line, code in ((1, ""), (1, " \n"), (1, "one"), (2, "exit"), (3, "%paste"), (4, "two")):
        history.record(line, code)
    assert await ask(history, "tail") == [[1, 1, "one"], [1, 4, "two"]]


async def test_numbers_that_no_guest_would_say(start, file):
    history = start()
    for line in (0, -1, 1 << 40, True, "1", [], 1.5):
        history.record(line, "no")
        history.output(line, "no")
    history.record(1, "yes")
    history.output(1, ["no text"])
    history.output(2, "not begun")
    assert await ask(history, "range", session=0, start=1, output=True) == [[1, 1, ["yes", None]]]


async def test_a_guest_kernel_that_counts_from_one_again(start, file):
    history = start()
    history.record(1, "before")
    history.output(1, "'before'")
    history.record(None, "death")
    history.record(1, "after")
    assert await ask(history, "tail") == [[1, 1, "before"], [1, 2, "death"], [2, 1, "after"]]
    assert await ask(history, "range", session=0, start=1, output=True) == [[2, 1, ["after", None]]]
    assert rows(file, "SELECT session, num_cmds FROM sessions") == [(1, 2), (2, None)]


async def test_outputs_are_limited(start, monkeypatch):
    monkeypatch.setattr(history_module, "LONGEST_OUTPUT", 10)
    monkeypatch.setattr(history_module, "MOST_OUTPUT", 30)
    history = start()
    for line in range(1, 6):
        history.record(line, "x")
        history.output(line, "o" * 100)
    found = await ask(history, "range", session=0, start=1, output=True)
    assert found == [
        *([1, line, ["x", None]] for line in (1, 2, 3)),
        *([1, line, ["x", "o" * 10 + " …"]] for line in (4, 5)),
    ]


async def test_a_result_that_is_said_again_and_again(start):
    history = start()
    history.record(1, "x")
    for number in range(100_000):
        history.output(1, str(number))
    assert len(history._pending) == 1
    found = await ask(history, "range", session=0, start=1, output=True)
    assert found == [[1, 1, ["x", "99999"]]]


# --- when it works ---


async def test_nothing_happens_before_there_is_something_to_do(start, file):
    history = start()
    await history.close()
    assert not file.parent.exists()
    assert not helpers()


async def test_off(start, file):
    history = start(history="off")
    history.record(1, "x")
    await history.close()
    assert not history.on
    assert not file.parent.exists()


@pytest.mark.parametrize(
    "option", ["--HistoryManager.hist_file=:memory:", "--HistoryManager.enabled=False"]
)
async def test_a_front_end_wants_none(start, file, option):
    history = start(option)
    history.record(1, "x")
    await history.close()
    assert not history.on
    assert not file.parent.exists()


async def test_a_front_end_wants_another_file(start, file, tmp_path):
    history = start(f"--HistoryManager.hist_file={tmp_path / 'own.sqlite'}")
    history.record(1, "x")
    assert await ask(history, "tail") == [[1, 1, "x"]]
    assert not file.exists()
    assert stored(tmp_path / "own.sqlite") == ["x"]


async def test_a_front_end_with_options_of_no_use(start, file, caplog):
    history = start("--IPKernelApp.hist_file=:memory:", "--HistoryManager.enabled=True")
    history.record(1, "x")
    assert await ask(history, "tail") == [[1, 1, "x"]]
    wrong = start("--HistoryManager.db_log_output=perhaps")
    wrong.record(1, "x")
    await until(lambda: not wrong.on)
    assert "db_log_output" in caplog.text


async def test_a_cell_is_on_disk_soon_after_it_began(start, file):
    history = start()
    history.record(1, "x")
    assert not helpers()  # not at the cell's cost
    await until(lambda: stored(file) == ["x"])
    await until(lambda: not history._pending)
    (process,) = helpers()
    assert process.nice() > os.nice(0)


async def test_the_process_rests_and_the_session_goes_on(start, file, monkeypatch):
    monkeypatch.setattr(history_module, "REST", 0.3)
    history = start()
    history.record(1, "%time 1")
    history.output(1, "1")
    await until(lambda: stored(file))
    await until(lambda: history._writer is None, "it rests")
    await gone()
    assert rows(file, "SELECT session, num_cmds FROM sessions") == [(1, 1)]
    monkeypatch.undo()
    history.record(2, "two")
    transformed = "get_ipython().run_line_magic('time', '1')"
    for raw, first in ((True, "%time 1"), (False, transformed)):
        found = await ask(history, "range", session=0, start=1, output=True, raw=raw)
        assert found == [[1, 1, [first, "1"]], [1, 2, ["two", None]]]
    await history.close()
    await gone()
    assert rows(file, "SELECT session, num_cmds FROM sessions") == [(1, 2)]


async def test_a_session_whose_file_is_gone(start, file, monkeypatch):
    """The number may be another kernel's in the new file."""
    monkeypatch.setattr(history_module, "REST", 0.3)
    history = start()
    history.record(1, "one")
    await until(lambda: stored(file))
    await gone()
    file.unlink()
    monkeypatch.undo()
    other = start()
    other.record(1, "other")
    assert await ask(other, "tail") == [[1, 1, "other"]]
    history.record(2, "two")
    assert await ask(history, "tail") == [[1, 1, "other"], [2, 2, "two"]]


async def test_the_end_hands_over_what_is_left(start, file):
    history = start()
    history.record(1, "x")
    begun = time.monotonic()
    await history.close()
    assert time.monotonic() - begun < history_module.GOODBYE
    await until(lambda: stored(file) == ["x"])
    await gone()
    assert rows(file, "SELECT num_cmds FROM sessions WHERE end IS NOT NULL") == [(1,)]


_KERNEL = """
    import asyncio, os, sys
    from pathlib import Path
    from vmkernel.kernel.history import History
    from vmkernel.settings import Settings

    async def main():
        history = History(Settings(history_file=Path(sys.argv[1])))
        for line in range(1, int(sys.argv[2]) + 1):
            history.record(line, f"{sys.argv[3]} {line}")
            await asyncio.sleep(float(sys.argv[4]))
        if sys.argv[5] == "stay":
            print("here", flush=True)
            await asyncio.sleep(3600)
        await history.close()

    asyncio.run(main())
    os._exit(0)  # as the wrapper does
"""


@contextmanager
def kernel(file: Path, lines: int, name: str, pause: float, end: str) -> Iterator[Any]:
    """A process with a history of its own."""
    words = [str(file), str(lines), name, str(pause), end]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_KERNEL), *words], stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_the_end_waits_for_nobody(start, monkeypatch, tmp_path):
    """What is in the socket is the process's business; the kernel's end is not kept up by it."""
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 3\n")
    slow.chmod(0o755)
    monkeypatch.setattr(history_module.sys, "executable", str(slow))
    history = start()
    history.record(1, "x")
    begun = time.monotonic()
    await history.close()
    await asyncio.sleep(0.05)
    assert time.monotonic() - begun < 0.9


async def test_a_great_deal_at_the_end(file):
    name = "x" * 20_000
    with kernel(file, 300, name, 0, "end") as process:
        assert await asyncio.to_thread(process.wait, PATIENCE) == 0
    await until(lambda: stored(file) == [f"{name} {line}" for line in range(1, 301)])


async def test_sigkill_costs_only_the_last_second(file):
    with kernel(file, 3, "cell", 0.01, "stay") as process:
        assert await asyncio.to_thread(process.stdout.readline) == b"here\n"
        await asyncio.sleep(history_module.DELAY + 0.5)
        process.kill()
    await until(lambda: stored(file) == ["cell 1", "cell 2", "cell 3"])
    await until(lambda: rows(file, "SELECT num_cmds FROM sessions") == [(3,)])


async def test_many_kernels_write_at_once(file):
    kernels = [kernel(file, 60, f"kernel{number}", 0.01, "end") for number in range(6)]
    processes = [context.__enter__() for context in kernels]
    try:
        for process in processes:
            assert await asyncio.to_thread(process.wait, PATIENCE) == 0
        await until(lambda: len(stored(file)) == 6 * 60)
    finally:
        for context in kernels:
            context.__exit__(None, None, None)
    by_session: dict[int, list[str]] = {}
    for session, _, code in rows(file):
        by_session.setdefault(session, []).append(code)
    assert sorted(by_session.values()) == [
        [f"kernel{number} {line}" for line in range(1, 61)] for number in range(6)
    ]
    assert list(file.parent.glob("*corrupt*")) == []


# --- what goes wrong ---


async def test_its_process_is_killed(start, file):
    history = start()
    history.record(1, "one")
    await until(lambda: stored(file) == ["one"])
    await until(lambda: not history._pending)
    (process,) = helpers()
    process.send_signal(signal.SIGSTOP)
    history.record(2, "two")
    await until(lambda: history._sent == 1)
    process.kill()
    await until(lambda: stored(file) == ["one", "two"])
    assert await ask(history, "tail") == [[1, 1, "one"], [1, 2, "two"]]


async def test_it_died_between_disk_and_word(start, file):
    """What was stored, and not acknowledged, is not there twice."""
    history = start()
    history.record(1, "one")
    await ask(history, "tail")
    history._pending.append(["line", 1, "one"])
    history.record(2, "two")
    assert await ask(history, "tail") == [[1, 1, "one"], [1, 2, "two"]]


async def test_a_process_that_cannot_start_is_given_up(start, file, monkeypatch, caplog):
    monkeypatch.setattr(history_module.sys, "executable", "/bin/false")
    monkeypatch.setattr(history_module, "DELAY", 0.05)
    history = start()
    history.record(1, "one")
    await until(lambda: not history.on)
    assert "off for this kernel" in caplog.text
    assert await history.query({"hist_access_type": "tail"}) == {"status": "ok", "history": []}
    history.record(2, "two")
    assert not history._pending


@pytest.mark.parametrize("size", [100, 100_000])
async def test_a_damaged_file_is_put_aside(start, file, size, capfd):
    file.parent.mkdir()
    file.write_bytes(os.urandom(size))
    history = start()
    history.record(1, "one")
    await until(lambda: list(file.parent.glob("history-corrupt*")))
    assert await ask(history, "tail") == [[1, 1, "one"]]
    assert stored(file) == ["one"]
    assert "was moved to" in capfd.readouterr().err
    assert [path.stat().st_mode & 0o77 for path in [file]] == [0]


async def test_damage_while_it_is_used(start, file, capfd):
    history = start()
    history.record(1, "one")
    await ask(history, "tail")
    file.write_bytes(b"nonsense" * 10_000)
    history.record(2, "two")
    await until(lambda: not history._pending)
    assert "was moved to" in capfd.readouterr().err
    assert await ask(history, "tail") == [[1, 2, "two"]]


async def test_a_locked_file_is_waited_for(start, file):
    history = start()
    history.record(1, "one")
    await ask(history, "tail")
    with closing(sqlite3.connect(file)) as db:
        db.execute("BEGIN EXCLUSIVE")
        history.record(2, "two")
        await until(lambda: history._sent == 1)
        await asyncio.sleep(1)
        assert history._pending
        db.rollback()
    await until(lambda: stored(file) == ["one", "two"])
    assert list(file.parent.glob("*corrupt*")) == []


async def test_a_locked_file_is_no_damaged_one(start, file, capfd):
    """A question is answered with nothing, soon, and the file stays where it is."""
    history = start()
    history.record(1, "one")
    await ask(history, "tail")
    with closing(sqlite3.connect(file)) as db:
        db.execute("BEGIN EXCLUSIVE")
        assert await ask(history, "tail") == []
        db.rollback()
    assert "cannot be read: database is locked" in capfd.readouterr().err
    assert await ask(history, "tail") == [[1, 1, "one"]]
    assert list(file.parent.glob("*corrupt*")) == []


async def test_a_place_that_cannot_be_written(start, file, caplog):
    file.parent.parent.mkdir(exist_ok=True)
    file.parent.write_text("no directory")
    history = start()
    history.record(1, "one")
    await until(lambda: "cannot be written" in caplog.text)
    assert await ask(history, "tail") == []
    assert history._pending  # another attempt comes, in a minute


async def test_a_range_from_further_back_than_the_session_goes_is_all_of_it(
    start: Callable[..., History],
) -> None:
    history = start()
    for line in (1, 2):
        history.record(line, f"line {line}")
    everything = [[1, 1, "line 1"], [1, 2, "line 2"]]
    for _ in range(history_module.MOST_CRASHES):
        assert await ask(history, "range", session=0, start=-100) == everything
    assert await ask(history, "range", session=0, start=-1) == everything[1:]
    assert history.on


def test_results_without_a_text_take_no_room_without_end(file: Path) -> None:
    async def flood() -> None:
        history = History(Settings(history_file=file))
        history.record(1 << 30, "1")
        for line in range(1, 3 * history_module.MOST_OUTPUTS):
            history.output(line, "")
        assert len(history._outputs) == history_module.MOST_OUTPUTS
        assert len(history._fresh) <= history_module.MOST_OUTPUTS
        await history.close()

    asyncio.run(flood())
