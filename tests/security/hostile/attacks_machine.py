"""Attacks by root on the machine: it ends, hangs, fills its disk, and plays with its devices."""

from __future__ import annotations

import os
import time

from hostile.attack import SERVED, STOPPED, Attacks
from hostile.program import MIB

ATTACKS = attack = Attacks()


@attack(STOPPED, each="command", of=(0x01234567, 0x4321FEDC))
def reboot(guest, command):
    """reboot(2): restart, power off."""
    import ctypes

    ctypes.CDLL(None).reboot(ctypes.c_int(command))


@attack(STOPPED)
def panic(guest):
    """PID 1 ends."""
    os._exit(3)


@attack(STOPPED)
def crash_by_sysrq(guest):
    """The kernel's own way to crash."""
    with open("/proc/sysrq-trigger", "w") as file:
        file.write("c")
    time.sleep(10)


@attack(SERVED, peak=130, says=r"[3-6]\d MiB")
def a_full_disk(guest):
    """The whole scratch disk is written; on the host it is as large as it may be, not larger."""
    import contextlib

    written = 0
    with contextlib.suppress(OSError), open("/full", "wb", buffering=0) as file:
        while True:
            written += file.write(os.urandom(MIB))
    with contextlib.suppress(OSError):
        os.sync()
        os.unlink("/full")
    guest.show(f"{written >> 20} MiB")


@attack(SERVED, STOPPED, says="vdb written")
def raw_disks(guest):
    """Writes past the file systems: the image's disk refuses, the scratch disk is its own."""
    said = []
    for name in ("vda", "vdb"):
        try:
            with open(f"/dev/{name}", "r+b", buffering=0) as disk:
                disk.seek(32 * MIB)
                disk.write(b"\xff" * MIB)
                os.fsync(disk.fileno())
            said.append(f"{name} written")
        except OSError as error:
            said.append(f"{name} {error.strerror}")
    guest.show("; ".join(said))


@attack(SERVED, STOPPED)
def physical_memory(guest):
    """/dev/mem, /dev/port and /proc/kcore, as far as the kernel lets root."""
    import contextlib

    os.mknod("/dev/my-mem", 0o20600, os.makedev(1, 1))
    os.mknod("/dev/my-port", 0o20600, os.makedev(1, 4))
    for name, places in (("/dev/my-mem", (0, 0xFEC00000, 0xFEB00000)), ("/dev/my-port", (0x3F8,))):
        for place in places:
            with contextlib.suppress(OSError), open(name, "r+b", buffering=0) as file:
                file.seek(place)
                file.write(os.urandom(4096))
    os.unlink("/dev/my-mem")
    os.unlink("/dev/my-port")


@attack(STOPPED, says=r"44 pokes")
def virtio_registers(guest):
    """Noise into the registers of every virtio device: queue addresses, sizes, features, notify.

    Linux lets nobody at them while a driver has them, so the drivers go first, and with them the
    ports: of how many registers it were the console tells, whose end is quoted.
    """
    import ctypes
    import mmap
    import re

    os.mknod("/dev/my-mem", 0o20600, os.makedev(1, 1))
    memory = os.open("/dev/my-mem", os.O_RDWR | os.O_SYNC)
    with open("/proc/iomem") as file:
        bases = [
            int(base, 16) for base in re.findall(r"^([0-9a-f]+)-\w+ : LNRO0005", file.read(), 8)
        ]
    unbind = os.open("/sys/bus/platform/drivers/virtio-mmio/unbind", os.O_WRONLY)
    pokes = 0
    noise = os.urandom(1 << 16)
    page = {}
    for number in range(len(bases)):
        os.write(unbind, b"LNRO0005:%02d" % number)
    for base in bases:
        start = base & ~4095
        page[start] = page.get(start) or mmap.mmap(memory, 4096, offset=start)
        for offset in (0x14, 0x24, 0x30, 0x38, 0x44, 0x80, 0x84, 0x90, 0xA0, 0x70, 0x50):
            at = base - start + offset
            page[start][at : at + 4] = noise[4 * pokes : 4 * pokes + 4]
            pokes += 1
    os.write(1, b"%d pokes\n" % pokes)
    time.sleep(0.5)
    ctypes.CDLL(None).reboot(0x01234567)


@attack(SERVED, STOPPED)
def drivers_unbound(guest):
    """Disks and random numbers lose their drivers, and get them back."""
    import contextlib

    drivers = "/sys/bus/virtio/drivers"
    for driver in ("virtio_rng", "virtio_rng.0", "virtio_blk"):
        for device in (
            os.listdir(f"{drivers}/{driver}") if os.path.isdir(f"{drivers}/{driver}") else ()
        ):
            if device.startswith("virtio") and driver != "virtio_blk":
                for action in ("unbind", "bind"):
                    with (
                        contextlib.suppress(OSError),
                        open(f"{drivers}/{driver}/{action}", "w") as file,
                    ):
                        file.write(device)


@attack(STOPPED)
def the_ports_driver_unbound(guest):
    """The driver of all three ports goes: the host hears nothing any more, until QEMU is ended."""
    import contextlib

    drivers = "/sys/bus/virtio/drivers/virtio_console"
    os.fork() or (time.sleep(3), os._exit(0))
    if os.getpid() == 1:
        for device in os.listdir(drivers):
            if device.startswith("virtio"):
                with contextlib.suppress(OSError), open(f"{drivers}/unbind", "w") as file:
                    file.write(device)
        os._exit(0)


@attack(SERVED)
def a_module(guest):
    """finit_module(2) of noise, and of what is in the image."""
    import contextlib
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError), open("/run/noise", "wb") as file:
        file.write(b"\x7fELF" + os.urandom(4096))
    fd = os.open("/run/noise", os.O_RDONLY)
    libc.syscall(313, fd, b"", 0)
    os.close(fd)
    os.unlink("/run/noise")


@attack(STOPPED, SERVED, seconds=60)
def all_of_the_memory(guest):
    """Root takes all of the guest's memory: its own kernel ends it, at last."""
    hoard = [bytearray(os.urandom(4096) * 1024) for _ in range(1000)]
    guest.show(f"no end: {len(hoard)}")


@attack(SERVED)
def another_clock(guest):
    """The guest's clock is set to other years: dates are the host's."""
    for year in (0, 1 << 31, 1 << 32):
        try:
            time.clock_settime(time.CLOCK_REALTIME, year)
        except OSError:
            continue
        guest.show("x")
