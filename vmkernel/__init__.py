"""vmkernel: a Jupyter kernel that runs every cell in a QEMU microVM, and the VM manager under it.

The public names are those of ``__init__.pyi``, documented in docs/manager.md; everything else is
ours to change.  Each is imported when it is first used: a kernel's start pays for none of them, and
the guest, which has this file, has not the modules.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "vmkernel.host.manager": ("VmManager",),
    "vmkernel.host.scheduler": ("Scheduler",),
    "vmkernel.host.scheduling": ("SchedulerConfig", "SchedulerStatistics"),
    "vmkernel.host.handle": ("VmHandle",),
    "vmkernel.models": ("Language", "Output", "RunError", "RunResult", "VmState"),
    "vmkernel.host.registry": ("VmRecord", "VmStatus"),
    "vmkernel.host.capacity": ("Statistics",),
    "vmkernel.settings": ("Settings", "load_settings"),
    "vmkernel.errors": (
        "VmError",
        "SettingsError",
        "ImageError",
        "TemplateError",
        "RegistryError",
        "VmNotFoundError",
        "VmStateError",
        "VmAlreadyStartingError",
        "VmCapacityError",
        "VmOverlayError",
        "VmFileError",
        "VmBootError",
        "VmGuestError",
        "VmHostLostError",
        "VmExpiredError",
        "VmTimeoutError",
        "ProtocolError",
    ),
}
__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module 'vmkernel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
