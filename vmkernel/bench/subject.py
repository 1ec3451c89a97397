"""One kernel under measurement, seen as a front end sees it: through jupyter_client only.

Under the blocks of ``blocks.py``.  What differs between two kernels is their kernelspec's name, and
whether the ready pool is to be used: then a start waits, before its clock runs, until the pool has
a member ready.  Times are seconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from queue import Empty
from typing import IO, Any

from jupyter_client.manager import KernelManager

from vmkernel.bench.rig import Rig, Variant

START_LIMIT = 90.0
"""Seconds a warm start may take before the figure is given up."""
REPLY_LIMIT = 60.0

Message = dict[str, Any]
clock = time.monotonic


class KernelFailedError(Exception):
    """A kernel did not do what it was asked; the text says what."""


class Subject:
    """A running kernel and one client of it."""

    def __init__(self, rig: Rig, name: str) -> None:
        self.name = name
        """As the table names it."""
        self.remembers = True
        """Whether its cells go to its history, as a person's do."""
        self.info_after = 0.0
        """Seconds from the spawn to the answer to the first ``kernel_info_request``."""
        self.first_after = 0.0
        """Seconds from the spawn to the reply to the first cell."""
        self.spawned_at = 0.0
        self.info: dict[str, Any] = {}
        self._rig = rig
        self._variant = Variant.of(name)
        self._manager = KernelManager(kernel_name=self._variant.kernel)
        self._client: Any = None

    @classmethod
    def start(
        cls,
        rig: Rig,
        name: str,
        *,
        limit: float = START_LIMIT,
        remembers: bool = True,
        env: dict[str, str] | None = None,
        stderr: IO[bytes] | None = None,
    ) -> Subject:
        """Start a kernel and run ``1+1`` in it.  Raises KernelFailedError, RigError."""
        subject = cls(rig, name)
        subject.remembers = remembers
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL}
        options["stderr"] = subprocess.DEVNULL if stderr is None else stderr
        options["env"] = os.environ | rig.environment(subject._variant) | (env or {})
        subject._wait_pool()
        subject.spawned_at = clock()
        try:
            subject._manager.start_kernel(**options)
            subject._client = subject._manager.client()
            subject._client.start_channels()
            subject._first_result(limit)
            subject._check_pool()
        except BaseException:
            subject.kill()
            raise
        return subject

    def _wait_pool(self) -> None:
        if self._variant.pooled:
            self._rig.pool.wait_ready()

    def _check_pool(self) -> None:
        """A start that was to be the pool's and was not does not count."""
        pid = getattr(self._manager.provisioner, "pid", None)  # elsewhere a provisioner has none
        if not self._variant.pooled or pid is None:
            return
        if not self._rig.came_from_pool(int(pid), self._manager.connection_file):
            raise KernelFailedError("the pool handed no kernel over, though one was ready")

    def _first_result(self, limit: float) -> None:
        begun = self.spawned_at
        self.info = self._answer(self._client.kernel_info(), limit)["content"]
        self.info_after = clock() - begun
        self.expect("1+1", limit)
        self.first_after = clock() - begun

    def ask_info(self) -> None:
        """Let ``info`` be what the kernel says of itself by now."""
        self.info = self._answer(self._client.kernel_info(), REPLY_LIMIT)["content"]

    # --- messages ---

    def _answer(self, msg_id: str, limit: float) -> Message:
        """The reply on the shell channel to ``msg_id``."""
        end = clock() + limit
        while True:
            try:
                message = self._client.get_shell_msg(timeout=min(1.0, max(0.01, end - clock())))
            except Empty:
                if not self._manager.is_alive():
                    raise KernelFailedError("the kernel died") from None
                if clock() > end:
                    raise KernelFailedError(f"no reply within {limit:g} s") from None
                continue
            if message["parent_header"].get("msg_id") == msg_id:
                return dict(message)

    def _until_idle(self, msg_id: str, limit: float, seen: Callable[[Message], None]) -> None:
        end = clock() + limit
        while True:
            try:
                message = self._client.get_iopub_msg(timeout=max(0.01, end - clock()))
            except Empty:
                raise KernelFailedError(f"not idle within {limit:g} s") from None
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            seen(message)
            if message["content"].get("execution_state") == "idle":
                return

    def _execute(self, code: str) -> str:
        return str(self._client.execute(code, store_history=self.remembers))

    def expect(self, code: str, limit: float = REPLY_LIMIT) -> None:
        """Run a cell up to its reply, which must be ``ok``.  Raises KernelFailedError."""
        content = self._answer(self._execute(code), limit)["content"]
        if content["status"] != "ok":
            raise KernelFailedError(f"{content.get('ename')}: {content.get('evalue')}")

    def cell(
        self, code: str, seen: Callable[[Message], None] = lambda _: None
    ) -> tuple[float, float]:
        """Run a cell; seconds until its reply and until ``idle``.  ``seen`` gets the outputs."""
        begun = clock()
        msg_id = self._execute(code)
        content = self._answer(msg_id, REPLY_LIMIT)["content"]
        replied = clock() - begun
        self._until_idle(msg_id, REPLY_LIMIT, seen)
        idle = clock() - begun
        if content["status"] != "ok":
            raise KernelFailedError(f"{content.get('ename')}: {content.get('evalue')}")
        return replied, idle

    def listen(self) -> None:
        """Return once outputs surely reach us: a subscription needs a moment after the start."""
        for _ in range(60):
            msg_id = self._client.execute("pass", store_history=False)
            self._answer(msg_id, REPLY_LIMIT)
            with contextlib.suppress(KernelFailedError):
                self._until_idle(msg_id, 0.5, lambda _: None)
                return
        raise KernelFailedError("no output ever arrived")

    def late_output(self, limit: float) -> Iterator[Message]:
        """What is still published after ``idle``, until there is silence for ``limit`` seconds."""
        with contextlib.suppress(Empty):
            while True:
                yield self._client.get_iopub_msg(timeout=limit)

    # --- deeds that are timed ---

    def complete(self, code: str) -> float:
        """Seconds until the completions of ``code`` are there."""
        begun = clock()
        content = self._answer(self._client.complete(code), REPLY_LIMIT)["content"]
        if not content.get("matches"):
            raise KernelFailedError(f"no completions for {code!r}")
        return clock() - begun

    def interrupt_busy_loop(self) -> float:
        """Seconds from the interrupt of ``while True: pass`` to the cell's reply."""
        msg_id = self._client.execute("while True: pass", stop_on_error=False)
        time.sleep(0.4)  # it must be running, not just arriving
        begun = clock()
        self._manager.interrupt_kernel()
        content = self._answer(msg_id, REPLY_LIMIT)["content"]
        took = clock() - begun
        self._until_idle(msg_id, REPLY_LIMIT, lambda _: None)
        if content.get("ename") != "KeyboardInterrupt":
            raise KernelFailedError(f"the loop ended with {content.get('ename')}")
        return took

    def restart(self) -> float:
        """Seconds from a polite restart to the first cell's reply in the new kernel."""
        self._wait_pool()
        begun = clock()
        self._manager.restart_kernel()
        self._answer(self._client.kernel_info(), START_LIMIT)
        self.expect("1+1", START_LIMIT)
        return clock() - begun

    def shutdown(self) -> float:
        """Seconds from the ``shutdown_request`` to the end of the kernel's last process."""
        launched = int(self._manager.provisioner.pid)
        pids = self._rig.processes_of(launched, self._manager.connection_file)
        handles = [_handle(pid) for pid in pids]
        begun = clock()
        self._client.shutdown()
        try:
            for handle in handles:
                if handle is not None and not _ended(handle, REPLY_LIMIT):
                    raise KernelFailedError(f"still there {REPLY_LIMIT:g} s after shutdown")
            return clock() - begun
        finally:
            for handle in handles:
                if handle is not None:
                    os.close(handle)
            self.kill()

    def end(self) -> None:
        """Shut the kernel down as a front end does, politely."""
        self._client.stop_channels()
        self._manager.shutdown_kernel()

    def kill(self) -> None:
        """End the kernel, in whatever state it is; may be called twice."""
        if self._client is not None:
            self._client.stop_channels()
        # Of a kernel whose start was interrupted jupyter_client says KeyError or the like; what it
        # could not end, the rig's end ends
        with contextlib.suppress(Exception):
            self._manager.shutdown_kernel(now=True)


def _handle(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _ended(handle: int, limit: float) -> bool:
    return bool(select.select([handle], [], [], limit)[0])
