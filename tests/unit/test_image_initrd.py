"""The initial RAM disk: its archive, byte for byte, and the order of kernel modules."""

from __future__ import annotations

import lzma
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from vmkernel.errors import ImageError
from vmkernel.image.initrd import (
    CpioWriter,
    ModuleTree,
    build_initrd,
    load_order,
    modinfo,
    parse_module_list,
    read_cpio,
)
from vmkernel.resources import resource_dir


def elf_with_modinfo(**values: str) -> bytes:
    """A 64-bit ELF file of nothing but a .modinfo section and the sections' names."""
    info = b"".join(f"{key}={value}".encode() + b"\0" for key, value in values.items())
    names = b"\0.modinfo\0.shstrtab\0"
    header_end = 64
    table = header_end + len(info) + len(names)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = [
        (0, 0, 0, 0, 0, 0),
        (1, 1, 0, 0, header_end, len(info)),
        (10, 3, 0, 0, header_end + len(info), len(names)),
    ]
    rows = b"".join(struct.pack("<IIQQQQIIQQ", *row, 0, 0, 0, 0) for row in sections)
    return header + info + names + rows


def module_tree(directory: Path, builtin: str = "", **modules: bytes) -> ModuleTree:
    (directory / "kernel/fs").mkdir(parents=True)
    (directory / "modules.builtin").write_text(builtin)
    for name, content in modules.items():
        (directory / f"kernel/fs/{name}.ko.xz").write_bytes(lzma.compress(content))
    return ModuleTree(directory)


def test_modules_come_after_what_they_need() -> None:
    needs = {"erofs": ["libcrc32c", "netfs"], "libcrc32c": ["crc32c"], "netfs": [], "crc32c": []}
    order = load_order(["erofs", "libcrc32c"], lambda name: needs[name])
    assert order == ["crc32c", "libcrc32c", "netfs", "erofs"]


def test_a_circle_of_modules_is_an_error() -> None:
    with pytest.raises(ValueError, match="a -> b -> a"):
        load_order(["a"], lambda name: {"a": ["b"], "b": ["a"]}[name])


def test_dashes_and_underscores_are_one(tmp_path: Path) -> None:
    tree = module_tree(
        tmp_path,
        **{"virtio-rng": elf_with_modinfo(depends="rng-core"), "rng_core": elf_with_modinfo()},
    )
    assert list(tree.select(["virtio_rng"])) == ["rng_core", "virtio_rng"]


def test_modules_are_decompressed_and_what_is_built_in_is_skipped(tmp_path: Path) -> None:
    erofs = elf_with_modinfo(depends="libcrc32c,fscache", name="erofs")
    tree = module_tree(
        tmp_path, "kernel/fs/fscache.ko\nkernel/fs/ext4.ko\n",
        erofs=erofs, libcrc32c=elf_with_modinfo(softdep="pre: crc32c quick post: late"),
        quick=elf_with_modinfo(), late=elf_with_modinfo(),
    )  # fmt: skip
    selected = tree.select(["ext4", "erofs"])
    # crc32c is an alias, served by what is built in; "post" modules are not needed to load.
    assert list(selected) == ["quick", "libcrc32c", "erofs"]
    assert selected["erofs"] == erofs


def test_a_module_that_the_kernel_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="'nosuch'"):
        module_tree(tmp_path).select(["nosuch"])


def test_a_damaged_module_is_named(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, erofs=b"no elf", overlay=elf_with_modinfo())
    with pytest.raises(ImageError, match="erofs"):
        tree.select(["erofs"])
    (tmp_path / "kernel/fs/overlay.ko.xz").write_bytes(b"no xz")
    with pytest.raises(ImageError, match="overlay"):
        tree.select(["overlay"])


def test_modinfo_of_garbage() -> None:
    whole = elf_with_modinfo(depends="a,b", license="GPL")
    assert modinfo(whole) == {"depends": ["a,b"], "license": ["GPL"]}
    for garbage in (b"", b"\x7fELF", whole[:70], whole[:-100]):
        with pytest.raises(ValueError, match="ELF"):
            modinfo(garbage)


def test_module_list_has_comments() -> None:
    assert parse_module_list("# x\n a  # b\n\nc\n") == ["a", "c"]
    own = parse_module_list((resource_dir("images") / "modules.txt").read_text())
    assert {"virtio_mmio", "virtio_blk", "erofs", "overlay", "ext4"} <= set(own)


def test_archive_holds_what_the_guest_needs() -> None:
    archive = build_initrd(b"#!/bin/sh\n", b"BUSYBOX", {"b": b"1", "a": b"22"})
    entries = read_cpio(archive)
    assert entries["init"] == (stat.S_IFREG | 0o755, b"#!/bin/sh\n")
    assert entries["bin/sh"] == (stat.S_IFLNK | 0o777, b"busybox")
    assert stat.S_ISCHR(entries["dev/console"][0])
    assert entries["modules.order"][1] == b"/modules/b.ko\n/modules/a.ko\n"
    assert entries["modules/a.ko"][1] == b"22"
    assert archive == build_initrd(b"#!/bin/sh\n", b"BUSYBOX", {"b": b"1", "a": b"22"})


def test_the_init_script_calls_only_what_the_archive_has() -> None:
    entries = read_cpio(build_initrd(b"", b"", {}))
    script = (resource_dir("images") / "init").read_text()
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    builtin = {"cd", "exec", "exit", "export", "read", "shift", "die", "try"}
    called = {
        words[0] if words[0] != "try" else script_words(line)[2]
        for line in script.splitlines()
        if (words := script_words(line)) and words[0].isalpha() and line.startswith(words[0])
    }
    assert {"mount", "ln", "hostname", "chown"} <= called
    keywords = {"if", "while", "for", "done", "fi", "do", "esac", "then", "else", "root"}
    for name in called - builtin - keywords:
        assert f"bin/{name}" in entries, name


def script_words(line: str) -> list[str]:
    import shlex

    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


def test_a_second_archive_may_follow() -> None:
    first = build_initrd(b"x", b"y", {})
    second = CpioWriter()
    second.directory("vmkernel", 0o700)
    second.file("vmkernel/start.py", b"print()\n")
    assert len(first) % 512 == 0
    entries = read_cpio(first + second.finish())
    assert {"init", "vmkernel", "vmkernel/start.py"} <= entries.keys()


def test_cpio_itself_reads_the_archive(tmp_path: Path) -> None:
    cpio = shutil.which("cpio")
    if cpio is None:
        pytest.skip("cpio is not installed")
    archive = CpioWriter()
    archive.directory("d", 0o750)
    for size in range(6):  # every alignment
        archive.file(f"d/{'n' * size}f", b"x" * size, 0o640)
    archive.symlink("link", "d/f")
    result = subprocess.run(
        [cpio, "--extract", "--quiet"], input=archive.finish(), cwd=tmp_path,
        capture_output=True, check=True,
    )  # fmt: skip
    assert result.stderr == b""
    assert (tmp_path / "d/nnnnnf").read_bytes() == b"xxxxx"
    assert stat.S_IMODE((tmp_path / "d/f").stat().st_mode) == 0o640
    assert (tmp_path / "link").readlink() == Path("d/f")


def test_garbage_is_no_archive() -> None:
    with pytest.raises(ValueError, match="byte 0"):
        read_cpio(b"garbage" * 100)
