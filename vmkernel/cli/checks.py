"""What `vmkernel doctor` looks at: one function for each prerequisite.

Each check stands alone and reports instead of raising, so one missing thing does not hide the
next. A check asks the very code that a starting kernel asks, where that code starts nothing.
Floor 5.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vmkernel.cli.checks_host import (
    Check,
    build_tools,
    cpu_quota,
    disk_space,
    limits,
    memory,
    sandbox,
    start_tools,
)
from vmkernel.cli.checks_shared import network, semaphore_file, shared_store, workspace
from vmkernel.errors import SettingsError, VmError
from vmkernel.settings import Settings, ensure_private_dir, load_settings_with_sources

if TYPE_CHECKING:
    from vmkernel.image.store import Image


def run_checks() -> list[Check]:
    """Every check, in the order in which a newcomer should mend them."""
    from vmkernel.cli.checks_cluster import cluster
    from vmkernel.cli.install import installed_kernelspecs, is_on_a_cluster
    from vmkernel.host.start import settings_for_recipe

    checks = [_python()]
    try:
        loaded = load_settings_with_sources()
    except SettingsError as error:
        # Nothing else can be judged: every other check depends on some setting.
        return [*checks, Check("settings", "missing", str(error), error.hint)]
    settings = settings_for_recipe(loaded)
    given = ", ".join(f"{name} = {getattr(settings, name)}" for name in loaded.sources)
    checks.append(Check("settings", "ok", given or "all at their defaults"))
    rest: tuple[tuple[str, Callable[[Settings], Check]], ...] = (
        ("QEMU", _qemu),
        ("accelerator", _accelerator),
        ("sandbox", sandbox),
        ("programs", start_tools),
        ("image", _image),
        ("image building", build_tools),
        ("template", _template),
        ("shared store", shared_store),
        ("VM slots", _slots),
        ("semaphore file", semaphore_file),
        ("workspace", workspace),
        ("network", network),
        ("pool", _pool),
        ("record of VMs", _record),
        ("runtime dir", _runtime_dir),
        ("disk space", disk_space),
        ("memory", memory),
        ("limits", limits),
        ("CPU quota", cpu_quota),
        ("kernelspec", _kernelspec),
    )
    if any(map(is_on_a_cluster, installed_kernelspecs().values())):
        rest += (("cluster", cluster),)
    for name, look in rest:
        try:
            checks.append(look(settings))
        except VmError as error:
            checks.append(Check(name, "missing", str(error), error.hint))
        except Exception as error:  # a doctor must not die of one patient
            why = f"could not be checked: {type(error).__name__}: {error}"
            checks.append(Check(name, "warning", why, "report this as a bug of vmkernel"))
    return checks


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    return Check("Python", "ok", found)


def _qemu(settings: Settings) -> Check:
    from vmkernel.vm.accel import qemu_version
    from vmkernel.vm.qemu import find_qemu

    path = find_qemu(settings.qemu, os.environ.get("PATH", os.defpath))
    version = qemu_version(path, settings.state_dir)
    # QEMU is asked what it can do; version numbers say little about a distribution's build.
    answer = subprocess.run(
        [path, "-machine", "help"], capture_output=True, text=True, timeout=20, check=False
    )
    if "microvm" not in answer.stdout:
        return Check(
            "QEMU", "missing", f"{version} at {path} has no machine type microvm",
            "install the distribution's qemu-system-x86",
        )  # fmt: skip
    return Check("QEMU", "ok", f"{version} at {path}, machine type microvm")


def _accelerator(settings: Settings) -> Check:
    from vmkernel.vm.accel import remembered_choice
    from vmkernel.vm.qemu import find_qemu

    try:
        find_qemu(settings.qemu, os.environ.get("PATH", os.defpath))
    except VmError:
        return Check("accelerator", "note", "not known without QEMU")
    choice = remembered_choice(settings)
    if choice is None:
        return Check(
            "accelerator",
            "note",
            "/dev/kvm is there, not tried yet: the first kernel proves it with a real guest "
            "(15 s at most) and remembers the verdict",
        )
    found = f"{choice.accelerator}: {choice.evidence}"
    if choice.warning:
        return Check("accelerator", "warning", found, choice.warning)
    return Check("accelerator", "ok", found)


def _image(settings: Settings) -> Check:
    image = _find_image(settings)
    manifest = image.manifest
    return Check(
        "image",
        "ok",
        f"{image.name}: Python {manifest.python_version}, Linux {manifest.kernel_release}, "
        f"built {manifest.created}, {image.size / 1024**2:.0f} MiB in {image.directory}",
    )


def _find_image(settings: Settings) -> Image:
    from vmkernel.image.store import find_image

    return find_image(settings.recipe, settings)


def _template(settings: Settings) -> Check:
    from vmkernel.host.start import spec_for
    from vmkernel.vm.accel import remembered_choice
    from vmkernel.vm.template import find_template, templates_dir

    later = "the first kernel builds it, once, in about half a minute"
    try:
        choice = remembered_choice(settings)
        if choice is None:
            return Check("template", "note", f"not known before the accelerator is; {later}")
        spec = spec_for(settings, choice.accelerator)
    except VmError as error:
        return Check("template", "note", f"not known without image and QEMU ({error})")
    template = find_template(spec, settings)
    what = f"{settings.recipe}, {settings.memory} MiB, {choice.accelerator}"
    if template is None:
        where = templates_dir(settings)
        return Check("template", "note", f"none for {what} in {where}: {later}")
    return Check("template", "ok", f"{what}: {template.directory}")


def _slots(settings: Settings) -> Check:
    from vmkernel.host.capacity import vm_slots

    semaphore = vm_slots(settings)
    semaphore.check()
    use = semaphore.statistics()
    found = f"{use.free} of {use.limit} free, {use.waiting} waiting, in {settings.semaphore_file}"
    if semaphore.within is not None:
        own = semaphore.within.statistics()
        found += f"; {own.used} of the {own.limit} that you may have (max_vms_per_user)"
        if own.free == 0:
            return Check(
                "VM slots", "warning", found, "a new kernel of yours waits until one of them ends"
            )
    if use.free == 0:
        holders = "; ".join(str(holder) for holder in semaphore.holders()[:5])
        return Check(
            "VM slots", "warning", f"{found}; held by {holders}",
            "a new kernel waits: end one, or raise max_concurrent_vms",
        )  # fmt: skip
    return Check("VM slots", "ok", found)


def _pool(settings: Settings) -> Check:
    from vmkernel.cli.pool import statistics

    if settings.pool_size == 0:
        return Check("pool", "ok", "off (pool_size is 0): every kernel starts from the beginning")
    servers = statistics(settings)
    stocks = [stock for server in servers for stock in server["stocks"]]
    problems = [f"{stock['recipe']}: {stock['error']}" for stock in stocks if stock["error"]]
    if problems:
        return Check("pool", "warning", "; ".join(problems), "start a kernel, which tells more")
    ready = sum(stock["ready"] for stock in stocks)
    waiting = f"{ready} {'kernel waits' if ready == 1 else 'kernels wait'}"
    return Check("pool", "ok", waiting if servers else "none runs; a kernel's start begins one")


def _record(settings: Settings) -> Check:
    from vmkernel.host.registry import Registry

    name = "record of VMs"
    try:
        with Registry(settings) as registry:
            statuses = registry.list(ended=True)
    except VmError as error:
        # Notebooks run without it; `vmkernel run` and other users of VmManager do not
        return Check(name, "warning", error.message, error.hint)
    alive = sum(status.runner_alive for status in statuses)
    return Check(name, "ok", f"{settings.database_file}: {alive} of {len(statuses)} VMs run")


def _runtime_dir(settings: Settings) -> Check:
    path = ensure_private_dir(settings.runtime_dir)
    return Check("runtime dir", "ok", f"{path}, private to you")


def _kernelspec(settings: Settings) -> Check:
    import json

    from vmkernel.cli.install import installed_kernelspecs
    from vmkernel.image.store import has_image

    found = installed_kernelspecs()
    if not found:
        return Check(
            "kernelspec", "warning", "Jupyter does not offer the kernel yet",
            "vmkernel install  (or vmkernel install --sys-prefix, for this environment)",
        )  # fmt: skip
    dead = [
        f"{name} in {path} starts {python}, which is gone"
        for name, path in found.items()
        if not Path(python := json.loads((path / "kernel.json").read_text())["argv"][0]).exists()
    ]
    if dead:
        return Check("kernelspec", "warning", "; ".join(dead), "vmkernel install writes it anew")
    for name, path in found.items():
        for word in json.loads((path / "kernel.json").read_text())["argv"]:
            recipe = word.removeprefix("--recipe=")
            if recipe != word and not has_image(recipe, settings):
                return Check(
                    "kernelspec", "warning", f"{name} in {path} needs the image {recipe!r}, "
                    "which is not built", f"vmkernel image build {recipe}",
                )  # fmt: skip
    return Check("kernelspec", "ok", ", ".join(f"{name} ({path})" for name, path in found.items()))
