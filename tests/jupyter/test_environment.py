"""The variables by which front ends tell a kernel about themselves (DESIGN: "that matters").

They are part of the host's environment, of which a guest gets a list and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from kernel_client import Kernel, StartKernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

SET = {
    "JPY_SESSION_NAME": "/home/me/späte 'Notiz'.ipynb",
    "IPYKERNEL_CELL_NAME": "/home/me/cell.py",
    "COLUMNS": "133",
    "LINES": "44",
    "MPLBACKEND": "agg",
    "TZ": "Asia/Kolkata",
}
# What IPython sets for the programs that cells start, whatever the host has
BY_IPYTHON = ("TERM", "CLICOLOR", "FORCE_COLOR", "PAGER", "GIT_PAGER")

SEEN = f"""
import inspect, json, os, shutil, subprocess, time
def here(): pass
print(json.dumps({{
    "set": {{name: os.environ.get(name) for name in {[*SET, *BY_IPYTHON]}}},
    "child": subprocess.check_output("echo $COLUMNS $TERM", shell=True, text=True),
    "file": here.__code__.co_filename,
    "size": list(shutil.get_terminal_size()),
    "zone": time.strftime("%z", time.localtime(0)),
}}))
"""


@pytest.fixture(scope="module")
def ours(small_spec: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    with start_kernel(small_spec, env={**SET, "HOST_SECRET": "xyzzy"}) as kernel:
        yield kernel


@pytest.fixture(scope="module")
def plain_sees(plain_spec: str, start_kernel: StartKernel) -> Any:
    with start_kernel(plain_spec, env=SET) as kernel:
        return json.loads(kernel.run(SEEN).stdout)


def test_a_cell_sees_what_plain_ipykernel_shows(ours: Kernel, plain_sees: Any) -> None:
    seen = json.loads(ours.run(SEEN).stdout)
    assert seen == plain_sees
    assert {name: seen["set"][name] for name in SET} == SET
    assert (seen["size"], seen["zone"]) == ([133, 44], "+0530")


def test_nothing_else_of_the_host_is_there(ours: Kernel) -> None:
    assert ours.run("import os; 'xyzzy' in str(os.environ)").result == "False"


def test_a_new_guest_kernel_sees_the_same(ours: Kernel, plain_sees: Any) -> None:
    """After the death of the one before, and after a restart by the front end."""
    assert ours.run("import os; os._exit(1)").status == "error"
    assert json.loads(ours.run(SEEN).stdout) == plain_sees
    ours.manager.restart_kernel(env={**ours.manager._launch_args["env"], "COLUMNS": "99"})
    ours.wait_ready()
    assert json.loads(ours.run(SEEN).stdout)["size"] == [99, 44]


def test_figures_by_the_backend_that_was_asked_for(
    datascience_kernel: str, start_kernel: StartKernel
) -> None:
    with start_kernel(datascience_kernel, env={"MPLBACKEND": "svg"}) as kernel:
        code = "import matplotlib; matplotlib.get_backend().lower()"
        assert kernel.run(code).result == "'svg'"
