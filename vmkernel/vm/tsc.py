"""The frequency of the host's time stamp counter, in kHz.

Where it stands: ``vm.template`` puts it into a TCG guest's kernel command line and so into the
template's key. TCG hands the host's TSC to the guest as it is; a guest that has to find its
frequency by itself measures wrong, or hangs (DESIGN 5).

Three ways, the best first: what the host's kernel says it uses (its log: the refined calibration
if there is one, else the detected value); ``tsc_freq_khz`` in sysfs, which some kernels have; our
own measurement against CLOCK_MONOTONIC_RAW, which the kernel derives from the TSC with exactly
that frequency. The last needs no privilege and 0.2 s.

Stable: the value is remembered per boot. After a reboot a value within `_SAME_PPM` of the old one
*is* the old one, since a new calibration differs in the last digits and every template would be
made again. That costs a guest at most 4 s a day, less than a quartz that nobody corrects.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from vmkernel.errors import VmBootError
from vmkernel.vm.facts import read_facts, remember

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SYSFS = Path("/sys/devices/system/cpu/cpu0/tsc_freq_khz")
_KMSG = "/dev/kmsg"
_SAME_PPM = 50
_MEASURE_SECONDS = 0.2
_MIN_KHZ, _MAX_KHZ = 100_000, 20_000_000
# rdtsc; shl rdx, 32; or rax, rdx; ret  (System V: a uint64 is returned in rax)
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")

# The kernel's arch/x86/kernel/tsc.c prints both.
_REFINED = re.compile(r"tsc: Refined TSC clocksource calibration: (\d+)\.(\d{3}) MHz")
_DETECTED = re.compile(r"tsc: Detected (\d+)\.(\d{3}) MHz")


def host_tsc_khz(state_dir: Path, shared: Path | None = None) -> int:
    """The TSC's frequency in kHz; the same at every call, as `state_dir` remembers it.

    Users who may not read the kernel's log each measure another last digit: what the administrator
    found, and keeps in ``shared``, is everybody's value, so that his templates are.
    Raises VmBootError when this is no x86-64 machine or no way works.
    """
    if shared is not None:
        theirs = read_facts(shared).get("tsc")
        if isinstance(theirs, dict) and isinstance(theirs.get("khz"), int):
            khz = int(theirs["khz"])
            if theirs.get("boot_id") == _read(_BOOT_ID) and _plausible(khz):
                return khz
            ours = host_tsc_khz(state_dir)
            return khz if abs(khz - ours) * 1_000_000 <= ours * _SAME_PPM else ours
    boot_id = _read(_BOOT_ID)
    known = read_facts(state_dir).get("tsc")
    old_khz = 0
    if isinstance(known, dict) and isinstance(known.get("khz"), int) and _plausible(known["khz"]):
        old_khz = int(known["khz"])
        if known.get("boot_id") == boot_id:
            return old_khz
    khz, source = find_tsc_khz()
    if abs(khz - old_khz) * 1_000_000 <= old_khz * _SAME_PPM:
        khz = old_khz
    remember(state_dir, {"tsc": {"khz": khz, "source": source, "boot_id": boot_id}})
    return khz


def find_tsc_khz() -> tuple[int, str]:
    """Find the frequency anew: kHz, and where it comes from. Takes up to 0.3 s."""
    if (khz := khz_from_log(_kernel_log())) is not None:
        return khz, "kernel log"
    text = _read(_SYSFS)
    if text.isdigit() and _plausible(int(text)):
        return int(text), str(_SYSFS)
    return measure_tsc_khz(), "measured"


def khz_from_log(text: str) -> int | None:
    """The frequency a kernel log tells of, or None. The refined calibration wins."""
    for pattern in (_REFINED, _DETECTED):
        found = pattern.findall(text)
        if found and _plausible(khz := int(found[-1][0] + found[-1][1])):
            return khz
    return None


def measure_tsc_khz(seconds: float = _MEASURE_SECONDS) -> int:
    """Count TSC ticks over ``seconds`` of CLOCK_MONOTONIC_RAW. Good to about 1 ppm."""
    import ctypes
    import mmap

    if os.uname().machine != "x86_64":
        raise VmBootError("This machine is not x86-64", hint="vmkernel needs an x86-64 host")
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=protection)
    except OSError as error:
        raise VmBootError(
            f"The TSC's frequency is not known, and measuring it was refused: {error}",
            hint="Let this user read the kernel log: sudo sysctl kernel.dmesg_restrict=0",
        ) from error
    page.write(_RDTSC)
    anchor = ctypes.c_char.from_buffer(page)  # keeps the mapping in place
    rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))

    def pair() -> tuple[int, int]:
        """One instant as (ticks, nanoseconds): the tightest of many brackets."""
        best = (1 << 62, 0, 0)
        for _ in range(200):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            ticks = rdtsc()
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            best = min(best, (after - before, ticks, (before + after) // 2))
        return best[1], best[2]

    ticks0, ns0 = pair()
    time.sleep(seconds)
    ticks1, ns1 = pair()
    khz = round((ticks1 - ticks0) * 1_000_000 / (ns1 - ns0))
    if not _plausible(khz):
        raise VmBootError(
            f"The TSC counts {khz} kHz, which cannot be", hint="Use KVM: VMKERNEL_ACCELERATOR=kvm"
        )
    return khz


def _kernel_log() -> str:
    """The kernel's log since boot, or "" where only root may read it (Debian's default)."""
    try:
        fd = os.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    records: list[bytes] = []
    try:
        while True:  # one record a read; the end is EAGAIN
            try:
                records.append(os.read(fd, 8192))
            except BrokenPipeError:  # a record was overwritten meanwhile
                continue
            except OSError:
                break
    finally:
        os.close(fd)
    # Programs can write to /dev/kmsg too; priorities below 8 (facility 0) are the kernel's own.
    own = [r for r in records if r.split(b",", 1)[0].isdigit() and int(r.split(b",", 1)[0]) < 8]
    return b"".join(own).decode("utf-8", "replace")


def _plausible(khz: int) -> bool:
    return _MIN_KHZ <= khz <= _MAX_KHZ


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
