"""What one request does with its VM: files in, the code, files out.

Where it stands: under ``scheduler.py``, which gives it a VM and ends that afterwards.
"""

from __future__ import annotations

import asyncio
import logging

from vmkernel.errors import VmError
from vmkernel.host.handle import VmHandle
from vmkernel.host.scheduling import Request
from vmkernel.models import RunResult

_log = logging.getLogger("vmkernel")


class Use:
    """What a request does with its VM, up to the VM's end."""

    def __init__(self, vm: VmHandle, request: Request) -> None:
        self.vm = vm
        self._request = request
        self._running: asyncio.Task[RunResult] | None = None

    async def run(self) -> RunResult:
        """Files in, the code, files out.  Whoever has cancelled it ends the VM and calls `settle`.

        Raises VmError.
        """
        vm, request = self.vm, self._request
        sent = False
        try:
            for target, source in request.files.items():
                await vm.put(source, target)
            sent = vm.alive
            # Shielded: what is cancelled interrupts its code first, and waits for that
            self._running = asyncio.get_running_loop().create_task(
                vm.run(
                    request.code,
                    timeout=request.timeout,
                    on_output=request.on_output,
                    on_input=request.on_input,
                    env=request.env,
                )
            )
            result = await asyncio.shield(self._running)
        except VmError as error:
            if not sent:
                error.code_ran = "no"
            raise
        for path, local in request.outputs.items():
            try:
                await vm.get(path, local)
            except VmError as error:
                if result.ok or not vm.alive:
                    error.code_ran = "unknown"  # it did run: nobody shall try again lightly
                    error.result = result
                    raise
                _log.info("%s left no %s: %s", vm.vm_id, path, error)
        return result

    async def settle(self) -> None:
        """After the VM's end: let nothing of it go on."""
        if self._running is not None:
            await asyncio.wait([self._running])
            if not self._running.cancelled():
                self._running.exception()  # seen: who waited for it has been told
