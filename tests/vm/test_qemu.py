"""A real QEMU: how it starts, what it inherits, how it dies, and how its state is kept."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import psutil
import pytest
import pytest_asyncio

from vmkernel.errors import TemplateError, VmBootError, VmGuestError
from vmkernel.vm import accel
from vmkernel.vm.command import Machine, qemu_argv
from vmkernel.vm.console import ConsoleLog
from vmkernel.vm.limits import Limits, start_command
from vmkernel.vm.loading import StateLoader, request_load
from vmkernel.vm.monitor import Monitor, save_state
from vmkernel.vm.qemu import QemuProcess, find_qemu

pytestmark = [pytest.mark.vm, pytest.mark.timeout(60)]
PATH = os.environ.get("PATH", os.defpath)
LIMITS = Limits(512)
NAMES = ("monitor", "kernel", "agent", "control", "workspace", "network", "console")


class Bench:
    """Starts machines that have no guest: QEMU itself is what is tested here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.qemu = find_qemu("qemu-system-x86_64", PATH)
        self.processes: list[QemuProcess] = []
        self.monitors: list[Monitor] = []
        self.sockets: list[socket.socket] = []
        self.ram = directory / "ram"
        self.rootfs = directory / "rootfs"
        self.rootfs.write_bytes(bytes(1 << 20))

    def start(
        self, *extra: str, keep: tuple[int, ...] = (), **changes: object
    ) -> tuple[QemuProcess, socket.socket]:
        """A QEMU, and our end of its monitor."""
        pairs = {name: socket.socketpair() for name in NAMES}
        scratch = os.open(self.directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.truncate(scratch, 1 << 20)
        machine = msgspec.structs.replace(
            Machine(
                vm_id="test",
                qemu=self.qemu,
                accelerator="tcg",
                memory_mib=64,
                vcpus=1,
                cmdline="",
                kernel=None,
                initrd=None,
                rootfs=str(self.rootfs),
                scratch_fd=scratch,
                scratch_format="raw",
                ram_path=str(self.ram),
                ram_share=True,
                incoming=False,
                monitor_fd=pairs["monitor"][1].fileno(),
                kernel_port_fd=pairs["kernel"][1].fileno(),
                agent_port_fd=pairs["agent"][1].fileno(),
                control_port_fd=pairs["control"][1].fileno(),
                workspace_port_fd=pairs["workspace"][1].fileno(),
                network_port_fd=pairs["network"][1].fileno(),
                console_fd=pairs["console"][1].fileno(),
            ),
            **changes,
        )
        with self.ram.open("ab") as ram:
            ram.truncate(machine.memory_mib << 20)
        try:
            process = QemuProcess.spawn(
                [*qemu_argv(machine), *extra],
                pass_fds=(*machine.fds(), *keep),
                log_path=self.directory / "qemu.log",
                limits=LIMITS,
            )
        finally:
            os.close(scratch)
            for _, theirs in pairs.values():
                theirs.close()
        self.sockets += [ours for ours, _ in pairs.values()]
        self.processes.append(process)
        process.watch()
        return process, pairs["monitor"][0]

    async def start_and_greet(
        self, *extra: str, keep: tuple[int, ...] = (), **changes: object
    ) -> tuple[QemuProcess, Monitor]:
        process, sock = self.start(*extra, keep=keep, **changes)
        monitor = await Monitor.open(sock)
        self.monitors.append(monitor)
        return process, monitor

    async def close(self) -> None:
        for process in self.processes:
            await process.close()
        for monitor in self.monitors:
            await monitor.close()
        for sock in self.sockets:
            sock.close()


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncGenerator[Bench, None]:
    bench = Bench(tmp_path)
    yield bench
    await bench.close()


def open_files(pid: int | str) -> dict[int, str]:
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[int(link.name)] = str(link.readlink())
    return found


def is_gone(pid: int) -> bool:
    """Dead; a zombie holds nothing, and how soon it is reaped is its new parent's affair."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def seccomp_mode(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Seccomp:"))


def bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


class TestStart:
    async def test_it_inherits_what_was_listed_and_nothing_else(self, bench: Bench) -> None:
        wanted_read, wanted_write = os.pipe()
        leak_read, leak_write = os.pipe()
        for fd in (leak_read, leak_write):
            os.set_inheritable(fd, True)  # what a careless library leaves behind
        try:
            process, _ = await bench.start_and_greet(keep=(wanted_write,))
            theirs, mine = open_files(process.pid), open_files("self")
        finally:
            for fd in (wanted_read, wanted_write, leak_read, leak_write):
                os.close(fd)
        assert theirs[0] == "/dev/null"
        assert mine[wanted_write] in theirs.values()
        assert mine[leak_write] not in theirs.values()

    async def test_it_stands_alone_and_fenced_in(self, bench: Bench) -> None:
        process, _ = await bench.start_and_greet()
        assert seccomp_mode(process.pid) == "2"  # a filter
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        qemu = psutil.Process(process.pid)
        assert qemu.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert qemu.cwd() == "/"
        # The shell adds some of its own.
        assert qemu.environ().keys() <= {"LC_ALL", "PWD", "OLDPWD", "SHLVL", "_"}

    async def test_it_starts_without_an_event_loop_and_can_be_given_up(self, bench: Bench) -> None:
        process = QemuProcess.spawn(
            [bench.qemu, "-S", "-display", "none"],
            pass_fds=(),
            log_path=bench.directory / "log",
            limits=LIMITS,
        )
        process.abandon()
        assert not psutil.pid_exists(process.pid)
        assert "ended -9" in repr(process)

    def test_no_such_program_is_an_error_that_says_what_to_install(self, tmp_path: Path) -> None:
        for name in ("no-such-qemu", "/no/such/qemu", str(tmp_path)):
            with pytest.raises(VmBootError, match="QEMU was not found") as caught:
                find_qemu(name, PATH)
            assert "apt install qemu-system-x86" in caught.value.hint
        with pytest.raises(VmBootError):
            QemuProcess.spawn(
                ["/no/such/qemu"], pass_fds=(), log_path=tmp_path / "log", limits=LIMITS
            )

    def test_a_closed_directory_on_the_path_is_passed_over(self, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0)
        assert find_qemu("qemu-system-x86_64", f"{closed}:{PATH}") == find_qemu(
            "qemu-system-x86_64", PATH
        )


class TestEnd:
    async def test_a_bad_option_ends_it_at_once_with_its_words(self, bench: Bench) -> None:
        process, sock = bench.start("-no-such-option")
        with pytest.raises(VmBootError, match="did not answer"):
            await Monitor.open(sock)
        assert await process.wait() == 1
        error = process.failure("The VM did not start")
        assert "QEMU ended with status 1" in str(error)
        assert "-no-such-option: invalid option" in str(error)
        assert error.hint
        assert error.log_path == bench.directory / "qemu.log"

    async def test_too_little_host_memory_is_told_with_a_hint(self, bench: Bench) -> None:
        process, _ = bench.start("-object", "memory-backend-ram,id=big,size=900T,prealloc=on")
        await process.wait()
        error = process.failure("The VM did not start")
        assert "Cannot allocate memory" in str(error)
        assert "VMKERNEL_MEMORY" in error.hint

    async def test_a_kill_is_noticed_within_a_second(self, bench: Bench) -> None:
        process, _ = await bench.start_and_greet()
        began = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        assert time.monotonic() - began < 1
        assert "signal 9" in str(process.failure("The VM died", VmGuestError))

    async def test_closing_twice_is_closing(self, bench: Bench) -> None:
        process, _ = await bench.start_and_greet()
        assert await process.close() == await process.close() == -signal.SIGKILL
        process.kill()

    async def test_words_without_end_do_not_fill_the_disk_or_stop_it(self, tmp_path: Path) -> None:
        script = (
            "i=0; while [ $i -lt 40 ]; do head -c 65536 /dev/zero >&2; i=$((i+1)); done; exit 3"
        )
        process = QemuProcess.spawn(
            ["/bin/sh", "-c", script],
            pass_fds=(),
            log_path=tmp_path / "qemu.log",
            limits=LIMITS,
        )
        process.watch()
        await asyncio.sleep(0.2)
        async with asyncio.timeout(10):
            assert await process.close() in (3, -9)
        assert bytes_in(tmp_path) < 300_000

    @pytest.mark.parametrize("cause", [signal.SIGKILL, signal.SIGTERM])
    def test_it_dies_with_its_parent(
        self, bench_script: list[str], cause: signal.Signals, wait_until: Callable[..., None]
    ) -> None:
        with subprocess.Popen(bench_script, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            qemu = int(parent.stdout.readline())
            assert not is_gone(qemu)
            parent.send_signal(cause)
            wait_until(lambda: is_gone(qemu), 1, "QEMU is gone")

    def test_an_interrupt_of_the_process_group_does_not_reach_it(
        self, bench_script: list[str]
    ) -> None:
        with subprocess.Popen(
            bench_script, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as parent:
            assert parent.stdout is not None
            qemu = int(parent.stdout.readline())
            os.killpg(parent.pid, signal.SIGINT)  # the script ignores it
            time.sleep(0.3)
            assert not is_gone(qemu)
            parent.kill()

    def test_it_does_not_start_for_a_parent_that_is_gone(self) -> None:

        stale = subprocess.run(
            start_command(["/bin/echo", "started"], LIMITS, None, parent=1),
            capture_output=True,
            check=False,
        )
        assert (stale.returncode, stale.stdout) == (1, b"")


@pytest.fixture
def bench_script(tmp_path: Path) -> list[str]:
    """A program that starts a QEMU, prints its process id, and waits."""
    script = tmp_path / "parent.py"
    script.write_text(f"""
import signal, time
from pathlib import Path
from vmkernel.vm.limits import Limits
from vmkernel.vm.qemu import QemuProcess, find_qemu
signal.signal(signal.SIGINT, signal.SIG_IGN)
argv = [find_qemu("qemu-system-x86_64", {PATH!r}), "-M", "microvm", "-S", "-nodefaults",
        "-display", "none"]
log = Path({str(tmp_path)!r}) / "qemu.log"
process = QemuProcess.spawn(argv, pass_fds=(), log_path=log, limits=Limits(512))
while "qemu" not in Path(f"/proc/{{process.pid}}/comm").read_text():
    time.sleep(0.01)
time.sleep(0.2)
print(process.pid, flush=True)
time.sleep(60)
""")
    return [sys.executable, str(script)]


class TestMonitor:
    async def test_a_refused_command_says_why_and_is_kept_for_the_report(
        self, bench: Bench
    ) -> None:
        _, monitor = await bench.start_and_greet()
        assert (await monitor.execute("query-status"))["running"] is True
        with pytest.raises(VmGuestError, match="no-such-command"):
            await monitor.execute("no-such-command")
        assert "> query-status" in monitor.recent()
        assert "> no-such-command" in monitor.recent()
        await monitor.execute("query-status")

    async def test_a_qemu_that_dies_ends_what_waits_for_it(self, bench: Bench) -> None:
        process, monitor = await bench.start_and_greet()
        os.kill(process.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(monitor.execute("query-status"))
        await asyncio.sleep(0.1)
        process.kill()
        with pytest.raises(VmGuestError):
            await asyncio.wait_for(waiting, 1)
        with pytest.raises(VmGuestError):
            await monitor.execute("query-status")
        await monitor.close()

    async def test_a_qemu_that_says_nothing_is_not_waited_for_for_ever(self, bench: Bench) -> None:
        process, monitor = await bench.start_and_greet()
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(VmGuestError, match="no answer in time"):
            await monitor.execute("query-status", timeout=0.1)
        ours, theirs = socket.socketpair()
        with pytest.raises(VmBootError, match="no answer in time"):
            await Monitor.open(ours, timeout=0.1)
        theirs.close()

    async def test_opening_can_be_cancelled(self) -> None:
        ours, theirs = socket.socketpair()
        opening = asyncio.create_task(Monitor.open(ours))
        await asyncio.sleep(0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert theirs.recv(1) == b""
        theirs.close()

    async def test_events_do_not_pile_up(self, bench: Bench) -> None:
        _, monitor = await bench.start_and_greet()
        for _ in range(60):
            await monitor.execute("stop")
            await monitor.execute("cont")
        assert "* RESUME" in monitor.recent()
        assert len(monitor.recent().splitlines()) <= 40


class TestState:
    async def save(self, bench: Bench, path: Path) -> None:
        process, monitor = await bench.start_and_greet()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        await save_state(monitor, fd)
        os.close(fd)
        assert (await monitor.execute("query-status"))["status"] == "postmigrate"
        await process.close()

    async def load(self, bench: Bench, path: Path, **changes: object) -> QemuProcess:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            process, sock = bench.start(keep=(fd,), ram_share=False, incoming=True, **changes)
            request_load(sock, fd)
        finally:
            os.close(fd)
        loader = StateLoader(sock)
        await loader.wait(10)
        monitor = await Monitor.open(loader.release(), greeted=True)
        bench.monitors.append(monitor)
        assert (await monitor.execute("query-status"))["status"] == "running"
        return process

    async def test_two_clones_of_one_state_run_at_once(self, bench: Bench, tmp_path: Path) -> None:
        state = tmp_path / "state"
        await self.save(bench, state)
        assert state.stat().st_size < 1 << 20  # the devices' state, not the memory
        first = await self.load(bench, state)
        second = await self.load(bench, state)
        assert first.returncode is second.returncode is None

    async def test_a_cut_or_foreign_state_is_an_error(self, bench: Bench, tmp_path: Path) -> None:
        state, damaged = tmp_path / "state", tmp_path / "damaged"
        await self.save(bench, state)
        whole = state.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"not a state at all" * 100):
            damaged.write_bytes(content)
            with pytest.raises(TemplateError, match="could not be loaded") as caught:
                await self.load(bench, damaged)
            assert caught.value.hint

    async def test_a_state_of_another_machine_is_an_error(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        await self.save(bench, tmp_path / "state")
        with pytest.raises(TemplateError):
            await self.load(bench, tmp_path / "state", memory_mib=128)

    async def test_a_disk_that_is_full_is_an_error_and_not_a_short_state(
        self, bench: Bench
    ) -> None:
        _, monitor = await bench.start_and_greet()
        fd = os.open("/dev/full", os.O_WRONLY)
        with pytest.raises(TemplateError, match="could not be saved"):
            await save_state(monitor, fd)
        os.close(fd)

    async def test_a_qemu_that_dies_meanwhile_is_an_error(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        read_end, write_end = os.pipe()  # nobody reads: the saving never ends
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
        process, monitor = await bench.start_and_greet()
        saving = asyncio.create_task(save_state(monitor, write_end))
        await asyncio.sleep(0.3)
        assert not saving.done()
        process.kill()
        with pytest.raises(TemplateError, match="could not be saved"):
            await asyncio.wait_for(saving, 1)
        os.close(read_end)
        os.close(write_end)


class TestConsoleLog:
    def test_head_and_tail_are_kept_within_the_bound(self, tmp_path: Path) -> None:
        log = ConsoleLog(tmp_path / "console.log", 4000)
        for number in range(10_000):
            log.feed(b"line %05d\n" % number)
            if number % 1000 == 0:
                assert bytes_in(tmp_path) <= 4000
        assert log.text(100).endswith("line 09999\n")
        assert log.text().startswith("line 00000\n")
        log.close()
        assert [path.name for path in tmp_path.iterdir()] == ["console.log"]
        text = log.path.read_text()
        assert len(text) <= 4100
        assert text.startswith("line 00000\n")
        assert text.endswith("line 09999\n")
        assert "bytes left out ...]" in text
        assert log.total == 110_000

    @pytest.mark.parametrize("size", [0, 1, 1999, 2000, 2001, 3000, 4000])
    def test_what_fits_is_kept_whole(self, tmp_path: Path, size: int) -> None:
        log = ConsoleLog(tmp_path / "console.log", 4000)
        data = os.urandom(size)
        for at in range(0, size, 700):
            log.feed(data[at : at + 700])
        log.close()
        log.close()
        assert (log.path.read_bytes() if size else b"") == data

    async def test_a_flood_does_not_stop_the_writer_or_the_loop(self, tmp_path: Path) -> None:
        ours, theirs = socket.socketpair()
        log = ConsoleLog(tmp_path / "console.log", 100_000)
        log.drain(ours.detach(), asyncio.get_running_loop())
        writer = await asyncio.create_subprocess_exec(
            "head", "-c", "30000000", "/dev/zero", stdout=theirs.fileno()
        )
        theirs.close()
        async with asyncio.timeout(20):
            assert await writer.wait() == 0
        log.close()
        assert log.total == 30_000_000
        assert log.path.stat().st_size < 100_200

    async def test_a_full_disk_loses_the_log_and_nothing_else(self) -> None:
        ours, theirs = socket.socketpair()
        log = ConsoleLog(Path("/dev/full"), 100_000)
        log.drain(ours.detach(), asyncio.get_running_loop())
        theirs.sendall(b"words")
        await asyncio.sleep(0.1)
        assert log.total == 5
        assert log.write_error is not None
        theirs.close()
        log.close()


async def test_kvm_is_judged_by_what_a_real_qemu_does(bench: Bench) -> None:
    """On hosts where /dev/kvm lies, QEMU aborts; its words are the evidence."""
    problem = accel.kvm_problem()
    if problem:
        pytest.skip(problem)

    async def boot() -> None:
        process, sock = bench.start(accelerator="kvm")
        try:
            await Monitor.open(sock)
            with contextlib.suppress(TimeoutError):
                raise process.failure(f"ended {await asyncio.wait_for(process.wait(), 1)}")
        except VmBootError as error:
            await process.wait()
            raise process.failure("KVM") from error

    works, evidence, final = await accel.prove_kvm(boot, 15)
    assert evidence
    assert final
    assert works or "QEMU" in evidence
