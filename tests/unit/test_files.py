"""Files in and out, against a guest that lies: nothing lands where it should not."""

from __future__ import annotations

import base64
import errno
import os
import resource
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vmkernel.errors import ProtocolError, VmFileError, VmGuestError, VmTimeoutError
from vmkernel.host import files
from vmkernel.host.files import get_tree, put_tree, read_file
from vmkernel.protocol import frames, messages
from vmkernel.protocol.messages import MAX_CHUNK, MAX_ENTRIES

Answer = tuple[dict[str, Any], list[memoryview]]


def name(text: str | bytes) -> str:
    """As a name travels in JSON."""
    return base64.b64encode(os.fsencode(text)).decode()


def entry(text: str | bytes, kind: str = "file", size: int = 0, mode: int = 0o644) -> list[Any]:
    return [name(text), kind, size, mode]


def listing(
    *entries: list[Any],
    kind: str = "directory",
    size: int = 0,
    mode: int = 0o755,
    more: bool = False,
) -> dict[str, Any]:
    return {"kind": kind, "size": size, "mode": mode, "entries": list(entries), "more": more}


class Guest:
    """A guest made of what it answers: by path, listings and contents; and what it was given."""

    def __init__(self, **tree: dict[str, Any] | bytes) -> None:
        self.tree = {os.fsencode(path): what for path, what in tree.items()}
        self.written: dict[bytes, bytearray] = {}
        self.modes: dict[bytes, int] = {}
        self.calls = 0

    def set(self, path: str, what: dict[str, Any] | bytes) -> Guest:
        self.tree[os.fsencode(path)] = what
        return self

    async def __call__(self, command: messages.Command, buffers: Sequence[frames.Piece]) -> Answer:
        self.calls += 1
        # What cannot be sent must not get this far: the agent would stumble over it
        messages.decode(messages.encode_json(messages.Call(1, command)), messages.Call)
        match command:
            case messages.ListFiles():
                return self.list(command), []
            case messages.ReadFile():
                return self.read(command)
            case messages.WriteFile():
                return self.write(command, bytes(buffers[0])), []
            case messages.MakeDirectory():
                self.modes[command.path] = command.mode
                return {}, []
        raise AssertionError(command)

    def list(self, command: messages.ListFiles) -> dict[str, Any]:
        found = self.tree.get(command.path)
        if found is None:
            return {"errno": errno.ENOENT}
        if isinstance(found, bytes):
            return listing(kind="file", size=len(found))
        return found

    def read(self, command: messages.ReadFile) -> Answer:
        found = self.tree.get(command.path)
        if not isinstance(found, bytes):
            return {"errno": errno.EISDIR if found else errno.ENOENT}, []
        data = found[command.offset : command.offset + command.size]
        return {"size": len(found)}, [memoryview(data)]

    def write(self, command: messages.WriteFile, data: bytes) -> dict[str, Any]:
        file = self.written.setdefault(command.path, bytearray())
        self.modes.setdefault(command.path, command.mode)
        assert command.offset <= len(file)
        file[command.offset : command.offset + len(data)] = data
        if command.truncate:
            del file[command.offset + len(data) :]
        return {}


def content(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory; None for what is no file."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


# --- what goes well --------------------------------------------------------------------


async def test_a_file_arrives_as_it_is_and_its_progress_is_told(tmp_path: Path) -> None:
    data = os.urandom(2 * MAX_CHUNK + 1)
    told: list[tuple[int, int | None]] = []
    done = await get_tree(
        Guest(a=data), "a", tmp_path / "b", on_progress=lambda *what: told.append(what)
    )
    assert content(tmp_path) == {"b": data}
    assert done == (len(data), 1, [])
    assert told == [(size, len(data)) for size in (MAX_CHUNK, 2 * MAX_CHUNK, len(data))]


async def test_a_file_goes_into_a_directory_that_is_there(tmp_path: Path) -> None:
    await get_tree(Guest().set("/x/a", b"1"), "/x/a", tmp_path)
    assert content(tmp_path) == {"a": b"1"}


async def test_a_tree_arrives_without_what_is_no_file(tmp_path: Path) -> None:
    guest = Guest(
        d=listing(
            entry("ä ö", size=1),
            entry(b"\xff\xfe", size=2),
            entry("in", "directory", mode=0o700),
            entry("link", "link"),
            entry("pipe", "other"),
        )
    )
    guest.set("d/ä ö", b"1").tree[b"d/\xff\xfe"] = b"22"
    guest.set("d/in", listing(entry("run", size=3, mode=0o4755))).set("d/in/run", b"333")
    done = await get_tree(guest, "d", tmp_path / "t")
    assert content(tmp_path / "t") == {
        "ä ö": b"1",
        os.fsdecode(b"\xff\xfe"): b"22",
        "in": None,
        "in/run": b"333",
    }
    assert done == (6, 3, ["d/link", "d/pipe"])
    assert stat.S_IMODE((tmp_path / "t" / "in").stat().st_mode) == 0o700


async def test_modes_keep_to_the_umask_and_have_no_special_bits(tmp_path: Path) -> None:
    tree = listing(entry("f", mode=0o7777), entry("g", mode=0), entry("d", "directory", 0, 0o7777))
    guest = Guest(d=tree).set("d/f", b"").set("d/g", b"").set("d/d", listing())
    umask = os.umask(0o027)
    try:
        await get_tree(guest, "d", tmp_path / "t")
    finally:
        os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "t").iterdir()}
    assert modes == {"f": 0o750, "g": 0o600, "d": 0o750}


async def test_a_directory_of_many_pages_arrives_whole(tmp_path: Path) -> None:
    class Paged(Guest):
        def list(self, command: messages.ListFiles) -> dict[str, Any]:
            names = [f"{number:04}" for number in range(700)]
            page = names[command.skip : command.skip + MAX_ENTRIES]
            return listing(*map(entry, page), more=len(page) == MAX_ENTRIES)

        def read(self, command: messages.ReadFile) -> Answer:
            return {"size": 0}, [memoryview(b"")]

    assert (await get_tree(Paged(), "d", tmp_path / "t")).files == 700
    assert len(content(tmp_path / "t")) == 700


async def test_a_file_that_does_not_tell_its_size_is_read_to_its_end(tmp_path: Path) -> None:
    class Proc(Guest):
        def list(self, command: messages.ListFiles) -> dict[str, Any]:
            return listing(kind="file")

    guest = Proc().set("/proc/cpuinfo", b"x" * 10000)
    await get_tree(guest, "/proc/cpuinfo", tmp_path / "a")
    assert (tmp_path / "a").stat().st_size == 10000
    assert await read_file(guest, "/proc/cpuinfo") == b"x" * 10000


async def test_a_named_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    guest = Guest(a=b"n" * (MAX_CHUNK + 1))

    class Dying(Guest):
        def read(self, command: messages.ReadFile) -> Answer:
            assert content(tmp_path)["a"] == b"old"
            if command.offset:
                raise VmGuestError("the VM has ended")
            return guest.read(command)

    with pytest.raises(VmGuestError, match="has ended"):
        await get_tree(Dying(a=bytes(guest.tree[b"a"])), "a", target)
    assert content(tmp_path) == {"a": b"old"}
    await get_tree(guest, "a", target)
    assert content(tmp_path) == {"a": guest.tree[b"a"]}


async def test_what_is_put_arrives_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "ü").write_bytes(b"1" * (MAX_CHUNK * 2))
    (source / "empty").touch(0o400)
    (source / "link").symlink_to("/etc/passwd")
    os.mkfifo(source / "pipe")
    guest = Guest()
    told: list[tuple[int, int | None]] = []
    done = await put_tree(guest, source, "to", on_progress=lambda *what: told.append(what))
    assert guest.written == {
        os.fsencode("to/deep/er/ü"): b"1" * (MAX_CHUNK * 2),
        b"to/empty": b"",
    }
    assert guest.modes.keys() - guest.written.keys() == {b"to", b"to/deep", b"to/deep/er"}
    assert guest.modes[b"to/empty"] == 0o600
    assert done.bytes == MAX_CHUNK * 2
    assert sorted(done.skipped) == [str(source / "link"), str(source / "pipe")]
    assert told[-1] == (done.bytes, done.bytes)


async def test_bytes_and_a_file_under_its_own_name_can_be_put(tmp_path: Path) -> None:
    guest = Guest()
    await put_tree(guest, b"", "a")
    await put_tree(guest, b"1" * (MAX_CHUNK + 1), "b")
    (tmp_path / "c").write_bytes(b"2")
    (tmp_path / "link").symlink_to("c")  # named by the caller: followed
    await put_tree(guest, tmp_path / "link", "/tmp/")
    assert guest.written == {b"a": b"", b"b": b"1" * (MAX_CHUNK + 1), b"/tmp/link": b"2"}


# --- what a guest may say, and what comes of it -----------------------------------------


@pytest.mark.parametrize("lie", ["..", ".", "../x", "/etc/x", "a/b", "a\0b", "", "x" * 256])
@pytest.mark.parametrize("kind", ["file", "directory"])
async def test_a_name_that_leads_elsewhere_breaks_the_protocol(
    tmp_path: Path, lie: str, kind: str
) -> None:
    guest = Guest(d=listing(entry("good"), entry(lie, kind))).set("d/good", b"")
    with pytest.raises(ProtocolError):
        await get_tree(guest, "d", tmp_path / "t")
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    "lie",
    [
        {},
        {"kind": "file"},
        {**listing(), "kind": "socket"},
        {**listing(), "size": -1},
        {**listing(), "size": 1 << 61},
        {**listing(), "size": 0.5},
        {**listing(), "mode": 1 << 20},
        {**listing(), "entries": None},
        {**listing(), "entries": [["=", "file", 0, 0]]},
        {**listing(), "entries": [entry(str(number)) for number in range(MAX_ENTRIES + 1)]},
        {**listing(), "entries": [entry("a"), entry("a")]},
        {**listing(), "more": True},
        {**listing(), "other": 1},
        {"errno": 0},
        {"errno": "ENOENT"},
        {"errno": 1 << 40},
    ],
    ids=repr,
)
async def test_an_answer_of_another_form_breaks_the_protocol(
    tmp_path: Path, lie: dict[str, Any]
) -> None:
    with pytest.raises(ProtocolError):
        await get_tree(Guest(d=lie), "d", tmp_path / "t")
    assert content(tmp_path) == {}


async def test_more_bytes_than_asked_for_break_the_protocol(tmp_path: Path) -> None:
    class Generous(Guest):
        def read(self, command: messages.ReadFile) -> Answer:
            return {"size": 1}, [memoryview(b"1" * (command.size + 1))]

    class Twofold(Guest):
        def read(self, command: messages.ReadFile) -> Answer:
            return {"size": 1}, [memoryview(b"1")] * 2

    for kind in (Generous, Twofold):
        with pytest.raises(ProtocolError):
            await get_tree(kind(a=b"1"), "a", tmp_path / "a")
    assert content(tmp_path) == {}


async def test_a_huge_size_is_refused_before_a_byte_is_read(tmp_path: Path) -> None:
    guest = Guest(d=listing(entry("a", size=1 << 60)))
    with pytest.raises(VmFileError, match=r"'d/a': more than \d+ bytes") as caught:
        await get_tree(guest, "d", tmp_path / "t")
    assert "max_bytes" in caught.value.hint
    assert guest.calls == 1


async def test_a_file_that_grows_is_taken_as_long_as_it_was(tmp_path: Path) -> None:
    class Growing(Guest):
        def read(self, command: messages.ReadFile) -> Answer:
            return {"size": 1 << 40}, [memoryview(b"1" * command.size)]

    size = MAX_CHUNK + 100
    await get_tree(Growing(a=b"1" * size), "a", tmp_path / "a")
    assert (tmp_path / "a").stat().st_size == size


async def test_a_file_without_an_end_stops_at_the_limit(tmp_path: Path) -> None:
    class Endless(Guest):
        def read(self, command: messages.ReadFile) -> Answer:
            return {"size": 0}, [memoryview(b"1" * command.size)]

    guest = Endless(a=b"")
    with pytest.raises(VmFileError, match="bytes"):
        await get_tree(guest, "a", tmp_path / "a", max_bytes=3 * MAX_CHUNK)
    assert guest.calls == 5  # the listing, three that are within it, and one too many
    with pytest.raises(VmFileError, match="bytes"):
        await read_file(guest, "a", 1000)
    assert content(tmp_path) == {}


async def test_a_directory_in_itself_stops_at_the_limit(tmp_path: Path) -> None:
    class Cycle(Guest):
        def list(self, command: messages.ListFiles) -> dict[str, Any]:
            return listing(entry("d", "directory"))

    with pytest.raises(VmFileError, match="deep"):
        await get_tree(Cycle(), "d", tmp_path / "t")
    with pytest.raises(VmFileError, match="3 directories deep"):
        await get_tree(Cycle(), "d", tmp_path / "u", max_depth=3)
    assert len(content(tmp_path / "u")) == 3


async def test_names_that_get_too_long_together_are_not_asked_for(tmp_path: Path) -> None:
    class Long(Guest):
        def list(self, command: messages.ListFiles) -> dict[str, Any]:
            return listing(entry("d" * 250, "directory"))

    with pytest.raises(VmFileError, match="no path"):
        await get_tree(Long(), "d", tmp_path / "t")


async def test_an_endless_directory_stops_at_the_limit(tmp_path: Path) -> None:
    class Endless(Guest):
        def list(self, command: messages.ListFiles) -> dict[str, Any]:
            numbers = range(command.skip, command.skip + MAX_ENTRIES)
            return listing(*(entry(str(number), "link") for number in numbers), more=True)

    with pytest.raises(VmFileError, match="10000 names"):
        await get_tree(Endless(), "d", tmp_path / "t", max_files=10_000)


@pytest.mark.parametrize("said", ["file", "directory"])
async def test_what_changes_its_kind_is_an_error(tmp_path: Path, said: str) -> None:
    tree = listing(entry("a", said, 5))
    guest = Guest(d=tree).set("d/a", b"12345" if said == "directory" else listing())
    with pytest.raises(VmFileError, match=r"'d/a'"):
        await get_tree(guest, "d", tmp_path / "t")
    assert content(tmp_path / "t") == {}


async def test_a_name_twice_over_two_pages_lands_once(tmp_path: Path) -> None:
    class Twice(Guest):
        def list(self, command: messages.ListFiles) -> dict[str, Any]:
            return listing(entry("a"), more=command.skip == 0)

    with pytest.raises(VmFileError, match="File exists"):
        await get_tree(Twice().set("d/a", b""), "d", tmp_path / "t")
    assert content(tmp_path / "t") == {"a": b""}


async def test_what_a_guest_calls_its_files_cannot_reach_a_terminal(tmp_path: Path) -> None:
    guest = Guest(d=listing(entry("\x1b[2J\n", "directory")))
    with pytest.raises(VmFileError) as caught:
        await get_tree(guest, "d", tmp_path / "t")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOENT, "no such file"),
        (errno.EACCES, "may not"),
        (errno.EISDIR, "is a directory"),
        (errno.ENOSPC, "disk is full"),
        (errno.EUCLEAN, os.strerror(errno.EUCLEAN)),
        (4000, "4000"),
    ],
)
async def test_what_the_guests_system_refuses_is_said(
    tmp_path: Path, number: int, words: str
) -> None:
    with pytest.raises(VmFileError, match=words):
        await get_tree(Guest(a={"errno": number}), "a", tmp_path / "a")
    assert content(tmp_path) == {}


# --- the host's side ---------------------------------------------------------------------


async def test_nothing_goes_through_a_link_or_over_a_file(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"safe")
    target = tmp_path / "t"
    target.mkdir()
    (target / "dir").symlink_to(outside)
    (target / "file").symlink_to(outside / "file")
    (target / "new").symlink_to(outside / "new")
    (target / "old").write_bytes(b"safe")
    guest = Guest().set("d/dir", listing(entry("x"))).set("d/dir/x", b"1")
    for text, kind in (("dir", "directory"), ("file", "file"), ("new", "file"), ("old", "file")):
        guest.set("d", listing(entry(text, kind, 1)))
        if kind == "file":
            guest.set(f"d/{text}", b"1")
        with pytest.raises(VmFileError, match=text):
            await get_tree(guest, "d", target)
    assert content(outside) == {"file": b"safe"}
    assert (target / "old").read_bytes() == b"safe"


async def test_a_link_that_was_named_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"safe")
    (tmp_path / "a").symlink_to("kept")
    await get_tree(Guest(a=b"new"), "a", tmp_path / "a")
    assert content(tmp_path) == {"a": b"new", "kept": b"safe"}
    assert not (tmp_path / "a").is_symlink()


async def test_a_fifo_that_was_named_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(VmFileError, match="neither"):
        await get_tree(Guest(a=b"new"), "a", tmp_path / "a")
    assert content(tmp_path) == {"a": None}


async def test_errors_of_the_hosts_say_so(tmp_path: Path) -> None:
    with pytest.raises(VmFileError, match=r"On the host, .*No such file"):
        await get_tree(Guest(a=b""), "a", tmp_path / "no" / "a")
    with pytest.raises(VmFileError, match=r"On the host, .*No such file"):
        await put_tree(Guest(), tmp_path / "no", "a")
    (tmp_path / "file").touch()
    with pytest.raises(VmFileError, match=r"On the host, .*File exists"):
        await get_tree(Guest(d=listing()), "d", tmp_path / "file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(VmFileError, match=r"On the host, .*symbolic links"):
        await put_tree(Guest(), tmp_path / "loop", "a")


async def test_what_the_host_cannot_hold_leaves_nothing(tmp_path: Path) -> None:
    guest = Guest(d=listing(entry("a", size=3 * MAX_CHUNK))).set("d/a", b"1" * 3 * MAX_CHUNK)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_CHUNK + 1, before[1]))
    try:
        for source, target in (("d", "t"), ("d/a", "a")):
            with pytest.raises(VmFileError, match=r"On the host, .*File too large"):
                await get_tree(guest, source, tmp_path / target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert content(tmp_path) == {"t": None}


async def test_errors_of_ours_pass_as_they_are(tmp_path: Path) -> None:
    """Some are OSErrors, too."""

    class Slow(Guest):
        def read(self, command: messages.ReadFile) -> Answer:
            raise VmTimeoutError("too slow")

    with pytest.raises(VmTimeoutError):
        await get_tree(Slow(a=b"1"), "a", tmp_path / "a")


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000])
async def test_a_path_that_cannot_be_is_not_sent(tmp_path: Path, path: str) -> None:
    guest = Guest()
    with pytest.raises(VmFileError):
        await get_tree(guest, path, tmp_path / "a")
    with pytest.raises(VmFileError):
        await put_tree(guest, b"", path)
    assert guest.calls == 0


async def test_limits_hold_for_what_is_put_too(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}" / "deep").mkdir(parents=True)
        (tmp_path / f"{number}" / "file").write_bytes(b"1" * 10)
    guest = Guest()
    for limit in ({"max_files": 7}, {"max_depth": 1}):
        with pytest.raises(VmFileError, match="more than"):
            await put_tree(guest, tmp_path, "t", **limit)
        assert guest.calls == 0
    with pytest.raises(VmFileError, match="more than"):
        await put_tree(guest, tmp_path, "t", max_bytes=45)
    assert guest.calls == 0


def test_the_limits_are_sensible() -> None:
    assert os.sysconf("SC_OPEN_MAX") > files.MAX_DEPTH * 2  # each holds a descriptor
