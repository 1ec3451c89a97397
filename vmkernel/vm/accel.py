"""Which accelerator to use, KVM or TCG: chosen by proof, and remembered.

Where it stands: ``vm.template`` asks before it makes or looks for a template, ``vmkernel doctor``
shows the evidence.

``/dev/kvm`` may be there, open, make a VM, and still be useless: on some nested hosts ``-cpu host``
ends QEMU at once ("failed to set MSR 0x10a"), other CPU models spin at 100 % without a word
(DESIGN 5). So ``auto`` believes in KVM only after a real guest has come up under it. The verdict is
kept in ``<state_dir>/accelerator.json`` for as long as nothing it depends on changes: machine,
kernel, QEMU, CPU model, the device. A refusal is final; silence may have been a busy host, so
that verdict is asked for again after a day.

A warm start reads two small JSON files and the first lines of ``/proc/cpuinfo``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from vmkernel.environment import plain
from vmkernel.errors import VmBootError, VmGuestError
from vmkernel.vm.command import Accelerator
from vmkernel.vm.facts import read_facts, remember
from vmkernel.vm.qemu import find_qemu

BootProbe = Callable[[], Awaitable[None]]
"""Boots the real guest under KVM until it is ready, and ends it. Raises what went wrong."""

PROBE_SECONDS = 15.0
_SILENCE_KEPT = 86400.0
_KVM = Path("/dev/kvm")
_FILE = "accelerator.json"
_LOCK = "accelerator.lock"
_KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h; the answer has been 12 since 2007
_KVM_API_VERSION = 12
_SLOW = "Cells run under TCG, several times slower than with KVM."


class AccelSettings(Protocol):
    """What of `vmkernel.settings.Settings` is used here."""

    @property
    def accelerator(self) -> str:
        """``auto``, ``kvm`` or ``tcg``."""

    @property
    def qemu(self) -> str:
        """QEMU's path, or its name on PATH."""

    @property
    def state_dir(self) -> Path:
        """Where verdicts are kept."""


class Choice(msgspec.Struct, frozen=True):
    """The accelerator, why, and what the user should be told (None: nothing)."""

    accelerator: Accelerator
    evidence: str
    warning: str | None = None


async def choose_accelerator(settings: AccelSettings, boot_probe: BootProbe) -> Choice:
    """The accelerator to use; at most one process of this user probes, the others wait for it.

    ``boot_probe`` is awaited only when KVM might work and no verdict is known; what it raises other
    than VmBootError and VmGuestError (about the image, a full disk) is not about KVM and passes
    through. Raises VmBootError when KVM was demanded and does not work, or QEMU is missing.
    """
    choice = remembered_choice(settings)
    if choice is None:
        async with _Lock(settings.state_dir):
            choice = remembered_choice(settings)
            if choice is None:
                works, evidence, final = await prove_kvm(boot_probe, PROBE_SECONDS)
                expires = 0.0 if works or final else time.time() + _SILENCE_KEPT
                verdict = {"works": works, "evidence": evidence, "expires": expires}
                _keep_verdict(settings, verdict)
                choice = _choice_from(settings, verdict)
    return choice


def remembered_choice(settings: AccelSettings) -> Choice | None:
    """The choice, when it can be made without booting anything; None when a probe is needed."""
    if settings.accelerator == "tcg":
        return Choice("tcg", "TCG was asked for (VMKERNEL_ACCELERATOR)")
    problem = kvm_problem(_KVM)
    if problem:
        if settings.accelerator == "kvm":
            raise _kvm_demanded(problem, settings)
        # Without the device nothing is wrong; a device that may not be used is worth a word.
        warning = f"{problem}. {_SLOW}" if _KVM.exists() else None
        return Choice("tcg", problem, warning)
    verdict = read_facts(settings.state_dir, _FILE).get(_verdict_key(settings))
    if not isinstance(verdict, dict):
        return None
    if verdict.get("expires") and time.time() > verdict["expires"]:
        return None
    return _choice_from(settings, verdict)


async def prove_kvm(boot: BootProbe, seconds: float) -> tuple[bool, str, bool]:
    """Boot a guest under KVM: whether it came up, the evidence, and whether that is final."""
    import asyncio

    began = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            await boot()
    except TimeoutError:
        return False, f"under KVM no guest came up within {seconds:g} s", False
    except (VmBootError, VmGuestError) as error:
        # Only a QEMU that names KVM in its last words has surely refused it.
        return False, f"under KVM no guest came up: {error}", "kvm" in str(error).lower()
    return True, f"a guest came up under KVM in {time.monotonic() - began:.1f} s", True


def kvm_problem(device: Path = _KVM) -> str:
    """Why KVM cannot even be tried here, in a sentence; "" when it can."""
    import fcntl

    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"There is no {device}"
    except PermissionError:
        return f"You may not open {device} (sudo usermod -aG kvm $USER, then log in again)"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"{device} is not KVM: {error.strerror}"
    finally:
        os.close(fd)
    return "" if version == _KVM_API_VERSION else f"{device} speaks version {version}, not 12"


def forget_verdict(state_dir: Path) -> bool:
    """Let the next start probe again; True when there was a verdict."""
    try:
        (state_dir / _FILE).unlink()
    except FileNotFoundError:
        return False
    return True


def qemu_version(qemu: str, state_dir: Path) -> str:
    """The first line of ``qemu --version``, remembered for as long as the file is the same.

    ``qemu`` is an absolute path. Raises VmBootError when it does not run. (30 ms when not known.)
    """
    info = Path(qemu).stat()
    mark = [qemu, info.st_mtime_ns, info.st_size, info.st_ino]
    known = read_facts(state_dir).get("qemu")
    if isinstance(known, dict) and known.get("file") == mark:
        return str(known["version"])
    import subprocess

    try:
        answer = subprocess.run(
            [qemu, "--version"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            env=plain(os.environ),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise VmBootError(
            f"{qemu} --version failed: {error}", hint="Install QEMU again: qemu-system-x86"
        ) from error
    version = answer.stdout.partition("\n")[0].strip()
    remember(state_dir, {"qemu": {"file": mark, "version": version}})
    return version


def cpu_model() -> str:
    """The host's CPU, from the first entry of ``/proc/cpuinfo`` (reading all of it is slow)."""
    with Path("/proc/cpuinfo").open("rb", buffering=0) as file:
        first = file.read(2048).decode("ascii", "replace")
    lines = (line.partition(":") for line in first.partition("\n\n")[0].splitlines())
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    return " / ".join(value.strip() for name, _, value in lines if name.strip() in wanted)


def _verdict_key(settings: AccelSettings) -> str:
    """Everything a verdict depends on, readable in the file."""
    try:
        machine_id = Path("/etc/machine-id").read_text().strip()
    except OSError:  # containers often have none
        machine_id = ""
    uname = os.uname()
    qemu = find_qemu(settings.qemu, os.environ.get("PATH", os.defpath))
    parts = [
        machine_id,
        f"{uname.release} {uname.version}",
        qemu_version(qemu, settings.state_dir),
        cpu_model(),
        f"{_KVM} {_device_number(_KVM)}",
    ]
    return " | ".join(parts)


def _device_number(device: Path) -> str:
    try:
        number = device.stat().st_rdev
    except FileNotFoundError:
        return "absent"
    return f"{os.major(number)}:{os.minor(number)}"


def _keep_verdict(settings: AccelSettings, verdict: dict[str, Any]) -> None:
    # One host has one verdict; that of an earlier kernel or QEMU is of no use.
    forget_verdict(settings.state_dir)
    remember(settings.state_dir, {_verdict_key(settings): verdict}, _FILE)


def _choice_from(settings: AccelSettings, verdict: dict[str, Any]) -> Choice:
    evidence = str(verdict["evidence"])
    if verdict["works"]:
        return Choice("kvm", evidence)
    if settings.accelerator == "kvm":
        raise _kvm_demanded(evidence, settings)
    return Choice("tcg", evidence, f"KVM does not work here. {_SLOW}")


def _kvm_demanded(evidence: str, settings: AccelSettings) -> VmBootError:
    return VmBootError(
        f"KVM was asked for and does not work: {evidence}",
        hint="Set VMKERNEL_ACCELERATOR=auto or tcg; to try KVM again remove "
        f"{settings.state_dir / _FILE}",
    )


class _Lock:
    """One prober at a time; waiting does not block the event loop and can be cancelled."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / _LOCK
        self._fd = -1

    async def __aenter__(self) -> None:
        import asyncio
        import fcntl

        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return  # nothing can be remembered here; each process finds out for itself
        try:
            while True:
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    await asyncio.sleep(0.1)
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
