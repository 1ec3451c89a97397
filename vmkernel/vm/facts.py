"""What was found out about this host, remembered in ``<state_dir>/host.json``.

Where it stands: under ``vm.tsc`` and ``vm.accel``, whose answers cost 0.03 to 15 seconds and do not
change between two starts. A VM's warm start reads one small file instead. Each fact carries what
it depends on (a boot id, a file's time), and is found out again when that changes; the file may be
deleted at any time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

_NAME = "host.json"


def read_facts(state_dir: Path, name: str = _NAME) -> dict[str, Any]:
    """All facts by name; empty when there are none, or none that can be read."""
    try:
        value = msgspec.json.decode((state_dir / name).read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def remember(state_dir: Path, facts: Mapping[str, object], name: str = _NAME) -> bool:
    """Add or replace facts; other processes see all of it or nothing.

    Returns False when the directory cannot be written: a fact is then found out anew each time.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file_lock(state_dir / f"{name}.lock"):
            merged = {**read_facts(state_dir, name), **facts}
            new = state_dir / f"{name}.new"
            new.write_bytes(msgspec.json.format(msgspec.json.encode(merged)) + b"\n")
            new.replace(state_dir / name)
    except OSError:
        return False
    return True


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold ``path`` locked against other processes; the kernel lets go if we die. Blocks."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
