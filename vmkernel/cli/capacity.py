"""``vmkernel capacity``: how many VMs this host takes at once, for people and for Ray.  Floor 5."""

from __future__ import annotations

import json

import click

RESOURCE = "vm_slot"
"""The custom resource by which Ray counts this host's VMs."""


@click.command()
@click.option(
    "--json", "as_json", is_flag=True, help="What `ray start --resources=…` takes, nothing else."
)
def capacity(as_json: bool) -> None:
    """Show how many VMs this host takes at once, and how many there are."""
    from vmkernel.host.capacity import vm_slots
    from vmkernel.settings import load_settings

    settings = load_settings()
    semaphore = vm_slots(settings)
    if as_json:
        # All of Ray's kernels are one user's
        own = semaphore.within.limit if semaphore.within is not None else semaphore.limit
        click.echo(json.dumps({RESOURCE: min(semaphore.limit, own)}))
        return
    now = semaphore.statistics()
    click.echo(f"limit:   {now.limit} (max_concurrent_vms)")
    click.echo(f"used:    {now.used}")
    click.echo(f"free:    {now.free}")
    click.echo(f"waiting: {now.waiting}")
    click.echo(f"file:    {settings.semaphore_file}")
