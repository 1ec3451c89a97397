"""The part of `vmkernel doctor` about what is opened and shared: with other users, with the guest.

docs/shared-hosts.md, docs/workspace.md, docs/network.md. Floor 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmkernel.cli.checks_host import Check
from vmkernel.errors import VmError

if TYPE_CHECKING:
    from vmkernel.settings import Settings


def shared_store(settings: Settings) -> Check:
    """Whether this user's kernels start from the administrator's image and template."""
    from vmkernel.host.sharing import why_not_shared
    from vmkernel.host.start import spec_for
    from vmkernel.image.store import is_shared
    from vmkernel.shared import distrust
    from vmkernel.vm.accel import remembered_choice

    name = "shared store"
    place = settings.shared_dir
    if place is None:
        return Check(name, "ok", "none is set (shared_dir): images and templates are your own")
    if problem := distrust(place):
        return Check(
            name, "warning", f"nothing is taken from {place}: {problem}",
            f"sudo chown root:root {place} && sudo chmod 755 {place}, or unset shared_dir",
        )  # fmt: skip
    try:
        choice = remembered_choice(settings)
        if choice is None:
            return Check(name, "note", f"{place}: not known before the accelerator is")
        spec = spec_for(settings, choice.accelerator)
    except VmError as error:
        return Check(name, "note", f"{place}: not known without image and QEMU ({error})")
    what = f"{settings.recipe}, {settings.memory} MiB, {choice.accelerator}"
    if why := why_not_shared(spec, settings):
        return Check(
            name, "note",
            f"{place} has no template for {what}: {why}. You build and use one of your own, whose "
            "memory is not shared with other users' VMs",
            f"have the administrator run: sudo vmkernel setup-host {settings.recipe} "
            f"--memory {settings.memory}M",
        )  # fmt: skip
    image = "image and template" if is_shared(spec.image, settings) else "template"
    return Check(name, "ok", f"{what}: {image} of {place}")


def semaphore_file(settings: Settings) -> Check:
    """Whose VMs are counted together."""
    name = "semaphore file"
    path = settings.semaphore_file
    if path.parent == settings.runtime_dir:
        return Check(name, "ok", f"{path} is your own: nobody else's VMs are counted in it")
    try:
        found, directory = path.stat(), path.parent.stat()
    except OSError as error:  # the line `VM slots` tells what to do
        return Check(name, "note", f"{path}: {error.strerror}")
    if found.st_size:
        return Check(
            name, "warning", f"somebody has written {found.st_size} bytes into {path}, which is "
            "for locks only", f"sudo truncate --size 0 {path}",
        )  # fmt: skip
    if directory.st_mode & 0o022:
        return Check(
            name, "warning", f"others may put another file in the place of {path}, and so evade "
            "the limits", f"sudo chmod 755 {path.parent}",
        )  # fmt: skip
    if found.st_mode & 0o002:
        return Check(name, "ok", f"{path} may be locked by all users")
    if found.st_mode & 0o020:
        return Check(name, "ok", f"{path} may be locked by group {found.st_gid}")
    return Check(
        name, "note", f"{path} may be locked by its owner only (user id {found.st_uid})",
        f"sudo chmod 666 {path} lets all users start VMs",
    )  # fmt: skip


def network(settings: Settings) -> Check:
    """Whether what guests are to reach can be reached from here."""
    from vmkernel.host.network import in_words, network_problem

    name = "network"
    if settings.network == "none":
        return Check(name, "ok", "none: guests reach nothing")
    problem, hint = network_problem(settings)
    if problem:
        return Check(name, "warning", f"{in_words(settings)}: {problem}", hint)
    return Check(name, "ok", f"{in_words(settings)}, through a filter of this host's")


def workspace(settings: Settings) -> Check:
    """Whether guests can be shown a directory of this host's."""
    from vmkernel.host.workspace import missing_parts

    name = "workspace"
    if settings.workspace == "none":
        return Check(name, "ok", "none: guests see no directory of this host's")
    found = f"{settings.workspace}: {settings.workspace_dir or 'a notebook sees its own directory'}"
    problem, hint = missing_parts()
    if problem:
        return Check(name, "warning", f"{found}, but it does not work here: {problem}", hint)
    return Check(name, "ok", found)
