"""What the VM manager's users hold in their hands: languages, states, results.

Plain values: nothing here opens a file or starts a process.  Floor 2.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class Language(StrEnum):
    """A language that a recipe of ours has a kernel for; any other goes by ``recipe=``."""

    PYTHON = "python"
    BASH = "bash"


class VmState(StrEnum):
    """Where a VM is in its life; `TRANSITIONS` says what may follow what."""

    CREATED = "created"
    """It is on record; nothing runs (it may wait for a slot)."""
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    """It ended as it was asked to, and can be started again as long as it is on record."""
    FAILED = "failed"
    """It ended otherwise; the record's ``exit_cause`` says how."""
    ORPHANED = "orphaned"
    """Its runner is dead and its QEMU is not: it still holds its slot, until it is reaped."""


TRANSITIONS: dict[VmState, frozenset[VmState]] = {
    VmState.CREATED: frozenset({VmState.STARTING, VmState.STOPPED, VmState.FAILED}),
    VmState.STARTING: frozenset(
        {VmState.RUNNING, VmState.STOPPING, VmState.STOPPED, VmState.FAILED, VmState.ORPHANED}
    ),
    VmState.RUNNING: frozenset(
        {VmState.STOPPING, VmState.STOPPED, VmState.FAILED, VmState.ORPHANED}
    ),
    VmState.STOPPING: frozenset({VmState.STOPPED, VmState.FAILED, VmState.ORPHANED}),
    VmState.STOPPED: frozenset({VmState.STARTING}),
    VmState.FAILED: frozenset({VmState.STARTING}),
    VmState.ORPHANED: frozenset({VmState.FAILED, VmState.STOPPED, VmState.STARTING}),
}

ENDED = frozenset({VmState.STOPPED, VmState.FAILED})
"""States in which nothing of the VM lives."""


class Output(msgspec.Struct, frozen=True):
    """One output of running code, as in the Jupyter messaging specification.

    ``msg_type`` is ``stream``, ``display_data``, ``update_display_data``, ``execute_result``,
    ``clear_output`` or ``error``; ``content`` and ``metadata`` are the message's.
    """

    msg_type: str
    content: dict[str, Any]
    metadata: dict[str, Any] = {}


class RunError(msgspec.Struct, frozen=True):
    """How code failed: the exception's class, its text, and the traceback's lines (ANSI colours).

    ``name`` is ``GuestKernelDied`` when the code ended its own process; ``value`` says how.
    """

    name: str
    value: str
    traceback: list[str] = []


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a piece of code did."""

    vm_id: str
    stdout: str
    stderr: str
    results: list[dict[str, Any]]
    """MIME bundles, in order: what was displayed, and the value of the last expression."""
    error: RunError | None
    """None when it went well."""
    exit_code: int
    """What a process running it would have ended with: 0, 1 after an exception, the status given to
    ``sys.exit``, 128 + the signal that killed it."""
    duration: float
    """Seconds from sending the code to its end."""
    truncated: bool = False
    """Whether output was more than is kept (`Settings.max_output`); ``on_output`` saw it all."""

    @property
    def ok(self) -> bool:
        """Whether the code ended without an error."""
        return self.error is None and self.exit_code == 0
