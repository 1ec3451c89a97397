"""The record's file: migrated, newer than we are, locked, damaged, out of place."""

from __future__ import annotations

import logging
import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from fakes import Processes, python, together
from vmkernel.errors import RegistryError
from vmkernel.host import processes, reaper
from vmkernel.host.registry import Registry, VmRecord
from vmkernel.host.schema import STEPS, VERSION
from vmkernel.models import VmState
from vmkernel.settings import Settings

VERSION_1 = Path(__file__).parent / "data" / "registry-v1.sql"
WAIT = 0.5


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        runtime_dir=tmp_path / "run", state_dir=tmp_path / "state", database_timeout=WAIT
    )


@pytest.fixture
def path(settings: Settings) -> Path:
    return settings.database_file


@pytest.fixture
def old(path: Path) -> Path:
    """A database of the schema's first version."""
    path.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(path)) as database:
        database.executescript(VERSION_1.read_text())
    return path


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return list(database.iterdump())


def aside(path: Path) -> list[str]:
    """The files that were set aside, SQLite's companions not counted."""
    found = [file.name for file in path.parent.glob(f"{path.name}.damaged-*")]
    return [name for name in found if not name.endswith(("-wal", "-shm"))]


# --- migration ---


def test_a_database_of_version_1_opens_in_the_newest(old: Path, settings: Settings) -> None:
    before = dump(old)
    with Registry(settings) as record:
        first, mine, third = (status.record for status in record.list(ended=True))
        assert mine == VmRecord(
            vm_id="vm-00000002", name="mine", owner=0, state=VmState.STOPPED,
            created=1790000002.0, started=1790000003.0, ended=1790000004.0,
            runner_pid=4000002, runner_start=13, qemu_pid=4000003, qemu_start=14, slot=1,
            recipe="datascience", language="python", accelerator="kvm", memory=2048, vcpus=2,
            tenant_id="tenant", task_id="task", directory="/r/vms/vm-00000002",
            log_dir="/s/logs/vm-00000002",
        )  # fmt: skip
        assert (first.state, first.slot, first.kernel_id) == (VmState.RUNNING, 0, "k-1")
        assert (third.exit_cause, third.notebook) == ("QEMU didn't start", "a.ipynb")
        record.update("vm-00000002", kept=True, slot_lease=2**62, boot_id="b", settings="{}")
        assert reaper.sweep(settings) == ["vm-00000001"]
    with closing(sqlite3.connect(old)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (VERSION,)
    backup = old.with_name(f"{old.name}.v1.bak")
    assert dump(backup) == before
    assert backup.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(backup)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)
    assert aside(old) == []


def test_a_database_of_version_2_gets_columns_for_what_is_open(
    path: Path, settings: Settings
) -> None:
    path.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(path)) as database:
        for statement in (*STEPS[0], *STEPS[1], "PRAGMA user_version = 2"):
            database.execute(statement)
        database.execute(
            "INSERT INTO vms (vm_id, owner, state, created) VALUES ('vm-0000000a', 0, 'stopped', 1)"
        )
        database.commit()
    before = dump(path)
    with Registry(settings) as record:
        (status,) = record.list(ended=True)
        assert (status.record.workspace, status.record.files) == ("", "")
        record.update("vm-0000000a", workspace="ro /n", network="open", environment="A, B")
        assert record.exactly("vm-0000000a").environment == "A, B"
    assert dump(path.with_name(f"{path.name}.v2.bak")) == before
    # A process of the version before goes on: it names the columns that it knows
    with closing(sqlite3.connect(path)) as database:
        database.execute(
            "INSERT INTO vms (vm_id, owner, state, created) VALUES ('vm-0000000b', 0, 'stopped', 2)"
        )
        database.commit()
    with Registry(settings) as record:
        assert record.exactly("vm-0000000b").network == ""


def test_a_new_database_and_a_migrated_one_have_the_same_schema(
    old: Path, settings: Settings, tmp_path: Path
) -> None:
    fresh = Settings(runtime_dir=tmp_path / "run", database_file=tmp_path / "fresh.sqlite")
    found = []
    for place in (settings, fresh):
        with Registry(place) as record:
            record.new()
        with closing(sqlite3.connect(place.database_file)) as database:
            columns = database.execute("PRAGMA table_info(vms)").fetchall()
            found.append((columns, database.execute("PRAGMA index_list(vms)").fetchall()))
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert found[0] == found[1]
    names = {column[1] for column in found[0][0]}
    assert names == set(VmRecord.__struct_fields__)


def test_a_migration_that_fails_changes_nothing(
    old: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dump(old)
    step = ("ALTER TABLE vms ADD COLUMN kept INTEGER NOT NULL DEFAULT 0", "nonsense")
    monkeypatch.setattr("vmkernel.host.schema.STEPS", (STEPS[0], step))
    for _ in range(2):
        with Registry(settings) as record, pytest.raises(RegistryError, match="syntax error"):
            record.list()
    assert dump(old) == before
    monkeypatch.undo()
    with Registry(settings) as record:
        assert len(record.list(ended=True)) == 3


OPEN = """
import sys
from pathlib import Path
from vmkernel.host.registry import Registry
from vmkernel.settings import Settings
place = Path(sys.argv[1])
registry = Registry(Settings(runtime_dir=place / "run", state_dir=place / "state"))
sys.stdin.readline()
print(len(registry.list(ended=True)))
"""


def test_many_processes_migrate_it_once(old: Path, tmp_path: Path) -> None:
    assert together([python(OPEN, str(tmp_path)) for _ in range(6)]) == ["3\n"] * 6
    assert aside(old) == []


def test_a_newer_schema_is_refused_and_never_touched(path: Path, settings: Settings) -> None:
    with Registry(settings) as record:
        record.new()
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
        database.execute("ALTER TABLE vms RENAME TO machines")
        database.commit()
    content = path.read_bytes()
    with Registry(settings) as record:
        for act in (record.list, record.new, lambda: record.remove("vm-00000000")):
            with pytest.raises(RegistryError, match=rf"newer vmkernel.*version {VERSION + 1}") as e:
                act()
            assert "VMKERNEL_DATABASE_FILE" in e.value.hint
    assert path.read_bytes() == content
    assert aside(path) == []


def test_another_programs_database_is_refused_and_never_touched(
    path: Path, settings: Settings
) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE history (line)")
    with Registry(settings) as record, pytest.raises(RegistryError, match="another program's"):
        record.new()
    assert "history" in "".join(dump(path))


# --- locked ---

HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2:]:
    database.execute(statement)
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(path: Path, *statements: str) -> Iterator[subprocess.Popen[str]]:
    holder = python(HOLD, str(path), *statements)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    try:
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def test_A9_a_database_locked_by_another_process_is_waited_for_within_a_bound(
    path: Path, settings: Settings
) -> None:
    with Registry(settings) as record:
        vm = record.new()
        with holding(path, "BEGIN IMMEDIATE") as holder:
            began = time.monotonic()
            with pytest.raises(RegistryError) as caught:
                record.update(vm.vm_id, slot=1)
            assert WAIT <= time.monotonic() - began < WAIT + 1
            said = str(caught.value)
            assert str(path) in said
            assert f"locked by pid {holder.pid} (python" in said
            assert f"longer than {WAIT:g} s" in said
            assert "VMKERNEL_DATABASE_TIMEOUT" in caught.value.hint
            assert record.get(vm.vm_id) == vm, "whoever only looks does not wait"
        assert record.update(vm.vm_id, slot=1).slot == 1, "the lock went with its holder"


def test_who_looks_waits_for_an_exclusive_lock_within_the_bound(
    path: Path, settings: Settings
) -> None:
    with Registry(settings) as record:
        record.new()
    exclusive = ("PRAGMA locking_mode = EXCLUSIVE", "BEGIN IMMEDIATE", "DELETE FROM vms")
    with holding(path, *exclusive):
        began = time.monotonic()
        with Registry(settings) as record, pytest.raises(RegistryError, match="stayed locked"):
            record.list()
        assert time.monotonic() - began < WAIT + 1
    with Registry(settings) as record:
        assert len(record.list()) == 1


def test_one_that_is_stopped_while_it_opens_is_waited_for_within_the_bound(
    path: Path, settings: Settings
) -> None:
    path.parent.mkdir()
    code = f"import fcntl, sys; f = open({str(path) + '.lock'!r}, 'w'); fcntl.flock(f, 2)\n"
    holder = python(code + "print('locked', flush=True); sys.stdin.read()")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    try:
        with Registry(settings) as record, pytest.raises(RegistryError) as caught:
            record.new()
        assert f"locked by pid {holder.pid} (python" in str(caught.value)
    finally:
        holder.kill()
        holder.communicate()
    with Registry(settings) as record:
        record.new()


# --- damaged ---


def fill(settings: Settings) -> list[str]:
    """A database of several pages, all of it in the file itself."""
    with Registry(settings) as record:
        return [record.new(kept=True, exit_cause="x" * 900).vm_id for _ in range(30)]


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(4).randbytes(10_000))


def truncated(path: Path) -> None:
    os.truncate(path, 5000)


def truncated_page(path: Path) -> None:
    os.truncate(path, 4096 * 2)


def bad_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2 * 4096 : 5 * 4096] = bytes([0xA5]) * 3 * 4096
    path.write_bytes(content)


def no_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE vms")
        database.commit()


def no_column(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE vms DROP COLUMN kept")
        database.commit()


def nonsense(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE vms SET state = 'blue'")
        database.commit()


DAMAGES = (garbage, truncated, truncated_page, bad_pages, no_table, no_column, nonsense)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_database_is_set_aside_and_running_vms_are_found_again(
    damage: Callable[[Path], None], path: Path, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    fill(settings)
    children = Processes()
    try:
        qemu = children.qemu(settings, "vm-0000cafe", "-m", "512M", "-smp", "2")
        pidfd = os.pidfd_open(qemu.pid)  # as who starts a QEMU has
        damage(path)
        content = path.read_bytes()
        with caplog.at_level(logging.WARNING), Registry(settings) as record:
            record.list(ended=True)
            made = record.new()
            status, other = record.list(ended=True)
            assert other.record == made
        os.close(pidfd)
    finally:
        children.end()
    assert status.record.vm_id == "vm-0000cafe"
    assert status.record.state is VmState.RUNNING
    assert status.record.runner == processes.identify_self()
    assert (status.record.memory, status.record.vcpus) == (512, 2)
    (name,) = aside(path)
    assert (path.parent / name).read_bytes() == content
    assert (path.parent / name).stat().st_mode & 0o777 == 0o600
    assert f"was damaged ({'' if damage is not nonsense else 'it makes no sense'}" in caplog.text
    assert name in caplog.text


def test_an_empty_file_becomes_a_database(path: Path, settings: Settings) -> None:
    path.parent.mkdir()
    path.touch(0o600)
    with Registry(settings) as record:
        assert record.list() == []
        record.new()
    assert aside(path) == []


def test_a_file_that_somebody_cut_short_while_others_use_it(path: Path, settings: Settings) -> None:
    with Registry(settings) as one, Registry(settings) as other:
        one.new()
        os.truncate(path, 0)
        with Registry(settings) as newcomer:
            assert newcomer.list() == []
            vm = newcomer.new()
            assert one.get(vm.vm_id) == other.get(vm.vm_id) == vm, "they went over to the new file"
            one.update(vm.vm_id, slot=1)
            assert other.get(vm.vm_id).slot == 1
    assert len(aside(path)) == 1
    with Registry(settings) as record:
        assert [status.record.slot for status in record.list()] == [1]


def test_whoever_still_has_the_damaged_file_open_does_not_harm_the_new_one(
    path: Path, settings: Settings
) -> None:
    """SQLite deletes its log by name when the last connection closes: not the new file's log."""
    users = [Registry(settings) for _ in range(3)]
    for user in users:
        user.new()
    content = bytearray(path.read_bytes())
    garbled = path.with_name("garbled")
    garbled.write_bytes(bytes(len(content)))
    garbled.replace(path)  # another file, under connections that are open
    with Registry(settings) as newcomer:
        vm = newcomer.new()
        users[0].close()
        assert users[1].get(vm.vm_id) == vm
        users[1].close()
        users[2].update(vm.vm_id, slot=3)
        newcomer.update(vm.vm_id, memory=3)
        users[2].close()
    assert sorted(file.name for file in path.parent.glob("vms.sqlite-*")) == []
    with Registry(settings) as record:
        assert (record.get(vm.vm_id).slot, record.get(vm.vm_id).memory) == (3, 3)


def test_two_that_find_it_damaged_at_once_set_it_aside_once(
    path: Path, settings: Settings, tmp_path: Path
) -> None:
    code = OPEN + "print(registry.new().vm_id)"
    for damage in (garbage, no_table, nonsense, truncated):
        fill(settings)
        damage(path)
        before = set(aside(path))
        children = [
            python(f"import logging; logging.disable()\n{code}", str(tmp_path)) for _ in range(4)
        ]
        made = {output.split()[-1] for output in together(children)}
        assert len(set(aside(path)) - before) == 1
        with Registry(settings) as record:
            assert {status.record.vm_id for status in record.list()} == made
        shutil.rmtree(path.parent)


def test_a_database_that_vanished_is_made_anew(path: Path, settings: Settings) -> None:
    with Registry(settings) as one:
        lost = one.new()
        shutil.rmtree(path.parent)
        assert one.list() == []
        made = one.new()
        assert [status.record.vm_id for status in one.list()] == [made.vm_id] != [lost.vm_id]


# --- out of place ---


def test_a_directory_in_its_place(path: Path, settings: Settings) -> None:
    path.mkdir(parents=True)
    with Registry(settings) as record, pytest.raises(RegistryError, match="a directory") as caught:
        record.new()
    assert "VMKERNEL_DATABASE_FILE" in caught.value.hint
    assert path.is_dir()


def test_a_file_where_a_directory_belongs(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    settings = Settings(runtime_dir=tmp_path / "run", state_dir=tmp_path / "state")
    with Registry(settings) as record, pytest.raises(RegistryError, match="cannot use the record"):
        record.new()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
def test_a_file_that_may_only_be_read(settings: Settings, tmp_path: Path) -> None:
    with small_disk(tmp_path, "4m") as place:
        there = msgspec.structs.replace(settings, database_file=place / "vms.sqlite")
        fill(there)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with Registry(there) as record, pytest.raises(RegistryError) as caught:
            record.new()
        assert f"cannot use the record of VMs, {there.database_file}: " in str(caught.value)
        assert "ead-only" in str(caught.value)
        assert "VMKERNEL_DATABASE_FILE" in caught.value.hint
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        with Registry(there) as record:
            record.new()
            assert len(record.list()) == 31
        assert aside(there.database_file) == []


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    place = directory / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place]).returncode:
        pytest.skip("cannot mount here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_and_what_was_written_before_stays(
    settings: Settings, tmp_path: Path
) -> None:
    kept = fill(settings)
    code = """
import resource, sys
from pathlib import Path
from vmkernel.errors import RegistryError
from vmkernel.host.registry import Registry
from vmkernel.settings import Settings
place = Path(sys.argv[1])
registry = Registry(Settings(runtime_dir=place / "run", state_dir=place / "state"))
registry.list()
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))  # each write beyond fails
for _ in range(3):
    try:
        while True:
            registry.new(exit_cause="y" * 3000)
    except RegistryError as error:
        print(error)
print(len(registry.list()))
"""
    (output,) = together([python(code, str(tmp_path))])
    assert output.count("cannot use the record of VMs") == 3, output
    with Registry(settings) as record:
        found = [status.record.vm_id for status in record.list()]
        assert found[: len(kept)] == kept
        record.new()


def write_on(record: Registry) -> None:
    for _ in range(1000):
        record.new(exit_cause="z" * 3000)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
def test_a_disk_that_is_really_full(tmp_path: Path, settings: Settings) -> None:
    with small_disk(tmp_path, "200k") as place:
        full = msgspec.structs.replace(settings, database_file=place / "vms.sqlite")
        with Registry(full) as record:
            with pytest.raises(RegistryError, match=r"full|disk I/O error") as caught:
                write_on(record)
            assert "VMKERNEL_DATABASE_FILE" in caught.value.hint
            told = len(record.list())
            subprocess.run(["mount", "-o", "remount,size=4m", place], check=True)
            record.new()
            assert len(record.list()) == told + 1
        assert aside(full.database_file) == []
