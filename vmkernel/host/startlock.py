"""The lock on the start of one VM: of all who would start it, one does.

Floor 4, over ``host.locks``.  One file for all VMs, ``<runtime_dir>/starts``, and a stretch of its
bytes for each: the VM's number is its id.  So there is no lock file per VM, which nobody could ever
unlink safely.  It is an open-file-description lock: it goes over to a runner that inherits the
descriptor, and is gone with the last process that has it, however that ends.

Such a lock names nobody; its length does.  Process p locks the stretch's first p + 1 bytes, which
nobody else can do then; who cleans up after the VM's last life, 2**22 more.  So all there is to
know of a holder is known at the instant of the taking.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from vmkernel.errors import VmAlreadyStartingError, VmError, VmNotFoundError
from vmkernel.host import processes
from vmkernel.host.locks import find_lock, try_lock, unlock
from vmkernel.settings import ensure_private_dir

if TYPE_CHECKING:
    from pathlib import Path

    from vmkernel.settings import Settings

_DIGITS = set("0123456789abcdef")
_CLEANING = 1 << 22  # Linux: PID_MAX_LIMIT is 2**22 on 64-bit machines, proc(5)
_STRETCH = 2 * _CLEANING
_CLEANED_WITHIN = 2.0
"""Seconds that a start waits for the clean-up after the VM's last life."""
_POLL = 0.005


class StartLock:
    """One VM's start lock, held by this object's descriptor ``fd`` and whoever inherited it."""

    def __init__(self, vm_id: str, descriptor: int) -> None:
        """Not to be called from outside: see `take` and `inherited`."""
        self.vm_id = vm_id
        self._descriptor = descriptor

    @classmethod
    def take(cls, settings: Settings, vm_id: str, *, cleaning: bool = False) -> StartLock:
        """Take it, or raise VmAlreadyStartingError, which names the VM and the holder's pid.

        Does not wait, except for a clean-up (``cleaning``) of the same VM, for 2 seconds at most.
        Raises VmError when the file cannot be used, VmNotFoundError for what is no VM's id.
        """
        deadline = time.monotonic() + (0 if cleaning else _CLEANED_WITHIN)
        while (lock := cls._attempt(settings, vm_id, cleaning, deadline)) is None:
            time.sleep(_POLL)
        return lock

    @classmethod
    async def take_beside(cls, settings: Settings, vm_id: str) -> StartLock:
        """As `take`, while an event loop goes on."""
        import asyncio

        deadline = time.monotonic() + _CLEANED_WITHIN
        while (lock := cls._attempt(settings, vm_id, False, deadline)) is None:  # noqa: ASYNC110
            await asyncio.sleep(_POLL)
        return lock

    @classmethod
    def _attempt(
        cls, settings: Settings, vm_id: str, cleaning: bool, deadline: float
    ) -> StartLock | None:
        """The lock; None when it is worth while to try again at once."""
        number = _number(vm_id)
        path = _path(settings)
        descriptor = _open(path)
        try:
            length = os.getpid() + 1 + (_CLEANING if cleaning else 0)
            if try_lock(descriptor, number * _STRETCH, length):
                if not _is_at(descriptor, path):
                    return None  # somebody removed the file: the lock is on nothing
                lock, descriptor = cls(vm_id, descriptor), -1  # it is the lock's
                return lock
            holder, tidies = _holder(descriptor, number)
        except OSError as error:
            raise _unusable(path, error) from error
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if time.monotonic() <= deadline and (tidies or holder is None):
            return None  # None: it was let go in between
        raise _taken(vm_id, holder)

    @classmethod
    def inherited(cls, vm_id: str, descriptor: int) -> StartLock:
        """The lock that came by inheritance; from now on this process is the one that is named."""
        os.set_inheritable(descriptor, False)  # a sibling that had it would hold it for ever
        first, length = _number(vm_id) * _STRETCH, os.getpid() + 1
        try_lock(descriptor, first, length)  # longer or shorter than it was, never free between
        unlock(descriptor, first + length, _STRETCH - length)
        return cls(vm_id, descriptor)

    @staticmethod
    def holder(settings: Settings, vm_id: str) -> int | None:
        """The pid of who holds it; None when nobody does.  Takes nothing."""
        try:
            descriptor = os.open(_path(settings), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return _holder(descriptor, _number(vm_id))[0]
        finally:
            os.close(descriptor)

    @property
    def fd(self) -> int:
        """The descriptor that carries the lock, for ``pass_fds``; ValueError once released."""
        if self._descriptor < 0:
            raise ValueError(f"the start lock of {self.vm_id} was released")
        return self._descriptor

    def release(self) -> None:
        """Close our copy; free unless a runner inherited it. Again is harmless."""
        # Never an explicit unlock: that would free it under a runner that is still starting.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> StartLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.release()

    def __repr__(self) -> str:
        return f"<StartLock {self.vm_id} {'held' if self._descriptor >= 0 else 'released'}>"


def _number(vm_id: str) -> int:
    digits = vm_id.removeprefix("vm-")
    if len(vm_id) == len("vm-12345678") == len(digits) + 3 and not set(digits) - _DIGITS:
        return int(digits, 16)
    raise VmNotFoundError(
        f"{vm_id!r} is no VM's id: those are like vm-1a2b3c4d",
        hint="see which VMs there are: `vmkernel ps`",
    )


def _path(settings: Settings) -> Path:
    return settings.runtime_dir / "starts"


def _open(path: Path) -> int:
    ensure_private_dir(path.parent)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _holder(descriptor: int, number: int) -> tuple[int | None, bool]:
    """The holder's pid, None when there is none, and whether it cleans up."""
    first = number * _STRETCH
    lock = find_lock(descriptor, first, first + _STRETCH)
    if lock is None:
        return None, False
    length = lock[1] - first - 1
    return length % _CLEANING, length >= _CLEANING


def _taken(vm_id: str, holder: int | None) -> VmAlreadyStartingError:
    who = "others, one after the other"
    if holder is not None:
        name = processes.describe(holder)
        who = f"pid {holder}" + (f" ({name})" if name else "")
    return VmAlreadyStartingError(
        f"VM {vm_id} is already being started, by {who}",
        hint="wait for it: `vmkernel ps` tells when it runs",
    )


def _unusable(path: Path, error: OSError) -> VmError:
    return VmError(
        f"cannot use the file of start locks {path}: {error.strerror or error}",
        hint="make room and check permissions there, or set runtime_dir (VMKERNEL_RUNTIME_DIR) "
        "to a place of your own",
    )
