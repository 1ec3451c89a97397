"""Every error that vmkernel raises on purpose.

The tree::

    VmError
    ├── SettingsError            a setting has a wrong value
    ├── ImageError               an image is missing, damaged or could not be built
    ├── TemplateError            a memory template is damaged or could not be made
    ├── VmNotFoundError          there is no such VM
    ├── VmStateError             the VM's state does not allow that
    │   └── VmAlreadyStartingError   somebody else is starting this VM (also a BlockingIOError)
    ├── RegistryError            the record of VMs cannot be read or written
    ├── VmCapacityError          no VM slot was free in time
    ├── VmOverlayError           the VM's scratch disk could not be made
    ├── VmFileError              a file could not be passed into a VM or out of it
    ├── VmBootError              QEMU or the guest did not come up
    └── VmGuestError             a guest that was up died or broke the protocol
        ├── VmHostLostError      the host of a VM of a cluster died, or cannot be reached
        ├── VmExpiredError       the VM's lifetime or idle_timeout was over, and it was ended
        ├── VmTimeoutError       code took longer than it was given (also a TimeoutError)
        └── ProtocolError        bytes from the peer that no correct peer sends

A foreign exception is wrapped once, where it enters, with ``raise … from``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

CodeRan = Literal["no", "unknown"]


class VmError(Exception):
    """Something failed. ``str(error)`` says what and why.

    ``hint`` says what to do about it, ``log_path`` where to read more (or None).
    ``code_ran`` is "no" when the user's code surely did not run, else "unknown".
    ``result`` is a `vmkernel.RunResult` with what it put out until then, where that is known.
    """

    result: Any = None

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        log_path: Path | str | None = None,
        code_ran: CodeRan = "no",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.log_path = Path(log_path) if log_path else None
        self.code_ran: CodeRan = code_ran

    def __str__(self) -> str:
        return self.message

    def explain(self) -> str:
        """The message, the hint and the log's path, a line each: what a person is shown."""
        lines = [self.message]
        if self.hint:
            lines.append(f"What to do: {self.hint}")
        if self.log_path:
            lines.append(f"Log: {self.log_path}")
        return "\n".join(lines)


class SettingsError(VmError):
    """A setting has a value that is not allowed; names the setting, its source and the choices."""


class ImageError(VmError):
    """A guest image is missing, damaged, or could not be built."""


class TemplateError(VmError):
    """A memory template is damaged, or could not be made."""


class VmNotFoundError(VmError):
    """No VM has this id."""


class VmStateError(VmError):
    """The VM is in a state that does not allow what was asked: it runs, or it does not."""


class VmAlreadyStartingError(VmStateError, BlockingIOError):
    """Somebody holds this VM's start lock; the message names the VM and the holder's pid."""


class RegistryError(VmError):
    """The record of VMs (an SQLite database) cannot be read or written, or stayed locked."""


class VmCapacityError(VmError):
    """No VM slot became free in time; names the limit, the holders and the place in the queue."""


class VmOverlayError(VmError):
    """The VM's scratch disk could not be made."""


class VmFileError(VmError):
    """A file could not be passed into a VM or out of it; the VM is none the worse for it."""


class VmBootError(VmError):
    """QEMU did not start, or the guest did not get ready."""


class VmGuestError(VmError):
    """A guest that was up died, or does not answer."""


class VmHostLostError(VmGuestError):
    """The host that a cluster's VM ran on is gone, or out of reach; names the host and why."""


class VmExpiredError(VmGuestError):
    """The VM was ended as it was to be: its lifetime was over, or it was idle for too long."""


class VmTimeoutError(VmGuestError, TimeoutError):
    """Code took longer than its time limit; its VM was destroyed.  ``result`` has its output."""


class ProtocolError(VmGuestError):
    """The peer sent bytes that no correct peer sends."""
