"""What the command's tests share: a command under way, and what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from vmhost import VmHost
from vmkernel.host.registry import Registry

MAIN = "from vmkernel.cli.app import main; main()"


def left(host: VmHost) -> list[str]:
    """What lives on the host: processes, sockets, slots, and VMs on record that should not be."""
    with Registry(host.settings()) as registry:
        recorded = [f"{status.record.vm_id}: {status.state}" for status in registry.list()]
    return [*host.left(), *recorded, *host.records()]


class Command:
    """A command under way; ``with Command(host, "run", …) as command:`` it is ended at the end."""

    def __init__(self, host: VmHost, *words: str, **env: str) -> None:
        self._process = subprocess.Popen(
            host.command(sys.executable, "-c", MAIN, *words),
            env={**os.environ, **host.env, **env},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, bufsize=1,
            # A test run under nohup ignores it, and so would the command, as it should
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509
        )  # fmt: skip
        self.pid = self._process.pid
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        self.stderr = self._process.stderr

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate(timeout=10)

    def signal(self, number: signal.Signals) -> None:
        """As a terminal or a service manager would."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 30) -> int:
        """Its exit code."""
        return self._process.wait(seconds)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None


def wait_for(condition: Callable[[], object], what: str, seconds: float = 15) -> None:
    """Fail when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
