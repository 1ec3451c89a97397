"""What an attack is: a function that runs in the guest, and what the host must make of it.

The function's text travels to the guest as a cell (or as a variable, to a guest that is not awake
yet), so a new attack needs no new image.  It sees `program.Guest` as ``guest``, and what its own
module imports or `program` gives: no other function of its module.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ATTACK = "# attack\n"
"""As in `program`."""

Run = Callable[..., None]
SERVED = "served"
"""The cell ends as if nothing had been: what was wrong is dropped."""
STOPPED = "stopped"
"""The VM is ended, the cell fails with a reason and a hint, the next one gets a new VM."""
DIED = "died"
"""The guest kernel is held for dead, and replaced in its VM."""


class Attack(NamedTuple):
    """One attack."""

    run: Run
    ends: tuple[str, ...]
    """How it may end."""
    peak: int
    """MiB that the wrapper may have resident meanwhile."""
    seconds: float
    """How long the cell may take, on a machine that is busy."""
    options: Mapping[str, Any]
    says: str
    """What the cell's output or error shows, as a regular expression: the attack took place."""

    @property
    def name(self) -> str:
        """For the test's id."""
        words = [self.run.__name__, *(str(value) for value in self.options.values())]
        return "-".join(words)[:60]

    @property
    def code(self) -> str:
        """The cell."""
        return code_of(self.run, **self.options)


def code_of(run: Run, **options: Any) -> str:
    """The cell that runs a function in the guest."""
    source = textwrap.dedent(inspect.getsource(run))
    source = source[source.index("def ") :]  # not what decorates it here
    words = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"{ATTACK}{source}\n{run.__name__}(guest{words})"


class Attacks(list[Attack]):
    """A decorator that collects them."""

    def __call__(
        self,
        *ends: str,
        peak: int = 120,
        seconds: float = 40,
        each: str = "",
        of: Any = (),
        says: str = "",
    ) -> Callable[[Run], Run]:
        """``each``: a parameter that takes all values ``of`` these, an attack for each."""

        def add(run: Run) -> Run:
            for options in [{each: value} for value in of] or [{}]:
                self.append(Attack(run, ends, peak, seconds, options, says))
            return run

        return add
