"""Who is who in the process table."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from vmkernel.host import processes
from vmkernel.host.processes import ProcessIdentity


def identity(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    found = processes.identify(process.pid)
    assert found is not None
    return found


def test_a_process_with_a_strange_name_is_identified(tmp_path: Path) -> None:
    program = tmp_path / ") R 1 (x"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as child:
        end = time.monotonic() + 5
        while processes.describe(child.pid) != program.name:
            assert time.monotonic() < end
        found = identity(child)
        assert processes.is_alive(found)
        assert not processes.is_alive(found._replace(start_time=found.start_time + 1))
        while not (words := processes.arguments(child.pid)):
            assert time.monotonic() < end
        assert words == [str(program), "60"]
        assert processes.kill(found._replace(start_time=1)), "that one is dead"
        assert child.poll() is None
        assert processes.kill(found)
    assert processes.kill(found)
    assert not processes.is_alive(None)
    assert processes.describe(child.pid) == ""
    assert processes.identify(1 << 22) is None
