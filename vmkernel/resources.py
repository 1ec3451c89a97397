"""Where the project's own data files lie: ``images`` (recipes, init) and ``kernelspec`` (logos).

They stand at the root of the checkout, where people look for them, and inside the package in an
installed wheel (pyproject.toml, ``force-include``). This is the one place that knows. Floor 1.
"""

from __future__ import annotations

from pathlib import Path

from vmkernel.errors import VmError


def resource_dir(name: str) -> Path:
    """The directory ``images`` or ``kernelspec``, in the installed package or in the checkout.

    Raises:
        VmError: it is in neither, so the installation is broken.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "_resources" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise VmError(
        f"vmkernel's data directory {name!r} is not where the package is ({package})",
        hint="install vmkernel again: `pip install --force-reinstall vmkernel`, "
        "or script/setup in a checkout",
    )
