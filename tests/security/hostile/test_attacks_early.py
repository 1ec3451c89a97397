"""Attacks of a guest that is not awake: the cell is told why there is no VM, nothing is left."""

from __future__ import annotations

import time

import pytest
from hostile.attack import STOPPED, Attack
from hostile.attacks_early import ATTACKS
from hostile.rig import Rig, Victim, check_lawful

from vmhost import seconds_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

SOON = 10.0
"""Seconds in which a kernel must have ended; on a quiet machine it takes less than one."""


def end(victim: Victim) -> None:
    """Shut it down as a front end does: nothing may keep it, nothing may be left."""
    qemus = victim.qemus
    victim.ask("shutdown_request", {"restart": False}, "control")
    assert seconds_until(lambda: not victim.alive, SOON) < SOON
    assert seconds_until(lambda: not set(qemus) & set(victim.host.qemus()), SOON) < SOON
    victim.shut_down()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_before_the_wake_up(rig: Rig, attack: Attack) -> None:
    patience = {"VMKERNEL_START_TIMEOUT": "3"} if STOPPED in attack.ends else {}
    victim = rig.start(JPY_SESSION_NAME=attack.code, **patience)
    try:
        with rig.unharmed():
            cell = victim.send("hello", allow_stdin=False)
            waits = []
            while not cell.done:
                waits.append(victim.check_responsive())
                victim.listen(0.1)
            victim.check_responsive()
        check_lawful(cell)
        if STOPPED in attack.ends:
            assert cell.status == "error"
            assert cell.reply["ename"] in ("VmGuestError", "VmBootError")
            shown = cell.traceback
            assert "What to do:" in shown
            assert len(shown) < 200_000
            assert "\x1b]0;" not in shown
            assert "\x1b[2J" not in shown
        else:
            assert cell.stdout == "hello"
            assert cell.types == ["execute_input", "stream"]
        assert not victim.unlawful
        assert victim.peak() < 120
        began = time.monotonic()
        end(victim)
        assert time.monotonic() - began < SOON
    finally:
        victim.shut_down()
