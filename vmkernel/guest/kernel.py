"""IPythonKernel, fed from the ports: where it must differ from ipykernel's own way.

Where it stands: built and driven by ``guest.engine``.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ipykernel.eventloops import loop_asyncio
from ipykernel.ipkernel import IPythonKernel

from vmkernel.guest.debug import PortDebugger
from vmkernel.guest.express import Express
from vmkernel.guest.port import Port
from vmkernel.guest.session import PortSession, encode_body
from vmkernel.protocol import messages


class PortKernel(IPythonKernel):
    """IPythonKernel, fed from the ports."""

    implementation = "vmsandbox"
    debugger_class = PortDebugger
    _execute_sleep = 0
    _supports_kernel_subshells = True
    port: Port
    express: Express | None = None
    ask: Callable[[str, Callable[[], None]], str]
    """ask(msg_id of the request that asks, what sends the question): what the user typed"""

    def __init__(self, subshells: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # What ipykernel's shell channel thread is asked by do_execute (which thread gets signals)
        # and by %subshell
        self.shell_channel_thread = types.SimpleNamespace(
            parent_thread=threading.main_thread(), manager=subshells
        )

    def _abort_queues(self, subshell_id: str | None = None) -> None:
        """Nothing is queued here: the host aborts what it holds."""

    def do_complete(self, code: str, cursor_pos: int | None) -> Any:
        """As the base class; an attribute is completed without its dot, as jedi does it."""
        reply = super().do_complete(code, cursor_pos)
        if reply["matches"] and all(match.startswith(".") for match in reply["matches"]):
            reply["matches"] = [match[1:] for match in reply["matches"]]
            reply["cursor_start"] += 1
            for item in reply["metadata"].get("_jupyter_types_experimental", ()):
                item["text"] = item["text"][1:]
                item["start"] += 1
        return reply

    def do_history(self, hist_access_type: str, output: bool, raw: bool, **query: Any) -> Any:
        """As the base class, and the current session has its number, not 0."""
        reply = super().do_history(hist_access_type, output, raw, **query)
        current = self.shell.history_manager.session_number
        reply["history"] = [(session or current, *rest) for session, *rest in reply["history"]]
        return reply

    async def execute_request(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """As the base class, and the short way where it comes to the same."""
        if self.express is not None and self.express.fits(parent):
            await self.express.execute(stream, parent)
        else:
            await super().execute_request(stream, ident, parent)

    @functools.wraps(IPythonKernel.do_execute)
    async def do_execute(self, *args: Any, **options: Any) -> Any:
        """As the base class; while it lasts, a flush sends at once."""
        pump = self.session.pump
        pump.running += 1
        try:
            return await super().do_execute(*args, **options)
        finally:
            pump.running -= 1

    @contextmanager
    def _cancel_on_sigint(self, future: asyncio.Future[Any]) -> Iterator[None]:
        """Cancel a top-level await on SIGINT, also when the loop sleeps (ipykernel#881)."""
        loop = asyncio.get_running_loop()
        cancel = functools.partial(loop.call_soon_threadsafe, future.cancel)
        previous = signal.signal(signal.SIGINT, self.port.interrupts.calling(cancel))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _input_request(
        self, prompt: str, ident: Any, parent: dict[str, Any], password: bool = False
    ) -> str:
        def send() -> None:
            PortSession.pump.publish()
            content = {"prompt": prompt, "password": password}
            self.session.send("stdin", "input_request", content, parent)
            self.port.flush()

        try:
            value = self.ask(parent["header"].get("msg_id", ""), send)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Interrupted by user") from None
        if value == "\x04":
            raise EOFError
        return value

    def _publish_debug_event(self, event: Any) -> None:
        super()._publish_debug_event(event)
        self.port.flush()  # whoever waits at a breakpoint sends nothing else

    def serve_meanwhile(self, message: dict[str, Any]) -> None:
        """Serve a comm message while a cell awaits: no status of its own, the cell's stays."""
        parent = self.get_parent("shell")
        try:
            self.set_parent(idents(message), message, "shell")
            self.shell_handlers[message["msg_type"]]("shell", [], message)
        except Exception:
            traceback.print_exc()
        finally:
            self.set_parent(idents(parent), parent, "shell")
            self.session.pump.publish()
            self.port.flush()

    def say_awaiting(self, message: dict[str, Any]) -> None:
        """Tell the host that a request lets the event loop run: comm messages can be served."""
        if message["msg_type"] == "execute_request":
            self.port.send(encode_body(["vm", "awaiting", message["msg_id"], {}, {}]))

    def enter_eventloop(self) -> None:
        """As the base class; for asyncio there is nothing to do, it is not done 1,000 times/s."""
        if self.eventloop is not loop_asyncio:
            super().enter_eventloop()

    # --- subshells: ipykernel asks its shell channel thread, we have none ---

    async def create_subshell_request(self, stream: Any, ident: Any, parent: Any) -> None:
        """Start a subshell; the reply has its id."""
        content = {"status": "ok", "subshell_id": self.shell_channel_thread.manager.create()}
        self.session.send(stream, "create_subshell_reply", content, parent)

    async def delete_subshell_request(self, stream: Any, ident: Any, parent: Any) -> None:
        """End a subshell, when what it runs has ended."""
        try:
            await self.shell_channel_thread.manager.delete(parent["content"]["subshell_id"])
            content: dict[str, Any] = {"status": "ok"}
        except KeyError as error:
            content = {"status": "error", "evalue": f"Unknown subshell_id {error.args[0]!r}"}
        self.session.send(stream, "delete_subshell_reply", content, parent)

    async def list_subshell_request(self, stream: Any, ident: Any, parent: Any) -> None:
        """The ids of all subshells."""
        ids = self.shell_channel_thread.manager.list_subshell()
        content = {"status": "ok", "subshell_id": ids}
        self.session.send(stream, "list_subshell_reply", content, parent)


def as_message(request: messages.ToGuest, buffers: list[memoryview]) -> dict[str, Any]:
    """A request as ipykernel's handlers take it."""
    decode = messages.decode_object
    return {
        "header": decode(request.header),
        "msg_id": request.msg_id,
        "msg_type": request.msg_type,
        "parent_header": {},
        "metadata": decode(request.metadata),
        "content": decode(request.content),
        "buffers": buffers,
    }


def idents(message: dict[str, Any]) -> list[bytes]:
    """Who sent a request: clients' sockets have their session for an identity (jupyter_client)."""
    session = message.get("header", {}).get("session")
    return [session.encode()] if isinstance(session, str) else []
