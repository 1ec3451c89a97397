"""What befalls the host while VMs run: full disks, lost files, wrong clocks, stopped processes.

One kernel stands by all the time.  After each fault it answers, from the same VM, and no QEMU and
no slot is left but its own.  What a *start* does not find is in test_prerequisites.py, what is
killed in test_kill.py, the semaphore file by itself in test_capacity_faults.py.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from jupyter_client import KernelManager
from kernel_client import Cell, Kernel

from prerequisites import missing
from vmhost import VmHost, seconds_until
from vmkernel.host.descriptors import FEWEST
from vmkernel.settings import load_settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

HOUR = 3600
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
VM = "print(open('/proc/sys/kernel/random/boot_id').read())"


class Bystander:
    """The kernel that nothing may happen to."""

    def __init__(self, spec: str, host: VmHost) -> None:
        self.host = host
        self.kernel = Kernel(spec, env=host.env)
        self.vm = self.kernel.run(VM).stdout
        (self.qemu,) = host.qemus()

    def is_well(self) -> None:
        """It answers from its VM, and is alone again."""
        assert self.kernel.run(VM).stdout == self.vm
        assert seconds_until(lambda: self.host.qemus() == [self.qemu], 10) < 10
        assert seconds_until(lambda: self.host.slots()[1:] == (1, 3, 0), 10) < 10


@pytest.fixture(scope="module")
def standing_by(spec: str, module_host: VmHost) -> Iterator[Bystander]:
    """The module's one."""
    module_host.env["VMKERNEL_MAX_CONCURRENT_VMS"] = "4"
    bystander = Bystander(spec, module_host)
    yield bystander
    bystander.kernel.shut_down()


@pytest.fixture
def host(standing_by: Bystander, tmp_path: Path) -> Iterator[VmHost]:
    """The host of a test, looked over at its end."""
    yield standing_by.host
    standing_by.is_well()
    # A QEMU with a cache directory of the test's own is none of the host's
    assert seconds_until(lambda: not vms_of(tmp_path), 10) < 10


def vms_of(place: Path) -> list[int]:
    """The QEMUs with files in this directory."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = "\n".join(process.info["cmdline"] or [])
        if "-name\nvmkernel-" in line and f"{place}/" in line:
            found.append(process.pid)
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``small_disk(options)``: a file system of the test's own in memory."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted: list[Path] = []

    def make(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def running(spec: str, host: VmHost, **env: str) -> Iterator[Kernel]:
    """A kernel besides the one that stands by."""
    kernel = Kernel(spec, env={**host.env, **env})
    try:
        yield kernel
    finally:
        kernel.close()
        kernel.manager.shutdown_kernel(now=not kernel.manager.is_alive())


def qemu_of(kernel: Kernel, host: VmHost) -> psutil.Process:
    """The QEMU of a kernel's VM."""
    family = {process.pid for process in psutil.Process(kernel.pid).children(recursive=True)}
    (pid,) = family.intersection(host.qemus())
    return psutil.Process(pid)


def told(cell: Cell, says: str, todo: str) -> None:
    """The cell ended in an error that says what is wrong and what to do."""
    assert cell.status == "error"
    assert re.search(says, cell.error["evalue"], re.DOTALL), cell.error["evalue"]
    traceback = re.sub(r"\x1b\[\d+m", "", cell.traceback)
    assert re.search(rf"^What to do: .*{todo}", traceback, re.MULTILINE), traceback


# --- full disks, under way ---


def test_a_host_disk_that_is_full_under_a_running_cell(
    spec: str, host: VmHost, small_disk: Callable[[str], Path]
) -> None:
    """The VM's scratch disk is larger than what the host has: the guest is told, and goes on."""
    place = small_disk("size=24m,mode=700")
    (place / "templates").symlink_to(load_settings().cache_dir / "templates")
    with running(spec, host, VMKERNEL_CACHE_DIR=str(place)) as kernel:
        cell = kernel.run(
            "import os\n"
            "with open('big', 'wb', buffering=0) as file:\n"
            "    for _ in range(64):\n"
            "        file.write(os.urandom(1 << 20))\n"
            "        os.fsync(file.fileno())",
            seconds=60,
        )
        assert cell.error["evalue"] == "[Errno 5] Input/output error"
        assert kernel.run("6 * 7", seconds=60).result == "42"


def test_a_disk_for_records_and_logs_that_fills_under_way(
    spec: str, host: VmHost, small_disk: Callable[[str], Path]
) -> None:
    place = small_disk("size=2m,mode=700")
    shutil.copytree(host.state_dir, place, dirs_exist_ok=True)
    with running(spec, host, VMKERNEL_STATE_DIR=str(place)) as kernel:
        assert kernel.run("6 * 7").result == "42"
        fill(place)
        assert kernel.run("x = 6 * 7; x").result == "42"
        # The news of a death goes into the log, too
        assert kernel.run("import os; os._exit(1)").error["ename"] == "VmGuestError"
        assert kernel.run("6 * 7").result == "42"


def fill(place: Path, chunk: int = 1 << 12) -> None:
    """Leave no room on a disk, in the file ``fill``; ``chunk`` bytes at a time."""
    with suppress(OSError), open(place / "fill", "wb", buffering=0) as file:
        while True:
            file.write(bytes(chunk))


def test_a_runtime_directory_on_a_full_disk(
    spec: str, host: VmHost, small_disk: Callable[[str], Path]
) -> None:
    """The semaphore file and the runner's socket lie there; the rest of the host is as it was."""
    place = small_disk("size=16k,nr_inodes=8,mode=700")
    fill(place)
    with running(spec, host, VMKERNEL_RUNTIME_DIR=str(place)) as kernel:
        cell = kernel.run("6 * 7", seconds=60)
        if cell.status == "error":
            told(cell, "No space left on device", "VMKERNEL_|space")
        (place / "fill").unlink()
        assert kernel.run("6 * 7").result == "42"


def test_a_disk_that_fills_while_a_template_is_built(
    spec: str, host: VmHost, small_disk: Callable[[str], Path]
) -> None:
    """Nothing of the attempt is left on it, and the next one succeeds or says the same."""
    place = small_disk("size=560m,mode=700")
    with running(spec, host, VMKERNEL_CACHE_DIR=str(place)) as kernel:
        cell = kernel.send("6 * 7", allow_stdin=False)
        kernel.wait(lambda: vms_of(place), "the template's boot", 60)
        fill(place, 1 << 20)
        kernel.finish(cell, 120)
        told(cell, "signal 7|No space left", "[Ff]ree space.*VMKERNEL_CACHE_DIR")
        assert [path.name for path in place.glob("templates/.tmp-*")] == []
        assert vms_of(place) == []


def test_a_full_disk_for_the_history(
    spec: str, host: VmHost, small_disk: Callable[[str], Path]
) -> None:
    place = small_disk("size=64k,mode=700")
    fill(place)
    with running(spec, host, IPYTHONDIR=str(place)) as kernel:
        assert [kernel.run(f"6 * {n}").result for n in range(3)] == ["0", "6", "12"]


# --- files that are lost or changed ---


@pytest.mark.parametrize("how", ["removed", "truncated", "nonsense", "replaced"])
def test_the_semaphore_file_under_running_vms(
    spec: str, host: VmHost, how: str, tmp_path: Path
) -> None:
    """VMs that run are counted on, and who waits gets its turn."""
    file = tmp_path / "slots"
    env = {"VMKERNEL_SEMAPHORE_FILE": str(file), "VMKERNEL_MAX_CONCURRENT_VMS": "1"}
    with running(spec, host, **env) as holder, running(spec, host, **env) as waiter:
        assert holder.run("6 * 7").result == "42"
        cell = waiter.send("6 * 7", allow_stdin=False)
        waiter.wait(lambda: "waiting for a VM slot" in str(cell.messages), "its place in the queue")
        if how == "removed":
            file.unlink()
        elif how == "truncated":
            os.truncate(file, 0)
        elif how == "nonsense":
            file.write_bytes(os.urandom(4096))
        else:
            other = tmp_path / "other"
            other.write_bytes(b"")
            other.rename(file)
        assert holder.run("6 * 7").result == "42"
        waiter.listen(1.5)
        if how in ("truncated", "nonsense"):  # the locks are on the file, whatever is in it
            assert not cell.replies
        holder.shut_down()
        waiter.finish(cell, 60)
        assert cell.result == "42"


@pytest.mark.parametrize("how", ["removed", "nonsense", "a directory"])
def test_the_record_of_vms_under_way(spec: str, host: VmHost, how: str, tmp_path: Path) -> None:
    """A notebook does not need it; who asks for it is told what to do, or gets a new one."""
    database = tmp_path / "vms.sqlite"
    env = {"VMKERNEL_DATABASE_FILE": str(database)}
    with running(spec, host, **env) as kernel:
        assert kernel.run("6 * 7").result == "42"
        assert seconds_until(database.exists, 10) < 10
        for file in tmp_path.glob("vms.sqlite*"):
            if how == "nonsense":
                file.write_bytes(os.urandom(8192))
            else:
                file.unlink()
        if how == "a directory":
            database.mkdir()
        assert kernel.run("7 * 6").result == "42"
        ps = host.cli("ps", **env)
        assert "Traceback" not in ps.stderr
        if ps.returncode:
            assert "What to do: " in ps.stderr
        with running(spec, host, **env) as other:
            assert other.run("6 * 7").result == "42"


def test_a_record_that_somebody_has_locked(spec: str, host: VmHost, tmp_path: Path) -> None:
    database = tmp_path / "vms.sqlite"
    env = {"VMKERNEL_DATABASE_FILE": str(database)}
    with running(spec, host, **env) as kernel:
        assert kernel.run("6 * 7").result == "42"
        assert seconds_until(database.exists, 10) < 10
        with sqlite3.connect(database, isolation_level=None) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            with running(spec, host, **env) as other:
                assert other.run("6 * 7").result == "42"
            lock.execute("ROLLBACK")
        lock.close()


def test_directories_removed_under_way(spec: str, host: VmHost, tmp_path: Path) -> None:
    """What a running VM needs it has open.  The next start makes what it needs."""
    cache, state = tmp_path / "cache", tmp_path / "state"
    cache.mkdir()
    (cache / "templates").symlink_to(load_settings().cache_dir / "templates")
    shutil.copytree(host.state_dir, state)
    env = {"VMKERNEL_CACHE_DIR": str(cache), "VMKERNEL_STATE_DIR": str(state)}
    with running(spec, host, **env) as kernel:
        assert kernel.run("x = 6 * 7; x").result == "42"
        shutil.rmtree(cache)
        shutil.rmtree(state)
        code = "open('y', 'wb').write(bytes(1 << 20)); x"
        assert kernel.run(code).result == "42"
        assert kernel.run("import os; os._exit(1)").error["ename"] == "VmGuestError"
        assert kernel.run("os = 6; os * 7").result == "42"


def test_a_template_removed_under_its_clones(spec: str, host: VmHost, tmp_path: Path) -> None:
    """Clones that run have its files open.  One that starts has them, too, or says what is wrong,
    and the next cell builds them anew.
    """
    (qemu,) = host.qemus()
    line = Path(f"/proc/{qemu}/cmdline").read_text()
    used = load_settings().cache_dir / re.findall(r"templates/\w+(?=/)", line)[0]
    mine = tmp_path / "cache" / "templates"
    mine.mkdir(parents=True)
    subprocess.run(["cp", "-a", "--sparse=always", used, mine], check=True)
    # The copy has other inodes, and the manifest names those of the original
    manifest = mine / used.name / "manifest.json"
    content = json.loads(manifest.read_text())
    for name, record in content["files"].items():
        record["inode"] = (mine / used.name / name).stat().st_ino
    manifest.write_text(json.dumps(content))

    env = {"VMKERNEL_CACHE_DIR": str(mine.parent)}
    with running(spec, host, **env) as kernel:
        assert kernel.run("x = 6 * 7; x").result == "42"
        began = len(vms_of(tmp_path))
        assert began
        with running(spec, host, **env) as other:
            assert seconds_until(lambda: len(vms_of(tmp_path)) > began, 20) < 20
            mine.rename(tmp_path / "gone")
            shutil.rmtree(tmp_path / "gone")
            cell = other.run("6 * 7")
            if cell.status == "error":
                told(cell, "template", "start again|VMKERNEL_CACHE_DIR")
                cell = other.run("6 * 7")
            assert cell.result == "42"
        assert kernel.run("import json, decimal, sqlite3; x").result == "42"
        assert kernel.run("import os; os._exit(1)").error["ename"] == "VmGuestError"
        assert kernel.run("6 * 7").result == "42"


# --- time ---


def guest_clock_error(kernel: Kernel, now: Callable[[], float]) -> float:
    """Seconds by which the guest's clock is wrong."""
    before = now()
    guest = float(kernel.run("import time; print(time.time())").stdout)
    after = now()
    return max(before - guest, guest - after, 0.0)


def test_the_hosts_clock_is_set_by_an_hour(spec: str, host: VmHost, tmp_path: Path) -> None:
    """Forward and back: nothing is taken for dead or idle, and the guest's clock follows."""
    if not FAKETIME.exists():
        missing(f"{FAKETIME} is not there: sudo apt install libfaketime")
    offset = tmp_path / "offset"
    offset.write_text("+0")
    env = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
        "VMKERNEL_IDLE_TIMEOUT": "10m",
        "VMKERNEL_LIFETIME": "30m",
    }
    with running(spec, host, **env) as kernel:
        vm = kernel.run(VM).stdout
        for step in (HOUR, -HOUR, 0):
            cell = kernel.send("import time; time.sleep(1); print('through')")
            kernel.wait(lambda cell=cell: cell.messages, "its start")
            offset.write_text(f"{step:+d}")
            kernel.finish(cell)
            assert cell.stdout == "through\n"
            assert guest_clock_error(kernel, lambda step=step: time.time() + step) < 0.5
            # The record is read under the clock that was set, too
            listed = host.cli("ps", "--json", **env)
            assert len(json.loads(listed.stdout)["vms"]) == 2
            assert kernel.run(VM).stdout == vm
        with running(spec, host, **env) as other:
            assert other.run("6 * 7").result == "42"


def test_a_qemu_that_is_stopped_for_a_while(spec: str, host: VmHost) -> None:
    """A cell waits and goes on; who interrupts meanwhile is told, and heard afterwards."""
    with running(spec, host) as kernel:
        kernel.run("import time")
        qemu = qemu_of(kernel, host)
        cell = kernel.send("for i in range(20): time.sleep(0.1)\nprint('through')")
        kernel.wait(lambda: cell.messages, "its start")
        qemu.send_signal(signal.SIGSTOP)
        kernel.listen(2.5)
        assert not cell.replies
        qemu.send_signal(signal.SIGCONT)
        kernel.finish(cell, 60)
        assert cell.stdout == "through\n"
        assert guest_clock_error(kernel, time.time) < 0.5

        cell = kernel.send("time.sleep(300)")
        kernel.wait(lambda: "execute_input" in cell.types, "its start")
        qemu.send_signal(signal.SIGSTOP)
        kernel.interrupt()
        kernel.wait(lambda: "was not heard" in cell.stderr, "word of it", 30)
        qemu.send_signal(signal.SIGCONT)
        kernel.finish(cell, 60)
        assert cell.error["ename"] == "KeyboardInterrupt"
        assert kernel.run("6 * 7").result == "42"


def test_the_host_is_suspended(spec: str, host: VmHost) -> None:
    """Wrapper and VM stop, in the middle of a cell and with nothing to do, and go on as one."""
    with running(spec, host) as kernel:
        vm = kernel.run(VM).stdout
        for code in ("import time\nfor i in range(20): time.sleep(0.1)\nprint('through')", ""):
            cell = kernel.send(code, allow_stdin=False)
            kernel.wait(lambda cell=cell: cell.messages, "its start")
            if not code:
                kernel.finish(cell)
            wrapper = psutil.Process(kernel.pid)
            everybody = [wrapper, *wrapper.children(recursive=True)]
            for process in everybody:
                process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            for process in reversed(everybody):
                process.send_signal(signal.SIGCONT)
            kernel.finish(cell, 60)
            assert "through" in cell.stdout or not code
            assert guest_clock_error(kernel, time.time) < 0.5
            assert kernel.run(VM).stdout == vm
        assert len(json.loads(host.cli("ps", "--json").stdout)["vms"]) == 2


# --- the front end, and what a process is given ---

FRONT_END = """
import sys, time
sys.path.insert(0, {place!r})
from kernel_client import Kernel
kernel = Kernel({spec!r})
kernel.run("")
print(kernel.pid, flush=True)
kernel.send("import time; time.sleep(300)")
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_front_end_is_gone(spec: str, host: VmHost, number: signal.Signals) -> None:
    place = str(Path(__file__).parent.parent / "jupyter")
    with subprocess.Popen(
        [sys.executable, "-c", FRONT_END.format(place=place, spec=spec)],
        env={**os.environ, **host.env},
        stdout=subprocess.PIPE,
    ) as front_end:
        assert front_end.stdout is not None
        wrapper = psutil.Process(int(front_end.stdout.readline()))
        assert len(host.qemus()) == 2
        front_end.send_signal(number)
        front_end.wait(10)
    assert seconds_until(lambda: not wrapper.is_running() or wrapper.status() == "zombie", 20) < 20
    assert seconds_until(lambda: len(host.qemus()) == 1, 20) < 20


def test_all_clients_are_gone_and_others_come(spec: str, host: VmHost) -> None:
    with running(spec, host) as kernel:
        cell = kernel.send(
            "import time; x = 0\nfor i in range(10): print(i); time.sleep(0.1); x += 1"
        )
        kernel.wait(lambda: cell.stdout, "its start")
        kernel.close()
        with kernel.another_client() as other:
            assert other.run("x").result == "10"


@pytest.mark.parametrize("most", [32, 64])
def test_few_descriptors(spec: str, host: VmHost, most: int) -> None:
    """It works, or says what it lacks; nothing hangs and nothing stays."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    main = "from vmkernel.cli.app import main; main()"
    command = subprocess.run(
        [sys.executable, "-c", main, "run", "-c", "print(6 * 7)"],
        env={**os.environ, **host.env},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
    )
    if command.returncode == 0:
        assert command.stdout == "42\n"
    else:
        assert "Traceback" not in command.stderr
        assert re.search("[Tt]oo many open files", command.stderr)
        assert "What to do: " in command.stderr
    if most < FEWEST:  # it ends before it could be connected to
        manager = KernelManager(kernel_name=spec)
        manager.start_kernel(
            env={**os.environ, **host.env}, preexec_fn=limit, stderr=subprocess.PIPE
        )
        process = manager.provisioner.process
        try:
            assert process.wait(30) == 1
            assert b"may have 32 files open" in (said := process.stderr.read())
            assert b"What to do: raise the limit" in said
        finally:
            manager.shutdown_kernel(now=True)
        return
    kernel = Kernel(spec, env=host.env, preexec_fn=limit)
    try:
        assert kernel.run("6 * 7", seconds=60).result == "42"
    finally:
        kernel.close()
        kernel.manager.shutdown_kernel(now=True)


BARE: dict[str, dict[str, str | None]] = {
    "no HOME": {"HOME": None},
    "a HOME that is not there": {"HOME": "/nowhere"},
    "no XDG_RUNTIME_DIR": {"XDG_RUNTIME_DIR": None},
    "a TMPDIR that is not there": {"TMPDIR": "/nowhere"},
    "nothing but PATH": {"HOME": None, "XDG_RUNTIME_DIR": None, "TMPDIR": None, "USER": None,
                         "LOGNAME": None, "LANG": None, "SHELL": None, "TERM": None},
}  # fmt: skip


@pytest.mark.parametrize("lack", BARE)
def test_an_environment_that_lacks(
    spec: str, host: VmHost, lack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in BARE[lack].items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    # Where images and connection files lie is settings' and Jupyter's business, not HOME's
    settings = {"VMKERNEL_IMAGES_DIR": os.environ.get("VMKERNEL_IMAGES_DIR", _images())}
    with running(spec, host, **settings) as kernel:
        assert kernel.run("6 * 7").result == "42"


def _images() -> str:
    import pwd

    home = pwd.getpwuid(os.geteuid()).pw_dir
    return str(load_settings(environ={**os.environ, "HOME": home}).images_dir)


# In a mount namespace of its own, what the test does to the machine is seen by its kernel only
IN_OTHER_MOUNTS = """
import os, subprocess, sys
sys.path.insert(0, {place!r})
from kernel_client import Kernel
subprocess.run({command!r}, shell=True, check=True)
for env in {environments!r}:
    kernel = Kernel({spec!r}, env=env)
    cell = kernel.run("6 * 7", seconds=100)
    print(cell.result if cell.status == "ok" else cell.traceback)
    kernel.shut_down()
"""


def in_other_mounts(spec: str, host: VmHost, command: str, *environments: dict[str, str]) -> str:
    """What kernels show for ``6 * 7`` on a machine that ``command`` changed."""
    if os.geteuid() != 0:
        pytest.skip("only root can have mounts of its own")
    place = str(Path(__file__).parent.parent / "jupyter")
    code = IN_OTHER_MOUNTS.format(
        place=place, command=command, spec=spec, environments=environments or ({},)
    )
    found = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", code],
        env={**os.environ, **host.env},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    return re.sub(r"\x1b\[\d+m", "", found.stdout)


def test_no_shared_memory_directory(spec: str, host: VmHost) -> None:
    command = "umount /dev/shm || true; mount -t tmpfs -o size=4k,mode=000 tmpfs /dev/shm"
    assert in_other_mounts(spec, host, command) == "42\n"


def test_a_read_only_home(spec: str, host: VmHost, tmp_path: Path) -> None:
    """Templates lie there: who cannot write where they are is told which setting says where."""
    home = load_settings().cache_dir.resolve()
    elsewhere = tmp_path / "cache"
    elsewhere.mkdir()
    (elsewhere / "templates").symlink_to(home / "templates")
    command = f"mount --bind {home} {home} && mount -o remount,bind,ro {home}"
    here, there = {}, {"VMKERNEL_CACHE_DIR": str(elsewhere)}
    said = in_other_mounts(spec, host, command, here, there)
    assert re.match(r"VmOverlayError: .*Read-only file system", said)
    assert re.search(r"^What to do: .*VMKERNEL_CACHE_DIR", said, re.MULTILINE)
    assert said.endswith("\n42\n")
