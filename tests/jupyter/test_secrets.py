"""A secret that a kernel is given is in its guest, and in no other place that outlives it.

Real kernels, with the pool and without, and VMs of the command; unique values, for which every
file that vmkernel writes, every process of this host and the memory of the pool are searched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kernel_client import Kernel

from vmhost import VmHost, seconds_until
from vmkernel.host.registry import Registry, VmRecord

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

NAMES = ("BY_ENV", "BY_FILE", "BY_RUN")
HASHES = f"""
import hashlib, os, subprocess
for name in {NAMES}:
    print(name, hashlib.sha256(os.environ.get(name, "").encode()).hexdigest())
"""
POOL = {"VMKERNEL_POOL_SIZE": "1"}


class Planted:
    """The secrets, and where they are found."""

    def __init__(self, directory: Path) -> None:
        self.values = {name: f"sec-{name}-{secrets.token_hex(16)}" for name in NAMES}
        self.file = directory / "secrets"
        self.file.write_text(f"# mine\nexport BY_FILE='{self.values['BY_FILE']}'\n")
        self.file.chmod(0o600)

    def hashes(self, *names: str) -> str:
        values = (self.values[name] if name in names else "" for name in NAMES)
        return "".join(
            f"{name} {hashlib.sha256(value.encode()).hexdigest()}\n"
            for name, value in zip(NAMES, values, strict=True)
        )

    def found(self, data: bytes) -> list[str]:
        return [name for name, value in self.values.items() if data.find(value.encode()) >= 0]

    def in_files(self, directory: Path) -> dict[str, list[str]]:
        """The files below that have one in them (a sparse file's holes take no time)."""
        found = {}
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size:
                names: set[str] = set()
                with path.open("rb", buffering=0) as file:
                    end = 0
                    with contextlib.suppress(OSError):  # no data follows
                        while start := os.lseek(file.fileno(), end, os.SEEK_DATA) + 1:
                            end = os.lseek(file.fileno(), start - 1, os.SEEK_HOLE)
                            names.update(
                                self.found(os.pread(file.fileno(), end - start + 1, start - 1))
                            )
                if names:
                    found[str(path)] = sorted(names)
        return found

    def in_processes(self, what: str) -> dict[int, list[str]]:
        """The processes of this host whose ``cmdline`` or ``environ`` has one in it."""
        found = {}
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                with contextlib.suppress(OSError):
                    if names := self.found((process / what).read_bytes()):
                        found[int(process.name)] = names
        return found

    def in_memory(self, pid: int) -> list[str]:
        """Those in what a process can write to."""
        found: set[str] = set()
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                place, rights = line.split()[:2]
                if rights.startswith("rw"):
                    start, end = (int(number, 16) for number in place.split("-"))
                    with contextlib.suppress(OSError):  # [vvar] and such
                        memory.seek(start)
                        found.update(self.found(memory.read(end - start)))
        return sorted(found)


@pytest.fixture(scope="module")
def host(session_dir: Path, small_spec: str) -> Iterator[VmHost]:
    host = VmHost(session_dir)
    yield host
    host.cli("pool", "stop")
    left = seconds_until(lambda: not host.left(), 10) >= 10 and host.left()
    host.clear()
    assert not left


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return Planted(tmp_path)


def record(host: VmHost) -> VmRecord:
    """The VM that is somebody's."""
    with Registry(host.settings()) as registry:
        (found,) = (vm.record for vm in registry.list() if vm.record.task_id != "pool")
    return found


def searched(host: VmHost, planted: Planted, template: str) -> None:
    """Nothing that vmkernel writes has a secret in it."""
    assert planted.in_files(host.directory) == {}
    cache = host.settings().cache_dir.resolve() / "templates" / template
    assert sorted(path.name for path in cache.iterdir())
    assert planted.in_files(cache) == {}
    assert planted.in_processes("cmdline") == {}


@pytest.mark.parametrize("pool", [False, True], ids=["alone", "pool"])
def test_a_notebooks_secrets(
    host: VmHost, planted: Planted, small_spec: str, tmp_path: Path, pool: bool
) -> None:
    settings = {
        **(POOL if pool else {}),
        "VMKERNEL_ENV": "BY_ENV,ABSENT",
        "VMKERNEL_ENV_FILE": str(planted.file),
        "VMKERNEL_LOG_LEVEL": "debug",
        "VMKERNEL_NETWORK": "packages",
    }
    if pool:
        # Also he who fills it has the secret
        done = host.cli("pool", "fill", "--kernel", small_spec, **settings,
                        BY_ENV=planted.values["BY_ENV"])  # fmt: skip
        assert done.returncode == 0, done.stderr
        server = psutil.Process(
            json.loads(host.cli("pool", "status", "--json").stdout)["servers"][0]["pid"]
        )
        unused = server.children()
        assert unused
        for process in (server, *unused):
            assert planted.in_memory(process.pid) == []
    env = {**host.env, **settings, "BY_ENV": planted.values["BY_ENV"], "JUPYTER_TOKEN": "t"}
    with (tmp_path / "stderr").open("w") as stderr:
        kernel = Kernel(small_spec, env=env, stderr=stderr)
    try:
        assert kernel.run(HASHES).stdout == planted.hashes("BY_ENV", "BY_FILE")
        assert kernel.run("print(os.environ.get('JUPYTER_TOKEN'))").stdout == "None\n"
        vm = record(host)
        is_alone = {vm.runner_pid: ["BY_ENV"]}
        assert planted.in_processes("environ") == ({} if pool else is_alone)
        assert set(planted.in_memory(vm.runner_pid)) >= {"BY_ENV", "BY_FILE"}  # so it can be found
        if pool:
            assert planted.in_memory(server.pid) == []
        shown = kernel.run("%vm").stdout
        assert "BY_ENV, ABSENT" in shown
        assert str(planted.file) in shown
        assert not planted.found(shown.encode())

        cell = kernel.send("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        kernel.finish(cell)
        assert kernel.run(HASHES).stdout == planted.hashes("BY_ENV", "BY_FILE")
        assert (host.state_dir / "vms.sqlite-wal").exists()
        searched(host, planted, vm.template)
    finally:
        kernel.shut_down()
    assert planted.in_files(host.directory) == {}
    said = (tmp_path / "stderr").read_text()
    assert "ABSENT (setting `env`) is not set" in said
    assert planted.in_files(tmp_path) == {str(planted.file): ["BY_FILE"]}  # so it can be found


def test_secrets_of_a_vm_of_the_command(host: VmHost, planted: Planted) -> None:
    (planted.file.parent / "code.py").write_text(HASHES)
    given = ("--env", "BY_RUN", "--env-file", str(planted.file))
    secret = {"BY_RUN": planted.values["BY_RUN"]}
    done = host.cli("start", "mine", *given, **secret)
    assert (done.returncode, done.stderr) == (0, "")
    try:
        vm = record(host)
        code = str(planted.file.parent / "code.py")
        assert host.cli("exec", "mine", code).stdout == planted.hashes("BY_RUN", "BY_FILE")
        done = host.cli("exec", "--env", "BY_ENV", "mine", code, BY_ENV=planted.values["BY_ENV"])
        assert done.stdout == planted.hashes(*NAMES)
        assert planted.in_processes("environ") == {}
        searched(host, planted, vm.template)
        assert set(planted.in_memory(vm.runner_pid)) == set(NAMES)  # who keeps the guest's kernel
    finally:
        host.cli("rm", "--force", "mine")
    assert planted.in_files(host.directory) == {}


def test_a_value_does_not_belong_on_a_command_line(host: VmHost, planted: Planted) -> None:
    secret = planted.values["BY_RUN"]
    for words in (["run", "-c", "1"], ["start"], ["exec", "mine", "-c", "1"]):
        done = host.cli(words[0], "--env", f"TOKEN={secret}", *words[1:])
        assert done.returncode == 2
        assert "every user of this host sees the command line" in done.stderr
        assert secret not in done.stderr + done.stdout
        done = host.cli(words[0], "--env", "LD_PRELOAD", *words[1:], LD_PRELOAD="")
        assert done.returncode == 2
        assert "'LD_PRELOAD' cannot be given to a guest" in done.stderr
    planted.file.chmod(0o644)
    done = host.cli("run", "--env-file", str(planted.file), "-c", "1")
    assert done.returncode == 2
    assert f"chmod 600 {planted.file}" in done.stderr


def test_a_file_that_others_may_read_is_told_in_the_cell(
    host: VmHost, planted: Planted, small_spec: str
) -> None:
    planted.file.chmod(0o640 if os.geteuid() else 0o604)
    kernel = Kernel(small_spec, env={**host.env, "VMKERNEL_ENV_FILE": str(planted.file)})
    try:
        error = kernel.run("1").error
        assert "others may read or change it" in error["evalue"]
        assert planted.found(str(error).encode()) == []
        planted.file.chmod(0o600)  # mended, the next cell has it
        with planted.file.open("a") as file:
            file.write(f"LONG={'x' * 60_000}\n")  # as much as there may be, almost
        assert kernel.run(HASHES).stdout == planted.hashes("BY_FILE")
        assert kernel.run("len(os.environ['LONG'])").result == "60000"
    finally:
        kernel.shut_down()
