"""The Python engine without a VM, and what the host says to it and hears of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from vmkernel.protocol import frames, messages

ROOT = Path(__file__).resolve().parents[1]


class Engine:
    """The host's end."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.control, their_control = socket.socketpair()
        self.sock.settimeout(30)
        child = ROOT / "tests/unit/engine_child.py"
        self.process = subprocess.Popen(
            [sys.executable, str(child), str(theirs.fileno()), str(their_control.fileno())],
            pass_fds=[theirs.fileno(), their_control.fileno()],
            stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        theirs.close()
        their_control.close()
        assert self.process.stdout is not None
        self.info = json.loads(self.process.stdout.readline())
        self.reader = frames.FrameReader()
        self.waiting: list[messages.FromGuest] = []
        self.count = 0

    def send(
        self,
        msg_type: str,
        content: dict[str, Any],
        channel: str = "shell",
        subshell_id: str = "",
        msg_id: str = "",
    ) -> str:
        self.count += 1
        msg_id = msg_id or f"m{self.count}"
        header = {"msg_id": msg_id, "msg_type": msg_type, "session": "s", "username": "u"}
        if subshell_id:
            header["subshell_id"] = subshell_id
        while_busy = subshell_id or channel in ("control", "vm")
        empty = msgspec.Raw(b"{}")
        body = messages.encode_json(
            messages.ToGuest(
                channel,  # type: ignore[arg-type]
                msg_id, msg_type, msgspec.Raw(json.dumps(header).encode()), empty,
                msgspec.Raw(msgspec.json.encode(content)),
            )
        )  # fmt: skip
        sock = self.control if while_busy and msg_type != "wake_request" else self.sock
        sock.sendall(b"".join(frames.encode(body)))
        return msg_id

    def receive(self) -> messages.FromGuest:
        while not self.waiting:
            for message in self.reader.feed(self.sock.recv(1 << 18)):
                body, buffers = frames.split(message)
                answer = messages.decode(body, messages.FromGuest)
                if answer.msg_type == "stream":
                    messages.take_text(answer.content, buffers)
                self.waiting.append(answer)
        return self.waiting.pop(0)

    def until_idle(self, msg_id: str) -> list[messages.FromGuest]:
        got = []
        while True:
            got.append(self.receive())
            if got[-1].msg_type == "status" and got[-1].parent_id == msg_id:
                return got

    def cell(self, code: str, **options: Any) -> str:
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": True}
        return self.send("execute_request", {**content, **options})

    def run(self, code: str, **options: Any) -> list[messages.FromGuest]:
        return self.until_idle(self.cell(code, **options))

    def wake(self, **env: str) -> None:
        content = messages.WakeKernel(os.urandom(64), env, "")
        self.send("wake_request", msgspec.to_builtins(content), "control")
        assert self.receive().msg_type == "wake_reply"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.sock.close()
        self.control.close()
