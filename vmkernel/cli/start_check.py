"""``vmkernel doctor --start``: start one VM with these settings, and let it compute something.

The proof behind the other checks: the same staircase (`vmkernel.host.start`) that a kernel goes
up, each step timed. The VM takes a slot like any other, and is ended again. Floor 5.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from vmkernel.errors import VmError, VmGuestError
from vmkernel.protocol import messages

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest, KernelDeath
    from vmkernel.settings import Settings

_LABEL = "doctor"
_CODE, _ANSWER = "1 + 1", "2"


class Step(NamedTuple):
    """One step of a start that went well."""

    what: str
    seconds: float


def check_start(settings: Settings, on_step: Callable[[Step], None]) -> str:
    """Start a VM, run a cell, end the VM; what kind of VM it was, in a few words.

    ``on_step`` hears of each step when it is done.  Call it from the main thread (see vm.qemu).
    Raises VmError, as a kernel's first cell would tell it.
    """
    return asyncio.run(_Start(settings, on_step).run())


class _Start:
    def __init__(self, settings: Settings, on_step: Callable[[Step], None]) -> None:
        self._settings = settings
        self._on_step = on_step
        self._what = ""
        self._since = 0.0
        self._answer: asyncio.Future[str]

    async def run(self) -> str:
        """Go through the steps; a few words about the VM.  Raises VmError."""
        from vmkernel.host.start import Label, VmStart, begin

        self._answer = asyncio.get_running_loop().create_future()
        label = Label(_LABEL, _LABEL)
        self._begin_step("QEMU started")
        begun = begin(self._settings, label)
        start = VmStart(self._settings, label, begun)
        try:
            if begun is None:  # there is something to wait for: progress says what
                self._what = ""
            else:
                self._begin_step("guest awake")
            guest = await start.guest(
                on_output=self._on_output,
                on_kernel_death=self._on_kernel_death,
                on_end=self._on_end,
                progress=self._on_progress,
            )
            self._begin_step(f"{_CODE} is {_ANSWER}")
            await self._compute(guest)
            self._begin_step("VM ended")
        finally:
            await start.close()
        self._begin_step("")
        settings = self._settings
        return f"{settings.recipe}, {settings.memory} MiB, {start.accelerator}"

    def _begin_step(self, what: str) -> None:
        """The step before is done; ``what`` is the next one, "" when there is none."""
        now = time.monotonic()
        if self._what:
            self._on_step(Step(self._what, now - self._since))
        self._what, self._since = what, now

    def _on_progress(self, text: str) -> None:
        what = text.partition(":")[0]  # behind it stands how far it is
        if what != self._what:
            self._begin_step(what)

    async def _compute(self, guest: Guest) -> None:
        header = {"msg_id": _LABEL, "msg_type": "execute_request", "session": _LABEL}
        content = {"code": _CODE, "silent": False, "store_history": False, "allow_stdin": False}
        encode = messages.encode_json
        nothing = msgspec.Raw(b"{}")
        guest.send(
            messages.ToGuest(
                "shell",
                _LABEL,
                "execute_request",
                msgspec.Raw(encode(header)),
                nothing,
                msgspec.Raw(encode(content)),
            )
        )
        timeout = self._settings.start_timeout
        try:
            async with asyncio.timeout(timeout):
                answer = await self._answer
        except TimeoutError as error:
            raise VmGuestError(
                f"the guest did not answer to {_CODE} within {timeout:g} s",
                hint="Is the host overloaded? VMKERNEL_START_TIMEOUT gives it more time",
            ) from error
        if answer != _ANSWER:
            raise VmGuestError(
                f"the guest says that {_CODE} is {answer!r}",
                hint="verify the image: vmkernel image verify",
            )

    def _on_output(self, message: messages.FromGuest, buffers: Sequence[memoryview]) -> None:
        if message.msg_type == "execute_result":
            data: Any = message.content.get("data")
            self._settle(str(data.get("text/plain")) if isinstance(data, dict) else "")
        elif message.msg_type in ("error", "execute_reply"):
            self._settle(str(message.content.get("evalue", "")))

    def _on_kernel_death(self, death: KernelDeath) -> None:
        self._on_end(VmGuestError(death.reason, hint=death.hint))

    def _on_end(self, error: VmError) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)

    def _settle(self, answer: str) -> None:
        if not self._answer.done():
            self._answer.set_result(answer)
