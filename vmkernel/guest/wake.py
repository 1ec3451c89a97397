"""Making a clone different from its twins, before any user code runs (DESIGN 4.2).

Clones of one template start with the same memory: the same clock, the same kernel random
pool, the same state in every generator that was seeded before the template was saved.
The agent (root) mends what the guest's kernel holds, the guest kernel what it holds itself.
"""

from __future__ import annotations

import fcntl
import random
import socket
import struct
import sys
import tempfile
import time

from vmkernel.guest.guard import MS_BIND, mount

# linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07)
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207

IDENTITIES = {
    "/run/vmkernel/machine-id": "/etc/machine-id",
    "/run/vmkernel/boot_id": "/proc/sys/kernel/random/boot_id",
}
"""Files of our own over those by which programs tell one machine, or one boot, from another.

The kernel's boot_id was made in the template and cannot be made again.
"""


def wake_machine(time_ns: int, entropy: bytes, hostname: str) -> None:
    """Give this VM its own clock, kernel entropy and name.  Needs root; raises OSError."""
    set_clock(time_ns)
    with open("/dev/urandom", "rb", buffering=0) as device:
        header = struct.pack("ii", len(entropy) * 8, len(entropy))
        fcntl.ioctl(device, RNDADDENTROPY, header + entropy)
        fcntl.ioctl(device, RNDRESEEDCRNG)
    socket.sethostname(hostname)
    write_identities()


def make_identities() -> None:
    """Put the files of `IDENTITIES` in place.  Needs root, once; raises OSError."""
    write_identities()
    for source, target in IDENTITIES.items():
        mount(target, MS_BIND, source=source)


def write_identities() -> None:
    """Give this VM an identity that no twin has (machine-id(5), random(4))."""
    for path in IDENTITIES:
        with open("/proc/sys/kernel/random/uuid") as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(text if path.endswith("boot_id") else text.replace("-", ""))


def set_clock(time_ns: int) -> None:
    """Step CLOCK_REALTIME (clock_settime(2))."""
    time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)


def reseed_process(entropy: bytes) -> None:
    """Reseed every generator of this process that a twin would share.

    Library state is only touched where the library is loaded already: one that is imported
    later seeds itself from the kernel.
    """
    random.seed(entropy)
    # tempfile keeps a private Random for names, made at first use
    tempfile._name_sequence = None  # type: ignore[attr-defined]
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(list(struct.unpack("<16I", entropy[:64])))
    ssl = sys.modules.get("ssl")
    if ssl is not None:
        ssl.RAND_add(entropy, float(len(entropy)))
    for module, name, value in (
        ("uuid", "_last_timestamp", None),
        ("uuid", "_node", None),  # random where there is no network card
        ("platform", "_uname_cache", None),  # holds the template's host name
        ("secrets", "_sysrand", random.SystemRandom()),
    ):
        if module in sys.modules:
            setattr(sys.modules[module], name, value)
