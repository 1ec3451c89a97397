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
