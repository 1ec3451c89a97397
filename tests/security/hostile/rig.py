"""The rig: a hostile kernel under a memory limit, an honest one beside it, and what must hold."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import zmq
from hostile.attack import DIED, SERVED, STOPPED, Attack
from kernel_client import Cell, Kernel, Message

from vmhost import VmHost
from vmkernel.kernel.wrapper import IOPUB_TYPES
from vmkernel.text import is_harmless

LIMIT = 1 << 30
"""Bytes of memory that the wrapper may have to write to (RLIMIT_DATA)."""
PATIENCE = 15.0
"""Seconds in which anything must be answered that has nothing to do with the attack.  On a quiet
machine it takes milliseconds; here others run, too."""
HONEST = "an honest cell"


def spec(kernels: Path, name: str, limit: int = LIMIT) -> str:
    """Install a kernelspec whose wrapper has a memory limit."""
    from vmkernel.cli.install import install_kernelspec

    target = install_kernelspec(kernels, name=name, options={})
    found = json.loads((target / "kernel.json").read_text())
    # The soft limit only: QEMU, which inherits it, gets one of its own
    found["argv"] = ["prlimit", f"--data={limit}:", "--", *found["argv"]]
    (target / "kernel.json").write_text(json.dumps(found))
    return name


class Victim(Kernel):
    """A wrapper kernel whose guest is hostile."""

    def __init__(self, name: str, host: VmHost, env: dict[str, str]) -> None:
        self.host = host
        self._sent: set[str] = set()
        super().__init__(name, env={**host.env, **env})
        self.process = psutil.Process(self.pid)
        self.unlawful: list[str] = []

    def on_message(self, channel: str, message: Message) -> None:
        """Whatever a front end gets must be one of what the host lets through."""
        msg_type = message["msg_type"]
        if channel == "iopub" and msg_type not in IOPUB_TYPES | {
            "status", "iopub_welcome", "shutdown_reply"
        }:  # fmt: skip
            self.unlawful.append(f"{msg_type} on {channel}")

    def peak(self) -> int:
        """MiB that the wrapper had resident at most since this was last asked (proc(5))."""
        proc = Path(f"/proc/{self.pid}")
        status = (proc / "status").read_text()
        (proc / "clear_refs").write_text("5")
        return int(status.split("VmHWM:")[1].split()[0]) >> 10

    @property
    def qemus(self) -> list[int]:
        """Its VMs."""
        return [
            child.pid for child in self.process.children(recursive=True) if "qemu" in child.name()
        ]

    @property
    def alive(self) -> bool:
        """Whether the wrapper runs."""
        return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE

    def check_responsive(self) -> float:
        """The heartbeat, and a question on sockets of its own that the host answers itself.

        How many seconds they took: apart from the other sockets, where a flood may be on the way.
        """
        began = time.monotonic()
        info = self.manager.get_connection_info()
        context = zmq.Context.instance()
        with context.socket(zmq.REQ) as heart, context.socket(zmq.DEALER) as control:
            heart.linger = control.linger = 0
            heart.connect(f"tcp://{info['ip']}:{info['hb_port']}")
            control.connect(f"tcp://{info['ip']}:{info['control_port']}")
            heart.send(b"alive?")
            self.raw.session.send(control, "kernel_info_request", {})
            assert heart.poll(PATIENCE * 1000), "the heart stood still"
            assert control.poll(PATIENCE * 1000), "a question on control was not answered"
            _, reply = self.raw.session.recv(control)
            assert reply["content"]["status"] == "ok"
        return time.monotonic() - began

    def check_honest(self, text: str = HONEST) -> Cell:
        """A cell that attacks nobody runs as it should."""
        cell = self.run(text, seconds=60)
        reason = str(cell.reply.get("evalue"))
        if "state is lost" in reason or "The VM was given up" in reason:
            cell = self.run(text, seconds=60)  # the attack had its end in this cell's time
        assert cell.status == "ok", cell
        check_lawful(cell)
        assert cell.stdout.endswith(text), cell
        return cell


def check_lawful(cell: Cell) -> None:
    """One busy, one idle, one reply; and all of it by the host's session."""
    states = [content["execution_state"] for content in cell.contents("status")]
    assert states == ["busy", "idle"], states
    assert len(cell.replies) == 1
    sessions = {message["header"]["session"] for message in (*cell.messages, *cell.replies)}
    assert len(sessions) == 1, sessions


def outcome(cell: Cell) -> str:
    """How an attack ended, by what its cell was told."""
    reply = cell.reply
    if reply["status"] == "ok":
        return SERVED
    shown = "\n".join(map(str, reply.get("traceback", ())))
    assert reply["ename"] in ("VmGuestError", "NotImplementedError"), (reply["ename"], shown)
    if reply["ename"] == "NotImplementedError":
        return SERVED
    assert "What to do:" in shown, shown
    if "variables and files" in shown:
        return STOPPED
    assert "guest kernel" in shown, shown
    return DIED


class Rig:
    """One hostile kernel, replaced when it is gone, and an honest one beside it."""

    def __init__(self, name: str, host: VmHost, env: dict[str, str], beside: Kernel) -> None:
        self.name, self.host, self.env = name, host, env
        self.beside = beside
        self._victim: Victim | None = None
        self.figures: list[tuple[str, str, int, float, float]] = []
        """name, end, MiB, seconds, and the longest wait for an answer of the host meanwhile"""

    def victim(self) -> Victim:
        """The shared one."""
        if self._victim is None or not self._victim.alive:
            self._victim = self.start()
        return self._victim

    def start(self, **env: str) -> Victim:
        """One for a test of its own."""
        return Victim(self.name, self.host, {**self.env, **env})

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        """The kernel beside answers what it is asked meanwhile."""
        cell = self.beside.send("6 * 7", allow_stdin=False)
        yield
        self.beside.finish(cell, PATIENCE)
        assert cell.result == "42"

    def run(self, attack: Attack) -> Cell:
        """Let an attack happen in the shared kernel, and check all that must hold afterwards."""
        victim = self.victim()
        try:
            return self._run(victim, attack)
        except BaseException:
            self._victim = None  # the next attack gets another one
            victim.shut_down()
            raise

    def _run(self, victim: Victim, attack: Attack) -> Cell:
        victim.unlawful.clear()
        victim.peak()
        began = time.monotonic()
        waits: list[float] = []
        with self.unharmed():
            cell = victim.send(attack.code, allow_stdin=False)
            while not cell.done:
                assert time.monotonic() - began < attack.seconds, f"no end: {cell}"
                waits.append(victim.check_responsive())
                victim.listen(0.05)
            how = outcome(cell)
            waits.append(victim.check_responsive())
        peak = victim.peak()
        self.figures.append((attack.name, how, peak, time.monotonic() - began, max(waits)))
        check_lawful(cell)
        if how != SERVED:  # then all that is shown of the end is the host's word
            (error,) = cell.contents("error")
            shown = re.sub(r"\x1b\[3[129]m", "", "\n".join(error["traceback"]))
            assert is_harmless(shown), shown
        victim.check_honest()
        assert how in attack.ends, (how, cell.reply)
        assert re.search(attack.says, cell.stdout + str(cell.reply.get("evalue"))), cell.stdout
        assert not victim.unlawful
        assert peak < attack.peak, f"the wrapper took {peak} MiB"
        assert len(victim.qemus) == 1
        return cell

    def close(self) -> None:
        """End the shared kernel."""
        if self._victim is not None:
            self._victim.shut_down()

    def report(self) -> str:
        """A line for each attack."""
        return "\n".join(
            f"{name:70} {how:8} {peak:5} MiB {seconds:6.1f} s {wait:5.1f} s"
            for name, how, peak, seconds, wait in self.figures
        )


def memory_of(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as variables of the environment."""
    return {f"VMKERNEL_{name.upper()}": str(value) for name, value in settings.items()}
