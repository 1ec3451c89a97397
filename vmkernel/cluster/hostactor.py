"""The kernels of one host, for front ends elsewhere: started, watched, ended.

A plain class whose methods are coroutines; Ray makes an actor of it (`vmkernel.cluster.placer`).
Each kernel is a stock ``vmsandbox`` under Jupyter's own kernel manager, with encryption.  Who has
started one renews its lease; a kernel of which nobody has spoken for that long is ended, so that a
host that is cut off keeps no VMs for nobody.  What dies with this process: the kernels, which watch
their parent (JPY_PARENT_PID), and the sockets for what they say, which have no name in any file
system.  Their connection files are cleared away by whoever comes next.  Floor 5.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmkernel import __version__
from vmkernel.cluster.hosted import HostedKernel, Place
from vmkernel.environment import why_refused
from vmkernel.errors import VmCapacityError, VmError
from vmkernel.host.trees import remove_tree
from vmkernel.settings import ensure_private_dir, load_settings

log = logging.getLogger("vmkernel")

INTERFACE = 1
"""Counts changes of what the methods here take and return."""
KEPT_SECONDS = 600.0
"""For how long it is known how a kernel ended."""
SOON = 0.5
"""Seconds that a kernel has to clear up after itself whose owner counts on its end now."""
# Ray's own, its token among them, and what it sets in its workers: a kernel here is to be what it
# would be without Ray
_NOT_PASSED_PREFIXES = ("RAY_", "JPY_", "VMKERNEL_NOTIFY_")
_NOT_PASSED = frozenset({"OMP_NUM_THREADS", "PYTHONBREAKPOINT", "SPT_NOENV"})
_MONITOR = "RAY_memory_monitor_refresh_ms"
"""Ray's monitor ends its workers when a machine's memory is nearly used up: here, all kernels"""


class KernelHost:
    """All kernels that run on this host for front ends elsewhere.

    ``ip`` is the host's address in the cluster, which kernels bind; ``environ`` what they get of
    the environment, by default this process's.
    """

    def __init__(self, ip: str, environ: Mapping[str, str] | None = None) -> None:
        self._ip = ip
        self._environ = {
            name: value
            for name, value in (os.environ if environ is None else environ).items()
            if not name.startswith(_NOT_PASSED_PREFIXES) and name not in _NOT_PASSED
        }
        self._kernels: dict[str, HostedKernel] = {}
        self._place: Place | None = None
        self._lock = -1
        self._tasks: set[asyncio.Task[Any]] = set()

    async def hello(self) -> dict[str, Any]:
        """Who this is: ``interface``, ``version``, ``host``, ``ip``, ``pid``, ``kernels``, and
        ``slots`` (``limit``, ``used``), ``kernel_info`` (what a kernel of this host will say of
        itself), ``kernelspecs`` (their names) as far as they can be told; ``warnings``, sentences
        for who has set the host up.
        """
        return {
            "interface": INTERFACE,
            "version": __version__,
            "host": socket.gethostname(),
            "ip": self._ip,
            "pid": os.getpid(),
            "kernels": sum(kernel.exit_code is None for kernel in self._kernels.values()),
            **await asyncio.to_thread(self._facts),
        }

    def _facts(self) -> dict[str, Any]:
        from jupyter_client.kernelspec import KernelSpecManager

        from vmkernel.host.capacity import vm_slots
        from vmkernel.image.store import find_image
        from vmkernel.kernel.local import kernel_info

        facts: dict[str, Any] = {"slots": None, "kernel_info": None, "warnings": self._warnings()}
        facts["kernelspecs"] = sorted(KernelSpecManager().find_kernel_specs())
        try:
            settings = load_settings(environ=self._environ)
            usage = vm_slots(settings).statistics()
            facts["slots"] = {"limit": usage.limit, "used": usage.used}
            manifest = find_image(settings.recipe, settings).manifest
            facts["kernel_info"] = kernel_info(None, manifest, "")
        except VmError as error:
            facts["warnings"].append(error.explain())
        return facts

    def _warnings(self) -> list[str]:
        return []

    # --- a kernel's life ---

    async def start(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start a kernel, and wait until its VM has a slot.

        ``request``: ``kernel_id``, ``kernel_name`` (a kernelspec here), ``key`` and
        ``signature_scheme`` of its messages, ``lease`` in seconds; and, where there is any, ``env``
        on top of the host's, ``cwd``, ``argv`` for its command line, ``owner`` (for people).  Asked
        again with the same id, it tells the same.

        Returns ``info`` (its connection information, with ``curve_publickey``), ``pid`` and
        ``notes`` for the person; or ``refused`` and ``message`` when the host has no slot after
        all; or ``error`` and ``hint``.  In the two last cases nothing is left of it.
        """
        kernel = self._kernels.get(str(request.get("kernel_id")))
        if kernel is None:
            try:
                place = self._place or self._open()
                kernel = HostedKernel({**request, "env": _taken(request.get("env"))}, place)
            except VmError as error:
                return {"error": error.message, "hint": error.hint}
            except (KeyError, TypeError, ValueError) as error:
                return {
                    "error": f"the request to start a kernel makes no sense: {error!r}",
                    "hint": f"is the same version on all hosts? vmkernel is {__version__} here",
                }
            self._kernels[kernel.kernel_id] = kernel
            kernel.starting = asyncio.create_task(self._start(kernel))
        assert kernel.starting is not None
        kernel.renew()
        try:
            # Who asked may give up; then end() is called, or the lease runs out
            return await asyncio.shield(kernel.starting)
        except asyncio.CancelledError:
            if not kernel.starting.cancelled():
                raise
            return {"error": "the kernel was ended while it started", "hint": "start it again"}

    async def _start(self, kernel: HostedKernel) -> dict[str, Any]:
        try:
            started = await kernel.start()
        except Exception as error:
            await kernel.end()
            self._kernels.pop(kernel.kernel_id, None)
            if isinstance(error, VmCapacityError):
                return {"refused": "capacity", "message": error.message}
            if isinstance(error, VmError):
                return {"error": error.message, "hint": error.hint}
            log.exception("kernel %s could not be started", kernel.kernel_id)
            return {"error": f"{type(error).__name__}: {error}", "hint": "see Ray's logs there"}
        kernel.renew()
        return started

    async def renew(self, kernel_ids: list[str]) -> dict[str, dict[str, Any]]:
        """Renew leases, and hear how those kernels are: ``state`` (running, ended or unknown),
        ``exit_code`` of an ended one, ``why`` it was ended from here, ``status`` of its VM.
        """
        known: dict[str, dict[str, Any]] = {}
        for kernel_id in kernel_ids:
            kernel = self._kernels.get(kernel_id)
            if kernel is None:
                known[kernel_id] = {"state": "unknown", "exit_code": None, "why": "", "status": ""}
                continue
            kernel.renew()
            code = kernel.exit_code
            known[kernel_id] = {
                "state": "running" if code is None else "ended",
                "exit_code": code,
                "why": kernel.why,
                "status": kernel.status,
            }
        return known

    async def signal(self, kernel_id: str, signum: int) -> None:
        """Send a signal to a kernel; nothing when it is not there any more."""
        if kernel := self._kernels.get(kernel_id):
            await kernel.signal(signum)

    async def wait(self, kernel_id: str, seconds: float) -> int | None:
        """A kernel's exit code, as soon as it has one; None when it runs on after ``seconds``.

        0 of one that is not known (any more).
        """
        kernel = self._kernels.get(kernel_id)
        return 0 if kernel is None else await kernel.wait(seconds)

    async def end(self, kernel_id: str, *, kill: bool = False) -> None:
        """End a kernel, wait for that, and forget it; nothing when it is not there any more.

        With ``kill`` within half a second, whatever it does.
        """
        kernel = self._kernels.get(kernel_id)
        if kernel is not None:
            await (kernel.end(SOON) if kill else kernel.end())
            if self._kernels.get(kernel_id) is kernel:
                del self._kernels[kernel_id]

    async def kernels(self) -> list[dict[str, Any]]:
        """Those that run: ``kernel_id``, ``kernel_name``, ``pid``, ``age`` and ``lease_left`` in
        seconds, ``owner`` (who started it, as the request says), ``status``.
        """
        return [
            {
                "kernel_id": kernel.kernel_id,
                "kernel_name": kernel.kernel_name,
                "pid": kernel.pid,
                "age": time.time() - kernel.created,
                "lease_left": kernel.lease_left,
                "owner": kernel.owner,
                "status": kernel.status,
            }
            for kernel in self._kernels.values()
            if kernel.exit_code is None
        ]

    # --- its own ---

    async def close(self) -> None:
        """End all kernels, and give everything back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(self.end(kernel_id) for kernel_id in [*self._kernels]))
        place, self._place = self._place, None
        if place is not None:
            place.context.destroy(linger=0)
            remove_tree(place.directory)
            os.close(self._lock)

    def _open(self) -> Place:
        """What the first kernel needs.  Raises VmError."""
        directory, self._lock = _own_directory(load_settings(environ=self._environ).runtime_dir)
        self._place = Place(self._ip, self._environ, directory)
        self._do(self._keep_leases())
        return self._place

    def _do(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a kernel was not ended as it should have been", exc_info=error)

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for kernel in list(self._kernels.values()):
                if kernel.exit_code is not None:
                    if time.monotonic() - kernel.over > KEPT_SECONDS:
                        del self._kernels[kernel.kernel_id]
                # A start ends by itself; its lease counts from then on
                elif kernel.lease_left < 0 and not kernel.is_starting and not kernel.why:
                    kernel.why = f"no contact for {kernel.lease:g} s"
                    log.warning("kernel %s is ended: %s", kernel.kernel_id, kernel.why)
                    self._do(kernel.end(SOON))


class RayHost(KernelHost):
    """A `KernelHost` in a worker of Ray, which lives under Ray's conditions for workers."""

    def __init__(self, ip: str) -> None:
        leave_workers_conditions()
        super().__init__(ip)

    def _warnings(self) -> list[str]:
        if os.environ.get(_MONITOR) == "0":
            return []
        return [
            "Ray ends all kernels there when the machine's memory is nearly used up, by whatever: "
            f"start Ray with {_MONITOR}=0 in its environment"
        ]


def leave_workers_conditions() -> None:
    """Take the raylet's priority and standing before the OOM killer, and leave them to kernels.

    Ray's workers have niceness 15 and are the first to be killed (oom_score_adj 1000): that is for
    what can be done again elsewhere, not for VMs, nor for the process that all of them die with.
    Besides, a pool of another niceness serves none of these kernels.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError):  # not allowed: then it stays so, and all works but slower
        niceness = os.getpriority(os.PRIO_PROCESS, parent)
        for thread in os.listdir("/proc/self/task"):  # noqa: PTH208
            os.setpriority(os.PRIO_PROCESS, int(thread), niceness)
    with contextlib.suppress(OSError):
        adjustment = Path(f"/proc/{parent}/oom_score_adj").read_text()
        Path("/proc/self/oom_score_adj").write_text(adjustment)


def _taken(env: Mapping[str, str] | None) -> dict[str, str]:
    """What of a front end's environment means something here: what a guest could be given."""
    return {
        str(name): str(value)
        for name, value in (env or {}).items()
        if not why_refused(name) and name != "JPY_PARENT_PID" and not name.startswith("RAY_")
    }


def _own_directory(runtime_dir: Path) -> tuple[Path, int]:
    """A private directory, and a descriptor whose lock says that its owner lives.

    Those of owners that were killed are removed: the keys of kernels are in them.  Raises VmError.
    """
    ensure_private_dir(runtime_dir)
    for other in runtime_dir.glob("cluster-*"):
        with contextlib.suppress(OSError):
            os.close(_locked(other))
            remove_tree(other)
    while True:
        # Not under its name yet: it might be taken for a dead one's before it has its lock
        name = secrets.token_hex(4)
        new, directory = runtime_dir / f"new-cluster-{name}", runtime_dir / f"cluster-{name}"
        try:
            new.mkdir(mode=0o700)
            lock = _locked(new)
            new.rename(directory)
        except FileExistsError:
            continue
        except OSError as error:
            raise VmError(
                f"no directory could be made in {runtime_dir}: {error}",
                hint="free space there, or set VMKERNEL_RUNTIME_DIR where Ray is started",
            ) from error
        return directory, lock


def _locked(directory: Path) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
