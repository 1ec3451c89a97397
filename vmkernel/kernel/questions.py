"""What a notebook asks of vmkernel itself: the commands of ``%vm``.

Where it stands: ``kernel.wrapper`` passes on the guest's ``vm_request``s.  Whatever the guest asks
comes from code that is not trusted: a command here tells or does only what that code may know or
have done.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel.errors import VmError
from vmkernel.protocol import messages

if TYPE_CHECKING:
    from vmkernel.kernel.supply import GuestSupply

log = logging.getLogger("vmkernel")


MOST_UNSENT = 1 << 20
"""Bytes that may wait for a guest; one that asks and does not listen gets no more answers."""


class VmRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Content of a ``vm_request``."""

    id: messages.ShortStr
    command: messages.ShortStr
    arguments: list[messages.ShortStr]


class Questions:
    """Answers the guest's questions."""

    def __init__(self, supply: GuestSupply) -> None:
        self._supply = supply
        self._commands: dict[str, tuple[Callable[[list[str]], Awaitable[str]], str]] = {
            "info": (self._info, "what this kernel's virtual machine is"),
            "help": (self._help, "this list"),
        }

    async def answer(self, content: dict[str, Any]) -> None:
        """Answer one ``vm_request``."""
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
            if known is None:
                names = ", ".join(self._commands)
                reply = _error(f"there is no command {request.command!r}; there are: {names}")
            else:
                reply = {"status": "ok", "text": await known[0](request.arguments)}
        except VmError as error:
            reply = _error(error.explain())
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
        return "\n".join(f"%vm {name:<8} {text}" for name, (_, text) in self._commands.items())


def _error(reason: str) -> dict[str, Any]:
    return {"status": "error", "ename": "UsageError", "evalue": reason}
