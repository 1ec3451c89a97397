"""What a kernelspec of `vmkernel install --ray` starts where its provisioner is ignored.  Floor 5.

Jupyter's own front ends take the provisioner that the kernelspec names; one that only runs its
command line gets a clear end instead of a kernel that never answers.
"""

from __future__ import annotations

import sys

from vmkernel.errors import VmError

sys.exit(
    VmError(
        "This kernel runs on a cluster, through the kernel provisioner 'vmkernel-ray', which this "
        "front end does not use: it ran the kernelspec's command line instead.",
        hint="use it from Jupyter (JupyterLab, Notebook, nbclient, console) with vmkernel[ray] in "
        "the same environment, or point this front end at such a Jupyter server",
    ).explain()
)
