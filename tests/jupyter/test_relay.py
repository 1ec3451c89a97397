"""An unmodified ipykernel in a VM, behind the relay: the yardstick of the Python engine.

What every Python kernel must do is in the other files of this directory, which run against this
one with KERNEL_UNDER_TEST=relay.  Here is a part of each thing that the relay has to carry.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_client import Kernel, StartKernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def relay(relay_kernel: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    """A running kernel, shared by the module's tests."""
    with start_kernel(relay_kernel) as kernel:
        kernel.run("1")  # the template is there
        yield kernel


def test_it_is_ipykernel_as_it_comes(relay: Kernel) -> None:
    assert relay.request("kernel_info_request").reply["implementation"] == "ipython"
    code = "import sys; print([name for name in sys.modules if name.startswith('vmkernel')])"
    assert relay.run(code).stdout == "[]\n"


def test_streams_of_python_and_of_its_children(relay: Kernel) -> None:
    cell = relay.run("import os, sys; print('one'); print('two', file=sys.stderr); 6*7")
    assert (cell.stdout, cell.stderr, cell.result) == ("one\n", "two\n", "42")
    assert relay.run("!echo three; echo four >&2").stdout.split() == ["three", "four"]
    cell = relay.run("for n in range(20_000): print(n)")
    assert cell.stdout == "".join(f"{n}\n" for n in range(20_000))
    assert cell.messages[-1]["content"] == {"execution_state": "idle"}


def test_a_display_is_updated(relay: Kernel) -> None:
    relay.run("h = display('before', display_id='d')")
    cell = relay.run("h.update('after')")
    assert cell.types == ["execute_input", "update_display_data"]
    (content,) = cell.contents("update_display_data")
    assert content["transient"] == {"display_id": "d"}


def test_input(relay: Kernel) -> None:
    cell = relay.send("print('hello', input('name? '))", allow_stdin=True)
    assert relay.wait_question(cell) == {"prompt": "name? ", "password": False}
    relay.raw.input("Grüße")
    assert relay.finish(cell).stdout == "hello Grüße\n"


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import asyncio; await asyncio.sleep(300)",
        "import subprocess; subprocess.run(['sleep', '300'])",
        "input()",
    ],
)
def test_an_interrupt_ends_the_cell_and_nothing_else(relay: Kernel, code: str) -> None:
    relay.run("held = 'on'")
    cell = relay.send(f"print('begun')\n{code}", allow_stdin=True)
    relay.wait_output(cell, "begun")
    relay.listen(0.5)
    relay.interrupt()
    relay.finish(cell, 30)
    assert cell.error["ename"] in ("KeyboardInterrupt", "CancelledError")
    assert relay.run("print(held)").stdout == "on\n"


def test_an_error_stops_what_is_queued(relay: Kernel) -> None:
    failing = relay.send("import time; time.sleep(0.5); 1/0")
    queued = [relay.send(f"print({n})") for n in range(5)]
    for cell in (failing, *queued):
        relay.finish(cell)
    assert failing.error["ename"] == "ZeroDivisionError"
    assert [cell.status for cell in queued] == ["aborted"] * 5
    assert relay.run("print('on')").stdout == "on\n"


def test_twins_differ(relay: Kernel, relay_kernel: str, start_kernel: StartKernel) -> None:
    code = (
        "import os, platform, random, secrets, tempfile, uuid\n"
        "print(random.random(), os.urandom(8).hex(), secrets.token_hex(), uuid.uuid1().node,"
        " tempfile.mktemp(), platform.node())"
    )
    with start_kernel(relay_kernel) as twin:
        mine, its = relay.run(code).stdout.split(), twin.run(code).stdout.split()
        assert len(mine) == len(its) == 6
        assert not set(mine) & set(its)


def test_a_kernel_that_died_is_replaced(relay: Kernel) -> None:
    cell = relay.run("import os; open('kept', 'w').write('content'); os._exit(5)")
    assert "exit status 5" in cell.error["evalue"]
    cell = relay.run("print(open('kept').read(), 'held' in dir(), 'os' in dir())")
    assert cell.stdout == "content False False\n"
    assert "TZ" in relay.run("import os; print(*os.environ)").stdout.split()
