"""vmkernel: a Jupyter kernel that runs every cell inside a QEMU microVM."""

__version__ = "0.1.0"
