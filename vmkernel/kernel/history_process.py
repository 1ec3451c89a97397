"""The process that holds IPython's HistoryManager for one kernel.

``python -P -m vmkernel.kernel.history_process``, with a socket to the wrapper as standard input.
It speaks JSON, a line a message, and ends at the end of the file:

* in, first: ``{"file", "options", "session", "outputs"}``; ``session`` is null, or what an
  earlier process of this kernel answered, and then that session goes on.
* in: ``{"store": [["session"] | ["line", number, code] | ["output", number, text], …]}``;
  out, when all of it is on disk: ``{"stored": how many, "session": […]}``
* in: ``{"question": id, "content": of a history_request}``; out: ``{"answer": id, "content"}``
* out, before it ends for a reason: ``{"failed": text, "final": whether trying again is in vain}``
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from typing import Any, NoReturn

import msgspec

log = logging.getLogger("vmkernel.history")


def serve(connection: socket.socket) -> None:
    """Do what the wrapper asks until it ends."""
    from vmkernel.kernel.history_store import Store, Trouble

    decode, encode = msgspec.json.decode, msgspec.json.encode

    def send(message: dict[str, Any]) -> bool:
        try:
            connection.sendall(encode(message) + b"\n")
        except OSError:  # the wrapper is gone; its lines are still ours
            return False
        return True

    with connection.makefile("rb") as lines, contextlib.suppress(ConnectionResetError):
        try:
            begin = decode(next(lines))
            store = Store(begin["file"], begin["options"], begin["session"], begin["outputs"])
            for line in lines:
                if not line.endswith(b"\n"):  # the wrapper was killed in the middle of it
                    break
                message = decode(line)
                if "store" in message:
                    store.store(message["store"])
                    send({"stored": len(message["store"]), "session": store.session})
                else:
                    content = store.find(message["content"])
                    send({"answer": message["question"], "content": content})
            store.close()
        except Trouble as trouble:
            if not send({"failed": str(trouble), "final": trouble.final}):
                log.error("a kernel's last cells are not in the history: %s", trouble)


def main() -> NoReturn:
    """Serve the wrapper on standard input."""
    os.nice(10)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its wrapper, and after the last line
    os.umask(0o077)  # also what the HistoryManager makes is the user's alone
    logging.basicConfig(format="[vmkernel] %(levelname)s %(message)s")
    serve(socket.socket(fileno=os.dup(0)))
    os._exit(0)


if __name__ == "__main__":
    main()
