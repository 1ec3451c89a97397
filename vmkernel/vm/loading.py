"""Loading a template's state into a clone: asked for while QEMU still starts.

Where it stands: ``host.start`` asks for it when it has spawned QEMU, ``vm.machine`` waits for it
to be done.  The commands lie in the monitor's socket before QEMU looks there for the first time, so
the load begins without a turn of ours; a wrapper kernel is then importing asyncio.  Three lines of
QMP need no client (``qemu.qmp``: 20 ms to import, a handshake to wait for); who wants more of this
monitor later gets it from :meth:`StateLoader.release` (``vm.monitor``, ``greeted=True``).

Source: QEMU, ``docs/interop/qmp-spec.rst`` and ``qapi/migration.json``.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

import msgspec

from vmkernel.errors import TemplateError, VmBootError, VmError

STATE_CAPABILITIES = [
    {"capability": "x-ignore-shared", "state": True},  # the RAM is in its file already
    {"capability": "events", "state": True},
]
_REBUILD = "Remove the template, it is made again: vmkernel image verify"
_LONGEST_LINE = 1 << 20


def request_load(sock: socket.socket, state_fd: int) -> None:
    """Ask the QEMU at the other end, started with ``-incoming defer``, to load a state and run.

    ``state_fd`` is the number, *in QEMU*, of an inherited descriptor at the start of the state.
    """
    commands: list[tuple[str, dict[str, Any]]] = [
        ("qmp_capabilities", {}),
        ("migrate-set-capabilities", {"capabilities": STATE_CAPABILITIES}),
        ("migrate-incoming", {"uri": f"fd:{state_fd}"}),
    ]
    lines = [
        msgspec.json.encode({"execute": command, "arguments": arguments}) + b"\n"
        for command, arguments in commands
    ]
    with suppress(OSError):  # QEMU ended at once: StateLoader finds the socket closed
        sock.sendall(b"".join(lines))


class StateLoader:
    """Follows a load on the running event loop, and keeps the monitor's socket empty after it."""

    def __init__(self, sock: socket.socket) -> None:
        import asyncio  # not on the way to QEMU's start

        sock.setblocking(False)
        self._sock = sock
        self._data = b""
        self._greeted = False
        self._watched = True
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock, self._on_readable)

    def __repr__(self) -> str:
        return f"<StateLoader {'done' if self._done.done() else 'loading'}>"

    async def wait(self, timeout: float) -> None:
        """Wait until the guest runs.

        Raises VmBootError when QEMU did not even greet, TemplateError when it refuses the state
        (it then ends) or takes for it more than ``timeout`` seconds.
        """
        import asyncio

        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._done)
        except TimeoutError as error:
            if not self._greeted:
                raise VmBootError(
                    f"QEMU did not come up within {timeout:g} s", hint="Run `vmkernel doctor`"
                ) from error
            raise TemplateError(
                f"The template's state could not be loaded within {timeout:g} s", hint=_REBUILD
            ) from error

    def release(self) -> socket.socket:
        """Stop reading; the socket, for who speaks with QEMU from now on."""
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self._sock)
        return self._sock

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        *lines, self._data = (self._data + data).split(b"\n")
        for line in lines:
            self._on_line(line)
        if not data:
            self._fail("QEMU ended")
        elif len(self._data) > _LONGEST_LINE:
            self._fail("QEMU's monitor does not speak QMP")

    def _on_line(self, line: bytes) -> None:
        """A greeting, an answer or an event.  Unwanted events end here: nobody else reads them."""
        try:
            message = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:
            self._fail("QEMU's monitor does not speak QMP")
            return
        if "QMP" in message:
            self._greeted = True
        elif "error" in message:
            self._fail(str(message["error"]))
        elif message.get("event") == "MIGRATION":
            status = str(message.get("data"))
            if "completed" in status and not self._done.done():
                self._done.set_result(None)
            elif "failed" in status:
                self._fail("it does not fit, or is damaged")

    def _fail(self, why: str) -> None:
        self.release()
        if self._done.done():
            return
        error: VmError
        if self._greeted:
            error = TemplateError(f"The template's state could not be loaded: {why}", hint=_REBUILD)
        else:
            error = VmBootError(f"QEMU did not come up: {why}", hint="Run `vmkernel doctor`")
        self._done.set_exception(error)
        self._done.exception()  # seen: nobody may be waiting yet
