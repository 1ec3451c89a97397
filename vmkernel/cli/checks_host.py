"""The half of `vmkernel doctor` that looks at the host: programs, disks, memory, limits.

Floor 5.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Literal, NamedTuple

from vmkernel.settings import Settings

State = Literal["ok", "note", "warning", "missing"]

GIB = 1024**3
_IMAGE_BYTES = 2 * GIB  # what building one needs for a while
_BUILD_TOOLS = {"mmdebstrap": "mmdebstrap", "mkfs.erofs": "erofs-utils", "newuidmap": "uidmap",
                "dpkg-deb": "dpkg", "tar": "tar"}  # fmt: skip
_START_TOOLS = {"mkfs.ext4": "e2fsprogs", "qemu-img": "qemu-utils", "cpio": "cpio"}


class Check(NamedTuple):
    """One finding. Only ``missing`` keeps cells from running."""

    name: str
    state: State
    found: str
    remedy: str = ""


def start_tools(settings: Settings) -> Check:
    """The programs that starting a VM takes, besides QEMU."""
    missing = _not_found(_START_TOOLS)
    if missing:
        return _missing_tools("programs", "missing", "Making a template", missing)
    return Check("programs", "ok", ", ".join(_START_TOOLS))


def build_tools(settings: Settings) -> Check:
    """The programs and rights that `vmkernel image build` takes."""
    name = "image building"
    missing = _not_found(_BUILD_TOOLS)
    if missing:
        # Whoever has an image, from an administrator perhaps, need not build one.
        return _missing_tools(name, "warning", "Building an image", missing)
    if os.geteuid() != 0 and (problem := _user_namespace_problem()):
        return Check(
            name, "warning", f"an ordinary user cannot build images here: {problem}",
            "let an administrator build them, or mend that",
        )  # fmt: skip
    return Check(name, "ok", ", ".join(_BUILD_TOOLS))


def _user_namespace_problem() -> str:
    """Why mmdebstrap's unshare mode will not work for this user; "" when it should."""
    import pwd

    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # containers often run user ids without a name
        user = str(os.getuid())
    for file in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(file).read_text().splitlines()
        except OSError:
            lines = []
        if not any(line.partition(":")[0] in (user, str(os.getuid())) for line in lines):
            return f"{file} has no line for {user} (usermod --add-subuids, --add-subgids)"
    tried = subprocess.run(
        ["unshare", "--user", "--map-root-user", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        return f"user namespaces are not allowed ({tried.stderr.strip()})"
    return ""


def disk_space(settings: Settings) -> Check:
    """Room and the right to write, wherever vmkernel writes."""
    from vmkernel.image.store import has_image

    image_there = has_image(settings.recipe, settings)
    # A template holds the touched part of the guest's memory; a scratch disk grows with use.
    wanted = {
        "images": (settings.images_dir, 0 if image_there else _IMAGE_BYTES),
        "templates": (settings.cache_dir, settings.memory * 1024**2),
        "logs": (settings.state_dir, 64 * 1024**2),
        "runtime": (settings.runtime_dir, 64 * 1024**2),
    }
    free, short, locked = [], [], []
    for what, (directory, needed) in wanted.items():
        place = _existing_parent(directory)
        available = shutil.disk_usage(place).free
        free.append(f"{what} {available / GIB:.1f} GiB")
        if available < needed:
            short.append(f"{what} in {directory}: {available / GIB:.1f} of {needed / GIB:.1f} GiB")
        if not os.access(place, os.W_OK | os.X_OK) and not (what == "images" and image_there):
            locked.append(str(place))
    if locked:
        return Check(
            "disk space", "missing", f"you may not write in {', '.join(locked)}",
            "mend the permissions, or set VMKERNEL_IMAGES_DIR, _CACHE_DIR, _STATE_DIR, "
            "_RUNTIME_DIR to places of your own",
        )  # fmt: skip
    if short:
        return Check("disk space", "warning", f"little room for {'; '.join(short)}", "make room")
    return Check("disk space", "ok", f"free: {', '.join(free)}")


def _existing_parent(path: Path) -> Path:
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def memory(settings: Settings) -> Check:
    """Whether one VM finds the memory that it may use."""
    import psutil

    now = psutil.virtual_memory()
    found = (
        f"{now.available / GIB:.1f} of {now.total / GIB:.1f} GiB available; "
        f"a VM may use up to {settings.memory} MiB"
    )
    if now.available < settings.memory * 1024**2:
        return Check("memory", "warning", found, "end something, or set VMKERNEL_MEMORY lower")
    return Check("memory", "ok", found)


def cpu_quota(settings: Settings) -> Check:
    """What a VM's CPU quota means on this host."""
    from vmkernel.vm.limits import NICE, Limits, describe, find_holder

    name = "CPU quota"
    holder = find_holder(os.geteuid(), os.environ)
    if settings.cpu_quota is not None:
        found = describe(Limits(settings.memory, settings.cpu_quota), holder)
        state: State = "ok" if holder.manager else "warning"
        return Check(
            name, state, found,
            "run it under systemd with cgroup v2, or set VMKERNEL_CPU_QUOTA=none",
        )  # fmt: skip
    if holder.manager:
        return Check(name, "ok", f"none is set; it would be held by {holder.evidence}")
    return Check(
        name, "ok", f"none is set; here it would be low priority, nice {NICE} ({holder.evidence})"
    )


def sandbox(settings: Settings) -> Check:
    """What stands between a QEMU that was broken out of and this host."""
    from vmkernel.errors import VmError
    from vmkernel.vm.qemu import find_qemu
    from vmkernel.vm.sandbox import find_sandbox

    name = "sandbox"
    try:
        qemu = find_qemu(settings.qemu, os.environ.get("PATH", os.defpath))
        wall, problem, hint = find_sandbox(settings, qemu)
    except VmError as error:
        return Check(name, "note", f"not known without QEMU ({error})")
    layers = ["QEMU's own seccomp filter", "the template open for reading only"]
    if wall.own_user:
        layers.append("a user id of its own for each VM of root's")
    elif os.geteuid() == 0:
        layers.append("QEMU runs as root")
    if not problem:
        layers.insert(0, "bubblewrap with namespaces, a file system of its own and a filter")
        return Check(name, "ok", "; ".join(layers))
    found = f"QEMU runs without bubblewrap: {problem}. There is: {'; '.join(layers)}"
    return Check(name, "missing" if settings.sandbox == "required" else "warning", found, hint)


def limits(settings: Settings) -> Check:
    """The limits of this shell, which a kernel started from it inherits."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    tasks, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    data, _ = resource.getrlimit(resource.RLIMIT_DATA)

    def show(limit: int) -> str:
        return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)

    found = f"open files {show(files)}, processes {show(tasks)}"
    low = []
    if files != resource.RLIM_INFINITY and files < 256:
        low.append("ulimit -n 1024")
    if tasks != resource.RLIM_INFINITY and tasks < 256:
        low.append("ulimit -u 1024")
    # QEMU maps the guest's memory whole, and under TCG a translation buffer beside it.
    if (
        address_space != resource.RLIM_INFINITY
        and address_space < settings.memory * 2**20 + 2 * GIB
    ):
        found += f", address space {address_space // 2**20} MiB"
        low.append("ulimit -v unlimited")
    # QEMU gets a limit of its own, which is no higher than this one
    if data != resource.RLIM_INFINITY and data < settings.memory * 2**20 + GIB:
        found += f", data {data // 2**20} MiB"
        low.append("ulimit -d unlimited")
    if low:
        return Check("limits", "warning", found, f"raise them: {', '.join(low)}")
    return Check("limits", "ok", found)


def _not_found(tools: dict[str, str]) -> list[str]:
    # Administration tools lie in sbin, which an ordinary user's PATH on Debian lacks.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin:/usr/sbin:/sbin"])
    return [name for name in tools if shutil.which(name, path=path) is None]


def _missing_tools(name: str, state: State, what: str, missing: list[str]) -> Check:
    packages = " ".join(sorted({{**_BUILD_TOOLS, **_START_TOOLS}[tool] for tool in missing}))
    return Check(
        name, state, f"{what} needs {', '.join(missing)}, not found",
        f"sudo apt-get install {packages}",
    )  # fmt: skip
