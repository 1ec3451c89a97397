"""A front end on the gateway, told what to do by lines of JSON: ``[number, command, arguments]``.

Each is done in a thread of its own and answered by ``[number, answer]``; an exception by its text.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

from jupyter_client import KernelManager
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.ioloop import IOLoopKernelManager  # noqa: F401 - imported before the clock runs


class Fronts:
    """What may be asked: its methods."""

    def __init__(self) -> None:
        self.kernels: dict[str, KernelManager] = {}
        self.clients: dict[str, BlockingKernelClient] = {}

    def start(self, name: str, spec: str = "vmsandbox-ray") -> dict[str, Any]:
        began = time.monotonic()
        manager = self.kernels[name] = KernelManager(kernel_name=spec)
        manager.start_kernel()
        client = self.clients[name] = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        return {"seconds": time.monotonic() - began}

    def run(self, name: str, code: str, seconds: float = 90) -> dict[str, Any]:
        said: list[str] = []
        began = time.monotonic()

        def hear(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                said.append(message["content"]["text"])

        reply = self.clients[name].execute_interactive(code, timeout=seconds, output_hook=hear)
        content = reply["content"]
        return {
            "said": "".join(said),
            "status": content["status"],
            "ename": content.get("ename", ""),
            "evalue": content.get("evalue", ""),
            "traceback": "\n".join(content.get("traceback", [])),
            "seconds": time.monotonic() - began,
        }

    def interrupt(self, name: str) -> None:
        self.kernels[name].interrupt_kernel()

    def restart(self, name: str) -> None:
        self.kernels[name].restart_kernel(now=False)
        self.clients[name].wait_for_ready(timeout=60)

    def alive(self, name: str) -> bool:
        return bool(self.kernels[name].is_alive())

    def facts(self, name: str) -> dict[str, Any]:
        kernel = self.kernels[name].provisioner._kernel
        return dict(kernel.statistics()) if kernel is not None else {}

    def stop(self, name: str) -> dict[str, Any]:
        began = time.monotonic()
        self.clients.pop(name).stop_channels()
        self.kernels.pop(name).shutdown_kernel()
        return {"seconds": time.monotonic() - began}


def main() -> None:
    """Serve until standard input ends; then shut all kernels down."""
    fronts, lock = Fronts(), threading.Lock()

    def serve(number: int, command: str, arguments: list[Any]) -> None:
        try:
            answer = getattr(fronts, command)(*arguments)
        except BaseException as error:
            answer = {"exception": f"{type(error).__name__}: {error}"}
        with lock:
            print(json.dumps([number, answer]), flush=True)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        threading.Thread(target=serve, args=json.loads(line), daemon=True).start()
    for name in list(fronts.kernels):
        fronts.stop(name)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
