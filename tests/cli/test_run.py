"""``vmkernel run``: a script's exit code and streams are its own, and its VM leaves nothing."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from cli_host import MAIN, Command, left, wait_for
from vmhost import VmHost, seconds_until

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("code", "exit_code", "stdout", "stderr"),
    [
        ("print('out'); import sys; print('err', file=sys.stderr); 6 * 7", 0, "out\n", "err\n"),
        ("import sys; print('x', end=''); sys.exit(3)", 3, "x", ""),
        ("import sys; sys.exit('why')", 1, "", "why\n"),
        ("import sys; sys.exit('5')", 1, "", "5\n"),
        ("exit()", 0, "", ""),
        ("import os; print('x', flush=True); os._exit(7)", 7, "x\n", ""),
        ("display({'a': 1}); raise SystemExit(None)", 0, "{'a': 1}\n", ""),
    ],
)
def test_exit_code_and_streams_are_the_codes_own(run: Run, code, exit_code, stdout, stderr):
    done = run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, stdout, stderr)


def test_an_exception_is_told_with_the_scripts_own_lines(run: Run, tmp_path: Path):
    (tmp_path / "script.py").write_text("def f():\n    return 1 / 0\n\n\nf()\n")
    done = run("script.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(
        r"File ~/script\.py:5\n.*File ~/script\.py:2, in f\(\)", done.stderr, re.DOTALL
    )
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "\x1b" not in done.stderr


def test_a_signal_that_kills_the_code_is_told_as_a_shell_does(run: Run):
    done = run("-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert done.returncode == 128 + signal.SIGTERM
    assert "vmkernel: The guest kernel was killed by SIGTERM" in done.stderr


SCRIPT = """\
import asyncio, atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor

async def answer():
    await asyncio.sleep(0)
    return 42

print(sys.argv, __name__, open(__file__).read().count("\\n"))
print(asyncio.run(answer()), asyncio.new_event_loop().run_until_complete(answer()))
print(ThreadPoolExecutor().submit(int, "7").result())
atexit.register(print, "atexit")
print(input("name? "), repr(sys.stdin.readline()), ascii(sys.stdin.read()))
try:
    input()
except EOFError:
    print("eof")
threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
"""


def test_a_file_is_a_script(run: Run, tmp_path: Path):
    """Arguments, event loops, threads, functions at exit, standard input."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = run(str(path), "--json", "a b", stdin="me\nyou\nrest ä")
    assert done.stdout.splitlines() == [
        f"['script.py', '--json', 'a b'] __main__ {SCRIPT.count(chr(10))}",
        "42 42",
        "7",
        "name? me 'you\\n' 'rest \\xe4'",
        "eof",
        "thread",
        "atexit",
    ]
    assert (done.returncode, done.stderr) == (0, "")


def test_standard_input_may_be_the_code_and_await_is_allowed(run: Run):
    done = run("-", "x", stdin="import asyncio, sys\nawait asyncio.sleep(0)\nprint(sys.argv)\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "['-', 'x']\n", "")


def test_streams_are_live(host: VmHost):
    code = "import time\nfor i in range(3):\n    print(i, flush=True)\n    input()"
    with Command(host, "run", "-c", code) as command:
        for number in range(3):  # what came is read before the code may go on
            assert command.stdout.readline() == f"{number}\n"
            command.stdin.write("\n")
        assert command.wait() == 0


def test_files_go_in_and_come_out(run: Run, tmp_path: Path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "a").write_text("1")
    (tmp_path / "data" / "link").symlink_to("/etc/passwd")
    (tmp_path / "b").write_bytes(os.urandom(700_000))
    code = (
        "import os, shutil\n"
        "print(sorted(os.listdir('data')), os.path.getsize('/tmp/b'))\n"
        "shutil.move('data', 'result'); open('result/new', 'w').write('y')\n"
        "os.rename('/tmp/b', 'c')"
    )
    done = run("--json", "--in", "data", "--in", "b:/tmp/b", "--out", "result", "--out", "c:d",
               "-c", code, cwd=tmp_path)  # fmt: skip
    told = json.loads(done.stdout)
    assert told["stdout"] == "['sub'] 700000\n", done.stderr
    assert [item["bytes"] for item in told["files"]["in"]] == [1, 700_000]
    assert told["files"]["out"] == [
        {"source": "result", "target": "result", "bytes": 2},
        {"source": "c", "target": "d", "bytes": 700_000},
    ]
    assert (tmp_path / "result" / "sub" / "a").read_text() == "1"
    assert (tmp_path / "result" / "new").read_text() == "y"
    assert (tmp_path / "d").read_bytes() == (tmp_path / "b").read_bytes()
    assert "left out" in done.stderr


def test_results_come_out_of_code_that_failed(run: Run, tmp_path: Path):
    done = run("--out", "log", "--out", "none", "-c", "open('log', 'w').write('so far'); 1/0",
               cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert (tmp_path / "log").read_text() == "so far"
    assert "vmkernel: --out none: " in done.stderr
    assert run("--out", "none", "-c", "1", cwd=tmp_path).returncode == 125


def test_environment_and_settings(run: Run):
    done = run("--env", "A", "--env", "B", "--env", "C", "--vcpus", "1", "--set",
               "idle_timeout=1h", "-c", "import os; print([os.environ.get(n) for n in 'ABCD'])",
               A="1", B="2", D="4")  # fmt: skip
    assert done.stdout == "['1', '2', None, None]\n", done.stderr
    assert done.stderr == "vmkernel: warning: the variable C (--env) is not set\n"


def test_the_account_for_programs(run: Run):
    done = run("--json", "-c", "print('a'); display(1); import sys; print('b', file=sys.stderr)\n2")
    told = json.loads(done.stdout)
    assert told.items() >= {
        "exit_code": 0, "stdout": "a\n", "stderr": "b\n", "error": None, "truncated": False,
        "failure": None, "results": [{"text/plain": "1"}, {"text/plain": "2"}],
        "files": {"in": [], "out": []},
    }.items()  # fmt: skip
    vm = told["vm"]
    assert (vm["recipe"], vm["language"], vm["memory_limit"]) == ("minimal", "python", 512 << 20)
    assert 0 < vm["start_seconds"] < 60
    assert 0 < told["duration"] < 60
    assert done.stderr == ""

    done = run("--json", "-c", "raise ValueError('no')")
    told = json.loads(done.stdout)
    assert "File <-c>:1" in told["error"]["traceback"]
    assert (done.returncode, told["exit_code"]) == (1, 1)
    assert (told["error"]["name"], told["error"]["value"]) == ("ValueError", "no")
    assert "\x1b" not in told["error"]["traceback"]


def test_a_time_limit_ends_the_vm(run: Run, host: VmHost):
    done = run("--timeout", "0.5", "--json", "-c",
               "print('before', flush=True)\nimport time\ntime.sleep(60)")  # fmt: skip
    assert done.returncode == 124
    told = json.loads(done.stdout)
    assert (told["exit_code"], told["stdout"]) == (124, "before\n")
    assert told["failure"]["kind"] == "VmTimeoutError"
    assert "time limit of 0.5 s" in done.stderr
    assert "--timeout" in done.stderr
    assert not left(host)


@pytest.mark.parametrize(
    ("words", "exit_code", "why"),
    [
        (("--recipe", "nothing", "-c", "1"), 125, "There is no image 'nothing'"),
        (("--memory", "1", "-c", "1"), 125, "from option --memory"),
        (("/no/file.py",), 125, "No such file"),
        (("--in", "/no/file", "-c", "1"), 125, "/no/file"),
        ((), 2, "name a FILE"),
        (("--timeout", "soon", "-c", "1"), 2, "is no time"),
    ],
)
def test_failures_of_ours_have_exit_codes_of_their_own(run: Run, words, exit_code, why):
    done = run(*words)
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_at_capacity_it_waits_and_says_so(host: VmHost, run: Run):
    limit = {"VMKERNEL_MAX_CONCURRENT_VMS": "1"}
    with Command(host, "run", "-c", "print(1, flush=True); input()", **limit) as first:
        assert first.stdout.readline() == "1\n"
        done = run("--json", "--set", "queue_timeout=0", "-c", "1", **limit)
        assert done.returncode == 125
        assert json.loads(done.stdout)["failure"]["kind"] == "VmCapacityError"
        with (
            Command(host, "run", "-c", "print(2)", **limit) as second,
            Command(host, "run", "-q", "-c", "print(3)", **limit) as third,
        ):
            assert "waiting for a VM slot" in second.stderr.readline()
            listed = json.loads(host.cli("ps", "--json", **limit).stdout)
            assert [vm["waiting"] for vm in listed["vms"]] == [False, True, True]
            third.signal(signal.SIGINT)
            assert third.wait() == 130
            assert third.stderr.read() == ""
            first.stdin.write("\n")
            assert (second.wait(), second.stdout.read()) == (0, "2\n")


# --- how it ends early -------------------------------------------------------------------

ENDLESS = "import time\nprint('up', flush=True)\nwhile True:\n    time.sleep(0.1)"


def test_the_first_ctrl_c_is_the_codes(host: VmHost):
    code = (
        "import time\ntry:\n    print('up', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('caught'); raise SystemExit(9)"
    )
    with Command(host, "run", "-c", code) as command:
        assert command.stdout.readline() == "up\n"
        command.signal(signal.SIGINT)
        assert command.wait() == 9
        assert command.stdout.read() == "caught\n"
    with Command(host, "run", "-c", ENDLESS) as command:
        assert command.stdout.readline() == "up\n"
        command.signal(signal.SIGINT)
        assert command.wait() == 130
        assert "KeyboardInterrupt" in command.stderr.read()
    assert not left(host)


DEAF = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + ENDLESS


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_whatever_ends_the_command_ends_the_vm(host: VmHost, number, code):
    with Command(host, "run", "-c", DEAF) as command:
        assert command.stdout.readline() == "up\n"
        command.signal(number)
        if number == signal.SIGINT:
            time.sleep(0.1)
            command.signal(number)
        began = time.monotonic()
        assert command.wait() == code
        assert time.monotonic() - began < 4
    assert seconds_until(lambda: not left(host), 5) < 5


def test_a_signal_at_any_moment_leaves_nothing(host: VmHost, rounds):
    dice = random.Random(7)
    for number in range(rounds(quick=7, full=100)):
        which = dice.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        wait = dice.uniform(0.02, 0.9)
        with Command(host, "run", "-c", "print('done')") as command:
            time.sleep(wait)
            command.signal(which)
            code = command.wait()
            said = command.stderr.read()
        # Before Python has come to us, a signal does what it does to any program of Python's
        ours = "Fatal Python error: init_import_site" not in said
        assert code in (0, 128 + which, -which) or not ours, (
            f"round {number}, {which.name} after {wait:.3f} s: {code}, {said}"
        )
        assert not left(host), f"round {number}: {which.name} after {wait:.3f} s"


def test_a_reader_that_leaves_ends_it(host: VmHost):
    code = "while True:\n    print('x' * 1000)"
    with Command(host, "run", "-c", code) as command:
        command.stdout.readline()
        command.stdout.close()
        command.stdout = open(os.devnull)  # noqa: SIM115 - communicate() reads something
        command._process.stdout = command.stdout
        assert command.wait() == 128 + signal.SIGPIPE
        assert command.stderr.read() == ""
    assert seconds_until(lambda: not left(host), 5) < 5


def waiting_in(pipe: int) -> int:
    """Bytes that are there to be read (ioctl_pipe(2))."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]


def test_nobody_reads_and_a_signal_ends_it_all_the_same(host: VmHost):
    """The output's pipe is full, so that the command is blocked in a write."""
    with Command(host, "run", "-c", "while True:\n    print('x' * 1000)") as command:
        wait_for(lambda: waiting_in(command.stdout.fileno()) > 60_000, "the pipe is not full")
        time.sleep(0.1)
        command.signal(signal.SIGTERM)
        assert command.wait() == 143
    assert seconds_until(lambda: not left(host), 5) < 5


def test_output_that_cannot_be_written_is_a_failure(host: VmHost):
    def to(place: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", f'exec "$@" {place}', "sh", sys.executable, "-c", MAIN, "run", "-c",
             "print('x')"],
            env={**os.environ, **host.env}, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip

    done = to(">/dev/full")
    assert done.returncode == 125
    assert "could not be written: No space left" in done.stderr
    assert to(">&-").returncode == 0


def test_at_a_terminal(host: VmHost):
    """Colours, a question, a password that does not show, Ctrl-C by the keyboard."""
    code = (
        "import getpass, sys, time\nprint(input('name? '), sys.stdin.isatty())\n"
        "print(getpass.getpass('secret? ')[::-1])\ntime.sleep(60)"
    )
    child = pexpect.spawn(sys.executable, ["-c", MAIN, "run", "-c", code], timeout=20,
                          env={**os.environ, **host.env}, encoding="utf-8")  # fmt: skip
    try:
        child.expect_exact("name? ")
        child.sendline("me")
        child.expect_exact("me True")
        child.expect_exact("secret? ")
        child.sendline("xyz")
        child.expect_exact("zyx")
        assert "xyz" not in child.before
        time.sleep(0.2)
        child.sendintr()
        child.expect("\x1b\\[[0-9;]+mKeyboardInterrupt")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 130
    finally:
        child.close(force=True)


def test_bash(host: VmHost, bash_image: str, tmp_path: Path):
    """A shell's script: by its suffix, with arguments, and its exit status is the command's."""
    path = tmp_path / "script.sh"
    path.write_text('echo "$0 $# $2"\necho err >&2\nexit 4\n')
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "run", str(path), "a", "b c"],
        env={**os.environ, **host.env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "script.sh 2 b c\nerr\n"), done.stderr
