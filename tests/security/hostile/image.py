"""An image in which our agent is replaced by `program`: made of the small one, in a moment.

The kernel unpacks the archives of an initial RAM disk one over the other
(Documentation/driver-api/early-userspace/buffer-format.rst), so an archive behind the image's own
replaces its ``/init``.  The root file system is the small image's, shared by a link.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec

from vmkernel.image import store
from vmkernel.image.initrd import CpioWriter, read_cpio

HERE = Path(__file__).parent
START = "/run/vmkernel/start.py"
"""What the small image's init runs in the end."""
BEFORE = "# An environment of our own"
"""Before that."""


def make_image(
    source: store.Image, images_dir: Path, kernel_info: dict[str, Any], *, name: str = "hostile"
) -> str:
    """Put an image into ``images_dir`` whose kernel says that of itself; its name."""
    target = images_dir / name
    target.mkdir(parents=True)
    for file in set(source.manifest.files) - {store.INITRD}:
        try:
            (target / file).hardlink_to(source.directory / file)
        except OSError:  # another file system, or another user's file
            shutil.copy(source.directory / file, target / file)
    base = source.initrd.read_bytes()
    content = base + _archive(read_cpio(base)["init"][1].decode(), kernel_info)
    (target / store.INITRD).write_bytes(content)
    record = store.FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = msgspec.structs.replace(
        source.manifest,
        recipe=msgspec.structs.replace(source.recipe, name=name),
        files={**source.manifest.files, store.INITRD: record},
    )
    (target / store.MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return name


def _archive(init: str, kernel_info: dict[str, Any]) -> bytes:
    assert init.count(START) == 1, f"images/init does not run {START} any more"
    assert init.count(BEFORE) == 1, f"images/init has no line {BEFORE!r} any more"
    copy = "cp /hostile.py /hostile.json /root/run/\n"
    init = init.replace(START, "/run/hostile.py").replace(BEFORE, copy + BEFORE)
    archive = CpioWriter()
    archive.file("init", init.encode(), 0o755)
    archive.file("hostile.py", (HERE / "program.py").read_bytes())
    archive.file("hostile.json", json.dumps(kernel_info).encode())
    return archive.finish()
