"""What a message of the guest must contain, for front ends and for us to act on it.

Decoding proved that a content is a JSON object.  Here its fields are looked at that the messaging
specification names (https://jupyter-client.readthedocs.io/en/stable/messaging.html): a field that
is there has its type, and what every front end reads without asking is there.  More than that is
no kernel's duty, and R's, bash's or Julia's say what IPython's does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MOST_COUNT = 1 << 53
"""What JavaScript can count to."""
LONGEST_ID = 1024
"""Characters of an id that is the guest's word."""
LONGEST_PROMPT = 1 << 16
"""Characters of a question that a person is asked."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_ID


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value < MOST_COUNT)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_lines(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(line, str) for line in value)


def _is_transient(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("display_id"), str | None)


def _is_status(value: Any) -> bool:
    return isinstance(value, str) and value in ("ok", "error", "aborted", "abort")


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


Check = Callable[[Any], bool]
_ERROR: dict[str, Check] = {"ename": _is_text, "evalue": _is_text, "traceback": _are_lines}
_DISPLAY: dict[str, Check] = {
    "data": _is_object,
    "metadata": _is_object,
    "transient": _is_transient,
}
_FIELDS: dict[str, dict[str, Check]] = {
    "stream": {"name": _is_name, "text": _is_text},
    "display_data": _DISPLAY,
    "update_display_data": _DISPLAY,
    "execute_result": {**_DISPLAY, "execution_count": _is_count},
    "execute_input": {"execution_count": _is_count},  # the code is the host's own
    "error": _ERROR,
    "clear_output": {"wait": _is_flag},
    "comm_open": {"comm_id": _is_name, "target_name": _is_name},
    "comm_msg": {"comm_id": _is_name},
    "comm_close": {"comm_id": _is_name},
    "debug_event": {"event": _is_name},
    "execute_reply": {
        **_ERROR,
        "status": _is_status,
        "execution_count": _is_count,
        "payload": _is_list,
        "user_expressions": _is_object,
    },
    "create_subshell_reply": {"status": _is_name, "subshell_id": _is_name},
}
_REPLY: dict[str, Check] = {"status": _is_name, "ename": _is_text, "evalue": _is_text}
_NEEDED: dict[str, frozenset[str]] = {
    "stream": frozenset(("name", "text")),
    "display_data": frozenset(("data",)),
    "update_display_data": frozenset(("data",)),
    "execute_result": frozenset(("data",)),
    "error": frozenset(("ename", "evalue", "traceback")),
    "comm_open": frozenset(("comm_id", "target_name")),
    "comm_msg": frozenset(("comm_id",)),
    "comm_close": frozenset(("comm_id",)),
    "execute_reply": frozenset(("status",)),
}
_NOTHING: frozenset[str] = frozenset()


def fits(msg_type: str, content: dict[str, Any]) -> bool:
    """Whether an output or a reply of this type contains what it must."""
    fields = _FIELDS.get(msg_type, _REPLY)
    if not _NEEDED.get(msg_type, _NOTHING) <= content.keys():
        return False
    return all(check(content[name]) for name, check in fields.items() if name in content)


def count_in(content: dict[str, Any]) -> int | None:
    """The execution count; None when there is none that can be."""
    count = content.get("execution_count")
    return count if type(count) is int and 0 <= count < MOST_COUNT else None


def asks_exit(content: dict[str, Any]) -> bool:
    """Whether the code of an ``execute_reply`` asked the front end to end the kernel."""
    payload = content.get("payload")
    return isinstance(payload, list) and any(
        isinstance(item, dict) and item.get("source") == "ask_exit" and not item.get("keepkernel")
        for item in payload
    )


def question(content: dict[str, Any]) -> dict[str, Any]:
    """The content of an ``input_request``, of which nothing else is passed on."""
    prompt = content.get("prompt")
    text = prompt[:LONGEST_PROMPT] if isinstance(prompt, str) else ""
    return {"prompt": text, "password": content.get("password") is True}


def is_idle(content: dict[str, Any]) -> bool:
    """Whether a ``status`` is the end of a request."""
    return content.get("execution_state") == "idle"
