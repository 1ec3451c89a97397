"""Attacks by mass: more messages than anybody wants, for a second each."""

from __future__ import annotations

from hostile.attack import SERVED, STOPPED, Attacks
from hostile.program import MIB

ATTACKS = attack = Attacks()


@attack(SERVED, peak=160, each="msg_type", of=(
    "stream", "display_data", "update_display_data", "execute_result", "execute_input", "error",
    "clear_output", "debug_event", "comm_open", "comm_msg", "comm_close",
))  # fmt: skip
def a_flood(guest, msg_type):
    """Three thousand small messages, as fast as they go."""
    data = {"text/plain": "x"}
    transient = {"display_id": "flood"}
    contents = {
        "stream": {"name": "stdout", "text": "x"},
        "display_data": {"data": data, "metadata": {}, "transient": transient},
        "update_display_data": {"data": data, "metadata": {}, "transient": transient},
        "execute_result": {"execution_count": 1, "data": data, "metadata": {}},
        "execute_input": {"code": "forged", "execution_count": 1},
        "error": {"ename": "E", "evalue": "e", "traceback": ["t"]},
        "clear_output": {"wait": False},
        "debug_event": {"seq": 1, "type": "event", "event": "stopped", "body": {}},
        "comm_open": {"comm_id": "c", "target_name": "t", "data": {}},
        "comm_msg": {"comm_id": "c", "data": {}},
        "comm_close": {"comm_id": "c", "data": {}},
    }
    guest.raw("kernel", guest.framed(msg_type, contents[msg_type], 3000))


@attack(SERVED, peak=160)
def a_flood_of_new_comms(guest):
    """Comms that are opened and never closed, each with an id of its own."""
    text = guest.framed("comm_open", {"comm_id": "ABCDEFGH", "target_name": "t", "data": {}})

    def batch(i):
        return b"".join(
            text.replace(b"ABCDEFGH", b"%08d" % n) for n in range(200 * i, 200 * i + 200)
        )

    guest.flood(9, batch, limit=25)


@attack(SERVED, peak=160)
def a_flood_of_questions_to_the_user(guest):
    """input() three thousand times over, without waiting for an answer."""
    question = {"prompt": "?", "password": False}
    guest.raw("kernel", guest.framed("input_request", question, 3000, channel="stdin"))


@attack(SERVED, peak=160)
def a_flood_of_questions_to_the_host(guest):
    """vm_request without end, whose answers are never read."""
    guest.deaf.add("control")
    question = {"id": "a", "command": "info", "arguments": []}
    guest.raw("kernel", guest.framed("vm_request", question, 3000, channel="vm"))
    guest.deaf.discard("control")


@attack(SERVED, STOPPED, peak=160)
def a_flood_of_oddities(guest):
    """Wrong messages without end: they are logged, but not for ever."""
    batch = guest.framed("no_such_type", {}, 500) + guest.framed("x", {}, 500, channel="shell")
    guest.flood(9, lambda i: batch, limit=20)


@attack(SERVED, peak=160)
def a_flood_of_the_agent(guest):
    """The agent's replies that nobody waits for."""
    body = b'{"type":"reply","id":99999,"error":"","result":{}}'
    one = (4 + len(body)).to_bytes(4, "big") + len(body).to_bytes(4, "big") + body
    for _ in range(100):
        guest.raw("agent", one * 200)


@attack(SERVED, peak=260, seconds=90)
def a_stream_of_large_pieces(guest):
    """A hundred MiB of text, in messages of one."""
    batch = guest.framed("stream", {"name": "stdout", "text": "x" * MIB})
    guest.flood(60, lambda i: batch, limit=100)


@attack(SERVED, peak=200)
def a_flood_after_the_end(guest):
    """The cell is over, and its output goes on."""
    guest.answer = False
    guest.reply()
    guest.idle()
    guest.raw("kernel", guest.framed("stream", {"name": "stdout", "text": "x" * 100}, 3000))


@attack(SERVED, peak=200)
def a_flood_of_the_console(guest):
    """Lines, and one line without end, on the serial console."""
    import os

    line = b"Kernel panic - not syncing: forged \x1b[2J\n" * 100
    for _ in range(20):
        os.write(1, line)
    os.write(1, b"x" * 100_000)
