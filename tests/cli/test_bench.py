"""`vmkernel bench`: kernels are started and compared, and nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from cli_host import Command, wait_for
from vmhost import VmHost

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


def places() -> dict[str, set[int]]:
    """The benchmark's places on this host, and the processes of each."""
    found: dict[str, set[int]] = {}
    for process in psutil.process_iter():
        try:
            runtime = process.environ().get("VMKERNEL_RUNTIME_DIR", "")
        except (psutil.Error, ValueError):
            continue
        if runtime.startswith("/tmp/vmk-bench-"):
            found.setdefault(os.path.dirname(runtime), set()).add(process.pid)
    return found


def test_kernels_are_compared(own_host: VmHost):
    with Command(own_host, "bench", "--json", "--rounds", "1") as command:
        said, steps = command.stdout.read(), command.stderr.read()
        assert command.wait() == 0, steps
    found = json.loads(said)
    assert found["kernels"][:2] == ["python3", "vmsandbox"]
    assert found["machine"]["recipe"] == "minimal"
    for key in ("start_first", "round_trip", "round_trip_p95", "memory_further", "idle_cpu"):
        for kernel in found["kernels"]:
            figure = found["figures"][key][kernel]
            assert figure["n"] >= 1, (key, kernel, figure)
            assert figure["median"] > 0 or key == "idle_cpu"
    assert found["figures"]["start_first"]["vmsandbox"]["ratio"] > 0
    assert "warming vmsandbox" in steps
    # The user's own record has never heard of it
    assert not own_host.records()


def test_without_a_kernel_to_compare_with_there_are_figures(own_host: VmHost):
    """And a signal ends it at once, with what there is by then, and leaves nothing."""
    before, new = places(), set[str]()
    with Command(own_host, "bench", "--plain", "nosuch", "--rounds", "50") as command:
        while not command.stderr.readline().startswith("start "):
            assert not command.ended
        # Kept from look to look: the first one's processes may just be ending
        wait_for(lambda: new.update(places().keys() - before.keys()) or new, "its kernel runs", 60)
        (place,) = new
        command.signal(signal.SIGTERM)
        assert "| figure" in command.stdout.read()
        assert command.wait() in (0, 1)
    wait_for(lambda: place not in places(), "all its processes have ended")
    assert not Path(place).exists()
