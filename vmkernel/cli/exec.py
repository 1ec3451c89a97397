"""``vmkernel exec``: a cell in a VM that runs. Floor 5."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import TYPE_CHECKING

import click

from vmkernel.cli.options import code_options, complete_vms, environment_options, seconds
from vmkernel.errors import VmTimeoutError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmkernel.cli.account import Account
    from vmkernel.cli.foreground import Foreground
    from vmkernel.cli.script import Source
    from vmkernel.host.handle import VmHandle

_PATIENCE = 5.0
"""Seconds that interrupted code may take to end, before the command leaves it alone."""


@click.command("exec")
@click.argument("vm", shell_complete=complete_vms)
@click.argument("file", required=False, type=click.Path())
@code_options
@environment_options
@click.option(
    "--timeout",
    type=seconds,
    metavar="SECONDS",
    help="How long the code may run; then it is interrupted (exit code 124).",
)
def exec_(
    vm: str,
    file: str | None,
    code: str | None,
    as_json: bool,
    timeout: float | None,
    environment: Mapping[str, str],
) -> None:
    """Run FILE (`-` or nothing: standard input), or CODE, in VM, as a cell.

    Variables stay from one cell to the next, and the value of the last expression is printed.
    Exit code and streams are the code's own, as with `vmkernel run`; the VM goes on.
    """
    from vmkernel.cli.account import Account
    from vmkernel.cli.foreground import Foreground, exit_codes

    if code is not None and file is not None:
        raise click.UsageError("give a FILE or -c CODE, not both")
    account = Account()
    with exit_codes(account.print if as_json else None):
        from vmkernel.cli.script import read_source

        source = read_source(file or "-", code, ())
        foreground = Foreground()
        exit_code = foreground.run(
            lambda: _work(foreground, vm, source, timeout, account, environment, as_json=as_json)
        )
        if as_json:
            account.print(exit_code)
        sys.exit(exit_code)


async def _work(
    foreground: Foreground,
    vm: str,
    source: Source,
    timeout: float | None,
    account: Account,
    environment: Mapping[str, str],
    *,
    as_json: bool,
) -> int:
    from vmkernel import VmManager
    from vmkernel.cli.account import describe
    from vmkernel.cli.foreground import run_code
    from vmkernel.settings import load_settings

    settings = load_settings()
    account.room = settings.max_output << 20
    async with VmManager(settings) as manager:
        handle = await manager.get_vm(vm)
        account.vm = describe(handle.record)
        with contextlib.closing(_Limit(foreground, handle, timeout)):
            result = await run_code(
                foreground,
                handle,
                source.code,
                timeout=None,  # that would be the VM's end
                account=account if as_json else None,
                env=environment,
                results=True,
                trusted=settings.outputs == "trusted",
            )
    if foreground.failure is not None and result.error is not None:
        raise foreground.failure
    return result.exit_code


class _Limit:
    """Interrupts the code when its time is over, and then ends the command."""

    def __init__(self, foreground: Foreground, vm: VmHandle, timeout: float | None) -> None:
        self._foreground = foreground
        self._vm = vm
        self._task = None if timeout is None else asyncio.ensure_future(self._watch(timeout))

    def close(self) -> None:
        """The code has ended."""
        if self._task is not None:
            self._task.cancel()

    async def _watch(self, timeout: float) -> None:
        await asyncio.sleep(timeout)
        self._foreground.failure = VmTimeoutError(
            f"the code took longer than its time limit of {timeout:g} s, and was interrupted",
            hint="give it more time (--timeout), or less to do; the VM goes on",
            code_ran="unknown",
        )
        with contextlib.suppress(Exception):
            await self._vm.interrupt()
            await asyncio.sleep(_PATIENCE)
        self._foreground.end(signal.SIGALRM)
