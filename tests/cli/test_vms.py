"""VMs that stay: start, exec, cp, ps, top, logs, stop, rm; one VM serves most of these tests."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from cli_host import MAIN, Command, left, wait_for
from vmhost import VmHost, seconds_until

# The client of the Jupyter tests; --import-mode=importlib makes no directory importable.
sys.path.insert(0, str(Path(__file__).parent.parent / "jupyter"))

from kernel_client import Kernel


@pytest.fixture(scope="module")
def bench(host: VmHost) -> Iterator[str]:
    """The name of a VM that runs."""
    done = host.cli(
        "start", "bench", "--env", "PLACE", "--tenant", "t", "--task", "7", PLACE="here"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("vm-")
    yield "bench"
    done = host.cli("rm", "--force", "bench")
    assert (done.returncode, done.stderr) == (0, "")
    assert not left(host)


def one(host: VmHost, name: str, *words: str) -> dict[str, object]:
    """A VM as `ps` tells it."""
    vms = json.loads(host.cli("ps", "--json", *words).stdout)["vms"]
    (found,) = [vm for vm in vms if name in (vm["name"], vm["id"])]
    return found


def test_a_started_vm_outlives_the_command(host: VmHost, bench: str):
    vm = one(host, bench)
    assert (vm["state"], vm["kept"], vm["waiting"]) == ("running", True, False)
    assert (vm["tenant_id"], vm["task_id"], vm["recipe"]) == ("t", "7", "minimal")
    assert vm["pid"] in host.qemus()
    assert 0 < vm["memory_private"] <= vm["memory_pss"]
    table = host.cli("ps").stdout
    assert "bench" in table
    assert "t/7" in table
    assert "1 of " in table
    again = host.cli("start", "bench")
    assert again.returncode == 1
    assert "is running" in again.stderr


def test_cells_of_one_vm_know_each_other(host: VmHost, bench: str, tmp_path: Path):
    first = host.cli("exec", bench, "-c", "import os; x = 41; print(os.environ['PLACE'])")
    assert (first.returncode, first.stdout, first.stderr) == (0, "here\n", "")
    assert host.cli("exec", bench, "-c", "x + 1").stdout == "42\n"
    (tmp_path / "cell.py").write_text("x += 1\nx")
    assert host.cli("exec", one(host, bench)["id"], str(tmp_path / "cell.py")).stdout == "42\n"
    told = json.loads(host.cli("exec", bench, "--json", "-c", "x").stdout)
    assert told["results"] == [{"text/plain": "42"}]
    assert told["vm"]["name"] == "bench"


def test_a_cells_failure_is_its_own_and_the_vm_goes_on(host: VmHost, bench: str):
    done = host.cli("exec", bench, "-c", "import sys; sys.exit(5)")
    assert done.returncode == 5
    assert host.cli("exec", bench, "-c", "1/0").returncode == 1
    done = host.cli("exec", "--timeout", "0.5", bench, "-c", "import time; time.sleep(60)")
    assert done.returncode == 124
    assert "KeyboardInterrupt" in done.stderr
    assert "time limit of 0.5 s" in done.stderr
    with Command(host, "exec", bench) as command:  # standard input, as nothing is named
        command.stdin.write("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
        command.stdin.close()
        command._process.stdin = None
        assert command.stdout.readline() == "up\n"
        command.signal(signal.SIGINT)
        assert command.wait() == 130
    assert host.cli("exec", bench, "-c", "'alive'").stdout == "'alive'\n"


def test_files_are_copied_both_ways(host: VmHost, bench: str, tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("text")
    assert "Copied 4 bytes to bench:d" in host.cli("cp", str(tmp_path / "d"), "bench:").stdout
    assert host.cli("exec", bench, "-c", "open('d/f').read()").stdout == "'text'\n"
    done = host.cli("cp", "--json", "bench:d/f", str(tmp_path / "g"))
    assert json.loads(done.stdout) == {
        "source": "bench:d/f", "target": str(tmp_path / "g"), "bytes": 4, "files": 1, "resumed": 0,
    }  # fmt: skip
    assert (tmp_path / "g").read_text() == "text"
    assert host.cli("cp", "a", "b").returncode == 2
    done = host.cli("cp", "bench:none", str(tmp_path))
    assert done.returncode == 1
    assert "none" in done.stderr


def test_top_tells_what_a_vm_takes(host: VmHost, bench: str):
    busy = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    with Command(host, "exec", bench, "-c", busy) as command:

        def share() -> float:
            told = json.loads(host.cli("top", "--json").stdout)
            assert told["slots"]["used"] == 1
            assert 0 < told["host"]["memory_available"] < told["host"]["memory_total"]
            (vm,) = told["vms"]
            return vm["cpu_percent"]

        wait_for(lambda: share() > 20, "a busy VM takes no processor time")
        done = host.cli("top", "-n", "2", "--interval", "0.3")
        assert done.stdout.count("CPU %") == 2
        assert done.stdout.count("bench") == 2
        child = pexpect.spawn(
            sys.executable, ["-c", MAIN, "top", "--interval", "0.3"], timeout=20,
            env={**os.environ, **host.env}, encoding="utf-8", dimensions=(24, 120),
        )  # fmt: skip
        try:
            child.expect_exact("\x1b[?1049h")
            child.expect_exact("bench")
            child.send("q")
            child.expect_exact("\x1b[?1049l")
            child.expect(pexpect.EOF)
            child.close()
            assert child.exitstatus == 0
        finally:
            child.close(force=True)
        command.signal(signal.SIGTERM)
        assert command.wait() == 143
    # The code of a command that is gone is interrupted, so that the next one has its turn
    assert host.cli("exec", bench, "-c", "1").stdout == "1\n"


def test_logs_are_shown_and_followed_to_the_vms_end(host: VmHost):
    vm = host.cli("start", "talker").stdout.strip()
    log = Path(one(host, vm)["log_dir"]) / "qemu.log"
    with Command(host, "logs", "-f", "--which", "qemu", "talker") as follower:
        with log.open("a") as file:  # QEMU has little to say when all is well
            file.write("first\n")
        assert follower.stdout.readline() == "first\n"
        assert not follower.ended
        shown = host.cli("logs", "talker")
        assert "==> qemu <==\nfirst\n" in shown.stdout
        told = json.loads(host.cli("logs", "--json", "talker").stdout)
        assert told["logs"]["qemu"] == "first\n"
        assert host.cli("stop", "talker").returncode == 0
        assert follower.wait(5) == 0
    assert host.cli("rm", "talker").returncode == 0
    assert host.cli("logs", "talker").returncode == 1


def test_a_stopped_vm_is_on_record_and_starts_afresh(host: VmHost):
    started = json.loads(host.cli("start", "--json", "again").stdout)
    assert host.cli("exec", "again", "-c", "open('f', 'w'); x = 1").returncode == 0
    assert host.cli("rm", "again").returncode == 1
    assert host.cli("stop", "again", "nobody").returncode == 1  # and the other one is stopped
    assert one(host, "again", "-a")["state"] == "stopped"
    assert "again" not in host.cli("ps").stdout
    assert "it was asked to" in host.cli("ps", "-a").stdout
    assert "vmkernel start again" in host.cli("exec", "again", "-c", "1").stderr
    assert not [line for line in left(host) if started["id"] in line]

    done = host.cli("start", "again", "--task", "second", "--set", "idle_timeout=1h")
    assert done.stdout.strip() == started["id"]
    assert one(host, "again")["task_id"] == "second"
    done = host.cli("exec", "again", "-c", "import os; os.path.exists('f') or 'x' in globals()")
    assert done.stdout == "False\n"
    assert host.cli("rm", "-f", started["id"][:9], "nobody").returncode == 0
    assert host.cli("rm", "again").returncode == 1


def test_a_start_that_is_interrupted_leaves_nothing(host: VmHost):
    for wait in (0.15, 0.4):
        with Command(host, "start", "never") as command:
            time.sleep(wait)
            command.signal(signal.SIGINT)
            code = command.wait()
            if code == 0:  # it was faster
                assert host.cli("rm", "-f", "never").returncode == 0
            else:
                assert code in (130, -signal.SIGINT)
        assert not [line for line in left(host) if "never" in line]
    assert "never" not in host.cli("ps", "-a").stdout


def test_a_vm_whose_runner_was_killed_is_cleared_up(own_host: VmHost):
    """By gc, and by the start that comes next."""
    vm = json.loads(own_host.cli("start", "--json", "victim").stdout)
    os.kill(vm["runner_pid"], signal.SIGKILL)
    assert seconds_until(lambda: not own_host.qemus(), 5) < 5  # QEMU does not outlive it
    assert one(own_host, "victim")["state"] == "failed"
    done = own_host.cli("exec", "victim", "-c", "1")
    assert done.returncode == 125
    told = json.loads(own_host.cli("gc", "--dry-run", "--json").stdout)["removed"]
    assert [item["what"] for item in told if item["kind"] == "vm"] == [vm["id"]]
    assert "was killed" in own_host.cli("gc").stdout
    assert "was killed" in one(own_host, "victim", "-a")["exit_cause"]
    assert own_host.cli("rm", "victim").returncode == 0


def test_of_a_notebooks_vm_it_says_how_to_reach_it(own_host: VmHost):
    from vmkernel.cli.install import install_kernelspec

    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    install_kernelspec(kernels, name="vmsandbox-cli", options={})
    kernel = Kernel("vmsandbox-cli", env=own_host.env)
    try:
        kernel.run("1")
        wait_for(lambda: json.loads(own_host.cli("ps", "--json").stdout)["vms"], "not on record")
        (vm,) = json.loads(own_host.cli("ps", "--json").stdout)["vms"]
        assert vm["state"] == "running"
        done = own_host.cli("exec", vm["id"], "-c", "1")
        assert done.returncode == 125
        assert f"jupyter console --existing {vm['connection_file']}" in done.stderr
        assert Path(vm["connection_file"]).is_file()
    finally:
        kernel.shut_down()
