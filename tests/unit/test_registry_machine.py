"""The record against a dictionary, by a machine that tries every order of what may be done to it.

Two registries stand for two processes: each keeps a connection of its own.  In between the file is
damaged or removed, and a VM's runner dies.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from fakes import DEAD
from vmkernel.errors import VmNotFoundError, VmStateError
from vmkernel.host import reaper
from vmkernel.host.registry import Registry, VmRecord, new_record
from vmkernel.models import ENDED, TRANSITIONS, VmState
from vmkernel.settings import Settings

NAMES = st.sampled_from(["", "", "a", "b"])
STATES = st.sampled_from(list(VmState))
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "state": STATES,
        "name": NAMES,
        "kept": st.booleans(),
        "slot": st.none() | st.integers(0, 3),
        "slot_lease": st.integers(0, 2**63 - 1),
        "exit_cause": st.text(max_size=20).filter(lambda text: "\0" not in text),
    },
)
WHO = st.integers(0, 1)


class Record(RuleBasedStateMachine):
    """`model` is what the record should say."""

    vms = Bundle("vms")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="vmk-registry-")
        place = Path(self.directory.name)
        self.settings = Settings(runtime_dir=place / "run", state_dir=place / "state")
        self.registries = [Registry(self.settings) for _ in range(2)]
        self.model: dict[str, VmRecord] = {}

    def teardown(self) -> None:
        for registry in self.registries:
            registry.close()
        self.directory.cleanup()

    def holder(self, name: str, but: str = "") -> str | None:
        """Who has the name, in the model."""
        found = [vm_id for vm_id, vm in self.model.items() if name and vm.name == name]
        return next((vm_id for vm_id in found if vm_id != but), None)

    def give_up_name(self, name: str, but: str = "") -> bool:
        """Whether the name can be had; who has it and needs it no more gives it up."""
        holder = self.holder(name, but)
        if holder is None:
            return True
        vm = self.model[holder]
        if vm.kept or vm.state not in ENDED:
            return False
        self.model[holder] = replaced(vm, name="")
        return True

    @rule(target=vms, who=WHO, name=NAMES, kept=st.booleans(), dead=st.booleans())
    def new(self, who: int, name: str, kept: bool, dead: bool) -> str:
        fields: dict[str, Any] = {"name": name, "kept": kept, **(DEAD if dead else {})}
        if not self.give_up_name(name):
            with pytest.raises(VmStateError, match="already"):
                self.registries[who].new(**fields)
            return ""
        vm = self.registries[who].new(**fields)
        assert vm.vm_id not in self.model
        self.model[vm.vm_id] = vm
        return vm.vm_id

    @rule(target=vms, who=WHO)
    def add(self, who: int) -> str:
        vm = new_record(state=VmState.RUNNING, created=time.time())
        self.registries[who].add(vm)
        self.model[vm.vm_id] = vm
        return vm.vm_id

    @rule(who=WHO, vm_id=vms, changes=CHANGES)
    def update(self, who: int, vm_id: str, changes: dict[str, Any]) -> None:
        registry = self.registries[who]
        old = self.model.get(vm_id)
        if old is None:
            with pytest.raises(VmNotFoundError):
                registry.update(vm_id, **changes)
            return
        new = replaced(old, **changes)
        if new.state is not old.state and new.state not in TRANSITIONS[old.state]:
            with pytest.raises(VmStateError, match="cannot become"):
                registry.update(vm_id, **changes)
        elif new != old and not self.give_up_name(new.name, but=vm_id):
            with pytest.raises(VmStateError, match="already"):
                registry.update(vm_id, **changes)
        else:
            assert registry.update(vm_id, **changes) == new
            self.model[vm_id] = new

    @rule(who=WHO, vm_id=consumes(vms))
    def remove(self, who: int, vm_id: str) -> None:
        self.registries[who].remove(vm_id)
        self.registries[1 - who].remove(vm_id)
        self.model.pop(vm_id, None)

    @rule()
    def sweep(self) -> None:
        dead = [
            vm_id
            for vm_id, vm in self.model.items()
            if vm.runner_pid == os.getpid()
            and vm.runner_start == 1
            and vm.state not in ENDED
            and not (vm.kept and vm.state is VmState.CREATED)
        ]
        assert sorted(reaper.sweep(self.settings)) == sorted(dead)
        for vm_id in dead:
            vm = self.registries[0].get(vm_id)
            assert vm.state is VmState.FAILED
            assert vm.exit_cause
            self.model[vm_id] = vm

    @rule(vm_id=vms)
    def runner_dies(self, vm_id: str) -> None:
        if vm_id in self.model:
            self.model[vm_id] = self.registries[0].update(vm_id, **DEAD)

    @rule(who=WHO)
    def reopen(self, who: int) -> None:
        self.registries[who].close()

    @rule(garbage=st.binary(min_size=1, max_size=5000))
    def damage(self, garbage: bytes) -> None:
        """The file is replaced by what is none; what ran is no QEMU and is not found again."""
        if self.settings.database_file.exists():
            new = self.settings.state_dir / "garbage"
            new.write_bytes(b"\x01" + garbage)
            new.replace(self.settings.database_file)
            listed = self.registries[0].list(ended=True)
            told = {status.record.vm_id: status.record for status in listed}
            assert told in ({}, self.model)  # SQLite's log may have had all of it
            self.model = told

    @rule()
    def loss(self) -> None:
        for path in self.settings.state_dir.glob("vms.sqlite*"):
            path.unlink()
        self.model.clear()

    @invariant()
    def both_tell_what_was_written(self) -> None:
        for registry in self.registries:
            told = {status.record.vm_id: status.record for status in registry.list(ended=True)}
            assert told == self.model
            live = {status.record.vm_id for status in registry.list()}
            assert live == {vm_id for vm_id, vm in told.items() if vm.state not in ENDED}
        names = [vm.name for vm in self.model.values() if vm.name]
        assert len(names) == len(set(names))


def replaced(vm: VmRecord, **changes: Any) -> VmRecord:
    import msgspec

    return msgspec.structs.replace(vm, **changes)


Record.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRecord = Record.TestCase
