"""Another language: an unmodified bash kernel in a VM, by nothing but its recipe."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from kernel_client import Kernel, StartKernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def bash(bash_kernel: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    """A running bash kernel, shared by the module's tests."""
    with start_kernel(bash_kernel) as kernel:
        kernel.run("true")  # the template is there
        yield kernel


def test_the_front_end_is_told_the_language(bash: Kernel) -> None:
    info = bash.request("kernel_info_request").reply
    assert info["language_info"]["name"] == "bash"
    assert info["language_info"]["file_extension"] == ".sh"
    assert "GNU bash" in info["banner"]
    assert "microVM" in info["banner"]


def test_cells_print_and_keep_their_state(bash: Kernel) -> None:
    cell = bash.run("x=41; cd /tmp; echo out; echo err >&2")
    assert (cell.stdout.split(), cell.status) == (["out", "err"], "ok")  # one terminal for both
    assert cell.types == ["execute_input", *["stream"] * (len(cell.types) - 1)]
    cell = bash.run("echo $((x + 1)); pwd; id -un; hostname")
    assert re.fullmatch(r"42\r?\n/tmp\r?\nuser\r?\nvm-\w+\r?\n", cell.stdout)
    assert cell.reply["execution_count"] > 1


def test_a_command_that_fails_is_an_error_and_stops_what_is_queued(bash: Kernel) -> None:
    failing = bash.send("sleep 1; (exit 7)")
    queued = bash.send("echo 'must not run'")
    bash.finish(failing)
    bash.finish(queued)
    assert failing.error["evalue"] == "7"
    assert (failing.status, queued.status) == ("error", "aborted")
    assert bash.run("echo on").stdout.strip() == "on"


def test_output_comes_while_the_cell_runs(bash: Kernel) -> None:
    cell = bash.send("echo first; sleep 5; echo second")
    bash.wait_output(cell, "first")
    assert "second" not in cell.stdout
    assert bash.finish(cell).stdout.split() == ["first", "second"]


def test_an_interrupt_ends_a_command_and_nothing_else(bash: Kernel) -> None:
    bash.run("kept=on")
    cell = bash.send("echo begun; sleep 300; echo 'must not run'")
    bash.wait_output(cell, "begun")
    bash.listen(0.3)
    began = time.monotonic()
    bash.interrupt()
    bash.finish(cell, 20)
    assert time.monotonic() - began < 20
    assert cell.status != "ok"
    assert "must not run" not in cell.stdout
    assert bash.run("echo $kept").stdout.strip() == "on"


def test_completion(bash: Kernel) -> None:
    bash.run("variable_of_mine=1")
    reply = bash.request("complete_request", {"code": "echo $variable_o", "cursor_pos": 16}).reply
    assert reply["matches"] == ["$variable_of_mine"]
    assert (reply["cursor_start"], reply["cursor_end"]) == (5, 16)


def test_twins_differ(bash: Kernel, bash_kernel: str, start_kernel: StartKernel) -> None:
    code = "echo $RANDOM $RANDOM $SRANDOM $HOSTNAME"
    with start_kernel(bash_kernel, env={"JPY_SESSION_NAME": "it's $(here)"}) as twin:
        mine, its = bash.run(code).stdout.split(), twin.run(code).stdout.split()
        assert len(mine) == len(its) == 4
        assert mine[:2] != its[:2]
        assert mine[2] != its[2]
        assert mine[3] != its[3]
        assert twin.run('echo "$JPY_SESSION_NAME"').stdout.strip() == "it's $(here)"


def test_a_kernel_that_died_is_replaced_and_files_stay(bash: Kernel) -> None:
    bash.run("echo content > ~/kept; lost=1")
    cell = bash.run("kill -KILL $PPID; sleep 20")
    assert cell.status == "error"
    assert "killed by SIGKILL" in cell.error["evalue"]
    cell = bash.run("cat ~/kept; echo [$lost]; echo $HOSTNAME; pwd")
    content, lost, host, directory = cell.stdout.split()
    assert (content, lost, directory) == ("content", "[]", "/home/user")
    assert host.startswith("vm-")
