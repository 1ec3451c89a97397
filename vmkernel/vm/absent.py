"""Libraries that a clone's QEMU is started without: one object in memory stands for all of them.

A distribution's QEMU is linked against some 50 libraries, for everything that it can do: VNC,
networks, migration over RDMA, a disassembler.  A microVM of ours does none of that, and yet each
clone maps them, writes to their relocated data and looks up 8,000 names.  Measured (Debian 12, QEMU
7.2): `qemu --version` 20 ms with them and 11 without, and 2.2 MiB less of private memory for each
clone.  What is not there has no holes, either.

The object has every function of theirs that QEMU refers to, and each is the same instruction,
which ends the process (ud2).  So a QEMU that needs one after all goes on with no wrong answer.
``vm.sandbox`` makes the object once for each QEMU, from QEMU's own tables, and starts a microVM
with it; a QEMU that does not like it gets its libraries, and so does each after one that ended by
such a call (`vm.sandbox.need_libraries`), and each under KVM, where it was never tried.
``vm.wall`` puts links to the object, by
the libraries' names, into the directory where the loader looks first.  (It maps an object once,
whatever its names: glibc, elf/dl-load.c, compares device and inode.)

Left as they are: libraries of which QEMU uses data, or that another library needs, or that QEMU
calls when it starts (gnutls, numa, uring, fdt, seccomp).

Sources: as for ``vm.elf``; ld.so(8).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from vmkernel.vm.elf import (
    DYN,
    EHDR,
    PAGE,
    PHDR,
    READ,
    RUN,
    SYM,
    WRITE,
    aligned,
    file_header,
    read_object,
    segment,
    symbol,
)

UNUSED = (
    "libaio",  # disks by another way than threads
    "libbpf",  # network cards
    "libcapstone",  # a disassembler, for logs and the monitor
    "libfuse3",  # exporting disks
    "libgio-2.0", "libgobject-2.0",  # a display over D-Bus
    "libibverbs", "librdmacm",  # migration over RDMA
    "libjpeg", "libpng16", "libsasl2",  # VNC
    "libpixman-1",  # any display
    "libpmem",  # persistent memory
    "libslirp", "libvdeplug",  # networks
    "libudev",  # disks on several paths
    "libzstd",  # compressed migration and images
)  # fmt: skip
_NAME = "libvmkernel-absent.so"
_BUCKETS = 256
_UD2 = b"\x0f\x0b"


class Absent(NamedTuple):
    """Libraries, and the object that stands for them."""

    names: list[str]
    data: bytes


def absent_for(qemu: str, libraries: Mapping[str, str]) -> Absent:
    """What ``qemu`` is started without, of the libraries that it loads (name -> path).

    Raises OSError, or ValueError, IndexError, KeyError and struct.error for what is not understood.
    """
    main = read_object(qemu)
    others = {name: read_object(path) for name, path in libraries.items()}
    out = {
        name
        for name in main.needed
        if name in others
        and name.partition(".so")[0] in UNUSED
        and not others[name].others.intersection(main.wanted)
    }
    left: set[str] = set()
    while True:
        left = _loaded(main.needed, out, {name: each.needed for name, each in others.items()})
        needed = out.intersection(*[[need for name in left for need in others[name].needed]])
        if not needed:
            break
        out -= needed
    there = set().union(*(others[name].functions for name in left))
    calls = set().union(*(others[name].functions for name in out)).intersection(main.wanted) - there
    versions = {version for name in out for version in main.versions.get(name, ())}
    return Absent(sorted(out), stand_in(sorted(calls), sorted(versions)))


def _loaded(first: list[str], out: set[str], needs: Mapping[str, list[str]]) -> set[str]:
    """All libraries that are loaded for these, where some are left out."""
    found: set[str] = set()
    ahead = [name for name in first if name not in out]
    while ahead:
        name = ahead.pop()
        if name in found or name not in needs:  # the loader's own
            continue
        found.add(name)
        ahead += [need for need in needs[name] if need not in out]
    return found


def stand_in(functions: list[str], versions: list[str]) -> bytes:
    """A shared object that has these functions, and these versions of itself."""
    names = [_NAME, *functions, *versions]
    strings = b"\0"
    offset: dict[str, int] = {}
    for name in names:
        offset[name] = len(strings)
        strings += name.encode() + b"\0"
    at_symbols = EHDR + 4 * PHDR
    at_strings = at_symbols + (1 + len(functions)) * SYM
    at_hash = aligned(at_strings + len(strings))
    hashes = _hash_table(functions)
    at_numbers = aligned(at_hash + len(hashes))
    # Each symbol is of version 1, the object itself: it does for any that is wanted
    numbers = struct.pack(f"<{1 + len(functions)}H", 0, *[1] * len(functions))
    at_versions = aligned(at_numbers + len(numbers))
    definitions = b""
    for number, name in enumerate([_NAME, *versions], 1):
        following = 0 if number == 1 + len(versions) else 28
        definitions += struct.pack(
            "<HHHHIIIII", 1, number == 1, number, 1, _hash(name), 20, following, offset[name], 0
        )
    at_code = aligned(at_versions + len(definitions))
    at_dynamic = aligned(at_code + len(_UD2))
    entries = (
        (14, offset[_NAME]),  # DT_SONAME
        (4, at_hash),  # DT_HASH
        (5, at_strings),  # DT_STRTAB
        (6, at_symbols),  # DT_SYMTAB
        (10, len(strings)),  # DT_STRSZ
        (11, SYM),  # DT_SYMENT
        (0x6FFFFFF0, at_numbers),  # DT_VERSYM
        (0x6FFFFFFC, at_versions),  # DT_VERDEF
        (0x6FFFFFFD, 1 + len(versions)),  # DT_VERDEFNUM
        (0, 0),  # DT_NULL
    )
    size = len(entries) * DYN
    parts = {
        0: file_header()
        + segment(1, READ | RUN, 0, 0, at_dynamic)  # PT_LOAD: all that is not written to
        + segment(1, READ | WRITE, at_dynamic, PAGE, size)  # PT_LOAD
        + segment(2, READ | WRITE, at_dynamic, PAGE, size)  # PT_DYNAMIC
        + segment(0x6474E551, READ | WRITE, 0, 0, 0),  # PT_GNU_STACK: not to be executed
        at_symbols: bytes(SYM)
        + b"".join(symbol(offset[name], 1, at_code, len(_UD2)) for name in functions),
        at_strings: strings,
        at_hash: hashes,
        at_numbers: numbers,
        at_versions: definitions,
        at_code: _UD2,
        at_dynamic: b"".join(struct.pack("<QQ", *entry) for entry in entries),
    }
    image = bytearray(at_dynamic + size)
    for place, part in parts.items():
        image[place : place + len(part)] = part
    return bytes(image)


def _hash(name: str) -> int:
    """The System V ABI's, of symbols' and versions' names."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
    return value


def _hash_table(functions: list[str]) -> bytes:
    buckets, chain = [0] * _BUCKETS, [0]
    for number, name in enumerate(functions, 1):
        bucket = _hash(name) % _BUCKETS
        chain.append(buckets[bucket])
        buckets[bucket] = number
    return struct.pack(f"<{2 + _BUCKETS + len(chain)}I", _BUCKETS, len(chain), *buckets, *chain)
