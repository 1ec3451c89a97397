"""The kernels of one host, for front ends elsewhere: started, watched, ended.

A plain class whose methods are coroutines; Ray makes an actor of it (``vmkernel.cluster.placer``).
Each kernel is a stock ``vmsandbox`` under Jupyter's own kernel manager, with encryption.  Who has
started one renews its lease; a kernel of which nobody has spoken for that long is ended, so that a
host that is cut off keeps no VMs for nobody.  What dies with this process: the kernels, which watch
their parent (JPY_PARENT_PID), and the notification sockets, which have no name in any file system.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmkernel import __version__
from vmkernel.errors import VmError
from vmkernel.kernel.notify import CAPACITY, VARIABLE

log = logging.getLogger("vmkernel")

INTERFACE = 1
"""Counts changes of what the methods here take and return."""
START_SECONDS = 60.0
"""How long a kernel may take to say that it has a slot, or that it waits for one."""
SLOT_SECONDS = 3.0
"""How long it may wait for one: kernels of the pool that nobody uses yield theirs within that."""
TRIES = 3
"""Starts of one kernel: its ports are chosen before they are bound, and may be taken meanwhile."""
KEPT_SECONDS = 600.0
"""For how long it is known how a kernel ended."""
END_SECONDS = 5.0
"""From SIGTERM to SIGKILL."""
_LOOK = 0.02
_CREDENTIALS = struct.Struct("3i")
# Ray's own, its token among them, and what it sets for number crunching in its workers
_NOT_PASSED = ("RAY_", "VMKERNEL_NOTIFY_")
_NOT_PASSED_NAMES = ("OMP_NUM_THREADS",)


class _RefusedError(Exception):
    """The host has no slot after all."""


class _Kernel:
    """One kernel, from its start until nobody asks about it any more."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        from jupyter_client.manager import AsyncKernelManager

        self.kernel_id = str(request["kernel_id"])
        self.request = request
        self.lease = float(request["lease"])
        self.created = time.time()
        self.expires = time.monotonic() + self.lease
        self.manager: AsyncKernelManager | None = None
        self.starting: asyncio.Task[dict[str, Any]] | None = None
        self.exit_code: int | None = None
        self.over = 0.0
        """When it was seen to have ended (monotonic), 0 while it lives"""
        self.why = ""
        self.status = ""
        self.ready = asyncio.Event()
        self.refused = ""
        self.failed = ""

    @property
    def started(self) -> bool:
        """Whether its start is over; until then it is bound by START_SECONDS."""
        return self.starting is not None and self.starting.done()

    def renew(self) -> None:
        self.expires = time.monotonic() + self.lease

    def hear(self, fields: Mapping[str, str]) -> None:
        """What the kernel says of its start (`vmkernel.kernel.notify`)."""
        self.status = fields.get("STATUS", self.status)
        if "READY" in fields:
            self.ready.set()
        if fields.get("ERRNO") == str(CAPACITY):
            self.refused = self.status
        elif "ERRNO" in fields:
            self.failed = self.status

    async def look(self) -> int | None:
        """Its exit code; None while it runs."""
        if self.exit_code is None and self.manager is not None:
            provisioner = self.manager.provisioner
            code = await provisioner.poll() if provisioner is not None else 0
            if code is not None:
                self._ended(code)
        return self.exit_code

    def _ended(self, code: int) -> None:
        if self.exit_code is None:
            self.exit_code, self.over = code, time.monotonic()
            if self.manager is not None:
                self.manager.cleanup_connection_file()

    async def end(self, kill: bool) -> None:
        """End the process and wait for that; may be called in every state, and again."""
        if self.starting is not None and not self.starting.done():
            self.starting.cancel()
            await asyncio.wait([self.starting])
        manager = self.manager
        if manager is None:
            self._ended(0)
            return
        provisioner = manager.provisioner
        if provisioner is None or await self.look() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            await (provisioner.kill() if kill else provisioner.terminate())
        deadline = time.monotonic() + END_SECONDS
        while await self.look() is None:
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    await provisioner.kill()
                deadline += END_SECONDS
            await asyncio.sleep(_LOOK)


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
            if not name.startswith(_NOT_PASSED) and name not in _NOT_PASSED_NAMES
        }
        self._kernels: dict[str, _Kernel] = {}
        self._watch: asyncio.Task[None] | None = None

    async def hello(self) -> dict[str, Any]:
        """Who this is: ``interface``, ``version``, ``host``, ``ip``, ``pid``, ``slots`` (``limit``,
        ``used``) and ``kernel_info``, what a kernel of this host will say of itself.
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
        from vmkernel.host.capacity import vm_slots
        from vmkernel.image.store import find_image
        from vmkernel.kernel.local import kernel_info
        from vmkernel.settings import load_settings

        facts: dict[str, Any] = {"slots": None, "kernel_info": None}
        with contextlib.suppress(VmError):
            settings = load_settings(environ=self._environ)
            usage = vm_slots(settings).statistics()
            facts["slots"] = {"limit": usage.limit, "used": usage.used}
            manifest = find_image(settings.recipe, settings).manifest
            facts["kernel_info"] = kernel_info(None, manifest, "")
        return facts

    async def start(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start a kernel, and wait until its VM has a slot.

        ``request``: ``kernel_id``, ``kernel_name`` (a kernelspec here), ``key`` and
        ``signature_scheme`` of its messages, ``env`` on top of the host's, ``cwd``, ``argv`` for
        its command line, ``lease`` in seconds.  Asked again with the same id, it tells the same.
        Returns ``info`` (its connection information, with ``curve_publickey``), ``pid`` and
        ``notes`` for the person; or ``refused`` and ``message`` when the host has no slot after
        all; or ``error`` and ``hint``.  In the two last cases nothing is left of it.
        """
        if self._watch is None:
            self._watch = asyncio.create_task(self._keep_leases())
        kernel_id = str(request["kernel_id"])
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            kernel = self._kernels[kernel_id] = _Kernel(request)
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

    async def _start(self, kernel: _Kernel) -> dict[str, Any]:
        try:
            started = await self._start_or_raise(kernel)
            kernel.renew()
            return started
        except _RefusedError as error:
            await self._forget(kernel)
            return {"refused": "capacity", "message": str(error)}
        except VmError as error:
            await self._forget(kernel)
            return {"error": error.message, "hint": error.hint}
        except Exception as error:
            await self._forget(kernel)
            return {
                "error": f"{type(error).__name__}: {error}",
                "hint": "is the kernel installed on that host? `vmkernel install`, "
                "`vmkernel doctor`",
            }

    async def _forget(self, kernel: _Kernel) -> None:
        kernel.starting = None
        await kernel.end(kill=True)
        self._kernels.pop(kernel.kernel_id, None)

    async def _start_or_raise(self, kernel: _Kernel) -> dict[str, Any]:
        from jupyter_client.manager import AsyncKernelManager
        from jupyter_core.paths import jupyter_runtime_dir

        request, notes = kernel.request, []
        env = {**self._environ, **request.get("env", {})}
        cwd = str(request.get("cwd") or "")
        if not cwd or not await asyncio.to_thread(os.path.isdir, cwd):
            if cwd:
                notes.append(
                    f"The directory {cwd} is not there on {socket.gethostname()}: the notebook has "
                    "no workspace.  Mount it on that host at the same path, or use `%vm put`."
                )
                env["VMKERNEL_WORKSPACE"] = "none"
            cwd = str(Path.home())
        for attempt in range(TRIES):
            # Ray blocks it in its workers, and children would have it so for ever
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            manager = AsyncKernelManager(
                kernel_name=str(request["kernel_name"]),
                ip=self._ip,
                transport_encryption="required",
            )
            manager.session.key = _bytes(request["key"])
            manager.session.signature_scheme = str(request["signature_scheme"])
            runtime = Path(jupyter_runtime_dir())
            await asyncio.to_thread(runtime.mkdir, 0o700, parents=True, exist_ok=True)
            manager.connection_file = str(runtime / f"kernel-{kernel.kernel_id}.json")
            kernel.manager, kernel.exit_code = manager, None
            with _notifications(kernel) as address:
                await manager.start_kernel(
                    env={**env, VARIABLE: address},
                    cwd=cwd,
                    extra_arguments=list(request.get("argv", [])),
                    stdin=-3,  # subprocess.DEVNULL: nothing of the actor's
                )
                if await self._has_slot(kernel):
                    break
            log.warning("kernel %s ended as it started (%s)", kernel.kernel_id, kernel.exit_code)
            if attempt == TRIES - 1:
                raise VmError(
                    f"the kernel ended as it started, with status {kernel.exit_code}",
                    hint=f"see the logs of Ray on {socket.gethostname()} (the worker's .err), "
                    "and run `vmkernel doctor` there",
                )
        info = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in manager.get_connection_info().items()
            if name != "curve_secretkey"
        }
        return {"info": info, "pid": manager.provisioner.pid, "notes": notes}

    async def _has_slot(self, kernel: _Kernel) -> bool:
        """Wait until the kernel's VM has its slot; False when the process ended before.

        Raises _RefusedError, VmError.
        """
        began = time.monotonic()
        waits_since = 0.0
        while not kernel.ready.is_set():
            if kernel.refused:
                raise _RefusedError(kernel.refused)
            if kernel.failed:
                return True  # the notebook is told what is wrong, as on one host
            if await kernel.look() is not None:
                return False
            now = time.monotonic()
            if kernel.status.startswith("waiting for a VM slot"):
                waits_since = waits_since or now
                if now - waits_since > SLOT_SECONDS:
                    raise _RefusedError(kernel.status)
            elif now - began > START_SECONDS:
                raise VmError(
                    f"the kernel has not begun to start a VM within {START_SECONDS:g} s",
                    hint=f"is {socket.gethostname()} too busy? Run `vmkernel doctor` there",
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(kernel.ready.wait(), _LOOK)
        return True

    async def renew(self, kernel_ids: list[str]) -> dict[str, dict[str, Any]]:
        """Renew leases, and hear how those kernels are: ``state`` (running, ended or unknown),
        ``exit_code`` of an ended one, ``why`` it was ended from here, ``status`` of its start.
        """
        known: dict[str, dict[str, Any]] = {}
        for kernel_id in kernel_ids:
            kernel = self._kernels.get(kernel_id)
            if kernel is None:
                known[kernel_id] = {"state": "unknown", "exit_code": None, "why": "", "status": ""}
                continue
            kernel.renew()
            code = await kernel.look()
            known[kernel_id] = {
                "state": "running" if code is None else "ended",
                "exit_code": code,
                "why": kernel.why,
                "status": kernel.status,
            }
        return known

    async def signal(self, kernel_id: str, signum: int) -> None:
        """Send a signal to a kernel; nothing when it is not there any more."""
        kernel = self._kernels.get(kernel_id)
        if kernel is None or kernel.manager is None or await kernel.look() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if signum == signal.SIGINT:
                await kernel.manager.interrupt_kernel()
            else:
                await kernel.manager.signal_kernel(signum)

    async def wait(self, kernel_id: str, seconds: float) -> int | None:
        """A kernel's exit code, as soon as it has one; None when it runs on after ``seconds``."""
        deadline = time.monotonic() + seconds
        while True:
            kernel = self._kernels.get(kernel_id)
            code = await kernel.look() if kernel is not None else 0
            if code is not None or time.monotonic() > deadline:
                return code
            await asyncio.sleep(_LOOK)

    async def end(self, kernel_id: str, *, kill: bool = False) -> None:
        """End a kernel, wait for that, and forget it; nothing when it is not there any more."""
        kernel = self._kernels.get(kernel_id)
        if kernel is not None:
            await kernel.end(kill)
            self._kernels.pop(kernel_id, None)

    async def kernels(self) -> list[dict[str, Any]]:
        """Those that run: ``kernel_id``, ``kernel_name``, ``pid``, ``age`` and ``lease_left`` in
        seconds, ``owner`` (who started it, as the request says), ``status``.
        """
        found = []
        for kernel in list(self._kernels.values()):
            if await kernel.look() is None:
                manager = kernel.manager
                provisioner = manager.provisioner if manager is not None else None
                found.append({
                    "kernel_id": kernel.kernel_id,
                    "kernel_name": str(kernel.request["kernel_name"]),
                    "pid": provisioner.pid if provisioner is not None else None,
                    "age": time.time() - kernel.created,
                    "lease_left": kernel.expires - time.monotonic(),
                    "owner": str(kernel.request.get("owner", "")),
                    "status": kernel.status,
                })  # fmt: skip
        return found

    async def close(self) -> None:
        """End all kernels."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(self.end(kernel_id, kill=True) for kernel_id in [*self._kernels]))

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for kernel in list(self._kernels.values()):
                try:
                    if await kernel.look() is not None:
                        if now - kernel.over > KEPT_SECONDS:
                            self._kernels.pop(kernel.kernel_id, None)
                    elif now > kernel.expires and kernel.started:
                        log.warning(
                            "kernel %s is ended: nobody has asked for it for %g s",
                            kernel.kernel_id, kernel.lease,
                        )  # fmt: skip
                        kernel.why = f"no contact for {kernel.lease:g} s"
                        await kernel.end(kill=True)
                except Exception:  # the others' leases matter, too
                    log.exception("kernel %s", kernel.kernel_id)


@contextlib.contextmanager
def _notifications(kernel: _Kernel):  # type: ignore[no-untyped-def]
    """A socket for what the kernel says of its start; its address, as sd_notify(3) writes it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    name = f"vmkernel-notify-{secrets.token_hex(16)}"
    loop = asyncio.get_running_loop()

    def hear() -> None:
        while True:
            try:
                data, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
            except OSError:
                return
            # Anyone may write to a socket in the abstract namespace (unix(7))
            users = [
                _CREDENTIALS.unpack(content)[1]
                for level, kind, content in ancillary
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
            ]
            if users == [os.geteuid()]:
                lines = data.decode(errors="replace").splitlines()
                kernel.hear(dict(line.split("=", 1) for line in lines if "=" in line))

    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind(f"\0{name}")
        loop.add_reader(sock, hear)
        try:
            yield f"@{name}"
        finally:
            hear()
            loop.remove_reader(sock)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
