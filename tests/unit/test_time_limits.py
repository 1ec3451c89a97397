"""How long a VM may live and be idle: the clock alone."""

from __future__ import annotations

import asyncio
import time

import pytest

from vmkernel.errors import VmExpiredError
from vmkernel.host.limits import TimeLimits, spoken


class Ends:
    """What was said, and when."""

    def __init__(self) -> None:
        self.errors: list[VmExpiredError] = []
        self.began = time.monotonic()
        self.after = 0.0

    def __call__(self, error: VmExpiredError) -> None:
        self.errors.append(error)
        self.after = time.monotonic() - self.began

    def words(self) -> str:
        (error,) = self.errors
        return error.message


async def test_without_limits_nothing_ever_happens() -> None:
    ends = Ends()
    limits = TimeLimits(None, None, ends)
    for busy in (True, False, True, False):
        limits.note(busy)
    await asyncio.sleep(0.05)
    assert not ends.errors
    assert repr(limits) == "<TimeLimits idle>"


async def test_the_lifetime_ends_a_busy_vm_too_and_once() -> None:
    ends = Ends()
    limits = TimeLimits(0.1, 0.15, ends)
    limits.note(True)
    await asyncio.sleep(0.3)
    assert ends.words() == "The VM was ended as its lifetime of 0.1 s was over (lifetime)"
    assert "VMKERNEL_LIFETIME" in ends.errors[0].hint
    assert repr(limits) == "<TimeLimits over>"
    limits.note(False)
    await asyncio.sleep(0.2)
    assert len(ends.errors) == 1


async def test_an_idle_vm_is_ended_and_a_busy_one_is_not() -> None:
    ends = Ends()
    limits = TimeLimits(None, 0.1, ends)
    for _ in range(4):
        limits.note(True)
        await asyncio.sleep(0.15)
        limits.note(False)
        await asyncio.sleep(0.05)
    assert not ends.errors
    await asyncio.sleep(0.1)
    assert ends.words() == "The VM was ended after 0.1 s without work (idle_timeout)"
    assert 0.85 <= ends.after < 1.0


async def test_a_vm_that_nobody_uses_is_idle_from_the_beginning() -> None:
    ends = Ends()
    TimeLimits(None, 0.05, ends)
    await asyncio.sleep(0.1)
    assert len(ends.errors) == 1


async def test_a_touch_begins_the_idle_time_anew() -> None:
    ends = Ends()
    limits = TimeLimits(None, 0.1, ends)
    for _ in range(5):
        await asyncio.sleep(0.05)
        limits.touch()
    assert not ends.errors
    await asyncio.sleep(0.15)
    assert len(ends.errors) == 1


async def test_one_that_is_closed_says_nothing_any_more() -> None:
    ends = Ends()
    limits = TimeLimits(0.02, 0.02, ends)
    limits.close()
    limits.note(False)
    await asyncio.sleep(0.05)
    assert not ends.errors


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1800, "30 min"), (7200, "2 h"), (90, "90 s"), (60, "1 min"), (1.5, "1.5 s"), (86400, "24 h")],
)
def test_times_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert spoken(seconds) == text
