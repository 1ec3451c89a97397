"""A shared object of some 900 bytes for two things that QEMU has no option for.

Where it stands: ``vm.wall`` hands it in ``LD_PRELOAD`` to each QEMU that runs a clone.

**No huge pages.** QEMU asks for them (madvise) for its buffer of translated code and for each
block of memory that a device has: 2 MiB for some kB of ACPI tables. Loaded, the object calls
prctl(PR_SET_THP_DISABLE). Measured (QEMU 7.2, TCG, a clone after its first cell): 2.2 MiB less,
and no slower: clearing 8 huge pages takes as long as 4,000 small ones.

**Opening the guest's RAM without the right to write**, where QEMU has no word of its own for
that. A clone maps the template's RAM privately, which takes no right to write to the file
(mmap(2): MAP_PRIVATE with PROT_WRITE needs a descriptor open for reading). QEMU before 8.2 asks
for that right all the same, and so the template would lie open to a QEMU that was broken out of.
Later ones are told ``readonly=on,rom=off``.

For that the object defines ``open64`` and the names that stand for it in other builds. They do
what libc's do, but for one thing: where opening for reading and writing is *refused* (EROFS,
EACCES), it is opened for reading. The refusal is the kernel's and comes first, so a shim that is
not loaded, or does not take, opens nothing: QEMU ends with its message.

It is made here, byte by byte, and not by a compiler, which users' machines do not have; nor is a
binary kept in the repository, which nobody could read. Rejected: a copy of the RAM in a sealed
memfd (0.2-0.4 s and 200-400 MiB).

Sources: the System V ABI and its x86-64 supplement (ELF, symbol tables, relocation, calls,
initialisation functions); elf(5); open(2); PR_SET_THP_DISABLE(2const); the opcodes are of Intel's
manual, volume 2.
"""

from __future__ import annotations

import struct

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
    segment,
    symbol,
)

NAMES = ("open64", "open", "__open64_2", "__open_2")
"""What it defines.  The last two are called by a build with _FORTIFY_SOURCE, without a mode."""

_CODE = bytes.fromhex(
    # __open64_2(path, flags):
    "31 d2"  #             xor   edx, edx            no mode
    # open64(path, flags, mode): rdi, esi, edx
    "41 89 d2"  #          mov   r10d, edx           openat's 4th: mode
    "89 f2"  #             mov   edx, esi            its 3rd: flags
    "48 89 fe"  #          mov   rsi, rdi            its 2nd: path
    "bf 9c ff ff ff"  #    mov   edi, -100           its 1st: AT_FDCWD
    "b8 01 01 00 00"  #    mov   eax, 257            SYS_openat
    "0f 05"  #             syscall
    "83 f8 e2"  #          cmp   eax, -30            EROFS?
    "74 05"  #             je    refused
    "83 f8 f3"  #          cmp   eax, -13            EACCES?
    "75 1e"  #             jne   done
    # refused:
    "89 d1"  #             mov   ecx, edx
    "83 e1 43"  #          and   ecx, 0x43           O_ACCMODE | O_CREAT
    "83 f9 02"  #          cmp   ecx, 2              O_RDWR, and not to be made?
    "75 14"  #             jne   done
    "41 89 c0"  #          mov   r8d, eax            the first refusal is what is told
    "83 e2 fc"  #          and   edx, -4             O_RDONLY instead
    "b8 01 01 00 00"  #    mov   eax, 257            SYS_openat
    "0f 05"  #             syscall
    "85 c0"  #             test  eax, eax
    "79 03"  #             jns   done
    "44 89 c0"  #          mov   eax, r8d
    # done:
    "85 c0"  #             test  eax, eax
    "78 01"  #             js    failed
    "c3"  #                ret
    # failed: errno = -eax; return -1
    "f7 d8"  #             neg   eax
    "50"  #                push  rax                 kept; and the stack is aligned for a call
)
_AFTER_CALL = bytes.fromhex(
    "59"  #                pop   rcx
    "89 08"  #             mov   [rax], ecx
    "83 c8 ff"  #          or    eax, -1
    "c3"  #                ret
)
_AT_LOAD = bytes.fromhex(
    "bf 29 00 00 00"  #    mov   edi, 41             PR_SET_THP_DISABLE
    "be 01 00 00 00"  #    mov   esi, 1
    "31 d2"  #             xor   edx, edx
    "45 31 d2"  #          xor   r10d, r10d
    "45 31 c0"  #          xor   r8d, r8d
    "b8 9d 00 00 00"  #    mov   eax, 157            SYS_prctl
    "0f 05"  #             syscall
    "c3"  #                ret
)
_SHORT_ENTRY, _ENTRY = 0, 2  # of __open64_2 and of open64, in the code
_LOCATION = "__errno_location"  # libc's, the address of this thread's errno (LSB)

_RELA = 24


def shim() -> bytes:
    """The object's bytes; always the same."""
    names = ("", *NAMES, _LOCATION)
    strings = "\0".join(names).encode() + b"\0"
    offset = {name: strings.index(b"\0" + name.encode() + b"\0") + 1 for name in names[1:]}

    # One after the other: headers, symbols, strings, hash table, relocation, code; then what the
    # loader writes to and maps a page further on: the dynamic section, and the address it finds.
    at_symbols = EHDR + 4 * PHDR
    at_strings = at_symbols + len(names) * SYM
    at_hash = aligned(at_strings + len(strings))
    hash_table = _hash_table(len(names))
    at_rela = aligned(at_hash + len(hash_table))
    at_code = at_rela + _RELA
    code_size = len(_CODE) + 6 + len(_AFTER_CALL)
    at_load = at_code + code_size
    at_dynamic = aligned(at_load + len(_AT_LOAD))
    at_slot = at_dynamic + 10 * DYN
    size = at_slot + 8

    symbols = bytes(SYM)
    for name in NAMES:
        entry = _SHORT_ENTRY if name.endswith("_2") else _ENTRY
        symbols += symbol(offset[name], 1, at_code + entry, code_size - entry)
    symbols += symbol(offset[_LOCATION], 0, 0, 0)  # section 0: not defined here
    # R_X86_64_GLOB_DAT (6): the address of the last symbol goes into the slot
    rela = struct.pack("<QQq", at_slot + PAGE, (len(names) - 1) << 32 | 6, 0)
    # call [rip + distance], counted from the end of this instruction
    call = b"\xff\x15" + struct.pack("<i", at_slot + PAGE - (at_code + len(_CODE) + 6))
    dynamic = b"".join(
        struct.pack("<QQ", tag, value)
        for tag, value in (
            (4, at_hash),  # DT_HASH
            (5, at_strings),  # DT_STRTAB
            (6, at_symbols),  # DT_SYMTAB
            (10, len(strings)),  # DT_STRSZ
            (11, SYM),  # DT_SYMENT
            (7, at_rela),  # DT_RELA
            (8, _RELA),  # DT_RELASZ
            (9, _RELA),  # DT_RELAENT
            (12, at_load),  # DT_INIT
            (0, 0),  # DT_NULL
        )
    )
    headers = file_header() + b"".join(
        (
            segment(1, READ | RUN, 0, 0, at_dynamic),  # PT_LOAD: all that is not written to
            segment(1, READ | WRITE, at_dynamic, PAGE, size - at_dynamic),  # PT_LOAD
            segment(2, READ | WRITE, at_dynamic, PAGE, 10 * DYN),  # PT_DYNAMIC
            segment(0x6474E551, READ | WRITE, 0, 0, 0),  # PT_GNU_STACK: not to be executed
        )
    )
    parts = {
        0: headers,
        at_symbols: symbols,
        at_strings: strings,
        at_hash: hash_table,
        at_rela: rela,
        at_code: _CODE + call + _AFTER_CALL + _AT_LOAD,
        at_dynamic: dynamic,
        at_slot: bytes(8),
    }
    image = bytearray(size)
    for place, part in parts.items():
        image[place : place + len(part)] = part
    return bytes(image)


def _hash_table(symbols: int) -> bytes:
    """A table of one bucket, in which every symbol is in one chain: no hash need be known."""
    chain = [0, *range(2, symbols), 0]
    return struct.pack(f"<{3 + symbols}I", 1, symbols, 1, *chain)
