"""The way into the guest kernel that works while a cell runs: port "control", and its thread.

Where it stands: beside ``guest.engine``, which serves port "kernel" in the main thread.  What comes
here are requests on the control channel (debugger, subshells), requests to a subshell, what the
user typed for one, and the host's answers to the guest's own questions.  Nothing is said on this
port: all that the guest kernel says goes one way, so it has one order.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import queue
import threading
import traceback
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from ipykernel.thread import CONTROL_THREAD_NAME, BaseThread

from vmkernel.guest.kernel import as_message, idents
from vmkernel.guest.port import Port
from vmkernel.protocol import frames, messages

Serve = Callable[[dict[str, Any]], Awaitable[None]]
ServeNow = Callable[[dict[str, Any]], None]
POLL = 0.05
"""Seconds between two looks whether a signal came just before one began to wait."""


class Inbox:
    """Where threads wait for what the host answers them, by the id of their question."""

    def __init__(self) -> None:
        self._waiting: dict[str, queue.SimpleQueue[Any]] = {}

    def ask(self, key: str, send: Callable[[], None]) -> Any:
        """Call ``send``, which asks question ``key``; the answer.

        An interrupt ends the wait (main thread).  Raises RuntimeError in the control thread,
        which would wait for what it alone can hear.
        """
        if threading.current_thread().name == CONTROL_THREAD_NAME:
            raise RuntimeError("a request on the control channel can ask nobody")
        box = self._waiting[key] = queue.SimpleQueue()
        try:
            send()
            while True:
                try:
                    return box.get(timeout=POLL)
                except queue.Empty:
                    continue
        finally:
            self._waiting.pop(key, None)

    def put(self, key: str, value: Any) -> None:
        """An answer came; dropped when nobody waits for it (an interrupt came first)."""
        box = self._waiting.get(key)
        if box is not None:
            box.put(value)


class Subshell(BaseThread):
    """A thread that serves requests one after another, beside the main shell."""

    def __init__(self, subshell_id: str, serve: Serve, serve_meanwhile: ServeNow) -> None:
        super().__init__(name=f"subshell-{subshell_id}", daemon=True)
        self.loop = self.io_loop.asyncio_loop
        self._serve = serve
        self._serve_meanwhile = serve_meanwhile
        self._lock = asyncio.Lock()
        self._context = contextvars.copy_context()
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, message: dict[str, Any]) -> None:
        """Serve a request when those before it are served.  From any thread."""
        self.loop.call_soon_threadsafe(self._begin, message)

    def _begin(self, message: dict[str, Any]) -> None:
        task = self.loop.create_task(self._in_turn(message), context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_turn(self, message: dict[str, Any]) -> None:
        if message["msg_type"] in messages.COMM_TYPES and self._lock.locked():
            contextvars.copy_context().run(self._serve_meanwhile, message)
            return
        async with self._lock:
            await self._serve(message)


class Subshells:
    """All of them.  Its names are those that IPython's %subshell asks for."""

    def __init__(self, serve: Serve, serve_meanwhile: ServeNow) -> None:
        self._serve = serve
        self._serve_meanwhile = serve_meanwhile
        self._threads: dict[str, Subshell] = {}

    def create(self) -> str:
        """Start one; its id."""
        subshell_id = str(uuid.uuid4())
        thread = self._threads[subshell_id] = Subshell(
            subshell_id, self._serve, self._serve_meanwhile
        )
        thread.start()
        return subshell_id

    async def delete(self, subshell_id: str) -> None:
        """End one, once what it runs has ended.  Raises KeyError."""
        thread = self._threads.pop(subshell_id)
        thread.stop()
        while thread.is_alive():  # noqa: ASYNC110 - a thread to join it in would be one more
            await asyncio.sleep(POLL / 10)

    def get(self, subshell_id: str) -> Subshell | None:
        """One by its id."""
        return self._threads.get(subshell_id)

    def list_subshell(self) -> list[str]:
        """All ids."""
        return list(self._threads)

    def subshell_id_from_thread_id(self, thread_id: int) -> str | None:
        """The subshell whose thread this is, None for the main shell.  Raises RuntimeError."""
        if thread_id == threading.main_thread().ident:
            return None
        for subshell_id, thread in self._threads.items():
            if thread.ident == thread_id:
                return subshell_id
        raise RuntimeError(f"thread {thread_id} is no subshell's")


class ControlLane:
    """The thread that reads port "control".  ``kernel`` is set before it is started."""

    def __init__(self, port: Port) -> None:
        self.kernel: Any = None
        self.awake = False
        self.inbox = Inbox()
        self.subshells = Subshells(
            self._serve_in_subshell,
            lambda message: self.kernel.serve_meanwhile(message),  # noqa: PLW0108 - not there yet
        )
        self.port = port
        self._thread = BaseThread(name=CONTROL_THREAD_NAME, daemon=True)
        self._loop = self._thread.io_loop.asyncio_loop
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the thread."""
        self._loop.call_soon(self._loop.add_reader, self.port.fd, self._on_readable)
        self._thread.start()

    def _on_readable(self) -> None:
        for message in self.port.receive():
            body, buffers = frames.split(message)
            self._dispatch(messages.decode(body, messages.ToGuest), buffers)

    def _dispatch(self, request: messages.ToGuest, buffers: list[memoryview]) -> None:
        if not self.awake:
            raise RuntimeError("a request came before the wake-up")
        match request.channel:
            case "vm":
                self.inbox.put(request.msg_id, messages.decode_object(request.content))
            case "stdin":
                content = messages.decode_object(request.content)
                self.inbox.put(request.msg_id, str(content.get("value", "")))
            case "control":
                task = self._loop.create_task(self._serve(as_message(request, buffers)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case "shell":
                message = as_message(request, buffers)
                subshell = self.subshells.get(message["header"].get("subshell_id", ""))
                if subshell is not None:
                    subshell.submit(message)
                else:  # it was deleted in this very instant: the host has an answer
                    self._end(message)

    async def _serve(self, message: dict[str, Any]) -> None:
        async with self._lock:  # one at a time, as ipykernel has it
            await self._handle("control", self.kernel.control_handlers, message)

    async def _serve_in_subshell(self, message: dict[str, Any]) -> None:
        waits = asyncio.get_running_loop().call_soon(self.kernel.say_awaiting, message)
        try:
            await self._handle("shell", self.kernel.shell_handlers, message)
        finally:
            waits.cancel()

    async def _handle(
        self, channel: str, handlers: dict[str, Any], message: dict[str, Any]
    ) -> None:
        try:
            self.kernel.set_parent(idents(message), message, channel)
            handler = handlers.get(message["msg_type"])
            if handler is not None:
                result = handler(channel, [], message)
                if inspect.isawaitable(result):
                    await result
        except Exception:
            traceback.print_exc()
        finally:
            self._end(message)

    def _end(self, message: dict[str, Any]) -> None:
        session = self.kernel.session
        session.pump.publish()
        session.send("iopub", "status", {"execution_state": "idle"}, message)
        session.port.flush()
