"""QEMU's command line, as a pure function of a machine's description.

Where it stands: ``vm.template`` and ``vm.machine`` describe a machine, this module says how QEMU
is started for it, ``vm.qemu`` starts it. Nothing here reads a file, an environment variable or a
clock, so that the two command lines (KVM and TCG) can be read whole in ``tests/unit``.

A template and its clones are the *same* machine; only where the RAM's writes go
(``ram_share``) and whether QEMU waits for a state (``incoming``) differ. QEMU checks part of that
when it loads a state (device names, RAM block names and sizes) and silently misbehaves on the
rest, so `machine_fingerprint` goes into the template's key.

The devices, and why no others: no network, no PCI, no USB, no display, no PIT, no PIC (microvm can
live without; each would be emulated code that a hostile guest can reach). Four of microvm's eight
virtio-mmio transports are used: root image, scratch disk, entropy, ports.
"""

from __future__ import annotations

import json
from typing import Literal

import msgspec

Accelerator = Literal["kvm", "tcg"]

# TCG keeps translated code in a buffer that is allocated as it fills and thrown away whole when
# full. QEMU's own default is 1 GiB: a busy guest would slowly grow by that much, for each VM.
# A guest that imported numpy, pandas and matplotlib has translated some 40 MB.
TCG_CODE_BUFFER_MIB = 128

# Port numbers on the virtio-serial device. Port 0 is reserved for a console.
KERNEL_PORT_NR = 1
AGENT_PORT_NR = 2
CONTROL_PORT_NR = 3
WORKSPACE_PORT_NR = 4
NETWORK_PORT_NR = 5
MAX_PORTS = 8  # room for more, without another guest layout

# What seccomp takes from QEMU: obsolete system calls, setuid and friends, fork and exec, and
# changing priorities or CPU sets. A QEMU that was broken out of cannot start a program.
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# A full disk of the host's is the guest's I/O error. QEMU's own way is to stop the machine and wait
# for somebody: a cell would hang without a word.
DISK_ERRORS = "werror=report,rerror=report"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One microVM, as QEMU is to be started for it.

    Every ``*_fd`` is a file descriptor number that QEMU inherits under the same number. Those of
    the monitor, the ports and the console are one end of a connected Unix stream socket pair: a
    socket without a name can be neither found nor connected to by anyone else.
    """

    vm_id: str
    """Shown by ``ps`` as part of QEMU's ``-name``."""
    tag: str = ""
    """Tells VMs of one record of VMs from those of others; part of QEMU's ``-name``, too."""
    qemu: str
    """Absolute path of the QEMU binary."""
    accelerator: Accelerator
    memory_mib: int
    vcpus: int
    cmdline: str
    """The guest kernel's command line: `kernel_cmdline`."""
    kernel: str | None
    """Guest kernel; None in a clone, then the initial RAM disk is left out too. Only a boot reads
    them, and QEMU would keep a copy in its own memory (measured: 11.5 MB and 8 ms a clone)."""
    initrd: str | None
    rootfs: str
    """Raw image of the guest's root file system; opened read-only."""
    scratch_fd: int
    """The scratch disk, open for reading and writing; it may be an unlinked file."""
    scratch_format: Literal["raw", "qcow2"] = "qcow2"
    scratch_base: str | None = None
    """Raw image under a qcow2 scratch disk; given here, so that the qcow2 header need not (and
    must not) name a file to open."""
    ram_path: str
    """File behind the guest's RAM, at least ``memory_mib`` long."""
    ram_share: bool
    """True: writes go to the file (a template that is being made). False: they stay private."""
    ram_read_only: bool = False
    """Tell QEMU (8.2 and later) to open that file for reading only; the guest may write all the
    same."""
    incoming: bool
    """True: wait for a saved state instead of booting."""
    monitor_fd: int = 0
    """This and those below are made by `vm.machine.spawn`."""
    kernel_port_fd: int = 0
    agent_port_fd: int = 0
    control_port_fd: int = 0
    workspace_port_fd: int = 0
    network_port_fd: int = 0
    console_fd: int = 0

    def fds(self) -> tuple[int, ...]:
        """The descriptors that QEMU must inherit."""
        return (
            self.scratch_fd,
            self.monitor_fd,
            self.kernel_port_fd,
            self.agent_port_fd,
            self.control_port_fd,
            self.workspace_port_fd,
            self.network_port_fd,
            self.console_fd,
        )


def kernel_cmdline(accelerator: Accelerator, tsc_khz: int, extra: str = "") -> str:
    """The guest kernel's command line. ``tsc_khz`` (the host's, see ``vm.tsc``) matters for TCG.

    Options are described in the kernel's ``Documentation/admin-guide/kernel-parameters.txt``.
    """
    words = [
        # What the kernel has to say goes to the VM's console log: warnings and worse.
        "console=ttyS0",
        "quiet",
        "loglevel=4",
        # A panic ends the VM at once: reboot by triple fault, which -no-reboot turns into an exit.
        "panic=-1",
        "reboot=t",
        "oops=panic",
        # Time stands still between a template's saving and a clone's waking; the watchdogs would
        # report that as a hang, and cost an idle VM its sleep.
        "nowatchdog",
        # Accounting and access rules inside a machine that serves one user: each costs code on the
        # way of every system call, page fault or task switch (a cell under emulation: 10 %), and
        # timers that wake an idle VM.
        "psi=0",
        "cgroup_disable=memory",
        "apparmor=0",
        # Debian asks SELinux, TOMOYO and BPF at each system call, too, though none has a policy
        "lsm=landlock,yama",
        "audit=0",
        # RDRAND seeds the boot; every clone gets fresh entropy from the host when it wakes.
        "random.trust_cpu=on",
        # One serial port exists: do not probe for four.
        "8250.nr_uarts=1",
        # A huge page costs a clone 2 MiB of private memory for its first byte.
        "transparent_hugepage=madvise",
    ]
    if accelerator == "tcg":
        words += [
            # Calibrating the TSC against an emulated timer fails at random, and the guest hangs;
            # TCG's TSC is the host's, so its frequency is known. (DESIGN 5)
            f"tsc_early_khz={tsc_khz}",
            "tsc=reliable",
            "clocksource=tsc",
            # The timer's test would fail when the host is busy.
            "no_timer_check",
            # Nothing speculates in an emulated CPU: the mitigations only cost time.
            "mitigations=off",
        ]
    if extra:
        words.append(extra)
    return " ".join(words)


def qemu_argv(machine: Machine) -> list[str]:
    """The whole command line, the binary first. Same machine, same list."""
    m = machine
    name = f"vmkernel-{m.vm_id}.{m.tag}" if m.tag else f"vmkernel-{m.vm_id}"
    argv = [m.qemu, "-name", name, "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-msg", "timestamp=on"]
    # A guest that reboots or shuts down has ended its VM.
    argv += ["-no-reboot", "-sandbox", SANDBOX]
    # The firmware by name: with ACPI, QEMU takes SeaBIOS, which in QEMU 10 waits for ever for the
    # option ROM that x-option-roms=off leaves out. (Seen on 10.0.13; 7.2 boots with either.)
    argv += ["-bios", "qboot.rom"]
    argv += ["-machine", _machine_options(), *_cpu(m.accelerator)]
    argv += ["-smp", str(m.vcpus), "-m", f"{m.memory_mib}M"]
    argv += ["-object", _ram(m)]
    if m.kernel is not None:
        argv += ["-kernel", m.kernel, "-append", m.cmdline]
        if m.initrd is not None:
            argv += ["-initrd", m.initrd]
    argv += [*_socket("monitor", m.monitor_fd), "-mon", "chardev=monitor,mode=control"]
    argv += [*_socket("console", m.console_fd), "-serial", "chardev:console"]
    argv += ["-blockdev", _rootfs(m), "-device", f"virtio-blk-device,drive=root,{DISK_ERRORS}"]
    argv += ["-blockdev", _scratch(m), "-device", f"virtio-blk-device,drive=scratch,{DISK_ERRORS}"]
    argv += ["-object", "rng-random,id=entropy,filename=/dev/urandom"]
    argv += ["-device", "virtio-rng-device,rng=entropy"]
    argv += ["-device", f"virtio-serial-device,max_ports={MAX_PORTS}"]
    argv += _port("kernel", KERNEL_PORT_NR, m.kernel_port_fd)
    argv += _port("agent", AGENT_PORT_NR, m.agent_port_fd)
    argv += _port("control", CONTROL_PORT_NR, m.control_port_fd)
    argv += _port("workspace", WORKSPACE_PORT_NR, m.workspace_port_fd)
    argv += _port("network", NETWORK_PORT_NR, m.network_port_fd)
    if m.incoming:
        argv += ["-incoming", "defer"]
    return argv


def machine_fingerprint(machine: Machine) -> str:
    """What of the command line decides whether a saved state fits, one argument a line.

    Paths, descriptors, the VM's name and the two things in which a template and its clones differ
    are replaced by constants. The content behind the paths and QEMU's version are the caller's to
    add to the template's key.
    """
    neutral = msgspec.structs.replace(
        machine,
        vm_id="ID",
        tag="",
        qemu="QEMU",
        kernel="KERNEL",
        initrd="INITRD",
        rootfs="ROOTFS",
        scratch_fd=0,
        scratch_base=None if machine.scratch_base is None else "SCRATCH_BASE",
        ram_path="RAM",
        ram_share=False,
        ram_read_only=False,
        incoming=True,
        monitor_fd=0,
        kernel_port_fd=0,
        agent_port_fd=0,
        control_port_fd=0,
        workspace_port_fd=0,
        network_port_fd=0,
        console_fd=0,
    )
    return "\n".join(qemu_argv(neutral))


def _machine_options() -> str:
    return (
        # acpi: Debian's cloud kernel finds virtio-mmio devices in no other way. x-option-roms: the
        # firmware (qboot) loads the kernel itself, and no option ROM becomes part of the state.
        # ioapic2: with a second one there are 24 virtio-mmio transports, of 30 kB each, and not 8.
        # rtc: without one Linux waits for it, twice a second (boot 6.3-8.3 s, with it 4.4-5.1 s).
        "microvm,acpi=on,pit=off,pic=off,rtc=on,ioapic2=off,x-option-roms=off,isa-serial=on,"
        # Merging pages across guests would be a side channel between them.
        "memory-backend=ram0,mem-merge=off,dump-guest-core=off"
    )


def _cpu(accelerator: Accelerator) -> list[str]:
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    # max: all that TCG can do (AVX2 from 7.2 on), as numpy's fast paths want; but no fifth level
    # of page tables, which would make each emulated page walk longer for memory nobody has; and no
    # word that byte-wise `rep` instructions are fast: emulated they go byte by byte, and Linux uses
    # them to clear and copy pages (touching 2,048 fresh pages 55 -> 26 ms, 10 MB to the host twice
    # as fast).
    cpu = "max,la57=off,erms=off,fsrm=off"
    return ["-accel", f"tcg,tb-size={TCG_CODE_BUFFER_MIB}", "-cpu", cpu]


def _ram(m: Machine) -> str:
    share = "on" if m.ram_share else "off"
    path = _escape(m.ram_path)
    ram = f"memory-backend-file,id=ram0,size={m.memory_mib}M,mem-path={path},share={share}"
    return f"{ram},readonly=on,rom=off" if m.ram_read_only else ram


def _rootfs(m: Machine) -> str:
    # No locking: all VMs of a host read the same file. QEMU's default caching goes through the
    # host's page cache, so that they also share what was read.
    file = {"driver": "file", "filename": m.rootfs, "aio": "threads", "locking": "off"}
    return _json({"driver": "raw", "node-name": "root", "read-only": True, "file": file})


def _scratch(m: Machine) -> str:
    # /proc/self/fd/N opens the inherited descriptor's file again, which also works when its name
    # is gone. The scratch disk ends with the VM: flushing it to the disk would be waste.
    cache = {"direct": False, "no-flush": True}
    node: dict[str, object] = {
        "driver": m.scratch_format,
        "node-name": "scratch",
        "cache": cache,
        "discard": "unmap",
        "file": {
            "driver": "file",
            "filename": f"/proc/self/fd/{m.scratch_fd}",
            "aio": "threads",
            "locking": "off",
            "cache": cache,
            "discard": "unmap",
        },
    }
    if m.scratch_base is not None:
        base = {"driver": "file", "filename": m.scratch_base, "locking": "off"}
        node["backing"] = {"driver": "raw", "read-only": True, "file": base}
    return _json(node)


def _socket(name: str, fd: int) -> list[str]:
    return ["-chardev", f"socket,id={name},fd={fd}"]


def _port(name: str, number: int, fd: int) -> list[str]:
    return [
        *_socket(name, fd),
        "-device",
        f"virtserialport,chardev={name},name={name},nr={number}",
    ]


def _escape(value: str) -> str:
    """A comma inside a value is doubled in QEMU's key=value options."""
    return value.replace(",", ",,")


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, separators=(",", ":"))
