"""A hostile guest at the workspace's gate: nothing outside is reached, nothing protected written.

The guest speaks SFTP itself, so nothing of what sshfs or Linux would refuse in a real guest stands
in the way; tests/jupyter/test_workspace.py has what cells can try. Each attempt is refused, and the
host is looked at: a directory beside the workspace and the secrets in it are as they were.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sftp_client import Guest, attributes, s, word

from vmkernel.host import workspace_gate, workspace_requests, workspace_server
from vmkernel.host.workspace import Share, choose
from vmkernel.protocol import sftp
from vmkernel.settings import load_settings

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        workspace_server.missing(workspace_server.find_bwrap()) != ("", ""),
        reason="bubblewrap and sftp-server are not both here",
    ),
]

SECRET = b"the secret beside the workspace"
CREATE = sftp.PFLAG_WRITE | sftp.PFLAG_CREATE
DENIED = (sftp.PERMISSION_DENIED, sftp.NO_SUCH_FILE, sftp.FAILURE, sftp.UNSUPPORTED, sftp.BROKEN)


class Place:
    """A workspace with all sorts of things in it, and what lies beside it."""

    def __init__(self, directory: Path) -> None:
        self.inside, self.outside = directory / "ws", directory / "outside"
        for name in ("sub", ".git/hooks", ".ssh", "sub/.git", "private", "../outside"):
            (self.inside / name).mkdir(parents=True)
        (self.outside / "secret").write_bytes(SECRET)
        (self.inside / "data.csv").write_text("a,b\n")
        (self.inside / "sub" / "deep").write_text("deep")
        (self.inside / "private" / "key").write_bytes(SECRET)
        (self.inside / ".git" / "config").write_text("[core]")
        for name in (".env", ".ssh/id_rsa", ".netrc", "server.pem", "kernel-1234.json"):
            (self.inside / name).write_bytes(SECRET)
        (self.inside / "absolute").symlink_to(self.outside / "secret")
        (self.inside / "relative").symlink_to("../outside/secret")
        (self.inside / "way out").symlink_to(self.outside)
        (self.inside / "to git").symlink_to(".git")
        (self.inside / "to ssh").symlink_to(".ssh")
        (self.inside / "dangling").symlink_to("sub/.envrc")
        (self.inside / "etc").symlink_to("/etc")
        os.mkfifo(self.inside / "fifo")
        self._socket = socket.socket(socket.AF_UNIX)
        with_short_path(self._socket, self.inside / "socket")
        self.before = look(directory)
        self.directory = directory

    def changed(self) -> list[str]:
        """What is not as it was, outside and of what is protected."""
        now = look(self.directory)
        watched = ("outside", ".git", ".ssh", "private", "__pycache__", ".envrc", "etc")
        return [
            name
            for name in now.keys() | self.before.keys()
            if now.get(name) != self.before.get(name)
            and (not name.startswith("ws") or any(part in watched for part in name.split("/")))
        ]


def with_short_path(sock: socket.socket, path: Path) -> None:
    fd = os.open(path.parent, os.O_PATH)
    sock.bind(f"/proc/self/fd/{fd}/{path.name}")
    os.close(fd)


def look(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a directory: kind, permissions, content."""
    found = {}
    for path in directory.rglob("*"):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else b""
        found[str(path.relative_to(directory))] = (mode, content)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    assert not place.changed()


def share(place: Place, **options: object) -> Share:
    return Share(str(place.inside), hidden=frozenset({(b"private",)}), **options)  # type: ignore[arg-type]


@pytest.fixture
async def ro(place: Place) -> AsyncIterator[Guest]:
    async with Guest(share(place)) as guest:
        yield guest


@pytest.fixture
async def rw(place: Place) -> AsyncIterator[Guest]:
    async with Guest(share(place, writable=True, size=1 << 20, files=20)) as guest:
        yield guest


async def test_what_is_shared_is_read(ro: Guest) -> None:
    assert await ro.read(b"/ws/data.csv") == b"a,b\n"
    assert await ro.read(b"/ws/sub/deep") == b"deep"
    assert ro.gate.statistics.refused == 0


PATHS_OUT = {
    "dots": b"/ws/../outside/secret",
    "dots in the middle": b"/ws/sub/../../outside/secret",
    "dots at the end": b"/ws/..",
    "one dot": b"/ws/./data.csv",
    "two slashes": b"/ws//etc/passwd",
    "another root": b"/etc/passwd",
    "the root": b"/",
    "a name like the root's": b"/wsx",
    "relative": b"data.csv",
    "relative upwards": b"../outside/secret",
    "empty": b"",
    "process information": b"/proc/self/environ",
    "the owner's memory": b"/proc/1/mem",
    "devices": b"/dev/null",
    "the server itself": b"/sftp-server",
    "a NUL": b"/ws/data.csv\0.png",
    "a name too long": b"/ws/" + b"a" * 256,
    "a path too long": b"/ws/" + b"a/" * 4000 + b"b",
}


@pytest.mark.parametrize("name", PATHS_OUT)
async def test_no_path_leads_out(rw: Guest, name: str) -> None:
    path = PATHS_OUT[name]
    assert await rw.read(path) in DENIED
    assert await rw.write(path, b"x") in DENIED
    assert await rw.list(path) in DENIED
    for kind in (sftp.LSTAT, sftp.STAT, sftp.READLINK, sftp.REMOVE, sftp.RMDIR, sftp.REALPATH):
        assert (await rw.ask(kind, s(path))).code in DENIED, kind
    for kind in (sftp.MKDIR, sftp.SETSTAT):
        assert (await rw.ask(kind, s(path), attributes(mode=0o700))).code in DENIED, kind
    for kind, words in (
        (sftp.RENAME, ()), (sftp.EXTENDED, (sftp.POSIX_RENAME,)), (sftp.EXTENDED, (sftp.HARDLINK,)),
    ):  # fmt: skip
        first = [s(word_) for word_ in words]
        assert (await rw.ask(kind, *first, s(b"/ws/data.csv"), s(path))).code in DENIED
        assert (await rw.ask(kind, *first, s(path), s(b"/ws/new"))).code in DENIED
    assert (await rw.extended(sftp.STATVFS, s(path))).code in DENIED


LINKS = {
    "absolute": b"absolute", "relative": b"relative", "through a directory": b"way out/secret",
    "a system directory": b"etc/passwd", "hidden": b"to ssh/id_rsa", "protected": b"to git/config",
}  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
async def test_no_link_of_the_hosts_is_followed(rw: Guest, name: str) -> None:
    """Not even to where the guest might go: it follows links itself, and then names the place."""
    path = b"/ws/" + LINKS[name]
    assert await rw.read(path) in DENIED
    assert await rw.write(path, b"pwned") in DENIED
    assert await rw.write(path, b"pwned", sftp.PFLAG_WRITE) in DENIED
    assert (await rw.ask(sftp.STAT, s(path))).code in DENIED
    assert (await rw.ask(sftp.SETSTAT, s(path), attributes(mode=0o777))).code in DENIED
    assert (await rw.ask(sftp.SETSTAT, s(path), attributes(size=0))).code in DENIED
    assert await rw.list(path) in DENIED


async def test_a_link_that_leads_nowhere_makes_nothing(rw: Guest, place: Place) -> None:
    assert await rw.write(b"/ws/dangling", b"export PATH=.") in DENIED
    assert not (place.inside / "sub" / ".envrc").exists()


TARGETS = {
    "absolute": b"/etc/passwd", "upwards": b"../outside/secret", "upwards later": b"sub/../../x",
    "upwards within": b"../ws/data.csv", "to what is protected": b".git/hooks", "empty": b"",
    "to what is hidden": b"sub/.env", "a NUL": b"a\0b", "too long": b"a" * 5000,
    "by the kernel": b"/proc/self/root",
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
async def test_no_link_that_leads_out_is_planted(rw: Guest, place: Place, name: str) -> None:
    answer = await rw.ask(sftp.SYMLINK, s(TARGETS[name]), s(b"/ws/planted"))
    assert answer.code in DENIED
    answer = await rw.ask(sftp.SYMLINK, s(TARGETS[name]), s(b"/ws/sub/planted"))
    assert answer.code in DENIED
    assert not os.path.lexists(place.inside / "planted")
    assert not os.path.lexists(place.inside / "sub" / "planted")


async def test_a_link_cannot_be_moved_to_where_it_leads_out(rw: Guest, place: Place) -> None:
    """Links lead downwards only, so they do wherever they are moved."""
    assert (await rw.ask(sftp.SYMLINK, s(b"deep"), s(b"/ws/sub/link"))).code == sftp.OK
    assert (await rw.ask(sftp.RENAME, s(b"/ws/sub/link"), s(b"/ws/link"))).code == sftp.OK
    assert (place.inside / "link").readlink() == Path("deep")
    assert await rw.read(b"/ws/link") in DENIED


async def test_a_race_of_a_link_against_its_check_is_lost(rw: Guest, place: Place) -> None:
    """While the guest opens a name, it is a file, a directory and a link to the outside in turn."""
    victim, spare, link = (place.inside / name for name in ("swap", "spare", "evil"))
    victim.mkdir()
    (victim / "secret").write_text("harmless")
    link.symlink_to(place.outside)
    stop = False

    def swap() -> None:
        while not stop:
            victim.rename(spare)
            link.rename(victim)
            victim.rename(link)
            spare.rename(victim)

    swapping = asyncio.get_running_loop().run_in_executor(None, swap)
    try:
        seen = set()
        for _ in range(300):
            seen.add(await rw.read(b"/ws/swap/secret"))
            seen.add(await rw.write(b"/ws/swap/secret", b"harmless"))
            await rw.write(b"/ws/swap/new", b"x")
            await rw.ask(sftp.REMOVE, s(b"/ws/swap/new"))
    finally:
        stop = True
        await swapping
    assert SECRET not in seen
    assert b"harmless" in seen
    assert not (place.outside / "new").exists()


async def test_what_opens_doors_is_not_seen(rw: Guest, place: Place) -> None:
    hidden = [b".env", b".ENV", b".ssh", b".netrc", b"server.pem", b"kernel-1234.json", b"private"]
    names = await rw.list(b"/ws")
    assert isinstance(names, set)
    assert b"data.csv" in names
    assert not names & {*hidden}
    for name in (
        *hidden,
        b".ssh/id_rsa",
        b"private/key",
        b".Ssh",
        b".ssh.",
        "．ssh".encode(),
        b".env~",
        b"x.gpg",
        b".netrc.bak",
    ):
        path = b"/ws/" + name
        assert await rw.read(path) in DENIED, name
        assert await rw.list(path) in DENIED, name
        assert (await rw.ask(sftp.LSTAT, s(path))).code in DENIED, name
        for words in ((), (sftp.POSIX_RENAME,), (sftp.HARDLINK,)):
            first = [s(word_) for word_ in words]
            kind = sftp.EXTENDED if words else sftp.RENAME
            assert (await rw.ask(kind, *first, s(path), s(b"/ws/seen"))).code in DENIED, name
    assert not os.path.lexists(place.inside / "seen")


async def test_what_is_hidden_does_not_come_out_under_another_name(rw: Guest) -> None:
    """The directory above it cannot be moved, and no link is followed to it."""
    assert (await rw.ask(sftp.RENAME, s(b"/ws/private"), s(b"/ws/public"))).code in DENIED
    assert (await rw.ask(sftp.SYMLINK, s(b"private"), s(b"/ws/public"))).code == sftp.OK
    assert await rw.read(b"/ws/public/key") in DENIED


async def test_a_directory_that_contains_what_is_hidden_cannot_be_moved(place: Place) -> None:
    """Elsewhere it would be a place that nobody hides: the kernels' state, for one."""
    for holder in ("holder", "holder/within"):
        (place.inside / holder / "runtime").mkdir(parents=True)
        (place.inside / holder / "runtime" / "key").write_bytes(SECRET)
    (place.inside / "empty").mkdir()
    hidden = frozenset({(b"holder", b"runtime"), (b"holder", b"within", b"runtime")})
    async with Guest(Share(str(place.inside), hidden=hidden, writable=True)) as guest:
        for old in (b"/ws/holder", b"/ws/holder/within"):
            for new in (b"/ws/seen", b"/ws/empty"):
                codes = [
                    (await guest.ask(sftp.RENAME, s(old), s(new))).code,
                    (await guest.extended(sftp.POSIX_RENAME, s(old), s(new))).code,
                ]
                assert all(code in DENIED for code in codes), (old, new)
                assert await guest.read(new + b"/runtime/key") in DENIED
                assert await guest.read(new + b"/within/runtime/key") in DENIED
    assert (place.inside / "holder" / "within" / "runtime" / "key").read_bytes() == SECRET


PROTECTED = [
    b".git", b".git/config", b".git/hooks/post-checkout", b".GIT", b".git.", b".git ", b"git~1",
    b".g\xe2\x80\x8cit", b".git::$INDEX_ALLOCATION", b"sub/.git/config", b".vscode", b".envrc",
    b".bashrc", b".ipython", b"__pycache__", b"__PyCache__", b"sub/x.pyc", b"a.pth",
    b"sitecustomize.py", b"usercustomize.py", b"jupyter_server_config.py",
    b"jupyter_lab_config.json", b"ipython_config.py", b"HEAD", b".hg", b".direnv", b".idea",
]  # fmt: skip


async def test_what_the_hosts_programs_obey_is_not_written(rw: Guest, place: Place) -> None:
    for name in PROTECTED:
        path = b"/ws/" + name
        assert await rw.write(path, b"pwned") in DENIED, name
        assert await rw.write(path, b"pwned", sftp.PFLAG_WRITE) in DENIED, name
        assert (await rw.ask(sftp.MKDIR, s(path), attributes(mode=0o755))).code in DENIED, name
        assert (await rw.ask(sftp.SYMLINK, s(b"sub"), s(path))).code in DENIED, name
        for kind in (sftp.REMOVE, sftp.RMDIR):
            assert (await rw.ask(kind, s(path))).code in DENIED, name
        assert (await rw.ask(sftp.SETSTAT, s(path), attributes(size=0))).code in DENIED, name
        for words in ((), (sftp.POSIX_RENAME,), (sftp.HARDLINK,)):
            first, kind = [s(each) for each in words], sftp.EXTENDED if words else sftp.RENAME
            answer = await rw.ask(kind, *first, s(b"/ws/data.csv"), s(path))
            assert answer.code in DENIED, name
            answer = await rw.ask(kind, *first, s(path), s(b"/ws/moved"))
            assert answer.code in DENIED, name
    assert (await rw.ask(sftp.OPENDIR, s(b"/ws/.git"))).kind == sftp.HANDLE  # it may be read
    assert not os.path.lexists(place.inside / "moved")


async def test_what_is_protected_is_not_written_through_its_directory_moved(rw: Guest) -> None:
    assert (await rw.ask(sftp.RENAME, s(b"/ws/sub"), s(b"/ws/sub2"))).code == sftp.OK
    assert await rw.write(b"/ws/sub2/.git/config", b"pwned") in DENIED
    assert (await rw.ask(sftp.RENAME, s(b"/ws/sub2"), s(b"/ws/sub"))).code == sftp.OK


IN_REPOSITORIES = [
    ".git/config", ".git/config.worktree", ".git/config.lock", ".git/config~", "sub/.git/config",
    ".git/modules/deep/er/config", ".git/worktrees/tree/config.worktree", ".git/annex/creds/s3",
    ".git/credentials", "bare.git/config", "git~1/config", ".hg/hgrc", ".svn/auth/simple",
    ".bzr/branch/branch.conf", "bare.git/refs/.git/config",
]  # fmt: skip
READABLE_IN_REPOSITORIES = [
    ".git/HEAD", ".git/refs/heads/config", ".git/logs/refs/heads/config", ".git/index",
    "bare.git/HEAD", ".hg/store/data/config.i", "config", "sub/config", "auth/hgrc",
]  # fmt: skip


async def test_what_a_repository_knows_of_passwords_is_not_seen(rw: Guest, place: Place) -> None:
    for name in IN_REPOSITORIES + READABLE_IN_REPOSITORIES:
        (place.inside / name).parent.mkdir(parents=True, exist_ok=True)
        (place.inside / name).write_bytes(SECRET)
    place.before = look(place.directory)
    for name in IN_REPOSITORIES:
        path = b"/ws/" + name.encode()
        assert await rw.read(path) == sftp.NO_SUCH_FILE, name
        assert (await rw.ask(sftp.LSTAT, s(path))).code == sftp.NO_SUCH_FILE, name
        for words in ((), (sftp.POSIX_RENAME,), (sftp.HARDLINK,)):
            first, kind = [s(each) for each in words], sftp.EXTENDED if words else sftp.RENAME
            assert (await rw.ask(kind, *first, s(path), s(b"/ws/seen"))).code in DENIED, name
    listed = await rw.list(b"/ws/.git")
    assert isinstance(listed, set)
    assert {b"HEAD", b"index", b"refs"} <= listed
    assert not {b"config", b"config~", b"config.lock", b"credentials"} & listed
    for name in READABLE_IN_REPOSITORIES:
        assert await rw.read(b"/ws/" + name.encode()) == SECRET, name
    assert (await rw.ask(sftp.RENAME, s(b"/ws/bare.git"), s(b"/ws/bare"))).code in DENIED


def repository(directory: Path) -> Path:
    """A bare one as git makes it, with no name that tells."""
    for name in ("hooks", "objects/ab", "refs/heads", "worktrees/tree"):
        (directory / name).mkdir(parents=True)
    for name in ("HEAD", "config", "hooks/post-update", "objects/ab/cd", "worktrees/tree/HEAD"):
        (directory / name).write_text(name)
    return directory


@pytest.mark.parametrize("name", ["mirror", "sub/mirror", "mirror.git"])
async def test_nothing_is_written_in_a_repository(rw: Guest, place: Place, name: str) -> None:
    before = look(repository(place.inside / name))
    top = b"/ws/" + name.encode()
    assert await rw.read(top + b"/objects/ab/cd") == b"objects/ab/cd"
    for inner in (
        b"/config", b"/config.worktree", b"/commondir", b"/hooks", b"/hooks/post-update", b"/HEAD",
        b"/hooks/new", b"/objects/ab/cd", b"/refs/heads/new", b"/worktrees/tree/commondir",
    ):  # fmt: skip
        path = top + inner
        assert await rw.write(path, b"pwned") in DENIED, inner
        assert await rw.write(path, b"pwned", sftp.PFLAG_WRITE) in DENIED, inner
        assert (await rw.ask(sftp.MKDIR, s(path), attributes(mode=0o755))).code in DENIED, inner
        assert (await rw.ask(sftp.SYMLINK, s(b"sub"), s(path))).code in DENIED, inner
        for kind in (sftp.REMOVE, sftp.RMDIR):
            assert (await rw.ask(kind, s(path))).code in DENIED, inner
        assert (await rw.ask(sftp.SETSTAT, s(path), attributes(mode=0o777))).code in DENIED, inner
        opened = await rw.open(path, sftp.PFLAG_READ)
        if opened.kind == sftp.HANDLE:
            answer = await rw.ask(sftp.FSETSTAT, s(opened.text), attributes(mode=0o777))
            assert answer.code in DENIED, inner
        for words in ((), (sftp.POSIX_RENAME,), (sftp.HARDLINK,)):
            first, kind = [s(each) for each in words], sftp.EXTENDED if words else sftp.RENAME
            answer = await rw.ask(kind, *first, s(b"/ws/data.csv"), s(path))
            assert answer.code in DENIED, inner
            answer = await rw.ask(kind, *first, s(path), s(b"/ws/moved"))
            assert answer.code in DENIED, inner
    assert look(place.inside / name) == before
    assert not os.path.lexists(place.inside / "moved")
    assert await rw.write(b"/ws/sub/new", b"x") == sftp.OK  # beside it, as always


async def test_a_repository_is_not_written_behind_a_rename_on_its_way(
    rw: Guest, place: Place
) -> None:
    """Nothing waits for an answer: what is asked about is what is there when it is done."""
    repository(place.inside / "sub" / "mirror")
    (place.inside / "other").mkdir()
    answers = await asyncio.gather(
        rw.ask(sftp.RENAME, s(b"/ws/other"), s(b"/ws/aside")),
        rw.ask(sftp.RENAME, s(b"/ws/sub/mirror"), s(b"/ws/other")),
        rw.open(b"/ws/other/config", CREATE | sftp.PFLAG_TRUNCATE),
    )
    assert [answer.code for answer in answers[:2]] == [sftp.OK, sftp.OK]
    assert answers[2].kind == sftp.STATUS
    assert answers[2].code == sftp.PERMISSION_DENIED
    assert (place.inside / "other" / "config").read_text() == "config"


async def test_read_only_is_read_only_for_each_kind_of_request(ro: Guest, place: Place) -> None:
    before = look(place.inside)
    flags = (2, 4, 8, 16, 32)
    for flag in flags:
        assert (await ro.open(b"/ws/data.csv", flag | sftp.PFLAG_READ)).code in DENIED
    assert await ro.write(b"/ws/new", b"x") in DENIED
    path = s(b"/ws/data.csv")
    opened = await ro.open(b"/ws/data.csv", sftp.PFLAG_READ)
    handle = s(opened.text)
    codes = [
        (await ro.ask(sftp.WRITE, handle, struct.pack(">Q", 0), s(b"x"))).code,
        (await ro.ask(sftp.FSETSTAT, handle, attributes(size=0))).code,
        (await ro.ask(sftp.SETSTAT, path, attributes(mode=0o777))).code,
        (await ro.ask(sftp.REMOVE, path)).code,
        (await ro.ask(sftp.RMDIR, s(b"/ws/sub"))).code,
        (await ro.ask(sftp.MKDIR, s(b"/ws/new"), attributes(mode=0o755))).code,
        (await ro.ask(sftp.RENAME, path, s(b"/ws/new"))).code,
        (await ro.ask(sftp.SYMLINK, s(b"data.csv"), s(b"/ws/new"))).code,
        (await ro.extended(sftp.POSIX_RENAME, path, s(b"/ws/new"))).code,
        (await ro.extended(sftp.HARDLINK, path, s(b"/ws/new"))).code,
        (await ro.extended(sftp.LSETSTAT, path, attributes(mode=0o777))).code,
    ]
    assert all(code in DENIED for code in codes), codes
    assert look(place.inside) == before


async def test_the_server_itself_writes_nothing_when_it_is_read_only(place: Place) -> None:
    """The gate is one layer; what is behind it refuses the same, and sees nothing else."""
    process = workspace_server.ServerProcess(str(place.inside), writable=False)
    reader, writer = await asyncio.open_connection(sock=process.sock)
    number = 0

    async def ask(kind: int, *parts: bytes) -> bytes:
        nonlocal number
        number += 1
        writer.write(sftp.packet(kind, number, *parts))
        (size,) = struct.unpack(">I", await reader.readexactly(4))
        return await reader.readexactly(size)

    try:
        writer.write(struct.pack(">IBI", 5, sftp.INIT, 3))
        (size,) = struct.unpack(">I", await reader.readexactly(4))
        assert (await reader.readexactly(size))[0] == sftp.VERSION_REPLY
        plain = attributes()
        for path in (b"/ws/new", b"/new", b"/etc/passwd", b"/dev/null", b"/tmp/x"):
            answer = await ask(sftp.OPEN, s(path), word(CREATE), plain)
            assert answer[0] == sftp.STATUS, path
        outside = (b"/etc/shadow", b"/proc/self/environ", b"/root", bytes(place.outside / "secret"))
        for path in (b"/ws/absolute", b"/ws/way out/secret", b"/ws/to git/config", *outside):
            answer = await ask(sftp.OPEN, s(path), word(sftp.PFLAG_READ), plain)
            assert answer[0] == sftp.STATUS, path
        answer = await ask(sftp.OPENDIR, s(b"/"))
        handle = answer[9:]
        names = await ask(sftp.READDIR, s(handle))
        assert b"home" not in names
        assert b"work" not in names
    finally:
        writer.close()
        process.kill()
        await gone(process)


async def test_the_servers_own_root_cannot_be_filled(place: Place) -> None:
    """A writable tmpfs in there would be the host's memory."""
    process = workspace_server.ServerProcess(str(place.inside), writable=True)
    reader, writer = await asyncio.open_connection(sock=process.sock)
    try:
        writer.write(struct.pack(">IBI", 5, sftp.INIT, 3))
        (size,) = struct.unpack(">I", await reader.readexactly(4))
        await reader.readexactly(size)
        for number, path in enumerate((b"/fill", b"/etc/fill", b"/dev/fill", b"/usr/fill",
                                       b"/dev/shm/fill", b"/tmp/fill", b"/lib/fill")):  # fmt: skip
            writer.write(sftp.packet(sftp.OPEN, number, s(path), word(CREATE), attributes()))
            (size,) = struct.unpack(">I", await reader.readexactly(4))
            answer = await reader.readexactly(size)
            assert answer[0] == sftp.STATUS, path
        inside = psutil.Process(process.pid).children(recursive=True)[-1]
        assert inside.name() == "sftp-server"
        status = Path(f"/proc/{inside.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert "CapBnd:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        assert "VMKERNEL" not in Path(f"/proc/{inside.pid}/environ").read_text()
    finally:
        writer.close()
        process.kill()
        await gone(process)


async def gone(process: workspace_server.ServerProcess) -> None:
    async with asyncio.timeout(10):
        while not process.reap():
            await asyncio.sleep(0.01)


async def test_no_special_bits_and_no_other_owner(rw: Guest, place: Place) -> None:
    assert await rw.write(b"/ws/mine", b"#!/bin/sh") == sftp.OK
    for bit in (stat.S_ISUID, stat.S_ISGID, stat.S_ISVTX):
        mode = attributes(mode=0o755 | bit)
        assert (await rw.ask(sftp.SETSTAT, s(b"/ws/mine"), mode)).code in DENIED
        assert (await rw.ask(sftp.MKDIR, s(b"/ws/d"), mode)).code in DENIED
        opened = await rw.open(b"/ws/other", CREATE, 0o755 | bit)
        assert opened.code in DENIED
        opened = await rw.open(b"/ws/mine", sftp.PFLAG_WRITE)
        assert (await rw.ask(sftp.FSETSTAT, s(opened.text), mode)).code in DENIED
    assert (await rw.ask(sftp.SETSTAT, s(b"/ws/mine"), attributes(uid=65534))).code in DENIED
    assert (place.inside / "mine").stat().st_mode & 0o7777 == 0o644
    assert (place.inside / "mine").stat().st_uid == os.getuid()


async def test_nothing_but_files_is_opened(rw: Guest) -> None:
    """A FIFO would keep the server waiting for ever."""
    for name in (b"fifo", b"socket", b"sub", b"etc"):
        for flags in (sftp.PFLAG_READ, sftp.PFLAG_WRITE, sftp.PFLAG_READ | sftp.PFLAG_WRITE):
            assert (await rw.open(b"/ws/" + name, flags)).code in DENIED
    assert await rw.read(b"/ws/data.csv") == b"a,b\n"
    assert rw.gate.statistics.replaced == 0


async def test_the_quota_on_bytes(rw: Guest, place: Place) -> None:
    opened = await rw.open(b"/ws/big", CREATE, 0o644)
    answers = [
        await rw.ask(sftp.WRITE, s(opened.text), struct.pack(">Q", at), s(bytes(100_000)))
        for at in range(0, 2_000_000, 100_000)
    ]
    assert [answer.code for answer in answers] == [sftp.OK] * 10 + [sftp.BROKEN] * 10
    assert (place.inside / "big").stat().st_size == 1_000_000
    for size in (2 << 20, 1 << 50, (1 << 64) - 1):
        assert (await rw.ask(sftp.FSETSTAT, s(opened.text), attributes(size=size))).code in DENIED
    for end in ((1 << 20) + 1, 1 << 40, 1 << 62):
        far = await rw.ask(sftp.WRITE, s(opened.text), struct.pack(">Q", end), s(b"x"))
        assert far.code in DENIED
    assert (place.inside / "big").stat().st_size == 1_000_000
    assert any("workspace_size" in line for line in rw.told)


async def test_the_quota_on_files(rw: Guest, place: Place) -> None:
    before = len(list(place.inside.iterdir()))
    codes = []
    for number in range(30):
        path = b"/ws/f%d" % number
        if number % 3 == 0:
            codes.append(await rw.write(path, b""))
        elif number % 3 == 1:
            codes.append((await rw.ask(sftp.MKDIR, s(path), attributes(mode=0o755))).code)
        else:
            codes.append((await rw.ask(sftp.SYMLINK, s(b"sub"), s(path))).code)
    assert codes == [sftp.OK] * 20 + [sftp.BROKEN] * 10
    assert (await rw.extended(sftp.HARDLINK, s(b"/ws/f0"), s(b"/ws/f99"))).code == sftp.BROKEN
    assert len(list(place.inside.iterdir())) == before + 20
    assert (await rw.ask(sftp.REMOVE, s(b"/ws/f0"))).code == sftp.OK  # room for one
    assert await rw.write(b"/ws/again", b"") == sftp.OK
    assert await rw.write(b"/ws/more", b"") == sftp.BROKEN


EXTENSIONS = [
    b"expand-path@openssh.com", b"copy-data", b"home-directory", b"users-groups-by-id@openssh.com",
    b"limits@openssh.com", b"lsetstat@openssh.com", b"space-available", b"check-file", b"",
    b"vendor-id", b"\xff" * 100,
]  # fmt: skip


async def test_no_other_extension_is_served(rw: Guest) -> None:
    for name in EXTENSIONS:
        for words in ((), (b"~root",), (b"/ws/data.csv", b"/ws/x"), (b"/etc/passwd",)):
            answer = await rw.extended(name, *[s(each) for each in words])
            assert answer.code == sftp.UNSUPPORTED, name
    for kind in (0, 2, 21, 42, 101, 102, 104, 199, 201, 255):
        assert (await rw.ask(kind, s(b"/ws/data.csv"))).code == sftp.UNSUPPORTED, kind


async def test_handles_that_were_not_given_open_nothing(rw: Guest) -> None:
    opened = await rw.open(b"/ws/data.csv", sftp.PFLAG_READ)
    directory = await rw.ask(sftp.OPENDIR, s(b"/ws"))
    generation, key = struct.unpack(">II", opened.text)
    guesses = [
        b"", b"\0" * 4, b"\0" * 8, b"\xff" * 8, b"0", opened.text + b"\0", b"x" * 256,
        struct.pack(">II", generation + 1, key), struct.pack(">II", generation, key + 9),
        *(struct.pack(">I", number) for number in range(4)),  # as OpenSSH's own are
    ]  # fmt: skip
    for guess in guesses:
        for kind, more in (
            (sftp.READ, struct.pack(">QI", 0, 100)), (sftp.CLOSE, b""), (sftp.FSTAT, b""),
            (sftp.READDIR, b""), (sftp.WRITE, struct.pack(">Q", 0) + s(b"x")),
            (sftp.FSETSTAT, attributes(mode=0o777)),
        ):  # fmt: skip
            assert (await rw.ask(kind, s(guess), more)).code in DENIED
    # One of another kind, and one that is closed
    assert (await rw.ask(sftp.READDIR, s(opened.text))).code in DENIED
    size = struct.pack(">QI", 0, 100)
    assert (await rw.ask(sftp.READ, s(directory.text), size)).code in DENIED
    assert (await rw.ask(sftp.WRITE, s(opened.text), struct.pack(">Q", 0), s(b"x"))).code in DENIED
    assert (await rw.ask(sftp.CLOSE, s(opened.text))).code == sftp.OK
    assert (await rw.ask(sftp.READ, s(opened.text), size)).code in DENIED


READ = struct.pack(">QI", 0, 100)


async def kill_server(guest: Guest) -> None:
    """And wait until the gate knows."""
    pid = guest.gate.server_pid
    os.kill(pid, signal.SIGKILL)
    while guest.gate.server_pid == pid:
        await asyncio.sleep(0.01)


async def test_what_is_read_is_read_on_at_the_next_server(rw: Guest, place: Place) -> None:
    """To sshfs an error would be the end of the file: half of it would pass for the whole."""
    opened = await rw.open(b"/ws/data.csv", sftp.PFLAG_READ)
    await kill_server(rw)
    answers = await asyncio.gather(*(rw.ask(sftp.READ, s(opened.text), READ) for _ in range(9)))
    assert {answer.text for answer in answers} == {b"a,b\n"}
    assert rw.gate.statistics.servers == 2
    assert (await rw.ask(sftp.CLOSE, s(opened.text))).code == sftp.OK
    assert (await rw.ask(sftp.READ, s(opened.text), READ)).code == sftp.BROKEN
    assert not rw.told


async def test_a_file_that_is_another_by_then_is_not_read_on(rw: Guest, place: Place) -> None:
    """Neither is one that was open for writing; and the cell is told."""
    opened = await rw.open(b"/ws/data.csv", sftp.PFLAG_READ)
    written = await rw.open(b"/ws/own", sftp.PFLAG_READ | sftp.PFLAG_WRITE | sftp.PFLAG_CREATE)
    await kill_server(rw)
    (place.inside / "data.csv").write_text("something else\n")
    answers = await asyncio.gather(*(rw.ask(sftp.READ, s(opened.text), READ) for _ in range(9)))
    assert {answer.code for answer in answers} == {sftp.BROKEN}
    assert any("'data.csv'" in line for line in rw.told)
    assert (await rw.ask(sftp.READ, s(written.text), READ)).code == sftp.BROKEN
    assert any("'own'" in line for line in rw.told)
    place_and_data = struct.pack(">Q", 0) + s(b"x")
    assert (await rw.ask(sftp.WRITE, s(written.text), place_and_data)).code in DENIED
    assert await rw.read(b"/ws/data.csv") == b"something else\n"  # another handle
    assert (await rw.ask(sftp.READ, s(opened.text), READ)).code == sftp.BROKEN


async def test_servers_that_die_one_after_another_leave_nobody_waiting(rw: Guest) -> None:
    opened = await rw.open(b"/ws/data.csv", sftp.PFLAG_READ)
    for _ in range(7):
        asking = [asyncio.create_task(rw.ask(sftp.READ, s(opened.text), READ)) for _ in range(5)]
        await asyncio.sleep(0)
        if pid := rw.gate.server_pid:
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*asking)
        assert {answer.code for answer in answers} <= {-1, sftp.BROKEN}


async def test_a_server_that_hangs_is_replaced(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace_gate, "PATIENCE", 0.5)
    async with Guest(share(place)) as guest:
        assert await guest.read(b"/ws/data.csv") == b"a,b\n"
        (server,) = (
            process
            for process in psutil.Process(guest.gate.server_pid).children(recursive=True)
            if process.name() == "sftp-server"
        )
        server.suspend()
        assert await guest.read(b"/ws/data.csv") == sftp.BROKEN  # it was to be opened
        assert not psutil.wait_procs([server], 10)[1]
        assert await guest.read(b"/ws/data.csv") == b"a,b\n"


async def test_another_directory_in_its_place_is_not_the_workspace(tmp_path: Path) -> None:
    """Neither of its name, nor of the one by which Linux calls what was removed."""
    workspace = tmp_path / "ws"
    workspace.mkdir()
    async with Guest(Share(str(workspace))) as guest:
        workspace.rmdir()
        for name in ("ws", "ws (deleted)"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "secret").write_bytes(SECRET)
        assert await guest.read(b"/ws/secret") in DENIED
        assert await guest.list(b"/ws") in DENIED
        assert "gone" in guest.gate.problem


async def test_a_directory_that_is_renamed_stays_the_same(place: Place) -> None:
    """And what is put in its place is not shared, also not by a server that comes later."""
    async with Guest(share(place)) as guest:
        assert await guest.read(b"/ws/data.csv") == b"a,b\n"
        moved = place.directory / "moved"
        place.inside.rename(moved)
        place.inside.mkdir()
        (place.inside / "data.csv").write_text("another")
        try:
            assert await guest.read(b"/ws/data.csv") == b"a,b\n"
            os.kill(guest.gate.server_pid, signal.SIGKILL)
            async with asyncio.timeout(10):
                while guest.gate.statistics.servers < 2:  # the first may answer before it dies
                    assert await guest.read(b"/ws/data.csv") != b"another"
                    await asyncio.sleep(0.01)
                while await guest.read(b"/ws/data.csv") != b"a,b\n":
                    await asyncio.sleep(0.01)
        finally:
            (place.inside / "data.csv").unlink()
            place.inside.rmdir()
            moved.rename(place.inside)


MALFORMED = {
    "nothing": b"",
    "a string that is longer than the packet": word(1000) + b"/ws",
    "a length of four gigabytes": word(0xFFFFFFFF),
    "something behind it": s(b"/ws/data.csv") + b"more",
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_packets_are_refused_one_by_one(rw: Guest, name: str) -> None:
    for kind in sorted(workspace_requests._REQUESTS):
        answer = await rw.ask(kind, MALFORMED[name])
        assert answer.code in (*DENIED, sftp.BAD_MESSAGE) or (
            kind == sftp.REALPATH and answer.kind == sftp.NAME
        ), kind
    flags = word(sftp.PFLAG_READ)
    for bad in (word(0xFFFFFFFF), word(1 << 31) + word(99), word(1)):
        answer = await rw.ask(sftp.OPEN, s(b"/ws/data.csv"), flags, bad)
        assert answer.code == sftp.BAD_MESSAGE
    for bad_flags in (0, 64, 0xFFFFFFFF, sftp.PFLAG_TRUNCATE):
        assert (await rw.open(b"/ws/data.csv", bad_flags)).code == sftp.BAD_MESSAGE
    assert await rw.read(b"/ws/data.csv") == b"a,b\n"


@pytest.mark.parametrize("size", [0, 4, (256 << 10) + 1, 0x7FFFFFFF, 0xFFFFFFFF])
async def test_a_stream_that_is_none_ends_the_workspace_and_its_server(
    rw: Guest, size: int
) -> None:
    assert await rw.read(b"/ws/data.csv") == b"a,b\n"
    rw.writer.write(word(size) + b"x" * 64)
    with pytest.raises(ConnectionResetError):
        await rw.ask(sftp.LSTAT, s(b"/ws"))
    assert rw.gate.server_pid == 0


async def test_a_guest_that_begins_anew_is_cut_off(rw: Guest) -> None:
    """A server for each INIT would keep its owner busy for ever."""
    assert await rw.read(b"/ws/data.csv") == b"a,b\n"
    for _ in range(1000):
        rw.writer.write(struct.pack(">IBI", 5, sftp.INIT, 3))
        last = rw.send(sftp.LSTAT, s(b"/ws/data.csv"))
    with pytest.raises(ConnectionResetError):
        async with asyncio.timeout(10):
            await last
    assert rw.gate.statistics.servers == 1
    assert rw.gate.server_pid == 0


async def test_servers_are_not_started_without_end(rw: Guest) -> None:
    for _ in range(2 * workspace_gate.MOST_STARTS):
        await rw.ask(sftp.LSTAT, s(b"/ws/data.csv"))
        if pid := rw.gate.server_pid:
            os.kill(pid, signal.SIGKILL)
            while rw.gate.server_pid == pid:
                await asyncio.sleep(0.01)
    assert rw.gate.statistics.servers <= workspace_gate.MOST_STARTS


async def test_a_flood_is_slowed_and_remembered_by_nobody(rw: Guest) -> None:
    """Ten thousand requests that nobody reads the answers of: few are with the server at once."""
    most = 0
    futures = []
    opened = await rw.open(b"/ws/data.csv", sftp.PFLAG_READ)
    for number in range(10_000):
        futures.append(rw.send(sftp.READ, s(opened.text), struct.pack(">QI", 0, 1 << 31)))
        if number % 100 == 0:
            await asyncio.sleep(0)
            most = max(most, len(rw.gate._pending))
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*futures)
    assert {answer.text for answer in answers} == {b"a,b\n"}
    assert most <= workspace_gate.MOST_PENDING


async def test_open_files_are_bounded(rw: Guest) -> None:
    codes = [
        (await rw.open(b"/ws/data.csv", sftp.PFLAG_READ)).kind
        for _ in range(workspace_gate.MOST_HANDLES + 20)
    ]
    assert codes.count(sftp.HANDLE) == workspace_gate.MOST_HANDLES
    assert codes[-1] == sftp.STATUS


async def test_names_of_all_sorts_are_just_names(rw: Guest, place: Place) -> None:
    names = [b"new\nline", b"tab\t", "Grüße 😀".encode(), b"\xff\xfe", b"-rf", b"*", b"a\\b"]
    names += [b"$(id)", b"a" * 255]
    for name in names:
        assert await rw.write(b"/ws/" + name, name) == sftp.OK, name
        assert await rw.read(b"/ws/" + name) == name
    listed = await rw.list(b"/ws")
    assert isinstance(listed, set)
    assert {*names} <= listed
    assert {*names} <= {*os.listdir(os.fsencode(place.inside))}


async def test_nothing_is_told_of_whose_files_they_are(rw: Guest) -> None:
    opened = await rw.ask(sftp.OPENDIR, s(b"/ws"))
    listing = await rw.ask(sftp.READDIR, s(opened.text))
    packet = sftp.Packet(memoryview(b"\0" + listing.body))
    for _ in range(packet.number()):
        packet.string()
        assert bytes(packet.string()) == b""
        assert packet.attributes().ids == (0, 0)


async def test_nothing_is_left_when_the_gate_is_closed(place: Place) -> None:
    async with Guest(share(place)) as guest:
        assert await guest.read(b"/ws/data.csv") == b"a,b\n"
        processes = psutil.Process(guest.gate.server_pid).children(recursive=True)
        assert any(process.name() == "sftp-server" for process in processes)
    _, alive = psutil.wait_procs(processes, 10)
    assert not alive


DIRECTORIES = ["/", "/etc", "/usr/lib", "/proc/self", "/dev/shm", "/home", "/tmp", "/var/tmp",
               "/home/user", "/no/such/directory", "/sys", "/boot", "/run"]  # fmt: skip


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_directories_that_are_never_shared(directory: str) -> None:
    settings = load_settings(environ={**os.environ, "VMKERNEL_WORKSPACE": "rw"})
    chosen = choose(settings, directory)
    assert chosen.share is None
    assert chosen.problem
    assert chosen.hint


def test_the_home_directory_is_shared_without_what_is_hidden_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "me" / "work" / "runtime"))
    (tmp_path / "me" / "work" / "runtime").mkdir(parents=True)
    settings = load_settings(environ={**os.environ, "VMKERNEL_WORKSPACE": "ro"})
    assert choose(settings, str(tmp_path)).problem.endswith("contains home directories")
    home = choose(settings, str(tmp_path / "me")).share
    assert home is not None
    assert home.dots_hidden
    assert (b"work", b"runtime") in home.hidden
    work = choose(settings, str(tmp_path / "me" / "work")).share
    assert work is not None
    assert (b"runtime",) in work.hidden
    assert not work.dots_hidden
    assert "Jupyter" in choose(settings, str(tmp_path / "me" / "work" / "runtime")).problem
