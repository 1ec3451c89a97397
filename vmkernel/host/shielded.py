"""Work that is done to its end, whoever is cancelled meanwhile.

Where it stands: at the bottom of floor 4.  No event loop is imported for it: this module lies on
the start path of a kernel.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(work: Awaitable[T]) -> T:
    """Do all of it, however often the caller is cancelled meanwhile; then it is cancelled.

    For what tidies up, or uses what its caller takes away afterwards.
    """
    import asyncio

    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen: the cancellation is what is told
        raise
