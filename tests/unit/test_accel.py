"""The accelerator by proof, the TSC's frequency, and the files that remember both."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vmkernel.errors import ImageError, VmBootError
from vmkernel.vm import accel, facts, tsc

MSR = "error: failed to set MSR 0x10a to 0x0\nkvm_buf_set_msrs: Assertion failed"


class Settings(SimpleNamespace):
    accelerator: str
    qemu: str
    state_dir: Path


class Probe:
    """A boot that ends as it is told, and counts how often it was asked for."""

    def __init__(self, outcome: BaseException | float = 0.0) -> None:
        self.outcome = outcome
        self.calls = 0

    async def __call__(self) -> None:
        self.calls += 1
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        await asyncio.sleep(self.outcome)


def put_program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_qemu(tmp_path: Path) -> Path:
    """A program that says its version, and counts how often it was asked."""
    program = tmp_path / "bin" / "qemu"
    program.parent.mkdir()
    return put_program(program, 'echo asked >>"$0.log"; echo "QEMU emulator version 9.9.9"')


@pytest.fixture
def settings(tmp_path: Path, fake_qemu: Path) -> Settings:
    return Settings(accelerator="auto", qemu=str(fake_qemu), state_dir=tmp_path / "state")


@pytest.fixture
def kvm_can_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "kvm_problem", lambda _device: "")


class TestWithoutTheDevice:
    async def test_auto_is_tcg_at_once_and_nothing_is_wrong(
        self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(accel, "_KVM", tmp_path / "no-kvm")
        probe = Probe()
        choice = await accel.choose_accelerator(settings, probe)
        assert (choice.accelerator, choice.warning, probe.calls) == ("tcg", None, 0)
        assert "There is no" in choice.evidence

    async def test_kvm_demanded_is_an_error_with_a_way_out(
        self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(accel, "_KVM", tmp_path / "no-kvm")
        settings.accelerator = "kvm"
        with pytest.raises(VmBootError, match=r"KVM was asked for.*There is no") as caught:
            await accel.choose_accelerator(settings, Probe())
        assert "VMKERNEL_ACCELERATOR" in caught.value.hint

    def test_a_device_of_the_wrong_kind_is_told(self, tmp_path: Path) -> None:
        assert "is not KVM" in accel.kvm_problem(Path("/dev/zero"))
        (tmp_path / "kvm").mkdir()
        assert "cannot be opened" in accel.kvm_problem(tmp_path / "kvm")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may open anything")
    def test_a_device_that_may_not_be_opened_says_who_may(self, tmp_path: Path) -> None:
        (tmp_path / "kvm").touch(mode=0)
        assert "usermod -aG kvm" in accel.kvm_problem(tmp_path / "kvm")


@pytest.mark.usefixtures("kvm_can_be_tried")
class TestProof:
    async def test_a_guest_that_comes_up_is_proof_and_is_remembered(
        self, settings: Settings
    ) -> None:
        probe = Probe()
        for _ in range(3):
            choice = await accel.choose_accelerator(settings, probe)
            assert (choice.accelerator, choice.warning) == ("kvm", None)
        assert probe.calls == 1

    async def test_a_qemu_that_aborts_means_tcg_with_its_words_as_evidence(
        self, settings: Settings
    ) -> None:
        probe = Probe(VmBootError(f"QEMU was ended by signal 6\n{MSR}", hint="x"))
        for _ in range(2):
            choice = await accel.choose_accelerator(settings, probe)
            assert choice.accelerator == "tcg"
            assert MSR in choice.evidence
            assert choice.warning is not None
            assert "KVM does not work here" in choice.warning
        assert probe.calls == 1

    async def test_silence_is_bounded_and_believed_for_a_day(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        silent = Probe(60.0)
        works, evidence, final = await accel.prove_kvm(silent, 0.05)
        assert (works, final) == (False, False)
        assert "within 0.05 s" in evidence

        monkeypatch.setattr(accel, "PROBE_SECONDS", 0.05)
        await accel.choose_accelerator(settings, silent)
        await accel.choose_accelerator(settings, silent)
        assert silent.calls == 2  # once above, once for both choices
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 90_000)
        await accel.choose_accelerator(settings, silent)
        assert silent.calls == 3

    async def test_kvm_demanded_fails_with_the_remembered_evidence(
        self, settings: Settings
    ) -> None:
        await accel.choose_accelerator(settings, Probe(VmBootError(MSR, hint="x")))
        settings.accelerator = "kvm"
        with pytest.raises(VmBootError, match="failed to set MSR"):
            await accel.choose_accelerator(settings, Probe())

    async def test_tcg_demanded_probes_nothing(self, settings: Settings) -> None:
        settings.accelerator = "tcg"
        probe = Probe()
        assert (await accel.choose_accelerator(settings, probe)).accelerator == "tcg"
        assert probe.calls == 0

    async def test_a_missing_image_says_nothing_about_kvm(self, settings: Settings) -> None:
        with pytest.raises(ImageError):
            await accel.choose_accelerator(settings, Probe(ImageError("no image", hint="build")))
        assert accel.remembered_choice(settings) is None

    async def test_a_verdict_can_be_forgotten(self, settings: Settings) -> None:
        probe = Probe()
        await accel.choose_accelerator(settings, probe)
        assert accel.forget_verdict(settings.state_dir)
        assert not accel.forget_verdict(settings.state_dir)
        await accel.choose_accelerator(settings, probe)
        assert probe.calls == 2

    async def test_another_qemu_needs_another_proof(
        self, settings: Settings, fake_qemu: Path
    ) -> None:
        probe = Probe()
        await accel.choose_accelerator(settings, probe)
        put_program(fake_qemu, "echo QEMU emulator version 10.0")
        await accel.choose_accelerator(settings, probe)
        assert probe.calls == 2

    async def test_of_many_at_once_one_probes(self, settings: Settings) -> None:
        probe = Probe(0.3)
        choices = await asyncio.gather(
            *(accel.choose_accelerator(settings, probe) for _ in range(5))
        )
        assert {choice.accelerator for choice in choices} == {"kvm"}
        assert probe.calls == 1

    async def test_who_waits_for_the_prober_can_be_cancelled(self, settings: Settings) -> None:
        prober = asyncio.create_task(accel.choose_accelerator(settings, Probe(60.0)))
        await asyncio.sleep(0.05)
        waiter = asyncio.create_task(accel.choose_accelerator(settings, Probe()))
        await asyncio.sleep(0.05)
        for task in (waiter, prober):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await accel.choose_accelerator(settings, Probe())).accelerator == "kvm"

    async def test_a_damaged_or_unwritable_memory_only_costs_a_probe(
        self, settings: Settings
    ) -> None:
        settings.state_dir.mkdir()
        (settings.state_dir / "accelerator.json").write_text("{ damaged")
        assert (await accel.choose_accelerator(settings, Probe())).accelerator == "kvm"
        settings.state_dir = Path("/proc/cannot/be/written")
        assert (await accel.choose_accelerator(settings, Probe())).accelerator == "kvm"


def test_the_version_is_asked_for_once_per_binary(fake_qemu: Path, tmp_path: Path) -> None:
    for _ in range(3):
        version = accel.qemu_version(str(fake_qemu), tmp_path)
        assert version == "QEMU emulator version 9.9.9"
    assert Path(f"{fake_qemu}.log").read_text() == "asked\n"


def test_a_qemu_that_does_not_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    broken = put_program(tmp_path / "qemu", "exit 127")
    with pytest.raises(VmBootError, match="--version failed"):
        accel.qemu_version(str(broken), tmp_path)


def test_the_cpu_model_is_a_line() -> None:
    assert accel.cpu_model()
    assert "\n" not in accel.cpu_model()


class TestTsc:
    def test_the_refined_calibration_wins(self) -> None:
        log = "tsc: Detected 2596.128 MHz processor\n"
        refined = "tsc: Refined TSC clocksource calibration: 2596.131 MHz\n"
        assert tsc.khz_from_log(log) == 2_596_128
        assert tsc.khz_from_log(log + refined) == 2_596_131
        assert tsc.khz_from_log("tsc: Detected 0.001 MHz processor\n") is None
        assert tsc.khz_from_log("") is None

    def test_measuring_agrees_with_the_kernel(self) -> None:
        measured = tsc.measure_tsc_khz()
        said, source = tsc.find_tsc_khz()
        assert source
        assert abs(measured - said) <= said * 600e-6  # a "Detected" value may be off by 500 ppm

    def test_the_value_is_the_same_at_every_call(self, tmp_path: Path) -> None:
        first = tsc.host_tsc_khz(tmp_path)
        assert tsc.host_tsc_khz(tmp_path) == first
        assert facts.read_facts(tmp_path)["tsc"]["khz"] == first

    @pytest.mark.parametrize(("change_ppm", "kept"), [(20, True), (80, False)])
    def test_a_reboot_keeps_a_value_that_is_nearly_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change_ppm: int, kept: bool
    ) -> None:
        facts.remember(tmp_path, {"tsc": {"khz": 2_500_000, "boot_id": "an earlier boot"}})
        now = 2_500_000 + 2_500_000 * change_ppm // 1_000_000
        monkeypatch.setattr(tsc, "find_tsc_khz", lambda: (now, "measured"))
        assert tsc.host_tsc_khz(tmp_path) == (2_500_000 if kept else now)

    def test_nonsense_in_the_file_is_not_believed(self, tmp_path: Path) -> None:
        values: list[object] = [{"khz": "fast"}, {"khz": 1}, [], {"boot_id": 3}]
        for nonsense in values:
            facts.remember(tmp_path, {"tsc": nonsense})
            assert 100_000 < tsc.host_tsc_khz(tmp_path) < 20_000_000


class TestFacts:
    def test_facts_are_added_and_replaced(self, tmp_path: Path) -> None:
        state = tmp_path / "new" / "state"
        assert facts.remember(state, {"a": 1, "b": 2})
        assert facts.remember(state, {"b": 3})
        assert facts.read_facts(state) == {"a": 1, "b": 3}
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert json.loads((state / "host.json").read_text()) == {"a": 1, "b": 3}

    def test_a_place_that_cannot_be_written_is_no_error(self) -> None:
        assert not facts.remember(Path("/proc/cannot"), {"a": 1})
        assert facts.read_facts(Path("/proc/cannot")) == {}
