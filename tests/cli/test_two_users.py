"""Two users of one host: one image, one template, one semaphore, and nothing else in common."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from prerequisites import missing
from sharedhost import SharedHost, User, missing_for_it
from vmhost import seconds_until

pytestmark = pytest.mark.vm

ANN, BOB = 64001, 64002
SECRET = "of-the-first-user"

# One kernel by Jupyter's own client; a line of JSON in is a cell, a line out what it printed.
NOTEBOOK = """
import json, sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="vmsandbox-minimal", startup_timeout=100)
print(json.dumps(client.kernel_info(reply=True)["content"]["banner"]), flush=True)
for line in sys.stdin:
    said = []
    def hook(message):
        content = message["content"]
        said.append(content.get("text") or "\\n".join(content.get("traceback", ())))
    client.execute_interactive(json.loads(line), output_hook=hook, timeout=100)
    print(json.dumps("".join(said)), flush=True)
client.stop_channels()
manager.shutdown_kernel()
"""


class Notebook:
    """A user's kernel, as his Jupyter runs it."""

    def __init__(self, user: User, **env: str) -> None:
        done = user.cli("install", "--recipe", "minimal")
        assert done.returncode == 0, done.stderr
        self._process = user.start(sys.executable, "-c", NOTEBOOK, **env)
        self.banner = self._hear()

    def run(self, code: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise AssertionError(self._process.stderr.read())
        return str(json.loads(line))

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def shared_host(minimal_image: str, session_dir: Path) -> SharedHost:
    """Set up with the administrator's command, its two files and one template."""
    if problem := missing_for_it():
        missing(problem)
    directory = session_dir / "shared"
    directory.mkdir()
    host = SharedHost(directory, (ANN, BOB))
    host.put_image(minimal_image)
    done = setup(host)
    assert done.returncode == 0, done.stderr
    assert "built: template of 'minimal' for 512 MiB" in done.stdout
    assert "is there: image 'minimal'" in done.stdout
    return host


def setup(host: SharedHost, *words: str) -> subprocess.CompletedProcess[str]:
    # /etc of the namespace is for reading: the file goes where it is from
    script = host.root.command(
        sys.executable, "-c",
        "import sys; from pathlib import Path; import vmkernel.settings as s; "
        "s.SYSTEM_CONFIG = Path(sys.argv.pop(1)); from vmkernel.cli.app import main; main()",
        str(host.config), "setup-host", "minimal", "--set", f"shared_dir={host.store}",
        "--memory", "512M", "--max-vms", "4", "--max-vms-per-user", "2", "--lock", "network",
        *words,
    )  # fmt: skip
    return subprocess.run(script, env=host.root.env, capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="module")
def notebooks(shared_host: SharedHost) -> Iterator[list[Notebook]]:
    """A kernel of each user's, both at once."""
    ann, bob = shared_host.users
    found = [Notebook(ann, VMKERNEL_ENV="TOKEN", TOKEN=SECRET), Notebook(bob)]
    yield found
    for notebook in found:
        notebook.close()
    assert seconds_until(lambda: not qemus(), 10) < 10


def qemus() -> list[psutil.Process]:
    """The users' VMs."""
    found = [
        process
        for process in psutil.process_iter(["uids", "name"])
        if process.info["uids"].real in (ANN, BOB) and process.info["name"].startswith("qemu")
    ]
    return sorted(found, key=lambda process: process.uids().real)


def vm_of(user: User) -> dict[str, Any]:
    (vm,) = [vm for vm in user.json("ps")["vms"] if vm["owner"] == str(user.uid) and vm["id"]]
    return vm


def test_what_is_there_is_not_made_again(shared_host: SharedHost) -> None:
    before = {path: path.stat().st_mtime_ns for path in shared_host.store.rglob("*")}
    text = shared_host.config.read_text()
    done = setup(shared_host)
    assert done.returncode == 0, done.stderr
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} == {"is there"}
    assert {path: path.stat().st_mtime_ns for path in shared_host.store.rglob("*")} == before
    assert shared_host.config.read_text() == text
    assert "would be" not in setup(shared_host, "--dry-run").stdout.replace(
        "would be built, if it is not there", ""
    )


def test_a_template_that_no_start_can_use_any_more_is_removed(shared_host: SharedHost) -> None:
    (template,) = (shared_host.store / "templates").iterdir()
    old = template.with_name("0" * 32)
    old.mkdir()
    for file in template.iterdir():
        (old / file.name).hardlink_to(file)  # the same inodes: it is whole
    manifest = json.loads((template / "manifest.json").read_text())
    manifest["inputs"]["guest"] = "an earlier version's"
    (old / "manifest.json").unlink()
    (old / "manifest.json").write_text(json.dumps(manifest))
    for dry_run in (["--dry-run"], []):
        assert old.is_dir()
        done = setup(shared_host, *dry_run)
        assert f"template {old.name}: it was made with another version of vmkernel" in done.stdout
    assert list(old.parent.iterdir()) == [template]
    done = shared_host.users[0].cli("image", "verify")
    assert f"memory template {template.name}: whole" in done.stdout


def test_both_run_from_one_template_at_once(
    shared_host: SharedHost, notebooks: list[Notebook]
) -> None:
    for number, notebook in enumerate(notebooks):
        assert notebook.run(f"x = {number + 1}; print(x * 21)") == f"{(number + 1) * 21}\n"
    assert [notebook.run("print(x)") for notebook in notebooks] == ["1\n", "2\n"]
    (template,) = (shared_host.store / "templates").iterdir()
    for user in shared_host.users:
        assert vm_of(user)["template"] == template.name
        assert not (user.home / ".cache/vmkernel/templates").exists()
        assert not (user.home / ".local/share/vmkernel/images").exists()
    # The very pages: both have mapped the one file, privately, and cannot write to it
    inode = (template / "ram").stat().st_ino
    processes = qemus()
    assert [process.uids().real for process in processes] == [ANN, BOB]
    for process in processes:
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        ram = [line.split() for line in maps if line.split()[4] == str(inode)]
        assert {fields[1] for fields in ram} == {"rw-p"}


def test_neither_sees_what_is_the_others(
    shared_host: SharedHost, notebooks: list[Notebook]
) -> None:
    ann, bob = shared_host.users
    assert notebooks[0].run("import os; print(os.environ['TOKEN'])") == f"{SECRET}\n"
    hers = vm_of(ann)
    assert hers["log_dir"]
    # What is open is told to her, and of the variable the name
    assert (hers["environment"], hers["network"]) == ("TOKEN", "none")
    assert "files: ask, variables: TOKEN" in notebooks[0].banner
    assert "workspace: ro" in notebooks[0].banner
    assert "variables" not in notebooks[1].banner
    assert "TOKEN" in notebooks[0].run("%vm")
    assert "env" in ann.cli("ps").stdout
    wide = ann.cli("ps", "--wide").stdout
    assert "WORKSPACE" in wide
    assert "TOKEN" in wide
    assert SECRET not in wide + json.dumps(hers) + notebooks[0].banner + notebooks[0].run("%vm")
    # He sees that a slot is taken, and by whom, and nothing of the VM
    told = bob.json("ps", "--all")
    (stranger,) = [vm for vm in told["vms"] if not vm["id"]]
    assert (stranger["owner"], stranger["state"], stranger["notebook"]) == (str(ANN), "unknown", "")
    assert (told["slots"]["used"], told["slots"]["limit"]) == (2, 4)
    assert hers["id"] not in json.dumps(told)
    for command in (["stop", hers["id"]], ["exec", hers["id"], "-c", "1"], ["logs", hers["id"]]):
        done = bob.cli(*command)
        assert done.returncode != 0
        assert SECRET not in done.stdout + done.stderr
    pids = [hers["pid"], hers["runner_pid"]]
    attempts = [
        *(f"open('/proc/{pid}/{name}', 'rb').read(9)" for pid in pids for name in
          ("environ", "mem", "maps", "auxv")),
        *(f"os.listdir('/proc/{pid}/{name}')" for pid in pids for name in ("fd", "root", "cwd")),
        *(f"os.kill({pid}, {signal.SIGTERM})" for pid in pids),
        *(f"os.listdir({str(path)!r})" for path in
          (ann.home, ann.home / "run/vmkernel", ann.home / ".cache/vmkernel",
           ann.home / ".local/state/vmkernel", hers["log_dir"])),
        f"open({hers['connection_file']!r})",
        f"open({str(ann.home / '.local/state/vmkernel/vms.sqlite')!r})",
    ]  # fmt: skip
    assert refused(bob, attempts) == len(attempts)
    assert notebooks[0].run("print(x)") == "1\n"


def test_nobodys_workspace_is_anothers(shared_host: SharedHost, notebooks: list[Notebook]) -> None:
    ann, bob = shared_host.users
    for user, notebook in zip(shared_host.users, notebooks, strict=True):
        (user.home / "note.txt").write_text(f"of {user.uid}")
        os.chown(user.home / "note.txt", user.uid, user.uid)
        assert notebook.run("print(open('note.txt').read())") == f"of {user.uid}\n"
    assert "FileNotFoundError" in notebooks[0].run(f"open('{bob.home}/note.txt')")
    where = ["--recipe", "minimal", "--set", f"workspace_dir={bob.home}"]
    done = ann.cli("run", *where, "-c", "print(open('note.txt').read())")
    assert done.returncode != 0
    assert f"of {BOB}" not in done.stdout


def test_nobody_changes_what_all_use(shared_host: SharedHost, notebooks: list[Notebook]) -> None:
    (template,) = (shared_host.store / "templates").iterdir()
    places = [shared_host.store, template.parent, template, shared_host.store / "images/minimal"]
    files = [path for path in shared_host.store.rglob("*") if path.is_file()]
    writable = [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o022]
    assert {path.name for path in writable} == {"slots", "slots.boots"}
    attempts = [
        *(f"open({str(path)!r}, 'ab')" for path in files if path not in writable),
        *(f"os.chmod({str(path)!r}, 0o777)" for path in files),
        *(f"os.unlink({str(path)!r})" for path in files),
        *(f"os.utime({str(path)!r}, (1, 1))" for path in files),
        *(f"open({str(path / 'new')!r}, 'x')" for path in places),
        f"os.rename({str(template)!r}, {str(template) + '-gone'!r})",
    ]
    assert stat.S_IMODE(shared_host.config.stat().st_mode) == 0o644
    assert refused(shared_host.users[0], attempts) == len(attempts)


def refused(user: User, attempts: list[str]) -> int:
    """How many of these were refused: all, or it is said which was not."""
    code = """
import json, os, sys
count = 0
for attempt in json.loads(sys.argv[1]):
    try:
        exec(attempt)
    except (PermissionError, FileNotFoundError):
        count += 1
    except OSError as error:
        print(attempt, error, file=sys.stderr)
    else:
        print("not refused:", attempt, file=sys.stderr)
print(count)
"""
    done = user.python(code, json.dumps(attempts))
    assert done.stderr == ""
    return int(done.stdout)


def test_one_limit_for_all_and_one_for_each(
    shared_host: SharedHost, notebooks: list[Notebook]
) -> None:
    ann, bob = shared_host.users
    no_wait = ["--recipe", "minimal", "--set", "queue_timeout=0"]
    try:
        done = ann.cli("start", "second", *no_wait)
        assert done.returncode == 0, done.stderr
        done = ann.cli("run", *no_wait, "-c", "1")
        assert "your limit of 2 VMs is reached (max_vms_per_user)" in done.stderr
        told = bob.json("ps")["slots"]
        assert (told["used"], told["limit"], told["free"]) == (3, 4, 1)
        assert told["user"] == {"used": 1, "limit": 2, "free": 1, "waiting": 0}
        assert "1 of your 2" in bob.cli("ps").stdout
        done = bob.cli("start", "second", *no_wait)
        assert done.returncode == 0, done.stderr
        assert ann.json("ps")["slots"]["used"] == 4
        done = shared_host.root.cli("run", *no_wait, "-c", "1")
        assert "max_concurrent_vms is 4" in done.stderr, "root is a user, too"
        # What is locked on Bob's descriptors stays so, whatever Ann does to the file
        unlock = f"""
import fcntl, struct
file = open({str(shared_host.store / "slots")!r}, "r+")
fcntl.fcntl(file, 37, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0, 0, 0))  # F_OFD_SETLK
fcntl.lockf(file, fcntl.LOCK_UN)
file.truncate(0)
"""
        done = ann.python(unlock)
        assert done.returncode == 0, done.stderr
        assert bob.json("ps")["slots"]["used"] == 4
    finally:
        ended = [user.cli("stop", "second").returncode for user in (ann, bob)]
    assert ended == [0, 0]
    assert bob.json("ps")["slots"]["used"] == 2


def test_what_is_locked_no_user_changes(shared_host: SharedHost) -> None:
    bob = shared_host.users[1]
    for name, value in (("NETWORK", "open"), ("MAX_VMS_PER_USER", "9"), ("SEMAPHORE_FILE", "/x")):
        done = bob.cli("settings", **{f"VMKERNEL_{name}": value})
        assert done.returncode == 1
        assert f"{name.lower()!r} may not be changed" in done.stderr
        assert "/etc/vmkernel/config.toml" in done.stderr
    told = bob.json("settings", VMKERNEL_NETWORK="none")
    assert (told["network"]["value"], told["network"]["locked"]) == ("none", True)
    assert not told["outputs"]["locked"]


def test_who_needs_another_template_is_told_that_he_builds_his_own(
    shared_host: SharedHost,
) -> None:
    bob = shared_host.users[1]
    checks = {check["name"]: check for check in doctor(bob)}
    assert checks["shared store"]["state"] == "ok", checks["shared store"]
    assert str(shared_host.store) in checks["template"]["found"]
    assert "max_vms_per_user" in checks["VM slots"]["found"]
    checks = {check["name"]: check for check in doctor(bob, VMKERNEL_MEMORY="400M")}
    assert checks["shared store"]["state"] == "note"
    assert "other settings (memory, vcpus)" in checks["shared store"]["found"]


def doctor(user: User, **env: str) -> list[dict[str, Any]]:
    done = user.cli("doctor", "--json", VMKERNEL_RECIPE="minimal", **env)
    checks: list[dict[str, Any]] = json.loads(done.stdout)["checks"]
    return checks


def test_a_template_that_is_damaged_is_nobodys(shared_host: SharedHost) -> None:
    bob = shared_host.users[1]
    (template,) = (shared_host.store / "templates").iterdir()
    state = template / "state"
    times, whole = (state.stat().st_atime_ns, state.stat().st_mtime_ns), state.read_bytes()
    for damage in (lambda: state.chmod(0o400), lambda: state.write_bytes(bytes(len(whole)))):
        try:
            damage()
            os.utime(state, ns=times)
            checks = {check["name"]: check for check in doctor(bob)}
            assert checks["template"]["state"] == "note", checks["template"]
        finally:
            state.write_bytes(whole)
            state.chmod(0o444)
            os.utime(state, ns=times)
    assert {check["name"]: check for check in doctor(bob)}["template"]["state"] == "ok"


def test_nobody_waits_in_tmp_for_anothers_sockets(shared_host: SharedHost) -> None:
    ann, bob = shared_host.users
    trap = Path(f"/tmp/vmkernel-{BOB}")
    done = ann.python(f"import os; os.mkdir({str(trap)!r}, 0o777)")
    assert done.returncode == 0, done.stderr
    try:
        done = bob.cli("start", "--recipe", "minimal", XDG_RUNTIME_DIR="")
        assert done.returncode == 1
        assert f"it belongs to user id {ANN}" in done.stderr
        assert list(trap.iterdir()) == []
    finally:
        trap.rmdir()


def test_a_store_that_others_can_write_to_is_left_alone(shared_host: SharedHost) -> None:
    bob = shared_host.users[1]
    assert [found["name"] for found in bob.json("image", "list")["images"]] == ["minimal"]
    os.chown(shared_host.store, ANN, ANN)
    try:
        assert bob.json("image", "list")["images"] == []
        checks = {check["name"]: check for check in doctor(bob)}
        assert checks["shared store"]["state"] == "warning"
        assert f"belongs to user id {ANN}" in checks["shared store"]["found"]
    finally:
        os.chown(shared_host.store, 0, 0)
