"""Notebooks whose VM may live, or be idle, for a short time only."""

from __future__ import annotations

import time

import pytest
from kernel_client import Kernel

from vmhost import VmHost, seconds_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def test_an_idle_vm_ends_and_the_next_cell_says_so(spec: str, host: VmHost) -> None:
    kernel = Kernel(spec, env={**host.env, "VMKERNEL_IDLE_TIMEOUT": "1.5"})
    try:
        assert kernel.run("x = 1").stderr == ""
        busy = kernel.run("import time; time.sleep(3); print(x)")  # work is no idleness
        assert (busy.stdout, busy.stderr) == ("1\n", "")
        (qemu,) = host.qemus()
        began = time.monotonic()
        assert seconds_until(lambda: not host.qemus(), 5) < 5
        assert 1 < time.monotonic() - began < 3
        assert seconds_until(lambda: not host.slots().used, 0.5) < 0.5
        new = kernel.run("print('x' in globals())")
        assert new.stdout == "False\n"
        assert new.stderr == (
            "vmkernel: this cell runs in a new VM; "
            "the old one was ended after 1.5 s without work (idle_timeout)\n"
        )
        assert host.qemus() != [qemu]
        assert kernel.run("print(1)").stderr == ""
    finally:
        kernel.shut_down()
    assert host.records() == []


def test_a_vm_that_nobody_uses_gives_its_slot_back(spec: str, host: VmHost) -> None:
    """It was started ahead of the first cell."""
    kernel = Kernel(spec, env={**host.env, "VMKERNEL_IDLE_TIMEOUT": "1s"})
    try:
        assert seconds_until(lambda: bool(host.qemus()), 60) < 60
        assert seconds_until(lambda: not host.qemus(), 10) < 10
        assert kernel.run("print(1)").stdout == "1\n"
    finally:
        kernel.shut_down()


def test_a_cell_that_outlives_its_vm_is_told_why(spec: str, host: VmHost) -> None:
    kernel = Kernel(spec, env={**host.env, "VMKERNEL_LIFETIME": "4s"})
    try:
        cell = kernel.run("import time\nprint('begun', flush=True)\nwhile True: time.sleep(1)")
        assert cell.stdout == "begun\n"
        assert cell.status == "error"
        assert "its lifetime of 4 s was over (lifetime)" in cell.traceback
        assert "variables and files" in cell.traceback
        assert "VMKERNEL_LIFETIME" in cell.traceback
        again = kernel.run("print(1)")
        assert again.stdout == "1\n"
        assert "new VM" in again.stderr
    finally:
        kernel.shut_down()


def test_vm_magic_shows_the_limits(spec: str, host: VmHost) -> None:
    env = {"VMKERNEL_IDLE_TIMEOUT": "30m", "VMKERNEL_LIFETIME": "2h", "VMKERNEL_CPU_QUOTA": "50%"}
    kernel = Kernel(spec, env={**host.env, **env})
    try:
        shown = kernel.run("%vm")
        text = shown.stdout + "".join(str(content) for content in shown.contents("display_data"))
        for words in ("30 min", "2 h", "50 % of one processor"):
            assert words in text, text
    finally:
        kernel.shut_down()
