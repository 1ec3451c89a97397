"""What launcher and server agree on: the pool's place, the request, the ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmkernel.pool import handover
from vmkernel.pool.request import Request
from vmkernel.pool.surroundings import surroundings
from vmkernel.settings import default_dir

PYTHON, LAUNCHER = "/v/bin/python", "/v/lib/vmkernel/pool/launcher.py"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"XDG_RUNTIME_DIR": "/run/user/7"},
        {"XDG_RUNTIME_DIR": "relative"},
    ],
)
def test_the_place_is_in_the_default_runtime_dir(environ: dict[str, str]) -> None:
    coded = {name.encode(): value.encode() for name, value in environ.items()}
    path = Path(os.fsdecode(handover.place(coded, PYTHON, LAUNCHER)))
    assert path.parent == default_dir("runtime_dir", environ)


def test_each_copy_of_vmkernel_has_a_pool_of_its_own() -> None:
    environ = {b"VMKERNEL_RUNTIME_DIR": b"/r"}
    places = {
        handover.place(environ, PYTHON, LAUNCHER),
        handover.place(environ, "/w/bin/python", LAUNCHER),
        handover.place(environ, PYTHON, "/w/vmkernel/pool/launcher.py"),
        handover.place({**environ, b"PYTHONPATH": b"/w"}, PYTHON, LAUNCHER),
        handover.place({b"VMKERNEL_RUNTIME_DIR": b"/s"}, PYTHON, LAUNCHER),
    }
    assert len(places) == 5
    assert handover.place({**environ, b"OTHER": b"x"}, PYTHON, LAUNCHER) in places


@pytest.mark.parametrize("directory", [b"relative", b"~/run", b"/" + 100 * b"x"])
def test_where_there_can_be_no_pool(directory: bytes) -> None:
    assert handover.place({b"VMKERNEL_RUNTIME_DIR": directory}, PYTHON, LAUNCHER) == b""


def test_a_request_arrives_as_it_was() -> None:
    environ = {b"A": b"1", b"EMPTY": b"", b"WITH": b"a=b\nc", b"ODD": b"\xff"}
    arguments = ["-f", "/k/kernel-ä.json", "--memory=4G", ""]
    fd = handover.pack(arguments, environ)
    try:
        request = Request.read(fd)
    finally:
        os.close(fd)
    assert request.arguments == arguments
    assert {os.fsencode(n): os.fsencode(v) for n, v in request.environ.items()} == environ
    assert request.directory == str(Path.cwd())
    umask = os.umask(0)
    os.umask(umask)
    assert request.umask == umask


@pytest.mark.parametrize("data", [b"", b"vmkernel pool 0\0" + b"0\0/\0" + b"0", b"\0\0\0"])
def test_a_request_of_another_version_is_none(data: bytes) -> None:
    fd = os.memfd_create("test")
    os.write(fd, data)
    with pytest.raises(ValueError, match="version"):
        Request.read(fd)
    os.close(fd)


def test_others_cannot_stand_in_for_the_server(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = os.fsencode(tmp_path / "pool")
    with pytest.raises(OSError, match="No such file"):
        handover.connect(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        handover.connect(path).close()
        tmp_path.chmod(0o755)
        with pytest.raises(OSError, match="private"):
            handover.connect(path)
        tmp_path.chmod(0o700)
    with pytest.raises(ConnectionRefusedError):  # it was killed
        handover.connect(path)


def _connection_file(path: Path, **changes: object) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    info: dict[str, object] = {
        "shell_port": port, "iopub_port": 0, "stdin_port": 0, "control_port": 0, "hb_port": 0,
        "ip": "127.0.0.1", "key": 'a"b, "hb_port": 1', "transport": "tcp",
    }  # fmt: skip
    path.write_text(json.dumps({**info, **changes}, indent=2))
    return path


def test_the_launcher_listens_on_the_kernels_ports(tmp_path: Path) -> None:
    file = _connection_file(tmp_path / "kernel.json")
    fds = handover.listen(["x", "-f", str(file)])
    assert len(fds) == 5
    shell = socket.socket(fileno=fds[0])
    assert shell.getsockname() == ("127.0.0.1", json.loads(file.read_text())["shell_port"])
    with socket.create_connection(shell.getsockname(), 1):
        pass
    # What is taken is found, and told, by who opens the sockets for good
    assert handover.listen(["x", "-f", str(file)]) == []
    shell.close()
    for fd in fds[1:]:
        os.close(fd)


@pytest.mark.parametrize(
    "changes", [{"transport": "ipc"}, {"ip": "::1"}, {"ip": "*"}, {"hb_port": "x"}]
)
def test_what_the_launcher_does_not_know_it_leaves_alone(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    file = _connection_file(tmp_path / "kernel.json", **changes)
    before = len(os.listdir("/proc/self/fd"))
    assert handover.listen(["x", "-f", str(file)]) == []
    assert handover.listen(["x", "-f"]) == handover.listen(["x", "-f", "/nowhere"]) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_launcher_imports_nothing() -> None:
    """What it takes before the hand-over is built in, or a C module: every import is a delay."""
    code = (
        "import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1]); import handover;"
        "handover.listen(['', '-f', '/nowhere']); print(*sorted(set(sys.modules) - before))"
    )
    place = str(Path(handover.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code, place], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {"handover", "_socket"}


def _shell(lines: list[bytes], signals: list[int]) -> tuple[int, bytes, str]:
    """Run the shell that stands for a kernel; status, what it wrote, what it said."""
    ours, its = socket.socketpair()
    process = subprocess.Popen(
        ["sh", "-c", handover.SHELL],
        preexec_fn=lambda: os.dup2(its.fileno(), 3),  # noqa: PLW1509 - no threads here
        close_fds=False,
        stderr=subprocess.PIPE,
        text=True,
    )
    its.close()
    time.sleep(0.1)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    written = ours.recv(100, socket.MSG_DONTWAIT) if signals else b""
    for line in lines:
        ours.send(line)
    ours.close()
    assert process.stderr is not None
    said = process.communicate(timeout=5)[1]
    return process.returncode, written, said


def test_the_shell_passes_signals_on_and_ends_as_the_kernel() -> None:
    assert _shell([b"0\n"], []) == (0, b"", "")
    assert _shell([b"3\n"], [signal.SIGINT, signal.SIGTERM, signal.SIGINT]) == (3, b"i\nt\ni\n", "")
    status, _, said = _shell([], [])
    assert status == 1
    assert "has died" in said
    assert _shell([], [signal.SIGINT])[0] == 1


def test_what_a_process_inherits_is_told_apart() -> None:
    def of(change: str) -> object:
        child = subprocess.Popen(
            [sys.executable, "-c", f"import os, resource; {change}; print(flush=True); input()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        found = surroundings(child.pid)
        child.communicate("\n")
        return found

    ours = surroundings(os.getpid())
    assert ours is not None
    assert ours == of("pass")
    assert ours == of("resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, -1))")  # as a kernel does
    assert ours != of("os.nice(1)")
    assert ours != of("resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))")
    assert ours != of("resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))")
    assert surroundings(0) is None
