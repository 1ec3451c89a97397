"""The guest's port, written to by several threads."""

from __future__ import annotations

import os
import subprocess
import sys
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


UNHEARD = """
import os, signal, sys, threading, time
from vmkernel.guest.port import Interrupts
from vmkernel.guest.streams import OutputPump

heard = []
class Counting(Interrupts):
    def handle(self, signum, frame):
        heard.append(time.monotonic())
        super().handle(signum, frame)

interrupts = Counting()
interrupts.install()
interrupts.armed = True
OutputPump({}, lambda: None, interrupts).start()
if "fork" in sys.argv:  # a child gets the signals of its terminal, too, and they are its own
    if os.fork() == 0:
        signal.signal(signal.SIGINT, lambda *_: os._exit(7))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    time.sleep(1.2)
    print(status, len(heard))
    sys.exit()
# To a thread that does not run Python code: the main thread, asleep, is not woken
threading.Timer(
    0.3, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)
).start()
began = time.monotonic()
try:
    time.sleep(20)
    print("slept on")
except KeyboardInterrupt:
    print("heard" if time.monotonic() - began < 10 else "late")
time.sleep(1.2)
print(len(heard))
"""


def python(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", UNHEARD, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_interrupt_that_ends_no_system_call_is_heard_all_the_same_and_once():
    assert python() == ["heard", "1"]


def test_an_interrupt_of_a_forked_child_is_not_its_parents():
    assert python("fork") == ["7", "0"]
