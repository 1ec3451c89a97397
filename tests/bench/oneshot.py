"""One hello world, from nothing to its end: ``vmkernel run`` beside what else runs a piece of code.

    script/bench --oneshot

Wall time of whole commands, as a shell sees it, each from its start to its end; the peers run
the same Python on the same files.  Rounds in changing order, as everywhere in ``script/bench``.  A
peer that is not installed, or does not run on this host, is shown with the reason.  They are no
equals: the namespaces of ``bwrap`` share the host's kernel, a VM has its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vmkernel.bench import machine
from vmkernel.bench.figures import percentile

HELLO = 'print("hello")'
LIMIT = 600.0
"""Seconds that a command may take: the very first VM waits for its template."""

Say = Callable[[str], None]


class NotTakenError(Exception):
    """A sample could not be taken; the reason."""


class Command:
    """A command line that says hello; a sample is its wall time."""

    def __init__(self, title: str, words: list[str], *, slow: bool = False, **env: str) -> None:
        self.title = title
        self.slow = slow
        """Tens of seconds: taken in the first rounds only."""
        self._words = words
        self._env = env

    def sample(self) -> float:
        """Seconds from start to end.  Raises NotTakenError."""
        begun = time.perf_counter()
        try:
            done = subprocess.run(
                self._words,
                env={**os.environ, **self._env},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LIMIT,
            )
        except FileNotFoundError:
            raise NotTakenError(f"{self._words[0]} is not installed") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotTakenError(str(error)) from error
        took = time.perf_counter() - begun
        if done.stdout.strip() != "hello":
            last = (done.stderr.strip().splitlines() or ["no word of it"])[-1]
            raise NotTakenError(f"does not run here (exit {done.returncode}): {last}")
        return took


class InProcess:
    """``Scheduler.run`` from a program that runs already, as a service would."""

    slow = False

    def __init__(self, title: str, stack: ExitStack, *, warm: int) -> None:
        self.title = title
        self._warm = warm
        self._runner = stack.enter_context(asyncio.Runner())
        self._scheduler: Any = None
        stack.callback(self._close)

    def sample(self) -> float:
        """Seconds from the call to the result, VM destroyed.  Raises NotTakenError."""
        try:
            return self._runner.run(self._sample())
        except Exception as error:  # whatever it is: said
            raise NotTakenError(f"{type(error).__name__}: {error}") from error

    async def _sample(self) -> float:
        from vmkernel import Scheduler, SchedulerConfig

        if self._scheduler is None:
            scheduler = Scheduler(SchedulerConfig(warm_pool_size=self._warm))
            self._scheduler = await scheduler.__aenter__()
            await scheduler.run("pass")  # the template, and this process's imports
        await self._scheduler.wait_warm()
        begun = time.perf_counter()
        result = await self._scheduler.run(HELLO)
        took = time.perf_counter() - begun
        if result.stdout.strip() != "hello":
            raise NotTakenError(f"{result}")
        return took

    def _close(self) -> None:
        if self._scheduler is not None:
            self._runner.run(self._scheduler.__aexit__(None, None, None))


def subjects(stack: ExitStack) -> list[Command | InProcess]:
    """Everything that is measured; the first is what the others are compared to."""
    # Debian's own where there is one: a container whose root is only /usr has that
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    hello = [python, "-c", HELLO]
    vmkernel = [str(Path(sys.executable).with_name("vmkernel")), "run"]
    empty = stack.enter_context(tempfile.TemporaryDirectory(prefix="vmk-bench-"))
    bwrap = "bwrap --unshare-all --die-with-parent --ro-bind / / --dev /dev --proc /proc".split()
    nspawn = (
        "systemd-nspawn --quiet --register=no --keep-unit --volatile=yes --directory=/ --pipe "
        f"--machine=vmk-bench-{os.getpid()}"
    ).split()
    return [
        Command("`python3 -c`", hello),
        Command("unshare (namespaces)", ["unshare", "-rmpfn", "--mount-proc", *hello]),
        Command("bubblewrap", [*bwrap, "--tmpfs", "/tmp", *hello]),
        Command("firejail", ["firejail", "--quiet", "--noprofile", "--net=none", *hello]),
        Command("systemd-nspawn (root only)", [*nspawn, *hello]),
        Command("`vmkernel run -c`", [*vmkernel, "-c", HELLO]),
        InProcess("`Scheduler.run`", stack, warm=0),
        InProcess("`Scheduler.run`, warm pool", stack, warm=1),
        Command(
            "`vmkernel run -c`, no template yet: a cold boot",
            ["sh", "-c", 'rm -rf "$0"/*; exec "$@"', empty, *vmkernel, "-c", HELLO],
            slow=True,
            VMKERNEL_CACHE_DIR=empty,
        ),
    ]


def main(rounds: int, output: Path, say: Say) -> int:
    """Measure, print, write; always 0."""
    host = machine.describe() | {"load_at_begin": machine.load()}
    samples: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    with ExitStack() as stack:
        every = subjects(stack)
        for subject in every:
            samples[subject.title] = []
            if not subject.slow:
                say(f"warming {subject.title}")
                _take(subject, [], reasons)
        for number in range(rounds):
            at = number % len(every)
            for subject in (*every[at:], *every[:at]):
                if subject.title not in reasons and not (subject.slow and number > rounds // 3):
                    say(f"round {number + 1} of {rounds}: {subject.title}")
                    _take(subject, samples[subject.title], reasons)
    host["load_at_end"] = machine.load()
    stamp = time.strftime("%Y-%m-%dT%H%M%S")
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"oneshot-{stamp}.json"
    content = {"machine": host, "samples_s": samples, "not_taken": reasons}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    text = table(samples, reasons)
    path.with_suffix(".md").write_text(text)
    print(text)
    say(f"written: {os.path.relpath(path)} and .md")
    return 0


def _take(subject: Command | InProcess, samples: list[float], reasons: dict[str, str]) -> None:
    try:
        samples.append(subject.sample())
    except NotTakenError as reason:
        reasons[subject.title] = str(reason)


def table(samples: dict[str, list[float]], reasons: dict[str, str]) -> str:
    """Medians, extremes, and the ratio to the first line's median."""
    base = next(iter(samples.values()))
    lines = ["| hello world | median (min … p95), ms | ratio | samples |", "|---|---|---|---|"]
    for title, taken in samples.items():
        if not taken:
            lines.append(f"| {title} | not taken: {reasons.get(title, 'no round')} | | |")
            continue
        ordered = sorted(1000 * sample for sample in taken)
        median = statistics.median(ordered)
        ratio = f"{median / 1000 / statistics.median(base):.1f} ×" if base else ""
        spread = f"{ordered[0]:.0f} … {percentile(ordered, 0.95):.0f}"
        lines.append(f"| {title} | {median:.0f} ({spread}) | {ratio} | {len(taken)} |")
    return "\n".join(lines) + "\n"
