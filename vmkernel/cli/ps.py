"""``vmkernel ps``: the VMs on this host, from the record and the process table. Floor 5.

The record says which VMs there are; what lives of them and what they cost is read from /proc.
VMs of other users have their records out of reach: they show as the slots that they hold.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import time
from typing import TYPE_CHECKING, Any

import click
import psutil

if TYPE_CHECKING:
    from vmkernel.host.registry import VmStatus
    from vmkernel.settings import Settings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; sizes in bytes.")
def ps(as_json: bool) -> None:
    """List the VMs on this host: whose they are, their state, memory and age.

    PRIVATE is memory that only this VM uses, SHARED what it has in common with others (the
    template's pages, the page cache).
    """
    from vmkernel.cli.output import age, mebibytes, print_json, print_table
    from vmkernel.settings import load_settings

    settings = load_settings()
    vms = running_vms(settings)
    slots = _slots(settings)
    if as_json:
        print_json({"vms": vms, "slots": slots})
        return
    if not vms:
        click.echo("no VM is there")
    rows = [
        (
            vm["id"] or "-",
            vm["owner"],
            vm["notebook"] or vm["kernel_id"] or "-",
            vm["state"],
            str(vm["pid"] or "-"),
            vm["recipe"] or "-",
            mebibytes(vm["memory_private"]),
            mebibytes(vm["memory_shared"]),
            age(vm["age"]),
        )
        for vm in vms
    ]
    header = ("ID", "OWNER", "NOTEBOOK", "STATE", "PID", "RECIPE", "PRIVATE", "SHARED", "AGE")
    if rows:
        print_table(header, rows, right="PID PRIVATE SHARED AGE")
    click.echo(
        f"{slots['used']} of {slots['limit']} VM slots in use"
        + (f", {slots['waiting']} waiting" if slots["waiting"] else "")
    )


def running_vms(settings: Settings) -> list[dict[str, Any]]:
    """What is known of each VM, the oldest first; None for what cannot be known.

    Raises VmError when the record cannot be read.
    """
    from vmkernel.host.capacity import vm_slots
    from vmkernel.host.registry import Registry

    with Registry(settings) as registry:
        statuses = registry.list()
    vms = [_describe(status) for status in statuses]
    known = {
        pid for status in statuses for pid in (status.record.runner_pid, status.record.qemu_pid)
    }
    holders = [(pid, index) for index, pid, _ in vm_slots(settings).holders()]
    return vms + [_describe_stranger(pid, i) for pid, i in holders if pid and pid not in known]


def _describe(status: VmStatus) -> dict[str, Any]:
    record = status.record
    pid = record.qemu_pid if status.qemu_alive else None
    return {
        "id": record.vm_id,
        "owner": _user(record.owner),
        "kernel_id": record.kernel_id,
        "notebook": _notebook(record.runner_pid) if status.runner_alive else "",
        "state": str(status.state),
        "pid": pid,
        "runner_pid": record.runner_pid,
        "slot": record.slot,
        "recipe": record.recipe,
        "accelerator": record.accelerator,
        "memory_limit": record.memory * 1024**2,
        **_memory(pid),
        "age": time.time() - record.created,
        "console_log": f"{record.log_dir}/console.log" if record.log_dir else "",
    }


def _describe_stranger(pid: int, slot: int) -> dict[str, Any]:
    """A slot's holder without a record of ours: another user's VM."""
    owner, age = "?", None
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        owner, age = process.username(), time.time() - process.create_time()
    return {
        "id": "",
        "owner": owner,
        "kernel_id": "",
        "notebook": "",
        "state": "unknown",
        "pid": pid,
        "runner_pid": None,
        "slot": slot,
        "recipe": "",
        "accelerator": "",
        "memory_limit": None,
        **_memory(pid),
        "age": age,
        "console_log": "",
    }


def _memory(pid: int | None) -> dict[str, int | None]:
    private = shared = proportional = None
    if pid is not None:
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or another user's
            full = psutil.Process(pid).memory_full_info()
            private, shared, proportional = full.uss, full.rss - full.uss, full.pss
    return {"memory_private": private, "memory_shared": shared, "memory_pss": proportional}


def _notebook(runner_pid: int) -> str:
    """The notebook's path, which Jupyter Server gives each kernel in its environment."""
    with contextlib.suppress(psutil.Error):
        path = psutil.Process(runner_pid).environ().get("JPY_SESSION_NAME", "")
        return os.path.relpath(path) if path.startswith("/") else path
    return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _slots(settings: Settings) -> dict[str, int]:
    from vmkernel.host.capacity import vm_slots

    return dict(vm_slots(settings).statistics()._asdict())
