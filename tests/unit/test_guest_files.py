"""The guest's clerk for files: it never makes the agent wait, and opens files and nothing else."""

from __future__ import annotations

import base64
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vmkernel.guest import files
from vmkernel.guest.files import Files, Lister
from vmkernel.protocol import messages

Answer = tuple[int, dict[str, Any], bytes]


class Agent:
    """What the agent does with `Files`: give it commands, and watch its descriptor."""

    def __init__(self, become_user: Callable[[], None]) -> None:
        self.answers: list[Answer] = []
        self._others = {child.pid for child in psutil.Process().children()}
        self.files = Files(become_user, self._reply)
        self._number = 0

    def _reply(self, number: int, result: dict[str, Any], data: memoryview) -> None:
        self.answers.append((number, result, bytes(data)))

    def submit(self, command: messages.FileCommand, data: bytes = b"") -> int:
        self._number += 1
        body = messages.encode_json(messages.Call(self._number, command))
        self.files.submit(self._number, body, data)
        return self._number

    def turn(self, seconds: float = 10) -> None:
        """One turn of the agent's loop."""
        left = self.files.time_left()
        assert left is not None
        ready, _, _ = select.select([self.files.fd], [], [], min(seconds, left / 1000))
        if ready:
            self.files.receive()
        self.files.check()

    def do(self, command: messages.FileCommand, data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        number = self.submit(command, data)
        while not self.answers or self.answers[-1][0] != number:
            self.turn()
        return self.answers[-1][1:]

    @property
    def clerk(self) -> psutil.Process:
        (clerk,) = self.clerks()
        return clerk

    def clerks(self) -> list[psutil.Process]:
        """The children of this process that came with the agent: a test run has others."""
        return [child for child in psutil.Process().children() if child.pid not in self._others]


@pytest.fixture
def agent() -> Iterator[Agent]:
    """An agent whose user it is already."""
    agent = Agent(lambda: None)
    yield agent
    agent.files._dismiss(0)
    for clerk in agent.clerks():
        os.waitpid(clerk.pid, 0)


def read(path: Path | bytes, offset: int = 0, size: int = 1000) -> messages.ReadFile:
    return messages.ReadFile(os.fsencode(path), offset, size)


def write(
    path: Path, offset: int = 0, mode: int = 0o644, *, cut: bool = True
) -> messages.WriteFile:
    return messages.WriteFile(os.fsencode(path), offset, mode, cut)


def test_what_is_written_is_read_again(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert agent.do(write(path, mode=0o4755), b"12345") == ({}, b"")
    assert path.stat().st_mode & 0o7777 == 0o755
    assert agent.do(write(path, 5, cut=False), b"678") == ({}, b"")
    assert agent.do(read(path, 1, 3)) == ({"size": 8}, b"234")
    assert agent.do(read(path, 8)) == ({"size": 8}, b"")
    assert agent.do(write(path, 2), b"x") == ({}, b"")
    assert path.read_bytes() == b"12x"


def test_a_whole_chunk_fits(agent: Agent, tmp_path: Path) -> None:
    data = os.urandom(messages.MAX_CHUNK)
    assert agent.do(write(tmp_path / "a"), data) == ({}, b"")
    assert agent.do(read(tmp_path / "a", 0, len(data))) == ({"size": len(data)}, data)
    assert agent.do(write(tmp_path / "a"), data + b"1") == ({"errno": errno.EMSGSIZE}, b"")


def test_commands_are_answered_in_order(agent: Agent, tmp_path: Path) -> None:
    for number in range(20):
        agent.submit(write(tmp_path / "a", number, cut=False), b"%d" % (number % 10))
    while len(agent.answers) < 20:
        agent.turn()
    assert [number for number, _, _ in agent.answers] == list(range(1, 21))
    assert (tmp_path / "a").read_bytes() == b"01234567890123456789"
    assert agent.files.time_left() is None


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "link to a device"])
def test_what_is_no_file_is_not_opened(agent: Agent, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    server = socket.socket(socket.AF_UNIX)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        server.bind(str(path))
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    with server:
        for command in (read(path), write(path)):
            assert agent.do(command) == ({"errno": errno.ENOTSUP}, b"")


def test_a_fifos_other_end_is_not_woken(agent: Agent, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    pid = os.fork()
    if pid == 0:
        os.open(tmp_path / "a", os.O_WRONLY)  # waits for a reader
        os._exit(0)
    time.sleep(0.05)
    agent.do(read(tmp_path / "a"))
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_errors_are_the_systems(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "file").touch()
    for command, number in (
        (read(tmp_path), errno.EISDIR),
        (write(tmp_path), errno.EISDIR),
        (read(tmp_path / "no"), errno.ENOENT),
        (write(tmp_path / "no" / "a"), errno.ENOENT),
        (write(tmp_path / "nowhere"), errno.ENOENT),
        (read(tmp_path / "loop"), errno.ELOOP),
        (read(tmp_path / "file" / "a"), errno.ENOTDIR),
        (read(b"a\0b"), errno.EINVAL),
        (read(b"x" * 300), errno.ENAMETOOLONG),
        (write(Path("/dev/full")), errno.ENOTSUP),
        (messages.ListFiles(os.fsencode(tmp_path / "no"), 0), errno.ENOENT),
        (messages.MakeDirectory(os.fsencode(tmp_path / "file"), 0o755), errno.EEXIST),
        (read(Path("/proc/self/mem")), errno.EIO),  # it can be opened, and not be read
    ):
        assert agent.do(command) == ({"errno": number}, b""), command


def test_files_without_a_size_are_read(agent: Agent) -> None:
    result, data = agent.do(read(Path("/proc/self/status")))
    assert result == {"size": 0}
    assert data.startswith(b"Name:")


def test_directories_are_made_and_found(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "a"
    for _ in range(2):
        assert agent.do(messages.MakeDirectory(os.fsencode(path), 0o7700)) == ({}, b"")
    assert path.stat().st_mode & 0o7777 == 0o700


def test_a_directory_is_listed_in_pages(agent: Agent, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "dir").mkdir()
    long = b"\xff" * 255
    for number in range(600):
        (tmp_path / f"{number}").write_bytes(b"1" * number)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + long)).touch()
    entries: list[Any] = []
    more = True
    while more:
        result, _ = agent.do(messages.ListFiles(os.fsencode(tmp_path), len(entries)))
        assert result["kind"] == "directory"
        assert len(result["entries"]) <= messages.MAX_ENTRIES
        entries += result["entries"]
        more = result["more"]
    found = {base64.b64decode(entry[0]): entry[1:3] for entry in entries}
    assert len(found) == len(entries) == 604
    assert found[b"17"] == ["file", 17]
    assert found[b"pipe"][0] == "other"
    assert found[b"link"][0] == "link"
    assert found[b"dir"][0] == "directory"
    assert found[long] == ["file", 0]


def test_a_page_of_the_longest_names_goes_through(agent: Agent, tmp_path: Path) -> None:
    for number in range(messages.MAX_ENTRIES):
        (tmp_path / f"{number:0255}").touch()
    result, _ = agent.do(messages.ListFiles(os.fsencode(tmp_path), 0))
    assert len(result["entries"]) == messages.MAX_ENTRIES


def test_a_page_can_be_asked_for_again(tmp_path: Path) -> None:
    for number in range(messages.MAX_ENTRIES * 2):
        (tmp_path / f"{number}").touch()
    lister, path = Lister(), os.fsencode(tmp_path)
    first = lister.page(path, 0)
    second = lister.page(path, messages.MAX_ENTRIES)
    assert lister.page(path, 0) == first
    assert lister.page(path, messages.MAX_ENTRIES) == second
    assert lister.page(path, messages.MAX_ENTRIES * 2)["entries"] == []


# --- the clerk is the user's to kill, to stop and to be lied to by -------------------------


def test_a_clerk_that_was_killed_is_replaced(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    for _ in range(3):
        assert agent.do(read(tmp_path / "a"))[1] == b"1"
        clerk = agent.clerk
        clerk.kill()
        clerk.wait()
    assert agent.do(read(tmp_path / "a"))[1] == b"1"


def test_the_death_of_an_idle_clerk_is_noticed(agent: Agent, tmp_path: Path) -> None:
    agent.do(read(tmp_path))
    agent.clerk.kill()
    select.select([agent.files.fd], [], [], 10)
    agent.files.receive()
    assert agent.files.fd == -1


def test_what_one_that_is_killed_was_at_is_done_by_its_successor(
    agent: Agent, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"1")
    agent.do(read(tmp_path))
    agent.clerk.suspend()
    last = [agent.submit(read(tmp_path / "a")), agent.submit(read(tmp_path / "a"))][-1]
    agent.clerk.kill()
    while len(agent.answers) < last:
        agent.turn()
    assert agent.answers[1:] == [(number, {"size": 1}, b"1") for number in (last - 1, last)]


def test_one_that_was_stopped_is_given_up_in_time(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"1")
    agent.do(read(tmp_path))
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    agent.clerk.suspend()
    began = time.monotonic()
    assert agent.do(write(tmp_path / "b"), b"1" * messages.MAX_CHUNK) == (
        {"errno": errno.ETIMEDOUT},
        b"",
    )
    assert 0.2 <= time.monotonic() - began < 2
    assert agent.do(read(tmp_path / "a"))[1] == b"1"


def test_one_that_cannot_become_the_user_does_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        raise PermissionError

    agent = Agent(fail)
    assert agent.do(write(tmp_path / "a")) == ({"errno": errno.EIO}, b"")
    assert not (tmp_path / "a").exists()
    clerks = agent.clerks()
    assert len(clerks) <= 2  # its successor was no better
    for clerk in clerks:
        os.waitpid(clerk.pid, 0)


@pytest.mark.parametrize(
    "lie", [b"", b"\0", b"\0\0\0\0", b"\xff\xff\xff\xff{}", b"\0\0\0\0[]", b"\0\0\0\0{\xff}"]
)
def test_what_is_no_answer_ends_the_clerk(agent: Agent, tmp_path: Path, lie: bytes) -> None:
    agent.do(read(tmp_path))
    agent.clerk.suspend()
    number = agent.submit(read(tmp_path))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    assert agent.files._socket is not None
    agent.files._socket.close()
    agent.files._socket, agent.files.fd = ours, ours.fileno()
    theirs.send(lie)
    while len(agent.answers) < number:
        agent.turn()
    assert agent.answers[-1] == (number, {"errno": errno.EISDIR}, b"")  # its successor's
    theirs.close()


def test_an_answer_to_nothing_ends_the_clerk(agent: Agent, tmp_path: Path) -> None:
    agent.do(read(tmp_path))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    assert agent.files._socket is not None
    agent.files._socket.close()
    agent.files._socket, agent.files.fd = ours, ours.fileno()
    theirs.send(b"\0\0\0\0{}")
    agent.files.receive()
    assert len(agent.answers) == 1
    assert agent.files.fd == -1
    theirs.close()


def test_a_clerk_has_its_socket_and_nothing_else(agent: Agent, tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w"):
        agent.do(read(tmp_path))
        fds = Path(f"/proc/{agent.clerk.pid}/fd")
        found = {entry.name: os.readlink(entry) for entry in fds.iterdir()}
    assert found.pop("3").startswith("socket:")
    assert found == dict.fromkeys("012", "/dev/null")
