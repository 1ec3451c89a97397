"""One QEMU process: start it quickly, die together, notice its end at once.

Where it stands: ``vm.command`` says with which arguments, ``vm.machine`` and ``vm.template`` own
the process; ``vm.monitor`` talks to it.

How it is started. ``posix_spawn`` of ``setpriv --pdeathsig KILL /bin/sh -c 'check; exec qemu'``,
or, where there is a wall to stand behind it (``vm.wall``), `exec bwrap … qemu`.
Measured (2 cores, until the started program runs): 3.3 ms, without any import; ``subprocess`` with
``preexec_fn`` and ctypes for prctl: 23-50 ms in a fresh interpreter, 8 ms in one that has them
imported, and it runs Python between fork and exec. So a wrapper kernel can start its VM before it
imports asyncio: `QemuProcess.spawn` needs no event loop, `QemuProcess.watch` joins one later.

Each step guards against something:

* ``setsid``: Ctrl-C in a terminal, or a front end's interrupt, signals the wrapper's whole process
  group; QEMU would quit on SIGINT.
* ``PR_SET_PDEATHSIG`` (setpriv): the VM dies in the instant its wrapper dies, by whatever cause.
  The kernel watches the *thread* that spawned, not the process: spawn from the main thread.
* the shell's ``$PPID`` check: had the wrapper died before ``prctl`` was called, no signal would
  ever come.
* ``ulimit -c 0``: a core dump would put the guest's memory on the host's disk.
* limits on memory and processor time (``vm.limits``): a QEMU gone wrong harms itself only.
* only listed descriptors: a slot's lock in a sibling would hold that slot for ever.
* an empty environment and ``/`` as directory: nothing of the user's goes to where a hostile guest
  might read, and no notebook's disk is kept from being unmounted.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmkernel.errors import VmBootError, VmError, VmGuestError
from vmkernel.vm.console import ConsoleLog
from vmkernel.vm.limits import (
    SETPRIV,
    Holder,
    Limits,
    find_holder,
    start_command,
    start_environment,
)

if TYPE_CHECKING:
    import asyncio

_LOG_CAP = 256 * 1024
_SIGILL = 4
_SIGKILL = 9
_SIGBUS = 7
_BY_SIGNAL = 128
"""An exit status above it is a signal's number and this, as shells have it."""
_END_SECONDS = 2.0
"""How long our child may take to end behind what it started."""
_ALL_SIGNALS = [number for number in range(1, 32) if number not in (9, 19)]

INSTALL_QEMU = "Install QEMU: sudo apt install qemu-system-x86"

# What QEMU says on stderr -> what to do about it.
_HINTS = (
    *(
        (sign, "Set VMKERNEL_CPU_QUOTA=none, or make systemd-run work (`vmkernel doctor`)")
        for sign in ("transient scope", "connect to bus")
    ),
    ("bwrap: ", "Set VMKERNEL_SANDBOX=off, or see what `vmkernel doctor` says of the sandbox"),
    ("Could not access KVM kernel module", "Set VMKERNEL_ACCELERATOR=tcg, or make /dev/kvm usable"),
    ("failed to set MSR", "KVM does not work on this machine: set VMKERNEL_ACCELERATOR=tcg"),
    ("kvm", "Set VMKERNEL_ACCELERATOR=tcg, or see `vmkernel doctor`"),
    ("Cannot allocate memory", "Free memory on the host, or make VMKERNEL_MEMORY smaller"),
    ("No space left", "Free space in the cache and runtime directories"),
    ("Permission denied", "Check who owns the files named above"),
)


def find_qemu(name: str, search_path: str) -> str:
    """The absolute path of ``name`` (a path, or a name looked for in ``search_path``).

    Raises VmBootError when there is no such program. (``shutil.which`` costs 6 ms of imports.)
    """
    if "/" in name:
        candidates = [Path(name).absolute()]
    else:
        candidates = [Path(entry, name).absolute() for entry in search_path.split(":") if entry]
    for path in candidates:
        # access first: Path.is_file raises for a directory on PATH that we may not enter.
        if os.access(path, os.X_OK) and path.is_file():
            return str(path)
    raise VmBootError(
        f"QEMU was not found: no program {name!r}",
        hint=f"{INSTALL_QEMU}; or name it with VMKERNEL_QEMU",
    )


class QemuProcess:
    """A running (or ended) QEMU. ``repr`` shows which."""

    def __init__(
        self, pid: int, pidfd: int, stderr_fd: int, log_path: Path, *, enclosed: bool = False
    ) -> None:
        self.pid = pid
        """Of our child: QEMU, or what is around it."""
        # The wall's shell writes an empty line, to see whether we live (`vm.wall`)
        self.log = ConsoleLog(log_path, _LOG_CAP, skip=1 if enclosed else 0)
        """QEMU's stdout and stderr."""
        self.returncode: int | None = None
        """Exit status, or minus the signal's number; None while it runs."""
        self._pidfd = pidfd
        self._stderr_fd = stderr_fd
        self._enclosed = enclosed
        self._killed = False
        self._exited: asyncio.Future[int] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else f"ended {self.returncode}"
        return f"<QemuProcess pid={self.pid} {state}>"

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str],
        *,
        pass_fds: Iterable[int],
        log_path: Path,
        limits: Limits,
        user: Sequence[str] = (),
        enclosed: bool = False,
    ) -> QemuProcess:
        """Start ``argv`` (an absolute path first); call it from the main thread.

        ``pass_fds`` are inherited under their own numbers, and nothing else is; they stay the
        caller's to close. ``user``: options of setpriv. ``enclosed``: QEMU is to be a grandchild,
        in bubblewrap. Raises VmBootError when the program cannot be started. A QEMU that dislikes
        its arguments is started, and ends: see `exited` and `failure`.
        """
        find_qemu(argv[0], "")
        holder: Holder | None = None
        if limits.cpu_quota is not None:
            holder = find_holder(os.geteuid(), os.environ)
        read_end, write_end = os.pipe()
        # A full pipe loses QEMU's words rather than stopping QEMU.
        os.set_blocking(write_end, False)
        try:
            pid = os.posix_spawn(
                SETPRIV,
                start_command(argv, limits, holder, os.getpid(), user),
                start_environment(limits, holder),
                setsid=True,
                setsigmask=(),
                setsigdef=_ALL_SIGNALS,
                file_actions=_file_actions(set(pass_fds), write_end),
            )
            pidfd = os.pidfd_open(pid)  # ours to reap, so the number is still its own
        except OSError as error:
            os.close(read_end)
            raise VmBootError(
                f"QEMU could not be started: {error}",
                hint=f"{SETPRIV} (package util-linux) and /bin/sh are needed",
            ) from error
        finally:
            os.close(write_end)
        return cls(pid, pidfd, read_end, log_path, enclosed=enclosed)

    @property
    def qemu_pid(self) -> int:
        """Of QEMU itself; once it has spoken.  Before that, of what will start it."""
        first = self._first_inside()
        return _child(first) or first or self.pid

    def watch(self) -> asyncio.Future[int]:
        """Join the running event loop: its end resolves `exited`, its stderr goes to the log."""
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._exited = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_exit)
        self.log.drain(self._stderr_fd, self._loop)
        return self._exited

    @property
    def exited(self) -> asyncio.Future[int]:
        """Resolves to `returncode` when the process ends. Shield it: it is everyone's."""
        assert self._exited is not None, "watch() first"
        return self._exited

    async def wait(self) -> int:
        """Wait for the end; returns `returncode`."""
        import asyncio

        return await asyncio.shield(self.exited)

    def kill(self) -> None:
        """SIGKILL. No effect on one that has ended; never hits another process of that number.

        Behind the wall to the first process of the namespace: it ends last, so that all is over
        when our child has ended, and our child ends behind it.
        """
        if self.returncode is not None:
            return
        self._killed = True
        first = self._first_inside()
        if not first:
            if self._enclosed:  # what it starts in this very moment finds nobody to write to
                self._hang_up()
            self._send_kill(self._pidfd)
            return
        with contextlib.suppress(OSError):  # it has ended
            pidfd = os.pidfd_open(first)
            try:
                if _parent(first) == self.pid:  # who waits for it has not done so yet
                    self._send_kill(pidfd)
            finally:
                os.close(pidfd)

    async def close(self) -> int:
        """Kill, wait, and release descriptors; returns `returncode`. May be called twice."""
        import asyncio

        self.kill()
        try:
            async with asyncio.timeout(_END_SECONDS):
                status = await self.wait()
        except TimeoutError:  # it was stopped, say, and cannot see that all is over
            self._send_kill(self._pidfd)
            status = await self.wait()
        self.log.close()
        return status

    def abandon(self) -> None:
        """Kill one that was never watched, and wait for that (milliseconds: it was just born)."""
        self.kill()
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(_END_SECONDS * 1000):
            self._send_kill(self._pidfd)
        os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        self.returncode = -_SIGKILL
        os.close(self._pidfd)
        if self._stderr_fd >= 0:
            os.close(self._stderr_fd)

    @property
    def called_what_is_absent(self) -> bool:
        """Whether it ended as one does that calls a function of `vm.absent`'s."""
        return self._enclosed and self.returncode == -_SIGILL

    def failure(self, what: str, kind: type[VmError] = VmBootError) -> VmError:
        """An error that says ``what`` failed, how QEMU ended, and QEMU's last words."""
        words = self.log.text(4000).strip()
        if self.returncode is None:
            how = "QEMU is still running"
        elif self.returncode < 0:
            how = f"QEMU was ended by signal {-self.returncode}"
        elif self.returncode == 0:
            how = "the guest stopped or restarted"  # see -no-reboot
        else:
            how = f"QEMU ended with status {self.returncode}"
        message = f"{what}: {how}" + (f"\n{words}" if words else " without a word")
        hint = next((todo for sign, todo in _HINTS if sign in words), "")
        if not hint and kind is VmGuestError and self.returncode == -_SIGKILL:
            hint = "Something killed the VM; is the host out of memory? (see `dmesg`)"
        if self.called_what_is_absent:
            hint = (
                "It called a library that VMs are started without here; the next one has them all"
            )
        if not hint and self.returncode == -_SIGBUS:  # see mmap(2)
            hint = (
                "The file behind the VM's memory could not grow, or was cut: is the disk full? "
                "Free space, or set VMKERNEL_CACHE_DIR to another disk"
            )
        hint = hint or "Run `vmkernel doctor`"
        return kind(message, hint=hint, log_path=self.log.path)

    def _on_exit(self) -> None:
        assert self._loop is not None
        assert self._exited is not None
        self._loop.remove_reader(self._pidfd)
        status = _reap(self._pidfd)
        if self._enclosed and self._killed:
            status = -_SIGKILL  # whatever those around it make of it
        elif self._enclosed and status > _BY_SIGNAL:  # so bubblewrap tells that QEMU was killed
            status = _BY_SIGNAL - status
        self.returncode = status
        os.close(self._pidfd)
        self._pidfd = -1
        if not self._exited.done():
            self._exited.set_result(self.returncode)

    def _first_inside(self) -> int:
        """The first process of the namespace behind the wall: bubblewrap.  0 when there is none."""
        return _child(self.pid) if self._enclosed else 0

    def _hang_up(self) -> None:
        if self._loop is not None:
            self.log.close()
        elif self._stderr_fd >= 0:
            os.close(self._stderr_fd)
            self._stderr_fd = -1

    @staticmethod
    def _send_kill(pidfd: int) -> None:
        import signal

        if pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, _SIGKILL)


def _child(pid: int) -> int:
    """The one child of a process; 0 when it has none."""
    if not pid:
        return 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_bytes().split()
    except FileNotFoundError:  # it is gone, or Linux was built without (CONFIG_PROC_CHILDREN)
        numbers = (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit())
        return next((number for number in numbers if _parent(number) == pid), 0)
    return int(children[0]) if children else 0


def _parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(status[status.rfind(b")") + 2 :].split()[1])  # proc(5)


def _file_actions(keep: set[int], output: int) -> list[tuple[int, ...]]:
    """stdin from nowhere, stdout and stderr to ``output``, ``keep`` as they are, no others."""
    actions: list[tuple[int, ...]] = []
    for entry in Path("/proc/self/fd").iterdir():
        fd = int(entry.name)
        if fd > 2 and fd not in keep and fd != output and _inheritable(fd):
            actions.append((os.POSIX_SPAWN_CLOSE, fd))
    actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0))  # type: ignore[arg-type]
    actions.append((os.POSIX_SPAWN_DUP2, output, 1))
    actions.append((os.POSIX_SPAWN_DUP2, output, 2))
    # dup2 of a descriptor onto itself clears its close-on-exec flag, in the child only
    # (glibc 2.29). os.set_inheritable would leak it to whatever else is started meanwhile.
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in sorted(keep)]
    return actions


def _inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # the descriptor of the listing itself
        return False


def _reap(pidfd: int) -> int:
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # somebody waited for all children
        return -1
    if result is None:  # cannot be: a pidfd is readable once the process has ended
        return -1
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
