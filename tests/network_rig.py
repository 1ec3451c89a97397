"""A VM's proxy as its owner starts it, with the guest's end of the port in the test's hands.

So a test says what no guest of ours would: to the very process, behind the same wall, as in a VM.
And servers that stand for the outside and for what must not be reached.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from vmkernel.host.network import Network
from vmkernel.protocol import messages, mux
from vmkernel.settings import Settings, load_settings
from vmkernel.vm.qemu import find_qemu


class _Agent:
    """In the place of a guest's agent: takes the order to listen."""

    def __init__(self) -> None:
        self.markers: list[bytes] = []

    async def exchange(self, command: messages.OpenNetwork, *_: object) -> None:
        self.markers.append(command.marker)


class Rig:
    """``async with Rig("allow", ["127.0.0.1:80"]) as rig: await rig.ask(b"GET …")``."""

    def __init__(self, mode: str, allow: Sequence[str], directory: Path, **changes: Any) -> None:
        values = {"network": mode, "network_allow": tuple(allow), **changes}
        loaded = load_settings()
        known = {name: getattr(loaded, name) for name in ("state_dir", "cache_dir", "runtime_dir")}
        self.settings = Settings(**{**known, **values})
        self.log_path = directory / "network.log"
        self.told: list[str] = []
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._agent = _Agent()

    async def __aenter__(self) -> Rig:
        ours, theirs = socket.socketpair()
        self.socket = theirs
        self._ours = ours
        qemu = find_qemu(self.settings.qemu, os.environ["PATH"])
        spawned: Any = SimpleNamespace(network=ours, machine=SimpleNamespace(qemu=qemu))
        self.network = Network(self.settings, spawned, self.log_path, self.told.append)
        await self.network.open(self._agent)  # type: ignore[arg-type]
        return self

    async def __aexit__(self, *_: object) -> None:
        if "guest" in vars(self):
            self.guest.close()
        await self.network.close()
        self._ours.close()
        self.socket.close()

    @property
    def marker(self) -> bytes:
        """Behind which the streams begin."""
        return self._agent.markers[-1]

    def connect(self) -> mux.Mux:
        """The guest's end, for one who keeps the rules."""
        if "guest" not in vars(self):
            self.guest = mux.Mux(self.socket.fileno(), self.marker, self.lost.set_result)
        return self.guest

    async def ask(self, data: bytes, seconds: float = 30.0) -> bytes:
        """All that comes back on a stream of its own."""
        stream = self.connect().open()
        answer = bytearray()
        with suppress(OSError):
            async with asyncio.timeout(seconds):
                await stream.send(data)
                while piece := await stream.receive():
                    answer += piece
        stream.reset()
        return bytes(answer)

    async def tunnel(self, where: str, more: bytes = b"") -> bytes:
        """The answer to a CONNECT."""
        head = f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n\r\n".encode()
        return await self.ask(head + more)

    async def get(self, url: str, *headers: str) -> bytes:
        """The answer to a GET for the whole URL."""
        host = url.split("/")[2].rpartition("@")[2]
        lines = [f"GET {url} HTTP/1.1", f"Host: {host}", *headers, "", ""]
        return await self.ask("\r\n".join(lines).encode())

    async def until_told(self, word: str, seconds: float = 20.0) -> str:
        """The news with this word in it."""
        async with asyncio.timeout(seconds):
            while True:
                for text in self.told:
                    if word in text:
                        return text
                await asyncio.sleep(0.02)

    @property
    def process(self) -> psutil.Process:
        """The proxy's process: the last of the chain."""
        assert self.network._process is not None
        process = psutil.Process(self.network._process.pid)
        return (process.children(recursive=True) or [process])[-1]


def status(answer: bytes) -> int:
    """Of a response; 0 for none."""
    words = answer.split(None, 2)
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") else 0


class Canary:
    """Listens, and knows how many have connected."""

    def __init__(self, *addresses: str) -> None:
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self.port = 0
        for address in addresses or ("127.0.0.1",):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((address, self.port))
            except OSError:  # no IPv6 here
                sock.close()
                continue
            sock.listen(64)
            self.port = sock.getsockname()[1]
            self._sockets.append(sock)
            threading.Thread(target=self._listen, args=(sock,), daemon=True).start()

    def _listen(self, sock: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = sock.accept()
                self.connections += 1
                connection.close()

    def close(self) -> None:
        """No longer."""
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


Respond = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """A web server on loopback; ``requests`` has what it was asked, request lines and headers."""

    def __init__(self, respond: Respond) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append((self.requestline, dict(self.headers)))
                with suppress(OSError):
                    respond(self)

            do_POST = do_HEAD = do_GET  # noqa: N815 - the base class's names

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """No longer."""
        self.server.shutdown()
        self.server.server_close()


def say(handler: BaseHTTPRequestHandler, code: int, body: bytes, **headers: str) -> None:
    """A whole response."""
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def make_wheel(name: str, code: str) -> tuple[str, bytes]:
    """A wheel of one module: its file name and content."""
    files = {
        f"{name}.py": code,
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }  # fmt: skip
    record = []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
            record.append(f"{path},sha256={digest.decode()},{len(text.encode())}\n")
        record.append(f"{name}-1.0.dist-info/RECORD,,\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "".join(record))
    return f"{name}-1.0-py3-none-any.whl", buffer.getvalue()


USER, PASSWORD = "reader", "s3cr3t-of-the-index"


class PackageIndex(Web):
    """A PEP 503 index that wants a password, with one project of one wheel."""

    def __init__(self, name: str = "vmkpkg", code: str = "ANSWER = 42\n") -> None:
        self.project = name
        self.file, self.wheel = make_wheel(name, code)
        self.strange_links = ""
        super().__init__(self._respond)

    @property
    def url(self) -> str:
        """With name and password, as a pip configuration has it."""
        return f"http://{USER}:{PASSWORD}@127.0.0.1:{self.port}/simple"

    def _respond(self, handler: BaseHTTPRequestHandler) -> None:
        token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if handler.headers.get("Authorization") != f"Basic {token}":
            say(handler, 401, b"", WWW_Authenticate='Basic realm="index"')
        elif handler.path == f"/simple/{self.project}/":
            digest = hashlib.sha256(self.wheel).hexdigest()
            page = f'<a href="../../files/{self.file}#sha256={digest}">{self.file}</a>'
            say(handler, 200, (page + self.strange_links).encode(), Content_Type="text/html")
        elif handler.path == f"/files/{self.file}":
            say(handler, 200, self.wheel)
        elif handler.path == "/files/away-1.0.tar.gz":
            say(handler, 302, b"", Location=self.strange_target)
        else:
            say(handler, 404, b"")

    strange_target = ""


@contextmanager
def pip_variables(**variables: str) -> Iterator[None]:
    """The host's pip is configured like this, and by nothing else."""
    before = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    for name in before:
        del os.environ[name]
    os.environ.update(PIP_CONFIG_FILE=os.devnull, **variables)
    try:
        yield
    finally:
        for name in ("PIP_CONFIG_FILE", *variables):
            os.environ.pop(name, None)
        os.environ.update(before)
