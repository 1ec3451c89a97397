"""``vmkernel cp`` into a notebook's VM and out of it, while its cells run."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_client import Kernel

from vmkernel.errors import VmError, VmNotFoundError
from vmkernel.host import localsocket, wire
from vmkernel.host.client import Connection
from vmkernel.host.reach import find, reach
from vmkernel.protocol import messages
from vmkernel.settings import load_settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

MAIN = "from vmkernel.cli.app import main; main()"


def cp(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, "cp", *words],
        capture_output=True, text=True, timeout=100, **options,  # type: ignore[call-overload]
    )  # fmt: skip


@pytest.fixture(scope="module")
def vm(kernel: Kernel) -> str:
    """The kernel's VM."""
    kernel.run("import os, hashlib, pathlib; os.chdir('/home/user')")
    return kernel.run("import socket; print(socket.gethostname())").stdout.strip()


def test_files_go_both_ways_while_a_cell_runs(kernel: Kernel, vm: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("text")
    cell = kernel.send("import time\nwhile not os.path.exists('d/f'): time.sleep(0.1)\nprint('in')")
    done = cp(str(tmp_path / "d"), f"{vm}:")
    assert (done.returncode, done.stdout) == (0, f"Copied 4 bytes to {vm}:d\n"), done.stderr
    assert kernel.finish(cell).stdout == "in\n"
    done = cp("--json", f"{vm}:d/f", str(tmp_path / "g"))
    assert json.loads(done.stdout) == {
        "source": f"{vm}:d/f", "target": str(tmp_path / "g"), "bytes": 4, "files": 1, "resumed": 0,
    }  # fmt: skip
    assert (tmp_path / "g").read_text() == "text"
    (tmp_path / "d" / "f").write_text("more")
    assert cp(str(tmp_path / "d"), f"{vm}:d").returncode == 0  # into what is there
    assert kernel.run("os.listdir('d'), open('d/f').read()").result == "(['f'], 'more')"


def test_a_vm_is_found_by_its_kernel_too(kernel: Kernel, vm: str, tmp_path: Path) -> None:
    status, _ = find(vm, load_settings())
    assert status.record.kernel_id
    assert find(status.record.kernel_id, load_settings())[0].record.vm_id == vm
    assert find(status.record.kernel_id[:8], load_settings())[0].record.vm_id == vm
    with pytest.raises(VmNotFoundError):
        find("0000", load_settings())
    done = cp(f"{status.record.kernel_id}:none", str(tmp_path))
    assert done.returncode == 1
    assert "there is no such file" in done.stderr


def test_what_was_broken_off_is_gone_on_with(kernel: Kernel, vm: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 64
    source, back = tmp_path / "large", tmp_path / "back"
    source.write_bytes(data)
    for words, look in (
        ((str(source), f"{vm}:large"), None),
        ((f"{vm}:large", str(back)), lambda: list(tmp_path.glob("back.*.part"))),
    ):
        command = subprocess.Popen([sys.executable, "-c", MAIN, "cp", *words])
        if look is None:
            kernel.run(
                "import glob, time\n"
                "while not any(os.path.getsize(p) > 1e6 for p in glob.glob('large.*.part')):\n"
                "    time.sleep(0.01)"
            )
        else:
            while not any(path.stat().st_size > 1e6 for path in look()):
                assert command.poll() is None, "too quick to be broken off"
                time.sleep(0.01)
        command.send_signal(signal.SIGINT)
        assert command.wait(20) == 130
        assert not back.exists()
        done = cp(*words)
        assert done.returncode == 0, done.stderr
        assert re.search(r"\(\d.* of it from before\)", done.stdout), done.stdout
    assert hashlib.sha256(back.read_bytes()).digest() == hashlib.sha256(data).digest()
    assert list(tmp_path.glob("*.part")) == []
    assert kernel.run("[n for n in os.listdir() if 'part' in n]").result == "[]"


async def test_the_door_lets_in_files_and_nothing_else(kernel: Kernel, vm: str) -> None:
    found = find(vm, load_settings())
    path = found[1] / localsocket.CONTROL_SOCKET
    assert path.stat().st_mode & 0o777 == 0o600
    assert found[1].stat().st_mode & 0o777 == 0o700
    connection = await reach(found)
    calls: list[wire.Call] = [
        wire.Run("1", None, {}, False),
        wire.Stop("no"),
        wire.Interrupt(),
        wire.Ask(messages.StartKernel(b"0" * 16), 5.0),
        wire.Ask(messages.Interrupt(kill=True), 5.0),
        wire.Ask(messages.Stats(), 5.0),
    ]
    for call in calls:
        with pytest.raises(VmError, match="lets in files, and nothing else"):
            await connection.call(call)
    result, _ = await connection.call(wire.Ask(messages.ListFiles(b".", 0), 5.0))
    assert result["kind"] == "directory"
    connection.close()
    with socket.socket(socket.AF_UNIX) as wrong:  # one who speaks otherwise is sent away
        wrong.connect(str(path))
        wrong.send(b"GET / HTTP/1.0\r\n\r\n" + bytes(100))
        assert await asyncio.to_thread(wrong.recv, 10) == b""
    other = await Connection.reach(found[1])
    await other.call(wire.Ask(messages.ListFiles(b".", 0), 5.0))
    other.close()


def test_the_next_vm_has_a_door_of_its_own_and_nothing_is_left(
    kernel: Kernel, vm: str, tmp_path: Path
) -> None:
    _, directory = find(vm, load_settings())
    subprocess.run([sys.executable, "-c", MAIN, "stop", vm], check=True, capture_output=True)
    another = kernel.run("import socket; print(socket.gethostname())").stdout.strip()
    assert another != vm
    (tmp_path / "f").write_text("text")
    assert cp(str(tmp_path / "f"), f"{another}:").returncode == 0
    assert not directory.exists()
    done = cp(str(tmp_path / "f"), f"{vm}:")
    assert done.returncode == 1
    assert "does not run" in done.stderr
    _, directory = find(another, load_settings())
    kernel.shut_down()
    assert not directory.exists()
