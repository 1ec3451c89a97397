"""The policy ``safe``, message type by message type (messaging spec 5.4).

Contents are made anew of the fields that the specification has, with the types that it gives them.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from vmkernel import text as terminal
from vmkernel.kernel.policy import Message, bundle, replies
from vmkernel.kernel.policy.jsontypes import plain

if TYPE_CHECKING:
    from vmkernel.kernel.policy.widgets import Comms

Done = tuple[Message | None, list[str]]

_STREAMS = 64
"""Streams whose unfinished sequences are remembered."""
_CONTROL = "terminal sequences other than colours"
_DISPLAYS = frozenset({"display_data", "update_display_data", "execute_result"})
_COMMS = frozenset({"comm_open", "comm_msg", "comm_close"})
_VERSION = re.compile(r"[0-9.]{1,16}")


class SafeOutputs:
    """What is remembered between messages: cut sequences of streams, kinds of comms."""

    def __init__(self) -> None:
        self._comms: Comms | None = None
        self._streams: OrderedDict[tuple[str, str], terminal.TerminalFilter] = OrderedDict()

    @property
    def comms(self) -> Comms:
        """The kernel's comms; made when there is one."""
        if self._comms is None:
            from vmkernel.kernel.policy.widgets import Comms

            self._comms = Comms(self._widget_outputs)
        return self._comms

    def iopub(
        self, msg_type: str, message: Message, parent_id: str, request: dict[str, Any] | None
    ) -> Done:
        """An output as it may be published, and kinds of things that went."""
        content, metadata, buffers = message
        if msg_type == "stream":
            return self._stream(content, parent_id)
        if msg_type in _DISPLAYS:
            shown, removed = display(msg_type, content)
            return (None if shown is None else (shown, {}, ())), removed
        if msg_type in _COMMS:
            cleaned, removed = self.comms.message(msg_type, content, buffers)
            if cleaned is None:
                return None, removed
            version = metadata.get("version")
            known = {"version": version} if _is_version(version) else {}
            return (cleaned, known, buffers), removed
        if msg_type == "error":
            return (replies.error(content), {}, ()), []
        if msg_type == "clear_output":
            return ({"wait": content.get("wait") is True}, {}, ()), []
        if msg_type == "execute_input":
            return _execute_input(content, request)
        if msg_type == "debug_event":
            return (plain(content), {}, ()), []
        return None, [bundle.said_name(msg_type)]

    def reply(self, msg_type: str, message: Message) -> Done:
        """A reply as it may be sent."""
        content, metadata, buffers = message
        cleaned, removed = replies.clean(msg_type, content, self._knows)
        return (cleaned, plain(metadata), buffers if msg_type == "debug_reply" else ()), removed

    def _knows(self, comm_id: Any) -> bool:
        return self.comms.knows(comm_id)

    def prompt(self, content: dict[str, Any]) -> dict[str, Any]:
        """A question to the user."""
        prompt = content.get("prompt")
        return {
            "prompt": bundle.plain(prompt[: replies.LONGEST]) if isinstance(prompt, str) else "",
            "password": content.get("password") is True,
        }

    def _stream(self, content: dict[str, Any], parent_id: str) -> Done:
        name, written = content.get("name"), content.get("text")
        if name not in ("stdout", "stderr") or not isinstance(written, str):
            return None, ["a stream that is none"]
        key = (parent_id, name)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = terminal.TerminalFilter()
            if len(self._streams) > _STREAMS:
                self._streams.popitem(last=False)
        stream.removed = False
        shown = bundle.without_script_links(stream.feed(written))
        removed = [_CONTROL] if stream.removed else []
        if not shown and written:
            return None, removed
        return ({"name": name, "text": shown}, {}, ()), removed

    def _widget_outputs(self, outputs: Any) -> tuple[Any, list[str]]:
        """What an Output widget has captured: nbformat's outputs."""
        kept: list[dict[str, Any]] = []
        removed: list[str] = []
        for output in outputs:
            kind = output.get("output_type") if isinstance(output, dict) else None
            if kind in ("display_data", "execute_result"):
                shown, gone = display(kind, output)
                removed += gone
                if shown is not None:
                    shown.pop("transient", None)
                    kept.append({"output_type": kind, **shown})
            elif kind == "stream":
                text = output.get("text")
                text = "".join(text) if isinstance(text, list) else text
                name = "stderr" if output.get("name") == "stderr" else "stdout"
                if isinstance(text, str):
                    kept.append({"output_type": kind, "name": name, "text": bundle.plain(text)})
            elif kind == "error":
                kept.append({"output_type": kind, **replies.error(output)})
        return kept, removed


def display(msg_type: str, content: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """A display's content, and kinds of things that went."""
    data, metadata, removed = bundle.clean(content.get("data"), content.get("metadata"))
    shown: dict[str, Any] = {"data": data, "metadata": metadata}
    transient = content.get("transient")
    display_id = transient.get("display_id") if isinstance(transient, dict) else None
    if isinstance(display_id, str) and len(display_id) <= 1024:
        shown["transient"] = {"display_id": display_id}
    elif msg_type == "update_display_data":
        return None, removed
    elif isinstance(transient, dict):
        shown["transient"] = {}
    if msg_type == "execute_result":
        shown["execution_count"] = replies.count(content.get("execution_count"))
    return shown, removed


def _execute_input(content: dict[str, Any], request: dict[str, Any] | None) -> Done:
    """What runs, as the host knows it: a guest could show other code than what was sent."""
    code = None if request is None else request.get("code")
    if not isinstance(code, str):
        return None, []
    shown = {"code": code, "execution_count": replies.count(content.get("execution_count"))}
    return (shown, {}, ()), []


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and _VERSION.fullmatch(value) is not None
