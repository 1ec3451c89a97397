"""The guest agent: PID 1 of the VM, root, out of reach of the user's code.

It boots the guest kernel, wakes the machine when it was cloned, passes interrupts on,
reaps every orphan, and tells the host at once when the guest kernel is gone.  It holds
the warm parent of every guest kernel: the engine and the recipe's preloads are imported
here, and a kernel is a fork of this process that gave up its rights.  So a kernel that
died is replaced in the time of a fork, with the files of the VM as they were.
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import gc
import importlib
import json
import os
import platform
import pwd
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from vmkernel.guest import guard, network, usage, wake, workspace
from vmkernel.guest.files import Files
from vmkernel.guest.port import Port, open_port
from vmkernel.protocol import frames, messages

USER = "user"
CONFIG = Path("/run/vmkernel/config.json")
OUTPUT_TAIL = 16 << 10
GOOD_TIMER = 1.08
REHEARSALS = 16
MOST_REPORT = 1 << 20
"""Bytes that a new guest kernel may say of itself: whoever else is the user may say it for him."""
REAPED_AT_ONCE = 64
"""Dead processes, before the host is listened to again."""
PR_SET_DUMPABLE = 4  # prctl(2)

# Linux, Documentation/admin-guide/sysctl/vm.rst and ABI/stable/sysfs-block
PERIODIC = {
    "/proc/sys/vm/dirty_writeback_centisecs": "0",  # the disk ends with the VM: write when it must
    "/proc/sys/vm/stat_interval": "3600",  # seconds
    "/proc/sys/vm/compaction_proactiveness": "0",  # kcompactd, twice a second
    "/proc/sys/net/ipv4/neigh/default/interval_probe_time_ms": "3600000",  # each is a worker's job
    "/proc/sys/net/ipv6/neigh/default/interval_probe_time_ms": "3600000",
    "/proc/sys/net/ipv4/neigh/default/base_reachable_time_ms": "86400000",
    "/proc/sys/net/ipv6/neigh/default/base_reachable_time_ms": "86400000",
    "/sys/block/vda/queue/wbt_lat_usec": "0",
    "/sys/block/vdb/queue/wbt_lat_usec": "0",
}


class Agent:
    """The supervisor.  One thread, one poll loop."""

    def __init__(self) -> None:
        self.port = Port(open_port("agent"))
        self.kernel_ports = (open_port("kernel"), open_port("control"))
        self.kernel_pid = 0
        self._outputs: dict[str, int] = {}
        self._status = -1
        self._report = b""
        self._oom_kills = 0
        self._meter = usage.Meter()
        self._files = Files(become_user, self._reply)
        self._network = network.Network()
        self._config: dict[str, Any] = {}
        self._machine: wake.Machine
        self._workspace = workspace.current = workspace.Workspace()
        self._template = True  # in the making, until somebody wakes it
        self._signal_read, self._signal_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._signal_write, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def send(self, message: messages.FromAgent) -> None:
        """One message to the host."""
        self.port.send(messages.encode_json(message))

    def run(self) -> NoReturn:
        """Boot the engine, then serve the host for ever."""
        hello = messages.Hello(os.uname().release, platform.python_version(), measure_timer())
        self.send(hello)
        calm_machine()
        guard.close_doors()
        self._machine = wake.Machine()
        self._workspace.prepare(open_port("workspace"))
        try:
            self._config = json.loads(CONFIG.read_text())
            import_engine(self._config)
        except BaseException:
            self.send(messages.Failed("the guest kernel cannot be imported:\n" + _traceback()))
            raise
        self._rehearse_wake()
        guard.stand_above()
        self.start_kernel(None)
        while True:
            # The host goes first: processes that die all the time must not keep it waiting
            sources: dict[int, Callable[[], None]] = {
                self.port.fd: self._receive,
                self._status: self._on_status,
                self._files.fd: self._files.receive,
                self._network.fd: self._network.start,
                self._signal_read: self._reap,
            }
            sources.pop(-1, None)
            poll = select.poll()
            for fd in sources:
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(self._files.time_left())}
            # One at a time: what is done for it may close another
            for fd in [fd for fd in sources if fd in ready][:1]:
                sources[fd]()
            self._files.check()

    # --- the guest kernel ---

    def start_kernel(self, marker: bytes | None) -> None:
        """Fork a guest kernel that gives up root.  It reports through a status pipe."""
        for fd in self._outputs.values():
            os.close(fd)
        if self._status >= 0:  # of one that died and left it to a child of its own
            os.close(self._status)
        out, err = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        status, status_write = os.pipe2(os.O_CLOEXEC)
        self._outputs = {"stdout": out[0], "stderr": err[0]}
        self._oom_kills = oom_kills()
        gc.collect()
        gc.freeze()  # the collector must not write to memory that clones share
        pid = os.fork()
        if pid == 0:
            try:
                # Standard input is at its end: the console is no place for user code to wait at
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out[1], 1)
                os.dup2(err[1], 2)
                become_user()
                # What a fork inherits but user code must not have: the agent's own way to the host
                for fd in (self.port.fd, self._signal_read, self._signal_write, status):
                    os.close(fd)
                self._files.disown()
                self._network.disown()
                self._machine.disown()
                self._workspace.disown()
                if marker is not None:  # what a dead kernel left would hold memory and processor
                    guard.end_the_others()
                run = run_relay if self._config["engine"] == "relay" else run_engine
                run(self.kernel_ports, dict(self._outputs), status_write, marker, self._config)
                os._exit(0)
            except BaseException:
                os.write(status_write, json.dumps({"error": _traceback()}).encode())
                os._exit(1)
        self.kernel_pid = pid
        for fd in (out[1], err[1], status_write):
            os.close(fd)
        self._status, self._report = status, b""
        os.set_blocking(status, False)

    def _on_status(self) -> None:
        chunk = os.read(self._status, 1 << 16)
        self._report += chunk
        if chunk and len(self._report) <= MOST_REPORT:
            return
        os.close(self._status)
        self._status = -1
        try:
            report = messages.decode_object(
                self._report or b'{"error": "it ended before it was ready"}'
            )
        except (ValueError, RecursionError):  # from a process that is the user's
            report = {"error": "it did not say how it is"}
        if "error" in report:
            reason = str(report["error"])[-OUTPUT_TAIL:]
            self.send(messages.Failed("the guest kernel did not start:\n" + reason))
        else:
            if self._template:
                # Again, as the guest kernel shares our memory by now: what this writes to is ours
                self._rehearse_wake()
                self._workspace.hide()
                os.sync()  # a clone has nothing to write back
            self.send(messages.Ready(report))

    def _reap(self) -> None:
        os.read(self._signal_read, 4096)
        for _ in range(REAPED_AT_ONCE):
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.kernel_pid:
                self._on_kernel_death(status)
            elif pid == self._network.pid:
                self._network.ended()
        os.write(self._signal_write, b"\0")  # the pipe was just emptied: there is room

    def _on_kernel_death(self, status: int) -> None:
        self.kernel_pid = 0
        killed = os.WIFSIGNALED(status)
        output = b""
        for fd in self._outputs.values():
            os.set_blocking(fd, False)
            try:
                for _ in range(64):  # a child that lives on may write for ever
                    output = (output + os.read(fd, 1 << 16))[-OUTPUT_TAIL:]
            except BlockingIOError:
                pass
        self.send(
            messages.KernelDied(
                exit_code=None if killed else os.WEXITSTATUS(status),
                signal=os.WTERMSIG(status) if killed else None,
                oom=killed and oom_kills() > self._oom_kills,
                output=output.decode(errors="replace"),
            )
        )

    # --- the host's commands ---

    def _receive(self) -> None:
        for message in self.port.receive():
            self._on_message(message)

    def _on_message(self, message: bytearray) -> None:
        body, buffers = frames.split(message)
        call = messages.decode(body, messages.Call)
        try:
            if isinstance(call.command, messages.FileCommand):
                self._files.submit(call.id, bytes(body), buffers[0] if buffers else b"")
                return  # its reply comes when it comes
            if isinstance(call.command, messages.OpenNetwork):
                self._network.open(call.command.marker, bytes(buffers[0]) if buffers else b"")
            result = self._perform(call.command) or {}
            error = ""
        except Exception as failure:  # whatever it was: the host must hear of it
            result, error = {}, f"{type(failure).__name__}: {failure}"
        self.send(messages.Reply(call.id, error, result))

    def _reply(self, number: int, result: dict[str, Any], data: memoryview) -> None:
        """Answer a command about files, with the bytes of one."""
        self.port.send(messages.encode_json(messages.Reply(number, "", result)), (data,))

    def _perform(self, command: messages.Command) -> dict[str, Any] | None:
        match command:
            case messages.Wake():
                self._template = False
                self._machine.wake(command.time_ns, command.entropy, command.hostname)
            case messages.ShowWorkspace():
                self._workspace.show(command.path, command.writable)
            case messages.SetClock():
                wake.set_clock(command.time_ns)
            case messages.Interrupt():
                if not self.kernel_pid:
                    raise ProcessLookupError("there is no guest kernel")
                os.killpg(self.kernel_pid, signal.SIGKILL if command.kill else signal.SIGINT)
            case messages.StartKernel():
                if self.kernel_pid:
                    raise RuntimeError("the guest kernel is still there")
                self.start_kernel(command.marker)
            case messages.Stats():
                return self._meter.measure(self.kernel_pid)
        return None

    def _rehearse_wake(self) -> None:
        """Do what every clone does first, so that no clone has to build decoders and caches for it.

        (A decoder is compiled from its type at first use: 80 ms and more under emulation.)
        Again and again, on a socket of our own: what is done often, Python does in another way
        (PEP 659).
        """
        usual, template = self.port, self._template
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            self.port = Port(ours.fileno())
            for _ in range(REHEARSALS):
                command = messages.Wake(time.time_ns(), os.urandom(64), os.uname().nodename)
                body = messages.encode_json(messages.Call(0, command))
                theirs.sendall(b"".join(frames.encode(body)))
                self._receive()
                reply = messages.decode(theirs.recv(1 << 16)[8:], messages.Reply)
                assert not reply.error, reply.error
                self._rehearse_workspace(theirs)
        self.port, self._template = usual, template

    def _rehearse_workspace(self, theirs: socket.socket) -> None:
        """Show the workspace, as a clone does next; it stays for the guest kernel's rehearsal."""
        if self._workspace.problem:
            return
        self._workspace.hide()
        command = messages.ShowWorkspace(os.fsencode(workspace.REHEARSAL), False)
        body = messages.encode_json(messages.Call(0, command))
        theirs.sendall(b"".join(frames.encode(body)))
        self._receive()
        reply = messages.decode(theirs.recv(1 << 16)[8:], messages.Reply)
        assert not reply.error, reply.error


def measure_timer() -> float:
    """How long a sleep takes, as a multiple of what is asked for: 1.0 and a little.

    Linux measures the local APIC's timer against the TSC for a tenth of a second as it boots
    (calibrate_APIC_clock in its arch/x86/kernel/apic/apic.c).  On a host that is busy just then it
    finds a wrong rate, and all later sleeps take too long.  The clock is right all the same.
    """
    best = float("inf")
    for _ in range(8):  # a busy host makes single ones late, too
        began = time.monotonic()
        time.sleep(0.1)
        best = min(best, (time.monotonic() - began) / 0.1)
        if best < GOOD_TIMER:
            break
    return best


def import_engine(config: dict[str, Any]) -> None:
    """Import what every guest kernel needs, so that its forks have it."""
    os.environ["HOME"] = pwd.getpwnam(USER).pw_dir
    tempfile.gettempdir()  # looks for it by writing: a kernel must start on a full disk, too
    if config["engine"] == "relay":
        importlib.import_module("vmkernel.guest.relay")
        return
    preload = config["preload"]
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    importlib.import_module("vmkernel.guest.engine")
    # Who asks while it is imported whether this is a notebook is told so, though the shell is yet
    # to come: pandas, how many columns to show.
    builtins.get_ipython = lambda: SimpleNamespace(kernel=None)  # type: ignore[attr-defined]
    for name in ("jedi", "IPython.core.pylabtools", "pexpect", *preload):
        try:
            importlib.import_module(name)
        except ImportError:
            if name in preload:
                raise
    del builtins.get_ipython  # type: ignore[attr-defined]


def calm_machine() -> None:
    """Turn off what Linux does now and then: a VM that waits should sleep.

    Under emulation the first second of a clone would otherwise go into catching up with it, and
    each idle VM would use half a per cent of a core.
    """
    for path, value in PERIODIC.items():
        with suppress(OSError):  # another kernel may lack it
            Path(path).write_text(value)


def become_user() -> None:
    """Give up root for good, in a session of one's own.  Call in the forked child."""
    user = pwd.getpwnam(USER)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    Path("/proc/self/oom_score_adj").write_text("500")
    guard.bind_user()
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    # A process that changed its uid is not dumpable: /proc/self would belong to root
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    os.environ.update(USER=USER, LOGNAME=USER, SHELL="/bin/bash", HOME=user.pw_dir)
    if os.listdir("/sys/class/net") == ["lo"]:
        # Without a network pip is to say so at once: one retry, which names the cause.  A VM that
        # has one is told another index as it wakes
        os.environ.update(
            PIP_RETRIES="1", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_INDEX_URL=network.NO_INDEX
        )
    os.umask(0o022)
    os.chdir(user.pw_dir)


def report_ready(status: int, kernel_info: dict[str, Any]) -> None:
    """Tell the agent, by the pipe ``status``, that the guest kernel waits for requests."""
    os.write(status, json.dumps(kernel_info).encode())
    os.close(status)


def run_engine(
    ports: tuple[int, int],
    outputs: dict[str, int],
    status: int,
    marker: bytes | None,
    config: dict[str, Any],
) -> None:
    """Be the guest kernel, on the ports "kernel" and "control".

    Returns when the user asked it to exit.
    """
    from vmkernel.guest.engine import Engine, prepare_path

    prepare_path(without="/run/vmkernel")
    sys.argv = ["vmkernel"]
    engine = Engine(*ports, outputs)
    if marker is not None:
        engine.resync(marker)

    engine.run(functools.partial(report_ready, status), warm_up=marker is None)


def run_relay(
    ports: tuple[int, int],
    outputs: dict[str, int],
    status: int,
    marker: bytes | None,
    config: dict[str, Any],
) -> NoReturn:
    """Stand between the ports and the kernel that the recipe names; end as that kernel ends."""
    from vmkernel.guest import relay

    ready = False

    def on_ready(kernel_info: dict[str, Any]) -> None:
        nonlocal ready
        ready = True
        report_ready(status, kernel_info)

    try:
        engine = relay.Relay(ports, outputs, relay.read_recipe(config["relay"]))
        if marker is not None:
            engine.resync(marker)
        end = engine.run(on_ready, template=marker is None)
        if not ready:
            raise RuntimeError(f"the kernel ended before it was ready: {end}")
    except BaseException:
        traceback.print_exc()  # for the news of our death
        if not ready:
            raise
        os._exit(1)
    relay.end_like(end)


def oom_kills() -> int:
    """How often this guest's kernel has killed a process for lack of memory (proc(5))."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def _traceback() -> str:
    return traceback.format_exc()[-OUTPUT_TAIL:]


def main() -> NoReturn:
    """PID 1.  Whatever goes wrong is printed to the console, and the VM ends."""
    try:
        Path("/proc/self/oom_score_adj").write_text("-1000")
        Agent().run()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os.sync()
    os._exit(1)  # the kernel panics when PID 1 ends: QEMU exits, and the host is told
