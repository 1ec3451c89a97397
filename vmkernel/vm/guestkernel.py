"""A Linux kernel of the user's own for the guest, not the image's (setting ``kernel_path``).

Where it stands: under ``host.start``, which puts it into a template's `Spec`.  The modules are the
image's, and Linux loads a module only into the kernel release that it was built for.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmkernel.errors import ImageError
from vmkernel.vm.facts import read_facts, remember

if TYPE_CHECKING:
    from vmkernel.image.store import Image

_FACTS = "kernels.json"
_HEADER = 1 << 16


def own_kernel(path: Path, image: Image, state_dir: Path) -> tuple[str, str]:
    """The kernel's path and its SHA-256, which is remembered in ``state_dir``.

    Raises ImageError: it cannot be read, is no Linux kernel, or does not fit the image.
    """
    try:
        found = path.stat()
        stamp = [found.st_size, found.st_mtime_ns, found.st_ino]
        known: Any = read_facts(state_dir, _FACTS).get(str(path))
        if not isinstance(known, dict) or known.get("stamp") != stamp:
            known = {"stamp": stamp, **_examine(path)}
            remember(state_dir, {str(path): known}, _FACTS)
    except OSError as error:
        raise ImageError(
            f"The guest's kernel {path} cannot be read: {error.strerror or error}",
            hint="correct the setting kernel_path, or leave it out",
        ) from error
    wanted = image.manifest.kernel_release
    if known["release"] != wanted:
        what = f"of release {known['release']}" if known["release"] else "no Linux kernel (bzImage)"
        raise ImageError(
            f"The guest's kernel {path} is {what}; "
            f"the modules of the image {image.name!r} are for {wanted}",
            hint=f"set kernel_path to a kernel of release {wanted}, or leave it out",
        )
    return str(path), known["sha256"]


def _examine(path: Path) -> dict[str, str]:
    import hashlib

    with path.open("rb") as file:
        release = release_of(file.read(_HEADER))
        file.seek(0)
        return {"release": release, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def release_of(head: bytes) -> str:
    """The release in a bzImage's header; "" when it is none.

    Linux, Documentation/arch/x86/boot.rst: magic at 0x202, at 0x20E where the version's text is.
    """
    if head[0x202:0x206] != b"HdrS":
        return ""
    (place,) = struct.unpack_from("<H", head, 0x20E)
    words = head[0x200 + place :].split(b"\0", 1)[0].split()
    return words[0].decode(errors="replace") if words else ""
