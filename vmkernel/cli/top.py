"""``vmkernel top``: what the VMs on this host take, as it changes. Floor 5.

A table drawn with the few control sequences that every terminal knows (ECMA-48); rejected: curses
(it wants the whole terminal to be its own, and its database), rich (a dependency for a table).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import psutil

from vmkernel.cli.options import seconds

if TYPE_CHECKING:
    from vmkernel.settings import Settings

_HEADER = ["ID", "NAME", "OWNER", "FOR", "STATE", "OPEN"]
_NUMBERS = ["CPU %", "PRIVATE", "SHARED", "LIMIT", "AGE"]
_JSON_INTERVAL = 0.5


@click.command()
@click.option(
    "--interval", type=seconds, default=2.0, metavar="SECONDS", help="Time between two looks (2)."
)
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="End after N looks.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One look, machine-readable; sizes in bytes, CPU in per cent of a processor.",
)
def top(interval: float, count: int | None, as_json: bool) -> None:
    """Show what the VMs take: processor, memory, slots and queue; q or Ctrl-C ends.

    CPU is the VM's QEMU and runner together, in per cent of one processor; PRIVATE is memory that
    only this VM uses, SHARED what it has in common with others, LIMIT what the guest may have.
    """
    from vmkernel.cli.output import print_json
    from vmkernel.settings import load_settings

    settings = load_settings()
    with _Sampler(settings) as sampler:
        if as_json:
            sampler.sample()
            time.sleep(min(interval, _JSON_INTERVAL))
            print_json(sampler.sample())
            return
        if sys.stdout.isatty():
            with _Screen() as screen:
                _repeat(sampler, screen.draw, screen.wait, interval, count)
        else:
            with contextlib.suppress(KeyboardInterrupt):
                _repeat(sampler, _print, _sleep, interval, count)


def _repeat(
    sampler: _Sampler,
    show: Callable[[list[str]], None],
    wait: Callable[[float], bool],
    interval: float,
    count: int | None,
) -> None:
    left = count
    sampler.sample()
    pause = min(interval, _JSON_INTERVAL)  # the first figures need not be waited for so long
    while left != 0 and wait(pause):
        show(_lines(sampler.sample()))
        left = None if left is None else left - 1
        pause = interval


class _Sampler:
    """Looks at all VMs; CPU is what was used since the look before."""

    def __init__(self, settings: Settings) -> None:
        from vmkernel.host.registry import Registry

        self._settings = settings
        self._registry = Registry(settings)
        self._spent: dict[tuple[str, int], tuple[float, float]] = {}

    def __enter__(self) -> _Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._registry.close()

    def sample(self) -> dict[str, Any]:
        from vmkernel.cli import facts

        vms = facts.vms_on_host(self._settings, self._registry)
        spent: dict[tuple[str, int], tuple[float, float]] = {}
        for vm in vms:
            vm["cpu_percent"] = self._cpu_percent(vm, spent)
        self._spent = spent
        memory = psutil.virtual_memory()
        return {
            "time": time.time(),
            "vms": vms,
            "slots": facts.slots(self._settings),
            "host": {
                "cpu_percent": psutil.cpu_percent(),
                "cpu_count": os.cpu_count(),
                "memory_total": memory.total,
                "memory_available": memory.available,
            },
        }

    def _cpu_percent(
        self, vm: dict[str, Any], spent: dict[tuple[str, int], tuple[float, float]]
    ) -> float | None:
        """None at the first look at a VM, and for one that does not run."""
        total = None
        for pid in (vm["pid"], vm["runner_pid"]):
            if pid is None:
                continue
            with contextlib.suppress(psutil.Error):  # gone meanwhile
                times = psutil.Process(pid).cpu_times()
                now = time.monotonic()
                key = (vm["id"], pid)
                spent[key] = used, _ = times.user + times.system, now
                if key in self._spent:
                    before, then = self._spent[key]
                    total = (total or 0.0) + 100 * max(0.0, used - before) / max(now - then, 1e-3)
        return None if total is None else round(total, 1)


def _lines(sample: dict[str, Any]) -> list[str]:
    from vmkernel.cli import facts
    from vmkernel.cli.output import age, mebibytes, table_lines

    vms, host, slots = sample["vms"], sample["host"], sample["slots"]
    private = sum(vm["memory_private"] or 0 for vm in vms)
    clock = time.strftime("%H:%M:%S", time.localtime(sample["time"]))
    available = mebibytes(host["memory_available"])
    lines = [
        f"{clock}  {facts.slots_line(slots)}, {slots['free']} free; VMs: {mebibytes(private)} "
        f"private; host: {host['cpu_percent']:.0f} % of {host['cpu_count']} CPUs, "
        f"{available} of {mebibytes(host['memory_total'])} available",
        "",
    ]
    vms.sort(key=lambda vm: -(vm["cpu_percent"] or 0.0))
    rows = [
        [
            vm["id"] or "-",
            vm["name"] or "-",
            vm["owner"],
            facts.purpose(vm),
            facts.state_word(vm),
            facts.open_to(vm),
            "-" if vm["cpu_percent"] is None else f"{vm['cpu_percent']:.1f}",
            mebibytes(vm["memory_private"]),
            mebibytes(vm["memory_shared"]),
            mebibytes(vm["memory_limit"]),
            age(vm["age"]),
        ]
        for vm in vms
    ]
    if not rows:
        return [*lines, "no VM is there"]
    return lines + table_lines([*_HEADER, *_NUMBERS], rows, right=_NUMBERS)


def _print(lines: list[str]) -> None:
    click.echo("\n".join(lines) + "\n")
    sys.stdout.flush()


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True


class _Screen:
    """The terminal while a table is shown on it: another page, no cursor, keys at once."""

    def __enter__(self) -> _Screen:
        self._undo = contextlib.ExitStack()
        before = signal.signal(signal.SIGTERM, _end_in_good_order)
        self._undo.callback(signal.signal, signal.SIGTERM, before)
        if sys.stdin.isatty():
            self._undo.enter_context(_keys_at_once())
        self._write("\x1b[?1049h\x1b[?25l")
        self._undo.callback(self._write, "\x1b[?25h\x1b[?1049l")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._undo.close()
        return kind is KeyboardInterrupt

    def draw(self, lines: list[str]) -> None:
        """Write the lines over the last ones, cut to the terminal's size."""
        width, height = os.get_terminal_size(sys.stdout.fileno())
        shown = [line[:width] + "\x1b[K" for line in lines[:height]]
        self._write("\x1b[H" + "\r\n".join(shown) + "\x1b[J")

    def wait(self, seconds: float) -> bool:
        """Until the time is over; False when a key said that it is enough."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not sys.stdin.isatty():
                return _sleep(left)
            readable, _, _ = select.select([0], [], [], left)
            if readable and os.read(0, 1) in (b"q", b"Q", b"\x04", b""):
                return False
        return True

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


@contextlib.contextmanager
def _keys_at_once() -> Iterator[None]:
    import termios
    import tty

    before = termios.tcgetattr(0)
    tty.setcbreak(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _end_in_good_order(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # as an exception, so that the terminal is put right on the way out
