"""PARITY "Queue": hundreds of cells sent at once, message by message as on plain ipykernel."""

from __future__ import annotations

import pytest
from compare import Step, differences, record_both, surprises

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

COUNT = 300
WRONG = 150


def queued(stop_on_error: bool) -> list[Step]:
    """Cells of every kind that shows something, an error in the middle, a question in between."""
    kinds = (
        "print({})",
        "{} * 2",
        "display({})",
        "import sys; print({}, file=sys.stderr)",
        "for i in range(5): print({}, i)",
        "handle = display({}, display_id='d'); handle.update('again')",
    )
    steps = [
        _cell("import time; time.sleep(4)", stop_on_error)
    ]  # all the others are sent meanwhile
    for number in range(1, COUNT):
        code = "1 / 0" if number == WRONG else kinds[number % len(kinds)].format(number)
        steps.append(_cell(code, stop_on_error))
        if number % 60 == 0:
            steps.append(Step("is_complete_request", {"code": f"for i in {number}:"}, wait=False))
    steps[-1].wait = True
    steps[-1].listen = 0.5
    return steps


def _cell(code: str, stop_on_error: bool) -> Step:
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {},
               "allow_stdin": False, "stop_on_error": stop_on_error}  # fmt: skip
    return Step("execute_request", content, wait=False)


@pytest.mark.parametrize("stop_on_error", [True, False])
def test_three_hundred_cells_at_once(stop_on_error: bool, small_spec: str, plain_spec: str) -> None:
    steps = queued(stop_on_error)
    plain, ours = record_both((plain_spec, small_spec), steps)
    found = surprises(differences(plain, ours))
    assert not found, "\n".join(map(str, found[:20]))
    # The comparison saw what it was to see: everything came in the last step's time.
    replies = [heard for heard in ours[-1] if heard.channel == "shell"]
    statuses = [
        heard.body["content"]["status"] for heard in replies if heard.msg_type == "execute_reply"
    ]
    behind = "aborted" if stop_on_error else "ok"
    assert statuses == ["ok"] * WRONG + ["error"] + [behind] * (COUNT - WRONG - 1)
    assert [int(heard.parent) for heard in replies] == list(range(1, len(steps) + 1))
