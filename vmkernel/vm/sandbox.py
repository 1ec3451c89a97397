"""Whether this host can put QEMU behind the wall: tried once, and remembered.

Where it stands: ``host.start`` and ``vm.build`` ask before they start a QEMU, ``vmkernel doctor``
shows the answer.  Bubblewrap may be missing; or be there and not work, since the host forbids user
namespaces to this user (Ubuntu from 23.10 on by AppArmor, containers by seccomp), or since QEMU
lies where nobody but this user can read it.  So QEMU itself is run behind the wall, with a question
that it answers at once.  The answer is kept (``vm.facts``) for as long as the host is not started
anew and QEMU and bubblewrap are the same files: 60 ms once, nothing after that.  That bubblewrap
failed is not kept: the host may have been busy, and a VM without the wall is no price for 60 ms.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from vmkernel.errors import VmBootError
from vmkernel.vm.facts import read_facts, remember
from vmkernel.vm.wall import BUILDER_UID, Wall, bwrap_command, reachable_by_others

BWRAP = "/usr/bin/bwrap"
INSTALL_BWRAP = "sudo apt install bubblewrap"
_FACT = "sandbox"
# What QEMU answers without a machine, and what is to be known of it.
_QUESTION = ("-object", "memory-backend-file,help")


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
    mark = [_mark(qemu), _mark(BWRAP), Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.geteuid()]  # fmt: skip
    known = read_facts(settings.state_dir).get(_FACT)
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
    return Sandbox(msgspec.structs.replace(wall, bwrap=BWRAP), "", "")


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
        return facts | {"problem": "", "hint": ""}
    return facts | {
        "lasting": False,
        "problem": f"bubblewrap does not work here: {_last_line(answer.stderr)}",
        "hint": _hint(),
    }


def _ask(command: list[str], *fds: int, as_user: int | None = None) -> Any:
    import subprocess

    try:
        return subprocess.run(
            command,
            pass_fds=fds,
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
