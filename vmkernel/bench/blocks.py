"""The measurements, block by block.

Every block goes round by round and takes one sample of each kernel in every round, in changing
order: what else the machine does meanwhile then hits all of them alike, and the *ratio* stays
right where absolute times would not.  A sample that fails is noted with its reason and the run
goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty
from typing import Any

from vmkernel.bench.figures import Results
from vmkernel.bench.memory import Footprint, footprint, further_mappings, idle_cpu, mappings
from vmkernel.bench.rig import Rig, RigError, Variant
from vmkernel.bench.subject import KernelFailedError, Subject, clock
from vmkernel.errors import VmError

_MEGABYTES = 10
_SIZE = _MEGABYTES * 1_000_000
_LINES = "s = 'x' * 999\nfor _ in range(10_000): print(s)"
_ONCE = "print('x' * 9_999_999)"
_SUBPROCESS = (
    "import subprocess, sys\n"
    "_ = subprocess.run([sys.executable, '-c', 'import sys\\n"
    'for _ in range(10000): sys.stdout.write("x" * 999 + chr(10))\'])'
)
_OUTPUTS = {"print_lines": _LINES, "print_once": _ONCE, "print_subprocess": _SUBPROCESS}
IMPORTS = "import numpy, pandas, matplotlib.pyplot"
IDLE_SECONDS = 8.0

_NOT_TAKEN = (KernelFailedError, RigError, VmError, Empty, OSError, RuntimeError, AssertionError)


@dataclass
class Run:
    """One run of the benchmark: what to measure, how often, and where the results go."""

    results: Results
    rig: Rig
    rounds: int
    cells: int
    many: int
    """Kernels alive at once when memory is measured."""
    say: Callable[[str], None]
    brief: bool = False
    """Take memory without cells in a history: what writes it need not be waited for, 15 s each."""

    def orders(self, rounds: int) -> Iterator[list[str]]:
        """The kernels' order in each round: everyone is first equally often."""
        for number in range(rounds):
            at = number % len(self.results.kernels)
            yield [*self.results.kernels[at:], *self.results.kernels[:at]]

    @contextlib.contextmanager
    def sample(self, kernel: str, *keys: str) -> Iterator[None]:
        """What fails in here is noted as the reason why these figures lack a sample."""
        try:
            yield
        except _NOT_TAKEN as error:
            reason = f"{type(error).__name__}: {error}".removeprefix("KernelFailedError: ")
            self.results.fail(keys, kernel, reason)
            self.say(f"   {kernel}: {', '.join(keys)} not taken: {reason}")

    @contextlib.contextmanager
    def live(self, *keys: str) -> Iterator[dict[str, Subject]]:
        """One kernel of each kind, ready; one that does not start lacks all of ``keys``."""
        with contextlib.ExitStack() as stack:
            subjects: dict[str, Subject] = {}
            for kernel in self.results.kernels:
                with self.sample(kernel, *keys):
                    subjects[kernel] = Subject.start(self.rig, kernel)
                    stack.callback(subjects[kernel].kill)
                    subjects[kernel].listen()
            yield subjects


def start(run: Run) -> None:
    """Spawn to kernel_info and first result; the imports, as nothing is imported yet; the end."""
    for order in run.orders(run.rounds):
        for kernel in order:
            with run.sample(kernel, "start_info", "start_first"), contextlib.ExitStack() as stack:
                subject = Subject.start(run.rig, kernel)
                stack.callback(subject.kill)
                run.results.add("start_info", kernel, subject.info_after)
                run.results.add("start_first", kernel, subject.first_after)
                if not run.brief:
                    with run.sample(kernel, "import_time"):
                        subject.listen()
                        run.results.add("import_time", kernel, subject.cell(IMPORTS)[0])
                with run.sample(kernel, "shutdown"):
                    run.results.add("shutdown", kernel, subject.shutdown())


def restart(run: Run) -> None:
    """As the front end's restart button: a polite shutdown, then a start on the same ports."""
    with run.live("restart_first") as subjects:
        for order in run.orders(run.rounds):
            for kernel in order:
                if kernel in subjects:
                    with run.sample(kernel, "restart_first"):
                        run.results.add("restart_first", kernel, subjects[kernel].restart())


def round_trip(run: Run) -> None:
    """``1+1``, again and again, in turns of ten."""
    keys = ("round_trip_reply", "round_trip")
    with run.live(*keys) as subjects:
        for subject in subjects.values():
            for _ in range(20):  # warm caches on both sides
                subject.cell("1+1")
        for order in run.orders(max(1, run.cells // 10)):
            for kernel in order:
                if kernel not in subjects:
                    continue
                with run.sample(kernel, *keys):
                    for _ in range(10):
                        replied, idle = subjects[kernel].cell("1+1")
                        run.results.add("round_trip_reply", kernel, replied * 1000)
                        run.results.add("round_trip", kernel, idle * 1000)


def interrupt(run: Run) -> None:
    """Ctrl-C of a loop that never looks up."""
    _each_round(run, "interrupt", run.rounds, lambda subject: subject.interrupt_busy_loop() * 1000)


def complete(run: Run) -> None:
    """Completion of an attribute of a module that is loaded, the first (cold) one apart."""

    def take(subject: Subject) -> float:
        subject.expect("import os")
        return subject.complete("os.pa") * 1000

    _each_round(run, "complete", run.rounds * 3, take)


def _each_round(run: Run, key: str, rounds: int, take: Callable[[Subject], float]) -> None:
    with run.live(key) as subjects:
        for number, order in enumerate(run.orders(rounds + 1)):
            for kernel in order:
                if kernel in subjects:
                    with run.sample(kernel, key):
                        value = take(subjects[kernel])
                        if number:  # the first one warms
                            run.results.add(key, kernel, value)
                        else:
                            run.results.detail(f"{key}_cold", kernel, value)


def output(run: Run) -> None:
    """10 MB to the front end in three ways; what is lost is counted."""
    keys = tuple(_OUTPUTS)
    with run.live(*keys) as subjects:
        for order in run.orders(max(3, run.rounds // 2)):
            for key, code in _OUTPUTS.items():
                for kernel in order:
                    if kernel in subjects:
                        with run.sample(kernel, key, f"{key}_lost"):
                            _one_output(run, subjects[kernel], key, code)


def _one_output(run: Run, subject: Subject, key: str, code: str) -> None:
    got = messages = 0

    def count(message: dict[str, Any]) -> None:
        nonlocal got, messages
        if message["msg_type"] == "stream":
            got += len(message["content"]["text"])
            messages += 1

    begun = clock()
    _, took = subject.cell(code, count)
    if got < _SIZE:  # what a subprocess wrote may come after idle (plain ipykernel)
        for message in subject.late_output(1.0):
            count(message)
            took = clock() - begun
            if got >= _SIZE:
                break
    run.results.add(key, subject.name, _MEGABYTES / took)
    run.results.add(f"{key}_lost", subject.name, _SIZE - got)
    run.results.detail(f"{key}_messages", subject.name, messages)


def memory(run: Run) -> None:
    """PSS with one kernel and with several, idle and after an import; idle CPU.

    All processes count, in which of them a kernel ever lives: what the front end started, wrapper,
    QEMU and what encloses it, the pool with the member that waits.  What a pool costs once, all its
    kernels share: it is in the figures of one kernel, and not in those of a further one.
    """
    for kernel in run.results.kernels:
        if not Variant.of(kernel).pooled:
            run.rig.pool.stop()
        keys = ("memory_one", "memory_further", "memory_further_private", "idle_cpu")
        with contextlib.ExitStack() as stack, run.sample(kernel, *keys):
            subjects = [_kept(run, kernel, stack)]
            one = _settled(run, kernel)
            alone = mappings(run.rig.processes())
            subjects += [_kept(run, kernel, stack) for _ in range(run.many - 1)]
            many = _settled(run, kernel)
            further = many.minus(one, run.many - 1)
            run.results.add("memory_one", kernel, one.pss)
            run.results.add("memory_further", kernel, further.pss)
            run.results.add("memory_further_private", kernel, further.private)
            run.results.detail("memory_one_footprint", kernel, one.as_json())
            run.results.detail("memory_further_footprint", kernel, further.as_json())
            more = further_mappings(alone, mappings(run.rig.processes()), run.many - 1)
            run.results.detail("memory_further_map", kernel, more)
            cpu = idle_cpu(run.rig.processes(), IDLE_SECONDS / (2 if run.brief else 1))
            run.results.add("idle_cpu", kernel, cpu / run.many)
            if not run.brief:
                _memory_after_imports(run, kernel, subjects)


def _memory_after_imports(run: Run, kernel: str, subjects: list[Subject]) -> None:
    with run.sample(kernel, "memory_one_imports", "memory_further_imports"):
        for subject in subjects:
            subject.cell(IMPORTS)
        many = _settled(run, kernel)
        for subject in subjects[1:]:
            subject.kill()
        one = _settled(run, kernel)
        further = many.minus(one, run.many - 1)
        run.results.add("memory_one_imports", kernel, one.pss)
        run.results.add("memory_further_imports", kernel, further.pss)
        run.results.detail("memory_further_imports_footprint", kernel, further.as_json())


def _kept(run: Run, kernel: str, stack: contextlib.ExitStack) -> Subject:
    subject = Subject.start(run.rig, kernel, remembers=not run.brief)
    stack.callback(subject.kill)
    subject.listen()
    return subject


def _settled(run: Run, kernel: str) -> Footprint:
    """The place's memory, when all that is to end has ended and the pool is full again."""
    if Variant.of(kernel).pooled:
        run.rig.pool.wait_ready()
    run.rig.settle()
    if not run.brief:
        time.sleep(2.0)
    return footprint(run.rig.processes())


BLOCKS: dict[str, Callable[[Run], None]] = {
    "start": start,
    "restart": restart,
    "round-trip": round_trip,
    "interrupt": interrupt,
    "complete": complete,
    "output": output,
    "memory": memory,
}
