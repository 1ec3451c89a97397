"""Copies that are gone on with, against a guest that lies and a directory that it writes to."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vmkernel.errors import VmFileError
from vmkernel.guest import files as in_guest
from vmkernel.host import copies, copyplan
from vmkernel.host.private_names import is_private, is_trap
from vmkernel.protocol import frames, messages
from vmkernel.protocol.messages import MAX_CHUNK


class Guest:
    """A guest whose files are a directory here, and whose agent is the real one's code."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.break_after = 1 << 60
        """Calls, after which somebody pulls the plug"""
        self.told_size: int | None = None
        self.reads = 0

    async def __call__(
        self, command: messages.Command, buffers: Sequence[frames.Piece]
    ) -> tuple[dict[str, Any], list[memoryview]]:
        self.break_after -= 1
        if self.break_after < 0:
            raise ConnectionError("broken off")
        assert isinstance(command, messages.FileCommand)
        path = os.path.join(os.fsencode(self.home), command.path)
        try:
            match command:
                case messages.ReadFile(offset=offset, size=size):
                    self.reads += size
                    room = bytearray(size)
                    length, total = in_guest.read_file(path, offset, memoryview(room))
                    return {"size": total}, [memoryview(room)[:length]]
                case messages.WriteFile():
                    new = messages.WriteFile(path, command.offset, command.mode, command.truncate)
                    in_guest.write_file(new, memoryview(bytes(buffers[0])))
                case messages.ListFiles(skip=skip):
                    page = in_guest.Lister().page(path, skip)
                    if self.told_size is not None:
                        page["size"] = self.told_size
                        page["entries"] = [
                            [*e[:2], self.told_size, *e[3:]] for e in page["entries"]
                        ]
                    decoded: dict[str, Any] = messages.decode_object(messages.encode_json(page))
                    return decoded, []
                case messages.MakeDirectory(mode=mode):
                    in_guest.make_directory(path, mode)
                case messages.MoveFile(target=target, replace=replace):
                    in_guest.move(path, os.path.join(os.fsencode(self.home), target), replace)
        except OSError as error:
            return {"errno": error.errno}, []
        return {}, []


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    (tmp_path / "guest").mkdir()
    return Guest(tmp_path / "guest")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "host").mkdir()
    return tmp_path / "host"


def none(name: bytes) -> bool:
    return False


async def put(guest: Guest, source: Path, target: str, **options: Any) -> copies.Copied:
    with copyplan.opened(source) as fd:
        plan = copyplan.survey_host(fd, none)
        return await copies.put(guest, fd, plan, target.encode(), **options)


async def get(guest: Guest, source: str, here: Path, name: str, **options: Any) -> copies.Copied:
    plan = await copyplan.survey_guest(guest, source.encode(), none)
    fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return await copies.get(guest, source.encode(), plan, fd, name.encode(), **options)
    finally:
        os.close(fd)


async def broken_off(guest: Guest, here: Path, data: bytes) -> Path:
    """The part that a get of `f` leaves when it is broken off after two chunks."""
    (guest.home / "f").write_bytes(data)
    guest.break_after = 3
    with pytest.raises(ConnectionError):
        await get(guest, "f", here, "f")
    guest.break_after = 1 << 60
    (part,) = here.iterdir()
    assert part.name.startswith("f.")
    assert part.suffix == ".part"
    return part


DATA = os.urandom(MAX_CHUNK) * 3 + b"end"


async def test_a_get_is_gone_on_with(guest: Guest, here: Path) -> None:
    part = await broken_off(guest, here, DATA)
    assert part.read_bytes() == DATA[: 2 * MAX_CHUNK]
    done = await get(guest, "f", here, "f")
    assert (done.bytes, done.files, done.resumed) == (len(DATA), 1, 2 * MAX_CHUNK)
    assert [path.name for path in here.iterdir()] == ["f"]
    assert (here / "f").read_bytes() == DATA


async def test_a_put_is_gone_on_with_also_in_a_directory(guest: Guest, here: Path) -> None:
    (here / "d" / "e").mkdir(parents=True)
    (here / "d" / "a").write_bytes(DATA)
    (here / "d" / "e" / "b").write_bytes(DATA)
    (here / "d" / "e" / "empty").touch()
    guest.break_after = 12
    with pytest.raises(ConnectionError):
        await put(guest, here / "d", "t")
    assert not (guest.home / "t").exists()
    guest.break_after = 1 << 60
    done = await put(guest, here / "d", "t")
    assert done.resumed >= len(DATA)
    assert (guest.home / "t" / "e" / "b").read_bytes() == DATA
    assert (guest.home / "t" / "e" / "empty").read_bytes() == b""
    assert [path.name for path in guest.home.iterdir()] == ["t"]


async def test_what_is_not_the_same_is_begun_anew(guest: Guest, here: Path) -> None:
    part = await broken_off(guest, here, DATA)
    part.write_bytes(b"x" * part.stat().st_size)  # the same name and size, something else
    assert (await get(guest, "f", here, "f")).resumed == 0
    assert (here / "f").read_bytes() == DATA
    (here / "f").unlink()
    old = await broken_off(guest, here, DATA)
    (guest.home / "f").write_bytes(DATA + b"more")  # another source: another part
    assert (await get(guest, "f", here, "f")).resumed == 0
    assert (here / "f").read_bytes() == DATA + b"more"
    assert old.exists()


@pytest.mark.parametrize("planted", ["link", "hard link", "fifo", "longer", "foreign directory"])
async def test_a_planted_part_is_no_beginning(guest: Guest, here: Path, planted: str) -> None:
    """The guest may write to the directory: it knows the part's name, and puts something there."""
    part = await broken_off(guest, here, DATA)
    victim = here.parent / "victim"
    victim.write_bytes(DATA[:MAX_CHUNK])
    part.unlink()
    if planted == "link":
        part.symlink_to(victim)
    elif planted == "hard link":
        os.link(victim, part)
    elif planted == "fifo":
        os.mkfifo(part)
    elif planted == "longer":
        part.write_bytes(DATA * 2)
    else:
        part.mkdir()
        with pytest.raises(OSError, match="directory"):
            await get(guest, "f", here, "f")
        return
    await get(guest, "f", here, "f")
    assert victim.read_bytes() == DATA[:MAX_CHUNK]
    assert (here / "f").read_bytes() == DATA
    assert stat.S_ISREG((here / "f").lstat().st_mode)


async def test_a_planted_directory_is_not_entered_by_a_link(guest: Guest, here: Path) -> None:
    (guest.home / "d").mkdir()
    (guest.home / "d" / "f").write_bytes(DATA)
    guest.break_after = 4
    with pytest.raises(ConnectionError):
        await get(guest, "d", here, "d")
    guest.break_after = 1 << 60
    (part,) = here.iterdir()
    (part / "f").unlink()
    part.rmdir()
    (here.parent / "elsewhere").mkdir()
    part.symlink_to(here.parent / "elsewhere")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await get(guest, "d", here, "d")
    assert caught.value.errno in (errno.ENOTDIR, errno.ELOOP)
    assert list((here.parent / "elsewhere").iterdir()) == []


async def test_a_name_that_comes_meanwhile_is_not_written_over(guest: Guest, here: Path) -> None:
    (guest.home / "f").write_bytes(DATA)

    def late(done: int, total: int | None) -> None:
        (here / "f").write_text("mine")

    with pytest.raises(VmFileError, match="is there already"):
        await get(guest, "f", here, "f", on_progress=late)
    assert (here / "f").read_text() == "mine"
    with pytest.raises(VmFileError, match="is there already"):
        await get(guest, "f", here, "f")
    await get(guest, "f", here, "f", replace=True)
    assert (here / "f").read_bytes() == DATA
    (here / "d").mkdir()
    with pytest.raises(VmFileError, match="only a file"):
        await get(guest, "f", here, "d", replace=True)


async def test_no_more_lands_than_was_told(guest: Guest, here: Path) -> None:
    (guest.home / "f").write_bytes(DATA)
    guest.told_size = 10
    assert (await get(guest, "f", here, "f")).bytes == 10
    (guest.home / "d").mkdir()
    for name in "abcdefgh":  # "empty" files, as the question says
        (guest.home / "d" / name).write_bytes(DATA)
    guest.told_size = 0
    done = await get(guest, "d", here, "d")
    assert done.bytes == copies.UNSIZED
    guest.told_size = 1 << 50
    with pytest.raises(VmFileError, match=r"more than 4\.0 GiB"):
        await get(guest, "f", here, "g")
    guest.told_size = len(DATA) + 1
    with pytest.raises(VmFileError, match="became shorter"):
        await get(guest, "f", here, "g")
    assert not (here / "g").exists()


async def test_what_is_left_out_counts_too(
    guest: Guest, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a guest could list links for ever."""
    (guest.home / "d").mkdir()
    for number in range(30):
        (guest.home / "d" / str(number)).symlink_to("/nowhere")
    plan = copyplan.Plan(1 << 20, 20)
    monkeypatch.setattr(copyplan, "Plan", lambda *_: plan)
    with pytest.raises(VmFileError, match="more than 20 files"):
        await get(guest, "d", here, "d")


async def test_the_disk_keeps_some_room(
    guest: Guest, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "RESERVE", 1 << 60)
    (guest.home / "f").write_bytes(b"1")
    with pytest.raises(VmFileError, match="room"):
        await get(guest, "f", here, "f")
    assert list(here.iterdir()) == []


async def test_nothing_is_read_through_a_link(guest: Guest, here: Path) -> None:
    (here / "d").mkdir()
    (here / "d" / "f").write_text("1")
    (here / "way").symlink_to(here / "d")
    for path in (here / "way" / "f", here / "way"):
        with pytest.raises(OSError) as caught, copyplan.opened(path):  # noqa: PT011
            pass
        assert caught.value.errno in (errno.ENOTDIR, errno.ELOOP)
    os.mkfifo(here / "pipe")
    with pytest.raises(VmFileError, match="neither"), copyplan.opened(here / "pipe"):
        pass
    with copyplan.opened(here / "d") as fd:  # swapped between survey and copy
        plan = copyplan.survey_host(fd, none)
        (here / "d" / "f").unlink()
        (here / "d" / "f").symlink_to("/etc/passwd")
        with pytest.raises(OSError) as caught:  # noqa: PT011
            await copies.put(guest, fd, plan, b"t")
        assert caught.value.errno == errno.ELOOP
    assert not (guest.home / "t").exists()


async def test_a_directory_is_put_into_one_that_is_there(guest: Guest, here: Path) -> None:
    (here / "d" / "in").mkdir(parents=True)
    (here / "d" / "in" / "f").write_text("new")
    (guest.home / "d" / "in").mkdir(parents=True)
    (guest.home / "d" / "in" / "f").write_text("old")
    (guest.home / "d" / "in" / "g").write_text("stays")
    with pytest.raises(VmFileError, match="is there already"):
        await put(guest, here / "d", "d")
    await put(guest, here / "d", "d", replace=True)
    found = {path.name: path.read_text() for path in (guest.home / "d" / "in").iterdir()}
    assert found == {"f": "new", "g": "stays"}
    assert [path.name for path in guest.home.iterdir()] == ["d"]
    (guest.home / "file").touch()
    with pytest.raises(VmFileError, match="no directory"):
        await put(guest, here / "d", "file", replace=True)
    with pytest.raises(VmFileError, match="it is a directory"):
        await put(guest, here / "d" / "in" / "f", "d", replace=True)


async def test_files_alike_in_size_time_and_part_are_not_glued(guest: Guest, here: Path) -> None:
    """As of two disk images out of an archive: both of 1970, and zeros where one was broken off."""
    zeros = b"\0" * (2 * MAX_CHUNK)
    for name in ("a", "b"):
        for top in (here, guest.home):
            (top / name).write_bytes(name.encode() + zeros)
            os.utime(top / name, (1, 1))

    with copyplan.opened(here / "a") as fd:
        part = copyplan.survey_host(fd, none).part_of(b"disk")
    (guest.home / os.fsdecode(part)).write_bytes((b"a" + zeros)[:MAX_CHUNK])
    await put(guest, here / "b", "disk")
    assert (guest.home / "disk").read_bytes() == b"b" + zeros

    part = (await copyplan.survey_guest(guest, b"a", none)).part_of(b"disk")
    (here / os.fsdecode(part)).write_bytes((b"a" + zeros)[:MAX_CHUNK])
    await get(guest, "b", here, "disk")
    assert (here / "disk").read_bytes() == b"b" + zeros


def test_a_long_name_has_a_part(here: Path) -> None:
    name = "n" * 255
    (here / name).write_text("x")
    with copyplan.opened(here / name) as fd:
        part = copyplan.survey_host(fd, none).part_of(name.encode())
    assert len(part) == 255
    assert part.endswith(b".part")


def test_names_that_stay() -> None:
    for name in (".ssh", ".env", ".config", "id_rsa", "a.PEM", "kernel-1.json", "credentials"):
        assert is_private(name.encode()), name
    for name in ("data.csv", "keys.csv", "monkey", "kernel.json", "pem"):
        assert not is_private(name.encode()), name
    for name in (".git", "__pycache__", "a.pth", "sitecustomize.py", "jupyter_lab_config.py"):
        assert is_trap(name.encode()), name
    for name in ("data.csv", "config.json", "my_config.py", "run.sh"):
        assert not is_trap(name.encode()), name


def test_sizes_in_words() -> None:
    sizes = (0, 1, 1023, 1536, 12_900_000, 5 << 30)
    assert [copyplan.in_words(size) for size in sizes] == [
        "0 bytes", "1 byte", "1023 bytes", "1.5 KiB", "12.3 MiB", "5.0 GiB",
    ]  # fmt: skip
