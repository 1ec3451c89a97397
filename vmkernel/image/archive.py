"""An image as one stream of bytes: built on one host, copied to the others, checked on each.

The stream is a tar file (``tar -tvf`` lists it) of exactly this form::

    vmkernel-image    one line: the version of this form, the manifest's checksum, its size
    manifest.json     the image's, byte for byte: sizes and checksums of all other files
    rootfs.erofs …    the files, in the manifest's order
                      two empty blocks; nothing behind them

The first line's checksum is so that of the whole image, and is what people compare. Nothing of the
tar format is interpreted: each header, its padding and the end are compared with what
`export_image` writes for this manifest, so an archive has no paths, links or sizes of its own to be
believed, and no bit of it can change unnoticed. An archive tells *what* an image is, not who made
it: for that whoever imports names the checksum that he expects. Floor 2.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from vmkernel.errors import ImageError
from vmkernel.image import store
from vmkernel.image.placing import flush, image_lock, make_images_dir, put_in_place, sweep
from vmkernel.image.recipe import check_recipe
from vmkernel.image.store import FORMAT, Image, Manifest
from vmkernel.settings import Settings

Progress = Callable[[str, float], None]

MOST_MANIFEST = 1 << 20
MOST_IMAGE = 64 << 30
"""Bytes of all files; the usual images have 0.2 to 2 GiB."""
_CHUNK = 1 << 16
"""Bytes that are read and written at once; as many zeros become a hole in the file."""
_BLOCK = 512
_ZEROS = bytes(_CHUNK)
_END = bytes(2 * _BLOCK)
_HEAD = "vmkernel-image"
_HEAD_LINE = re.compile(rb"vmkernel image archive 1 sha256 ([0-9a-f]{64}) size ([0-9]{8})\n\Z")
_HEAD_SIZE = len("vmkernel image archive 1 sha256  size \n") + 64 + 8
_WORD = re.compile(r"[A-Za-z0-9.+~_-]{1,100}\Z")
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"
}  # fmt: skip


class Source(Protocol):
    """Where an archive is read from."""

    def read(self, size: int, /) -> bytes | None:
        """At most *size* bytes; none at the end."""


class Target(Protocol):
    """Where an archive is written to."""

    def write(self, data: bytes | memoryview, /) -> int | None:
        """Take bytes; says how many were taken (None: all)."""


class Copied(NamedTuple):
    """What was exported or imported."""

    image: Image
    checksum: str
    """SHA-256 of the manifest, which has those of all files in it."""
    is_new: bool = True
    """Whether it was not there already."""


def export_image(
    name: str, settings: Settings, target: Target, *, progress: Progress = lambda name, done: None
) -> Copied:
    """Write the image of recipe *name* to *target*; *progress* gets a file and the fraction done.

    Raises:
        ImageError: there is none, or it is damaged: then what was written is no whole archive.
        OSError: *target* cannot be written.
    """
    image = store.find_image(name, settings)
    with contextlib.ExitStack() as stack:
        try:
            # All at once: an image may be replaced meanwhile
            manifest_bytes = (image.directory / store.MANIFEST).read_bytes()
            manifest = msgspec.json.decode(manifest_bytes, type=Manifest)
            files = {
                file: stack.enter_context((image.directory / file).open("rb"))
                for file in manifest.files
            }
        except (OSError, msgspec.MsgspecError) as error:
            raise _unreadable(name, error) from error
        checksum = hashlib.sha256(manifest_bytes).hexdigest()
        line = f"vmkernel image archive 1 sha256 {checksum} size {len(manifest_bytes):08d}\n"
        for member, content in ((_HEAD, line.encode()), (store.MANIFEST, manifest_bytes)):
            _write(target, _header(member, len(content)) + content + _padding(len(content)))
        done, total = 0, max(1, image.size)
        for file, record in manifest.files.items():
            _write(target, _header(file, record.size))
            state = hashlib.sha256()
            left = record.size
            while left:
                try:
                    chunk = files[file].read(min(_CHUNK, left))
                except OSError as error:
                    raise _unreadable(name, error) from error
                if not chunk:
                    break
                state.update(chunk)
                _write(target, chunk)
                left -= len(chunk)
                done += len(chunk)
                progress(file, done / total)
            if left or state.hexdigest() != record.sha256:
                raise ImageError(
                    f"The image {name!r} is damaged: its file {file} is not what was built.",
                    hint=f"build it again: vmkernel image build {name} --force",
                )
            _write(target, _padding(record.size))
        _write(target, _END)
    return Copied(image, checksum)


def import_image(
    source: Source,
    settings: Settings,
    *,
    checksum: str = "",
    force: bool = False,
    progress: Progress = lambda name, done: None,
) -> Copied:
    """Make the image that *source* has, unless there is this very one.

    *checksum*: no other is taken. *force*: another image of that name is replaced. Nothing can be
    found of the image until every byte has been checked, and *source* was read to its end.

    Raises:
        ImageError: no archive, a damaged or another one; no space; nothing is left behind.
    """
    stream = _Stream(source)
    manifest, manifest_bytes = _read_manifest(stream, checksum)
    found = hashlib.sha256(manifest_bytes).hexdigest()
    name = manifest.recipe.name
    make_images_dir(settings)
    with image_lock(name, settings, waiting=lambda: progress("waiting for another build", 0.0)):
        final = settings.images_dir / name
        is_there = _has(final, manifest_bytes, name, settings)
        if os.path.lexists(final) and not (is_there or force):
            raise ImageError(
                f"There is another image {name!r} in {settings.images_dir}.",
                hint="to replace it: vmkernel image import --force (its VMs that run go on)",
            )
        sweep(name, settings)
        work = (
            None if is_there and not force else settings.images_dir / f".tmp-{name}-{os.getpid()}"
        )
        try:
            if work is not None:
                _check_space(manifest, settings)
                (work / "image").mkdir(parents=True)
                (work / "image").chmod(0o755)
                (work / "image" / store.MANIFEST).write_bytes(manifest_bytes)
            _read_files(stream, manifest, work and work / "image", progress)
            stream.expect(_END, "its end")
            stream.expect_nothing()
            if work is not None:
                for path in (work / "image").iterdir():
                    path.chmod(0o644)
                    flush(path)
                put_in_place(work / "image", final)
        except OSError as error:
            raise _not_written(error, settings) from error
        finally:
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
    return Copied(store.find_image(name, settings), found, work is not None)


class _Stream:
    """Reads exactly as much as is asked for, and knows how far it came."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._place = 0

    def take(self, size: int) -> bytes:
        """The next *size* bytes.  Raises ImageError."""
        data = b""
        while len(data) < size:
            try:
                more = self._source.read(size - len(data))
            except OSError as error:
                raise ImageError(f"The archive cannot be read: {error}") from error
            if not more:
                raise ImageError(
                    f"The archive is cut off: it ends after {self._place + len(data)} bytes.",
                    hint="copy it again; was there an error where it was exported?",
                )
            data = data + more if data else more
        self._place += size
        return data

    def chunks(self, size: int) -> Iterator[bytes]:
        """The next *size* bytes in pieces."""
        while size:
            piece = self.take(min(size, _CHUNK))
            size -= len(piece)
            yield piece

    def expect(self, wanted: bytes, what: str) -> None:
        """See that these bytes come next.  Raises ImageError."""
        if self.take(len(wanted)) != wanted:
            raise _damaged(f"{what}, at byte {self._place - len(wanted)}, is not what it must be")

    def expect_nothing(self) -> None:
        """See that this is the end: whoever sends it is not left with a broken pipe, too."""
        try:
            more = self._source.read(1)
        except OSError as error:
            raise ImageError(f"The archive cannot be read: {error}") from error
        if more:
            raise _damaged("something follows after its end")


def _read_manifest(stream: _Stream, checksum: str) -> tuple[Manifest, bytes]:
    header = _header(_HEAD, _HEAD_SIZE)
    start = stream.take(_BLOCK)
    if start != header:
        raise _foreign(start)
    line = stream.take(_HEAD_SIZE)
    match = _HEAD_LINE.match(line)
    if match is None:
        raise _damaged("its first line cannot be understood, or another version made it")
    stream.expect(_padding(_HEAD_SIZE), "padding")
    size = int(match[2])
    if size > MOST_MANIFEST:
        raise _damaged(f"it has a manifest of {size} bytes")
    stream.expect(_header(store.MANIFEST, size), "the manifest's header")
    content = stream.take(size)
    stream.expect(_padding(size), "padding")
    found = hashlib.sha256(content).hexdigest()
    if found != match[1].decode():
        raise _damaged("the manifest's checksum is wrong")
    if checksum and found != checksum:
        raise ImageError(
            f"This is another image: its checksum is {found}, and {checksum} was asked for.",
            hint="copy the archive again, or look which image was exported",
        )
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.MsgspecError as error:
        raise _other_version(f"its manifest cannot be read ({error})") from error
    _check_manifest(manifest)
    return manifest, content


def _check_manifest(manifest: Manifest) -> None:
    """See that it describes an image, and has no name or size that could do harm."""
    if manifest.format != FORMAT:
        raise _other_version(f"the image has format {manifest.format}, not {FORMAT}")
    check_recipe(manifest.recipe, Path(f"archive/{store.MANIFEST}"))
    if not manifest.files.keys() >= set(store.FILES):
        raise _other_version("it lacks files")
    for name, record in manifest.files.items():
        known = name in store.FILES or name == store.REQUIREMENTS or store.is_pip_wheel(name)
        if not known or not _WORD.match(name):
            raise _other_version(f"no image has a file {name[:100]!r}")
        if record.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", record.sha256):
            raise _other_version(f"size or checksum of {name} are none")
    total = sum(record.size for record in manifest.files.values())
    if total > MOST_IMAGE:
        raise _other_version(f"an image of {total >> 30} GiB")
    words = (manifest.kernel_release, manifest.python_version, manifest.debian_suite)
    try:
        datetime.fromisoformat(manifest.created)
    except ValueError:
        raise _other_version("its date is none") from None
    if not all(_WORD.match(word) for word in words):
        raise _other_version("its versions are none")


def _read_files(
    stream: _Stream, manifest: Manifest, directory: Path | None, progress: Progress
) -> None:
    """Check all files, and write them into *directory* if there is one."""
    done, total = 0, max(1, sum(record.size for record in manifest.files.values()))
    for name, record in manifest.files.items():
        stream.expect(_header(name, record.size), f"the header of {name}")
        state = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            file = stack.enter_context((directory / name).open("xb", 0)) if directory else None
            for chunk in stream.chunks(record.size):
                state.update(chunk)
                if file is not None:
                    if chunk == _ZEROS:
                        file.seek(len(chunk), os.SEEK_CUR)
                    else:
                        _write(file, chunk)
                done += len(chunk)
                progress(name, done / total)
            if file is not None:
                file.truncate(record.size)
        if state.hexdigest() != record.sha256:
            raise _damaged(f"the checksum of {name} is wrong")
        stream.expect(_padding(record.size), "padding")


def _has(directory: Path, manifest: bytes, name: str, settings: Settings) -> bool:
    """Whether the very image is there, with all its files."""
    try:
        if (directory / store.MANIFEST).read_bytes() != manifest:
            return False
        return store.find_image(name, settings).directory == directory
    except (OSError, ImageError):
        return False


def _check_space(manifest: Manifest, settings: Settings) -> None:
    size = sum(record.size for record in manifest.files.values())
    free = shutil.disk_usage(settings.images_dir).free
    if free < size:
        raise ImageError(
            f"The image needs {(size >> 20) + 1} MiB free in {settings.images_dir}; "
            f"there are {free >> 20} MiB.",
            hint="make room, or set VMKERNEL_IMAGES_DIR to a place with more",
        )


def _header(name: str, size: int) -> bytes:
    """A tar header of a plain file; nothing in it is of this host."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _write(target: Target, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        taken = target.write(rest)
        rest = rest[len(rest) if taken is None else taken :]


def _foreign(start: bytes) -> ImageError:
    for magic, tool in _COMPRESSED.items():
        if start.startswith(magic):
            return ImageError(
                f"The archive is compressed with {tool}.",
                hint=f"{tool} -dc FILE | vmkernel image import -",
            )
    return ImageError(
        "This is no archive of an image.",
        hint="make one where the image was built: vmkernel image export RECIPE FILE",
    )


def _damaged(how: str) -> ImageError:
    return ImageError(
        f"The archive is damaged: {how}.", hint="copy it again, or export the image again"
    )


def _other_version(how: str) -> ImageError:
    return ImageError(
        f"The archive is not taken: {how}.",
        hint="export and import with the same version of vmkernel",
    )


def _unreadable(name: str, error: Exception) -> ImageError:
    return ImageError(
        f"The image {name!r} cannot be read: {error}",
        hint="try again, if it was being replaced; vmkernel image verify tells whether it is whole",
    )


def _not_written(error: OSError, settings: Settings) -> ImageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ImageError(
            f"There is no more room for the image in {settings.images_dir} ({error.strerror}).",
            hint="make room, or set VMKERNEL_IMAGES_DIR to a place with more",
        )
    return ImageError(
        f"The image could not be written: {error}", hint="look whether this user may write there"
    )
