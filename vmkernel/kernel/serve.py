"""The kernel process around the wrapper: signals, the parent's death, the sockets' life."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmkernel import trace
from vmkernel.errors import VmError
from vmkernel.kernel.history import History
from vmkernel.kernel.launch import label_of
from vmkernel.kernel.sockets import Sockets
from vmkernel.kernel.wrapper import Wrapper

if TYPE_CHECKING:
    from vmkernel.host.start import Started
    from vmkernel.settings import Settings

log = logging.getLogger("vmkernel")

LOG_FORMAT = "[vmkernel] %(levelname)s %(message)s"


async def serve(
    settings: Settings,
    connection_file: Path,
    options: list[str],
    begun: Started | None,
    failure: VmError | None,
    pool: str = "",
    listeners: Sequence[int] = (),
) -> int:
    """Serve one kernel; its exit status.

    ``options`` are IPython's, as the front end gave them; ``begun`` is a VM that is on its way;
    ``failure`` an error in the settings, told to every cell; ``pool`` where to offer to fill one;
    ``listeners`` sockets that the launcher has bound already.
    """
    logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)
    try:
        # Nothing is read before the event loop gets its next turn: by then there is a wrapper.
        sockets = Sockets(connection_file, lambda request: wrapper.on_request(request), listeners)  # noqa: PLW0108
    except VmError as error:
        log.critical("%s", error.explain())
        if begun is not None:
            from vmkernel.host.start import Label, VmStart

            await VmStart(settings, Label(), begun).close()
        return 1
    trace.mark("sockets bound")
    wrapper = Wrapper(
        settings,
        sockets,
        label_of(connection_file),
        History(settings, options),
        begun,
        failure,
    )
    if pool and settings.pool_size and failure is None:
        wrapper.on_quiet = lambda: _offer(settings, pool)
        wrapper.on_restart = lambda: _want(pool)
    return await run_wrapper(wrapper)


async def run_wrapper(wrapper: Wrapper) -> int:
    """Be the kernel whose sockets are bound, until its end; its exit status."""
    manifest = wrapper.supply.manifest()
    if manifest is not None and manifest.recipe.engine != "python":
        # It is IPython's; another kernel may have one of its own, in the guest
        wrapper.history.on = False
    loop = asyncio.get_running_loop()
    # Some launchers start children with SIGINT blocked; an interrupt would never come through.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    loop.add_signal_handler(signal.SIGINT, wrapper.interrupt)
    loop.add_signal_handler(signal.SIGTERM, wrapper.stop, 0)
    with _parent_watch(loop, wrapper):
        try:
            return await wrapper.run()
        finally:
            wrapper.sockets.close()


def _want(pool: str) -> bool:
    """Ask for a kernel like this one, soon; whether there is a pool to ask."""
    from vmkernel.pool.client import want

    return want(os.fsencode(pool), sys.argv[1:])


def _offer(settings: Settings, pool: str) -> None:
    """Have kernels like this one ready from now on: tell the pool's server, or start one."""
    try:
        if not _want(pool):
            from vmkernel.pool.client import start_server

            start_server(os.fsencode(pool), sys.argv[1:], settings)
    except OSError as error:
        log.info("no kernel is kept ready: %s", error)


@contextlib.contextmanager
def _parent_watch(loop: asyncio.AbstractEventLoop, wrapper: Wrapper):  # type: ignore[no-untyped-def]
    """End the kernel when the front end's process ends, as ipykernel does (JPY_PARENT_PID)."""
    try:
        fd = os.pidfd_open(int(os.environ["JPY_PARENT_PID"]))
    except (KeyError, ValueError, OSError) as error:
        if isinstance(error, ProcessLookupError):
            wrapper.stop(1)  # it died while we started
        yield
        return
    loop.add_reader(fd, wrapper.stop, 1)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)
