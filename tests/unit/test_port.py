"""The guest's port, written to by several threads."""

from __future__ import annotations

import os
import threading
import time

from vmkernel.guest.port import Port


def test_two_threads_flush_one_message_between_them():
    near, far = os.pipe()
    port = Port(far)
    raised: list[BaseException] = []

    def flush():
        try:
            port.flush()
        except BaseException as error:
            raised.append(error)

    with port._lock:
        port.queue(b"message")
        other = threading.Thread(target=flush)
        other.start()
        time.sleep(0.2)  # it sees that something is queued, and waits for the lock
        port.flush()
    other.join()
    os.close(far)
    with open(near, "rb") as written:
        assert written.read().count(b"message") == 1
    assert raised == []
