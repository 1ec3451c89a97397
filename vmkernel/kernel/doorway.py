"""One who came by a kernel's door: `vmkernel cp`, with files for its VM or from it.

Where it stands: under ``kernel.door``, imported when the first one comes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from vmkernel.errors import ProtocolError, VmError, VmGuestError
from vmkernel.host import localsocket, wire
from vmkernel.protocol import messages
from vmkernel.vm.ports import Port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmkernel.kernel.door import Door

log = logging.getLogger("vmkernel")

MOST_CALLS = 16
"""How many of one visitor's calls are served at once."""


class Visitor:
    """One connection."""

    def __init__(self, door: Door) -> None:
        self.port = Port("visitor", self._on_message, self._on_lost)
        self._door = door
        self._known = False
        self._tasks: set[asyncio.Task[None]] = set()
        door.visitors.add(self)

    def leave(self) -> None:
        """Hang up."""
        self._on_lost(None)

    def _on_lost(self, error: ProtocolError | None) -> None:
        if error is not None:
            log.warning("a visitor of this kernel's VM was sent away: %s", error)
        self._door.visitors.discard(self)
        self.port.close()

    def _on_message(self, body: memoryview, buffers: list[memoryview]) -> None:
        if not self._known:
            localsocket.check_peer(self.port.socket)
            self._known = True
        request = messages.decode(body, wire.Request)
        if len(self._tasks) >= MOST_CALLS:
            raise ProtocolError(f"more than {MOST_CALLS} calls at once")
        task = asyncio.ensure_future(self._serve(request, buffers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, request: wire.Request, buffers: Sequence[memoryview]) -> None:
        call = request.call
        received: list[memoryview] = []
        try:
            if not (isinstance(call, wire.Ask) and isinstance(call.command, messages.FileCommand)):
                raise VmGuestError(
                    "a notebook's VM lets in files, and nothing else",
                    hint="talk to its kernel: jupyter console --existing",
                )
            guest = self._door.supply.current
            if guest is None:
                raise VmGuestError("the kernel has no VM now", hint="run a cell, which starts one")
            self._door.supply.touch()
            agent = guest.vm.agent
            result, received = await agent.exchange(call.command, buffers, call.timeout)
            reply = wire.Reply(result=result)
        except VmError as error:
            reply = wire.Reply(wire.Failure.of(error))
        if self.port.connected:
            self.port.send(wire.encode(wire.FromRunner(request.id, reply)), received)
