"""What a thread shows belongs to the cell that started it, also when another cell runs by then.

Where it stands: called once by ``guest.engine``.  ipykernel keeps the request that is being served
in context variables; a thread starts with an empty context (Python before 3.14) and falls back on
the request that came last.  Here a thread gets the values of who started it, and work that is
submitted to an executor those of who submitted it.  Only these variables are handed on: others (of
``decimal``, say) are left as Python has them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

Values = list[tuple["ContextVar[Any]", Any]]


def hand_on(variables: Sequence[ContextVar[Any]]) -> None:
    """Let threads and executors' work begin with the current values of ``variables``."""

    def current() -> Values:
        return [(var, var.get()) for var in variables if var.get(None) is not None]

    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def start_with_values(self: threading.Thread) -> None:
        values = current()
        if values and not self._started.is_set():  # type: ignore[attr-defined]
            self.run = _with_values(values, self.run)  # type: ignore[method-assign]
        start(self)

    def submit_with_values(
        self: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        values = current()
        return submit(self, _with_values(values, function) if values else function, *args, **kwargs)

    threading.Thread.start = start_with_values  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submit_with_values  # type: ignore[method-assign, assignment]


def _with_values(values: Values, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        for variable, value in values:
            variable.set(value)
        return function(*args, **kwargs)

    return run
