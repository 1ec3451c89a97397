"""Whether this host can put QEMU behind the wall: tried once, and remembered.

Where it stands: ``host.start`` and ``vm.build`` ask before they start a QEMU, ``vmkernel doctor``
shows the answer.  Bubblewrap may be missing; or be there and not work, since the host forbids user
namespaces to this user (Ubuntu from 23.10 on by AppArmor, containers by seccomp), or since QEMU
lies where nobody but this user can read it.  So QEMU itself is run behind the wall, with a question
that it answers at once.  The answer is kept (``vm.facts``) for as long as the host is not started
anew and QEMU, bubblewrap and the list of libraries are the same files: 0.3 s once, nothing after
that.  That bubblewrap failed is not kept: the host may have been busy, and a VM without the wall is
no price for that.
"""

from __future__ import annotations

import os
import struct
from binascii import a2b_base64, b2a_base64
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from vmkernel.errors import VmBootError
from vmkernel.vm.command import SANDBOX
from vmkernel.vm.facts import read_facts, remember
from vmkernel.vm.wall import (
    BUILDER_UID,
    DIRECTORY,
    Wall,
    bwrap_command,
    reachable_by_others,
    without,
)

BWRAP = "/usr/bin/bwrap"
INSTALL_BWRAP = "sudo apt install bubblewrap"
_FACT = "sandbox"
_NEEDY = "all_libraries"
_FORMAT = 3  # of what is kept
# What QEMU answers without a machine, and what is to be known of it.
_QUESTION = ("-object", "memory-backend-file,help")
# A microVM with the devices of ours, which QEMU makes and then is told to end.  (A small buffer for
# translated code: whoever asks may have a limit on memory, and QEMU's own wish is 1 GiB.)
_TRIAL = (
    "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX,
    "-bios", "qboot.rom", "-machine", "microvm,acpi=on,rtc=on,isa-serial=on",
    "-accel", "tcg,tb-size=16", "-m", "64M", "-device", "virtio-serial-device",
    "-object", "rng-random,id=entropy,filename=/dev/urandom",
    "-device", "virtio-rng-device,rng=entropy",
    "-blockdev", "driver=null-co,node-name=disk", "-device", "virtio-blk-device,drive=disk",
    "-S", "-monitor", "stdio",
)  # fmt: skip

_ALL_THERE: dict[str, Any] = {"absent": [], "stand_in": ""}


class SandboxSettings(Protocol):
    """What of `vmkernel.settings.Settings` is used here."""

    @property
    def sandbox(self) -> Literal["auto", "required", "off"]:
        """Whether bubblewrap is used."""

    @property
    def state_dir(self) -> Path:
        """Where answers are kept."""


class Sandbox(NamedTuple):
    """What encloses a QEMU here, and for people: why no more than that ("": nothing lacks)."""

    wall: Wall
    problem: str
    hint: str


def find_wall(settings: SandboxSettings, qemu: str) -> Wall:
    """What is to enclose ``qemu`` (an absolute path).

    Raises VmBootError when the setting demands bubblewrap, and it does not work.
    """
    found = find_sandbox(settings, qemu)
    if settings.sandbox == "required" and found.problem:
        raise VmBootError(
            f"The setting sandbox demands bubblewrap around each VM, but {found.problem}",
            hint=f"{found.hint}; or set VMKERNEL_SANDBOX=auto, to start without where it must be",
        )
    return found.wall


def find_sandbox(settings: SandboxSettings, qemu: str) -> Sandbox:
    """What is to enclose ``qemu`` (an absolute path), and what lacks."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # The last changes with libraries
    mark = [_FORMAT, _mark(qemu), _mark(BWRAP), boot_id, os.geteuid(), _mark("/etc/ld.so.cache")]
    facts = read_facts(settings.state_dir)
    known = facts.get(_FACT)
    if not (isinstance(known, dict) and known.get("mark") == mark):
        known = {"mark": mark, **_try_out(qemu)}
        if known["lasting"]:
            remember(settings.state_dir, {_FACT: known})
    wall = Wall(
        own_user=bool(known["own_user"]),
        private_option=bool(known["private_option"]),
    )
    if settings.sandbox == "off":
        return Sandbox(wall, "it is switched off", "set VMKERNEL_SANDBOX=auto")
    if known["problem"]:
        return Sandbox(wall, str(known["problem"]), str(known["hint"]))
    wall = msgspec.structs.replace(wall, bwrap=BWRAP)
    if facts.get(_NEEDY) != _mark(qemu):
        wall = msgspec.structs.replace(
            wall, absent=tuple(known["absent"]), stand_in=a2b_base64(known["stand_in"])
        )
    return Sandbox(wall, "", "")


def need_libraries(settings: SandboxSettings, qemu: str) -> None:
    """Remember of this QEMU that a VM called what was not there: the next has all libraries."""
    remember(settings.state_dir, {_NEEDY: _mark(qemu)})


def _mark(path: str) -> list[Any]:
    try:
        found = Path(path).stat()
    except OSError:
        return [path]
    return [path, found.st_mtime_ns, found.st_size, found.st_ino]


def _try_out(qemu: str) -> dict[str, Any]:
    """What was found out; ``lasting``: while QEMU and bubblewrap are the same files."""
    own_user = os.geteuid() == 0
    answer = _ask([qemu, *_QUESTION])
    facts = {
        "lasting": answer.returncode == 0,
        "own_user": own_user,
        "private_option": " rom=" in answer.stdout,
    }
    if answer.returncode:  # it will be started all the same, and then tell why it does not
        problem = f"{qemu} {' '.join(_QUESTION)} failed: {_last_line(answer.stderr)}"
        hint = "install QEMU again: qemu-system-x86"
        return facts | {"own_user": False, "problem": problem, "hint": hint}
    if own_user and not reachable_by_others(qemu):
        return facts | {
            "own_user": False,
            "problem": f"{qemu} cannot be read by a user other than root, as which it would run",
            "hint": "install QEMU where all may read it",
        }
    if not os.access(BWRAP, os.X_OK):
        return facts | {"problem": f"there is no {BWRAP}", "hint": INSTALL_BWRAP}
    command, fds = bwrap_command(BWRAP, qemu)
    try:
        command += ["--remount-ro", "/", "--", qemu, *_QUESTION]
        answer = _ask(command, *fds, as_user=BUILDER_UID if own_user else None)
    finally:
        for fd in fds:
            os.close(fd)
    if answer.returncode == 0:
        return facts | {"problem": "", "hint": "", **_find_absent(qemu, own_user)}
    return facts | {
        "lasting": False,
        "problem": f"bubblewrap does not work here: {_last_line(answer.stderr)}",
        "hint": _hint(),
    }


def _find_absent(qemu: str, own_user: bool) -> dict[str, Any]:
    """Which libraries QEMU is started without: those without which it makes a microVM."""
    from vmkernel.vm.absent import absent_for

    try:
        found = absent_for(qemu, _libraries(qemu))
    except (OSError, ValueError, LookupError, struct.error):  # then it gets them all
        return _ALL_THERE
    if not found.names:
        return _ALL_THERE
    command, fds = bwrap_command(BWRAP, qemu)
    try:
        links, fd = without(found.names, found.data)
        fds.append(fd)
        command += [*links, "--setenv", "LD_LIBRARY_PATH", DIRECTORY, "--remount-ro", "/"]
        command += ["--", qemu, *_TRIAL]
        answer = _ask(command, *fds, as_user=BUILDER_UID if own_user else None, said="quit\n")
    finally:
        for fd in fds:
            os.close(fd)
    # The wall's shell has written an empty line
    if answer.returncode or answer.stderr.strip():
        return _ALL_THERE
    return {"absent": found.names, "stand_in": b2a_base64(found.data, newline=False).decode()}


def _libraries(qemu: str) -> dict[str, str]:
    """What the loader would load for it: names and paths (ld.so(8), LD_TRACE_LOADED_OBJECTS)."""
    import subprocess

    lines = subprocess.run(
        [qemu],
        env={"LD_TRACE_LOADED_OBJECTS": "1"},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    ).stdout.splitlines()
    words = (line.split() for line in lines)
    return {line[0]: line[2] for line in words if len(line) > 2 and line[1] == "=>"}


def _ask(command: list[str], *fds: int, as_user: int | None = None, said: str = "") -> Any:
    import subprocess

    try:
        return subprocess.run(
            command,
            pass_fds=fds,
            input=said,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            env={"LC_ALL": "C"},
            cwd="/",
            user=as_user,
            group=as_user,
            extra_groups=None if as_user is None else [],
        )
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _hint() -> str:
    switch = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    try:
        if switch.read_text().strip() == "1":
            return (
                "AppArmor forbids user namespaces: give bwrap a profile that allows them, as is "
                "Ubuntu's bwrap-userns-restrict (in /usr/share/apparmor/extra-profiles)"
            )
    except OSError:
        pass
    return "allow this user to make user namespaces (user.max_user_namespaces; not in a container)"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1]
