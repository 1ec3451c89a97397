"""ipykernel's debugger, without its sockets to the rest of the kernel.

Where it stands: made by ``guest.kernel``, driven by debug_requests in ``guest.control``'s thread.
Debugpy itself is talked to as ipykernel does it, over TCP on the guest's own loopback; that
connection is made when a front end first starts the debugger, since hardly any kernel does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import zmq
from ipykernel.debugger import Debugger
from zmq.eventloop.zmqstream import ZMQStream


class PortDebugger(Debugger):
    """A Debugger that connects itself at its first start."""

    kernel: Any = None
    """The kernel, once :func:`connect_debugger` was called"""

    def start(self) -> bool:
        """Start debugpy and connect to it.  Called in the control thread."""
        if self.debugpy_client.debugpy_stream is None:
            socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.STREAM)
            socket.linger = 1000
            stream = ZMQStream(socket)  # on the loop of this thread
            stream.on_recv(self.kernel.dispatch_debugpy, copy=False)
            self.debugpy_client.debugpy_stream = stream
            self._stopped = asyncio.ensure_future(self.kernel.poll_stopped_queue())
        started: bool = super().start()
        return started


class ShellCaller:
    """What the debugger takes for a session and for a socket to the main shell.

    It has one cell run there, which lets debugpy listen: ``run(code)`` is a coroutine function
    that executes it on ``loop`` (the main thread's) and returns the execute_reply's content.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        run: Callable[[str], Awaitable[dict[str, Any]]],
    ) -> None:
        self._loop = loop
        self._run = run
        self._result: Any = None

    def getsockopt(self, option: int) -> bytes:
        """As a socket: its identity, which nobody needs."""
        return b""

    def send(self, stream: Any, msg_type: str, content: dict[str, Any], *_: Any) -> None:
        """As a session: an execute_request, silent."""
        self._result = asyncio.run_coroutine_threadsafe(
            self._run(content["code"]),  # type: ignore[arg-type]
            self._loop,
        )

    def recv(self, stream: Any, mode: int) -> tuple[list[bytes], dict[str, Any]]:
        """As a session: the reply; waits for it."""
        return [], {"content": self._result.result()}


def connect_debugger(kernel: Any, caller: ShellCaller) -> None:
    """Tell the kernel's debugger what it was not told when it was made."""
    debugger = kernel.debugger
    debugger.kernel = kernel
    debugger.session = debugger.shell_socket = caller
