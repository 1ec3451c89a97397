"""Memory templates: built once, by one of many, never altered, never used when damaged.

The templates of this module are built in a cache directory of their own, by an ordinary user.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

import vmkernel
from vmhost import RunningVm, Sampler, VmHost, seconds_until
from vmkernel.errors import TemplateError, VmBootError
from vmkernel.host.start import spec_for
from vmkernel.settings import Settings
from vmkernel.vm import build
from vmkernel.vm.template import (
    Spec,
    Template,
    ensure_template,
    find_template,
    templates_dir,
    verify_template,
)

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

NOBODY = 65534
BUILDERS = 3
BUILD = """
import asyncio, contextlib, json, time
from vmkernel.host.start import spec_for
from vmkernel.settings import load_settings
from vmkernel.vm.template import ensure_template

settings = load_settings()
texts = []
began = time.monotonic()
template = asyncio.run(ensure_template(
    spec_for(settings, "tcg"), settings,
    lambda text, done: texts.append(text) if text not in texts else None,
    contextlib.nullcontext(),
))
print(json.dumps({"directory": str(template.directory), "created": template.manifest.created,
                  "texts": texts}))
"""


class Built(NamedTuple):
    """How the template came to be."""

    left_by_the_killed: list[str]
    gone_after: float
    answers: list[dict[str, Any]]
    vms: int
    left: list[str]


@pytest.fixture(scope="module")
def host(session_dir: Path, minimal_image: str) -> Iterator[VmHost]:
    """A host without templates, of an ordinary user."""
    host = VmHost(session_dir, own_cache=True, user=NOBODY if os.geteuid() == 0 else 0)
    yield host
    assert host.qemus() == []


@pytest.fixture(scope="module")
def settings(host: VmHost) -> Settings:
    """Those of this process on that host."""
    return host.settings(VMKERNEL_RUNTIME_DIR=f"{host.runtime_dir}-mine")


@pytest.fixture(scope="module")
def spec(settings: Settings) -> Spec:
    """What the template is made from."""
    return spec_for(settings, "tcg")


def start_builder(host: VmHost) -> subprocess.Popen[str]:
    environ = {**os.environ, **host.env, "PYTHONPATH": str(Path(vmkernel.__file__).parents[1])}
    return subprocess.Popen(
        host.command(sys.executable, "-c", BUILD), env=environ, stdout=subprocess.PIPE, text=True
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def built(host: VmHost, settings: Settings, spec: Spec) -> Built:
    """One builder is killed in the middle; then several start at once."""
    directory = templates_dir(settings)
    killed = start_builder(host)
    assert seconds_until(lambda: host.qemus(), 60) < 60
    time.sleep(2)
    os.kill(killed.pid, signal.SIGKILL)
    gone_after = seconds_until(lambda: not host.qemus(), 10)
    killed.communicate()
    left_by_the_killed = names(directory)
    # One that cannot even be looked into stands in the way, too.
    (directory / spec.key()).mkdir()
    (directory / spec.key() / "ram").touch()
    (directory / spec.key()).chmod(0)
    if host.user:
        os.chown(directory / spec.key(), host.user, host.user)

    with Sampler(host) as sampler:
        builders = [start_builder(host) for _ in range(BUILDERS)]
        answers = [json.loads(builder.communicate()[0]) for builder in builders]
    return Built(left_by_the_killed, gone_after, answers, len(sampler.seen), names(directory))


@pytest.fixture(scope="module")
def template(built: Built, spec: Spec, settings: Settings) -> Template:
    """The template that was built."""
    found = find_template(spec, settings)
    assert found is not None
    return found


class TestBuilding:
    def test_a_killed_builder_takes_its_vm_along(self, built: Built, spec: Spec) -> None:
        assert built.gone_after < 1
        assert any(name.startswith(f".tmp-{spec.key()}-") for name in built.left_by_the_killed)

    def test_of_many_one_builds_and_all_have_it(self, built: Built, spec: Spec) -> None:
        assert built.vms == 1
        assert len({json.dumps(answer["created"]) for answer in built.answers}) == 1
        assert {Path(answer["directory"]).name for answer in built.answers} == {spec.key()}
        for answer in built.answers:  # those who wait see what the builder does
            assert "booting the guest" in answer["texts"]

    def test_nothing_else_is_left(self, built: Built, spec: Spec) -> None:
        assert built.left == [spec.key()]

    def test_it_is_whole_and_closed_to_others(self, template: Template) -> None:
        verify_template(template)
        assert template.directory.stat().st_mode & 0o077 == 0
        assert template.manifest.kernel_info["language_info"]["name"] == "python"


async def test_a_guest_whose_timer_was_set_wrongly_is_booted_again(
    minimal_image: str, session_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = VmHost(session_dir, own_cache=True)
    # No host can be made busy in just that moment: here every timer is too slow
    monkeypatch.setattr(build, "_SLOWEST_TIMER", 0.5)
    monkeypatch.setattr(build, "_TIMER_TRIES", 2)
    settings = host.settings()
    with Sampler(host) as sampler, pytest.raises(VmBootError, match="timer runs 1") as caught:
        await ensure_template(
            spec_for(settings, "tcg"),
            settings,
            lambda text, done: None,
            contextlib.nullcontext(),
        )
    assert "less to do" in caught.value.hint
    assert len(sampler.seen) == 2
    assert list(templates_dir(settings).glob(".tmp-*")) == []


class TestKey:
    def test_everything_that_decides_what_memory_holds_makes_another_template(
        self, spec: Spec
    ) -> None:
        changed = {
            "memory": spec.memory + 1,
            "vcpus": 2,
            "scratch_size": spec.scratch_size + 1,
            "tsc_khz": spec.tsc_khz + 1000,  # on the guest's command line
            "qemu_version": "QEMU emulator version 99",
            "accelerator": "kvm",
        }
        keys = {msgspec.structs.replace(spec, **{name: to}).key() for name, to in changed.items()}
        assert len(keys | {spec.key()}) == len(changed) + 1

    def test_new_code_of_the_guest_makes_another_template(
        self, host: VmHost, spec: Spec, tmp_path: Path
    ) -> None:
        package = shutil.copytree(
            Path(vmkernel.__file__).parent,
            tmp_path / "vmkernel",
            ignore=shutil.ignore_patterns("__pycache__"),
        )

        def key() -> str:
            code = (
                "from vmkernel.host.start import spec_for\n"
                "from vmkernel.settings import load_settings\n"
                "print(spec_for(load_settings(), 'tcg').key())"
            )
            environ = {**os.environ, **host.env, "PYTHONPATH": str(tmp_path)}
            return subprocess.check_output(
                [sys.executable, "-c", code], env=environ, cwd=tmp_path, text=True
            ).strip()

        assert key() == spec.key()
        with (package / "guest" / "engine.py").open("a") as file:
            file.write("# a change\n")
        changed = key()
        assert changed != spec.key()
        with (package / "kernel" / "wrapper.py").open("a") as file:
            file.write("# not the guest's\n")
        assert key() == changed


class TestDamage:
    """Each is found at the next start, by looks or, where those deceive, by checksums."""

    @pytest.mark.parametrize("name", ["ram", "state", "scratch.raw", "scratch.qcow2"])
    def test_a_file_that_is_gone(
        self, name: str, template: Template, spec: Spec, settings: Settings
    ) -> None:
        path = template.directory / name
        hidden = path.rename(template.directory / "hidden")
        try:
            assert find_template(spec, settings) is None
        finally:
            hidden.rename(path)
        assert find_template(spec, settings) is not None

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff" * 100])
    def test_a_manifest_that_is_none(
        self, content: bytes, template: Template, spec: Spec, settings: Settings
    ) -> None:
        path = template.directory / "manifest.json"
        right = path.read_bytes()
        try:
            path.write_bytes(content)
            assert find_template(spec, settings) is None
        finally:
            path.write_bytes(right)
        assert find_template(spec, settings) is not None

    @pytest.mark.parametrize("name", ["ram", "state", "scratch.raw", "scratch.qcow2"])
    def test_one_byte(self, name: str, template: Template, spec: Spec, settings: Settings) -> None:
        path = template.directory / name
        times = path.stat()
        at = _flip(path)
        try:
            assert find_template(spec, settings) is None, "its time tells"
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            found = find_template(spec, settings)
            assert found is not None, "looks deceive"
            with pytest.raises(TemplateError, match=f"{name} has another checksum") as caught:
                verify_template(found)
            assert str(template.directory) in caught.value.hint
        finally:
            assert _flip(path, at) == at
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        verify_template(template)


def _flip(path: Path, at: int | None = None) -> int:
    """Turn the bits of one byte in the middle of the file's data; where that was."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    fd = os.open(path, os.O_RDWR)
    try:
        if at is None:
            start = os.lseek(fd, 0, os.SEEK_DATA)
            at = start + (os.lseek(fd, start, os.SEEK_HOLE) - start) // 2
        (byte,) = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([byte ^ 0xFF]), at)
    finally:
        os.close(fd)
        path.chmod(mode)
    return at


class TestClones:
    async def test_what_they_write_never_reaches_it(
        self, template: Template, settings: Settings
    ) -> None:
        before = {path: _facts(path) for path in template.directory.iterdir()}
        async with RunningVm(settings) as one, RunningVm(settings) as other:
            code = (
                "data = bytearray(b'{0}' * 50_000_000)\n"
                "with open('big', 'wb') as file: file.write(data[:20_000_000])\n"
                "import os; os.sync(); print(len(data), os.path.getsize('big'))"
            )
            for vm, letter in ((one, "a"), (other, "b")):
                assert await vm.run(code.format(letter)) == "50000000 20000000\n"
            look = "print(data[0], data[-1], open('big', 'rb').read(1))"
            assert await one.run(look) == "97 97 b'a'\n"
            assert await other.run(look) == "98 98 b'b'\n"
            for path, facts in before.items():
                if path.name != "used":  # touched at each use, so that old ones can be cleared out
                    assert _facts(path) == facts
        verify_template(template)

    async def test_a_damaged_one_is_built_again_while_a_clone_of_it_goes_on(
        self, template: Template, spec: Spec, settings: Settings
    ) -> None:
        texts: list[str] = []
        async with RunningVm(settings) as old:
            await old.run("kept = list(range(1000))")
            with (template.directory / "manifest.json").open("ab") as file:
                file.write(b"?")
            replaced = await ensure_template(
                spec, settings, lambda text, done: texts.append(text), asyncio.Semaphore()
            )
            assert texts, "it was built, not taken"
            assert replaced.directory == template.directory
            assert replaced.manifest.created > template.manifest.created
            assert names(templates_dir(settings)) == [spec.key()]
            await self._use_all(old)

            async with RunningVm(settings) as new:
                assert new.start.template is not None
                assert new.start.template.manifest.created == replaced.manifest.created
                assert await new.run("print('kept' in globals())") == "False\n"
                shutil.rmtree(replaced.directory)
                await self._use_all(old)
                await self._use_all(new, "kept = list(range(1000))")

    async def _use_all(self, vm: RunningVm, first: str = "") -> None:
        """Have the guest read files that it has not read, and memory all over the place."""
        code = (
            f"{first}\nimport gc, json.tool, xml.dom.minidom, sqlite3, wsgiref.handlers\n"
            "print(sum(kept), len(gc.get_objects()) > 1000, sum(map(len, map(repr, kept))))"
        )
        assert await vm.run(code) == "499500 True 2890\n"


def _facts(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_blocks
