"""A host of each test's own for the VM manager, of which nothing may be left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from vmhost import VmHost, seconds_until
from vmkernel import VmHandle, VmManager


@pytest.fixture
def host(template: str, session_dir: Path) -> Iterator[VmHost]:
    """A host of the test's own; nothing of it may be left at the end."""
    host = VmHost(session_dir)
    yield host
    seconds_until(lambda: not host.left(), 5)
    left = host.left()
    host.clear()
    assert not left


@pytest.fixture
async def manager(host: VmHost) -> AsyncIterator[VmManager]:
    """A manager on that host."""
    async with VmManager(host.settings()) as manager:
        yield manager


@pytest.fixture
async def vm(manager: VmManager) -> VmHandle:
    """A VM of its."""
    return await manager.create_vm(tenant_id="tenant", task_id="task-1")
