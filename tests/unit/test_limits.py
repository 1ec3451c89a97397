"""How a QEMU is held to its limits: who can do it here, and by which command line."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from vmkernel.vm.limits import (
    Holder,
    Limits,
    describe,
    find_holder,
    start_command,
    start_environment,
)

QEMU = ["/usr/bin/qemu", "-m", "512M"]
USER_SLICE = "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service"
DIE_WITH_PARENT = ["/usr/bin/setpriv", "--pdeathsig", "KILL"]
NOBODY = Holder(None, "systemd does not run here")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The files of a host with systemd and cgroup v2, as Debian 12 has them."""
    for name in ("run/systemd/system", "run/user/1000/systemd", "usr/bin", USER_SLICE):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "usr/bin/systemd-run").touch()
    (tmp_path / "run/user/1000/systemd/private").touch()
    controllers = "cpuset cpu io memory hugetlb pids rdma misc\n"
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text(controllers)
    (tmp_path / USER_SLICE / "cgroup.controllers").write_text("cpu memory pids\n")
    return tmp_path


SESSION = {"XDG_RUNTIME_DIR": "/run/user/1000"}


def test_the_systems_manager_holds_roots_vms_and_the_users_manager_a_users(host: Path) -> None:
    assert find_holder(0, {}, host).manager == "system"
    assert find_holder(1000, SESSION, host).manager == "user"


@pytest.mark.parametrize(
    ("uid", "missing", "words"),
    [
        (0, "run/systemd/system", "does not run"),
        (0, "usr/bin/systemd-run", "is missing"),
        (0, "sys/fs/cgroup/cgroup.controllers", "version 2"),
        (1000, "run/user/1000/systemd/private", "user manager"),
        (1000, f"{USER_SLICE}/cgroup.controllers", "no cpu controller"),
    ],
)
def test_without_one_of_these_nobody_does(host: Path, uid: int, missing: str, words: str) -> None:
    path = host / missing
    path.rmdir() if path.is_dir() else path.unlink()
    holder = find_holder(uid, SESSION, host)
    assert holder.manager is None
    assert words in holder.evidence


def test_nor_where_the_cpu_controller_was_not_passed_on(host: Path) -> None:
    (host / USER_SLICE / "cgroup.controllers").write_text("memory pids\n")
    assert find_holder(1000, SESSION, host).manager is None
    assert find_holder(1000, {}, host).manager is None
    assert find_holder(0, {}, host).manager == "system"


def test_this_host_can_be_looked_at() -> None:
    assert find_holder(0, {}).evidence


def test_without_a_quota_there_is_the_shell_and_nothing_else() -> None:
    command = start_command(QEMU, Limits(512), None, 4711)
    assert command[:6] == [*DIE_WITH_PARENT, "--", "/bin/sh", "-c"]
    assert command[7:] == ["4711", *QEMU]
    assert "ulimit -c 0; ulimit -d 2621440 " in command[6]
    assert "ulimit -u" not in command[6]
    assert start_environment(Limits(512), None) == {"LC_ALL": "C"}


def test_a_quota_without_systemd_is_low_priority() -> None:
    command = start_command(QEMU, Limits(512, 50), NOBODY, 4711)
    assert command[8:] == ["/usr/bin/nice", "-n", "10", *QEMU]


def test_a_user_of_its_own_has_a_limit_on_its_tasks() -> None:
    command = start_command(QEMU, Limits(512), None, 4711, ["--reuid=65537"])
    assert command[:7] == [*DIE_WITH_PARENT, "--reuid=65537", "--", "/bin/sh", "-c"]
    assert "ulimit -u 256 " in command[7]
    script = command[7].partition("cd /")[0]
    shown = subprocess.run(
        ["/bin/sh", "-c", f"{script} cat /proc/self/limits"], capture_output=True, text=True
    )
    assert re.search(r"^Max processes +256 +256 ", shown.stdout, re.MULTILINE), shown


@pytest.mark.parametrize("user", [[], ["--reuid=65537"]])
@pytest.mark.parametrize("manager", ["system", "user"])
def test_a_quota_with_systemd_is_a_scope(
    manager: str, user: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    holder = Holder(manager, "")  # type: ignore[arg-type]
    command = start_command(QEMU, Limits(512, 150), holder, 4711, user)
    assert command[:6] == [*DIE_WITH_PARENT, "--", "/bin/sh", "-c"]
    assert command[7:] == [
        "4711",
        "/usr/bin/systemd-run",
        f"--{manager}",
        "--scope",
        "--quiet",
        "--collect",
        "--no-ask-password",
        "--description=vmkernel VM",
        "--property=CPUQuota=150%",
        "--property=MemoryMax=1024M",
        "--property=TasksMax=256",
        "--",
        # As another user systemd-run would not be heard; who becomes one forgets the signal
        *([*DIE_WITH_PARENT, *user, "--"] if user else []),
        *QEMU,
    ]
    environment = start_environment(Limits(512, 150), holder)
    runtime = {"XDG_RUNTIME_DIR": "/run/user/1000"} if manager == "user" else {}
    assert environment == {"LC_ALL": "C", **runtime}


def test_words_that_systemd_run_might_change_do_not_go_through_it() -> None:
    command = start_command([*QEMU, "/home/a$b/ram"], Limits(512, 50), Holder("user", ""), 1)
    assert "/usr/bin/nice" in command


def test_the_words_are_for_people() -> None:
    assert describe(Limits(512), NOBODY) == "no limit"
    assert describe(Limits(512, 50), Holder("user", "a scope")) == (
        "at most 50 % of one processor (a scope)"
    )
    words = describe(Limits(512, 50), NOBODY)
    assert "low priority" in words
    assert "systemd does not run here" in words


@pytest.mark.parametrize(("before", "after"), [("1000000", "1000000"), ("unlimited", "2621440")])
def test_a_lower_limit_that_is_there_already_stays(before: str, after: str) -> None:
    command = start_command(["/bin/sh", "-c", "ulimit -d"], Limits(512), None, os.getpid())
    # Root may raise its limits again: without that right
    outer = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]
    script = f'ulimit -d {before}; exec "$@"'
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", *(outer if os.getuid() == 0 else []), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"{after}\n", "")
