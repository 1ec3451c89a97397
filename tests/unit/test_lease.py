"""The leases of one host's kernels, where the host's answers go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vmkernel.cluster import lease
from vmkernel.cluster.lease import HostLink
from vmkernel.cluster.placement import HostFailedError, HostLostError, HostSilentError


class Machine:
    """A `Host` whose answers a test decides; real ones do not fail in these ways on demand."""

    label = "there"

    def __init__(self) -> None:
        self.cluster = SimpleNamespace(lost="")
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}

    async def call(self, method: str, *arguments: Any, **_: Any) -> Any:
        self.calls.append(method)
        if method in self.fails:
            raise self.fails[method]
        return {name: {"state": "running"} for name in arguments[0]} if method == "renew" else None


class Kernel:
    lease = 30.0
    shell = ("127.0.0.1", 9)

    def __init__(self) -> None:
        self.told: list[str] = []

    def ended(self, exit_code: int) -> None:
        self.told.append(f"ended {exit_code}")

    def lost(self, why: str) -> None:
        self.told.append(why)

    def moved(self, host: Any) -> None:
        self.told.append("moved")

    def silent(self, seconds: float) -> None:
        self.told.append("silent")


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, Kernel, Callable[[], Awaitable[None]]]:
    monkeypatch.setattr(lease, "INTERVAL", 0.0)
    machine, kernel = Machine(), Kernel()

    async def again() -> Any:
        return machine

    async def rounds() -> None:
        """Some rounds of renewal, of one kernel and one that was abandoned."""
        link = HostLink(machine, again)  # type: ignore[arg-type]
        link.add("kept", kernel)
        link.abandon("other")
        running = asyncio.create_task(link.run())
        await asyncio.sleep(0.45)
        assert not running.done()
        running.cancel()
        await asyncio.wait([running])
        assert link.closed

    return machine, kernel, rounds


@pytest.mark.parametrize("error", [HostFailedError("a bug there"), HostSilentError("it hangs")])
async def test_an_end_that_fails_keeps_no_lease_from_being_renewed(rig, error):
    machine, kernel, rounds = rig
    machine.fails["end"] = error
    await rounds()
    assert machine.calls.count("renew") >= 3
    assert machine.calls.count("end") >= 3, "it is told again"
    assert kernel.told == []


async def test_an_end_that_succeeds_is_told_once(rig):
    machine, _, rounds = rig
    await rounds()
    assert machine.calls.count("end") == 1


async def test_a_bug_of_ours_ends_no_renewals(rig):
    machine, kernel, rounds = rig
    machine.fails["renew"] = TypeError("a bug here")
    await rounds()
    assert machine.calls.count("renew") >= 3
    assert kernel.told == []


async def test_a_host_that_is_gone_is_told_once(rig):
    machine, kernel, rounds = rig
    machine.fails["renew"] = HostLostError("it died")
    await rounds()
    assert kernel.told == ["there: it died"]
    assert machine.calls == ["renew"]
