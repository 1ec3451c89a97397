"""Attacks on the matching: answers that nobody asked for, or that are another's."""

from __future__ import annotations

import time

from hostile.attack import DIED, SERVED, STOPPED, Attacks
from hostile.program import KERNEL_INFO

ATTACKS = attack = Attacks()


@attack(SERVED)
def answers_to_what_was_not_asked(guest):
    """Replies with made-up parents, on every channel."""
    for parent in ("", "x", "wake", guest.msg_id + "x", "\0", "x" * 1024):
        for channel in ("shell", "control", "stdin", "iopub"):
            guest.reply(parent=parent, channel=channel)
            guest.idle(parent)
            guest.say("status", {"execution_state": "busy"}, parent)
            guest.say("input_request", {"prompt": "forged", "password": False}, parent, channel)


@attack(SERVED)
def an_answer_twice(guest):
    """Three replies, and idle twice, to one request; the first of each counts."""
    guest.answer = False
    guest.reply()
    guest.reply({"status": "error", "ename": "Forged", "evalue": "", "traceback": []})
    guest.idle()
    guest.idle()
    guest.reply({"status": "error", "ename": "Forged", "evalue": "", "traceback": []})


@attack(SERVED)
def an_answer_of_another_type(guest):
    """Replies of every type but the right one, and the right one on every other channel."""
    for (
        name
    ) in "kernel_info complete inspect history shutdown interrupt debug input connect".split():
        guest.reply({"status": "ok"}, msg_type=f"{name}_reply")
    for channel in ("control", "stdin"):
        guest.reply({"status": "error", "ename": "Forged"}, channel=channel)
    guest.reply({"status": "ok"}, msg_type="execute_request")


@attack(SERVED)
def a_replay(guest):
    """All that was said once is said again, after the cell has ended: a record of it."""
    guest.answer = False
    for _ in range(2):
        guest.show("once more")
        guest.reply()
        guest.idle()
        time.sleep(0.3)


@attack(SERVED)
def forged_messages_of_the_host(guest):
    """What only the host may publish."""
    for msg_type, content in (
        ("status", {"execution_state": "dead"}),
        ("status", {"execution_state": "restarting"}),
        ("shutdown_reply", {"status": "ok", "restart": False}),
        ("interrupt_reply", {"status": "ok"}),
        ("iopub_welcome", {"subscription": ""}),
        ("kernel_info_reply", KERNEL_INFO),
        ("execute_reply", {"status": "ok", "execution_count": 1}),
        ("input_request", {"prompt": "Password:", "password": True}),
        ("comm_info_reply", {"status": "ok", "comms": {}}),
        ("execute_request", {"code": "import os"}),
        ("data_pub", {}),
        ("crash", {"info": ""}),
        ("no_such_type", {}),
    ):
        if msg_type != "status":
            guest.say(msg_type, content)
        guest.say(msg_type, content, parent="")
        guest.say(msg_type, content, parent="forged")


@attack(SERVED)
def idle_before_the_end(guest):
    """Idle first, and a reply long after: whoever waits is told that there was none."""
    guest.answer = False
    guest.idle()
    time.sleep(0.2)
    guest.show("late")
    guest.reply()


@attack(SERVED)
def another_wake_up(guest):
    """Answers to a wake-up in the midst of a cell, good ones and bad."""
    for _ in range(100):
        guest.wake_reply()
        guest.wake_reply(status="error", evalue="x" * 10_000)
        guest.say("wake_reply", {}, "forged", "iopub")


@attack(SERVED, STOPPED)
def agents_in_a_storm(guest):
    """Hello, Ready and Failed, two hundred of each with as much text as there may be."""
    for _ in range(200):
        guest.agent("hello", kernel_release="x" * 1024, python="y" * 1024)
        guest.agent("ready", kernel_info={"banner": "x" * 65536})
        guest.agent("failed", reason="x" * 65536)


@attack(SERVED)
def replies_of_the_agent_to_no_call(guest):
    """Every id but one that is waited for."""
    for number in (*range(-50, 500), 1 << 62, -(1 << 62)):
        guest.answer_command(number, {"x": "y" * 10_000}, "forged")


@attack(SERVED, STOPPED)
def replies_of_the_agent_that_are_none(guest):
    """Ids and results of other types."""
    for number in (None, "1", 1.5, [], 1 << 80):
        guest.message("agent", {"type": "reply", "id": number, "error": "", "result": {}})


@attack(DIED)
def deaths_in_a_storm(guest):
    """The kernel dies sixty times at once, with 64 KiB of last words each."""
    guest.answer = False
    for number in range(1, 64):
        guest.died(output=f"{number}" + "x" * 60_000, signal=number)


@attack(DIED)
def a_death_with_a_terminals_commands(guest):
    """Last words that would move the cursor, set the title, and answer for the user."""
    guest.answer = False
    guest.died(
        output="\x1b]0;title\x07\x1b[2J\x1b[H\x1b[6n\x1bP+q544e\x1b\\\x9b31m\rforged words\n"
    )


@attack(DIED, STOPPED, each="how", of=(
    {"signal": None, "exit_code": 0}, {"signal": None, "exit_code": -1 << 62},
    {"signal": 1 << 62}, {"signal": None, "exit_code": None}, {"oom": True},
))  # fmt: skip
def a_strange_death(guest, how):
    """Signals and exit statuses that there are not."""
    guest.answer = False
    guest.died(**how)


@attack(SERVED)
def a_cell_that_was_never_sent(guest):
    """The guest says that it runs another cell than the one it was given."""
    for count in (guest.count, -5, 10**9):
        guest.say("execute_input", {"code": "import forged_history", "execution_count": count})
        guest.say("execute_input", {"code": "forged_history", "execution_count": count}, "forged")


@attack(SERVED)
def awaiting_without_end(guest):
    """It says 2,500 times that comm messages may come."""
    guest.raw("kernel", guest.framed("awaiting", {}, 2500, channel="vm"))


@attack(SERVED)
def questions_to_the_host(guest):
    """vm_requests: unknown ones, malformed ones, with ids of every kind."""
    for content in (
        {}, {"id": 1}, {"id": "a", "command": "info", "arguments": None},
        {"id": "a", "command": "__class__", "arguments": []},
        {"id": "a", "command": "info", "arguments": ["x" * 1024] * 1000},
        {"id": "\0" * 1024, "command": "info", "arguments": []},
        {"id": "a", "command": "info", "arguments": [], "more": 1},
    ):  # fmt: skip
        guest.say("vm_request", content, channel="vm")
    guest.say("vm_reply", {}, channel="vm")
    guest.say("no_such_question", {}, channel="vm")
