"""What `vmkernel doctor` and `vmkernel install --ray` look at of a cluster.  Floor 5."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util

from vmkernel.cli.checks_host import Check
from vmkernel.errors import VmError
from vmkernel.settings import Settings

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
        found = asyncio.run(_slots(settings))
    except VmError as error:
        return Check(_NAME, "warning", str(error), error.hint)
    if not found:
        return Check(
            _NAME, "warning", f"{parts.found}; it has no VM host",
            "on each host: ray start --address=HEAD:6379 "
            "--resources=\"$(vmkernel capacity --json)\" (docs/cluster.md)",
        )  # fmt: skip
    return Check(_NAME, "ok", f"{parts.found}; VM slots: {found}")


async def _slots(settings: Settings) -> str:
    from vmkernel.cluster.placement import Cluster, HostLostError, HostSilentError

    joined = await Cluster.join(settings)
    try:
        hosts = [host for host in await joined.hosts() if host.facts.alive]
        return await joined.slots_in_words() if hosts else ""
    except (HostLostError, HostSilentError) as error:
        raise VmError(f"The cluster does not answer: {error}") from error
    finally:
        await joined.close()
