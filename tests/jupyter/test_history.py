"""History, over kernels and as front ends ask for it, beside plain ipykernel's."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pytest
from kernel_client import Client, Kernel, StartKernel
from test_console import Terminal

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

SOON = 60.0


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The history file of the kernels that the test starts."""
    path = tmp_path / "history.sqlite"
    monkeypatch.setenv("VMKERNEL_HISTORY_FILE", str(path))
    return path


@pytest.fixture(scope="module")
def file_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("history") / "history.sqlite"


@pytest.fixture(scope="module")
def kernel(small_spec: str, start_kernel: StartKernel, file_of_all: Path) -> Iterator[Kernel]:
    with start_kernel(small_spec, env={"VMKERNEL_HISTORY_FILE": str(file_of_all)}) as kernel:
        yield kernel


def history(client: Client, kind: str = "tail", **content: Any) -> list[Any]:
    asked = {"hist_access_type": kind, "raw": True, "output": False, **content}
    if kind == "tail":
        asked.setdefault("n", 10)
    reply = client.request("history_request", asked).reply
    assert reply["status"] == "ok", reply
    return reply["history"]


def cells(client: Client, kind: str = "tail", **content: Any) -> list[Any]:
    """Without the sessions' numbers."""
    return [entry for _, _, entry in history(client, kind, **content)]


def on_disk(file: Path) -> list[str]:
    try:
        with closing(sqlite3.connect(file, timeout=SOON)) as db:
            return [code for (code,) in db.execute("SELECT source_raw FROM history")]
    except sqlite3.OperationalError:  # not there yet
        return []


def helpers() -> list[psutil.Process]:
    """The history processes of this test session."""
    mark = os.environ["VMKERNEL_RUNTIME_DIR"]
    found = []
    for process in psutil.process_iter():
        try:
            if (
                "vmkernel.kernel.history_process" in process.cmdline()
                and process.environ().get("VMKERNEL_RUNTIME_DIR") == mark
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_every_kind_of_question_as_plain_ipykernel(
    kernel: Kernel, plain_spec: str, start_kernel: StartKernel, tmp_path: Path
) -> None:
    """The same cells, the same questions: the same answers."""
    run = [
        "a = 1",
        "a",
        "%time a",
        "'é 😀 漢'",
        "1/0",
        "a;",
        "def f():\n    return a\n",
        "f()",
        "a",
    ]

    def answers(client: Client) -> list[Any]:
        for code in run:
            client.run(code)
        client.run("secret = 1", store_history=False)
        client.run("secret = 2", silent=True)
        ((session, _, _),) = history(client, n=1)
        found: list[Any] = []
        for raw in (True, False):
            for output in (True, False):
                options = {"raw": raw, "output": output}
                found += [
                    history(client, n=n, **options) for n in (1, 4, len(run))
                ] + [
                    history(client, "search", pattern=pattern, unique=unique, n=n, **options)
                    for pattern in ("a*", "*é*", "*", "none")
                    for unique in (True, False)
                    for n in (3, 9)
                ] + [
                    history(client, "range", session=number, start=start, stop=stop, **options)
                    for number in (0, session)
                    for start, stop in ((1, 4), (2, None), (0, 3), (-2, None))
                ]  # fmt: skip
        return [[(s and s - session, *rest) for s, *rest in entries] for entries in found]

    # A history of its own, as ours has: the session's has the cells of other tests
    with start_kernel(plain_spec, env={"IPYTHONDIR": str(tmp_path)}) as plain:
        wanted = [  # there, the current session is 0
            [(0, *rest) for _, *rest in entries] for entries in answers(plain)
        ]
    assert answers(kernel) == wanted


def test_text_stays_what_it_was(kernel: Kernel) -> None:
    code = "x = '''zwei\n  Zeilen é \U0001f600\t\u202e'''  # \\n"
    kernel.run(code)
    assert cells(kernel, n=1) == [code]
    assert cells(kernel, "search", pattern="*\U0001f600*", n=1) == [code]


def test_a_question_without_sense(kernel: Kernel) -> None:
    reply = kernel.request("history_request", {"hist_access_type": "tail", "n": "many"}).reply
    assert reply["status"] == "error"
    assert cells(kernel)


def test_no_guest_can_see_it(
    kernel: Kernel,
    small_spec: str,
    start_kernel: StartKernel,
    file_of_all: Path,
    wait_until: Callable[..., None],
) -> None:
    kernel.run("of_the_first = 'kernel'")
    wait_until(lambda: "of_the_first = 'kernel'" in on_disk(file_of_all), SOON)
    with start_kernel(small_spec, env={"VMKERNEL_HISTORY_FILE": str(file_of_all)}) as other:
        assert "of_the_first = 'kernel'" in cells(other)
        assert "of_the_first" not in other.run("%history -g kernel").stdout.replace("%history", "")
        assert "2 + 3" in other.run("2 + 3\n%history").stdout  # its own session is there


def test_it_outlives_a_kernel_and_a_restart(
    small_spec: str, start_kernel: StartKernel, file: Path, wait_until: Callable[..., None]
) -> None:
    with start_kernel(small_spec) as first:
        first.run("first = 1")
        ((session, _, _),) = history(first)
        first.run("just_before = 'the restart'")
        first.manager.restart_kernel()
        first.wait_ready()
        wait_until(lambda: len(on_disk(file)) == 2, SOON)
        assert history(first) == [
            [session, 1, "first = 1"],
            [session, 2, "just_before = 'the restart'"],
        ]
        first.run("after = 1")
        assert history(first, n=1) == [[session + 1, 1, "after = 1"]]
        before = ["first = 1", "just_before = 'the restart'"]
        assert cells(first, "range", session=-1, start=1) == before
    with start_kernel(small_spec) as second:
        wait_until(lambda: len(on_disk(file)) == 3, SOON)
        assert cells(second) == ["first = 1", "just_before = 'the restart'", "after = 1"]
    wait_until(lambda: not helpers_of(file), SOON)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def helpers_of(file: Path) -> list[psutil.Process]:
    return [
        process
        for process in helpers()
        if process.environ().get("VMKERNEL_HISTORY_FILE") == str(file)
    ]


def test_a_new_guest_kernel_counts_from_one(
    small_spec: str, start_kernel: StartKernel, file: Path
) -> None:
    with start_kernel(small_spec) as kernel:
        kernel.run("one = 1")
        kernel.run("import os; os._exit(1)")
        kernel.run("two = 2")
        entries = history(kernel)
    assert [entry for _, _, entry in entries] == ["one = 1", "import os; os._exit(1)", "two = 2"]
    assert entries[2][:2] == [entries[0][0] + 1, 1]


def test_it_answers_before_there_is_a_vm(
    kernel: Kernel, small_spec: str, start_kernel: StartKernel, file_of_all: Path
) -> None:
    kernel.run("remembered = 1")
    assert cells(kernel, n=1) == ["remembered = 1"]
    env = {"VMKERNEL_MAX_CONCURRENT_VMS": "1", "VMKERNEL_HISTORY_FILE": str(file_of_all)}
    with start_kernel(small_spec, env=env) as waiting:  # the slot is the other's
        assert "remembered = 1" in cells(waiting, n=20)


@pytest.mark.parametrize("how", ["setting", "nbclient", "disabled"])
def test_off(how: str, small_spec: str, start_kernel: StartKernel, file: Path) -> None:
    """A kernel knows its own cells, and nothing is written."""
    options: dict[str, Any] = {
        "setting": {"env": {"VMKERNEL_HISTORY": "off"}},
        "nbclient": {"extra_arguments": ["--HistoryManager.hist_file=:memory:"]},
        "disabled": {"extra_arguments": ["--HistoryManager.enabled=False"]},
    }[how]
    with start_kernel(small_spec, **options) as kernel:
        kernel.run("here = 1")
        assert cells(kernel) == ["here = 1"]
        time.sleep(2)
        assert not helpers_of(file)
    assert not list(file.parent.iterdir())


def test_a_kernel_of_another_language_answers_itself(
    bash_kernel: str, start_kernel: StartKernel, file: Path
) -> None:
    """The history is IPython's; a Python prompt must not offer lines of bash."""
    with start_kernel(bash_kernel) as bash:
        assert bash.run("echo $((1 + 1))").stdout.strip() == "2"
        assert cells(bash) == []  # the unmodified bash_kernel's answer
    assert not list(file.parent.iterdir())


def test_sigkill_of_the_wrapper(
    small_spec: str, start_kernel: StartKernel, file: Path, wait_until: Callable[..., None]
) -> None:
    with start_kernel(small_spec) as kernel:
        kernel.run("one = 1")
        cell = kernel.send("print('two'); import time; time.sleep(600)")
        kernel.wait_output(cell, "two")
        time.sleep(3)
        psutil.Process(kernel.pid).kill()
        wait_until(lambda: len(on_disk(file)) == 2, SOON)
        wait_until(lambda: not helpers_of(file), SOON)
    assert on_disk(file)[0] == "one = 1"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_kernel_bears_a_file_that_cannot_be_used(
    small_spec: str, start_kernel: StartKernel, file: Path
) -> None:
    file.mkdir()
    with start_kernel(small_spec) as kernel:
        assert kernel.run("1 + 1").result == "2"
        assert cells(kernel) == []
        assert kernel.run("1 + 2").result == "3"


def test_arrow_up_in_the_console(
    small_spec: str, start_kernel: StartKernel, file: Path, wait_until: Callable[..., None]
) -> None:
    """The line of an earlier kernel comes up, and can be run."""
    with start_kernel(small_spec) as earlier:
        earlier.run("print('from an earl' + 'ier kernel')")
    wait_until(lambda: on_disk(file), SOON)
    terminal = Terminal(small_spec, simple=False)
    try:
        terminal.prompt()
        terminal.child.send("\x1b[A")
        terminal.expect("from an earl")
        terminal.child.send("\r")
        terminal.expect("from an earlier kernel")
        terminal.prompt()
        terminal.child.send("exit\r")
        terminal.child.expect(pexpect.EOF)
    finally:
        terminal.child.close(force=True)
