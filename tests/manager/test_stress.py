"""Many processes that want few slots: what the limit, the order and the throughput are then.

Figures are printed (``-rP`` shows them); with ``--full`` in the counts that are promised.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmhost import Sampler, VmHost
from vmkernel.host.capacity import Semaphore

REPOSITORY = Path(__file__).resolve().parents[2]
PROCESSES = 8

TAKE_AND_RELEASE = """
import asyncio, json, sys, time
from vmkernel.host.capacity import Semaphore

async def main(path, limit, rounds):
    semaphore = Semaphore(path, int(limit))
    spans = []
    print(flush=True)
    sys.stdin.readline()
    for _ in range(int(rounds)):
        slot = await semaphore.acquire()
        got = time.monotonic()
        ends = time.monotonic()
        slot.release()
        spans.append((got, ends))
    print(json.dumps(spans))

asyncio.run(main(*sys.argv[1:]))
"""


def most_at_once(spans: list[tuple[float, float]]) -> int:
    """How many of the spans overlap; one that ends as another begins does not."""
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def start(code: str, *arguments: object, **env: str) -> subprocess.Popen[str]:
    """A Python of its own that says a line when it is ready and goes on when it gets one."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
    )


def race(processes: list[subprocess.Popen[str]], limit: float) -> list[str]:
    """Let all go on at one moment; what each says at its end."""
    try:
        for process in processes:
            assert process.stdout
            process.stdout.readline()
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        return [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("limit", [1, 4, PROCESSES])
def test_ten_thousand_slots_over_eight_processes_are_taken_and_released_without_drift(
    tmp_path: Path, limit: int, rounds: Callable[..., int]
) -> None:
    path = tmp_path / "slots"
    semaphore = Semaphore(path, limit)
    before = semaphore.statistics()
    count = rounds(quick=10_000 if limit > 1 else 2_000, full=10_000)
    workers = [start(TAKE_AND_RELEASE, path, limit, count // PROCESSES) for _ in range(PROCESSES)]
    spans = [tuple(span) for said in race(workers, 100) for span in json.loads(said)]
    took = max(end for _, end in spans) - min(begin for begin, _ in spans)
    print(
        f"limit {limit}: {len(spans)} rounds over {PROCESSES} processes in {took:.2f} s, "
        f"{len(spans) / took:.0f} a second"
    )
    assert len(spans) == count
    assert most_at_once(spans) <= limit
    assert semaphore.statistics() == before == (limit, 0, limit, 0)


RACE = """
import asyncio, contextvars, json, sys, time
from vmkernel import VmManager
from vmkernel.host import capacity, slotfile

mine = contextvars.ContextVar("mine")  # what is noted of the VM that this task creates
draw, take = slotfile.Ticket.__init__, capacity.Semaphore.acquire

def noted_draw(self, file):
    draw(self, file)
    mine.get()["ticket"] = self.number

async def noted_take(self, **options):
    slot = await take(self, **options)
    mine.get()["served"] = time.monotonic()
    return slot

slotfile.Ticket.__init__ = noted_draw
capacity.Semaphore.acquire = noted_take

async def one(manager, number):
    note = {"number": number, "begun": time.monotonic()}
    mine.set(note)
    vm = await manager.create_vm(task_id=str(number))
    note["up"] = time.monotonic()
    note["said"] = (await vm.run(f"print({number})")).stdout
    await manager.destroy_vm(vm)
    note["gone"] = time.monotonic()
    return note

async def main(*numbers):
    async with VmManager() as manager:
        print(flush=True)
        sys.stdin.readline()
        print(json.dumps(await asyncio.gather(*(one(manager, n) for n in numbers))))

asyncio.run(main(*sys.argv[1:]))
"""
RACERS = 16
LIMIT = 4


@pytest.mark.vm
@pytest.mark.timeout(1800)
def test_sixteen_processes_race_to_create_vms_at_limit_four(
    host: VmHost, rounds: Callable[..., int]
) -> None:
    """All run, never more than four at once, in the order of arrival.

    Arrival is the drawing of a ticket, which two processes cannot do at one moment; being served is
    seen by each process on its own clock's reading after it got its slot. As ``LIMIT`` slots go
    round, that many may be served at one moment and be seen in any order: nobody may be seen
    served before, or after, more than ``LIMIT`` others than its ticket says.
    """
    count = rounds(quick=24, full=200)
    processes = [
        start(
            RACE,
            *range(racer, count, RACERS),
            **{**host.env, "VMKERNEL_MAX_CONCURRENT_VMS": str(LIMIT)},
        )
        for racer in range(RACERS)
    ]
    with Sampler(host, interval=0.01) as sampler:
        said = race(processes, 1700)
    notes = [note for text in said for note in json.loads(text)]
    assert sorted(int(note["number"]) for note in notes) == list(range(count))
    assert all(note["said"] == f"{note['number']}\n" for note in notes)

    waited = sorted((note for note in notes if "ticket" in note), key=lambda note: note["ticket"])
    served = sorted(waited, key=lambda note: note["served"])
    off = [abs(place - served.index(note)) for place, note in enumerate(waited)]
    took = max(note["gone"] for note in notes) - min(note["begun"] for note in notes)
    starts = sorted(note["up"] - note["served"] for note in notes)
    print(
        f"{count} VMs by {RACERS} processes at limit {LIMIT}: {took:.1f} s; "
        f"at most {sampler.most} at once ({sampler.samples} samples), {len(sampler.seen)} seen; "
        f"{len(waited)} waited, of whom {sum(map(bool, off))} were seen served out of turn, "
        f"the worst by {max(off)} places (tolerance {LIMIT}); "
        f"slot to guest awake {starts[len(starts) // 2]:.2f} s (median), {starts[-1]:.2f} s (worst)"
    )
    assert sampler.most == LIMIT
    assert len(sampler.seen) == count
    assert len({note["ticket"] for note in waited}) == len(waited) >= count - 2 * LIMIT
    assert max(off) <= LIMIT
    assert host.slots().used == 0
    assert host.records() == []
