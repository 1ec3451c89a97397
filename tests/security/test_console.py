"""`jupyter console`, whose terminal a guest's texts reach: what would be obeyed there does not."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from escapes import COLOUR, OBEYED, obeyed
from vmhost import MEMORY

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PATIENCE = 120
CODE = f"""
import sys
from IPython.display import display
ip = get_ipython()
for name, sequence in {OBEYED!r}.items():
    print(name, sequence + "after")
sys.stdout.write("\\x1b"); sys.stdout.flush(); print("]0;split\\x07")
print("\\x1b]2;stderr\\x07", file=sys.stderr)
print("{COLOUR.encode("unicode_escape").decode()}red\\x1b[0m")
class Evil:
    def __repr__(self): return "\\x1b]2;repr\\x07shown"
display(Evil())
ip.displayhook(Evil())
ip.payload_manager.write_payload({{"source": "page", "start": 0,
    "data": {{"text/plain": "\\x1b]2;page\\x07a page"}}}})
print("hello", input("\\x1b]2;prompt\\x07name? "))
"""
EVERYWHERE = ("split", "stderr", "repr", "page", "prompt", "traceback")


def in_console(kernel: str) -> str:
    """All that the console writes to its terminal while such cells run."""
    console = pexpect.spawn(
        sys.executable,
        ["-m", "jupyter", "console", f"--kernel={kernel}",
         "--ZMQTerminalInteractiveShell.simple_prompt=True"],
        env={**os.environ, "TERM": "dumb", "PAGER": "cat"}, encoding="utf-8", timeout=PATIENCE,
        dimensions=(400, 2000), echo=False,
    )  # fmt: skip
    shown: list[str] = []

    def wait(what: str) -> None:
        console.expect(what)
        shown.append(console.before + console.after)

    wait(r"In \[.*?1.*?\]: ")
    console.sendline(f"import base64; exec(base64.b64decode({base64.b64encode(CODE.encode())!r}))")
    wait(r"name\? ")
    console.sendline("me")
    wait(r"In \[.*?2.*?\]: ")
    console.sendline("raise ValueError('\\x1b]2;traceback\\x07 the end')")
    wait(r"In \[.*?3.*?\]: ")
    console.close(force=True)
    return "".join(shown)


@pytest.fixture(scope="module")
def kernel(template: str) -> Callable[[str], str]:
    """``kernel("safe")``: the name of a kernelspec with that policy; its template is there."""
    from vmkernel.cli.install import install_kernelspec

    def install(outputs: str) -> str:
        kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
        options = {"recipe": template, "memory": MEMORY, "outputs": outputs}
        install_kernelspec(kernels, name=f"console-{outputs}", options=options)
        return f"console-{outputs}"

    return install


def test_safe_the_terminal_is_not_moved(kernel: Callable[[str], str]):
    shown = in_console(kernel("safe"))
    assert obeyed(shown) == []
    assert f"{COLOUR}red" in shown
    assert shown.count("after") == len(OBEYED)
    for word in ("hello me", "shown", "a page", "ValueError"):
        assert word in shown


def test_trusted_everything_reaches_it(kernel: Callable[[str], str]):
    shown = in_console(kernel("trusted"))
    for name, sequence in OBEYED.items():
        assert f"{name} {sequence}after" in shown, name
    for place in EVERYWHERE:
        assert f"{place}\x07" in shown, place
