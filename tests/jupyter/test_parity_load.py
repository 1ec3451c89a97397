"""Parity under load: a part of each thing, while another VM burns a core.

What time could break: order, liveness, interrupts, questions, comms.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from compare import NOTEBOOKS, differences, record_both, steps_of, surprises
from kernel_client import Kernel, StartKernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def burner(small_spec: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    """A VM that computes as long as the tests of this module run."""
    with start_kernel(small_spec) as burner:
        cell = burner.send("print('begin')\nwhile True: pass")
        burner.wait_output(cell, "begin")
        yield burner
        burner.take(0)
        assert not cell.idle  # it burned to the end
        burner.interrupt()
        burner.finish(cell)


@pytest.mark.parametrize("name", ["comms", "queue", "stdin", "streams"])
def test_a_notebook_has_the_same_messages(
    name: str, small_spec: str, plain_spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMKERNEL_OUTPUTS", "trusted")  # comms and signs that `safe` does not show
    one, ours = record_both((plain_spec, small_spec), steps_of(NOTEBOOKS / f"{name}.ipy"))
    unknown = surprises(differences(one, ours))
    assert not unknown, "\n".join(map(str, unknown[:20]))


def test_interrupts(kernel: Kernel) -> None:
    for code in ("while True: pass", "import time; time.sleep(300)", "input()"):
        cell = kernel.send(f"print('begin')\n{code}", allow_stdin=True)
        kernel.wait_output(cell, "begin")
        kernel.listen(0.5)
        kernel.interrupt()
        assert kernel.finish(cell, 30).reply["ename"] == "KeyboardInterrupt"
    assert kernel.run("1 + 1").result == "2"


def test_output_is_live(kernel: Kernel) -> None:
    cell = kernel.run("import time\nprint('early')\ntime.sleep(3)\nprint('late')")
    first, last = (
        moment
        for moment, message in zip(cell.times, cell.messages, strict=True)
        if message["msg_type"] == "stream"
    )
    assert last - first > 1.5
