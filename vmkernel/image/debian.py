"""The guest's Debian: made by mmdebstrap, taken out as plain files, and trimmed.

Nothing here enters a running VM. mmdebstrap (as root, or in a user namespace for an ordinary
user) writes a tar; it is extracted without owners, devices and setuid bits, so the tree belongs
to whoever builds, and the image made from it belongs to root again. The guest's kernel, busybox
and pip ride along: downloaded and unpacked, not installed, so no initramfs-tools, no scripts.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vmkernel.errors import ImageError
from vmkernel.image.apt import Mirrors, host_network_options, source_lines
from vmkernel.image.recipe import Recipe
from vmkernel.image.tools import ToolFailed, Tools

SUITE = "trixie"
PYTHON = "3.13"
"""Of its python3."""
ARCHITECTURE = "amd64"
USER, USER_ID = "user", 1000

# Of every image, besides Debian's essential packages (bash, coreutils, sed, tar, …).
BASE_PACKAGES = ("ca-certificates", "procps", "python3")

# Of every image, too: the file system of a workspace (guest.workspace). Unpacked, not installed, as
# sshfs would bring an SSH client for which there is no use.
_UNPACKED = ("sshfs", "libfuse3-4", "libglib2.0-0t64", "libatomic1")

# Left out while unpacking; copyright files stay, as licences ask.
_EXCLUDED = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/bug/*",
)
# Removed from the tree: caches, logs, the builder's own configuration (it may name a proxy with a
# password), and what would stop pip in the guest.
_REMOVED = (
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "etc/ssl/certs/java",
    "usr/lib/python3*/EXTERNALLY-MANAGED",
    "var/cache/apt/*",
    "var/cache/debconf/*",
    "var/cache/ldconfig/*",
    "var/lib/apt/lists/*",
    "var/lib/dpkg/*-old",
    "var/log/*",
)

_EXTRAS = "vmkernel-build"
# Run by mmdebstrap with the tree's path as $1, by the host's apt on the guest's package lists
# (see "HOOKS" in man 1 mmdebstrap). Given as text, not as a file: in a user namespace it runs as
# somebody who may not enter the builder's home.
_DOWNLOAD_EXTRAS = f"""
set -eu
mkdir -p "$1/{_EXTRAS}/files" "$1/{_EXTRAS}/guest"
cd "$1/{_EXTRAS}"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
kernel=$(apt-cache depends linux-image-cloud-{ARCHITECTURE} |
    sed -n 's/^ *Depends: *\\(linux-image-[0-9].*\\)$/\\1/p' | head -n 1)
[ -n "$kernel" ] || {{ echo "E: linux-image-cloud-{ARCHITECTURE} names no kernel" >&2; exit 1; }}
apt-get -o APT::Sandbox::User=root download "$kernel" busybox-static python3-pip-whl \\
    {" ".join(_UNPACKED)}
for deb in *.deb; do
    into=files
    case " {" ".join(_UNPACKED)} " in *" ${{deb%%_*}} "*) into=guest ;; esac
    dpkg-deb -x "$deb" $into
    dpkg-deb --show --showformat='${{Package}} ${{Version}} ${{Architecture}}\\n' "$deb" >>packages
    rm "$deb"
done
"""
# Lines of output that a build of the base alone has, roughly: the scale of its progress.
_EXPECTED_LINES = 320


class DebianTree:
    """The guest's files in a directory, and the extras beside them."""

    def __init__(self, root: Path, extras: Path) -> None:
        self.root = root
        self._extras = extras

    @property
    def kernel_release(self) -> str:
        """As ``uname -r`` will say in the guest."""
        return self._one("files/boot/vmlinuz-*").name.removeprefix("vmlinuz-")

    @property
    def kernel(self) -> Path:
        """The guest's kernel."""
        return self._one("files/boot/vmlinuz-*")

    @property
    def modules(self) -> Path:
        """The directory of the kernel's modules."""
        return self._one("files/usr/lib/modules/*")

    @property
    def busybox(self) -> Path:
        """A busybox that needs no library."""
        return self._one("files/*bin/busybox", "files/usr/*bin/busybox")

    @property
    def pip_wheel(self) -> Path:
        """pip, as a wheel that runs without being installed."""
        return self._one("files/usr/share/python-wheels/pip-*.whl")

    def packages(self) -> list[str]:
        """``name version architecture`` of every Debian package in the image, sorted."""
        status = (self.root / "var/lib/dpkg/status").read_text(encoding="utf-8")
        found = {
            " ".join(re.findall(r"^(?:Package|Version|Architecture): (.+)$", stanza, re.MULTILINE))
            for stanza in status.split("\n\n")
            if "\nStatus: install ok installed" in stanza
        }
        # dpkg's order of fields is Package, Architecture, Version.
        ordered = [f"{n} {v} {a}" for n, a, v in (line.split() for line in found)]
        extras = (self._extras / "packages").read_text(encoding="utf-8").splitlines()
        return sorted([*ordered, *extras])

    def _one(self, *patterns: str) -> Path:
        for pattern in patterns:
            for path in sorted(self._extras.glob(pattern)):
                return path
        raise ImageError(
            f"Debian's packages hold no {patterns[0].rpartition('/')[2]}: they are laid out "
            "differently from what this version of vmkernel knows.",
            hint="update vmkernel",
        )


def make_tree(
    recipe: Recipe,
    directory: Path,
    tools: Tools,
    mirrors: Mirrors | None,
    progress: Callable[[float], None],
) -> DebianTree:
    """Make the guest's Debian below *directory*; *progress* gets fractions from 0 to 1.

    Raises:
        ImageError: a package could not be had; names it.
    """
    archive = directory / "debian.tar"
    root = directory / "root"
    extras = directory / _EXTRAS
    lines = 0

    def count(line: str) -> None:
        nonlocal lines
        if line.startswith(("Get:", "Unpacking ", "Setting up ")):
            lines += 1
            progress(0.95 * min(1.0, lines / (_EXPECTED_LINES + 3 * len(recipe.debian.packages))))

    command: list[str | Path] = [
        "mmdebstrap",
        "--verbose",
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        "--variant=minbase",
        f"--architectures={ARCHITECTURE}",
        f"--include={','.join([*BASE_PACKAGES, *recipe.debian.packages])}",
        *(f"--aptopt={option}" for option in host_network_options()),
        *(f"--dpkgopt={option}" for option in _EXCLUDED),
        f"--customize-hook={_DOWNLOAD_EXTRAS}",
        SUITE,
        archive,
        *(source_lines(mirrors, SUITE) if mirrors else []),
    ]
    try:
        tools.run(command, on_line=count)
    except ToolFailed as error:
        raise ImageError(
            f"Debian's packages could not be had: {explain_failure(error.lines)}",
            hint=_hint(error.lines),
            log_path=tools.log_path,
        ) from error

    root.mkdir()
    # Device nodes cannot be made by an ordinary user; the guest's /dev is the kernel's.
    tools.run(
        ["tar", "--extract", "--no-same-owner", "--no-same-permissions", "--exclude=./dev/*",
         "--directory", root, "--file", archive]
    )  # fmt: skip
    archive.unlink()
    (root / _EXTRAS).rename(extras)
    shutil.copytree(
        extras / "guest",
        root,
        symlinks=True,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("man", "locale", "changelog*", "NEWS*"),
    )
    progress(1.0)
    return DebianTree(root, extras)


def explain_failure(lines: Sequence[str]) -> str:
    """The words of apt or mmdebstrap that tell a person what was wrong: which download, why."""
    fetches = _unique(
        f"{match[1]}: {match[2].rstrip(': ')}"
        for line in lines
        if (match := re.match(r"[EW]: Failed to fetch (\S+)\s+(.*)", line))
    )
    if fetches:
        return "download failed: " + "; ".join(fetches[:3])
    missing = _unique(
        match[1]
        for line in lines
        if (match := re.match(r"E: Unable to locate package (\S+)", line))
        or (match := re.match(r"E: Package '(\S+)' has no installation candidate", line))
    )
    if missing:
        return f"Debian {SUITE} has no package {', '.join(missing)}"
    errors = _unique(
        line.removeprefix("E: ")
        for line in lines
        # What mmdebstrap says of its own undoing comes after, and tells nothing.
        if line.startswith("E: ") and not re.search(r"(failed to (read|run)|exited with)", line)
    )
    if errors:
        return "; ".join(errors[:3])
    return lines[-1] if lines else "mmdebstrap ended without a word"


def _hint(lines: Sequence[str]) -> str:
    said = "\n".join(lines)
    if "NO_PUBKEY" in said or "not signed" in said:
        return (
            "the host's keyring is too old for this Debian: "
            "sudo apt-get install --only-upgrade debian-archive-keyring"
        )
    if "Unable to locate package" in said or "no installation candidate" in said:
        return "correct the package's name in the recipe (`debian.packages`)"
    if re.search(r"newuidmap|newgidmap|unshare|user namespace", said):
        return (
            "an ordinary user needs user namespaces to build (sysctl user.max_user_namespaces, "
            "kernel.apparmor_restrict_unprivileged_userns, entries in /etc/subuid and "
            "/etc/subgid); or build as root"
        )
    return (
        "check the network and the mirror in the host's apt configuration "
        "(`sudo apt-get update` must work), or give another with --debian-mirror"
    )


def finish_tree(root: Path, mirrors: Mirrors | None) -> None:
    """Turn what mmdebstrap left into a guest: its user, its names, nothing superfluous."""
    for pattern in _REMOVED:
        for path in root.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    etc = root / "etc"
    _append_line(etc / "passwd", f"{USER}:x:{USER_ID}:{USER_ID}::/home/{USER}:/bin/bash")
    _append_line(etc / "group", f"{USER}:x:{USER_ID}:")
    _append_line(etc / "shadow", f"{USER}:*:20000:0:99999:7:::")
    _append_line(etc / "gshadow", f"{USER}:!::")
    shutil.copytree(etc / "skel", root / "home" / USER, dirs_exist_ok=True)
    # mmdebstrap copied the host's; a guest must not know them.
    _write(etc / "hostname", "vmkernel\n")
    _write(etc / "hosts", "127.0.0.1 localhost vmkernel\n::1 localhost ip6-localhost\n")
    _write(etc / "resolv.conf", "")
    _write(etc / "machine-id", "")
    if mirrors:
        from vmkernel.image.apt import without_credentials

        plain = Mirrors(
            main=without_credentials(mirrors.main),
            security=without_credentials(mirrors.security) if mirrors.security else None,
        )
        _write(etc / "apt/sources.list", "".join(f"{x}\n" for x in source_lines(plain, SUITE)))
    python = root / "usr/local/bin/python"
    if not python.is_symlink():
        python.symlink_to("/usr/bin/python3")
    for path in _walk(root):
        mode = path.lstat().st_mode
        # Nothing in the guest may raise its privileges; the tar's bits went with its owners
        # already (--no-same-permissions), this is the line that promises it.
        if not path.is_symlink() and mode & 0o6000:
            path.chmod(mode & 0o1777)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)


def _walk(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            yield Path(directory, name)


def _append_line(path: Path, line: str) -> None:
    mode = path.stat().st_mode
    text = path.read_text(encoding="utf-8")
    path.chmod(0o600)
    path.write_text(f"{text}{line}\n", encoding="utf-8")
    path.chmod(mode)


def _write(path: Path, text: str) -> None:
    # Never through a link, which would point into the host.
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)


def _unique(words: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(words))
