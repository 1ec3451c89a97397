"""Starts ``broken_out.py`` as a VM's QEMU is started, and prints what it achieved, as JSON.

A program of its own, since it is run by root and by another user.  Arguments: an empty directory
of this user's, whose files are to be attacked; a setuid program; and what is to be around QEMU:
"wall" (what `find_wall` says), "namespaces" (the same, with a filter that lets all through), or
"nothing".
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from vmkernel.settings import Settings
from vmkernel.vm import wall as walls
from vmkernel.vm.command import Machine
from vmkernel.vm.machine import spawn
from vmkernel.vm.sandbox import find_wall
from vmkernel.vm.wall import Wall, sealed_memory

PYTHON = "/usr/bin/python3"
BROKEN_OUT = Path(__file__).with_name("broken_out.py")
QEMU = "/usr/bin/qemu-system-x86_64"
ALLOW_ALL = b"\x06\0\0\0\0\0\xff\x7f"  # return SECCOMP_RET_ALLOW
_SLEEPER = """
import ctypes, time
secret = ctypes.create_string_buffer(b'SECRET')
print(ctypes.addressof(secret), flush=True)
time.sleep(120)
"""


def make_files(directory: Path) -> None:
    """What a user has, and a template of the product's modes."""
    (directory / "home/.ssh").mkdir(parents=True)
    (directory / "home/.ssh/id_ed25519").write_text("SECRET")
    (directory / "log").write_text("words")
    template = directory / "template"
    template.mkdir(mode=0o700)
    for name, mode in (("ram", 0o444), ("scratch.raw", 0o444), ("state", 0o400)):
        (template / name).write_bytes(bytes(16 << 20))
        (template / name).chmod(mode)
    (template / "manifest.json").write_text("{}")
    (directory / "rootfs").write_bytes(bytes(1 << 20))
    (directory / "rootfs").chmod(0o444)


def main(directory: Path, setuid: str, around: str) -> None:
    make_files(directory)
    template = directory / "template"
    listener = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0vmkernel-test-{os.getpid()}")
    named = socket.socket(socket.AF_UNIX)
    named.bind(str(directory / "sock"))
    for sock in (abstract, named):
        sock.listen(5)
    victim = subprocess.Popen(
        [PYTHON, "-I", "-S", "-c", _SLEEPER],
        env={"SECRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert victim.stdout is not None
    address = int(victim.stdout.readline())
    mark = Path("/tmp") / f"vmkernel-test-{os.getpid()}"
    mark.touch()

    scratch = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    slot = os.open(directory / "slots", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    state = sealed_memory("state", b"state")
    if around == "nothing":  # as an earlier version gave it away
        state = os.open(directory / "state", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    answer_read, answer = os.pipe()
    leak, _ = os.pipe()
    os.set_inheritable(leak, True)  # what a careless library leaves behind
    wall = Wall()
    if around == "namespaces":
        walls.seccomp_filter = lambda: ALLOW_ALL
    if around != "nothing":
        wall = find_wall(Settings(state_dir=directory / "s", sandbox="required"), QEMU)

    def command_line(machine: Machine) -> list[str]:
        """All that QEMU finds in its arguments, and some more."""
        target = {
            "home": str(directory / "home"),
            "template": str(template),
            "ram": machine.ram_path,
            "rootfs": machine.rootfs,
            "log": str(directory / "log"),
            "mark": mark.name,
            "port": listener.getsockname()[1],
            "abstract": f"vmkernel-test-{os.getpid()}",
            "socket": str(directory / "sock"),
            "pid": victim.pid,
            "address": address,
            "setuid": setuid,
            "fds": [*machine.fds(), slot, state, answer],
            "slot": slot,
            "state": state,
            "answer": answer,
            "hostname": os.uname().nodename,
        }
        return [PYTHON, "-I", "-S", "-c", BROKEN_OUT.read_text(), json.dumps(target)]

    spawned = spawn(
        Machine(
            vm_id="test",
            qemu=PYTHON,
            accelerator="tcg",
            memory_mib=16,
            vcpus=1,
            cmdline="",
            kernel=None,
            initrd=None,
            rootfs=str(directory / "rootfs"),
            scratch_fd=scratch,
            scratch_base=str(template / "scratch.raw"),
            ram_path=str(template / "ram"),
            ram_share=False,
            incoming=True,
        ),
        directory,
        wall=wall,
        slot=3,
        keep_fds=(slot, state, answer),
        command_line=command_line,
    )
    os.close(answer)
    try:
        with os.fdopen(answer_read) as results:
            sys.stdout.write(results.read() or os.read(spawned.process._stderr_fd, 4096).decode())
    finally:
        spawned.abandon()
        victim.kill()
        victim.wait()
        mark.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
