"""The benchmark's own arithmetic, its place on the host, and what it draws. No VM, no kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import page, plots, scale
from vmkernel.bench import report
from vmkernel.bench.figures import BY_KEY, Results, percentile
from vmkernel.bench.memory import Footprint, footprint, further_mappings, idle_cpu, mappings
from vmkernel.bench.rig import Pool, Rig, Variant

PLAIN, OURS, POOLED = "python3", "vmsandbox", "vmsandbox+pool"
MACHINE = {
    "processor": "a processor", "usable_cores": 2, "cores": 2, "memory_mib": 2048,
    "system": "Linux", "linux": "6.1", "python": "3.11",
    "qemu": "QEMU emulator version 7.2", "packages": {},
    "load_at_begin": 0.1, "load_at_end": 0.2, "calibration_ms_at_begin": 9, "date": "2026-11-22T10",
    "calibration_ms_at_end": 9, "kernels": {OURS: "vmkernel: accelerator: tcg, …"},
    "accelerator": "auto", "recipe": "minimal",
}  # fmt: skip


def results() -> Results:
    found = Results([PLAIN, OURS, POOLED])
    found.add("start_first", PLAIN, 1.0, 3.0, 2.0)
    found.add("start_first", OURS, 1.2)
    found.add("start_first", POOLED, 0.5)
    found.add("round_trip", PLAIN, *([10.0] * 99), 20.0)
    found.add("round_trip", OURS, *([14.0] * 90), *([30.0] * 10))
    found.add("print_once", PLAIN, 100.0)
    found.add("print_once_lost", PLAIN, 0)
    found.add("print_once", OURS, 60.0)
    found.add("print_once_lost", OURS, 7)
    found.add("print_once", POOLED, 60.0)
    found.add("print_once_lost", POOLED, 0)
    found.fail(("interrupt",), OURS, "it had no time")
    return found


@pytest.mark.parametrize(
    ("key", "kernel", "ratio", "goal", "met"),
    [
        ("start_first", OURS, 0.6, 0.6, True),
        ("start_first", POOLED, 0.25, 0.2, False),
        ("round_trip", OURS, 1.4, 1.5, True),
        ("round_trip_p95", OURS, 3.0, 2.0, False),
        ("print_once", OURS, 0.6, 0.5, False),  # 7 bytes are lost
        ("print_once", POOLED, 0.6, 0.5, True),
        ("interrupt", OURS, None, 2.0, None),
        ("start_first", PLAIN, 1.0, 0.6, None),
    ],
)
def test_a_figure_is_compared_with_plain_and_with_its_goal(key, kernel, ratio, goal, met):
    found, figure = results(), BY_KEY[key]
    assert found.ratio(figure, kernel) == (None if ratio is None else pytest.approx(ratio))
    assert figure.goal_of(kernel) == goal
    assert found.met(figure, kernel) is met


def test_every_goal_of_the_issue_has_its_figure():
    goals = {key: (figure.goal, figure.pool_goal) for key, figure in BY_KEY.items() if figure.goal}
    assert goals == {
        "start_first": (0.6, 0.2),
        "import_time": (0.05, None),
        "round_trip": (1.5, None),
        "round_trip_p95": (2.0, None),
        "interrupt": (2.0, None),
        "complete": (1.5, None),
        "print_lines": (0.5, None),
        "print_once": (0.5, None),
        "print_subprocess": (0.5, None),
        "memory_further": (1.0, None),
        "memory_further_imports": (0.7, None),
    }
    assert BY_KEY["restart_first"].goal_of(POOLED) == 0.3
    assert BY_KEY["restart_first"].goal_of(OURS) is None


def test_the_table_says_what_is_missing_and_why():
    found = results()
    table, notes = report.table(found), report.notes(found)
    line = next(line for line in table.splitlines() if line.startswith("| interrupt"))
    assert line.count("not taken") == 3
    assert notes == "* interrupt of a busy loop → reply, vmsandbox: not taken: it had no time"
    assert "| yes" in table
    assert "| **no**" in table
    assert "goal" not in report.table(found, goals=False)
    assert json.loads(json.dumps(report.full(found, MACHINE)))["figures"]["round_trip_p95"][OURS][
        "ratio"
    ] == pytest.approx(3.0)


def test_the_95th_percentile_is_a_sample():
    assert percentile([1.0], 0.95) == 1.0
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0


def test_a_further_kernel_is_the_difference():
    one = Footprint(50, 40, 3, {"qemu": 30.0, "python3": 20.0})
    five = Footprint(170, 120, 11, {"qemu": 110.0, "python3": 40.0, "sh": 20.0})
    assert five.minus(one, 4) == Footprint(30, 20, 2, {"python3": 5.0, "qemu": 20.0, "sh": 5.0})


def test_what_a_further_kernels_memory_is():
    one = {"qemu: heap": {"rss": 4.0, "pss": 4.0, "private": 4.0}}
    many = {
        "qemu: files": {"rss": 20.0, "pss": 4.0, "private": 2.0},
        "qemu: heap": {"rss": 12.0, "pss": 12.0, "private": 12.0},
    }
    more = further_mappings(one, many, 2)
    assert list(more) == ["qemu: heap", "qemu: files"]
    assert more["qemu: files"] == {"rss": 10.0, "pss": 2.0, "private": 1.0}
    mine = mappings([os.getpid()])
    assert any(name.endswith(": heap") and sizes["private"] > 0 for name, sizes in mine.items())


def test_the_place_knows_its_processes_and_takes_them_along(wait_until):
    before = dict(os.environ)
    with Rig() as rig:
        assert str(rig.directory) in os.environ["VMKERNEL_RUNTIME_DIR"]
        # As QEMU in bubblewrap: a descendant, with an environment of its own; not our child
        outer = subprocess.Popen(
            ["sh", "-c", "env -i setsid sleep 60 & echo $!; wait"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert outer.stdout is not None
        inner = int(outer.stdout.readline())
        found = rig.processes()
        assert {outer.pid, inner} <= set(found)
        assert os.getpid() not in found
        assert rig.processes_of(outer.pid, "") == [outer.pid, inner]
        sizes = footprint(found)
        assert sizes.processes == len(found)
        assert sizes.pss > 0
        assert idle_cpu(found, 0.05) >= 0
    assert outer.wait(5) == -9
    outer.stdout.close()
    # Killed it is at once, gone when it gets a processor
    wait_until(lambda: not Path(f"/proc/{inner}/exe").exists(), 10)
    assert not rig.directory.exists()
    assert dict(os.environ) == before


def test_a_kernel_past_the_pool_is_told_so():
    with Rig() as rig:
        direct, pooled = (rig.environment(Variant.of(name)) for name in (OURS, POOLED))
    if Pool.exists():
        assert direct == {"VMKERNEL_POOL_SIZE": "0"}
        assert int(pooled["VMKERNEL_POOL_SIZE"]) > 0
    assert Variant.of(POOLED) == (OURS, True)


# --- many kernels ---


def look(kernels: int, pss: float) -> dict[str, object]:
    return {
        "kernels": kernels, "start_median": 0.3, "start_p95": 0.4, "starts": [0.3],
        "pss_further": pss / max(1, kernels), "answers_ms": [8.0, 9.0],
        "footprint": Footprint(pss, pss - 1, 3 * kernels).as_json(),
        "machine_mib": {"MemAvailable": 1000},
    }  # fmt: skip


def many(**changes: object) -> dict[str, object]:
    data = {
        "kernels": 5, "alive": 5, "processes": 15, "idle_cpu_percent": 3.0,
        "machine_busy_percent": 5.0, "in_turn_ms": [8.0] * 5, "at_once_ms": [[100.0] * 5],
    }  # fmt: skip
    return {
        "kernel": OURS, "wanted": 5, "failed_starts": [], "before": look(0, 0.0), "ended_in": 1.0,
        "steps": [look(1, 90.0), look(5, 250.0)],
        "all": {**data, **changes},
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"alive": 4},
        {"in_turn_ms": [1001.0]},
        {"at_once_ms": [[5.0], [-1.0]]},
        {"idle_cpu_percent": 101},
    ],
)
def test_one_that_is_dead_late_or_busy_misses_the_goal(changes):
    assert scale.met(many())
    assert not scale.met(many(**changes))
    assert not scale.met({**many(), "ended_by": "kernel 4: no memory"})
    assert "**not met**" in scale.text(many(**changes))


# --- plots and page ---


def test_the_plots_are_drawn_and_put_into_the_page(tmp_path, monkeypatch):
    path = tmp_path / "goals-1.json"
    steps = [["interpreter up", 30.0], ["front end has the first result", 300.0]]
    content = {
        **report.full(results(), MACHINE),
        "waterfall": {PLAIN: {"steps_ms": steps}, OURS: {"not_taken": "no"}},
        "scale": many(),
    }
    path.write_text(json.dumps(content))
    path.with_suffix(".md").write_text("| a table |\n\n## Imports\n\nmany\n")
    made = plots.draw(path)
    assert [plot.name for plot in made] == [
        f"goals-1-{name}.png" for name in ("start-up", "scale", "ratios")
    ]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in made)

    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "performance.md")
    page.PAGE.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):
        page.update(path, made)
    assert page.PAGE.read_text() == f"before\n{page.BEGIN}\n| a table |\n{page.END}\nafter\n"
    assert (tmp_path / "performance-ratios.png").exists()


def test_the_page_has_its_marks():
    text = page.PAGE.read_text()
    assert text.count(page.BEGIN) == text.count(page.END) == 1


def test_the_command_says_what_it_takes():
    script = Path(__file__).parents[1] / "bench" / "compare.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "--scale" in done.stdout
