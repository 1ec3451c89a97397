"""A Jupyter session whose messages go to the port: unsigned, without headers.

Where it stands: what ipykernel calls to send anything, in the Python engine.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import msgspec
from jupyter_client.session import Session, extract_header, json_default

from vmkernel.guest.port import Port
from vmkernel.guest.streams import OutputPump

# Decimals become strings: as numbers, NaN and Infinity would be no JSON, which ends the VM
_encode = msgspec.json.Encoder(enc_hook=json_default).encode


class PortSession(Session):
    """A Jupyter session that hands messages to the port instead of signing them."""

    port: Port
    pump: OutputPump
    owner_pid: int
    silenced = 0
    """The thread whose messages are made, but not sent: for rehearsals."""

    def send(
        self,
        stream: Any,
        msg_or_type: dict[str, Any] | str,
        content: dict[str, Any] | None = None,
        parent: dict[str, Any] | None = None,
        ident: Any = None,
        buffers: list[Any] | None = None,
        track: bool = False,
        header: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Queue a message for the host.  ``stream`` is the channel's name.

        Returns the message, as the base class does, or None in a forked child, which has
        no port of its own.
        """
        if os.getpid() != self.owner_pid:
            return None
        if isinstance(msg_or_type, dict):
            message = msg_or_type
            buffers = buffers or message.get("buffers")
        else:
            message = {
                "header": header or {"msg_type": msg_or_type},
                "msg_type": msg_or_type,
                "parent_header": extract_header(parent) if parent else {},
                "content": content or {},
                "metadata": metadata or {},
            }
        parent_id = message["parent_header"].get("msg_id", "")
        body = [
            stream,
            message["header"]["msg_type"],
            parent_id,
            message["metadata"],
            message["content"],
        ]
        data = encode_body(body)
        if self.silenced and threading.get_ident() == self.silenced:
            return message
        self.pump.settle()
        self.port.queue(data, tuple(buffers or ()))
        if stream == "iopub":
            self.pump.wake()  # what is shown in the middle of a long cell must not wait for its end
        return message


def encode_body(body: list[Any]) -> bytes:
    """A message's body as JSON, whatever user code put into it."""
    try:
        return _encode(body)
    except (TypeError, ValueError, UnicodeEncodeError, OverflowError):
        return _encode(_clean(body))


def _clean(value: Any) -> Any:
    """``value`` as JSON can hold it: lone surrogates escaped, keys that are no strings as text."""
    if isinstance(value, str):
        return value.encode("utf-8", errors="backslashreplace").decode()
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item) for item in value]
    try:
        return _clean(json_default(value))
    except TypeError:
        return _clean(repr(value))
