"""The workspace from a notebook: the host's directory at its own path, live both ways."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kernel_client import Kernel, StartKernel

from vmhost import VmHost, seconds_until
from vmkernel.host import workspace, workspace_server

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        workspace_server.missing(workspace_server.find_bwrap()) != ("", ""),
        reason="bubblewrap and sftp-server are not both here",
    ),
]

RW = {"VMKERNEL_WORKSPACE": "rw", "VMKERNEL_WORKSPACE_SIZE": "64M"}


def fill(directory: Path) -> Path:
    """A directory as a notebook has it."""
    (directory / "data" / "deep").mkdir(parents=True)
    (directory / "data.csv").write_text("a,b\n1,2\n")
    (directory / "data" / "deep" / "file").write_text("deep")
    (directory / "helper.py").write_text("def fail():\n    return 1 / 0\n")
    (directory / ".env").write_text("SECRET=1")
    (directory / ".git").mkdir()
    (directory / ".git" / "config").write_text("[core]")
    (directory / "to data").symlink_to(directory / "data")
    (directory / "out").symlink_to("/etc/shadow")
    return directory


@pytest.fixture(scope="module")
def ro_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("ro") / "note books é")


@pytest.fixture(scope="module")
def rw_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("rw") / "notebooks")


@pytest.fixture(scope="module")
def ro(small_spec: str, ro_dir: Path, start_kernel: StartKernel) -> Iterator[Kernel]:
    with start_kernel(small_spec, env={"VMKERNEL_WORKSPACE": "ro"}, cwd=str(ro_dir)) as kernel:
        kernel.run("import os")
        yield kernel


@pytest.fixture(scope="module")
def rw(small_spec: str, rw_dir: Path, start_kernel: StartKernel) -> Iterator[Kernel]:
    with start_kernel(small_spec, env=RW, cwd=str(rw_dir)) as kernel:
        kernel.run("import os")
        yield kernel


def value(kernel: Kernel, code: str) -> object:
    """What an expression is in the guest."""
    return eval(kernel.run(code).result)


def servers(kernel: Kernel) -> list[psutil.Process]:
    """The sftp-servers of this kernel."""
    children = psutil.Process(kernel.pid).children(recursive=True)
    return [process for process in children if process.name() == "sftp-server"]


# --- seen ---


def test_no_server_runs_before_it_is_used(ro: Kernel) -> None:
    ro.run("1 + 1")
    assert not servers(ro)


def test_cells_work_in_the_notebooks_directory(ro: Kernel, ro_dir: Path) -> None:
    assert value(ro, "import os; os.getcwd()") == str(ro_dir)
    assert value(ro, "open('data.csv').read()") == "a,b\n1,2\n"
    assert value(ro, f"open({str(ro_dir / 'data.csv')!r}).read()") == "a,b\n1,2\n"
    assert ro.run("!cat data/deep/file").stdout.strip() == "deep"
    assert value(ro, "open('to data/deep/file').read()") == "deep"  # an absolute link of the host's
    ro.run("%cd data")
    assert value(ro, "os.getcwd()") == str(ro_dir / "data")
    assert value(ro, "sorted(os.listdir('..'))") == [
        ".git", "data", "data.csv", "helper.py", "out", "to data",
    ]  # fmt: skip
    ro.run("%cd ..")


def test_tracebacks_name_the_file_on_the_host(ro: Kernel, ro_dir: Path) -> None:
    cell = ro.run("import helper; print(helper.__file__); helper.fail()")
    assert cell.stdout.strip() == str(ro_dir / "helper.py")
    assert "return" in cell.traceback
    assert "helper.py" in cell.traceback


def test_what_is_saved_on_the_host_is_seen_at_once(ro: Kernel, ro_dir: Path) -> None:
    ro.run("seen = lambda: open('live.txt').read()")
    for number in range(5):
        (ro_dir / "live.txt").write_text(f"version {number}" * (number + 1))
        assert value(ro, "seen()") == f"version {number}" * (number + 1)
    (ro_dir / "live.txt").unlink()
    assert value(ro, "os.path.exists('live.txt')") is False
    (ro_dir / "live.txt").write_text("again")
    assert value(ro, "os.path.exists('live.txt')") is True
    (ro_dir / "live.txt").unlink()


def test_a_module_that_was_changed_is_reloaded(ro: Kernel, ro_dir: Path) -> None:
    (ro_dir / "changing.py").write_text("value = 1\n")
    assert value(ro, "import changing; changing.value") == 1
    (ro_dir / "changing.py").write_text("value = 'another'\n")
    assert value(ro, "import importlib; importlib.reload(changing).value") == "another"


def test_it_is_read_only_and_says_so(ro: Kernel, ro_dir: Path) -> None:
    for code in ("open('new', 'w')", "os.mkdir('new')", "os.remove('data.csv')",
                 "os.rename('data.csv', 'new')", "os.symlink('a', 'new')", "os.utime('data.csv')",
                 "os.chmod('data.csv', 0o777)", "open('data.csv', 'a')"):  # fmt: skip
        cell = ro.run(code)
        assert "Read-only file system" in cell.error["evalue"], code
        assert "VMKERNEL_WORKSPACE=rw" in "".join(cell.error["traceback"])
    assert (ro_dir / "data.csv").read_text() == "a,b\n1,2\n"
    assert not (ro_dir / "new").exists()
    assert f"ro {ro_dir}" in ro.run("%vm").stdout


FROM_CELLS = {
    "upwards": "open('../../../../../../../../etc/hostname').read() != HOST and None",
    "a link to the host's password file": "open('out').read()",
    "a hidden name": "open('.env').read()",
    "root's mount": "os.listdir('/run/vmkernel-workspace')",
    "mount it again": "os.stat('/run/vmkernel-workspace/mount')",
    "the port": "[os.open(f'/dev/vport{a}p4', os.O_RDWR) for a in range(5)]",
    "fuse": "os.open('/dev/fuse', os.O_RDWR)",
    "end sshfs": "os.kill(sshfs(), 9)",
    "trace sshfs": "open(f'/proc/{sshfs()}/mem', 'rb')",
    "its descriptors": "os.listdir(f'/proc/{sshfs()}/fd')",
    "unmount": "check(libc.umount2(os.getcwd().encode(), 2))",
    "remount it": "check(libc.mount(b'none', os.getcwd().encode(), None, 32 | 4096, None))",
    "a device": "os.mknod('node', 0o60600, os.makedev(254, 0))",
    "a pipe": "os.mkfifo('pipe')",
    "out of memory first": "open(f'/proc/{sshfs()}/oom_score_adj', 'w').write('1000')",
}  # fmt: skip


def test_cells_that_try_to_get_out(ro: Kernel, ro_dir: Path) -> None:
    ro.run(
        "import os, ctypes, pathlib\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def check(result):\n"
        "    if result: raise OSError(ctypes.get_errno(), 'refused')\n"
        "def sshfs():\n"
        "    return next(int(p.name) for p in pathlib.Path('/proc').iterdir() if p.name.isdigit()\n"
        "                and (p / 'comm').read_text().strip() == 'sshfs')\n"
        f"HOST = {Path('/etc/hostname').read_text()!r}"
    )
    assert int(ro.run("sshfs()").result) > 1
    for name, code in FROM_CELLS.items():
        cell = ro.run(code)
        if name == "upwards":
            assert not cell.contents("execute_result"), "the host's own file"
            continue
        assert cell.error["ename"] in ("PermissionError", "OSError", "FileNotFoundError"), name
    assert value(ro, "open('data.csv').read()") == "a,b\n1,2\n"


def test_a_thousand_files(ro: Kernel, ro_dir: Path) -> None:
    many = ro_dir / "many"
    many.mkdir()
    for number in range(1000):
        (many / f"{number}.txt").write_text(f"{number}\n   ")
    assert value(ro, "sum(os.path.getsize(f'many/{n}') for n in os.listdir('many'))") == 2890 + 4000
    code = "sum(int(open(f'many/{n}.txt').read()) for n in range(100, 200))"
    assert value(ro, code) == sum(range(100, 200))


def test_the_directory_is_renamed_on_the_host(ro: Kernel, ro_dir: Path) -> None:
    other = ro_dir.with_name("renamed")
    ro_dir.rename(other)
    try:
        assert value(ro, "open('data.csv').read(), os.getcwd()") == ("a,b\n1,2\n", str(ro_dir))
        (other / "later").write_text("later")
        assert value(ro, "open('later').read()") == "later"
    finally:
        other.rename(ro_dir)


# --- written ---


def test_what_a_cell_writes_is_on_the_host(rw: Kernel, rw_dir: Path) -> None:
    rw.run("import os; open('result.csv', 'w').write('x\\n1\\n')")
    assert (rw_dir / "result.csv").read_text() == "x\n1\n"
    assert (rw_dir / "result.csv").stat().st_uid == os.getuid()
    rw.run("os.makedirs('a/b'); os.rename('result.csv', 'a/b/c'); os.symlink('b', 'a/link')")
    assert (rw_dir / "a" / "b" / "c").read_text() == "x\n1\n"
    assert (rw_dir / "a" / "link").readlink() == Path("b")
    rw.run("f = open('a/b/c', 'a'); f.write('2\\n'); f.flush(); os.fsync(f.fileno())")
    assert (rw_dir / "a" / "b" / "c").read_text() == "x\n1\n2\n"
    rw.run("os.remove('a/b/c')")
    assert value(rw, "f.close(); os.listdir('a/b')") == []
    assert list((rw_dir / "a" / "b").iterdir()) == []


def test_names_of_all_sorts(rw: Kernel, rw_dir: Path) -> None:
    names = ["Grüße 😀", "new\nline", "tab\t", "-rf", "*", "a'b\"c", "a" * 255]
    rw.run(f"os.mkdir('names')\nfor n in {names!r}: open('names/' + n, 'w').write(n)")
    assert {p.name for p in (rw_dir / "names").iterdir()} == {*names}
    for name in names:
        (rw_dir / "names" / f"{name[:200]}2").write_text("host")
    assert value(rw, "len(os.listdir('names'))") == 2 * len(names)


def test_a_large_file_there_and_back(rw: Kernel, rw_dir: Path) -> None:
    data = os.urandom(20 << 20)
    (rw_dir / "large").write_bytes(data)
    rw.run("import shutil, hashlib; shutil.copyfile('large', 'copy')")
    assert (rw_dir / "copy").read_bytes() == data
    rw.run("os.remove('copy'); os.remove('large')")


def test_traps_for_the_host_cannot_be_laid(rw: Kernel, rw_dir: Path) -> None:
    for code in ("open('.git/hooks', 'w')", "open('.git/config', 'a')", "os.mkdir('.vscode')",
                 "os.rename('data.csv', '.envrc')", "open('sitecustomize.py', 'w')",
                 "os.rename('.git', 'git')", "os.symlink('/etc', 'etc')", "os.mkdir('__pycache__')",
                 "os.symlink('../x', 'up')", "os.chmod('data.csv', 0o4755)", "os.mkfifo('pipe')",
                 "os.chown('data.csv', 0, 0)", "os.link('.git/config', 'x')"):  # fmt: skip
        cell = rw.run(code)
        assert cell.error["ename"] in ("PermissionError", "OSError", "FileNotFoundError"), code
    assert (rw_dir / ".git" / "config").read_text() == "[core]"
    assert not [name for name in ("x", "pipe", "up", "etc") if os.path.lexists(rw_dir / name)]
    rw.run("import helper")  # its bytecode would be run on the host
    assert not (rw_dir / "__pycache__").exists()


def test_more_than_may_be_written_is_refused_and_explained(rw: Kernel, rw_dir: Path) -> None:
    cell = rw.run("with open('much', 'wb') as f:\n    for _ in range(80): f.write(bytes(1 << 20))")
    assert cell.error["ename"] == "OSError"
    assert "workspace_size" in cell.stderr
    assert (rw_dir / "much").stat().st_size <= 64 << 20
    assert value(rw, "open('data.csv').read()") == "a,b\n1,2\n"


def test_a_server_that_is_killed_in_the_midst_of_work(rw: Kernel, rw_dir: Path) -> None:
    assert value(rw, "open('data.csv').read()") == "a,b\n1,2\n"
    cell = rw.send(
        "import time\nfailed = 0\nend = time.monotonic() + 3\nprint('begun')\n"
        "while time.monotonic() < end:\n"
        "    try: assert open('data.csv').read() == 'a,b\\n1,2\\n'\n"
        "    except OSError: failed += 1\n"
        "print('failed', failed)"
    )
    rw.wait_output(cell, "begun")
    (first,) = servers(rw)
    first.kill()
    rw.finish(cell)
    assert cell.status == "ok", cell.traceback
    (second,) = servers(rw)
    assert second.pid != first.pid
    assert value(rw, "open('data.csv').read(), failed < 50") == ("a,b\n1,2\n", True)


def test_the_guest_kernel_dies_and_its_successor_has_the_workspace(
    rw: Kernel, rw_dir: Path
) -> None:
    rw.run("import os; os.abort()")
    assert value(rw, "import os; os.getcwd(), open('data.csv').read()") == (
        str(rw_dir), "a,b\n1,2\n",
    )  # fmt: skip


def test_a_restart_has_it_too_and_leaves_no_server(rw: Kernel, rw_dir: Path) -> None:
    (before,) = servers(rw)
    rw.manager.restart_kernel(now=True)
    rw.wait_ready()
    assert value(rw, "import os; os.getcwd(), open('data.csv').read()") == (
        str(rw_dir), "a,b\n1,2\n",
    )  # fmt: skip
    assert not psutil.wait_procs([before], 10)[1]


def test_a_kernel_that_is_killed_leaves_no_server(rw: Kernel) -> None:
    """The last test of this kernel."""
    family = psutil.Process(rw.pid).children(recursive=True)
    assert any(process.name() == "sftp-server" for process in family)
    os.kill(rw.pid, signal.SIGKILL)
    assert not psutil.wait_procs(family, 10)[1]


# --- other owners ---


def test_none_is_none(small_spec: str, ro_dir: Path, start_kernel: StartKernel) -> None:
    with start_kernel(small_spec, cwd=str(ro_dir)) as kernel:  # as all other tests have it
        assert value(kernel, f"import os; os.getcwd(), os.path.exists({str(ro_dir)!r})") == (
            "/home/user", False,
        )  # fmt: skip
        assert value(kernel, "'fuse' in open('/proc/mounts').read()") is True  # for root alone


def test_a_directory_that_cannot_be_shared_is_no_reason_not_to_start(
    small_spec: str, start_kernel: StartKernel
) -> None:
    with start_kernel(small_spec, env={"VMKERNEL_WORKSPACE": "ro"}, cwd="/etc") as kernel:
        cell = kernel.run("import os; os.getcwd()")
        assert cell.result == "'/home/user'"
        assert "/etc is a directory of the system's" in cell.stderr
        assert "none: /etc is a directory" in kernel.run("%vm").stdout
        assert kernel.run("1").stderr == ""  # said once
    env = {"VMKERNEL_WORKSPACE": "ro", "VMKERNEL_WORKSPACE_DIR": "/etc"}
    with start_kernel(small_spec, env=env) as kernel:
        assert "workspace_dir" in kernel.run("1").error["evalue"]


def test_a_kernel_of_the_pool_gets_the_directory_when_it_is_handed_over(
    small_spec: str, session_dir: Path, ro_dir: Path
) -> None:
    host = VmHost(session_dir)
    env = {**host.env, "VMKERNEL_POOL_SIZE": "1", "VMKERNEL_WORKSPACE": "ro"}
    try:
        done = host.cli("pool", "fill", "--kernel", small_spec, **env)
        assert done.returncode == 0, done.stderr
        kernel = Kernel(small_spec, env=env, cwd=str(ro_dir))
        try:
            assert psutil.Process(kernel.pid).exe().endswith(("sh", "busybox"))
            assert value(kernel, "import os; os.getcwd(), open('data.csv').read()") == (
                str(ro_dir), "a,b\n1,2\n",
            )  # fmt: skip
        finally:
            kernel.shut_down()
    finally:
        host.cli("pool", "stop")
        seconds_until(lambda: not host.left(), 10)


def test_a_bash_kernel_has_it(bash_kernel: str, ro_dir: Path, start_kernel: StartKernel) -> None:
    with start_kernel(bash_kernel, env={"VMKERNEL_WORKSPACE": "ro"}, cwd=str(ro_dir)) as kernel:
        assert kernel.run("pwd; cat data.csv").stdout.split() == [
            *str(ro_dir).split(), "a,b", "1,2",
        ]  # fmt: skip


def test_a_vm_for_programs_has_one_when_it_is_named(session_dir: Path, rw_dir: Path) -> None:
    host = VmHost(session_dir)
    code = "import os; print(os.getcwd()); open('by run', 'w').write('x')"
    env = {"VMKERNEL_WORKSPACE": "rw"}
    done = host.cli("run", "-c", code, **env, VMKERNEL_WORKSPACE_DIR=str(rw_dir))
    assert (done.stdout.strip(), done.returncode) == (str(rw_dir), 0), done.stderr
    assert (rw_dir / "by run").read_text() == "x"
    done = host.cli("run", "-c", "import os; print(os.getcwd())", **env)
    assert done.stdout.strip() == "/home/user"


def test_a_host_without_the_server_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, ro_dir: Path
) -> None:
    from vmkernel.settings import load_settings

    settings = load_settings(environ={**os.environ, "VMKERNEL_WORKSPACE": "ro"})
    monkeypatch.setattr(workspace_server, "SERVERS", ("/no/such/server",))
    chosen = workspace.choose(settings, str(ro_dir))
    assert chosen.share is None
    assert "openssh-sftp-server" in chosen.hint
    assert "none: " in chosen.in_words
