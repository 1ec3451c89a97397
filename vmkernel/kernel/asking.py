"""vmkernel asks the person at a cell's front end, in its own name.

The question is an ``input_request`` of the host's, so the guest neither sees nor forges the answer.
While it stands the guest's own questions wait, and it is not asked while one of those is seen:
what a person types can then be meant for one of them only, also with a client that does not say
which question it answers.  Where it stands: under ``kernel.copying``, beside ``kernel.wrapper``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vmkernel.errors import VmError
from vmkernel.kernel.lane import EXECUTE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmkernel.kernel.lane import Exchange
    from vmkernel.kernel.sockets import Request, Sockets


MOST_HELD = 16
"""Questions of a guest's that wait; more are dropped."""


class Asking:
    """At most one question at a time.  ``guest_asks()``: whether one of the guest's is seen."""

    def __init__(self, sockets: Sockets, guest_asks: Callable[[], bool]) -> None:
        self._sockets = sockets
        self._guest_asks = guest_asks
        self._question = ""
        self._answer: asyncio.Future[str] | None = None
        self._held: list[Callable[[], None]] = []

    @property
    def open(self) -> bool:
        """Whether a question stands."""
        return self._answer is not None

    async def ask(self, exchange: Exchange, prompt: str) -> str:
        """What the person typed.  Raises VmError where nobody can be asked."""
        self.check(exchange)
        content = {"prompt": prompt, "password": False}
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._question = self._sockets.reply(
                exchange.request, "input_request", content, channel="stdin"
            )
            return await self._answer
        finally:
            self._answer = None
            held, self._held = self._held, []
            for question in held:
                question()

    def check(self, exchange: Exchange) -> None:
        """Raises VmError where nobody can be asked."""
        request = exchange.request
        if request.msg_type != EXECUTE:
            raise VmError("only in a cell that runs can anybody be asked", hint="use a cell")
        if request.content.get("allow_stdin") is False:
            raise VmError(
                "this has to be agreed to, and this front end asks nobody (nbconvert, papermill)",
                hint="set files = on (VMKERNEL_FILES=on) where the notebook may copy by itself",
            )
        if self.open or self._guest_asks():
            raise VmError("another question waits for its answer", hint="answer that one first")

    def hold(self, question: Callable[[], None]) -> bool:
        """A question of the guest's waits for the end of the one that stands, if one does."""
        if self.open and len(self._held) < MOST_HELD:
            self._held.append(question)
        return self.open

    def heard(self, request: Request) -> bool:
        """An ``input_reply`` came: whether it was the answer to the question that stands."""
        if self._answer is None or request.msg_type != "input_reply":
            return False
        if request.parent_id not in ("", self._question):
            return False
        if not self._answer.done():
            self._answer.set_result(str(request.content.get("value", "")))
        return True
