"""Replies as a front end may have them: texts, bundles, and payloads that it acts upon."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from vmkernel import text as terminal
from vmkernel.kernel.policy import bundle
from vmkernel.kernel.policy.jsontypes import plain

LONGEST = 1_000_000
"""Characters of a text that a front end puts somewhere by itself: a next cell, a prompt."""
_MOST_MATCHES = 20_000
_MOST_PAYLOADS = 16
_COUNTS = 2**53 - 1

Cleaned = tuple[dict[str, Any], list[str]]


def clean(msg_type: str, content: dict[str, Any], knows: Callable[[Any], bool]) -> Cleaned:
    """A reply's content, and kinds of things that went.  ``knows(comm_id)``: it may be told."""
    removed: list[str] = []
    status = content.get("status")
    if msg_type == "execute_reply":
        return _execute(content)
    if status == "error":
        known = error(content)  # not every reply of this kind has all three
        return {"status": "error", **{key: known[key] for key in known if key in content}}, removed
    if msg_type == "inspect_reply":
        data, metadata, removed = bundle.clean(
            content.get("data"), content.get("metadata"), empty_note=False
        )
        found = content.get("found") is True
        return {"status": "ok", "found": found, "data": data, "metadata": metadata}, removed
    if msg_type == "complete_reply":
        return _complete(content), removed
    if msg_type == "is_complete_reply":
        return _is_complete(content), removed
    if msg_type == "comm_info_reply":
        return _comm_info(content, knows), removed
    if msg_type == "debug_reply":
        return _debug(content)
    if msg_type == "history_reply":
        return _history(content), removed
    return plain(content), removed


def count(value: Any) -> int | None:
    """An execution count; None for what is none."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _COUNTS:
        return value
    return None


def error(content: dict[str, Any]) -> dict[str, Any]:
    """The three fields of an error."""
    traceback = content.get("traceback")
    lines = traceback if isinstance(traceback, list) else []
    return {
        "ename": bundle.plain(_text(content.get("ename"))),
        "evalue": bundle.plain(_text(content.get("evalue"))),
        "traceback": [bundle.plain(line) for line in lines if isinstance(line, str)],
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _execute(content: dict[str, Any]) -> Cleaned:
    removed: list[str] = []
    status = content.get("status")
    status = status if status in ("ok", "error", "aborted") else "error"
    cleaned: dict[str, Any] = {"status": status}
    if status == "error":
        cleaned |= error(content)
        if isinstance(content.get("engine_info"), dict):
            cleaned["engine_info"] = plain(content["engine_info"])
    if "execution_count" in content:
        cleaned["execution_count"] = count(content["execution_count"])
    expressions = content.get("user_expressions")
    if isinstance(expressions, dict):
        cleaned["user_expressions"] = {
            name: _expression(value, removed)
            for name, value in expressions.items()
            if isinstance(name, str) and isinstance(value, dict)
        }
    payload = content.get("payload")
    if isinstance(payload, list):
        cleaned["payload"] = _payloads(payload, removed)
    return cleaned, removed


def _expression(value: dict[str, Any], removed: list[str]) -> dict[str, Any]:
    if value.get("status") == "error":
        return {"status": "error", **error(value)}
    data, metadata, gone = bundle.clean(value.get("data"), value.get("metadata"))
    removed += gone
    return {"status": "ok", "data": data, "metadata": metadata}


def _payloads(payload: list[Any], removed: list[str]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for item in payload[:_MOST_PAYLOADS]:
        source = item.get("source") if isinstance(item, dict) else None
        if source == "page":
            data, _, gone = bundle.clean(item.get("data"), None)
            removed += gone
            start = item.get("start")
            start = start if isinstance(start, int) and not isinstance(start, bool) else 0
            kept.append({"source": "page", "data": data, "start": max(0, min(start, 10**6))})
        elif source == "set_next_input" and isinstance(item.get("text"), str):
            if any(other["source"] == source for other in kept):
                removed.append("more than one next cell")
            elif len(item["text"]) > LONGEST:
                removed.append("a next cell of more than a million characters")
            else:
                code = terminal.plain_text(item["text"])
                kept.append(
                    {"source": source, "text": code, "replace": item.get("replace") is True}
                )
        elif source == "ask_exit":
            kept.append({"source": source, "keepkernel": item.get("keepkernel") is True})
        else:  # above all edit: a console would start an editor on the host
            name = source if isinstance(source, str) and re.fullmatch(r"\w{1,40}", source) else ""
            removed.append(f"a request to the front end ({name or 'unknown'})")
    return kept


def _complete(content: dict[str, Any]) -> dict[str, Any]:
    matches = content.get("matches")
    texts = [terminal.plain_text(m) for m in matches if isinstance(m, str)] if isinstance(
        matches, list
    ) else []  # fmt: skip
    metadata: dict[str, Any] = {}
    given = content.get("metadata")
    types = given.get("_jupyter_types_experimental") if isinstance(given, dict) else None
    if isinstance(types, list):
        metadata["_jupyter_types_experimental"] = [
            _completion(item) for item in types[:_MOST_MATCHES] if isinstance(item, dict)
        ]
    return {
        "status": "ok",
        "matches": texts[:_MOST_MATCHES],
        "cursor_start": count(content.get("cursor_start")) or 0,
        "cursor_end": count(content.get("cursor_end")) or 0,
        "metadata": metadata,
    }


def _completion(item: dict[str, Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {
        key: terminal.plain_text(item[key])
        for key in ("text", "type", "signature")
        if isinstance(item.get(key), str)
    }
    places = {key: count(item.get(key)) or 0 for key in ("start", "end") if key in item}
    return texts | places


def _is_complete(content: dict[str, Any]) -> dict[str, Any]:
    status = content.get("status")
    cleaned: dict[str, Any] = {
        "status": status if status in ("complete", "incomplete", "invalid") else "unknown"
    }
    indent = content.get("indent")
    if isinstance(indent, str) and re.fullmatch(r"[ \t]{0,1000}", indent):
        cleaned["indent"] = indent
    return cleaned


def _comm_info(content: dict[str, Any], knows: Callable[[Any], bool]) -> dict[str, Any]:
    comms = content.get("comms")
    comms = comms if isinstance(comms, dict) else {}
    return {
        "status": "ok",
        "comms": {
            comm_id: {"target_name": info["target_name"]}
            for comm_id, info in comms.items()
            if knows(comm_id)
            and isinstance(info, dict)
            and isinstance(info.get("target_name"), str)
        },
    }


def _debug(content: dict[str, Any]) -> Cleaned:
    cleaned: dict[str, Any] = plain(content)
    body = cleaned.get("body")
    if isinstance(body, dict) and isinstance(body.get("data"), dict):  # richInspectVariables
        data, metadata, removed = bundle.clean(body["data"], body.get("metadata"))
        cleaned["body"] = {**body, "data": data, "metadata": metadata}
        return cleaned, removed
    return cleaned, []


def _history(content: dict[str, Any]) -> dict[str, Any]:
    """Triples of session, line and input, or input and output."""
    entries = content.get("history")
    kept = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, list) and len(entry) == 3:
            session, line, said = entry
            pair = said if isinstance(said, list) else [said]
            if len(pair) <= 2 and all(isinstance(text, str | None) for text in pair):
                texts = [terminal.plain_text(text) if text else text for text in pair]
                kept.append([count(session) or 0, count(line) or 0,
                             texts if isinstance(said, list) else texts[0]])  # fmt: skip
    return {"status": "ok", "history": kept}
