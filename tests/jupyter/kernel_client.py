"""A Jupyter client for tests: real sockets, every message kept under the request it answers.

jupyter_client's own blocking client hands out one message at a time and leaves it to the caller
to find out which request it belongs to. Tests ask about several requests at once, about order and
about time, so this one files each message, with the moment it came in, under its parent's id.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import zmq
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

PATIENCE = 240.0
"""Seconds for anything that is bound to happen: a loaded machine without KVM is slow, and the
first start of all builds a template."""

Message = dict[str, Any]


class Cell:
    """A request that was sent, and what has come back for it so far."""

    def __init__(self, msg_id: str) -> None:
        self.msg_id = msg_id
        self.request: Message = {}
        """What was sent, where somebody wants to know."""
        self.sent = time.monotonic()
        self.messages: list[Message] = []
        """iopub, in order of arrival."""
        self.times: list[float] = []
        """Seconds from sending to the arrival of the message of the same index."""
        self.replies: list[Message] = []
        self.questions: list[Message] = []
        """input_request messages."""

    def __repr__(self) -> str:
        return f"<Cell {self.types} {[reply['content'] for reply in self.replies]}>"

    def add(self, channel: str, message: Message) -> None:
        """File a message."""
        if channel == "iopub":
            self.messages.append(message)
            self.times.append(time.monotonic() - self.sent)
        elif channel == "stdin":
            self.questions.append(message)
        else:
            self.replies.append(message)

    @property
    def idle(self) -> bool:
        """Whether the kernel said that it is done with this request; late output may follow."""
        return any(
            message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
            for message in self.messages
        )

    @property
    def done(self) -> bool:
        """Replied to and idle."""
        return bool(self.replies) and self.idle

    @property
    def reply(self) -> Message:
        """The content of the one reply."""
        (reply,) = self.replies
        content: Message = reply["content"]
        return content

    @property
    def status(self) -> str:
        """The reply's status: ok, error or aborted."""
        return str(self.reply["status"])

    @property
    def types(self) -> list[str]:
        """The iopub messages' types, without status."""
        types = [message["msg_type"] for message in self.messages]
        return [msg_type for msg_type in types if msg_type != "status"]

    def contents(self, *types: str) -> list[Message]:
        """The contents of the iopub messages of these types."""
        return [message["content"] for message in self.messages if message["msg_type"] in types]

    def stream(self, name: str) -> str:
        """All text of a stream."""
        return "".join(
            content["text"] for content in self.contents("stream") if content["name"] == name
        )

    @property
    def stdout(self) -> str:
        """All that was printed."""
        return self.stream("stdout")

    @property
    def stderr(self) -> str:
        """All that was printed to sys.stderr."""
        return self.stream("stderr")

    @property
    def result(self) -> str:
        """The text of the one result (``Out[n]``)."""
        (content,) = self.contents("execute_result")
        return str(content["data"]["text/plain"])

    @property
    def error(self) -> Message:
        """The one error published."""
        (content,) = self.contents("error")
        return content

    @property
    def traceback(self) -> str:
        """The one error's traceback as shown."""
        return "\n".join(self.error["traceback"])


class Client:
    """One front end of a kernel."""

    def __init__(self, manager: KernelManager) -> None:
        # Not manager.client(): its clients share one identity, as no two front ends do.
        self.raw = BlockingKernelClient(parent=manager)
        self.raw.load_connection_info(manager.get_connection_info())
        self.raw.start_channels()
        self._cells: dict[str, Cell] = {}
        self.events: list[Message] = []
        """What debug_event messages said, whatever request they name."""
        self._poller = zmq.Poller()
        self._channels = {
            self.raw.iopub_channel.socket: ("iopub", self.raw.iopub_channel),
            self.raw.shell_channel.socket: ("shell", self.raw.shell_channel),
            self.raw.control_channel.socket: ("control", self.raw.control_channel),
            self.raw.stdin_channel.socket: ("stdin", self.raw.stdin_channel),
        }
        for socket in self._channels:
            self._poller.register(socket, zmq.POLLIN)

    def close(self) -> None:
        """Leave the kernel alone."""
        self.raw.stop_channels()

    def of(self, msg_id: str) -> Cell:
        """What has come for a request; also one of another client, of which iopub tells."""
        return self._cells.setdefault(msg_id, Cell(msg_id))

    def send(self, code: str, **options: Any) -> Cell:
        """Ask for a cell's execution; *options* as of ``KernelClient.execute``."""
        return self.of(self.raw.execute(code, **options))

    def ask(
        self,
        msg_type: str,
        content: Message | None = None,
        channel: str = "shell",
        *,
        subshell_id: str | None = None,
        buffers: Sequence[bytes] = (),
    ) -> Cell:
        """Send any request."""
        message = self.raw.session.msg(msg_type, content or {})
        message["buffers"] = list(buffers)
        if subshell_id is not None:
            message["header"]["subshell_id"] = subshell_id
        cell = self.of(message["header"]["msg_id"])
        getattr(self.raw, f"{channel}_channel").send(message)
        return cell

    def take(self, seconds: float) -> None:
        """File what comes in, returning after the first that does, or after *seconds*."""
        for socket, _ in self._poller.poll(seconds * 1000):
            name, channel = self._channels[socket]
            while socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                message = channel.get_msg(timeout=0)
                self.of(message["parent_header"].get("msg_id", "")).add(name, message)
                if message["msg_type"] == "debug_event":
                    self.events.append(message["content"])
                self.on_message(name, message)

    def on_message(self, channel: str, message: Message) -> None:
        """A message came in; for who wants to see all in order."""

    def wait(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Take messages until *condition* holds; fails after *seconds*."""
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"not within {seconds:g} s: {what}"
            self.take(min(left, 0.5))

    def listen(self, seconds: float) -> None:
        """Take messages for *seconds*."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.take(left)

    def finish(self, cell: Cell, seconds: float = PATIENCE) -> Cell:
        """Wait until the cell is replied to and idle."""
        self.wait(lambda: cell.done, f"the end of {cell}", seconds)
        return cell

    def run(self, code: str, *, seconds: float = PATIENCE, **options: Any) -> Cell:
        """Execute and wait for the end."""
        options.setdefault("allow_stdin", False)
        return self.finish(self.send(code, **options), seconds)

    def request(
        self,
        msg_type: str,
        content: Message | None = None,
        channel: str = "shell",
        seconds: float = PATIENCE,
    ) -> Cell:
        """Send any request and wait for the end."""
        return self.finish(self.ask(msg_type, content, channel), seconds)

    def wait_output(self, cell: Cell, text: str) -> None:
        """Wait until the cell has printed *text*."""
        self.wait(lambda: text in cell.stdout, f"{text!r} from {cell}")

    def wait_question(self, cell: Cell, number: int = 1) -> Message:
        """Wait until the cell has asked for input *number* times; the last question."""
        self.wait(lambda: len(cell.questions) >= number, f"question {number} of {cell}")
        content: Message = cell.questions[-1]["content"]
        return content

    def interrupt(self) -> None:
        """interrupt_request on the control channel, as in message mode."""
        self.request("interrupt_request", channel="control")


def kernel_environment() -> dict[str, str]:
    """This process's environment, less what makes plain ipykernel deaf to file descriptors."""
    return {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}


class Kernel(Client):
    """A kernel that was started for a test, and its first client."""

    def __init__(
        self,
        name: str,
        env: dict[str, str] | None = None,
        ready: bool = True,
        **start_options: Any,
    ) -> None:
        self._shut_down = False
        self.manager = KernelManager(kernel_name=name)
        self.manager.start_kernel(env={**kernel_environment(), **(env or {})}, **start_options)
        try:
            super().__init__(self.manager)
            if ready:
                self.wait_ready()
        except BaseException:
            self.manager.shutdown_kernel(now=True)
            raise

    def wait_ready(self) -> None:
        """Wait for the kernel's answer, and until iopub is heard."""
        self.raw.wait_for_ready(timeout=PATIENCE)

    @property
    def pid(self) -> int:
        """The wrapper's process id."""
        return int(self.manager.provisioner.pid)

    def shut_down(self) -> None:
        """Ask the kernel to end, and wait for it; forceful when it does not.  May be repeated."""
        if not self._shut_down:
            self._shut_down = True
            self.close()
            self.manager.shutdown_kernel(now=not self.manager.is_alive())

    @contextmanager
    def another_client(self) -> Iterator[Client]:
        """A second front end."""
        client = Client(self.manager)
        try:
            client.raw.wait_for_ready(timeout=PATIENCE)
            yield client
        finally:
            client.close()


StartKernel = Callable[..., AbstractContextManager[Kernel]]
"""The fixture ``start_kernel``: ``with start_kernel(name, …) as kernel:``."""
