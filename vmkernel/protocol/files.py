"""What the agent answers to the commands about files (port "agent"; :mod:`.messages`).

Apart from the commands, so that a kernel which moves no files need not import it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from vmkernel.protocol.messages import MAX_ENTRIES, Amount, FileMode

FileKind = Literal["file", "directory", "link", "other"]


class FileRefusal(msgspec.Struct, forbid_unknown_fields=True):
    """Why the guest's system did not do it: errno(3)."""

    errno: Annotated[int, msgspec.Meta(ge=1, le=4095)]


class FileChunk(msgspec.Struct, forbid_unknown_fields=True):
    """Of a file that was read from: its ``size`` in bytes now; 0 in /proc, whatever is in it."""

    size: Amount


class FileEntry(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One name in a directory; a link is not followed."""

    name: Annotated[bytes, msgspec.Meta(min_length=1, max_length=255)]
    kind: FileKind
    size: Amount
    mode: FileMode
    modified: Amount = 0
    """Microseconds since the epoch"""


class FileListing(msgspec.Struct, forbid_unknown_fields=True):
    """What a path is, links followed; ``more``: the directory has entries beyond these."""

    kind: FileKind
    size: Amount
    mode: FileMode
    entries: Annotated[list[FileEntry], msgspec.Meta(max_length=MAX_ENTRIES)]
    more: bool
    modified: Amount = 0
