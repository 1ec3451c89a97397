"""Many kernels at once on one host: what a further one costs as their number grows.

    script/bench --scale 200

They are started one after another, as a person opens notebooks.  At certain numbers all is let
settle, and memory, the machine and the answers of a few are looked at.  With all there, and idle
for a while: processor time of all together, then the answer of each to `1+1`, one after another,
and of all at once, counted from the moment at which the first of them is asked.

The clients are one process with two plain sockets for each kernel and no thread, or they would be
what is measured.  Cells are not stored in a history, so that no process that writes one is counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.manager import KernelManager

from vmkernel.bench.figures import percentile
from vmkernel.bench.measure import TEMPLATE_LIMIT
from vmkernel.bench.memory import Footprint, footprint, processor_seconds
from vmkernel.bench.rig import Rig, RigError, Variant
from vmkernel.bench.subject import KernelFailedError, Subject
from vmkernel.errors import VmError

STEPS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 300, 500)
START_LIMIT = 90.0
ANSWER_LIMIT = 30.0
IDLE_SECONDS = 20.0
GOAL_ANSWER = 1.0
GOAL_CPU = 100.0
MOST_FAILURES = 3
"""Kernels that may fail to start before the growth is given up; each is told of."""
SOME = 10
"""Kernels that are asked at each step."""

Say = Callable[[str], None]
clock = time.monotonic


class ScaleError(Exception):
    """The number of kernels cannot grow further; the text says why."""


class Member:
    """One kernel of many."""

    def __init__(self, rig: Rig, variant: Variant, context: zmq.Context[Any]) -> None:
        self.took = 0.0
        """Seconds from the spawn to the first reply."""
        self._manager = KernelManager(kernel_name=variant.kernel, context=context)
        self._environment = os.environ | rig.environment(variant)
        self._sockets: list[Any] = []
        self._waiting: set[str] = set()
        self._frames: list[bytes] = []

    def start(self) -> None:
        """Start it and run ``1+1``.  Raises ScaleError."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        begun = clock()
        try:
            self._manager.start_kernel(env=self._environment, **quiet)
        except (OSError, RuntimeError) as error:
            raise ScaleError(f"it was not started: {error}") from error
        shell, iopub = self._manager.connect_shell(), self._manager.connect_iopub()
        self._sockets = [shell, iopub]
        for request in ("kernel_info_request", "execute_request"):
            self.prepare(request)
            self.send()
            while not shell.poll(1000):
                if not self.alive:
                    raise ScaleError("it died as it started")
                if clock() > begun + START_LIMIT:
                    raise ScaleError(f"no answer within {START_LIMIT:g} s")
            shell.recv_multipart()
        self.took = clock() - begun

    def prepare(self, request: str = "execute_request") -> None:
        """Make a request, so that sending costs as little as may be."""
        content: dict[str, Any] = {}
        if request == "execute_request":
            content = {
                "code": "1+1", "silent": False, "store_history": False, "user_expressions": {},
                "allow_stdin": False, "stop_on_error": True,
            }  # fmt: skip
        session = self._manager.session
        self._frames = session.serialize(session.msg(request, content))

    def listen(self, poller: zmq.Poller) -> dict[Any, Member]:
        """From here on its messages count; what came before is forgotten."""
        for socket in self._sockets:
            with contextlib.suppress(zmq.Again):
                while True:
                    socket.recv_multipart(zmq.NOBLOCK)
            poller.register(socket, zmq.POLLIN)
        return dict.fromkeys(self._sockets, self)

    def send(self) -> None:
        """Ask."""
        self._waiting = {"execute_reply", "execute_result"}
        self._sockets[0].send_multipart(self._frames)

    def take(self, socket: Any) -> bool:
        """Read what a socket has; whether reply and result have both come."""
        with contextlib.suppress(zmq.Again):
            while True:
                frames = socket.recv_multipart(zmq.NOBLOCK)
                at = frames.index(b"<IDS|MSG>")
                msg_type = json.loads(frames[at + 2])["msg_type"]
                if msg_type == "execute_result":
                    assert json.loads(frames[at + 5])["data"]["text/plain"] == "2"
                self._waiting.discard(msg_type)
        return not self._waiting

    @property
    def alive(self) -> bool:
        """Whether the process that the front end started is there."""
        return bool(self._manager.is_alive())

    def end(self) -> None:
        """End it, in whatever state it is."""
        for socket in self._sockets:
            socket.close(0)
        with contextlib.suppress(Exception):  # as in vmkernel.bench.subject
            self._manager.shutdown_kernel(now=True)


def take(rig: Rig, kernel: str, most: int, say: Say) -> dict[str, Any]:
    """Grow to ``most`` kernels of that name, and look; a failure ends the growth and is told."""
    _want_descriptors()
    variant = Variant.of(kernel)
    found: dict[str, Any] = {
        "kernel": kernel, "wanted": most, "steps": [], "failed_starts": []
    }  # fmt: skip
    members: list[Member] = []
    context: zmq.Context[Any] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 4 * most + 100)
    try:
        Subject.start(rig, kernel, limit=TEMPLATE_LIMIT).kill()  # files and template warm
        if variant.pooled:
            rig.pool.wait_ready()
        found["before"] = _look(rig, [])
        for step in [*(number for number in STEPS if number < most), most]:
            begun = len(members)
            while len(members) < step:
                if variant.pooled:
                    rig.pool.wait_ready()
                member = Member(rig, variant, context)
                members.append(member)
                try:
                    member.start()
                except ScaleError as error:  # somebody may have taken one of its ports
                    found["failed_starts"].append(f"kernel {len(members)}: {error}")
                    members.pop().end()
                    if len(found["failed_starts"]) > MOST_FAILURES:
                        raise
            found["steps"].append(_step(rig, members, begun, found))
            say(f"scale: {step} kernels, {found['steps'][-1]['start_median']:.2f} s to start one, "
                f"{found['steps'][-1]['pss_further']:.1f} MiB a further one")  # fmt: skip
    except (ScaleError, KernelFailedError, RigError, VmError, OSError) as error:
        found["ended_by"] = f"what kernel {len(members) + 1} met: {error}"
        say(f"scale: {found['ended_by']}")
    except KeyboardInterrupt:
        found["ended_by"] = "Ctrl-C"
    try:
        if members:
            found["all"] = _all(rig, members, say)
    finally:
        begun_end = clock()
        for member in members:
            member.end()
        found["ended_in"] = round(clock() - begun_end, 2)
        context.destroy(0)
    return found


def _step(rig: Rig, members: list[Member], begun: int, found: dict[str, Any]) -> dict[str, Any]:
    """What is to be known at this number of kernels."""
    rig.settle()
    if Variant.of(found["kernel"]).pooled:
        rig.pool.wait_ready()
    starts = sorted(member.took for member in members[begun:])
    before = found["steps"][-1]["footprint"] if found["steps"] else found["before"]["footprint"]
    number = found["steps"][-1]["kernels"] if found["steps"] else 0
    look = _look(rig, members)
    further = (look["footprint"]["pss"] - before["pss"]) / (len(members) - number)
    return {
        "kernels": len(members),
        "start_median": statistics.median(starts),
        "start_p95": percentile(starts, 0.95),
        "starts": [round(start, 4) for start in starts],
        "pss_further": round(further, 2),
        "answers_ms": _in_turn(members[:: max(1, len(members) // SOME)][:SOME]),
        **look,
    }


def _look(rig: Rig, members: list[Member]) -> dict[str, Any]:
    begun = clock()
    pids = rig.processes()
    memory = {
        name: int(value.split()[0]) / 1024
        for name, _, value in (
            line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines()
        )
    }
    return {
        "footprint": footprint(pids).as_json(),
        "machine_mib": {
            name: round(memory[name])
            for name in (
                "MemAvailable",
                "MemFree",
                "Cached",
                "Shmem",
                "PageTables",
                "Slab",
                "KernelStack",
            )
        },
        "looked_for_s": round(clock() - begun, 2),
    }


def _all(rig: Rig, members: list[Member], say: Say) -> dict[str, Any]:
    """All kernels together: idle, and answering."""
    say(f"scale: {len(members)} kernels are idle for {IDLE_SECONDS:g} s")
    pids = rig.processes()
    before, machine, begun = processor_seconds(pids), _machine_busy(), clock()
    time.sleep(IDLE_SECONDS)
    passed = clock() - begun
    cpu = 100 * (processor_seconds(pids) - before) / passed
    busy = 100 * (_machine_busy() - machine) / passed
    say("scale: each answers, one after another, and all at once")
    in_turn = _in_turn(members)
    at_once = [_at_once(members) for _ in range(3)]
    return {
        "kernels": len(members),
        "alive": sum(member.alive for member in members),
        "processes": len(pids),
        "idle_cpu_percent": round(cpu, 2),
        "machine_busy_percent": round(busy, 2),
        "in_turn_ms": in_turn,
        "at_once_ms": at_once,
    }


def _in_turn(members: Iterable[Member]) -> list[float]:
    answers: list[float] = []
    for member in members:
        answers += _at_once([member])
    return answers


def _at_once(members: list[Member]) -> list[float]:
    """Milliseconds until each has answered, since the first was asked; none: -1."""
    poller = zmq.Poller()
    owners: dict[Any, Member] = {}
    for member in members:
        owners |= member.listen(poller)
        member.prepare()
    took = dict.fromkeys(members, -1.0)
    left = len(members)
    begun = clock()
    for member in members:
        member.send()
    while left and (rest := begun + ANSWER_LIMIT - clock()) > 0:
        for socket, _ in poller.poll(rest * 1000):
            member = owners[socket]
            if took[member] < 0 and member.take(socket):
                took[member] = round(1000 * (clock() - begun), 2)
                left -= 1
            elif took[member] >= 0:
                member.take(socket)
    return list(took.values())


def _machine_busy() -> float:
    """Seconds of processor time that anything on this machine has used."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq = map(int, words[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _want_descriptors() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def text(found: dict[str, Any]) -> str:
    """The steps as a table, and the goal."""
    lines = [
        f"Up to {found['wanted']} kernels at once ({found['kernel']})",
        "",
        "| kernels | PSS of a further one, MiB | of it private | start → first result, s (p95) "
        "| `1+1` of some, ms: median, most | all PSS, MiB | available, MiB | processes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    before = found["before"]["footprint"] | {"kernels": 0}
    for step in found["steps"]:
        size = step["footprint"]
        private = (size["private"] - before["private"]) / (step["kernels"] - before["kernels"])
        answers = step["answers_ms"]
        lines.append(
            f"| {step['kernels']} | {step['pss_further']:.1f} | {private:.1f} "
            f"| {step['start_median']:.3f} ({step['start_p95']:.3f}) "
            f"| {statistics.median(answers):.1f}, {max(answers):.1f} | {size['pss']:.0f} "
            f"| {step['machine_mib']['MemAvailable']} | {size['processes']} |"
        )
        before = size | {"kernels": step["kernels"]}
    lines.append("")
    lines += [f"Failed to start, and tried again: {failure}." for failure in found["failed_starts"]]
    if "ended_by" in found:
        lines.append(f"It ended by {found['ended_by']}.")
    if "all" in found:
        lines.append(_closing(found))
    return "\n".join(lines) + "\n"


def _closing(found: dict[str, Any]) -> str:
    data = found["all"]
    in_turn = sorted(data["in_turn_ms"])
    at_once = sorted(data["at_once_ms"][0])
    in_time = sum(0 <= answer <= 1000 * GOAL_ANSWER for answer in at_once)
    again = ", ".join(f"{max(wave):.0f}" for wave in data["at_once_ms"][1:])
    return (
        f"{data['alive']} of {data['kernels']} alive; "
        f"idle CPU of all {data['processes']} processes together "
        f"{data['idle_cpu_percent']:.1f} % of a core "
        f"(the whole machine: {data['machine_busy_percent']:.1f} %). "
        f"Answers one after another: median {statistics.median(in_turn):.1f} ms, "
        f"p95 {percentile(in_turn, 0.95):.1f}, most {in_turn[-1]:.1f}; "
        f"all at once: median {statistics.median(at_once):.0f} ms, "
        f"p95 {percentile(at_once, 0.95):.0f}, most {at_once[-1]:.0f} (again: {again}), "
        f"{in_time} of them within 1 s. Ended in {found['ended_in']:.1f} s. "
        "Goal (all alive, each answers within 1 s of being asked, one after another, idle CPU "
        f"at most one core): {'met' if met(found) else '**not met**'}."
    )


def met(found: dict[str, Any]) -> bool:
    """Whether all that were wanted live, answer in time, and rest.

    Asked all at once they wait for the processors, as any 200 programs would: that is shown, and
    each must answer at all.
    """
    data = found.get("all")
    if not data or "ended_by" in found:
        return False
    return (
        data["alive"] == found["wanted"]
        and all(0 <= answer <= 1000 * GOAL_ANSWER for answer in data["in_turn_ms"])
        and all(answer >= 0 for wave in data["at_once_ms"] for answer in wave)
        and data["idle_cpu_percent"] <= GOAL_CPU
    )


def footprint_of(step: dict[str, Any]) -> Footprint:
    """The memory at a step, as it was written to JSON."""
    return Footprint(**step["footprint"])
