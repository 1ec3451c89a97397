"""The wall around a QEMU: what it can see and do once hostile code is master of its process.

Where it stands: ``vm.machine`` builds one for each VM, ``vm.qemu`` starts QEMU behind it;
``vm.sandbox`` knows whether this host can.  docs/sandbox.md tells it from a user's side.

With bubblewrap, QEMU has namespaces of its own (user, network, process ids, mounts, IPC, names,
cgroups), no capability and no way to one, an empty environment, and a read-only file system of
/usr, three devices, and this VM's own files at their own names, so that its command line is the
same as without.  A seccomp filter (``vm.filter``) lies over QEMU's own.

How the VM's files come in:

* Of an ordinary user they are bound read-only.  Not by descriptors: the owner of a file can change
  its mode through one that is open for reading, and open it for writing by /proc/self/fd.
* A VM of root's runs as a user of its own (`vm_uid`), so that not even what is not behind the wall
  meets root.  That user cannot pass through root's directories, so what it may read it inherits,
  and the names are links to /proc/self/fd.  It owns nothing but its scratch disk.

Who dies with whom.  Bubblewrap's child asks for its parent's death signal only when the file system
is built; a bubblewrap that is killed before that leaves a QEMU behind, with its slot (seen twice
in some 20 starts that were killed at random moments), and one that is killed in the first instant a
child that waits for ever.  So bubblewrap is the first process of a process namespace of its own,
whose end is the end of all in it, by the kernel's hand.  That first process is tied to who spawned
it in two steps: `unshare --kill-child` asks for the signal, and then the shell writes an empty line
to QEMU's log, whose reader is who spawned it: if he has died before the signal was asked for, that
fails and nothing is started.  The shell's limit on tasks counts within the user namespace (since
Linux 5.14), so it is this VM's alone.

Each VM of root's has a user id to itself, as long as it lives: 65537 and its slot's number.  Linux
distributions and systemd give out no id between 65536 and 99999 (systemd's docs/UIDS-GIDS; shadow
begins subordinate ids at 100000), and other daemons share "nobody".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from vmkernel.vm.command import Machine, qemu_argv
from vmkernel.vm.filter import seccomp_filter
from vmkernel.vm.limits import limit_tasks
from vmkernel.vm.shim import shim

BUILDER_UID = 65536
"""Of QEMUs of root's that make a template; a VM's is above it by its slot's number and one."""
VM_UIDS = range(BUILDER_UID, BUILDER_UID + 1 + (1 << 14))  # as many slots as there can be
_KVM = "/dev/kvm"
_DEVICES = ("/dev/null", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib32", "/lib64")
UNSHARE = "/usr/bin/unshare"  # util-linux, as setpriv
_NAMESPACE = ("--user", "--map-current-user", "--pid", "--fork", "--kill-child=KILL", "--")
_LAST_LOOK = f'{limit_tasks()}; echo >&2 && exec "$@"\n'.encode()
DIRECTORY = "/absent"
"""Where QEMU's loader looks first, behind the wall."""
_BESIDE = ("../share/qemu", "../share/seabios", "../pc-bios", "../lib", "../lib64")
"""Where a QEMU that was not installed in /usr has its firmware and libraries."""


class Wall(msgspec.Struct, frozen=True):
    """What is to enclose QEMUs on this host, for this user (`vm.sandbox.find_wall`)."""

    bwrap: str = ""
    """Absolute path of bubblewrap; "": it is not used."""
    own_user: bool = False
    """Whether QEMU leaves this user (root) for one of its own."""
    private_option: bool = False
    """Whether QEMU can be told to open RAM for reading, and needs no help for that (`vm.shim`)."""
    absent: tuple[str, ...] = ()
    """Libraries that a clone's QEMU is started without (`vm.absent`); in bubblewrap only."""
    stand_in: bytes = b""
    """The object that stands for them."""


class Enclosed(NamedTuple):
    """How to start QEMU behind the wall."""

    argv: list[str]
    """From bubblewrap on, or from `env` on."""
    user: list[str]
    """Options of setpriv, before that."""
    fds: list[int]
    """Descriptors that it inherits; the caller closes them when it is started."""


def vm_uid(slot: int | None) -> int:
    """The user id of root's VM in this slot; None: of a template that is being made."""
    return BUILDER_UID if slot is None else BUILDER_UID + 1 + slot


def enclose(
    wall: Wall,
    machine: Machine,
    slot: int | None,
    command_line: Callable[[Machine], list[str]] = qemu_argv,
) -> Enclosed:
    """QEMU for ``machine``, behind the wall.  ``slot``: None for a template.  Raises OSError."""
    opened: list[int] = []
    try:
        files = _files(machine)
        links: dict[str, str] = {}  # a file's path -> where it is to be found instead
        if wall.own_user:
            uid = vm_uid(slot)
            os.chown(machine.scratch_fd, uid, uid)
            for path, writable in files.items():
                fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
                opened.append(fd)
                if writable:
                    os.chown(fd, uid, uid)
                links[path] = f"/proc/self/fd/{fd}"
        environment = {"LC_ALL": "C"}
        if wall.private_option:
            machine = replace(machine, ram_read_only=not machine.ram_share)
        if not machine.ram_share:
            opened.append(sealed_memory("shim", shim()))
            environment["LD_PRELOAD"] = f"/proc/self/fd/{opened[-1]}"
        if not wall.bwrap:
            words = [f"{name}={value}" for name, value in environment.items()]
            command = ["/usr/bin/env", "-i", *words, *command_line(_renamed(machine, links))]
        else:
            command, fds = bwrap_command(wall.bwrap, machine.qemu)
            opened += fds
            for path, writable in files.items():
                command += _mount(path, writable, links.get(path))
            # Not under KVM, where nobody has seen it work
            if wall.absent and machine.incoming and machine.accelerator == "tcg":
                links_in, fd = without(wall.absent, wall.stand_in)
                command += links_in
                opened.append(fd)
                environment["LD_LIBRARY_PATH"] = DIRECTORY
            if machine.accelerator == "kvm":
                command += _device(_KVM)
            command += ["--remount-ro", "/"]  # it is a tmpfs, which else could be filled
            for name, value in environment.items():
                command += ["--setenv", name, value]
            command += ["--", *command_line(machine)]
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    return Enclosed(command, _user_options(wall, machine, slot), opened)


def bwrap_command(bwrap: str, qemu: str) -> tuple[list[str], list[int]]:
    """The part that is the same for every VM: namespaces, and what all of them see.

    And descriptors that it inherits, the caller's to close.
    """
    # By descriptor, since some systemd-run (`vm.limits`) would change a $ in its words
    script = sealed_memory("script", _LAST_LOOK)
    seccomp = sealed_memory("filter", seccomp_filter())
    command = [
        UNSHARE, *_NAMESPACE, "/bin/sh", f"/proc/self/fd/{script}",
        bwrap,
        "--unshare-user",
        "--unshare-net",
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--hostname", "vmkernel",  # else it is the host's
        "--die-with-parent",
        "--new-session",  # no terminal to type into
        "--as-pid-1",  # QEMU itself, and no third process of bubblewrap's
        "--cap-drop", "ALL",
        "--seccomp", str(seccomp),
        "--clearenv",
        "--chdir", "/",
        "--ro-bind", "/usr", "/usr",
    ]  # fmt: skip
    for path in _LIBRARIES:  # links into /usr, or directories on a host of the old kind
        if Path(path).is_symlink():
            command += ["--symlink", str(Path(path).readlink()), path]
        else:
            command += ["--ro-bind-try", path, path]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in _outside_usr(qemu):
        command += ["--ro-bind-try", path, path]
    command += ["--proc", "/proc"]
    for path in _DEVICES:  # and not --dev, with which a writable tmpfs comes
        command += _device(path)
    return command, [script, seccomp]


def without(libraries: Iterable[str], stand_in: bytes) -> tuple[list[str], int]:
    """Options of bubblewrap's, by which the loader finds ``stand_in`` for these; its descriptor."""
    fd = sealed_memory("absent", stand_in)
    command = []
    for name in libraries:
        command += ["--symlink", f"/proc/self/fd/{fd}", f"{DIRECTORY}/{name}"]
    return command, fd


def sealed_memory(name: str, data: bytes) -> int:
    """A descriptor of ``data`` in memory, at its start, which nobody can change any more."""
    import fcntl

    fd = os.memfd_create(f"vmkernel-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        while data:
            data = data[os.write(fd, data) :]
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def reachable_by_others(path: str) -> bool:
    """Whether a user of no group may read this file, and pass through all directories above it."""
    found = Path(path).resolve()
    above = {*found.parents, *Path(path).absolute().parents}  # and of a link to it
    try:
        return bool(found.stat().st_mode & 0o004) and all(
            directory.stat().st_mode & 0o001 for directory in above
        )
    except OSError:
        return False


def _files(machine: Machine) -> dict[str, bool]:
    """The VM's files by their paths, and which are written to."""
    paths = (machine.rootfs, machine.scratch_base, machine.kernel, machine.initrd)
    files = {path: False for path in paths if path is not None}
    files[machine.ram_path] = machine.ram_share
    return files


def _mount(path: str, writable: bool, link: str | None) -> list[str]:
    if link is None:
        return ["--bind" if writable else "--ro-bind", path, path]
    # In /usr all may read it, as it is
    return [] if path.startswith("/usr/") else ["--symlink", link, path]


def _outside_usr(qemu: str) -> list[str]:
    """What a QEMU that is not the distribution's needs."""
    found = []
    for directory in {Path(qemu).parent, Path(qemu).resolve().parent}:
        if not directory.is_relative_to("/usr"):
            found.append(str(directory))
            found += [str((directory / path).resolve()) for path in _BESIDE]
    return [path for path in found if not path.startswith("/usr/")]


def _device(path: str) -> list[str]:
    return ["--dev-bind", path, path]


def _user_options(wall: Wall, machine: Machine, slot: int | None) -> list[str]:
    if not wall.own_user:
        return []
    uid = vm_uid(slot)
    options = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    if machine.accelerator == "kvm":
        options[2] = f"--groups={Path(_KVM).stat().st_gid}"
    return options


def _renamed(machine: Machine, links: dict[str, str]) -> Machine:
    """The machine with its files' descriptors for names, where no links can stand."""
    names = ("rootfs", "scratch_base", "kernel", "initrd", "ram_path")
    changes = {name: links.get(path) for name in names if (path := getattr(machine, name))}
    return replace(machine, **{name: link for name, link in changes.items() if link})
