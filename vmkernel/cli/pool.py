"""``vmkernel pool``: the kernels that wait ready for a front end. Floor 5."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmkernel.errors import VmError

if TYPE_CHECKING:
    from vmkernel.settings import Settings

LOOK_SECONDS = 0.05
END_SECONDS = 5.0


@click.group()
def pool() -> None:
    """Kernels that wait ready for a front end (docs/pool.md)."""


@pool.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; sizes in bytes.")
def status(as_json: bool) -> None:
    """Show which kernels wait, and for whom."""
    from vmkernel.cli.output import age, mebibytes, print_json, print_table
    from vmkernel.settings import load_settings

    servers = statistics(load_settings())
    if as_json:
        totals = {name: sum(s[name] for s in servers) for name in ("ready", "starting", "size")}
        print_json({**totals, "servers": servers})
        return
    rows = [
        [
            str(server["pid"]),
            stock["recipe"],
            mebibytes(stock["memory"]),
            f"{stock['ready']} of {stock['size']}",
            str(stock["starting"]),
            age(stock["asked"]),
            stock["error"] or "",
        ]
        for server in servers
        for stock in server["stocks"]
    ]
    if not rows:
        click.echo("no kernel is kept ready")
        return
    header = ["SERVER", "RECIPE", "MEMORY", "READY", "STARTING", "ASKED", "LAST ERROR"]
    print_table(header, rows, right="SERVER MEMORY STARTING ASKED")


@pool.command()
@click.option("--kernel", "name", default="vmsandbox", show_default=True, help="The kernelspec.")
@click.option("--no-wait", is_flag=True, help="Return at once, and not when they are ready.")
def fill(name: str, no_wait: bool) -> None:
    """Have kernels ready, as they are after a kernel has been started."""
    from vmkernel.kernel.launch import parse_arguments
    from vmkernel.pool import client, handover
    from vmkernel.settings import ensure_private_dir, load_settings

    argv = _argv(name)
    arguments = argv[argv.index("-f") :]
    _, overrides, _ = parse_arguments(arguments)
    settings = load_settings(overrides)
    if settings.pool_size == 0:
        raise VmError("the pool is off", hint="set pool_size to 1 or more (VMKERNEL_POOL_SIZE)")
    path = handover.place(dict(os.environb), argv[0], argv[argv.index("-f") - 1])
    if not path:
        raise VmError(
            "there can be no pool, as its socket's path would be too long",
            hint="set VMKERNEL_RUNTIME_DIR to a shorter path",
        )
    ensure_private_dir(Path(os.fsdecode(path)).parent)
    if not client.want(path, arguments):
        client.start_server(path, arguments, settings)
    end = time.monotonic() + settings.start_timeout
    while not no_wait:
        time.sleep(LOOK_SECONDS)
        server = client.ask(path, handover.STATUS)
        latest = server["stocks"][-1] if server and server["stocks"] else None
        if latest is not None and latest["ready"] >= latest["size"]:
            break
        if latest is not None and latest["error"]:
            raise VmError(
                f"no kernel could be made ready: {latest['error']}",
                hint="start a kernel, which tells what is missing; or see `vmkernel doctor`",
            )
        if time.monotonic() > end:
            raise VmError(
                f"the pool was not full within {settings.start_timeout:g} s",
                hint=f"see {settings.state_dir / 'pool.log'}; are all VM slots in use? "
                "(`vmkernel ps`)",
            )


@pool.command()
def stop() -> None:
    """End the kernels that wait, and what keeps them; those in use go on.

    The next kernel that is started fills the pool again (`VMKERNEL_POOL_SIZE=0`: none does).
    """
    from vmkernel.pool import client, handover
    from vmkernel.settings import load_settings

    ended = 0
    for path in client.sockets_of(load_settings()):
        server = client.ask(os.fsencode(path), handover.STOP)
        if server is None:
            client.remove_stale(path)
            continue
        ended += server["ready"] + server["starting"]
        end = time.monotonic() + END_SECONDS
        while Path(f"/proc/{server['pid']}").exists() and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
    click.echo(f"{ended} waiting {'kernel' if ended == 1 else 'kernels'} ended")


def statistics(settings: Settings) -> list[dict[str, Any]]:
    """What each server of this user says of itself."""
    from vmkernel.pool import client, handover

    found = (client.ask(os.fsencode(p), handover.STATUS) for p in client.sockets_of(settings))
    return [server for server in found if server is not None]


def _argv(name: str) -> list[str]:
    """The command line of a kernelspec that starts the launcher.  Raises VmError."""
    from vmkernel.cli.install import installed_kernelspecs

    directory = installed_kernelspecs().get(name)
    if directory is None:
        raise VmError(
            f"there is no kernelspec {name!r} of vmkernel", hint="install it: vmkernel install"
        )
    argv: list[str] = json.loads((directory / "kernel.json").read_bytes())["argv"]
    if "vmkernel.cluster" in argv:
        raise VmError(
            f"the kernels of {name!r} run on a cluster, whose hosts have pools of their own",
            hint="ask on one of them, for the kernel that is installed there",
        )
    if "-m" in argv:
        raise VmError(
            f"the kernelspec {name!r} is of an older vmkernel, which had no pool",
            hint=f"install it anew: vmkernel install --name {name}",
        )
    return argv
