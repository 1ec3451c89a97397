"""Kernels on many hosts: Ray places them, each host runs them as it runs its own.  Floor 5.

On the front end's side (``vmkernel.cluster.provisioner``) a kernel is five Jupyter sockets that are
forwarded (``relay``) to wherever it runs, a place that Ray keeps for it (``placement``) and a lease
that is renewed (``driver``).  On the side of the VMs one actor per host (``hostactor``) starts
kernels with Jupyter's own kernel manager.  Only ``placement`` and ``hostactor`` know Ray.
"""
