"""Removing a VM's small directories, on the way of a command that is to be quick.

As ``shutil.rmtree(…, ignore_errors=True)``, whose module imports every compressor (11 ms, as long
as all the rest of a VM's end).  For directories that are private to this user: nobody else could
put a link in the place of what is looked at.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def remove_tree(directory: Path | str) -> None:
    """Remove it with all that is in it, following no link; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    remove_tree(entry.path)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)  # noqa: PTH108 - a str, as scandir has it
        os.rmdir(directory)  # noqa: PTH106
