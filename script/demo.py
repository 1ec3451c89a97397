"""Runs a notebook on the kernel vmsandbox and shows its cells and outputs as they happen.

The second half of script/demo. It is an ordinary front end: nbclient starts the kernel from its
kernelspec, as JupyterLab would, and knows nothing of virtual machines.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

# jsonschema, which nbformat imports, would compile a grammar of internationalised URIs with this
# package: 2 s at every start, for a check that no notebook asks for. Without it, it skips that.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from vmkernel.cli.install import install_kernelspec, is_ours, kernel_json
from vmkernel.errors import VmError

ROOT = Path(__file__).resolve().parents[1]
KERNEL = "vmsandbox"
# The first cell may wait for a template to be booted under emulation.
CELL_TIMEOUT = 600
SOURCE_LINES = 8
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Screen:
    """The terminal: what is ours dimmed, what the notebook says plain and indented."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.colour = self.terminal and "NO_COLOR" not in os.environ
        self._at_line_start = True

    def note(self, text: str) -> None:
        """Words of the demo's own."""
        self._fresh_line()
        print(f"\x1b[2m{text}\x1b[0m" if self.colour else text, flush=True)

    def source(self, number: int, text: str) -> None:
        """A cell's source, its first lines."""
        lines = text.splitlines()
        if len(lines) > SOURCE_LINES:
            more = len(lines) - SOURCE_LINES + 1
            lines = [*lines[: SOURCE_LINES - 1], f"… ({more} more lines)"]
        self._fresh_line()
        print()
        head = f"In [{number}]: "
        for line in lines:
            print(f"\x1b[36m{head}\x1b[0m{line}" if self.colour else head + line)
            head = "...: ".rjust(len(head))
        sys.stdout.flush()

    def heading(self, markdown: str) -> None:
        """A markdown cell: its text as it stands."""
        self._fresh_line()
        print()
        print(f"\x1b[1m{markdown}\x1b[0m" if self.colour else markdown, flush=True)

    def stream(self, text: str) -> None:
        """Text as a cell prints it, in pieces that need not end with a line."""
        if not self.colour:
            text = _ANSI.sub("", text)
        for piece in re.findall(r"[^\r\n]+|[\r\n]", text):
            if piece == "\n":
                sys.stdout.write("\n")
                self._at_line_start = True
            elif piece == "\r" and not self.terminal:
                # A line that is written over itself becomes lines, where it goes to a file.
                self._fresh_line()
            elif piece == "\r":
                sys.stdout.write("\r")
                self._at_line_start = True
            else:
                sys.stdout.write(f"    {piece}" if self._at_line_start else piece)
                self._at_line_start = False
        sys.stdout.flush()

    def block(self, text: str) -> None:
        """A whole output."""
        self._fresh_line()
        if not self.colour:
            text = _ANSI.sub("", text)
        print(textwrap.indent(text.rstrip("\n"), "    "), flush=True)

    def clear(self) -> None:
        """The cell takes back what it printed: on a terminal the line under way goes away."""
        if not self._at_line_start and self.terminal:
            sys.stdout.write("\r\x1b[K")
            self._at_line_start = True
        self._fresh_line()

    def _fresh_line(self) -> None:
        if not self._at_line_start:
            print()
        self._at_line_start = True


class Demo(NotebookClient):  # type: ignore[misc]
    """An nbclient that shows every output at the moment it comes."""

    def __init__(self, nb: Any, screen: Screen, pictures: Path, **options: Any) -> None:
        super().__init__(nb, **options)
        self.screen = screen
        self.pictures = pictures
        self.saved: list[Path] = []
        self.first_cell_at = 0.0

    def output(self, outs: list[Any], msg: dict[str, Any], display_id: str, cell_index: int) -> Any:
        """One output message: show it, then let nbclient keep it in the notebook."""
        self._show(msg["msg_type"], msg["content"])
        return super().output(outs, msg, display_id, cell_index)

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        """As nbclient does; a display's updates and erasures are shown as well."""
        if msg["msg_type"] == "update_display_data":
            self._show(msg["msg_type"], msg["content"])
        elif msg["msg_type"] == "clear_output":
            self.screen.clear()
        return super().process_message(msg, cell, cell_index)

    def _show(self, kind: str, content: dict[str, Any]) -> None:
        if kind == "stream":
            self.screen.stream(content["text"])
        elif kind == "error":
            self.screen.block("\n".join(content["traceback"]))
        elif kind in ("display_data", "execute_result", "update_display_data"):
            data = content["data"]
            if "image/png" in data:
                path = self.pictures / f"figure-{len(self.saved) + 1}.png"
                path.write_bytes(base64.b64decode(data["image/png"]))
                self.saved.append(path)
                self.screen.block(f"[picture saved: {_short(path)}]")
            elif "text/plain" in data:
                self.screen.block(data["text/plain"])

    async def run(self) -> None:
        """Run every cell, the kernel once round all of them."""
        async with self.async_setup_kernel():
            for index, cell in enumerate(self.nb.cells):
                if cell.cell_type == "markdown":
                    self.screen.heading(cell.source)
                    continue
                if cell.cell_type != "code":
                    continue
                self.screen.source(self.code_cells_executed + 1, cell.source)
                self.first_cell_at = self.first_cell_at or time.time()
                await self.async_execute_cell(cell, index)
            self.set_widgets_metadata()
            await self._say_accelerator()

    async def _say_accelerator(self) -> None:
        """The kernel tells it in its banner, which any front end may read."""
        reply = await self.kc.kernel_info(reply=True, timeout=30)
        banner = reply["content"]["banner"]
        found = re.search(r"accelerator:\s*(.+)", banner)
        self.accelerator = found[1].strip() if found else f"not told in the banner {banner!r}"


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def ensure_kernelspec() -> Path:
    """The kernelspec in this environment, written anew only when it differs."""
    import json

    kernels = Path(sys.prefix) / "share" / "jupyter" / "kernels"
    wanted = kernel_json(None, {})
    file = kernels / KERNEL / "kernel.json"
    if is_ours(file.parent) and json.loads(file.read_text()) == wanted:
        return file.parent
    return install_kernelspec(kernels, name=KERNEL)


def main() -> int:
    """0 when every cell did what it should."""
    parser = argparse.ArgumentParser(prog="script/demo", description="Run a notebook in a microVM.")
    parser.add_argument("--notebook", type=Path, default=ROOT / "docs" / "demo.ipynb")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output")
    parser.add_argument("--kernel", default=KERNEL, help="another kernel, like python3")
    options = parser.parse_args()
    began = float(os.environ.get("DEMO_BEGAN", "0").replace(",", ".")) or time.time()
    screen = Screen()
    os.environ.setdefault("VMKERNEL_POOL_SIZE", "0")  # nothing waits for a next one at the end

    try:
        ensure_kernelspec()
        notebook = nbformat.read(options.notebook, as_version=4)
        options.output.mkdir(parents=True, exist_ok=True)
    except (VmError, OSError) as error:
        print(f"demo: {error.explain() if isinstance(error, VmError) else error}", file=sys.stderr)
        return 1
    screen.note(f"Running {_short(options.notebook)} on the kernel {options.kernel!r}.")
    demo = Demo(
        notebook,
        screen,
        options.output,
        kernel_name=options.kernel,
        timeout=CELL_TIMEOUT,
        startup_timeout=60,
    )
    failure = ""
    try:
        asyncio.run(demo.run())
    except CellExecutionError as error:
        # Its output, the traceback, is on the screen already.
        failure = f"a cell failed: {error.ename}: {error.evalue}"
    except (DeadKernelError, TimeoutError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"

    executed = options.output / options.notebook.name
    nbformat.write(notebook, executed)
    screen.note("")
    if demo.first_cell_at:
        screen.note(f"First cell sent {demo.first_cell_at - began:.1f} s after the command began; "
                    f"{demo.code_cells_executed} cells run in "
                    f"{time.time() - demo.first_cell_at:.1f} s.")  # fmt: skip
    for path in (*demo.saved, executed):
        screen.note(f"Saved {_short(path)}")
    if failure:
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    screen.note(f"Accelerator: {demo.accelerator}")
    screen.note(
        "Go on with:\n"
        "  .venv/bin/jupyter lab                          (choose Python (microVM))\n"
        "  .venv/bin/jupyter console --kernel vmsandbox\n"
        "  .venv/bin/vmkernel ps                          (which VMs run)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
