"""The Debian of an image that is there, for another one: seconds instead of half a minute.

Of the donor's files only what Debian's packages brought is taken: ``/usr/local``, where pip
installed, is emptied, so that nothing of its Python packages runs on the host or gets into the new
image. pip itself comes from the copy of Debian's wheel that each image has beside its root file
system, where no package could have written.

Still, what is taken runs on the host: the guest's interpreter and libraries, and pip. An image that
came from elsewhere is safe to start, and would not be safe to build on. So only one that was built
here, by this user (a list in ``state_dir``), or by the administrator for all, is a donor. Floor 2,
under `image.builder`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from vmkernel.errors import ImageError
from vmkernel.image import store
from vmkernel.image.debian import SUITE
from vmkernel.image.recipe import Recipe
from vmkernel.image.store import Image
from vmkernel.image.tools import ToolFailed, Tools, search_path
from vmkernel.settings import Settings

PYTHON_PART = "# Python distributions"
"""Where in an image's list of packages those of Debian end."""
_BUILT = "images-built"


class ReusedTree:
    """As `debian.DebianTree`, out of an image."""

    def __init__(self, root: Path, donor: Image, pip_wheel: Path) -> None:
        self.root = root
        self.pip_wheel = pip_wheel
        self.donor = donor
        self.kernel_release = donor.manifest.kernel_release
        self.kernel = donor.kernel

    def packages(self) -> list[str]:
        """``name version architecture`` of every Debian package in the image, sorted."""
        text = self.donor.lock.read_text(encoding="utf-8").partition(PYTHON_PART)[0]
        return [line for line in text.splitlines() if not line.startswith("#")]


def find_donor(recipe: Recipe, settings: Settings) -> Image | None:
    """An image whose Debian is that of *recipe*, and which has all that is needed; or None."""
    if shutil.which("fsck.erofs", path=search_path()) is None:
        return None
    found = [
        image
        for _, image in store.list_images(settings)
        if isinstance(image, Image)
        and image.recipe.debian == recipe.debian
        and image.manifest.debian_suite == SUITE
        and pip_wheel_of(image)
        and (store.is_shared(image, settings) or _is_ours(image, settings))
    ]
    # The newest has the fewest holes in it
    return max(found, key=lambda image: image.manifest.created, default=None)


def note_built(directory: Path, settings: Settings) -> None:
    """Remember that the image in *directory* was built here."""
    with contextlib.suppress(OSError):  # the next build takes longer
        path = settings.state_dir / _BUILT
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            os.write(descriptor, store.sha256_of(directory / store.MANIFEST).encode() + b"\n")
        finally:
            os.close(descriptor)


def _is_ours(image: Image, settings: Settings) -> bool:
    try:
        built = (settings.state_dir / _BUILT).read_text(encoding="ascii").split()
        return store.sha256_of(image.directory / store.MANIFEST) in built
    except (OSError, UnicodeDecodeError):
        return False


def pip_wheel_of(image: Image) -> str:
    """The name of the image's copy of pip; "" when it was built without one."""
    return next((name for name in image.manifest.files if store.is_pip_wheel(name)), "")


def take_tree(donor: Image, directory: Path, tools: Tools, settings: Settings) -> ReusedTree:
    """Make the guest's Debian below *directory* out of *donor*.

    Raises:
        ImageError: the donor is damaged.
    """
    store.verify_image(donor.name, settings)
    root = directory / "root"
    try:
        tools.run(
            ["fsck.erofs", f"--extract={root}", "--no-preserve-owner", "--preserve-perms",
             donor.rootfs]
        )  # fmt: skip
    except ToolFailed as error:
        raise ImageError(
            f"The image {donor.name!r} cannot be taken apart: "
            f"{error.lines[-1] if error.lines else error}",
            hint=f"build it again (vmkernel image build {donor.name} --force), or this one from "
            "the beginning (--force)",
            log_path=tools.log_path,
        ) from error
    _empty(root / "usr/local")
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")  # as `debian.finish_tree`
    wheel = directory / pip_wheel_of(donor)
    shutil.copyfile(donor.directory / wheel.name, wheel)
    return ReusedTree(root, donor, wheel)


def _empty(local: Path) -> None:
    """Remove what pip installed; Debian's packages have only directories and links there."""
    for directory, names, files in os.walk(local, topdown=False):
        for name in files:
            path = Path(directory, name)
            if not path.is_symlink() or path.parent.name == "bin":
                path.unlink()
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink() and "dist-packages" in path.relative_to(local).parts[:-1]:
                path.rmdir()  # empty by now; a directory would be a package to import
