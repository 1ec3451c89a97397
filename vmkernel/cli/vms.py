"""``vmkernel start``, ``stop`` and ``rm``: VMs that stay until somebody ends them. Floor 5."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click

from vmkernel.cli.options import VmOptions, complete_vms, seconds, vm_options
from vmkernel.errors import VmError, VmNotFoundError, VmStateError

if TYPE_CHECKING:
    from vmkernel.cli.progress import Waiting
    from vmkernel.host.handle import VmHandle
    from vmkernel.host.manager import VmManager
    from vmkernel.host.registry import VmRecord


@click.command()
@click.argument("name", required=False, default="", shell_complete=complete_vms)
@vm_options
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--quiet", "-q", is_flag=True, help="Do not tell what is being waited for.")
def start(name: str, vm: VmOptions, as_json: bool, quiet: bool) -> None:
    """Start a VM that stays, and print its id.

    NAME is new, or that of a VM that has been stopped: that one is started again, afresh, with the
    options it had and those given now. `vmkernel exec` runs code in it, `stop` and `rm` end it.
    """
    from vmkernel.cli.account import describe
    from vmkernel.cli.foreground import Ended, Foreground
    from vmkernel.cli.output import print_json

    foreground = Foreground()
    try:
        record = foreground.run(lambda: _start(name, vm, quiet, foreground.settle))
    except Ended as end:
        sys.exit(128 + end.number)
    if as_json:
        print_json(describe(record))
    else:
        click.echo(record.vm_id)


async def _start(
    name: str, options: VmOptions, quiet: bool, settle: Callable[[], None]
) -> VmRecord:
    from vmkernel import VmManager
    from vmkernel.cli.progress import Waiting

    async with VmManager(options.load()) as manager:
        with Waiting(quiet=quiet) as waiting:
            handle = await _start_again(manager, name, options, waiting) if name else None
            if handle is None:
                handle = await manager.create_vm(
                    name=name,
                    keep=True,
                    env=options.environment,
                    tenant_id=options.tenant,
                    task_id=options.task,
                    on_progress=waiting.show,
                    memory=manager.settings.memory,  # else the recipe's would go before an option
                )
            settle()  # who is told that it was interrupted may take it that there is no VM
        return handle.record


async def _start_again(
    manager: VmManager, name: str, options: VmOptions, waiting: Waiting
) -> VmHandle | None:
    """Start the VM of this name or id; None when there is none."""
    found = [
        status
        for status in await manager.list_vms(ended=True)
        if name in (status.record.name, status.record.vm_id)
    ]
    if not found:
        return None
    record = found[0].record
    changes: dict[str, Any] = dict(options.settings)
    changes |= {"tenant_id": options.tenant} if options.tenant else {}
    changes |= {"task_id": options.task} if options.task else {}
    if changes:
        await manager.update_vm(record.vm_id, **changes)
    return await manager.start_vm(record.vm_id, env=options.environment, on_progress=waiting.show)


@click.command()
@click.argument("vms", nargs=-1, required=True, metavar="VM...", shell_complete=complete_vms)
@click.option(
    "--timeout",
    type=seconds,
    default=10.0,
    metavar="SECONDS",
    help="How long a VM may take to end before it is killed (10).",
)
def stop(vms: tuple[str, ...], timeout: float) -> None:
    """End VMs (names, ids or beginnings of ids).

    What was in them is gone. One that `vmkernel start` made stays on record and can be started
    again; a notebook's kernel gets another one with its next cell.
    """

    async def stop_one(manager: VmManager, record: VmRecord) -> str:
        await manager.stop_vm(record.vm_id, timeout=timeout)
        return f"Stopped {name_of(record)}"

    _for_each(vms, stop_one)


@click.command()
@click.argument("vms", nargs=-1, required=True, metavar="VM...", shell_complete=complete_vms)
@click.option("-f", "--force", is_flag=True, help="Also VMs that run; and none is no error.")
def rm(vms: tuple[str, ...], force: bool) -> None:
    """Take VMs off the record, with their logs; with --force end them first."""
    from vmkernel.host.registry import status_of
    from vmkernel.models import ENDED, VmState

    async def remove_one(manager: VmManager, record: VmRecord) -> str:
        state = status_of(record).state
        if state not in (*ENDED, VmState.CREATED) and not force:
            raise VmStateError(
                f"{name_of(record)} is {state}", hint="stop it first, or use --force"
            )
        await manager.destroy_vm(record.vm_id)
        return f"Removed {name_of(record)}"

    _for_each(vms, remove_one, missing_is_fine=force)


def _for_each(
    vms: tuple[str, ...],
    work: Callable[[VmManager, VmRecord], Awaitable[str]],
    *,
    missing_is_fine: bool = False,
) -> None:
    """Do it with each VM, say what was done, and end with 1 when one could not be had."""
    from vmkernel import VmManager
    from vmkernel.cli.output import say_error
    from vmkernel.host.registry import Registry
    from vmkernel.settings import load_settings

    settings = load_settings()

    async def one(manager: VmManager, registry: Registry, vm: str) -> bool:
        try:
            click.echo(await work(manager, await asyncio.to_thread(registry.get, vm)))
        except VmError as error:
            if missing_is_fine and isinstance(error, VmNotFoundError):
                return True
            say_error(error)
            return False
        return True

    async def all_of_them() -> bool:
        with Registry(settings) as registry:
            async with VmManager(settings) as manager:
                return all([await one(manager, registry, vm) for vm in dict.fromkeys(vms)])

    if not asyncio.run(all_of_them()):
        sys.exit(1)


def name_of(record: VmRecord) -> str:
    """The VM as its user calls it."""
    return f"{record.name} ({record.vm_id})" if record.name else record.vm_id
