"""What a notebook asks of vmkernel itself: the commands of ``%vm``.

Where it stands: ``kernel.wrapper`` passes on the guest's ``vm_request``s.  Whatever the guest asks
comes from code that is not trusted: a command here tells or does only what that code may know or
have done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from vmkernel.errors import VmError
from vmkernel.protocol import messages

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest
    from vmkernel.kernel.asking import Asking
    from vmkernel.kernel.copying import Copying
    from vmkernel.kernel.lane import Exchange
    from vmkernel.kernel.sockets import Sockets
    from vmkernel.kernel.supply import GuestSupply
    from vmkernel.settings import Settings

log = logging.getLogger("vmkernel")


COPIES = {
    "put": "[--force] LOCAL [PATH]: copy a file or directory of the host into the VM",
    "get": "[--force] PATH [LOCAL]: copy a file or directory of the VM to the host",
}
MOST_UNSENT = 1 << 20
"""Bytes that may wait for a guest; one that asks and does not listen gets no more answers."""


SETTLE = 1.0
"""Seconds by which an interrupt in the guest comes before our word that a copy was interrupted."""


class VmRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Content of a ``vm_request``."""

    id: messages.ShortStr
    command: messages.ShortStr
    arguments: list[messages.ShortStr]
    cwd: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    """The working directory of the code that asks, and whether it may write there"""
    writable: bool = False


class Questions:
    """Answers the guest's questions."""

    def __init__(
        self, supply: GuestSupply, settings: Settings, sockets: Sockets, asking: Asking
    ) -> None:
        self._supply = supply
        self._settings = settings
        self._sockets = sockets
        self._asking = asking
        self._copying: Copying | None = None
        self._commands: dict[str, tuple[Callable[[list[str]], Awaitable[str]], str]] = {
            "info": (self._info, "what this kernel's virtual machine is"),
            "help": (self._help, "this list"),
        }

    async def answer(self, content: dict[str, Any], cell: Exchange | None) -> None:
        """Answer one ``vm_request``, which came from ``cell`` (None: from none that runs)."""
        try:
            request = msgspec.convert(content, VmRequest)
        except msgspec.ValidationError as error:
            log.warning("a malformed question of the guest: %s", error)
            return
        guest = self._supply.current
        if guest is None or guest.vm.control.unsent > MOST_UNSENT:
            return  # it died, and with it who asked; or it does not listen
        reply: dict[str, Any]
        try:
            known = self._commands.get(request.command)
            if request.command in COPIES:
                reply = {"status": "ok", "text": await self._copy(request, guest, cell)}
            elif known is None:
                names = ", ".join((*self._commands, *COPIES))
                reply = _error(f"there is no command {request.command!r}; there are: {names}")
            else:
                reply = {"status": "ok", "text": await known[0](request.arguments)}
        except VmError as error:
            reply = _error(error.explain())
        except Exception as error:  # whoever asks waits for an answer
            log.exception("%%vm %s failed", request.command)
            reply = _error(f"vmkernel failed in a way it should not: {error!r}")
        try:
            empty = msgspec.Raw(b"{}")
            body = msgspec.Raw(messages.encode_json(reply))
            guest.send(
                messages.ToGuest("vm", request.id, "vm_reply", empty, empty, body),
                while_busy=True,
            )
        except VmError as error:
            log.info("an answer did not reach the guest: %s", error)

    async def _info(self, arguments: list[str]) -> str:
        facts = self._supply.describe()
        width = max(map(len, facts))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())

    async def _help(self, arguments: list[str]) -> str:
        commands = {name: text for name, (_, text) in self._commands.items()} | COPIES
        width = max(map(len, commands))
        return "\n".join(f"%vm {name:<{width}}  {text}" for name, text in commands.items())

    # --- files ---

    async def _copy(self, request: VmRequest, guest: Guest, cell: Exchange | None) -> str:
        from vmkernel.kernel.copying import Copying, CopyInterruptedError, Place

        if cell is None:
            raise VmError("files are copied for a cell that runs", hint="use a cell of its own")
        if self._copying is None:
            self._copying = Copying(
                self._settings, self._asking, self._show, self._supply.connection_file
            )
        place = Place(request.cwd, request.writable)
        try:
            return await self._copying.serve(request.command, request.arguments, place, guest, cell)
        except CopyInterruptedError:
            await asyncio.sleep(SETTLE)
            raise

    def _show(self, cell: Exchange, text: str) -> None:
        if not cell.done.done():
            self._sockets.stderr(text, cell.request.raw[0])

    def interrupt(self, cell: Exchange) -> None:
        """A cell was interrupted: end what it has asked for."""
        if self._copying is not None:
            self._copying.interrupt(cell)


def _error(reason: str) -> dict[str, Any]:
    return {"status": "error", "ename": "UsageError", "evalue": reason}
