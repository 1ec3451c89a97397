"""The initial RAM disk: a cpio archive with busybox, the kernel's modules and ``images/init``.

Written by our own few lines rather than by ``cpio``: the archive holds a device node, which an
ordinary user cannot make as a file, and must come out byte for byte the same each time.
Formats: the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst`` (newc), the
ELF specification (section headers), ``man 5 modules.dep`` (names and dependencies of modules).
"""

from __future__ import annotations

import lzma
import stat
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from vmkernel.errors import ImageError

# What images/init calls.
_BUSYBOX_NAMES = ["chmod", "chown", "cp", "echo", "env", "hostname", "insmod", "ip", "ln", "mkdir",
                  "mount", "reboot", "sh", "sleep", "switch_root"]  # fmt: skip
_DIRECTORIES = ("bin", "dev", "image", "modules", "proc", "root", "scratch", "sys")


class CpioWriter:
    """Collects entries of a newc archive; ``finish`` returns it whole. All belongs to root."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._entry(name, stat.S_IFDIR | mode, b"", links=2)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._entry(name, stat.S_IFREG | mode, content)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device."""
        self._entry(name, stat.S_IFCHR | mode, b"", device=(major, minor))

    def finish(self) -> bytes:
        """The archive, filled up to a whole number of 512 bytes: more archives may follow."""
        self._inode = -1
        self._entry("TRAILER!!!", 0, b"")
        archive = b"".join(self._parts)
        return archive + bytes(-len(archive) % 512)

    def _entry(
        self, name: str, mode: int, content: bytes, links: int = 1, device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        # inode mode uid gid links mtime size, device of the archive (2), of the node (2), name
        # length, checksum (unused in newc)
        numbers = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(path), 0)
        head = b"070701" + b"".join(b"%08X" % number for number in numbers) + path
        self._parts += [head, bytes(-len(head) % 4), content, bytes(-len(content) % 4)]


def read_cpio(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """The entries of a newc archive: name to (mode with type, content). For tests and checks.

    Raises:
        ValueError: it is none.
    """
    entries: dict[str, tuple[int, bytes]] = {}
    position = 0
    while position < len(archive):
        if archive[position] == 0:
            position += 1
            continue
        if archive[position : position + 6] != b"070701":
            raise ValueError(f"no cpio header at byte {position}")
        fields = [int(archive[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        start = position + 110 + name_size
        name = archive[position + 110 : start - 1].decode()
        start += -start % 4
        position = start + size + (-(start + size) % 4)
        if name != "TRAILER!!!":
            entries[name] = (mode, archive[start : start + size])
    return entries


def parse_module_list(text: str) -> list[str]:
    """The names in ``images/modules.txt``: one a line, ``#`` begins a comment."""
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def modinfo(module: bytes) -> dict[str, list[str]]:
    """The ``.modinfo`` section of a kernel module (64-bit little-endian ELF): key to values.

    Raises:
        ValueError: it is no such module.
    """
    if module[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    try:
        (table,) = struct.unpack_from("<Q", module, 0x28)
        entry_size, count, names_index = struct.unpack_from("<HHH", module, 0x3A)
        # each: name, type, flags, address, offset, size, …
        sections = [
            struct.unpack_from("<IIQQQQ", module, table + i * entry_size) for i in range(count)
        ]
        names = sections[names_index][4]
    except (struct.error, IndexError) as error:
        raise ValueError("a damaged ELF file") from error
    for name, _type, _flags, _address, offset, size in sections:
        if module[names + name : names + name + 9] == b".modinfo\0":
            found: dict[str, list[str]] = {}
            for word in module[offset : offset + size].split(b"\0"):
                key, equals, value = word.decode("utf-8", "replace").partition("=")
                if equals:
                    found.setdefault(key, []).append(value)
            return found
    raise ValueError("an ELF file without .modinfo")


def load_order(
    wanted: Iterable[str],
    dependencies: Callable[[str], Sequence[str]],
) -> list[str]:
    """*wanted* and all that they depend on, each after its dependencies, none twice.

    *dependencies* gives what a module needs loaded before it. Module names are normalised
    (``-`` is ``_``).

    Raises:
        ValueError: modules depend on each other in a circle.
    """
    order: list[str] = []
    under_way: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        if name in under_way:
            raise ValueError(f"modules depend on each other: {' -> '.join([*under_way, name])}")
        under_way.append(name)
        for other in dependencies(name):
            visit(_normal(other))
        under_way.pop()
        order.append(name)

    for name in wanted:
        visit(_normal(name))
    return order


class ModuleTree:
    """The modules of one kernel, as its Debian package lays them out.

    The package brings no ``modules.dep`` (``depmod`` writes that at installation), so the
    dependencies are read where depmod reads them: in each module's ``.modinfo``.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._contents: dict[str, bytes] = {}
        builtin = (directory / "modules.builtin").read_text(encoding="ascii").split()
        self._builtin = {_module_name(Path(path)) for path in builtin}
        self._paths = {_module_name(path): path for path in directory.glob("kernel/**/*.ko*")}

    def select(self, wanted: Iterable[str]) -> dict[str, bytes]:
        """Name to content (not compressed) of *wanted* and their dependencies, in load order.

        Raises:
            ImageError: the kernel has no such module, or one is damaged.
        """
        order = load_order(wanted, self._dependencies)
        return {name: self._content(name) for name in order if name not in self._builtin}

    def _dependencies(self, name: str) -> list[str]:
        if name in self._builtin:
            return []
        try:
            info = modinfo(self._content(name))
        except ValueError as error:
            raise ImageError(
                f"The kernel module {self._paths[name].name} is damaged: {error}",
                hint="build the image again with --force",
            ) from error
        needed = [word for value in info.get("depends", []) for word in value.split(",") if word]
        # "softdep=pre: crc32c post: x": asked of modprobe, which is not there to be asked. A
        # name that is no module (an alias, as crc32c is of several) is served by what is built in.
        for value in info.get("softdep", []):
            words = value.partition("pre:")[2].partition("post:")[0].split()
            needed += [word for word in words if _normal(word) in self._paths]
        return needed

    def _content(self, name: str) -> bytes:
        if name not in self._contents:
            path = self._paths.get(name)
            if path is None:
                raise ImageError(
                    f"The guest's kernel {self._directory.name} has no module {name!r}.",
                    hint="images/modules.txt names the modules: this kernel may have it built in "
                    "under another name, or left it out",
                )
            content = path.read_bytes()
            try:
                self._contents[name] = lzma.decompress(content) if path.suffix == ".xz" else content
            except lzma.LZMAError as error:
                raise ImageError(
                    f"The kernel module {path.name} is damaged: {error}",
                    hint="build the image again with --force",
                ) from error
        return self._contents[name]


def build_initrd(init: bytes, busybox: bytes, modules: Mapping[str, bytes]) -> bytes:
    """The archive: *init*, *busybox* under its names, *modules* and ``/modules.order``."""
    archive = CpioWriter()
    for name in _DIRECTORIES:
        archive.directory(name)
    # The kernel opens this for PID 1 before anything is mounted.
    archive.character_device("dev/console", 5, 1)
    archive.file("init", init, 0o755)
    archive.file("bin/busybox", busybox, 0o755)
    for name in _BUSYBOX_NAMES:
        archive.symlink(f"bin/{name}", "busybox")
    for name, content in modules.items():
        archive.file(f"modules/{name}.ko", content)
    order = "".join(f"/modules/{name}.ko\n" for name in modules)
    archive.file("modules.order", order.encode())
    return archive.finish()


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _module_name(path: Path) -> str:
    return _normal(path.name.split(".ko", 1)[0])
