"""What a runner and its clients say to each other, over a Unix socket.

Framed as on the virtio ports (``protocol.frames``).  A client sends requests, each with a number of
its own; the runner answers each with one `Reply` of that number, and may send events about it
before.  Both sides belong to one user and one version of vmkernel, so this is no wall: it is
decoded strictly all the same, and a peer that speaks otherwise is cut off.

Where it stands: under ``host.runner`` and ``host.client``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vmkernel import errors
from vmkernel.errors import VmError, VmGuestError
from vmkernel.protocol import messages
from vmkernel.protocol.messages import ShortStr

ABOUT_THE_VM = 0
"""The number of an event that answers no request."""


class Failure(msgspec.Struct, frozen=True):
    """A `VmError` on its way to another process."""

    kind: str
    message: str
    hint: str = ""
    log_path: str = ""
    code_ran: errors.CodeRan = "no"

    @classmethod
    def of(cls, error: VmError) -> Failure:
        """What to send of an error."""
        return cls(
            type(error).__name__,
            error.message,
            error.hint,
            str(error.log_path or ""),
            error.code_ran,
        )

    def error(self) -> VmError:
        """The error again, of the same class."""
        kind = getattr(errors, self.kind, VmGuestError)
        if not (isinstance(kind, type) and issubclass(kind, VmError)):
            kind = VmGuestError
        return kind(
            self.message, hint=self.hint, log_path=self.log_path or None, code_ran=self.code_ran
        )


def once_more(error: VmError, code_ran: errors.CodeRan) -> VmError:
    """An error of its own for one more who is told of it; whether *their* code ran is another."""
    return msgspec.structs.replace(Failure.of(error), code_ran=code_ran).error()


# --- from a client -------------------------------------------------------------------


class Start(msgspec.Struct, tag="start", forbid_unknown_fields=True):
    """The first request to a fresh runner, by its starter: bring the VM up.

    ``settings`` as `settings.dump_settings` makes it; ``slot`` and ``lease`` name the slot that the
    inherited descriptor holds; a VM that is not ``kept`` ends with its starter.
    """

    settings: dict[str, Any]
    slot: int
    lease: int
    env: dict[str, str]
    kept: bool


class Run(msgspec.Struct, tag="run", forbid_unknown_fields=True):
    """Run code; events `Output` and `InputRequest`, then a `Reply` with a `RunEnd`."""

    code: str
    timeout: float | None
    env: dict[str, str]
    allow_stdin: bool


class Answer(msgspec.Struct, tag="answer", forbid_unknown_fields=True):
    """What was typed for an `InputRequest`, which ``question`` names."""

    question: ShortStr
    value: str


class Interrupt(msgspec.Struct, tag="interrupt", forbid_unknown_fields=True):
    """Interrupt what runs.

    With ``run``, only if that is what runs, or take it out of the queue; with ``question``, only
    the run whose `InputRequest` that is.
    """

    run: int | None = None
    question: ShortStr = ""
    kill: bool = False


class Ask(msgspec.Struct, tag="ask", forbid_unknown_fields=True):
    """Let the guest's agent do something: files, statistics.  Buffers go with it both ways."""

    command: messages.Command
    timeout: float


class Stop(msgspec.Struct, tag="stop", forbid_unknown_fields=True):
    """End the VM and the runner; ``why`` is for the record.  Answered when the VM is gone."""

    why: str


Call = Start | Run | Answer | Interrupt | Ask | Stop


class Request(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A call with its number, which is not 0."""

    id: int
    call: Call


# --- from the runner -----------------------------------------------------------------


class Progress(msgspec.Struct, tag="progress", forbid_unknown_fields=True):
    """What a start is waiting for; also a sign of life."""

    text: str


class Sent(msgspec.Struct, tag="sent", forbid_unknown_fields=True):
    """The code of a `Run` had its turn: it is on its way to the guest, its time has begun."""


class Output(msgspec.Struct, tag="output", forbid_unknown_fields=True):
    """An output of the code of a `Run`: a Jupyter message of the channel iopub."""

    msg_type: ShortStr
    content: dict[str, Any]
    metadata: dict[str, Any]


class InputRequest(msgspec.Struct, tag="input", forbid_unknown_fields=True):
    """The code calls input() or getpass()."""

    question: ShortStr
    prompt: str
    password: bool


class Ended(msgspec.Struct, tag="ended", forbid_unknown_fields=True):
    """The VM has ended; None: as it was asked to."""

    failure: Failure | None


class Reply(msgspec.Struct, tag="reply", forbid_unknown_fields=True):
    """The answer to a request."""

    failure: Failure | None = None
    result: dict[str, Any] = {}


Event = Progress | Sent | Output | InputRequest | Ended | Reply


class FromRunner(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """An event, and the number of the request that it is about (or `ABOUT_THE_VM`)."""

    id: int
    event: Event


class RunEnd(msgspec.Struct, forbid_unknown_fields=True):
    """How the code of a `Run` ended.

    ``error`` is ename, evalue and traceback of an exception, or of the guest kernel's end;
    ``exit_code`` what a process would have ended with.
    """

    exit_code: int
    duration: float
    error: tuple[str, str, list[str]] | None = None


def encode(message: Request | FromRunner) -> bytes:
    """The message's body."""
    return messages.encode_json(message)
