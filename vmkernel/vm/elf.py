"""Shared objects, as much of them as is made or read here (ELF, 64 bits, x86-64).

Where it stands: under ``vm.shim`` and ``vm.absent``, which make one each.

Source: the System V ABI and its x86-64 supplement; the Linux Standard Base, "Symbol Versioning";
elf(5).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

PAGE = 0x1000
EHDR, PHDR, SYM, DYN = 64, 56, 24, 16  # sizes of one each, for 64 bits
READ, WRITE, RUN = 4, 2, 1

_SHDR = 64
_DYNAMIC, _DYNSYM, _VERNEED = 6, 11, 0x6FFFFFFE  # types of sections
_NEEDED = 1  # DT_NEEDED
_FUNCTIONS = (2, 10)  # STT_FUNC, STT_GNU_IFUNC


class Object(NamedTuple):
    """What an executable or a library wants, and what it has."""

    needed: list[str]
    """Libraries"""
    wanted: list[str]
    """Symbols that are to be found elsewhere"""
    functions: set[str]
    others: set[str]
    """What it has besides functions"""
    versions: dict[str, list[str]]
    """Library -> names of versions that are wanted of it"""


def read_object(path: str) -> Object:
    """Raises OSError, or ValueError, IndexError and struct.error for what is no such file."""
    data = Path(path).read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is no ELF file of 64 bits")
    at, count = struct.unpack_from("<40xQ12xH", data)[0], struct.unpack_from("<60xH", data)[0]
    sections = [
        struct.unpack_from("<4xI16xQQII", data, at + number * _SHDR) for number in range(count)
    ]

    def text(strings: int, offset: int) -> str:
        start = sections[strings][1] + offset
        return data[start : data.index(b"\0", start)].decode()

    found = Object([], [], set(), set(), {})
    for kind, place, size, link, _ in sections:
        if kind == _DYNAMIC:
            for tag, value in struct.iter_unpack("<QQ", data[place : place + size // DYN * DYN]):
                if tag == _NEEDED:
                    found.needed.append(text(link, value))
        elif kind == _DYNSYM:
            for name, info, section in struct.iter_unpack("<IBxH16x", data[place : place + size]):
                if not name:
                    continue
                if not section:
                    found.wanted.append(text(link, name))
                elif info & 15 in _FUNCTIONS:
                    found.functions.add(text(link, name))
                else:
                    found.others.add(text(link, name))
        elif kind == _VERNEED:
            step = 1
            while step:
                _, entries, file, first, step = struct.unpack_from("<HHIII", data, place)
                versions = found.versions.setdefault(text(link, file), [])
                entry = place + first
                for _ in range(entries):
                    name, following = struct.unpack_from("<8xII", data, entry)
                    versions.append(text(link, name))
                    entry += following
                place += step
    return found


def file_header() -> bytes:
    """The beginning of a shared object with four program headers."""
    # Class 64, little-endian, version 1, System V; a shared object (3) for x86-64 (62)
    ident = b"\x7fELF" + bytes((2, 1, 1, 0)) + bytes(8)
    rest = (3, 62, 1, 0, EHDR, 0, 0, EHDR, PHDR, 4, 0, 0, 0)  # no entry point, no sections
    return ident + struct.pack("<HHIQQQIHHHHHH", *rest)


def segment(kind: int, flags: int, place: int, shift: int, size: int) -> bytes:
    """A program header; in memory it lies ``shift`` bytes further on."""
    address = place + shift
    return struct.pack("<IIQQQQQQ", kind, flags, place, address, address, size, size, PAGE)


def symbol(name: int, section: int, value: int, size: int) -> bytes:
    """A function; ``section`` 0: it is to be found elsewhere."""
    # 0x12: global, a function
    return struct.pack("<IBBHQQ", name, 0x12, 0, section, value, size)


def aligned(place: int) -> int:
    """The next place for a number of 64 bits."""
    return (place + 7) & ~7
