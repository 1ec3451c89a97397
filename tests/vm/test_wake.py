"""Waking a clone: two of one template have nothing random in common, and know what time it is.

And nothing of the user's runs in a clone that was not woken.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from vmhost import RunningVm, VmHost, execute_request
from vmkernel.host.guest import Guest
from vmkernel.host.start import Label, VmStart
from vmkernel.host.waking import wake_request
from vmkernel.protocol import messages

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

RANDOM = """
import json, os, random, secrets, ssl, subprocess, tempfile, uuid
from uuid import getnode

def run(*command):
    return subprocess.check_output(command, text=True).strip()

print(json.dumps({
    "os.urandom": os.urandom(16).hex(),
    "os.getrandom": os.getrandom(16).hex(),
    "random": random.random(),
    "random.Random": random.Random().random(),
    "SystemRandom": random.SystemRandom().random(),
    "a new process's random": run("python3", "-c", "import random; print(random.random())"),
    "hash of a str in a new process": run("python3", "-c", "print(hash('x'))"),
    "uuid1": str(uuid.uuid1()),
    "node": getnode(),
    "uuid4": str(uuid.uuid4()),
    "secrets": secrets.token_hex(),
    "ssl": ssl.RAND_bytes(16).hex(),
    "mkstemp": tempfile.mkstemp()[1],
    "mkdtemp": tempfile.mkdtemp(),
    "mktemp of the shell": run("mktemp"),
    "kernel's uuid": open("/proc/sys/kernel/random/uuid").read(),
    "host name": os.uname().nodename,
    "host name to the shell": run("hostname"),
}))
"""
NUMPY = """
import json
import numpy
print(json.dumps({
    "numpy.random.random": numpy.random.random(),
    "numpy.random.randint": int(numpy.random.randint(2**62)),
    "numpy.random.RandomState": float(numpy.random.RandomState().random()),
    "numpy.random.default_rng": float(numpy.random.default_rng().random()),
    "numpy.random.get_state": numpy.random.get_state()[1].tolist()[:100],
}))
"""


@pytest.fixture(scope="module")
def host(session_dir: Path, minimal_image: str) -> Iterator[VmHost]:
    """The module's host."""
    host = VmHost(session_dir)
    yield host
    assert host.left() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def twins(host: VmHost) -> AsyncGenerator[tuple[RunningVm, RunningVm], None]:
    """Two clones of one template."""
    settings = host.settings()
    async with RunningVm(settings) as one, RunningVm(settings) as other:
        assert one.start.template is not None
        assert other.start.template is not None
        assert one.start.template.directory == other.start.template.directory
        yield one, other


async def ask(vm: RunningVm, code: str) -> dict[str, Any]:
    answer = await vm.run(code)
    value: dict[str, Any] = json.loads(answer)
    return value


async def test_twins_agree_on_nothing_random(twins: tuple[RunningVm, RunningVm]) -> None:
    one, other = [await ask(vm, RANDOM) for vm in twins]
    assert len(one) == 18
    assert [name for name in one if one[name] == other[name]] == []


async def test_nor_do_twins_that_have_numpy_loaded(
    session_dir: Path, datascience_image: str
) -> None:
    """numpy comes with the template, and its global generator was seeded in there."""
    host = VmHost(session_dir)
    # The memory of the session's kernelspec, so that its template serves here, too.
    settings = host.settings(VMKERNEL_RECIPE=datascience_image, VMKERNEL_MEMORY="1G")
    async with RunningVm(settings) as vm:
        loaded = await vm.run("import sys; print('numpy' in sys.modules)")
        one = await ask(vm, NUMPY)
    async with RunningVm(settings) as vm:
        other = await ask(vm, NUMPY)
    assert loaded == "True\n"
    assert [name for name in one if one[name] == other[name]] == []
    assert host.left() == []


async def test_their_clocks_are_right_within_100_ms(twins: tuple[RunningVm, RunningVm]) -> None:
    for vm in twins:
        off = []
        for _ in range(5):
            before = time.time()
            guest = float(await vm.run("import time; print(time.time())"))
            after = time.time()
            # It was read at some moment between: outside of that it is wrong by this much.
            off.append(max(before - guest, guest - after, 0.0))
        assert min(off) < 0.1, off
        assert max(off) < 0.5, off


async def test_their_clocks_run_as_fast_as_ours(twins: tuple[RunningVm, RunningVm]) -> None:
    vm, _ = twins
    code = "import time; print(time.time(), time.monotonic())"
    first, began = await vm.run(code), time.monotonic()
    await asyncio.sleep(2)
    second, ended = await vm.run(code), time.monotonic()
    for earlier, later in zip(first.split(), second.split(), strict=True):
        assert float(later) - float(earlier) == pytest.approx(ended - began, abs=0.2)


async def test_the_time_zone_and_the_name_are_what_the_host_says(
    host: VmHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    monkeypatch.setenv("COLUMNS", "77")
    monkeypatch.setenv("HOST_SECRET", "77")
    async with RunningVm(host.settings()) as vm:
        code = "import os, time, platform; print(time.tzname[0], os.environ['COLUMNS'], %s)"
        assert await vm.run(code % "platform.node()") == f"IST 77 {vm.start.vm_id}\n"
        assert await vm.run(code % "'HOST_SECRET' in os.environ") == "IST 77 False\n"


class TestFailClosed:
    """What is sent to a clone before its wake-up, which else lies in the port before all."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def asleep(
        self, host: VmHost, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncGenerator[Asleep, None]:
        """A clone whose state is loaded, and that runs, but was not woken."""
        monkeypatch.setattr("vmkernel.host.waking.write_ahead", lambda *arguments: None)
        asleep = Asleep(host)
        await asleep.bring_up()
        yield asleep
        await asleep.start.close()

    async def test_a_request_is_never_run(self, asleep: Asleep) -> None:
        asleep.guest.send(execute_request("early", "ran = print('ran')"))
        await asyncio.sleep(2)
        assert asleep.outputs == []
        # Nor is it when the clone wakes after all.
        await asleep.wake()
        await asleep.serve(execute_request("late", "print('ran' in globals())"))
        assert {message.parent_id for message in asleep.outputs} == {"late"}
        texts = [m.content["text"] for m in asleep.outputs if m.msg_type == "stream"]
        assert texts == ["False\n"]

    async def test_nor_after_a_wake_up_that_is_none(self, asleep: Asleep) -> None:
        """A request that calls itself one, without the entropy that a wake-up brings."""
        request = execute_request("early", "print('ran')")
        rest = (request.header, request.metadata, request.content)
        asleep.guest.send(messages.ToGuest("control", "wake", "wake_request", *rest))
        asleep.guest.send(request)
        await asyncio.sleep(2)
        assert asleep.outputs == []


class Asleep:
    """The steps of a start, up to the wake-up."""

    def __init__(self, host: VmHost) -> None:
        self.outputs: list[messages.FromGuest] = []
        self.guest: Guest
        self.start = VmStart(host.settings(), Label("test", "test"))

    async def bring_up(self) -> None:
        """As ``VmStart.guest`` does."""
        started = await self.start._start(lambda text: None)
        self.guest = self.start._guest = Guest(
            started.spawned,
            {},
            on_output=lambda message, buffers: self.outputs.append(message),
            on_kernel_death=lambda death: None,
            on_end=lambda error: None,
        )
        await self.guest.vm.attach(self.start.settings.state_dir / "asleep.log", 1 << 20)
        await self.guest.vm.load(60)

    async def wake(self) -> None:
        """The wake-up that was held back."""
        self.guest.send(wake_request({}))
        await self.guest.wake(60)

    async def serve(self, request: messages.ToGuest) -> None:
        """Send a request and wait for its end."""
        self.guest.send(request)
        async with asyncio.timeout(60):
            while "status" not in [message.msg_type for message in self.outputs]:
                await asyncio.sleep(0.01)
