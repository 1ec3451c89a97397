"""A host of each test's own for the VM manager, of which nothing may be left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmhost import RunningVm, VmHost, seconds_until


@pytest.fixture(scope="session")
def template(minimal_image: str, session_dir: Path) -> str:
    """The template that all VMs of these tests are cloned from; building it has tests elsewhere."""

    async def start_one(host: VmHost) -> None:
        async with RunningVm(host.settings()):
            pass

    host = VmHost(session_dir)
    asyncio.run(start_one(host))
    host.share_facts()
    return minimal_image


@pytest.fixture
def host(template: str, session_dir: Path) -> Iterator[VmHost]:
    """A host of the test's own; nothing of it may be left at the end."""
    host = VmHost(session_dir)
    yield host
    seconds_until(lambda: not host.left(), 5)
    left = host.left()
    host.clear()
    assert not left
