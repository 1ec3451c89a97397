"""Where images are put: the lock on a name, the step into place, and what killed ones left.

Whoever makes an image (`builder`) or gets one from another host (`archive`) does so in a directory
``.tmp-NAME-PID`` beside the images and puts it in place at the very end: an image that can be found
is whole. Floor 2.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from vmkernel.errors import ImageError
from vmkernel.settings import Settings

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h


def make_images_dir(settings: Settings) -> None:
    """Make the directory of images.  Raises ImageError: it cannot be made."""
    try:
        settings.images_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(settings, error) from error


@contextlib.contextmanager
def image_lock(
    name: str, settings: Settings, *, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the lock on building or removing image *name*; *waiting* is called before a wait.

    The lock's file is never removed: two processes could then hold locks on two files of the
    same name. The kernel lets go of it when its holder dies.

    Raises:
        ImageError: the lock's file cannot be made.
    """
    path = settings.images_dir / f".lock-{name}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _not_writable(settings, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def put_in_place(new: Path, final: Path) -> None:
    """Rename *new* to *final*; an old image there goes to *new*'s name, in the same instant."""
    flush(new)
    try:
        new.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.renameat2(
            _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(final), _RENAME_EXCHANGE
        )
        if result != 0:
            # Some file systems (NFS) cannot exchange: a moment without an image, then.
            final.rename(new.with_name("replaced"))
            new.rename(final)
    flush(final.parent)


def flush(path: Path) -> None:
    """Bring a file or directory to the disk: after a power cut an image is whole or absent."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(name: str, settings: Settings) -> None:
    """Remove what builders of this name left that were killed. The caller holds the lock."""
    for path in settings.images_dir.glob(f".tmp-{name}-*"):
        # "x" must not sweep ".tmp-x-y-123", which is of the image "x-y".
        if path.name.removeprefix(f".tmp-{name}-").split("-")[0].isdigit():
            shutil.rmtree(path, ignore_errors=True)


def _not_writable(settings: Settings, error: OSError) -> ImageError:
    return ImageError(
        f"The images' directory {settings.images_dir} cannot be written: {error.strerror or error}",
        hint="set VMKERNEL_IMAGES_DIR to a directory of yours",
    )
