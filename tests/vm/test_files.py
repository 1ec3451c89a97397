"""Files into a real VM and out of it, with the rights of its user and nobody else's."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from vmhost import RunningVm, VmHost
from vmkernel.errors import VmFileError, VmGuestError
from vmkernel.host.files import get_tree, put_tree, read_file
from vmkernel.host.guestfiles import Call

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

LARGE = 100 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(session_dir: Path, minimal_image: str) -> AsyncGenerator[RunningVm, None]:
    """A VM for the whole module."""
    host = VmHost(session_dir)
    async with RunningVm(host.settings()) as vm:
        yield vm
    assert host.left() == []


@pytest.fixture
def call(vm: RunningVm) -> Call:
    """The way to its agent."""
    return vm.guest.vm.agent.exchange


def content(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


async def test_a_file_is_put_seen_by_a_cell_and_got(
    vm: RunningVm, call: Call, tmp_path: Path
) -> None:
    await put_tree(call, b"from the host\n", "in.txt")
    seen = await vm.run(
        "import os, pathlib; print(repr(pathlib.Path.home().joinpath('in.txt').read_text()))\n"
        "found = os.stat('in.txt'); print(found.st_uid == os.getuid(), oct(found.st_mode))\n"
        "_ = pathlib.Path('out.txt').write_text('from the guest\\n')"
    )
    assert seen == "'from the host\\n'\nTrue 0o100644\n"
    assert (await get_tree(call, "/home/user/out.txt", tmp_path / "out")).bytes == 15
    assert (tmp_path / "out").read_text() == "from the guest\n"
    assert await read_file(call, "out.txt") == b"from the guest\n"


async def test_a_large_file_and_an_empty_one(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(LARGE))
    memory = psutil.Process().memory_info().rss
    speeds = []
    for transfer in (put_tree(call, source, "large"), get_tree(call, "large", tmp_path / "back")):
        began = time.monotonic()
        assert (await transfer).bytes == LARGE
        speeds.append(LARGE / 1e6 / (time.monotonic() - began))
    assert psutil.Process().memory_info().rss - memory < 30 << 20
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    await put_tree(call, b"", "large")
    await get_tree(call, "large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b""
    with capsys.disabled():
        print(f"\n100 MB into a guest: {speeds[0]:.0f} MB/s, out of it: {speeds[1]:.0f} MB/s")


async def test_a_tree_comes_back_as_it_went(call: Call, tmp_path: Path) -> None:
    source = tmp_path / "source"
    deep = source.joinpath(*"abcdefghijklmnopqrstuvwxyz")
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(b"1")
    (source / "ö ü\n😀").write_bytes(b"2")
    Path(os.fsdecode(os.fsencode(source) + b"/\xff\xfe")).write_bytes(b"3")
    (source / "run").write_bytes(b"#!/bin/sh\n")
    (source / "run").chmod(0o755)
    (source / "empty").mkdir()
    many = source / "many"
    many.mkdir()
    for number in range(300):
        (many / f"{number}").write_bytes(b"%d" % number)
    there = await put_tree(call, source, "tree")
    back = await get_tree(call, "tree", tmp_path / "back")
    assert content(tmp_path / "back") == content(source)
    assert (tmp_path / "back" / "run").stat().st_mode & 0o777 == 0o755
    assert there == back
    assert back.files == 304


async def test_what_is_no_file_stays_in_the_guest(
    vm: RunningVm, call: Call, tmp_path: Path
) -> None:
    await vm.run(
        "import os; os.mkdir('odd'); os.mkfifo('odd/pipe'); os.symlink('/etc', 'odd/link')\n"
        "os.symlink('/etc/passwd', 'odd/file'); os.symlink('odd/a', 'b')\n"
        "open('odd/a', 'w').close()"
    )
    async with asyncio.timeout(5):
        done = await get_tree(call, "odd", tmp_path / "odd")
        assert content(tmp_path / "odd") == {"a": b""}
        assert sorted(done.skipped) == ["odd/file", "odd/link", "odd/pipe"]
        for path in ("odd/pipe", "/dev/zero", "/dev/vda", "/dev/random"):
            with pytest.raises(VmFileError, match="neither a file nor a directory"):
                await get_tree(call, path, tmp_path / "x")
            with pytest.raises(VmFileError, match="neither a file nor a directory"):
                await put_tree(call, b"1", path)
        assert (await get_tree(call, "b", tmp_path / "b")).bytes == 0  # named: followed
        assert (await read_file(call, "/proc/version")).startswith(b"Linux")


async def test_the_users_rights_are_all_there_is(vm: RunningVm, call: Call, tmp_path: Path) -> None:
    """Also by way of links that lead to what only root may read or write."""
    await vm.run("import os; os.symlink('/etc/shadow', 's'); os.symlink('/etc', 'e')")
    for path in ("/etc/shadow", "s", "/proc/1/environ", "/proc/1/mem", "/root", "/proc/kmsg"):
        with pytest.raises(VmFileError, match="may not"):
            await get_tree(call, path, tmp_path / "x")
    for path in ("/etc/shadow", "s", "/etc/new", "e/new", "/run/vmkernel/new", "/usr/bin/env"):
        with pytest.raises(VmFileError, match="may not"):
            await put_tree(call, b"1", path)
    with pytest.raises(VmFileError, match="may not"):
        await put_tree(call, tmp_path, "/root/new")
    assert content(tmp_path) == {}
    clerk = await read_file(call, "/proc/self/status")
    words = {line.split(b":")[0]: line.split()[1:] for line in clerk.splitlines()}
    assert words[b"Uid"] == words[b"Gid"] == [b"1000"] * 4
    assert words[b"Groups"] == []
    assert words[b"CapEff"] == words[b"CapPrm"] == [b"0" * 16]


async def test_errors_name_the_path_and_what_to_do(call: Call, tmp_path: Path) -> None:
    for path, words in (("missing", "no such file"), ("in.txt/x", "no directory")):
        with pytest.raises(VmFileError, match=words) as caught:
            await get_tree(call, path, tmp_path / "x")
        assert f"{path!r}" in str(caught.value)
        assert caught.value.hint
    with pytest.raises(VmFileError, match="is a directory") as caught:
        await put_tree(call, b"1", "/home/user")
    assert "/" in caught.value.hint


async def test_a_full_disk_is_said_and_can_be_freed(
    vm: RunningVm, call: Call, tmp_path: Path
) -> None:
    await vm.run(
        "import os\n"
        "fd, size = os.open('ballast', os.O_CREAT | os.O_WRONLY), 1 << 33\n"
        "at = 0\n"
        "while size > 1 << 16:\n"
        "    try:\n"
        "        os.posix_fallocate(fd, at, size)\n"
        "        at += size\n"
        "    except OSError:\n"
        "        size >>= 1\n"
    )
    (tmp_path / "a").write_bytes(b"1" * (8 << 20))
    with pytest.raises(VmFileError, match="disk is full") as caught:
        await put_tree(call, tmp_path / "a", "a")
    assert "scratch_size" in caught.value.hint
    await vm.run("os.close(fd); os.unlink('ballast'); os.unlink('a')")
    await put_tree(call, tmp_path / "a", "a")


async def test_a_busy_cell_does_not_stop_it_nor_it_the_interrupt(
    vm: RunningVm, call: Call, tmp_path: Path
) -> None:
    cell = asyncio.create_task(vm.run("while True: pass"))
    await asyncio.sleep(0.5)
    data = os.urandom(10 << 20)
    async with asyncio.timeout(30):
        await put_tree(call, data, "busy")
        await get_tree(call, "busy", tmp_path / "busy")
    assert (tmp_path / "busy").read_bytes() == data
    assert not cell.done()
    transfer = asyncio.create_task(put_tree(call, data * 3, "busy"))
    await asyncio.sleep(0.1)
    await vm.guest.interrupt()
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        await asyncio.wait_for(cell, 5)
    assert (await transfer).bytes == len(data) * 3


async def test_a_helper_that_the_user_stops_is_replaced(vm: RunningVm, call: Call) -> None:
    """It is a process of the user's, who can stop it; the agent serves others meanwhile."""
    await put_tree(call, b"1", "a")
    mine = (
        "import os, signal\n"
        "def clerks():\n"
        "    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        try:\n"
        "            uid = os.stat(f'/proc/{pid}').st_uid\n"
        "            words = open(f'/proc/{pid}/cmdline').read()\n"
        "            if uid == os.getuid() and int(pid) != os.getpid() and 'vmkernel' in words:\n"
        "                yield int(pid)\n"
        "        except OSError: pass\n"
        "[clerk] = clerks()\n"
    )
    await vm.run(mine + "os.kill(clerk, signal.SIGKILL)")
    assert await read_file(call, "a") == b"1"
    await vm.run("[clerk] = clerks(); os.kill(clerk, signal.SIGSTOP)")
    stuck = asyncio.create_task(read_file(call, "a"))
    async with asyncio.timeout(5):
        assert await vm.run("print(1)") == "1\n"
        await vm.guest.interrupt()  # the agent's own
    await vm.run("os.kill(clerk, signal.SIGCONT)")
    assert await stuck == b"1"
    # Nothing of the agent's is to be got from it
    assert (
        await vm.run("print(sorted(os.listdir(f'/proc/{clerk}/fd')))") == "['0', '1', '2', '3']\n"
    )


async def test_a_call_that_is_given_up_leaves_the_next_one_alone(
    call: Call, tmp_path: Path
) -> None:
    transfer = asyncio.create_task(put_tree(call, b"1" * (20 << 20), "given-up"))
    await asyncio.sleep(0.2)
    transfer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await transfer
    await put_tree(call, b"2", "given-up")
    assert await read_file(call, "given-up") == b"2"


async def test_a_vm_that_ends_ends_the_transfer(session_dir: Path, tmp_path: Path) -> None:
    host = VmHost(session_dir)
    async with RunningVm(host.settings()) as vm:
        call = vm.guest.vm.agent.exchange
        transfer = asyncio.create_task(get_tree(call, "/usr/bin", tmp_path / "bin"))
        await asyncio.sleep(1)
        psutil.Process(vm.guest.vm.process.pid).kill()
        with pytest.raises(VmGuestError):
            await transfer
    assert host.left() == []
