"""What a guest kernel's own generators are given at its wake-up."""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from vmkernel.guest.wake import BOOT_ID, MACHINE_ID, Generators, _identity, reseed_process

numpy_random: Any = pytest.importorskip("numpy.random")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    states = random.getstate(), numpy_random.get_state()
    yield
    random.setstate(states[0])
    numpy_random.set_state(states[1])


def drawn() -> list[float]:
    return [random.random(), numpy_random.random(), numpy_random.normal()]


def woken(generators: Generators, entropy: bytes) -> list[float]:
    generators.reseed(entropy)
    return drawn()


def test_two_clones_have_no_number_in_common():
    generators = Generators()
    state = random.getstate(), numpy_random.get_state()
    answers = []
    for _ in range(2):
        random.setstate(state[0])
        numpy_random.set_state(state[1])
        answers.append(woken(generators, os.urandom(64)))
    assert not set(answers[0]) & set(answers[1])


def test_numpys_state_is_written_to_and_is_a_good_one():
    generators = Generators()
    assert generators._numpy is not None
    generators.reseed(bytes(range(64)))
    _, key, position, has_gauss, _ = numpy_random.get_state()
    assert (len(set(key.tolist())), position, has_gauss) == (624, 624, 0)
    numbers = numpy_random.random(10_000)
    assert 0.48 < numbers.mean() < 0.52
    assert 0.28 < numbers.std() < 0.30


def test_a_gaussian_number_that_the_template_left_is_gone():
    numpy_random.normal()
    assert numpy_random.get_state()[3] == 1
    generators = Generators()
    assert numpy_random.get_state()[3] == 0
    assert woken(generators, b"a" * 64) == woken(Generators(), b"a" * 64)


def test_numpys_numbers_are_not_those_of_random():
    """They come from one source, by different parts of it."""
    Generators().reseed(os.urandom(64))
    ours = {random.getrandbits(32) for _ in range(700)}
    assert not ours & set(numpy_random.get_state()[1].tolist())


def test_a_generator_that_was_put_in_its_place_is_seeded_the_usual_way():
    generators = Generators()
    bits = numpy_random.get_bit_generator()
    numpy_random.set_bit_generator(numpy_random.MT19937(0))
    try:
        assert woken(generators, b"a" * 64)[1] != woken(generators, b"b" * 64)[1]
    finally:
        numpy_random.set_bit_generator(bits)


def test_without_numpy_nothing_of_it_is_needed(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy.random")
    generators = Generators()
    generators.reseed(b"a" * 64)
    one = random.random()
    generators.reseed(b"b" * 64)
    assert random.random() != one


def test_a_later_wake_up_leaves_nothing_out():
    """A guest kernel that runs may have used anything."""
    one, other = [(reseed_process(os.urandom(64)), drawn())[1] for _ in range(2)]
    assert not set(one) & set(other)


def test_identities_are_what_programs_expect():
    assert re.fullmatch(rb"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}\n", _identity(MACHINE_ID))
    uuid = rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\n"
    assert re.fullmatch(uuid, _identity(BOOT_ID))
    assert _identity(BOOT_ID) != _identity(BOOT_ID)
