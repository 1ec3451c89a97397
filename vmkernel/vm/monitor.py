"""QEMU's monitor (QMP) through ``qemu.qmp``, and its long command: save a state.

Where it stands: between ``qemu.qmp`` and ``vm.machine``/``vm.template``. Foreign exceptions end
here. ``qemu.qmp`` is imported when a monitor is opened (8-12 ms), which is after QEMU was started
and while it starts.

A template's state is saved with the capability ``x-ignore-shared``: the RAM is in its file already,
so the state is only the devices' (some 200 kB). A clone loads it without this module: `vm.loading`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmkernel.errors import TemplateError, VmBootError, VmGuestError
from vmkernel.vm.loading import STATE_CAPABILITIES

if TYPE_CHECKING:
    from qemu.qmp import QMPClient
    from qemu.qmp.message import Message

_RING = 40
_NAME = "vmkernel-state"
_UNLIMITED = 1 << 40  # bytes a second; QEMU's default of 128 MiB/s is meant for networks


class Monitor:
    """A connection to one QEMU's monitor. Open it with `Monitor.open`."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._recent: deque[str] = deque(maxlen=_RING)
        self._migration: asyncio.Queue[str] = asyncio.Queue()
        self._up = False

    def __repr__(self) -> str:
        return f"<Monitor {self._client.runstate.name.lower()}>"

    @classmethod
    async def open(
        cls, sock: socket.socket, timeout: float = 10.0, *, greeted: bool = False
    ) -> Monitor:
        """Greet the QEMU at the other end of ``sock`` (connected; ours to close from now on).

        ``greeted``: `vm.loading` has done that, on the same socket.

        Raises VmBootError when no monitor answers within ``timeout`` seconds, or hangs up.
        """
        from qemu.qmp import EventListener, QMPClient, QMPError

        sock.setblocking(False)
        client = QMPClient("vmkernel")
        # A QEMU that ends while it starts is an error that we report; qemu.qmp would log it too.
        client.logger.setLevel("CRITICAL")
        client.await_greeting = client.negotiate = not greeted
        monitor = cls(client)
        client.register_listener(EventListener(event_filter=monitor._on_event))
        try:
            async with asyncio.timeout(timeout):
                await client.connect(sock)
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            sock.close()
            raise VmBootError(
                f"QEMU's monitor did not answer: {_reason(error)}",
                hint="See QEMU's log; `vmkernel doctor` checks the machine",
            ) from error
        except asyncio.CancelledError:
            sock.close()
            raise
        monitor._up = True
        return monitor

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = 10.0
    ) -> Any:
        """Run one command and return its value.

        Raises VmGuestError when QEMU refuses it, ends, or does not answer within ``timeout``
        seconds; `recent` then holds what was said before.
        """
        from qemu.qmp import QMPError

        self._recent.append(f"> {command} {dict(arguments) if arguments else ''}".rstrip())
        try:
            async with asyncio.timeout(timeout):
                value = await self._client.execute(command, arguments)
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            self._recent.append(f"! {_reason(error)}")
            raise VmGuestError(
                f"QEMU's monitor: {command} failed: {_reason(error)}",
                hint="See QEMU's log",
                code_ran="unknown",
            ) from error
        self._recent.append(f"< {str(value)[:500]}")
        return value

    def recent(self) -> str:
        """The last commands, answers and events, a line each: for a report of a failure."""
        return "\n".join(self._recent)

    async def send_fd(self, name: str, fd: int) -> None:
        """Give QEMU a copy of ``fd``, known to it as ``name`` (the monitor's ``getfd``)."""
        self._client.send_fd_scm(fd)
        await self.execute("getfd", {"fdname": name})

    async def migration_end(self, timeout: float) -> str:
        """Wait for a migration's ``completed`` or ``failed``. Raises TimeoutError.

        Returns ``gone`` when QEMU hung up instead.
        """
        gone = asyncio.ensure_future(self._wait_gone())
        last = asyncio.ensure_future(self._last_migration_status())
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wait((gone, last), return_when=asyncio.FIRST_COMPLETED)
            return last.result() if last.done() else "gone"
        finally:
            gone.cancel()
            last.cancel()

    async def close(self) -> None:
        """Hang up; errors of a connection that is gone already are nobody's business."""
        from qemu.qmp import QMPError

        if self._up:
            self._up = False
            with contextlib.suppress(QMPError, OSError, EOFError):
                await self._client.disconnect()

    async def _last_migration_status(self) -> str:
        while True:
            status = await self._migration.get()
            if status in ("completed", "failed", "cancelled"):
                return status

    async def _wait_gone(self) -> None:
        from qemu.qmp import Runstate

        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    def _on_event(self, event: Message) -> bool:
        """Note an event, and keep it out of qemu.qmp's own unbounded queue."""
        self._recent.append(f"* {event.get('event')} {event.get('data', '')}".rstrip())
        if event.get("event") == "MIGRATION":
            data = event.get("data")
            if isinstance(data, dict):
                self._migration.put_nowait(str(data.get("status")))
        return False


async def save_state(monitor: Monitor, fd: int, *, timeout: float = 60.0) -> None:
    """Write the machine's state (all but its shared RAM) to ``fd``, a file open for writing.

    The guest is running when this is called, stands still when it returns, and resumes by itself
    in each clone. Raises TemplateError.
    """
    try:
        await monitor.execute("migrate-set-capabilities", {"capabilities": STATE_CAPABILITIES})
        await monitor.execute("migrate-set-parameters", {"max-bandwidth": _UNLIMITED})
        await monitor.send_fd(_NAME, fd)
        await monitor.execute("migrate", {"uri": f"fd:{_NAME}"})
        await _finish(monitor, "The VM's state could not be saved", timeout)
    except VmGuestError as error:
        raise TemplateError(
            f"The VM's state could not be saved: {error}", hint=error.hint
        ) from error


async def _finish(monitor: Monitor, what: str, timeout: float) -> None:
    hint = "Remove the template, it is made again: vmkernel image verify"
    try:
        end = await monitor.migration_end(timeout)
    except TimeoutError as error:
        raise TemplateError(f"{what} within {timeout:g} s", hint=hint) from error
    if end == "completed":
        return
    detail = "QEMU ended"
    if end != "gone":
        info = await monitor.execute("query-migrate")
        detail = str(info.get("error-desc") or end) if isinstance(info, dict) else end
    raise TemplateError(f"{what}: {detail}", hint=hint)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
