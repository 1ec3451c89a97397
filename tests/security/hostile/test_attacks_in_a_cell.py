"""Attacks while a cell runs: the front end is answered, the wrapper lives, others are unharmed."""

from __future__ import annotations

import pytest
from hostile import attacks_bytes, attacks_floods, attacks_forged, attacks_json, attacks_machine
from hostile.attack import Attack
from hostile.rig import Rig

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

ATTACKS = [
    attack
    for module in (attacks_bytes, attacks_json, attacks_forged, attacks_floods, attacks_machine)
    for attack in module.ATTACKS
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_ends_with_its_cell(rig: Rig, attack: Attack) -> None:
    cell = rig.run(attack)
    assert "AttackFailed" not in str(cell.messages), cell.traceback
