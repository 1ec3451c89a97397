"""``vmkernel ps --cluster``: the VM hosts of the cluster, and the kernels on them.  Floor 5.

Every host's actor is asked; none is made for it.  A host that does not answer is shown as such, and
keeps the others waiting for `PATIENCE` seconds at most.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from vmkernel.errors import VmError

if TYPE_CHECKING:
    from vmkernel.cluster.placement import Cluster, Host
    from vmkernel.settings import Settings

PATIENCE = 5.0


def show(as_json: bool) -> None:
    """Print it.  Raises VmError: the cluster cannot be joined, or does not answer."""
    from vmkernel.cli.output import print_json
    from vmkernel.settings import load_settings

    state = asyncio.run(look(load_settings()))
    if as_json:
        print_json(state)
    else:
        _print(state)


async def look(settings: Settings) -> dict[str, Any]:
    """``hosts``, each with its kernels; ``slots`` of the cluster; ``waiting`` kernels' ids.

    Raises VmError: the cluster cannot be joined, or does not answer.
    """
    from vmkernel.cluster.placement import HOST_ERRORS, Cluster

    cluster = await Cluster.join(settings)
    try:
        hosts = await asyncio.gather(*map(_host, await _with_slots(cluster)))
        slots = await cluster.ask("slots")
        return {"hosts": hosts, "slots": slots, "waiting": await cluster.ask("waiting")}
    except HOST_ERRORS as error:
        raise VmError(
            f"The cluster does not answer: {error}",
            hint="`ray status` on its head says what is wrong there",
        ) from error
    finally:
        await cluster.close()


async def _with_slots(cluster: Cluster) -> list[Host]:
    hosts = [host for host in await cluster.hosts() if host.facts.alive]
    return sorted(hosts, key=lambda host: (host.facts.name, host.facts.ip))


async def _host(host: Host) -> dict[str, Any]:
    """What one host tells; ``problem`` when it tells nothing."""
    from vmkernel.cluster.placement import HostFailedError, HostLostError, HostSilentError

    told: dict[str, Any] = {
        "name": host.facts.name,
        "ip": host.facts.ip,
        "node_id": host.facts.node_id,
        "slots": host.facts.slots,
        "vms": None,
        "version": None,
        "kernels": [],
        "problem": "",
    }
    try:
        told["kernels"] = await host.call("kernels", timeout=PATIENCE)
        facts = await host.call("hello", timeout=PATIENCE)
        told["version"] = facts["version"]
        told["vms"] = facts["slots"]
    except HostLostError:
        pass  # nobody has had kernels there since it joined
    except HostSilentError:
        told["problem"] = f"does not answer within {PATIENCE:g} s"
    except HostFailedError as error:
        told["problem"] = str(error)
    return told


def _print(state: dict[str, Any]) -> None:
    from vmkernel.cli.output import age, print_table, printable

    rows = [
        [
            host["name"],
            kernel["kernel_id"],
            kernel["owner"] or "-",
            kernel["kernel_name"],
            str(kernel["pid"] or "-"),
            age(kernel["age"]),
            f"{kernel['lease_left']:.0f} s",
        ]
        for host in state["hosts"]
        for kernel in host["kernels"]
    ]
    if rows:
        header = ["HOST", "KERNEL", "OWNER", "KERNELSPEC", "PID", "AGE", "LEASE"]
        print_table(header, rows, right="PID AGE LEASE")
        click.echo()
    table = [
        [
            host["name"],
            host["ip"],
            str(len(host["kernels"])),
            f"{host['vms']['used']} of {host['vms']['limit']}" if host["vms"] else "-",
            str(host["slots"]),
            host["version"] or "-",
            printable(host["problem"]) or "-",
        ]
        for host in state["hosts"]
    ]
    if table:
        header = ["HOST", "ADDRESS", "KERNELS", "VMS", "SLOTS", "VMKERNEL", "PROBLEM"]
        print_table(header, table, right="KERNELS VMS SLOTS")
    else:
        click.echo("the cluster has no VM host")
    slots, waiting = state["slots"], len(state["waiting"])
    plural = "kernel waits" if waiting == 1 else "kernels wait"
    taken = slots["total"] - slots["free"]
    click.echo(f"VM slots of the cluster: {taken} of {slots['total']} taken, {waiting} {plural}")
