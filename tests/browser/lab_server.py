"""A JupyterLab server of a test's own: its port, its token, its directory; gone at the end."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 120.0
"""Seconds for the server's start on a loaded machine; it takes two on a quiet one."""

_QUIET = [  # no talk with the world outside
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
    "--ServerApp.terminals_enabled=False",
]
# A user's settings, by plugin: else a question about news lies over the page's corner.
_SETTINGS = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false"}}


class LabServer:
    """``python -m jupyterlab`` on *root*, serving the kernelspecs that this process sees.

    Or those of a gateway: *options* are for its command line, which runs as *command* has it.
    """

    def __init__(
        self,
        root: Path,
        log: Path,
        *,
        options: Sequence[str] = (),
        command: Callable[..., list[str]] = lambda *words: list(words),
    ) -> None:
        self.root = root
        self.log = log
        self.token = secrets.token_hex(16)
        for plugin, values in _SETTINGS.items():
            settings = Path(os.environ["JUPYTER_CONFIG_DIR"], "lab", "user-settings", plugin)
            settings.parent.mkdir(parents=True, exist_ok=True)
            settings.with_suffix(".jupyterlab-settings").write_text(json.dumps(values))
        # Our test runs set a backend for plots; who starts JupyterLab has set none.
        env = {name: value for name, value in os.environ.items()
               if name not in ("MPLBACKEND", "PYTEST_CURRENT_TEST")}  # fmt: skip
        env["JUPYTER_TOKEN"] = self.token  # not on the command line, which everyone may read
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command(
                 sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
                 f"--ServerApp.port={_free_port()}", f"--ServerApp.root_dir={root}",
                 "--ServerApp.ip=127.0.0.1", "--LabApp.expose_app_in_browser=True",
                 "--JupyterNotebookApp.expose_app_in_browser=True",
                 *_QUIET, *options),
                env=env, cwd=root, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        try:
            self.url = self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self) -> str:
        """The server's address, when it says it; its port is another if ours was taken."""
        info_file = Path(os.environ["JUPYTER_RUNTIME_DIR"], f"jpserver-{self._process.pid}.json")
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            if info := _read_json(info_file):
                return f"http://127.0.0.1:{info['port']}"
            time.sleep(0.05)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text(errors='replace')}")

    def stop(self) -> None:
        """End the server, which shuts down its kernels first; forceful when it does not."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read_json(path: Path) -> dict[str, Any]:
    """What it says, or nothing as long as it is not there or half written."""
    try:
        info: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return info
