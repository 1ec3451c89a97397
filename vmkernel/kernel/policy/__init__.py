"""What of a guest's messages a front end is given (DESIGN: outputs are part of the wall).

A notebook front end runs script that it finds in the outputs of a cell, with its user's rights, and
from there can open a terminal on the host.  `SafeOutputs` takes what could lead there out of every
message and tells what it took.  It is pure: no I/O, no clock; whatever goes wrong in it costs the
message and not the kernel.  nh3 is imported when the first HTML comes that needs it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmkernel.kernel.policy.messages import SafeOutputs

log = logging.getLogger("vmkernel")

Message = tuple[dict[str, Any], dict[str, Any], Sequence[Any]]
"""Content, metadata, buffers."""
_UNREADABLE = {
    "status": "error",
    "ename": "OutputPolicyError",
    "evalue": "the guest's reply could not be checked",
    "traceback": [],
}
_KNOWN_CELLS = 256
_MOST_KINDS = 12


class Outputs:
    """The policy of one kernel, ``safe`` or ``trusted``.

    Each method returns what is to be sent; None when nothing is.
    """

    def __init__(self, policy: str) -> None:
        self.safe = policy != "trusted"
        self._safe: SafeOutputs | None = None
        self._told: OrderedDict[str, set[str]] = OrderedDict()
        self._news: list[str] = []

    def _policy(self) -> SafeOutputs:
        if self._safe is None:
            from vmkernel.kernel.policy.messages import SafeOutputs

            self._safe = SafeOutputs()
        return self._safe

    def prepare(self) -> None:
        """Import what the first message will need, while there is nothing else to do (15 ms)."""
        if self.safe:
            self._policy()

    def iopub(
        self,
        msg_type: str,
        message: Message,
        parent_id: str,
        request: dict[str, Any] | None = None,
    ) -> Message | None:
        """An output; ``request`` is the content of the request that runs, None when it is over."""
        if not self.safe:
            return message
        done: Message | None = self._checked(
            lambda: self._policy().iopub(msg_type, message, parent_id, request), parent_id
        )
        return done

    def reply(self, msg_type: str, message: Message, parent_id: str) -> Message:
        """A reply; there is always one."""
        if not self.safe:
            return message
        done: Message | None = self._checked(
            lambda: self._policy().reply(msg_type, message), parent_id
        )
        return done if done is not None else (dict(_UNREADABLE), {"status": "error"}, ())

    def prompt(self, content: dict[str, Any]) -> dict[str, Any]:
        """An ``input_request``."""
        if not self.safe:
            return content
        done: dict[str, Any] | None = self._checked(
            lambda: (self._policy().prompt(content), []), ""
        )
        return {"prompt": "", "password": False} if done is None else done

    def heard(self, msg_type: str, content: dict[str, Any]) -> None:
        """The front end sent a comm message."""
        if self.safe and msg_type == "comm_open":
            self._policy().comms.opened_by_front_end(content)

    def notice(self) -> str:
        """What was taken out since the last call and not told in that cell yet; "" mostly."""
        if not self._news:
            return ""
        kinds, self._news = self._news, []
        return (
            f"vmkernel: not shown: {'; '.join(kinds)}. Outputs come from the VM, which is not "
            "trusted; VMKERNEL_OUTPUTS=trusted, or a kernel from `vmkernel install --outputs "
            "trusted`, shows everything.\n"
        )

    def _checked(self, clean: Any, parent_id: str) -> Any:
        try:
            result, removed = clean()
        except Exception as error:  # whatever the guest found to break us: not this message
            log.warning("a guest's message was not passed on: %s", type(error).__name__)
            result, removed = None, ["a message that could not be checked"]
        if removed:
            self._note(parent_id, removed)
        return result

    def _note(self, parent_id: str, removed: list[str]) -> None:
        told = self._told.setdefault(parent_id, set())
        self._told.move_to_end(parent_id)
        if len(self._told) > _KNOWN_CELLS:
            self._told.popitem(last=False)
        for kind in removed:
            if kind not in told and len(told) < _MOST_KINDS:
                told.add(kind)
                self._news.append(kind)
