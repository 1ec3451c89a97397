"""Building an image: from a recipe to a directory of four files and a manifest.

``recipe → debian (mmdebstrap) → python (pip, bytecode) → initrd → EROFS → manifest``, all in a
temporary directory beside the images and renamed into place at the very end: an image that can be
found is whole. One builder at a time for each name, across processes. Floor 2.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from vmkernel.errors import ImageError
from vmkernel.image import debian, python, store
from vmkernel.image.apt import Mirrors, host_mirrors
from vmkernel.image.initrd import ModuleTree, build_initrd, parse_module_list
from vmkernel.image.lock import answers, check_lock
from vmkernel.image.placing import flush, image_lock, make_images_dir, put_in_place, sweep
from vmkernel.image.recipe import Recipe
from vmkernel.image.reuse import PYTHON_PART, ReusedTree, find_donor, note_built, take_tree
from vmkernel.image.store import FORMAT, Image
from vmkernel.image.tools import ToolFailed, Tools, require_tools
from vmkernel.resources import resource_dir
from vmkernel.settings import Settings

Progress = Callable[[str, float], None]

# What a build of `datascience` takes at its peak, with some room: the extracted tree and the
# image made of it; and mmdebstrap's own copy of the base.
_SPACE_IMAGES = 1600 << 20
_SPACE_TEMPORARY = 700 << 20

# Time of every file in the image: that of Debian 13's release, so that two builds from the same
# packages are equal.
_TIME_STAMP = 1_754_697_600


def build_image(
    recipe: Recipe,
    settings: Settings,
    *,
    progress: Progress = lambda phase, fraction: None,
    force: bool = False,
    mirrors: Mirrors | None = None,
    lock: str = "",
    reuse: bool = False,
    origins: Mapping[str, str] | None = None,
) -> Image:
    """Build the image of *recipe*, unless there is one of exactly this recipe (or *force*).

    *lock*: the versions to install, where it is of this recipe (`image.lock`). *reuse*: the Debian
    of an image that is there will do. *origins*: where requirements were written, for messages.

    Where an image of another recipe has the same content, both share its files on the disk.
    *progress* gets the phase in words and the fraction done. *mirrors* stand in for those of the
    host's apt configuration. Waits while another process builds an image of this name, and takes
    that one if it fits.

    Raises:
        ImageError: a tool or space is missing, or a download failed; nothing is left behind.
    """
    if not force and (image := _existing(recipe, settings, lock)) is not None:
        return image
    asked = datetime.now(UTC).isoformat()
    make_images_dir(settings)
    with image_lock(
        recipe.name, settings, waiting=lambda: progress("waiting for another build", 0.0)
    ):
        image = _existing(recipe, settings, lock)
        # Built by somebody else while this one waited: fresh enough even for `force`.
        if image is not None and (not force or image.manifest.created > asked):
            return image
        twin = None if force else _of_same_content(recipe, settings, lock, reuse)
        donor = find_donor(recipe, settings) if reuse and not force and twin is None else None
        if twin is None:
            _check_host(settings, with_debian=donor is None)
        sweep(recipe.name, settings)
        work = settings.images_dir / f".tmp-{recipe.name}-{os.getpid()}"
        try:
            if twin is not None:
                _share(twin, recipe, work)
            else:
                with Tools(settings.state_dir / f"image-{recipe.name}.log") as tools:
                    plan = _Plan(recipe, settings, mirrors or host_mirrors(), donor, lock, origins)
                    _build(plan, work, tools, progress)
            progress("putting the image in place", 0.99)
            put_in_place(work / "image", settings.images_dir / recipe.name)
            if twin is None:
                note_built(settings.images_dir / recipe.name, settings)
        except OSError as error:
            raise _no_space(error, settings) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        progress("done", 1.0)
    return store.find_image(recipe.name, settings)


class _Plan(NamedTuple):
    recipe: Recipe
    settings: Settings
    mirrors: Mirrors | None
    donor: Image | None
    """Whose Debian is taken."""
    lock: str
    origins: Mapping[str, str] | None


def _build(plan: _Plan, work: Path, tools: Tools, progress: Progress) -> None:
    recipe, donor = plan.recipe, plan.donor
    work.mkdir()
    image = work / "image"
    image.mkdir()

    def part(phase: str, start: float, end: float) -> Callable[[float], None]:
        progress(phase, start)
        return lambda fraction: progress(phase, start + (end - start) * fraction)

    tree: debian.DebianTree | ReusedTree
    if donor is not None:
        part(f"Debian packages, from the image {donor.name!r}", 0.01, 0.45)
        tree = take_tree(donor, work, tools, plan.settings)
    else:
        advance = part("Debian packages", 0.01, 0.45)
        tree = debian.make_tree(recipe, work, tools, plan.mirrors, advance)
        debian.finish_tree(tree.root, plan.mirrors)

    interpreter = python.GuestPython(tree.root)
    version = interpreter.full_version()
    lock = plan.lock
    if lock and not answers(lock, recipe, interpreter.version):
        progress("the lock is of other requirements: versions are chosen anew", 0.45)
        lock = ""
    check_lock(lock)  # it may come from somebody else
    advance = part("Python packages", 0.45, 0.60)
    environment = interpreter.environment()
    # The standard library is compiled while pip waits for the network.
    stdlib = [interpreter.stdlib, tree.root / "usr/lib/python3"]
    compilers = python.compile_commands(interpreter, tree.root, stdlib) if donor is None else []
    with tools.beside(compilers, env=environment):
        versions = python.install_packages(
            interpreter, tree.root, recipe, tree.pip_wheel, tools, advance,
            lock=lock, origins=plan.origins,
        )  # fmt: skip
    python.check_preloads(interpreter, recipe, tools)
    part("bytecode", 0.60, 0.85)
    packages = sorted(interpreter.packages.iterdir())
    compilers = python.compile_commands(interpreter, tree.root, packages)
    with tools.beside(compilers, env=environment):
        pass
    part("kernel and initial RAM disk", 0.85, 0.88)
    shutil.copyfile(tree.kernel, image / store.KERNEL)
    if isinstance(tree, ReusedTree):
        shutil.copyfile(tree.donor.initrd, image / store.INITRD)
    else:
        images = resource_dir("images")
        wanted = parse_module_list((images / "modules.txt").read_text(encoding="utf-8"))
        initrd = build_initrd(
            (images / "init").read_bytes(),
            tree.busybox.read_bytes(),
            ModuleTree(tree.modules).select(wanted),
        )
        (image / store.INITRD).write_bytes(initrd)
    shutil.copyfile(tree.pip_wheel, image / tree.pip_wheel.name)
    (image / store.REQUIREMENTS).write_text(versions, encoding="utf-8")
    _write_lock(image / store.LOCK, tree, interpreter)

    part("root file system", 0.88, 0.95)
    _make_erofs(tree.root, image / store.ROOTFS, tools)

    part("checksums", 0.95, 0.99)
    manifest = store.Manifest(
        format=FORMAT,
        recipe=recipe,
        kernel_release=tree.kernel_release,
        python_version=version,
        debian_suite=debian.SUITE,
        created=datetime.now(UTC).isoformat(),
        files={
            name: store.FileRecord(
                size=(image / name).stat().st_size, sha256=store.sha256_of(image / name)
            )
            for name in (*store.FILES, store.REQUIREMENTS, tree.pip_wheel.name)
        },
    )
    _write_manifest(manifest, image)


def _write_manifest(manifest: store.Manifest, directory: Path) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (directory / store.MANIFEST).write_bytes(encoded + b"\n")
    for path in directory.iterdir():
        path.chmod(0o644)
        flush(path)


def _of_same_content(recipe: Recipe, settings: Settings, lock: str, locked: bool) -> Image | None:
    """An image of another recipe that has the content of this one's; *locked*: and a lock."""
    for _, image in store.list_images(settings):
        if (
            isinstance(image, Image)
            and image.name != recipe.name
            and recipe.has_content_of(image.recipe)
            and image.manifest.debian_suite == debian.SUITE
            and (not locked or image.requirements)
            and (not lock or image.requirements == lock)
        ):
            return image
    return None


def _share(twin: Image, recipe: Recipe, work: Path) -> None:
    """Make an image of *twin*'s files, which nobody writes to, and a manifest of its own."""
    image = work / "image"
    image.mkdir(parents=True)
    for name in twin.manifest.files:
        try:
            (image / name).hardlink_to(twin.directory / name)
        except OSError:  # a file system without them, or another user's file
            shutil.copyfile(twin.directory / name, image / name)
    changes = {"recipe": recipe, "created": datetime.now(UTC).isoformat()}
    _write_manifest(msgspec.structs.replace(twin.manifest, **changes), image)


def _make_erofs(root: Path, target: Path, tools: Tools) -> None:
    # A file system's UUID from its purpose, not from chance: equal trees give equal images.
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, "rootfs.vmkernel")
    try:
        tools.run(
            ["mkfs.erofs", "--all-root", f"-T{_TIME_STAMP}", f"-U{identity}", "-x-1", "--quiet",
             target, root]
        )  # fmt: skip
    except ToolFailed as error:
        raise ImageError(
            f"The root file system could not be made: {error.lines[-1] if error.lines else error}",
            hint="see the log",
            log_path=tools.log_path,
        ) from error


def _write_lock(
    path: Path, tree: debian.DebianTree | ReusedTree, interpreter: python.GuestPython
) -> None:
    lines = [
        f"# Debian {debian.SUITE}: package, version, architecture",
        *tree.packages(),
        PYTHON_PART,
        *python.distributions(interpreter),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _existing(recipe: Recipe, settings: Settings, lock: str = "") -> Image | None:
    """The image of this very recipe, and with these versions, if there is a sound one."""
    try:
        image = store.find_image(recipe.name, settings)
    except ImageError:
        return None
    if image.recipe != recipe:
        return None
    python = ".".join(image.manifest.python_version.split(".")[:2])
    changed = lock and answers(lock, recipe, python) and image.requirements != lock
    return None if changed else image


def _check_host(settings: Settings, *, with_debian: bool) -> None:
    if os.uname().machine != "x86_64":
        raise ImageError(
            f"Images are for x86-64, and this host is {os.uname().machine}.",
            hint="use a host with an x86-64 processor",
        )
    tools = ["mkfs.erofs"]
    if with_debian:
        tools += ["mmdebstrap", "apt-config", "dpkg-deb", "tar"]
        if os.geteuid() != 0:
            tools.append("newuidmap")
    require_tools(tools)
    if with_debian and os.geteuid() != 0:
        _check_subordinate_ids()
    temporary = Path(tempfile.gettempdir())
    needed = {settings.images_dir: _SPACE_IMAGES}
    if os.stat(temporary).st_dev == os.stat(settings.images_dir).st_dev:  # noqa: PTH116
        needed[settings.images_dir] += _SPACE_TEMPORARY
    else:
        needed[temporary] = _SPACE_TEMPORARY
    for directory, size in needed.items():
        free = shutil.disk_usage(directory).free
        if free < size:
            raise ImageError(
                f"Building an image needs {size >> 20} MiB free in {directory}; "
                f"there are {free >> 20} MiB.",
                hint="make room, or set VMKERNEL_IMAGES_DIR (images) or TMPDIR (temporary files) "
                "to a place with more",
            )


def _check_subordinate_ids() -> None:
    """An ordinary user needs a range of ids for mmdebstrap's user namespace (man 5 subuid)."""
    import getpass

    user = getpass.getuser()
    for path in (Path("/etc/subuid"), Path("/etc/subgid")):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        if not any(line.split(":")[0] in (user, str(os.getuid())) for line in lines):
            raise ImageError(
                f"User {user!r} has no range of ids in {path}, which building an image as an "
                "ordinary user needs.",
                hint=f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
                " (any range that nobody else has)",
            )


def _no_space(error: OSError, settings: Settings) -> ImageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or settings.images_dir
        return ImageError(
            f"The disk became full while the image was built ({where}).",
            hint="make room, or set VMKERNEL_IMAGES_DIR (images) or TMPDIR (temporary files) "
            "to a place with more",
        )
    return ImageError(
        f"Building the image failed: {error}",
        hint="look whether this user may write there",
    )
