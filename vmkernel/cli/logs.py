"""``vmkernel logs``: what a VM's console, its QEMU and its runner have said. Floor 5."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmkernel.cli.options import complete_vms

if TYPE_CHECKING:
    from vmkernel.settings import Settings

_PARTS = ("console", "qemu", "runner")
_CHUNK = 1 << 16
_POLL_SECONDS = 0.2


@click.command()
@click.argument("vm", shell_complete=complete_vms)
@click.option("-f", "--follow", is_flag=True, help="Go on until the VM has ended.")
@click.option(
    "--which",
    type=click.Choice([*_PARTS, "all"]),
    default="all",
    show_default=True,
    help="The guest's console, QEMU's own words, or the runner's.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; not with --follow.")
def logs(vm: str, follow: bool, which: str, as_json: bool) -> None:
    """Show what VM (a name, an id or the beginning of one) has said.

    Logs of a VM that ended well go with it; those of the newest that failed are kept.
    """
    from vmkernel.cli.output import print_json
    from vmkernel.errors import VmNotFoundError
    from vmkernel.host.processes import is_alive
    from vmkernel.host.registry import Registry
    from vmkernel.settings import load_settings

    if follow and as_json:
        raise click.UsageError("--json shows what there is; it cannot follow")
    settings = load_settings()
    with Registry(settings) as registry:
        directory = _directory(settings, registry, vm)
        parts = [
            _Log(directory / f"{part}.log") for part in (_PARTS if which == "all" else (which,))
        ]
        if as_json:
            texts = {log.name: log.read().decode(errors="replace") for log in parts}
            print_json({"log_dir": directory, "logs": texts})
            return
        if not follow:
            _show(parts)
            return
        with contextlib.suppress(VmNotFoundError):  # it has failed, and only its logs are there
            record = registry.get(vm)
            with contextlib.suppress(KeyboardInterrupt):
                _follow(parts, lambda: is_alive(record.runner))
            return
    _show(parts)


def _directory(settings: Settings, registry: object, vm: str) -> Path:
    """Where the VM's logs lie.  Raises VmNotFoundError, VmError when there are none."""
    from vmkernel.errors import VmError, VmNotFoundError
    from vmkernel.host.registry import Registry
    from vmkernel.host.start import log_dir

    assert isinstance(registry, Registry)
    try:
        record = registry.get(vm)
        directory = Path(record.log_dir) if record.log_dir else log_dir(settings, record.vm_id)
        vm = record.vm_id
    except VmNotFoundError:
        # Of a VM that failed and is off the record logs may be there all the same
        directory = log_dir(settings, vm)
        if "/" in vm or vm in ("", ".", "..") or not directory.is_dir():
            raise
    if not directory.is_dir():
        raise VmError(
            f"there are no logs of {vm}: it has not come so far, or it ended well",
            hint="`vmkernel ps -a` tells how VMs have ended",
        )
    return directory


class _Log:
    """One log: its head, and its newest part in files beside it as long as it grows
    (``vm.console``).
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._path = path
        self._tail = Path(f"{path}.tail")
        self._file = -1
        self._in_tail = False

    def read(self) -> bytes:
        """All that is there."""
        parts = (self._path, Path(f"{self._tail}.old"), self._tail)
        return b"".join(_content(path) for path in parts)

    def news(self) -> Iterator[bytes]:
        """What came since the last call."""
        while True:
            if self._file < 0:
                with contextlib.suppress(OSError):
                    path = self._tail if self._in_tail else self._path
                    self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if self._file < 0:
                return
            while data := os.read(self._file, _CHUNK):
                yield data
            if not self._moved_on():
                return
            while data := os.read(self._file, _CHUNK):  # written between the two looks
                yield data
            os.close(self._file)
            self._file = -1

    def _moved_on(self) -> bool:
        """Whether the log goes on in another file."""
        try:
            newest = self._tail.stat()
        except OSError:
            return False
        moved = not os.path.samestat(os.fstat(self._file), newest)
        self._in_tail = self._in_tail or moved
        return moved


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _show(parts: list[_Log]) -> None:
    out = _Out(len(parts) > 1)
    for log in parts:
        if data := log.read():
            out.write(log.name, data)
    if not out.said:
        click.echo("nothing has been said yet", err=True)


def _follow(parts: list[_Log], alive: Callable[[], bool]) -> None:
    out = _Out(len(parts) > 1)
    lives = True
    while True:
        for log in parts:
            for data in log.news():
                out.write(log.name, data)
        if not lives:
            return
        lives = alive()  # once more after its end: its last words
        if lives:
            time.sleep(_POLL_SECONDS)


class _Out:
    """Our stdout, with a heading where another log goes on, as tail(1) has it."""

    def __init__(self, headings: bool) -> None:
        self._headings = headings
        self.said = False
        self._last = ""
        self._terminal = sys.stdout.isatty()
        self._screens: defaultdict[str, _Screen] = defaultdict(_Screen)

    def write(self, name: str, data: bytes) -> None:
        self.said = True
        if self._headings and name != self._last:
            click.echo(f"{chr(10) if self._last else ''}==> {name} <==")
            self._last = name
        if self._terminal:  # a guest must not move the cursor of whoever looks at its console
            click.echo(self._screens[name].show(data), nl=False)
        else:
            click.echo(data, nl=False)
        sys.stdout.flush()


class _Screen:
    """One log for a terminal: without any control sequence, also one that came in two pieces."""

    def __init__(self) -> None:
        from vmkernel.text import TerminalFilter

        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._filter = TerminalFilter()

    def show(self, data: bytes) -> str:
        from vmkernel.text import plain_text

        # A console's lines end with CR LF, which may be cut, too; a CR alone is no new line there
        return plain_text(self._filter.feed(self._decoder.decode(data)).replace("\r", ""))
