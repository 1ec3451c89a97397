"""Making a clone different from its twins, before any user code runs (DESIGN 4.2).

Clones of one template start with the same memory: the same clock, the same kernel random
pool, the same state in every generator that was seeded before the template was saved.
The agent (root) mends what the guest's kernel holds, the guest kernel what it holds itself.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import socket
import struct
import sys
import tempfile
import time
from ctypes import c_char
from typing import Any

from vmkernel.guest.guard import MS_BIND, mount

# linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07)
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207

MACHINE_ID = "/run/vmkernel/machine-id"
BOOT_ID = "/run/vmkernel/boot_id"
IDENTITIES = {
    MACHINE_ID: "/etc/machine-id",
    BOOT_ID: "/proc/sys/kernel/random/boot_id",
}
"""Files of our own over those by which programs tell one machine, or one boot, from another.

The kernel's boot_id was made in the template and cannot be made again.
"""

MT_WORDS = 624  # of 32 bits: the state of a Mersenne Twister


class Machine:
    """What of the whole machine is made anew when a clone wakes.  Needs root; raises OSError.

    Under emulation code that runs for the first time is what a wake-up takes long for, and files
    that are opened and written are much code.  So the device is open, and the files are memory.
    """

    def __init__(self) -> None:
        self._device = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)
        self._files: dict[str, mmap.mmap] = {}
        for path, target in IDENTITIES.items():
            text = _identity(path)
            with open(path, "w+b") as file:
                file.write(text)
                file.flush()
                memory = self._files[path] = mmap.mmap(file.fileno(), len(text))
            memory.madvise(mmap.MADV_DONTFORK)  # no fork of ours, the user's least, writes to them
            mount(target, MS_BIND, source=path)

    def wake(self, time_ns: int, entropy: bytes, hostname: str) -> None:
        """Give this VM its own clock, kernel entropy, name, machine-id(5) and boot_id."""
        set_clock(time_ns)
        header = struct.pack("ii", len(entropy) * 8, len(entropy))
        fcntl.ioctl(self._device, RNDADDENTROPY, header + entropy)
        fcntl.ioctl(self._device, RNDRESEEDCRNG)
        socket.sethostname(hostname)
        for path, memory in self._files.items():
            memory[:] = _identity(path)

    def disown(self) -> None:
        """In a fork of the agent: none of this is for the user's code."""
        os.close(self._device)


def _identity(path: str) -> bytes:
    """A random UUID (version 4), as a file of `IDENTITIES` has it."""
    digits = os.urandom(16).hex()
    digits = f"{digits[:12]}4{digits[13:16]}{'89ab'[int(digits[16], 16) & 3]}{digits[17:]}"
    if path == BOOT_ID:
        parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
        digits = "-".join(parts)
    return digits.encode() + b"\n"


def set_clock(time_ns: int) -> None:
    """Step CLOCK_REALTIME (clock_settime(2))."""
    time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)


class Generators:
    """The random generators of this process, in a template that is about to be saved.

    ``reseed`` is for its clones: it does by a few writes what takes OpenSSL and numpy much code.
    """

    def __init__(self) -> None:
        self._numpy: Any = None
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is None:
            return
        # Its legacy generator, reached by `numpy.random.random()`, is the one that has a state
        # already; that a Gaussian number is left in it is undone by the seeding
        numpy_random.seed(0)
        bits = numpy_random.mtrand._rand._bit_generator
        if type(bits).__name__ != "MT19937":
            return
        state = bits.state["state"]
        if state["pos"] == MT_WORDS:  # the next number asked for makes the next 624
            size = 4 * MT_WORDS
            memory = memoryview((c_char * size).from_address(bits.ctypes.state_address)).cast("B")
            if memory.tobytes() == state["key"].astype("<u4").tobytes():
                self._numpy = (numpy_random, bits, memory)

    def reseed(self, entropy: bytes) -> None:
        """Give a fresh clone its own numbers, by 64 random bytes.

        OpenSSL's generator is left alone: it is made at its first use, and one that a preload has
        used was the agent's, whose forks OpenSSL knows by their process id.
        """
        _forget()
        if self._numpy is not None:
            numpy_random, bits, memory = self._numpy
            if numpy_random.mtrand._rand._bit_generator is bits:
                random.seed(int.from_bytes(entropy[32:]))  # a sequence that nobody sees
                words = random.getrandbits(32 * MT_WORDS)
                memory[:] = words.to_bytes(4 * MT_WORDS, "little")
            else:
                numpy_random.seed(list(struct.unpack("<8I", entropy[32:])))
        random.seed(int.from_bytes(entropy[:32]))


def reseed_process(entropy: bytes) -> None:
    """Reseed every generator of this process that a twin would share.

    Library state is only touched where the library is loaded already: one that is imported
    later seeds itself from the kernel.
    """
    random.seed(int.from_bytes(entropy))  # an int: of bytes it would make a hash first
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(list(struct.unpack("<16I", entropy[:64])))
    ssl = sys.modules.get("ssl")
    if ssl is not None:
        ssl.RAND_add(entropy, float(len(entropy)))
    _forget()


def _forget() -> None:
    # tempfile keeps a private Random for names, made at first use
    tempfile._name_sequence = None  # type: ignore[attr-defined]
    for module, name, value in (
        ("uuid", "_last_timestamp", None),
        ("uuid", "_node", None),  # random where there is no network card
        ("platform", "_uname_cache", None),  # holds the template's host name
    ):
        if module in sys.modules:
            setattr(sys.modules[module], name, value)
