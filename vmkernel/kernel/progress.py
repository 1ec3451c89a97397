"""Telling, in a cell's output, what the cell is waiting for.

The text is a stream that overwrites itself; it goes away (``clear_output``) before the cell's own
output begins, so that a notebook is the same whether its first cell waited or not.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from vmkernel.kernel.sockets import Sockets

DELAY = 2.5
"""Seconds that pass in silence: a clone is there before, also on a host that is busy."""
INTERVAL = 0.5
"""Seconds between two texts at least."""


class Notice:
    """``with Notice(…) as notice: notice.show("waiting …")``."""

    def __init__(self, sockets: Sockets, parent: bytes, visible: bool) -> None:
        self._sockets = sockets
        self._parent = parent
        self._visible = visible
        self._shown = ""
        self._text = ""
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Notice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._shown:
            self._sockets.publish("clear_output", {"wait": False}, self._parent)

    def show(self, text: str) -> None:
        """What is being waited for now; shown when it lasts."""
        self._text = text
        if self._visible and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(INTERVAL if self._shown else DELAY, self._publish)

    def _publish(self) -> None:
        self._timer = None
        if self._text != self._shown:
            padding = " " * max(0, len(self._shown) - len(self._text))
            self._shown = self._text
            self._sockets.stderr(f"\r{self._text}{padding}", self._parent)
