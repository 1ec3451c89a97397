"""Files into a manager's VM and out of it, through its runner."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmhost import VmHost
from vmkernel import VmFileError, VmManager

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]


async def test_input_files_go_in_and_result_files_come_out(host: VmHost, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    source = tmp_path / "in"
    source.mkdir()
    (source / "data").write_bytes(data)
    (source / "link").symlink_to("/etc/passwd")
    told: list[tuple[int, int | None]] = []
    skipped: list[str] = []
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm()
        size = await vm.put(
            source,
            "work",
            on_progress=lambda *what: told.append(what),
            on_skip=skipped.append,
        )
        assert size == len(data)
        assert told[-1] == (size, size)
        assert skipped == [str(source / "link")]
        await vm.put(b"reversed", "work/name")
        result = await vm.run(
            "import os, pathlib; work = pathlib.Path('work')\n"
            "name = (work / 'name').read_text()\n"
            "(work / name).write_bytes((work / 'data').read_bytes()[::-1])\n"
            "os.mkfifo('work/pipe')"
        )
        assert result.ok, result
        assert await vm.read_file("work/name") == b"reversed"
        skipped.clear()
        out = tmp_path / "out"
        assert await vm.get("work", out, on_skip=skipped.append) == 2 * len(data) + 8
        assert skipped == ["work/pipe"]
        assert (out / "reversed").read_bytes() == data[::-1]
        await vm.get("work/reversed", out / "data")  # over the very file that was named
        assert (out / "data").read_bytes() == data[::-1]


async def test_what_goes_wrong_with_files_leaves_the_vm_as_it_was(
    host: VmHost, tmp_path: Path
) -> None:
    async with VmManager(host.settings()) as manager:
        vm = await manager.create_vm()
        for wrong in (
            vm.get("missing", tmp_path / "x"),
            vm.get("/etc/shadow", tmp_path / "x"),
            vm.get("/usr/bin", tmp_path / "x", max_bytes=1 << 20),
            vm.get("/usr/bin", tmp_path / "y", max_files=3),
            vm.put(b"1", "/root/x"),
            vm.put(tmp_path / "missing", "x"),
            vm.put(tmp_path, "x", max_files=0),
            vm.read_file("/usr/bin/python3", 1000),
        ):
            with pytest.raises(VmFileError) as caught:
                await wrong
            assert type(caught.value) is VmFileError
        assert (await vm.run("print('ok')")).stdout == "ok\n"
