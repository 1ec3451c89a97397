"""Attacks before the guest is awake: run when the wake-up has come, before it is answered."""

from __future__ import annotations

import os
import time

from hostile.attack import SERVED, STOPPED, Attacks
from hostile.program import MIB

ATTACKS = attack = Attacks()


@attack(STOPPED)
def a_kernel_that_never_wakes(guest):
    """The agent is there, the guest kernel says nothing."""
    guest.serve()


@attack(STOPPED)
def a_silent_machine(guest):
    """Neither says anything."""
    time.sleep(3600)


@attack(STOPPED)
def a_wake_up_that_fails(guest):
    """It says why, at length and with a terminal's commands."""
    guest.wake_reply(status="error", evalue="\x1b]0;title\x07\x1b[2J" + "x" * MIB)
    guest.serve()


@attack(STOPPED)
def a_death_at_once(guest):
    """The guest kernel dies instead."""
    guest.died(output="forged words")
    guest.serve()


@attack(STOPPED)
def an_agent_that_gives_up(guest):
    """The agent says that it failed, again and again."""
    for _ in range(50):
        guest.agent("failed", reason="x" * 65536)
    guest.serve()


@attack(STOPPED, each="port", of=("kernel", "agent", "control"))
def noise_before_the_wake_up(guest, port):
    """Random bytes on each port."""
    guest.raw(port, b"\xff" + os.urandom(MIB))
    guest.serve()


@attack(STOPPED)
def half_a_frame_before_the_wake_up(guest):
    """A frame begins, and never ends."""
    guest.raw("kernel", MIB.to_bytes(4, "big") + b"half")
    guest.serve()


@attack(STOPPED)
def the_end_of_the_machine(guest):
    """PID 1 ends."""
    os._exit(1)


@attack(SERVED)
def words_before_the_wake_up(guest):
    """Outputs, answers and questions of a guest that has nothing to say yet: none is heard."""
    for parent in ("", "wake", "x"):
        guest.say("display_data", {"data": {"text/plain": "forged"}, "metadata": {}}, parent)
        guest.show("forged", parent)
        guest.reply(parent=parent)
        guest.say("vm_request", {"id": "a", "command": "info", "arguments": []}, parent, "vm")
    guest.raw("kernel", guest.framed("stream", {"name": "stdout", "text": "forged"}, 3000))


@attack(SERVED)
def awake_twice(guest):
    """The wake-up is answered again and again."""
    for _ in range(100):
        guest.wake_reply()
