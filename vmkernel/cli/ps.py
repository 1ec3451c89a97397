"""``vmkernel ps``: the VMs on this host, from the record and the process table. Floor 5."""

from __future__ import annotations

import click


@click.command()
@click.option(
    "-a",
    "--all",
    "ended",
    is_flag=True,
    help="Also VMs that have ended and are still on record, with the cause.",
)
@click.option(
    "-w",
    "--wide",
    is_flag=True,
    help="Also what each VM sees and reaches of the world outside: workspace, network, variables.",
)
@click.option(
    "--cluster",
    is_flag=True,
    help="Instead: the hosts of the Ray cluster, and the kernels that run on them.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; sizes in bytes.")
def ps(ended: bool, wide: bool, cluster: bool, as_json: bool) -> None:
    """List the VMs on this host: whose they are, their state, memory and age.

    FOR is the notebook, kernel or tags that the VM is for. PRIVATE is memory that only this VM
    uses, SHARED what it has in common with others (the template's pages, the page cache). OPEN is
    what it sees or reaches of the world outside: its workspace (ro, rw), the network, variables
    (env); `-` is nothing, `?` a VM of another user's. --wide tells which.

    Of a cluster (--cluster): LEASE is after how long without word from its front end a kernel is
    ended, VMS how many VM slots of the host are taken by anyone, SLOTS how many Ray gives away.
    """
    if cluster:
        if ended or wide:
            raise click.UsageError("--cluster goes with --json only")
        from vmkernel.cli.ps_cluster import show

        show(as_json)
        return
    from vmkernel.cli import facts
    from vmkernel.cli.output import age, mebibytes, print_json, print_table
    from vmkernel.host.openings import NAMES
    from vmkernel.host.registry import Registry
    from vmkernel.settings import load_settings

    settings = load_settings()
    with Registry(settings) as registry:
        vms = facts.vms_on_host(settings, registry, ended=ended)
    slots = facts.slots(settings)
    if as_json:
        print_json({"vms": vms, "slots": slots})
        return
    rows = [
        [
            vm["id"] or "-",
            vm["name"] or "-",
            vm["owner"],
            facts.purpose(vm),
            facts.state_word(vm),
            str(vm["pid"] or "-"),
            vm["recipe"] or "-",
            facts.open_to(vm),
            mebibytes(vm["memory_private"]),
            mebibytes(vm["memory_shared"]),
            age(vm["age"]),
            *([vm[name] or "-" for name in NAMES] if wide else []),
            *([vm["exit_cause"]] if ended else []),
        ]
        for vm in vms
    ]
    header = ["ID", "NAME", "OWNER", "FOR", "STATE", "PID", "RECIPE", "OPEN"]
    header += ["PRIVATE", "SHARED", "AGE"]
    if wide:
        header += [name.upper() for name in NAMES]
    if rows:
        print_table([*header, *(["CAUSE"] if ended else [])], rows, right="PID PRIVATE SHARED AGE")
    else:
        click.echo("no VM is there")
    click.echo(facts.slots_line(slots))
