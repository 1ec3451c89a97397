"""What travels in the frames: the bodies of the messages on the three ports.

**Port "kernel"** carries Jupyter requests to the guest kernel and its answers back
(https://jupyter-client.readthedocs.io/en/stable/messaging.html).  **Port "control"** carries
requests only, those that are to be heard while a cell runs; they too are answered on "kernel".
The guest never sends a Jupyter *header*: it names the request it answers by msg_id, and the
host, which still has that request, builds and signs header and parent header itself.  So a guest
cannot forge a parent, a session or a date, and it has less to do.

**Port "agent"** carries commands to the guest agent (PID 1), its replies and its events.

Bodies are JSON arrays or tagged objects, decoded strictly by msgspec: a wrong type, a
missing or an unknown field is a ProtocolError, never a surprise further in.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from vmkernel.errors import ProtocolError
from vmkernel.protocol import frames

ShortStr = Annotated[str, msgspec.Meta(max_length=1024)]
Channel = Literal["shell", "control", "stdin", "iopub", "vm"]
T = TypeVar("T")

# --- port "kernel" -------------------------------------------------------------------


class ToGuest(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """A front end's request, or an ``input_reply``, on its way to the guest kernel.

    Requests to the main shell, and what is typed for them, go by port "kernel"; all else goes by
    port "control", where it is heard while a cell runs.  An ``input_reply`` has the msg_id of the
    request that asked.  Channel "vm" answers a ``vm_request`` of the guest, by its id.
    """

    channel: Literal["shell", "control", "stdin", "vm"]
    msg_id: str
    msg_type: str
    header: msgspec.Raw
    metadata: msgspec.Raw
    content: msgspec.Raw


class FromGuest(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """A reply (channel of the request), an ``input_request`` (stdin) or an output (iopub).

    ``parent_id`` is the msg_id of the request it belongs to, "" when there is none.  The last
    message about a request is iopub ``status``: idle.  On channel "vm" the guest kernel speaks to
    vmkernel itself: ``awaiting`` when a cell waits in the event loop, so that comm messages can
    be served meanwhile; ``vm_request`` with a question (content: ``id``, ``command``,
    ``arguments``, ``cwd``, ``writable``), answered by a ``vm_reply``.

    A ``stream`` may have its text, in UTF-8, as its one buffer: see :func:`take_text`.
    """

    channel: Channel
    msg_type: ShortStr
    parent_id: ShortStr
    metadata: dict[str, Any]
    content: dict[str, Any]


class WakeKernel(msgspec.Struct, forbid_unknown_fields=True):
    """Content of the first request to a guest kernel, ``wake_request`` on control.

    ``entropy`` reseeds the process's own generators; ``env`` is added to its environment;
    ``cwd`` is the workspace, entered when the agent has it there ("": none).
    No other request is served before it.
    """

    entropy: bytes
    env: dict[str, str]
    cwd: str


# --- port "agent" --------------------------------------------------------------------


class Wake(msgspec.Struct, tag="wake", forbid_unknown_fields=True):
    """The first message to a fresh clone: what makes it differ from its twins.

    ``time_ns`` is CLOCK_REALTIME of the host, ns since the epoch; ``entropy`` 64 random bytes.
    """

    time_ns: int
    entropy: bytes
    hostname: str


class ShowWorkspace(msgspec.Struct, tag="show_workspace", forbid_unknown_fields=True):
    """Have the workspace appear at a path: that of the host's directory."""

    path: Annotated[bytes, msgspec.Meta(min_length=1, max_length=4096)]
    writable: bool


class SetClock(msgspec.Struct, tag="set_clock", forbid_unknown_fields=True):
    """Step the guest's CLOCK_REALTIME (after the host was suspended)."""

    time_ns: int


class Interrupt(msgspec.Struct, tag="interrupt", forbid_unknown_fields=True):
    """SIGINT to the guest kernel's process group; SIGKILL when that did not help (``kill``)."""

    kill: bool = False


class StartKernel(msgspec.Struct, tag="start_kernel", forbid_unknown_fields=True):
    """Replace a dead guest kernel; ports "kernel" and "control" begin anew with ``marker``."""

    marker: bytes


class Stats(msgspec.Struct, tag="stats", forbid_unknown_fields=True):
    """Ask what the guest kernel and the machine use: the reply's result is a `Usage`."""


class OpenNetwork(msgspec.Struct, tag="open_network", forbid_unknown_fields=True):
    """Listen for those who want to reach the network, and carry them by port "network".

    Its streams (`vmkernel.protocol.mux`) begin behind ``marker``.  The call's one buffer has
    certificates that the host trusts, or nothing.
    """

    marker: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


MAX_CHUNK = 512 << 10
"""Bytes of a file that travel at once, as the one buffer of a call or its reply."""
MAX_ENTRIES = 256
"""Entries of a directory that are told at once."""

Amount = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
# Bytes, as names are on Linux: what is no UTF-8 would be no JSON, either.
FilePath = Annotated[bytes, msgspec.Meta(min_length=1, max_length=4096)]
FileMode = Annotated[int, msgspec.Meta(ge=0, le=0o7777)]


class ReadFile(msgspec.Struct, tag="read_file", forbid_unknown_fields=True):
    """Bytes of a regular file, from ``offset``; none when it ends there.

    This and the commands below are carried out with the rights of the guest's user; a relative
    path begins at the user's home.  :mod:`vmkernel.protocol.files` has the results: here a
    `FileChunk` with one buffer, or, as with all of them, a `FileRefusal`.
    """

    path: FilePath
    offset: Amount
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_CHUNK)]


class WriteFile(msgspec.Struct, tag="write_file", forbid_unknown_fields=True):
    """Put the call's one buffer into a regular file; the result is empty.

    A file that is not there is made, with the permissions ``mode``; ``truncate``: it ends after
    what is written.
    """

    path: FilePath
    offset: Amount
    mode: FileMode
    truncate: bool


class ListFiles(msgspec.Struct, tag="list_files", forbid_unknown_fields=True):
    """What a path is and, of a directory, what is in it from entry ``skip`` on: `FileListing`."""

    path: FilePath
    skip: Amount


class MakeDirectory(msgspec.Struct, tag="make_directory", forbid_unknown_fields=True):
    """Make a directory, or find it there; the result is empty."""

    path: FilePath
    mode: FileMode


class MoveFile(msgspec.Struct, tag="move_file", forbid_unknown_fields=True):
    """Give a file or directory another name on the same disk; the result is empty.

    What has that name already is refused (EEXIST), or with ``replace`` goes: a file as a whole, of
    a directory the files that come anew.
    """

    path: FilePath
    target: FilePath
    replace: bool


FileCommand = ReadFile | WriteFile | ListFiles | MakeDirectory | MoveFile
Command = (
    Wake | ShowWorkspace | SetClock | Interrupt | StartKernel | Stats | OpenNetwork | FileCommand
)


class Call(msgspec.Struct, forbid_unknown_fields=True):
    """A command with the number that its reply will carry."""

    id: int
    command: Command


class Hello(msgspec.Struct, tag="hello", forbid_unknown_fields=True):
    """The agent runs: the guest booted.  Proof enough that an accelerator works.

    ``timer`` is how long a short sleep took, as a multiple of what was asked for.
    """

    kernel_release: ShortStr
    python: ShortStr
    timer: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 1.0


class Ready(msgspec.Struct, tag="ready", forbid_unknown_fields=True):
    """The guest kernel is warm and waits: the moment at which a template is saved.

    ``kernel_info`` is the content of its kernel_info_reply, which the host serves from
    then on, so that a front end need not wait for a VM.  A relay that took the place of a dead
    one has none: it has not started its kernel yet.
    """

    kernel_info: dict[str, Any]


class KernelDied(msgspec.Struct, tag="kernel_died", forbid_unknown_fields=True):
    """The guest kernel ended by itself.

    ``signal`` or ``exit_code`` tells how; ``oom`` is true when the guest ran out of
    memory; ``output`` is what it had written to its stdout and stderr and nobody read.
    """

    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] | None
    signal: Annotated[int, msgspec.Meta(ge=1, le=127)] | None
    oom: bool
    output: Annotated[str, msgspec.Meta(max_length=65536)]


class Failed(msgspec.Struct, tag="failed", forbid_unknown_fields=True):
    """The agent cannot bring the guest up; ``reason`` is for people."""

    reason: Annotated[str, msgspec.Meta(max_length=65536)]


class Reply(msgspec.Struct, tag="reply", forbid_unknown_fields=True):
    """The answer to the Call with this ``id``.  ``error`` is "" when it went well."""

    id: int
    error: Annotated[str, msgspec.Meta(max_length=65536)] = ""
    result: dict[str, Any] = {}


FromAgent = Hello | Ready | KernelDied | Failed | Reply


Percent = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Memory(msgspec.Struct, forbid_unknown_fields=True):
    """The guest machine's memory in bytes, as psutil names its parts."""

    total: Amount
    available: Amount
    percent: Percent
    used: Amount
    free: Amount
    active: Amount
    inactive: Amount
    buffers: Amount
    cached: Amount
    shared: Amount
    slab: Amount


class Usage(msgspec.Struct, forbid_unknown_fields=True):
    """What the guest kernel with its children, and the machine, use.

    CPU in per cent of one processor since the last question (``machine_cpu`` of all; None at the
    first), memory in bytes.  ``pid`` is the guest kernel's, 0 while there is none.
    """

    pid: Amount
    kernel_cpu: Percent
    kernel_memory: Amount
    machine_cpu: Percent | None
    cpu_count: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    memory: Memory


PROTOCOL_VERSION = "5.4"
"""Of Jupyter's messaging specification: what we speak on both sides."""

COMM_TYPES = frozenset(("comm_open", "comm_msg", "comm_close"))
"""Messages of a front end that have no reply (messaging spec, "custom messages")."""

# --- codecs --------------------------------------------------------------------------

encode_json = msgspec.json.Encoder(decimal_format="number").encode
decode_object = msgspec.json.Decoder(dict[str, Any]).decode
"""A JSON object of a front end's, which was checked to be one."""

_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def decode(body: frames.Piece, kind: type[T]) -> T:
    """The body as ``kind``.  Raises ProtocolError when it is anything else."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        value: T = decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a malformed message: {error}") from error
    return value


def decode_from_agent(body: frames.Piece) -> FromAgent:
    """One message of the agent.  Raises ProtocolError."""
    from vmkernel.protocol import bounds  # the host's: a guest need not load it

    bounds.check(body)
    message: FromAgent = decode(body, FromAgent)  # type: ignore[arg-type]
    if isinstance(message, Ready) and message.kernel_info:
        from vmkernel.protocol import kernelinfo

        message.kernel_info = kernelinfo.checked(message.kernel_info)
    return message


def decode_from_guest(body: frames.Piece) -> FromGuest:
    """One message of the guest kernel.

    Raises ProtocolError when it is malformed, and its kind TooMuchError when decoding it would take
    too much memory; what it is about may then be had by :func:`decode_head`.
    """
    from vmkernel.protocol import bounds

    bounds.check(body)
    if len(body) <= bounds.ALWAYS_FINE or not gc.isenabled():
        return decode(body, FromGuest)
    # Millions of new objects would set off the collector again and again: six times the time
    gc.disable()
    try:
        return decode(body, FromGuest)
    finally:
        gc.enable()


MAX_TEXT = 8 << 20
"""Largest buffer that is a stream's text, bytes: more than a guest kernel sends at once."""


def take_text(content: dict[str, Any], buffers: Sequence[frames.Piece]) -> bool:
    """Put a stream's text into its content, where it came as a buffer; whether it did.

    Raises ProtocolError.
    """
    if not buffers or "text" in content:
        return False
    if len(buffers) != 1 or len(buffers[0]) > MAX_TEXT:
        raise ProtocolError(f"a stream of {len(buffers)} texts, {len(buffers[0])} bytes")
    try:
        content["text"] = str(buffers[0], "utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"a stream whose text is none: {error}") from error
    return True


class Head(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What a `FromGuest` is about, whatever it contains."""

    channel: Channel
    msg_type: ShortStr
    parent_id: ShortStr
    metadata: msgspec.Raw
    content: msgspec.Raw


def decode_head(body: frames.Piece) -> Head | None:
    """What a message of the guest kernel is about; None when it is malformed."""
    try:
        return decode(body, Head)
    except ProtocolError:
        return None
