"""The host's end of a VM's network: a filtering proxy in a process of its own (docs/network.md).

`vmkernel.host.network` starts it; `policy` says who may be reached, `dial` reaches them, `proxy`
speaks HTTP with the guest, `packages` is the package index as the guest sees it, and `serve` is the
process.
"""
