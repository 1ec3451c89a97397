"""How long a VM may live, and how long it may have nothing to do.

Where it stands: whoever owns a VM, the runner or a notebook's supply of guests, has one of these,
tells it when there is work, and ends the VM when it says so.  Time is the event loop's, which no
change of the host's clock disturbs, and which stands still while the host sleeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vmkernel.errors import VmExpiredError

OnOver = Callable[[VmExpiredError], None]


class TimeLimits:
    """The time of one VM, from now on.  ``on_over(error)`` is called once, when it is over.

    ``lifetime`` and ``idle_timeout`` in seconds, None: no limit.  A VM begins without work.
    """

    def __init__(self, lifetime: float | None, idle_timeout: float | None, on_over: OnOver) -> None:
        self._on_over: OnOver | None = on_over
        self._idle_timeout = idle_timeout
        self._loop = asyncio.get_running_loop()
        self._busy = False
        self._idle_since = self._loop.time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._life_timer: asyncio.TimerHandle | None = None
        if lifetime is not None:
            how = f"as its lifetime of {spoken(lifetime)} was over (lifetime)"
            self._life_timer = self._loop.call_later(lifetime, self._over, how, "lifetime")
        self._look()

    def __repr__(self) -> str:
        state = "over" if self._on_over is None else "busy" if self._busy else "idle"
        return f"<TimeLimits {state}>"

    def note(self, busy: bool) -> None:
        """Whether there is work now; any word that there is none begins the idle time anew."""
        self._busy = busy
        self._idle_since = self._loop.time()
        if self._idle_timer is None and not busy:
            self._look()

    def touch(self) -> None:
        """There was a little work."""
        self.note(self._busy)

    def close(self) -> None:
        """The VM has ended: nothing more is called."""
        self._on_over = None
        for timer in (self._life_timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        self._life_timer = self._idle_timer = None

    def _look(self) -> None:
        """See whether it is idle for long enough; if not, look again when it may be."""
        self._idle_timer = None
        if self._idle_timeout is None or self._busy or self._on_over is None:
            return
        left = self._idle_since + self._idle_timeout - self._loop.time()
        if left > 0:
            self._idle_timer = self._loop.call_later(left, self._look)
        else:
            how = f"after {spoken(self._idle_timeout)} without work (idle_timeout)"
            self._over(how, "idle_timeout")

    def _over(self, how: str, setting: str) -> None:
        on_over = self._on_over
        self.close()
        if on_over is not None:
            on_over(
                VmExpiredError(
                    f"The VM was ended {how}",
                    hint=f"a longer {setting} (VMKERNEL_{setting.upper()}) lets VMs live longer",
                )
            )


def spoken(seconds: float) -> str:
    """A time for people: ``30 min``, ``2 h``, ``1.5 s``."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"
