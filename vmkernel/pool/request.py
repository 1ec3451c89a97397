"""What a launcher hands over: how a kernel was started, to be taken over by another process."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import msgspec

from vmkernel.pool import handover

MOST = 16 << 20
"""Bytes of a request; the kernel of the host allows some 6 MiB of arguments and environment."""


class Request(msgspec.Struct, frozen=True):
    """Arguments, environment, working directory and umask of a kernel that is to be."""

    arguments: list[str]
    environ: dict[str, str]
    directory: str
    umask: int

    @classmethod
    def read(cls, descriptor: int, *, whole: bool = True) -> Request:
        """From the file that `handover.pack` made.  Raises ValueError, OSError.

        Without ``whole``, no more of the environment than settings and QEMU's start depend on; the
        rest does not get into this process's memory.
        """
        size = os.fstat(descriptor).st_size
        if size > MOST:
            raise ValueError("a request that is too long")
        header = os.pread(descriptor, handover.HEADER, 0).split(b"\0")
        if header[0] != handover.PROTOCOL or len(header) != 3:
            raise ValueError("a request of another version")
        wanted = size if whole else min(size, int(header[1]))
        parts = os.pread(descriptor, wanted, handover.HEADER).split(b"\0")
        count = int(parts[2])
        variables = (part.partition(b"=") for part in parts[3 + count :])
        return cls(
            [os.fsdecode(part) for part in parts[3 : 3 + count]],
            {os.fsdecode(name): os.fsdecode(value) for name, _, value in variables},
            os.fsdecode(parts[1]),
            int(parts[0]),
        )

    def adopt(self) -> None:
        """Be in the place of the process that this came from.  Raises OSError."""
        adopt_environment(self.environ)
        os.umask(self.umask)
        os.chdir(self.directory)


def adopt_environment(environ: Mapping[str, str]) -> None:
    """Have this environment and no other."""
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
