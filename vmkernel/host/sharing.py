"""The administrator's store (`vmkernel.shared`) from his side: made, filled, swept, judged.

Where it stands: over ``host.start``, of whose staircase a template's making is a part; used by
``vmkernel setup-host`` and by ``vmkernel doctor``.  Floor 4.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel.errors import TemplateError, VmError
from vmkernel.host.start import boot_slot, probe_kvm, spec_for
from vmkernel.vm import accel
from vmkernel.vm.facts import read_facts, remember
from vmkernel.vm.template import (
    FORMAT,
    Spec,
    Template,
    ensure_template,
    find_template,
    guest_digest,
    list_templates,
    open_to_all,
)

if TYPE_CHECKING:
    from vmkernel.settings import Settings

Progress = Callable[[str], None]


def store_settings(settings: Settings, shared_dir: Path) -> Settings:
    """Settings by which images and templates are made in the store, and nowhere else."""
    return msgspec.structs.replace(
        settings,
        shared_dir=shared_dir,
        images_dir=shared_dir / "images",
        cache_dir=shared_dir,
        semaphore_file=shared_dir / "slots",
    )


async def share_template(settings: Settings, progress: Progress) -> tuple[Template, bool]:
    """The template of these `store_settings`, open to all users, and whether it was built now.

    Raises VmError.
    """
    choice = accel.remembered_choice(settings)
    if choice is None:
        choice = await accel.choose_accelerator(settings, lambda: probe_kvm(settings))
    spec = spec_for(settings, choice.accelerator)
    share_facts(settings, spec)
    template = find_template(spec, settings)
    built = template is None
    if template is None:
        template = await ensure_template(
            spec,
            settings,
            lambda text, done: progress(f"{text}, {done:.0%}"),
            boot_slot(settings, progress),
        )
    try:
        open_to_all(template.directory)
    except OSError as error:
        raise TemplateError(
            f"the template {template.directory} cannot be opened to all users: {error}",
            hint="run it as the user who owns it",
        ) from error
    return template, built


def share_facts(settings: Settings, spec: Spec) -> None:
    """Write down what all users must agree about, or each would need a template of his own."""
    assert settings.shared_dir is not None
    if spec.accelerator == "tcg":
        known = read_facts(settings.state_dir).get("tsc")
        facts = {**known, "khz": spec.tsc_khz} if isinstance(known, dict) else {}
        if facts and read_facts(settings.shared_dir).get("tsc") != facts:
            remember(settings.shared_dir, {"tsc": facts})
    with contextlib.suppress(OSError):
        (settings.shared_dir / "host.json").chmod(0o644)


def outdated(settings: Settings) -> Iterator[tuple[Path, str]]:
    """The templates in the store that no start on this host can use any more, and why."""
    from vmkernel.image.store import list_images

    images = {image.digest for _, image in list_images(settings) if not isinstance(image, VmError)}
    now = {"format": FORMAT, "guest": guest_digest()}
    with contextlib.suppress(VmError):
        choice = accel.remembered_choice(settings)
        spec = spec_for(settings, choice.accelerator if choice is not None else "tcg")
        now["qemu"] = spec.qemu_version
    for directory, template in list_templates(settings):
        if isinstance(template, VmError):
            yield directory, "it is damaged"
        elif template.manifest.inputs.get("image") not in images:
            yield directory, f"the image {template.manifest.recipe!r} of it is gone"
        elif why := differences(template.manifest.inputs, now):
            yield directory, f"it was made with {why}"


_IN_WORDS = {
    "format": "another version of vmkernel",
    "guest": "another version of vmkernel",
    "qemu": "another version of QEMU",
    "image": "another image",
    "config": "another recipe",
    "machine": "other settings (memory, vcpus)",
    "cmdline": "another frequency of the host's clock, or an accelerator that is not used here",
    "accelerator": "another accelerator",
    "cpu": "another processor",
    "tsc_khz": "another frequency of the host's clock",
    "scratch_size": "another scratch_size",
    "kernel": "another kernel_path",
}


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In what the inputs of a template are not those that are ``wanted``, in words."""
    words = [_IN_WORDS.get(name, name) for name in wanted if made.get(name) != wanted[name]]
    return ", ".join(dict.fromkeys(words))


def why_not_shared(spec: Spec, settings: Settings) -> str:
    """Why none of the administrator's templates serves these settings; "" when one does."""
    from vmkernel.shared import distrust

    assert settings.shared_dir is not None
    directory = settings.shared_dir / "templates"
    problem = distrust(directory)
    if problem:
        return problem
    store = msgspec.structs.replace(settings, cache_dir=settings.shared_dir)
    wanted = json.loads(json.dumps(spec.inputs()))  # as a manifest has them
    found = []
    for _, template in list_templates(store):
        if isinstance(template, VmError) or template.manifest.recipe != spec.image.name:
            continue
        why = differences(template.manifest.inputs, wanted)
        if not why:
            return distrust(template.directory)
        found.append(why)
    if not found:
        return f"there is none of {spec.image.name!r} in {directory}"
    return "those there were made with " + min(found, key=len)


def remove(directory: Path) -> None:
    """Remove a template from the store; who has it open goes on.  Raises OSError."""
    gone = directory.with_name(f".tmp-gone-{directory.name}")
    directory.rename(gone)
    shutil.rmtree(gone)
