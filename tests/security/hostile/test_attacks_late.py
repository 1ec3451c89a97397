"""Attacks at an interrupt, a guest kernel's restart, a question, at shutdown, and when idle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from hostile.attack import code_of
from hostile.rig import PATIENCE, Rig, Victim, check_lawful
from hostile.test_attacks_early import end

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]


@pytest.fixture
def victim(rig: Rig) -> Iterator[Victim]:
    """A kernel of the test's own."""
    victim = rig.start(VMKERNEL_BOOT_TIMEOUT="3")
    yield victim
    victim.shut_down()


# --- shutdown --------------------------------------------------------------------------


def flood_for_ever(guest):
    """Output without end."""
    guest.flood(1e9, lambda i: guest.framed("stream", {"name": "stdout", "text": "x" * 1000}, 500))


def half_a_frame(guest):
    """A frame that never ends; the agent answers."""
    guest.raw("kernel", (1 << 20).to_bytes(4, "big") + b"half")
    guest.serve()


def half_a_frame_everywhere(guest):
    """Frames that never end on both ports that the host reads, and then silence."""
    guest.raw("kernel", (1 << 20).to_bytes(4, "big") + b"half")
    guest.raw("agent", (1 << 20).to_bytes(4, "big") + b"half")
    time.sleep(3600)


def console_for_ever(guest):
    """The console is flooded."""
    import os

    while True:
        os.write(1, b"x" * 4096)


def spin(guest):
    """The processor is kept busy."""
    while True:
        pass


def halt(guest):
    """The machine is halted: QEMU lives, and nobody is there."""
    import ctypes

    ctypes.CDLL(None).reboot(ctypes.c_int(0xCDEF0123 - (1 << 32)))


def no_more_reading(guest):
    """The guest says that it can be sent comm messages, and reads none."""
    guest.say("awaiting", {}, channel="vm")
    time.sleep(3600)


STUBBORN = (flood_for_ever, half_a_frame, half_a_frame_everywhere, console_for_ever, spin, halt)


@pytest.mark.parametrize("attack", STUBBORN, ids=lambda attack: attack.__name__)
def test_shutdown_comes_in_time_whatever_the_guest_does(
    rig: Rig, victim: Victim, attack: Callable[..., None]
) -> None:
    cell = victim.send(code_of(attack), allow_stdin=False)
    victim.wait(lambda: "execute_input" in cell.types, "the attack's beginning")
    with rig.unharmed():
        victim.check_responsive()
        end(victim)


def test_a_guest_that_reads_nothing_is_not_sent_without_end(victim: Victim) -> None:
    cell = victim.send(code_of(no_more_reading), allow_stdin=False)
    victim.wait(lambda: "execute_input" in cell.types, "the attack's beginning")
    victim.peak()
    for _ in range(64):
        victim.ask("comm_msg", {"comm_id": "c", "data": {}}, buffers=[bytes(1 << 20)])
    victim.listen(1)
    victim.check_responsive()
    assert victim.peak() < 250  # what a front end sends is its own affair, within bounds
    end(victim)


# --- interrupt -------------------------------------------------------------------------


def test_who_interrupts_a_silent_machine_is_told_what_to_do(rig: Rig, victim: Victim) -> None:
    cell = victim.send(code_of(half_a_frame_everywhere), allow_stdin=False)
    victim.wait(lambda: "execute_input" in cell.types, "the attack's beginning")
    with rig.unharmed():
        victim.interrupt()  # is replied to at once
        victim.check_responsive()
    victim.wait(lambda: "estart the kernel" in cell.stderr, "what to do", 30)
    end(victim)


def a_kernel_that_cannot_be_killed(guest):
    """The agent says that it interrupted and killed, and does neither."""

    def nothing(guest, command):
        guest.answer_command(command["id"])

    guest.on["interrupt"] = nothing
    guest.serve()


def test_a_kernel_that_cannot_be_killed_ends_with_its_vm(victim: Victim) -> None:
    cell = victim.send(code_of(a_kernel_that_cannot_be_killed), allow_stdin=False)
    victim.wait(lambda: "execute_input" in cell.types, "the attack's beginning")
    victim.interrupt()
    victim.wait(lambda: "Interrupt it once more" in cell.stderr, "what else there is", 30)
    victim.interrupt()
    victim.check_responsive()
    end(victim)


def test_interrupts_come_through_a_flood(victim: Victim) -> None:
    def flood_until_interrupted(guest):
        ended = []
        guest.on["interrupt"] = lambda guest, command: (
            guest.answer_command(command["id"]),
            ended.append(1),
        )
        batch = guest.framed("stream", {"name": "stdout", "text": "x" * 1000}, 100)
        while not ended:
            guest.raw("kernel", batch)
            guest.serve(0.01)

    cell = victim.send(code_of(flood_until_interrupted), allow_stdin=False)
    victim.wait(lambda: "stream" in cell.types, "the flood")
    victim.interrupt()
    victim.finish(cell, 60)
    assert cell.status == "ok"
    victim.check_honest()


# --- the restart of a guest kernel -----------------------------------------------------


def no_other_kernel(guest, how):
    """The kernel dies; the next one's start fails in one of several ways."""

    def start(guest, command):
        if how == "refused":
            guest.answer_command(command["id"], error="no")
            return
        guest.answer_command(command["id"])
        if how == "ready without a marker":
            guest.agent("ready", kernel_info=KERNEL_INFO)  # noqa: F821 - of the guest
            guest.wake_reply()
        elif how == "another marker":
            guest.raw("kernel", bytes(16) + guest.framed("stream", {"name": "s", "text": "x"}))
            guest.agent("ready", kernel_info=KERNEL_INFO)  # noqa: F821
        elif how == "a flood without a marker":
            for _ in range(100):
                guest.raw("kernel", bytes(1 << 20))
        elif how == "dies again":
            guest.died()

    guest.on["start_kernel"] = start
    guest.answer = False
    guest.died()


@pytest.mark.parametrize(
    "how",
    ["refused", "never ready", "ready without a marker", "another marker",
     "a flood without a marker", "dies again"],
)  # fmt: skip
def test_a_kernel_that_cannot_be_replaced_costs_its_vm(rig: Rig, victim: Victim, how: str) -> None:
    cell = victim.run(code_of(no_other_kernel, how=how), seconds=PATIENCE)
    assert cell.status == "error"
    with rig.unharmed():
        cell = victim.send("next", allow_stdin=False)
        victim.check_responsive()
        victim.finish(cell, 30)
    assert cell.status == "error", "nobody was there"
    assert "What to do:" in cell.traceback
    assert victim.peak() < 120
    victim.check_honest()
    end(victim)


# --- input() ---------------------------------------------------------------------------


def test_an_answer_goes_to_the_one_question_that_was_asked(victim: Victim) -> None:
    def questions(guest):
        got = []
        guest.on["input_reply"] = lambda guest, request: got.append(request["content"]["value"])
        for parent in ("", "x", "\0"):
            guest.say("input_request", {"prompt": "forged", "password": True}, parent, "stdin")
        guest.say("input_request", {"prompt": {"a": 1}, "password": "yes"}, channel="stdin")
        while not got:
            guest.serve(0.1)
        guest.show("|".join(got))
        guest.serve(0.5)  # a second answer would come now
        guest.show(f" {len(got)}")

    cell = victim.send(code_of(questions), allow_stdin=True)
    victim.wait_question(cell)
    victim.raw.input("first")
    victim.raw.input("second")
    victim.finish(cell, 30)
    assert cell.stdout == "first 1"
    assert [question["content"] for question in cell.questions] == [
        {"prompt": "", "password": False}
    ]


def test_a_kernel_that_dies_at_a_question_is_replaced(victim: Victim) -> None:
    def dies_at_a_question(guest):
        guest.say("input_request", {"prompt": "?", "password": False}, channel="stdin")
        guest.serve(0.3)
        guest.answer = False
        guest.died()

    cell = victim.send(code_of(dies_at_a_question), allow_stdin=True)
    victim.wait_question(cell)
    victim.finish(cell, 30)
    victim.raw.input("too late")
    assert cell.status == "error"
    check_lawful(cell)
    assert victim.check_honest().stdout == "an honest cell"


# --- others' requests, and what a panel or an editor asks ---------------------------------


def test_nobody_gets_an_answer_to_anothers_request(victim: Victim) -> None:
    def answers_for_another(guest, other):
        time.sleep(1)  # until it waits behind this cell
        guest.reply({"status": "error", "ename": "Forged", "evalue": "", "traceback": []}, other)
        guest.show("forged", other)
        guest.idle(other)
        guest.reply({"status": "ok", "matches": ["forged"]}, other, "complete_reply")

    with victim.another_client() as other:
        message = other.raw.session.msg("execute_request", {"code": "mine", "allow_stdin": False})
        theirs = other.of(message["header"]["msg_id"])
        cell = victim.send(code_of(answers_for_another, other=theirs.msg_id), allow_stdin=False)
        victim.wait(lambda: "execute_input" in cell.types, "the attack's beginning")
        other.raw.shell_channel.send(message)
        victim.finish(cell, 30)
        other.finish(theirs, 30)
        check_lawful(theirs)
        assert theirs.status == "ok"
        assert theirs.stdout == "mine"
        assert cell.status == "ok"


def absurd_answers(guest, what):
    """Statistics, subshells, completions of every wrong kind."""
    wrong = {
        "numbers": {"pid": -1, "kernel_cpu": 1e308, "kernel_memory": 1 << 70, "cpu_count": 0},
        "names": {"subshell_id": "../../x" * 1000, "more": [[]]},
        "none": None,
    }[what]
    guest.on["stats"] = lambda guest, command: guest.answer_command(command["id"], wrong)
    for msg_type in ("create_subshell_request", "list_subshell_request", "complete_request"):
        name = msg_type.replace("request", "reply")

        def answer(guest, request, name=name):
            guest.say(
                name, {"status": "ok", **(wrong or {})}, request["msg_id"], request["channel"]
            )
            guest.idle(request["msg_id"])

        guest.on[msg_type] = answer


@pytest.mark.parametrize("what", ["numbers", "names", "none"])
def test_absurd_answers_leave_a_panel_its_fields(rig: Rig, what: str) -> None:
    victim = rig.victim()
    assert victim.run(code_of(absurd_answers, what=what)).status == "ok"
    usage = victim.request("usage_request", channel="control", seconds=30).reply
    assert usage["cpu_count"] == 1
    assert usage["host_virtual_memory"]["total"] == 256 << 20
    assert "does not answer" in usage["hostname"]
    for msg_type in ("create_subshell_request", "list_subshell_request"):
        for _ in range(3):
            victim.request(msg_type, channel="control", seconds=30)
    victim.request("complete_request", {"code": "a", "cursor_pos": 1}, seconds=30)
    victim.check_responsive()
    victim.check_honest()


def test_the_history_has_what_was_sent_and_nothing_else(victim: Victim) -> None:
    def shows_another_cell(guest):
        for parent in (None, "", "x"):
            code = {"code": "import never_sent", "execution_count": 77}
            guest.say("execute_input", code, parent)

    cell = victim.run(code_of(shows_another_cell))
    assert "never_sent" not in str(
        [c for c in cell.contents("execute_input") if "def " not in c["code"]]
    )
    victim.run("was sent")
    content = {"hist_access_type": "tail", "n": 100, "raw": True, "output": False}
    history = json.dumps(victim.request("history_request", content).reply)
    assert "was sent" in history
    assert '"import never_sent"' not in history
