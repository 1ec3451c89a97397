"""The door by which `vmkernel cp` reaches a notebook's VM: files, and nothing else.

A Unix socket in the VM's directory, which is the user's alone, where VMs of their own have their
runner's; what is said over it is of ``host.wire``.  It is made a while after a guest was used for
the first time, so that it is on nobody's way.  Where it stands: beside ``kernel.wrapper``, which
tells it of each guest.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from vmkernel.errors import VmError

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest
    from vmkernel.kernel.doorway import Visitor
    from vmkernel.kernel.supply import GuestSupply
    from vmkernel.settings import Settings

log = logging.getLogger("vmkernel")

OPEN_AFTER = 1.0
"""Seconds from a guest's first request to its door."""


class Door:
    """The socket of the guest that a kernel has."""

    def __init__(self, settings: Settings, supply: GuestSupply) -> None:
        self.supply = supply
        self.visitors: set[Visitor] = set()
        self._settings = settings
        self._guest: Guest | None = None
        self._server: asyncio.AbstractServer | None = None
        self._opening: asyncio.Task[None] | None = None

    def open_soon(self, guest: Guest) -> None:
        """This guest serves the kernel now."""
        if guest is not self._guest:
            self.close()
            self._guest = guest
            self._opening = asyncio.create_task(self._open(guest))

    def close(self) -> None:
        """Let nobody in any more; who is in, is sent away."""
        if self._opening is not None:
            self._opening.cancel()
        if self._server is not None:
            self._server.close()
        for visitor in list(self.visitors):
            visitor.leave()
        self._server = self._opening = self._guest = None

    async def _open(self, guest: Guest) -> None:
        await asyncio.sleep(OPEN_AFTER)
        directory = self.supply.directory()
        if directory is None or not guest.vm.running:
            return
        from vmkernel.host.localsocket import bound_in
        from vmkernel.settings import ensure_private_dir

        try:
            ensure_private_dir(self._settings.runtime_dir)
            with bound_in(directory) as sock:
                self._server = await asyncio.get_running_loop().create_unix_server(
                    self._visit, sock=sock
                )
        except (OSError, VmError) as error:
            log.warning("`vmkernel cp` cannot reach this kernel's VM: %s", error)

    def _visit(self) -> asyncio.BaseProtocol:
        from vmkernel.kernel.doorway import Visitor

        return Visitor(self).port
