"""What the agent measures, beside psutil on the same machine; and what the host believes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest

from vmkernel.errors import VmGuestError
from vmkernel.guest.usage import Meter
from vmkernel.kernel.usage import usage
from vmkernel.protocol import messages

# A name that is hard to read in /proc/<pid>/stat
_CHILD = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, b") R 1 (x", 0, 0, 0)
x = bytes(range(256)) * 4096 * 40
print(flush=True)
sys.stdin.readline()
while True: pass
"""


def test_as_psutil_measures():
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        child.stdout.readline()
        meter = Meter()
        first = meter.measure(os.getpid())
        assert (first["kernel_cpu"], first["machine_cpu"]) == (0.0, None)
        child.stdin.write(b"\n")
        child.stdin.flush()
        time.sleep(1)
        found = msgspec.convert(meter.measure(os.getpid()), messages.Usage)
        me = psutil.Process()
        pss = sum(each.memory_full_info().pss for each in (me, *me.children(recursive=True)))
        machine = psutil.virtual_memory()
    finally:
        child.kill()
        child.communicate()
    assert found.pid == os.getpid()
    assert found.kernel_memory == pytest.approx(pss, rel=0.05)
    assert 20 < found.kernel_cpu < 250
    assert 0 < found.machine_cpu <= 100
    assert found.cpu_count == psutil.cpu_count()
    assert found.memory.total == machine.total
    for name in ("available", "used", "free", "active", "inactive", "cached", "shared", "slab"):
        near = pytest.approx(getattr(machine, name), abs=machine.total * 0.02)
        assert getattr(found.memory, name) == near, name


def test_no_kernel_and_one_that_is_gone():
    for pid in (0, 1 << 21):
        found = msgspec.convert(Meter().measure(pid), messages.Usage)
        assert (found.kernel_cpu, found.kernel_memory) == (0.0, 0)


def _good() -> dict[str, Any]:
    return Meter().measure(os.getpid())


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {**_good(), "kernel_memory": -1},
        {**_good(), "kernel_memory": "much"},
        {**_good(), "kernel_cpu": 1e300},
        {**_good(), "cpu_count": 0},
        {**_good(), "memory": {}},
        {**_good(), "hostname": "the host"},
        VmGuestError("it does not answer"),
    ],
)
async def test_a_guest_that_answers_nonsense(answer):
    async def call(command, timeout):
        if isinstance(answer, Exception):
            raise answer
        return answer

    machine = SimpleNamespace(vm_id="vm-1")
    guest = SimpleNamespace(vm=SimpleNamespace(machine=machine, agent=SimpleNamespace(call=call)))
    reply = await usage(guest, 512, 2)
    assert reply["hostname"] == "vm-1 (does not answer)"
    assert (reply["kernel_memory"], reply["cpu_count"]) == (0, 2)
    assert reply["host_virtual_memory"]["total"] == 512 << 20
