"""What a launcher hands over: how a kernel was started, to be taken over by another process."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import msgspec

from vmkernel.pool import handover

_PLAIN = frozenset("PATH HOME USER LOGNAME SHELL LANG TMPDIR DBUS_SESSION_BUS_ADDRESS".split())
_PLAIN_PREFIXES = ("VMKERNEL_", "XDG_", "LC_", "PYTHON", "LD_")
MOST = 16 << 20
"""Bytes of a request; the kernel of the host allows some 6 MiB of arguments and environment."""


class Request(msgspec.Struct, frozen=True):
    """Arguments, environment, working directory and umask of a kernel that is to be."""

    arguments: list[str]
    environ: dict[str, str]
    directory: str
    umask: int

    @classmethod
    def read(cls, descriptor: int) -> Request:
        """From the file that `handover.pack` made.  Raises ValueError, OSError."""
        size = os.fstat(descriptor).st_size
        if size > MOST:
            raise ValueError("a request that is too long")
        parts = os.pread(descriptor, size, 0).split(b"\0")
        if parts[0] != handover.PROTOCOL or len(parts) < 4:
            raise ValueError("a request of another version")
        count = int(parts[3])
        variables = (part.partition(b"=") for part in parts[4 + count :])
        return cls(
            [os.fsdecode(part) for part in parts[4 : 4 + count]],
            {os.fsdecode(name): os.fsdecode(value) for name, _, value in variables},
            os.fsdecode(parts[2]),
            int(parts[1]),
        )

    def plain(self) -> Request:
        """The same with no more of the environment than settings and QEMU's start depend on."""
        return msgspec.structs.replace(self, environ=plain_environment(self.environ))

    def adopt(self) -> None:
        """Be in the place of the process that this came from.  Raises OSError."""
        adopt_environment(self.environ)
        os.umask(self.umask)
        os.chdir(self.directory)


def plain_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a process that serves several kernels may keep: a token of one is no other's."""
    return {
        name: value
        for name, value in environ.items()
        if name in _PLAIN or name.startswith(_PLAIN_PREFIXES)
    }


def adopt_environment(environ: Mapping[str, str]) -> None:
    """Have this environment and no other."""
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
