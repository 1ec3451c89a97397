"""A guest that tells lies about its kernel.  What it does otherwise is tested with real VMs."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from vmkernel.host import guest
from vmkernel.host.guest import Guest, KernelDeath
from vmkernel.protocol import messages
from vmkernel.vm.machine import Spawned


class FakePort:
    received = 0
    pending = 0


class FakeVm:
    """No real guest can be made to say what these tests need it to."""

    running = True
    kernel = FakePort()

    def __init__(self, *_: object, **__: object) -> None:
        pass


async def test_deaths_of_its_kernel_are_heard_out_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guest, "Vm", FakeVm)
    deaths: list[KernelDeath] = []
    tested = Guest(
        cast(Spawned, None),
        {},
        on_output=lambda message, buffers: None,
        on_kernel_death=deaths.append,
        on_end=lambda error: None,
    )
    loop = asyncio.get_running_loop()
    waiting: list[Any] = []
    monkeypatch.setattr(loop, "call_later", lambda delay, *call: waiting.append(call))
    for number in range(1000):
        tested._on_event(messages.KernelDied(number, None, False, "x" * 1000))
    assert len(waiting) == 1
    while waiting:
        function, *arguments = waiting.pop()
        function(*arguments)
    assert [death.exit_code for death in deaths] == [0]
    tested._on_event(messages.KernelDied(7, None, False, ""))  # of the next kernel
    function, *arguments = waiting.pop()
    function(*arguments)
    assert [death.exit_code for death in deaths] == [0, 7]
