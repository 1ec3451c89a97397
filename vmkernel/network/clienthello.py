"""Whom a TLS client says it means (server name indication): must be whom it was let through to.

A tunnel to one name of a large host could else be used to speak with another that the same machine
serves.  Only what is sent in the clear can be seen: a client that hides another name in its
encrypted request (domain fronting) is not found out, nor one that does not begin with TLS.
"""

from __future__ import annotations

_MOST = 64 << 10
_HANDSHAKE, _CLIENT_HELLO = 22, 1
_SERVER_NAME = 0


class TlsCheck:
    """Looks at the first bytes of a tunnel."""

    def __init__(self, host: str) -> None:
        self.problem = ""
        """Why the tunnel must end"""
        self._host = host
        self._data = bytearray()
        self._done = False

    def feed(self, data: bytes) -> bool:
        """The next bytes; whether more are wanted before it is known.  Else see `problem`."""
        self._data += data
        if self._data and self._data[0] != _HANDSHAKE:
            return False
        try:
            hello = _first_message(self._data)
            if hello is None:
                if len(self._data) > _MOST:
                    raise ValueError("a greeting without an end")
                return True
            name = _server_name(hello)
        except (IndexError, ValueError):
            self.problem = "a TLS greeting that cannot be understood"
            return False
        if name is not None and name.lower().removesuffix(".") != self._host:
            self.problem = f"the TLS greeting inside names another host, {name[:200]!r}"
        return False


def _first_message(data: bytearray) -> bytes | None:
    """The ClientHello of these records, None when it is not whole."""
    message = bytearray()
    place = 0
    while len(data) >= place + 5:
        if data[place] != _HANDSHAKE:
            raise ValueError("another record within a message")
        size = int.from_bytes(data[place + 3 : place + 5])
        message += data[place + 5 : place + 5 + size]
        if len(data) < place + 5 + size:
            break
        place += 5 + size
    if len(message) < 4:
        return None
    if message[0] != _CLIENT_HELLO:
        raise ValueError("no ClientHello")
    size = int.from_bytes(message[1:4])
    return bytes(message[4 : 4 + size]) if len(message) >= 4 + size else None


def _server_name(hello: bytes) -> str | None:
    place = 2 + 32
    place += 1 + hello[place]  # session
    place += 2 + int.from_bytes(hello[place : place + 2])  # cipher suites
    place += 1 + hello[place]  # compression
    if place == len(hello):
        return None
    end = place + 2 + int.from_bytes(hello[place : place + 2])
    place += 2
    if end > len(hello):
        raise ValueError("extensions that are cut off")
    while place + 4 <= end:
        kind = int.from_bytes(hello[place : place + 2])
        size = int.from_bytes(hello[place + 2 : place + 4])
        body = hello[place + 4 : place + 4 + size]
        if kind == _SERVER_NAME and body:
            if body[2] != 0:
                raise ValueError("a name of another kind")
            length = int.from_bytes(body[3:5])
            return body[5 : 5 + length].decode("ascii")
        place += 4 + size
    return None
