"""A relay in a thread, as in the driver; real clients on one side of it, real kernels on the other.

The kernels are plain ipykernel with encryption where the test is not about a VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import zmq
from jupyter_client import AsyncKernelManager
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.session import Session

from vmkernel.cluster.relay import Relay

KEY = b"of this test only"
PATIENCE = 60
LOCAL = {"ip": "127.0.0.1", "key": KEY, "signature_scheme": "hmac-sha256"}


class Rig:
    """A relay, and what is on both sides of it; closes all of it."""

    def __init__(self, local: dict[str, Any] | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.kernels: list[AsyncKernelManager] = []
        self.clients: list[BlockingKernelClient] = []
        self.relay: Relay = self.within(self._relay, {**LOCAL, **(local or {})})

    async def _relay(self, local: dict[str, Any]) -> Relay:
        relay = Relay(local)
        await relay.open()
        return relay

    def within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In the relay's loop."""

        async def call() -> Any:
            result = function(*arguments)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE)

    def kernel(self, name: str) -> dict[str, Any]:
        """Start a kernel that encrypts; its connection information."""

        async def start() -> dict[str, Any]:
            while True:
                manager = AsyncKernelManager(kernel_name=name, transport_encryption="required")
                manager.session.key = KEY
                self.kernels.append(manager)
                await manager.start_kernel()
                info = dict(manager.get_connection_info())
                if await _listens(manager, info["hb_port"]):
                    return {k: v.decode() if isinstance(v, bytes) else v for k, v in info.items()}

        return self.within(start)

    def pid(self) -> int:
        """Of the kernel that was started last."""
        return int(self.kernels[-1].provisioner.pid)  # type: ignore[union-attr]

    def connect(self, info: dict[str, Any]) -> None:
        """Lead the relay to a kernel."""
        self.within(self.relay.connect, info)

    def client(self) -> BlockingKernelClient:
        """Another front end."""
        client = BlockingKernelClient()
        client.load_connection_info(self.relay.info)
        client.start_channels()
        self.clients.append(client)
        return client

    def ready(self) -> BlockingKernelClient:
        """Another front end, which the kernel has answered."""
        client = self.client()
        client.wait_for_ready(timeout=PATIENCE)
        return client

    def close(self) -> None:
        for client in self.clients:
            client.stop_channels()
        self.within(self.relay.close)
        for manager in self.kernels:
            # A VM's kernel clears away behind itself when it is let
            now = not manager.kernel_name.startswith("vmsandbox")
            self.within(lambda manager=manager, now=now: manager.shutdown_kernel(now=now))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


async def _listens(manager: AsyncKernelManager, port: int) -> bool:
    """Wait for the socket that is bound last; False: a port that was chosen was taken meanwhile."""
    while await manager.is_alive():
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return True
        await asyncio.sleep(0.05)
    return False


def run(client: BlockingKernelClient, code: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """What the cell printed, and its reply."""
    said: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])
        elif message["msg_type"] == "clear_output":
            said.clear()

    reply = client.execute_interactive(code, output_hook=hear, timeout=PATIENCE, **options)
    return "".join(said), reply["content"]


class Wire:
    """One bare socket to the relay, for what Jupyter's client does not do."""

    def __init__(self, rig: Rig, channel: str, identity: bytes = b"", **options: int) -> None:
        self.session = Session(key=KEY)
        kind = zmq.SUB if channel == "iopub" else zmq.DEALER
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self.socket.linger = 0
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        for name, value in options.items():
            setattr(self.socket, name, value)
        if channel == "iopub":
            self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.socket.connect(f"tcp://127.0.0.1:{rig.relay.info[f'{channel}_port']}")

    def send(self, msg_type: str, content: dict[str, Any], msg_id: str = "", **parts: Any) -> str:
        """Send a signed message; its id.  Raises zmq.Again when the socket is full."""
        header = self.session.msg_header(msg_type)
        if msg_id:
            header["msg_id"] = msg_id
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
        frames = [*self.session.serialize(message), *parts.get("buffers", [])]
        self.socket.send_multipart(frames, zmq.NOBLOCK)
        return str(header["msg_id"])

    def receive(self, seconds: float = PATIENCE) -> dict[str, Any]:
        """The next message, its signature checked."""
        if not self.socket.poll(seconds * 1000):
            raise TimeoutError(f"nothing in {seconds} s")
        _, frames = self.session.feed_identities(self.socket.recv_multipart())
        return self.session.deserialize(frames)

    def close(self) -> None:
        self.socket.close()
