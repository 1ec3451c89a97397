"""What `vmkernel doctor` and `vmkernel install --ray` look at of a cluster.  Floor 5."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
from itertools import chain
from typing import TYPE_CHECKING

from vmkernel.cli.checks_host import Check
from vmkernel.errors import VmError
from vmkernel.settings import Settings

if TYPE_CHECKING:
    from vmkernel.cluster.placement import Host

_NAME = "cluster"


def cluster_parts() -> Check:
    """What kernels of a cluster need in this Python; the cluster itself is not asked."""
    from vmkernel.cli.install import PROVISIONER

    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # without an origin: a directory of that name
        return Check(
            _NAME, "warning", "Ray is not installed in this Python, and kernels of a cluster need "
            "it", "pip install 'vmkernel[ray]'",
        )  # fmt: skip
    group = "jupyter_client.kernel_provisioners"
    if not importlib.metadata.entry_points(group=group, name=PROVISIONER):
        return Check(
            _NAME, "warning", f"Jupyter does not find the kernel provisioner {PROVISIONER!r}",
            "install vmkernel anew in this Python (pip install --force-reinstall --no-deps …)",
        )  # fmt: skip
    return Check(_NAME, "ok", f"Ray {importlib.metadata.version('ray')}")


def cluster(settings: Settings) -> Check:
    """The cluster that the kernels of `vmkernel install --ray` would be started on."""
    parts = cluster_parts()
    if parts.state != "ok":
        return parts
    try:
        found, problems = asyncio.run(_look(settings))
    except VmError as error:
        return Check(_NAME, "warning", str(error), error.hint)
    if not found:
        return Check(
            _NAME, "warning", f"{parts.found}; it has no VM host",
            "on each host: ray start --address=HEAD:6379 "
            "--resources=\"$(vmkernel capacity --json)\" (docs/cluster.md)",
        )  # fmt: skip
    said = f"{parts.found}; VM slots: {found}"
    if problems:
        return Check(_NAME, "warning", f"{said}; {'; '.join(problems)}", "docs/cluster.md")
    return Check(_NAME, "ok", said)


async def _look(settings: Settings) -> tuple[str, list[str]]:
    """The slots in words, "" when there is no VM host; and what hosts lack."""
    from vmkernel.cluster.placement import Cluster, HostLostError, HostSilentError

    joined = await Cluster.join(settings)
    try:
        hosts = [host for host in await joined.hosts() if host.facts.alive]
        if not hosts:
            return "", []
        problems = await asyncio.gather(*map(_problems, hosts))
        return await joined.slots_in_words(), list(chain.from_iterable(problems))
    except (HostLostError, HostSilentError) as error:
        raise VmError(f"The cluster does not answer: {error}") from error
    finally:
        await joined.close()


async def _problems(host: Host) -> list[str]:
    from vmkernel.cluster.placement import HostFailedError, HostLostError, HostSilentError

    try:
        facts = await host.ready()
    except (HostFailedError, HostLostError, HostSilentError) as error:
        return [f"{host.label} cannot start kernels: {error}"]
    except VmError as error:
        return [str(error)]
    return [f"{host.label}: {warning}" for warning in facts.get("warnings", ())]
