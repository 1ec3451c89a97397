"""What a relay keeps: requests that wait for a kernel, and those that one has not answered yet.

Both are bounded: by number and bytes what waits (one more is answered with an error), by number
what is with the kernel (of which only what an answer needs is kept).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from vmkernel.cluster.relay_sockets import FrontEnds, Passing
from vmkernel.errors import VmError
from vmkernel.kernel.progress import Notice

log = logging.getLogger("vmkernel")

MOST_HELD = 1000
"""Requests that wait for a kernel."""
MOST_HELD_BYTES = 64 << 20
"""Of them together; a single one may be larger."""
MOST_PENDING = 50_000
"""Requests that a kernel has not answered; the oldest are forgotten (a kernel need not answer what
it does not know)."""

Key = tuple[str, tuple[bytes, ...], str]


class Waiting:
    """Requests that are held, in order, and what the notebook says about it."""

    def __init__(self, sockets: FrontEnds) -> None:
        self.text = ""
        """What is waited for"""
        self._sockets = sockets
        self._held: dict[int, Passing] = {}
        self._bytes = 0
        self._notice: Notice | None = None
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, request: Passing) -> None:
        """Keep it.  Raises VmError: there are too many."""
        full = self._held and self._bytes + request.size > MOST_HELD_BYTES
        if full or len(self._held) >= MOST_HELD:
            raise VmError(
                f"{len(self._held)} requests ({self._bytes >> 20} MiB) wait for a kernel already",
                hint="run this again when the kernel has come",
                code_ran="no",
            )
        self._held[id(request)] = request
        self._bytes += request.size
        self._show()

    def hold_for(self, request: Passing, seconds: float, late: Callable[[Passing], None]) -> None:
        """Keep it for so long; *late* is called when it is here still.  Raises VmError."""
        self.hold(request)

        def give_up() -> None:
            if self._take(request):
                late(request)

        loop = asyncio.get_running_loop()
        self._timers[id(request)] = loop.call_later(seconds, give_up)

    def _take(self, request: Passing) -> bool:
        timer = self._timers.pop(id(request), None)
        if timer is not None:
            timer.cancel()
        if self._held.pop(id(request), None) is None:
            return False
        self._bytes -= request.size
        return True

    def take_all(self, msg_type: str = "") -> list[Passing]:
        """Hand out what is held (of one type), in order, and say no more of it."""
        taken = [each for each in self._held.values() if msg_type in ("", each.msg_type)]
        for request in taken:
            self._take(request)
        self.hush()
        return taken

    def say(self, text: str) -> None:
        """What is waited for: shown in the first cell that waits, when it lasts."""
        self.text = text
        if self._notice is not None:
            self._notice.show(text)

    def _show(self) -> None:
        if self._notice is not None:
            return
        cells = (held for held in self._held.values() if held.msg_type == "execute_request")
        cell = next((cell for cell in cells if not cell.silent), None)
        if cell is not None:
            self._sockets.status("busy", cell.raw[0])
            self._notice = Notice(self._sockets, cell.raw[0], visible=True)
            if self.text:
                self._notice.show(self.text)

    def hush(self) -> None:
        """Take the notice away: the cell begins, or is answered."""
        notice, self._notice = self._notice, None
        if notice is not None:
            notice.__exit__(None, None, None)


class Pending:
    """Requests that the kernel has, and no answer yet."""

    def __init__(self) -> None:
        self._requests: dict[Key, Passing] = {}
        self._forgotten = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Passing]:
        return iter(self._requests.values())

    def add(self, request: Passing) -> None:
        """It was sent; its body is let go."""
        if not request.msg_type.endswith("_request"):
            return  # comm messages have no answer
        request.forget_body()
        self._requests[request.key] = request
        if len(self._requests) > MOST_PENDING:
            del self._requests[next(iter(self._requests))]
            self._forgotten += 1
            if self._forgotten == 1:
                log.warning("a kernel owes more than %d answers: the first are not", MOST_PENDING)

    def answered(self, key: Key) -> Passing | None:
        """It has its answer; None when nobody asked."""
        return self._requests.pop(key, None)

    def take_all(self) -> list[Passing]:
        """Hand out what has no answer, in the order in which it was sent."""
        requests, self._requests = self._requests, {}
        return list(requests.values())

    @property
    def running(self) -> Passing | None:
        """The first cell that has no answer: it runs, or will next."""
        cells = (each for each in self if each.msg_type == "execute_request")
        return next(cells, None)
