"""The command as a person or a program runs it: output, exit codes, what errors say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vmkernel
from vmkernel.vm.limits import find_holder

COMMAND = str(Path(sys.executable).with_name("vmkernel"))


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *words],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"vmkernel {vmkernel.__version__}\n")


def test_help_names_every_command_and_every_command_has_help():
    from vmkernel.cli.app import COMMANDS

    page = run("--help").stdout
    for name, entry in COMMANDS.items():
        assert f"{name}  " in page
        assert entry.help in page
        done = run(name, "--help")
        assert done.returncode == 0, done.stderr
        assert "Usage: vmkernel" in done.stdout


def test_a_mistyped_command_is_misuse_with_a_guess():
    done = run("docter")
    assert done.returncode == 2
    assert "Did you mean 'doctor'?" in done.stderr


def test_an_error_of_ours_is_said_with_what_to_do_and_no_traceback():
    done = run("settings", VMKERNEL_MEMORY="lots")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("vmkernel: error: Setting 'memory' is 'lots'")
    assert "What to do: change environment variable VMKERNEL_MEMORY" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_show_value_and_source():
    done = run("settings", "--json", VMKERNEL_VCPUS="3")
    shown = json.loads(done.stdout)
    assert shown["vcpus"] == {
        "value": 3,
        "source": "environment variable VMKERNEL_VCPUS",
        "locked": False,
    }
    assert shown["memory"] == {"value": 2048, "source": "default", "locked": False}
    line = next(line for line in run("settings").stdout.splitlines() if "queue_timeout" in line)
    assert line.split() == ["queue_timeout", "none", "default"]


def test_install_and_uninstall(tmp_path):
    prefix = ("--prefix", str(tmp_path))
    done = run("install", *prefix, "--memory", "1G", "--set", "log-level=debug",
               VMKERNEL_IMAGES_DIR=str(tmp_path / "none"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vmkernel image build datascience" in done.stderr
    file = tmp_path / "share" / "jupyter" / "kernels" / "vmsandbox" / "kernel.json"
    assert json.loads(file.read_text())["argv"][6:] == ["--memory=1G", "--log-level=debug"]

    assert run("uninstall", *prefix).returncode == 0
    assert not file.parent.exists()
    again = run("uninstall", *prefix)
    assert again.returncode == 1
    assert "There is no kernelspec 'vmsandbox'" in again.stderr


def test_install_by_default_is_for_the_user(tmp_path):
    done = run("install", "--name", "mine", JUPYTER_DATA_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernels" / "mine" / "kernel.json").exists()


@pytest.mark.parametrize(
    "words",
    [("install", "--user", "--sys-prefix"), ("install", "--set", "memory"), ("install", "extra")],
)
def test_install_misused(words):
    assert run(*words).returncode == 2


def test_ps_of_nothing(tmp_path):
    # Not the session's: a wrapper that a test killed leaves its record until the next start
    environ = {
        "VMKERNEL_RUNTIME_DIR": str(tmp_path / "run"),
        "VMKERNEL_STATE_DIR": str(tmp_path / "state"),
    }
    done = run("ps", **environ)
    assert done.returncode == 0, done.stderr
    assert "no VM is there" in done.stdout
    shown = json.loads(run("ps", "--json", **environ).stdout)
    assert shown["vms"] == []
    assert shown["slots"]["used"] == 0


def test_ps_tells_what_lives_and_what_died(settings):
    """A record with a live runner, and one whose runner is gone."""
    from vmkernel.host.processes import identify
    from vmkernel.host.registry import Registry
    from vmkernel.models import VmState

    with Registry(settings) as registry:
        live = registry.new(kernel_id="k-1", recipe="minimal", memory=1024)
        dead = registry.new(kernel_id="k-2")
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            while (qemu := identify(sleeper.pid)) is None:
                time.sleep(0.01)
            registry.update(
                live.vm_id,
                qemu_pid=qemu.pid,
                qemu_start=qemu.start_time,
                slot=0,
                state=VmState.STARTING,
            )
            registry.update(live.vm_id, state=VmState.RUNNING)
            registry.update(dead.vm_id, runner_start=1)
            vms = {vm["id"]: vm for vm in json.loads(run("ps", "--json").stdout)["vms"]}
            assert vms[live.vm_id]["state"] == "running"
            assert vms[live.vm_id]["pid"] == sleeper.pid
            assert vms[live.vm_id]["memory_limit"] == 1024**3
            assert 0 < vms[live.vm_id]["memory_private"] <= vms[live.vm_id]["memory_pss"]
            assert 0 <= vms[live.vm_id]["age"] < 60
            assert vms[dead.vm_id]["state"] == "failed"
            assert "k-1" in run("ps").stdout
        finally:
            sleeper.kill()
            sleeper.wait()
            for record in (live, dead):
                registry.remove(record.vm_id)


def _doctor(**environ: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = run("doctor", "--json", **environ)
    shown = json.loads(done.stdout)
    assert shown["ok"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in shown["checks"]}


def test_doctor_finds_this_machine_as_it_is():
    _, checks = _doctor()
    assert checks["Python"]["state"] == "ok"
    assert sys.executable in checks["Python"]["found"]
    assert checks["VM slots"]["state"] == "ok"
    assert checks["runtime dir"]["state"] == "ok"
    unchecked = [c for c in checks.values() if "could not be checked" in c["found"]]
    assert not unchecked


def test_doctor_without_qemu():
    code, checks = _doctor(VMKERNEL_QEMU="qemu-that-is-not-there")
    assert code == 1
    assert checks["QEMU"]["state"] == "missing"
    assert "qemu-system-x86" in checks["QEMU"]["remedy"]
    assert checks["accelerator"]["state"] == "note"


def test_doctor_with_a_qemu_that_cannot_do_it(tmp_path):
    fake = tmp_path / "qemu"
    fake.write_text("#!/bin/sh\necho QEMU emulator version 0.1\n")
    fake.chmod(0o755)
    code, checks = _doctor(VMKERNEL_QEMU=str(fake))
    assert code == 1
    assert "no machine type microvm" in checks["QEMU"]["found"]


def test_doctor_without_an_image(tmp_path):
    code, checks = _doctor(VMKERNEL_IMAGES_DIR=str(tmp_path))
    assert code == 1
    assert checks["image"]["state"] == "missing"
    assert "vmkernel image build datascience" in checks["image"]["remedy"]
    assert checks["template"]["state"] == "note"


def test_doctor_with_an_unusable_semaphore_file():
    code, checks = _doctor(VMKERNEL_SEMAPHORE_FILE="/proc/slots")
    assert code == 1
    assert checks["VM slots"]["state"] == "missing"
    assert "VMKERNEL_SEMAPHORE_FILE" in checks["VM slots"]["remedy"]


def test_doctor_with_an_open_runtime_dir(tmp_path):
    tmp_path.chmod(0o755)
    code, checks = _doctor(VMKERNEL_RUNTIME_DIR=str(tmp_path))
    assert code == 1
    assert "others may enter" in checks["runtime dir"]["found"]


def test_doctor_with_a_wrong_setting():
    code, checks = _doctor(VMKERNEL_VCPUS="0")
    assert code == 1
    assert list(checks) == ["Python", "settings"]


def test_doctor_warns_of_low_limits():
    done = subprocess.run(
        ["/bin/sh", "-c", f"ulimit -n 200; exec {COMMAND} doctor --json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["limits"]["state"] == "warning"
    assert "ulimit -n" in checks["limits"]["remedy"]


def test_doctor_tells_what_a_cpu_quota_means_here():
    holder = find_holder(os.geteuid(), os.environ)
    _, checks = _doctor()
    assert checks["CPU quota"]["state"] == "ok"
    assert holder.evidence in checks["CPU quota"]["found"]
    _, checks = _doctor(VMKERNEL_CPU_QUOTA="50%")
    assert checks["CPU quota"]["state"] == ("ok" if holder.manager else "warning")
    assert "50 %" in checks["CPU quota"]["found"]


def test_doctor_sees_a_kernelspec_and_a_dead_one(tmp_path):
    environ = {"JUPYTER_DATA_DIR": str(tmp_path)}
    assert run("install", **environ).returncode == 0
    _, checks = _doctor(**environ)
    assert "vmsandbox" in checks["kernelspec"]["found"]
    file = tmp_path / "kernels" / "vmsandbox" / "kernel.json"
    file.write_text(file.read_text().replace(sys.executable, "/gone/python"))
    _, checks = _doctor(**environ)
    assert checks["kernelspec"]["state"] == "warning"
    assert "/gone/python, which is gone" in checks["kernelspec"]["found"]


def test_doctor_sees_a_kernelspec_whose_image_is_not_built(tmp_path):
    environ = {"JUPYTER_DATA_DIR": str(tmp_path), "VMKERNEL_IMAGES_DIR": str(tmp_path / "images")}
    done = run("install", "--recipe", "bash", **environ)
    assert "build it with: vmkernel image build bash" in done.stderr
    _, checks = _doctor(**environ)
    assert checks["kernelspec"]["state"] == "warning"
    assert "vmsandbox-bash" in checks["kernelspec"]["found"]
    assert checks["kernelspec"]["remedy"] == "vmkernel image build bash"
