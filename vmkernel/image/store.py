"""The images on this host: found, listed, verified, removed.

An image is a directory ``<images_dir>/<recipe's name>`` with the files below and a manifest; one
that is not there is looked for among the administrator's (`vmkernel.shared`).
Finding one lies on the start path of a clone: it reads the manifest and the files' sizes, and
nothing else. Whoever wants to know that every byte is right asks `verify_image`. Floor 2.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmkernel.errors import ImageError
from vmkernel.image.recipe import Recipe, is_recipe_path, load_recipe
from vmkernel.settings import Settings

FORMAT = 2
MANIFEST = "manifest.json"
ROOTFS, KERNEL, INITRD, LOCK = "rootfs.erofs", "vmlinuz", "initrd.base", "lock.txt"
FILES = (ROOTFS, KERNEL, INITRD, LOCK)
REQUIREMENTS = "requirements.lock"
"""Beside them since there are recipes of the user's own: the Python packages' exact versions."""


def is_pip_wheel(name: str) -> bool:
    """Whether this file of an image is its copy of pip, from which others can be made of it."""
    return name.startswith("pip-") and name.endswith(".whl")


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a file of the image must be."""

    size: int
    """Bytes."""
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``manifest.json``: what the image is made of."""

    format: int
    recipe: Recipe
    kernel_release: str
    python_version: str
    debian_suite: str
    created: str
    """ISO 8601, UTC."""
    files: dict[str, FileRecord]


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """A finished image on this host."""

    name: str
    directory: Path
    manifest: Manifest

    @property
    def recipe(self) -> Recipe:
        """What it was built from."""
        return self.manifest.recipe

    @property
    def rootfs(self) -> Path:
        """The guest's root file system (EROFS)."""
        return self.directory / ROOTFS

    @property
    def kernel(self) -> Path:
        """The guest's kernel."""
        return self.directory / KERNEL

    @property
    def initrd(self) -> Path:
        """The initial RAM disk, to which the template's builder appends the guest's code."""
        return self.directory / INITRD

    @property
    def lock(self) -> Path:
        """Every package in the image with its version."""
        return self.directory / LOCK

    @property
    def requirements(self) -> str:
        """The lock of its Python packages (`image.lock`); "" where it was built without one."""
        if REQUIREMENTS not in self.manifest.files:
            return ""
        try:
            return (self.directory / REQUIREMENTS).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # `verify_image` tells
            return ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.manifest.files.values())

    @property
    def digest(self) -> str:
        """A hash of all that a VM sees of it: equal for images that are equal."""
        state = hashlib.sha256()
        for name in (ROOTFS, KERNEL, INITRD):
            state.update(f"{name} {self.manifest.files[name].sha256}\n".encode())
        return state.hexdigest()


def find_image(name: str, settings: Settings) -> Image:
    """The image of this recipe (a name, or the path of a recipe's file).

    Raises:
        ImageError: there is none, or it is visibly damaged (manifest, sizes).
    """
    if is_recipe_path(name):
        hint_name, name = name, load_recipe(name).name
    else:
        hint_name = name
    directory = _directory_of(name, settings)
    shared = settings.shared_dir is not None and directory.parent != settings.images_dir
    build = f"vmkernel image build {hint_name}"
    try:
        content = (directory / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(
            f"There is no image {name!r} in {in_which_places(settings)}.",
            hint=f"build it: {build}",
        ) from error
    except OSError as error:
        raise ImageError(
            f"The image {name!r} cannot be read: {error}",
            hint="give this user the right to read it, or set VMKERNEL_IMAGES_DIR to another place",
        ) from error
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.MsgspecError as error:
        raise ImageError(
            f"The manifest of image {name!r} is damaged or of another version: {error}",
            hint=f"build it again: {build} --force",
        ) from error
    if manifest.format != FORMAT or not manifest.files.keys() >= set(FILES):
        raise ImageError(
            f"The image {name!r} has format {manifest.format}; this version of vmkernel needs "
            f"format {FORMAT}.",
            hint=f"build it again: {build} --force",
        )
    for file, record in manifest.files.items():
        try:
            found = os.stat(directory / file)  # noqa: PTH116 - as cheap as can be
        except OSError as error:
            raise _damaged(name, file, f"cannot be read ({error.strerror})", build) from error
        if found.st_size != record.size:
            how = f"has {found.st_size} bytes instead of {record.size}"
            raise _damaged(name, file, how, build)
        if shared and (found.st_mode & 0o022 or found.st_uid not in (0, os.geteuid())):
            raise ImageError(
                f"The image {name!r} is not taken from {directory}: others may write to {file}.",
                hint=f"have the administrator mend it (chmod 644), or build your own: {build}",
            )
    return Image(name=name, directory=directory, manifest=manifest)


def _directory_of(name: str, settings: Settings) -> Path:
    """The user's own image, where there is one; else the administrator's, if he built it."""
    own = settings.images_dir / name
    if settings.shared_dir is not None and not os.path.lexists(own):
        from vmkernel.shared import distrust, shared_images

        shared = shared_images(settings)
        if shared is not None and not distrust(shared / name):
            return shared / name
    return own


def has_image(name: str, settings: Settings) -> bool:
    """Whether there is such an image at hand, damaged or not."""
    return (_directory_of(name, settings) / MANIFEST).is_file()


def in_which_places(settings: Settings) -> str:
    """Where images were looked for, in words."""
    if settings.shared_dir is None:
        return str(settings.images_dir)
    from vmkernel.shared import distrust

    shared = settings.shared_dir / "images"
    problem = distrust(shared)
    aside = f" (from which nothing is taken: {problem})" if problem else ""
    return f"{settings.images_dir} or {shared}{aside}"


def is_shared(image: Image, settings: Settings) -> bool:
    """Whether it is one that the administrator built for all users."""
    return settings.shared_dir is not None and image.directory.parent == (
        settings.shared_dir / "images"
    )


def list_images(settings: Settings) -> list[tuple[str, Image | ImageError]]:
    """Every image at hand, by name; one that cannot be used comes with its error."""
    found: list[tuple[str, Image | ImageError]] = []
    places = [settings.images_dir]
    if settings.shared_dir is not None:
        from vmkernel.shared import shared_images

        places += [place for place in (shared_images(settings),) if place is not None]
    there: set[str] = set()
    for place in places:
        with contextlib.suppress(OSError):
            there |= {entry.name for entry in os.scandir(place) if entry.is_dir()}
    names = sorted(there)
    for name in names:
        if name.startswith("."):
            continue  # under way, or left by a builder that was killed
        try:
            found.append((name, find_image(name, settings)))
        except ImageError as error:
            found.append((name, error))
    return found


RECIPES = {"python": "datascience", "bash": "bash"}
"""The recipe that speaks a language, when no image at hand does."""


def recipe_for_language(language: str, settings: Settings) -> str:
    """The settings' recipe if its kernel speaks ``language``, else one of an image that does.

    Raises:
        ImageError: nothing speaks it.
    """
    try:
        if find_image(settings.recipe, settings).recipe.language.name == language:
            return settings.recipe
    except ImageError:
        if RECIPES.get(language) == settings.recipe:
            raise
    speaking = [
        name
        for name, image in list_images(settings)
        if isinstance(image, Image) and image.recipe.language.name == language
    ]
    if RECIPES.get(language) in speaking or (not speaking and language in RECIPES):
        return RECIPES[language]
    if not speaking:
        raise ImageError(
            f"There is no image whose kernel speaks {language!r} in {settings.images_dir}.",
            hint="build one (docs/recipes.md), or name a recipe: recipe=…; "
            "`vmkernel image list` shows what there is",
        )
    return speaking[0]


def verify_image(
    name: str, settings: Settings, *, progress: Callable[[str, float], None] | None = None
) -> Image:
    """Read every byte of an image and compare checksums; *progress* gets file and fraction.

    Raises:
        ImageError: as `find_image`, or a file's content differs; names the file.
    """
    image = find_image(name, settings)
    done = 0
    for file, record in image.manifest.files.items():

        def advance(size: int, file: str = file, before: int = done) -> None:
            if progress is not None:
                progress(file, (before + size) / max(1, image.size))

        try:
            found = sha256_of(image.directory / file, advance)
        except OSError as error:
            raise _damaged(
                image.name, file, f"cannot be read ({error})", f"vmkernel image build {name}"
            ) from error
        if found != record.sha256:
            raise _damaged(
                image.name,
                file,
                f"has changed since it was built (sha256 {found[:12]}… instead of "
                f"{record.sha256[:12]}…)",
                f"vmkernel image build {name}",
            )
        done += record.size
    return image


def remove_image(name: str, settings: Settings) -> None:
    """Remove an image, damaged or not. VMs that run from it go on; new ones cannot start.

    Raises:
        ImageError: there is none, or it could not be removed.
    """
    import shutil

    from vmkernel.image.placing import image_lock

    directory = settings.images_dir / name
    if name.startswith(".") or "/" in name or not directory.is_dir():
        raise ImageError(
            f"There is no image {name!r} in {settings.images_dir}.", hint="see vmkernel image list"
        )
    with image_lock(name, settings):
        # Out of sight in one step, so nobody finds half an image; then at leisure.
        doomed = settings.images_dir / f".tmp-{name}-{os.getpid()}-removed"
        try:
            directory.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            raise ImageError(
                f"The image {name!r} could not be removed: {error}",
                hint=f"remove the directory {directory} by hand",
            ) from error


def sha256_of(path: Path, progress: Callable[[int], None] = lambda size: None) -> str:
    """The SHA-256 of a file in hexadecimal; *progress* gets the bytes read so far.

    Raises:
        OSError: it cannot be read.
    """
    state = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
            done += len(chunk)
            progress(done)
    return state.hexdigest()


def _damaged(name: str, file: str, how: str, build: str) -> ImageError:
    return ImageError(
        f"The image {name!r} is damaged: its file {file} {how}.",
        hint=f"build it again: {build} --force",
    )
