"""What the kernel-usage panel shows: usage_request, beside plain ipykernel's answer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kernel_client import Kernel, StartKernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

MIB = 1 << 20


def usage(kernel: Kernel) -> dict[str, Any]:
    return kernel.request("usage_request", channel="control").reply


@pytest.fixture(scope="module")
def plain(plain_spec: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    with start_kernel(plain_spec) as plain:
        yield plain


def shape(value: Any) -> Any:
    """Names and types."""
    if isinstance(value, dict):
        return {name: shape(item) for name, item in value.items()}
    return type(value)


def test_the_answer_has_the_shape_of_plain_ipykernels(kernel: Kernel, plain: Kernel) -> None:
    for each in (kernel, plain):
        usage(each)  # the first answer knows nothing of CPU
        each.run("sum(range(300_000))")
    ours, plains = shape(usage(kernel)), shape(usage(plain))
    for reply in (ours, plains):
        reply.pop("host_cpu_percent", None)  # plain leaves it out when it is 0.0
    assert ours == plains


def test_the_figures_are_the_guests(kernel: Kernel) -> None:
    facts = json.loads(
        kernel.run(
            "import json, os, platform\n"
            "memory = int(open('/proc/meminfo').readline().split()[1]) * 1024\n"
            "print(json.dumps([platform.node(), os.getpid(), os.cpu_count(), memory]))"
        ).stdout
    )
    reply = usage(kernel)
    machine = reply["host_virtual_memory"]
    if os.environ.get("KERNEL_UNDER_TEST") == "relay":
        facts[1] -= 1  # the relay itself, whose child the kernel is
    assert [reply["hostname"], reply["pid"], reply["cpu_count"], machine["total"]] == facts
    assert machine["used"] == machine["total"] - machine["available"]
    assert machine["percent"] == pytest.approx(100 * machine["used"] / machine["total"], abs=0.1)


def test_memory_follows_the_kernel_and_its_children(kernel: Kernel) -> None:
    before = usage(kernel)
    kernel.run("held = bytearray(os.urandom(1 << 20)) * 50")
    holding = usage(kernel)
    assert 45 * MIB < holding["kernel_memory"] - before["kernel_memory"] < 60 * MIB
    used = [reply["host_virtual_memory"]["used"] for reply in (before, holding)]
    assert 40 * MIB < used[1] - used[0] < 80 * MIB
    kernel.run(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', "
        "'x = bytes(range(256)) * 4096 * 30; print(1, flush=True); input()'], "
        "stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()"
    )
    assert usage(kernel)["kernel_memory"] - holding["kernel_memory"] > 30 * MIB
    kernel.run("child.communicate(b'\\n')\ndel held")
    assert usage(kernel)["kernel_memory"] < before["kernel_memory"] + 10 * MIB


def test_it_answers_while_a_cell_computes(kernel: Kernel) -> None:
    usage(kernel)
    time.sleep(2)
    assert usage(kernel)["kernel_cpu"] < 50
    cell = kernel.send("print('begin')\nwhile True: pass")
    kernel.wait_output(cell, "begin")
    usage(kernel)
    time.sleep(2)
    begun = time.monotonic()
    reply = usage(kernel)
    assert time.monotonic() - begun < 10  # what the server waits
    assert 60 < reply["kernel_cpu"] < 120
    assert 60 < reply["host_cpu_percent"] <= 100
    kernel.interrupt()
    assert kernel.finish(cell).error["ename"] == "KeyboardInterrupt"


def test_it_answers_before_there_is_a_vm(
    small_spec: str, start_kernel: StartKernel, kernel: Kernel
) -> None:
    """Every slot is taken, and the panel asks."""
    env = {"VMKERNEL_MAX_CONCURRENT_VMS": "1"}
    with start_kernel(small_spec, env=env) as waiting:
        reply = usage(waiting)
        assert reply["hostname"] == "no VM yet"
        assert reply["kernel_memory"] == 0
        assert shape(reply) == {
            name: kind for name, kind in shape(usage(kernel)).items() if name != "host_cpu_percent"
        }
