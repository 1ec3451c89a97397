"""The system calls that a QEMU in bubblewrap may not make: a seccomp filter, as bytes.

Where it stands: ``vm.wall`` hands it to bubblewrap, which loads it in the instant before QEMU
starts.  QEMU's own filter (``-sandbox on``, ``vm.command``) is loaded later, by QEMU, and knows
nothing of files; this one also takes what no QEMU of ours has use for, whoever runs in its place:
processes, sockets (its own are inherited), names and rights of files, and the corners of the kernel
in which its holes have been.  What is refused says EPERM and is survived; nothing is killed.

It is a list of what is denied, like QEMU's own, Docker's and Flatpak's.  Rejected: a list of what
is allowed.  It would have to follow every version of QEMU, glibc and glib, here and under KVM, and
one that has fallen behind ends a VM at a call that nobody has tested.

Rejected: libseccomp, another dependency for a table and five kinds of instructions.
Sources: seccomp(2); linux/seccomp.h, filter.h, bpf_common.h; the numbers are of the kernel's
arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

import errno
import struct

DENIED: dict[str, int] = {
    # Other processes: a child, another's memory and descriptors.  (Threads: see below.)
    "fork": 57, "vfork": 58, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
    "kcmp": 312, "pidfd_open": 434, "pidfd_getfd": 438, "process_madvise": 440,
    # Sockets that were not inherited; vsock, for one, knows no network namespace
    "socket": 41,
    # Other namespaces and file systems
    "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
    "fspick": 433, "mount_setattr": 442, "quotactl": 179, "quotactl_fd": 443,
    # Rights, times and names of files.  The owner of a file may change its mode by a descriptor
    # that is open for reading, and then open it for writing by /proc/self/fd
    "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93,
    "lchown": 94, "fchownat": 260, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198,
    "fremovexattr": 199, "link": 86, "linkat": 265, "mknod": 133, "mknodat": 259,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300,
    # Locks: by the descriptor that keeps the VM's slot, any other could be taken, or its own given
    # back.  (fcntl's: see below.)
    "flock": 73,
    # Memory that counts as nobody's
    "memfd_create": 319, "memfd_secret": 447, "shmget": 29,
    # Corners of the kernel
    "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298,
    "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "modify_ldt": 154, "init_module": 175, "delete_module": 176, "finit_module": 313,
    "kexec_load": 246, "kexec_file_load": 320, "syslog": 103,
    # Another user, and what is the administrator's
    "setuid": 105, "setgid": 106, "setreuid": 113, "setregid": 114, "setgroups": 116,
    "setresuid": 117, "setresgid": 119, "setfsuid": 122, "setfsgid": 123, "capset": 126,
    "iopl": 172, "ioperm": 173, "acct": 163, "settimeofday": 164, "clock_settime": 227,
    "clock_adjtime": 305, "adjtimex": 159, "swapon": 167, "swapoff": 168, "reboot": 169,
    "sethostname": 170, "setdomainname": 171,
}  # fmt: skip
"""Each by its number on x86-64, the one architecture of a microvm."""

_CLONE, _CLONE3, _FCNTL = 56, 435, 72
_CLONE_THREAD = 0x10000
_LOCKS = (6, 7, 37, 38)  # F_SETLK, F_SETLKW, and those of open file descriptions (fcntl.h)
_X86_64 = 0xC000003E  # AUDIT_ARCH_X86_64: calls of another architecture have other numbers
_X32 = 0x40000000  # its second set of numbers

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT_1, _ARGUMENT_2 = 0, 4, 16, 24  # places in struct seccomp_data
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def seccomp_filter(allowed: frozenset[str] = frozenset()) -> bytes:
    """The program, as seccomp(2) takes it (an array of struct sock_filter).

    ``allowed``: calls that it lets through all the same; a network proxy (``host.network``) makes
    sockets.
    """
    refused = _REFUSE | errno.EPERM
    program = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, _X86_64, yes=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _X32, no=1),
        _step(_RETURN, refused),
        # glibc asks for clone3 first; its flags lie in memory, which a filter cannot read.  Where
        # there is none it takes clone.
        _step(_EQUAL, _CLONE3, no=1),
        _step(_RETURN, _REFUSE | errno.ENOSYS),
    ]
    for name, number in DENIED.items():
        if name not in allowed:
            program += [_step(_EQUAL, number, no=1), _step(_RETURN, refused)]
    program += [
        _step(_EQUAL, _FCNTL, no=2 + 2 * len(_LOCKS)),
        _step(_LOAD, _ARGUMENT_2),
    ]
    for command in _LOCKS:
        program += [_step(_EQUAL, command, no=1), _step(_RETURN, refused)]
    program += [
        _step(_RETURN, _ALLOW),
        # A thread has this flag; a process has not
        _step(_EQUAL, _CLONE, yes=1),
        _step(_RETURN, _ALLOW),
        _step(_LOAD, _ARGUMENT_1),
        _step(_ANY_BIT, _CLONE_THREAD, no=1),
        _step(_RETURN, _ALLOW),
        _step(_RETURN, refused),
    ]
    return b"".join(program)


def _step(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    """One instruction; ``yes`` and ``no``: how many are passed over when a test says so."""
    return struct.pack("<HBBI", code, yes, no, value)
