"""A host with several users, as an administrator has set it up: for tests that root runs.

The users have no accounts, only ids that nobody else has, and homes of their own. Each command runs
in a mount namespace of its own (unshare(1)), in which /etc/vmkernel is the test's, and in which
this Python and this checkout can be reached, wherever they lie: the directories above them that are
closed to others are covered, in there, by empty ones with nothing but them below.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import vmkernel
from vmkernel.settings import load_settings
from vmkernel.vm.wall import reachable_by_others

_MAIN = "from vmkernel.cli.app import main; main()"


class SharedHost:
    """Root's store and configuration, and users who start VMs."""

    def __init__(self, directory: Path, uids: tuple[int, ...]) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.etc = directory / "etc"
        (self.etc / "vmkernel").mkdir(parents=True)
        directory.chmod(0o711)
        directory.parent.chmod(0o711)
        self.root = User(self, 0)
        self.users = tuple(User(self, uid) for uid in uids)

    @property
    def config(self) -> Path:
        """What is /etc/vmkernel/config.toml for the users."""
        return self.etc / "vmkernel" / "config.toml"

    def put_image(self, recipe: str) -> None:
        """The test run's own image, as if it had been built into the store."""
        target = self.store / "images" / recipe
        target.mkdir(parents=True)
        for file in (load_settings().images_dir / recipe).iterdir():
            try:
                (target / file.name).hardlink_to(file)
            except OSError:  # another file system
                shutil.copy(file, target)

    def mounts(self) -> str:
        """A shell's words that make the namespace what the users are to see."""
        etc = f"lowerdir={self.etc}:/etc"
        lines = ["set -e", f"mount -t overlay overlay -o {shlex.quote(etc)} /etc"]
        wanted = {Path(sys.prefix), Path(sys.base_prefix), Path(vmkernel.__file__).parents[1]}
        covered: dict[Path, list[Path]] = {}
        for path in wanted:
            closed = [above for above in path.parents if not above.stat().st_mode & 0o001]
            if closed:
                covered.setdefault(closed[-1], []).append(path)
        for above, paths in covered.items():
            aside = [self.directory / f"mount-{number}" for number in range(len(paths))]
            for path, place in zip(paths, aside, strict=True):
                place.mkdir(exist_ok=True)
                lines.append(f"mount --bind {shlex.quote(str(path))} {place}")
            lines.append(f"mount -t tmpfs -o mode=755 none {shlex.quote(str(above))}")
            for path, place in zip(paths, aside, strict=True):
                name = shlex.quote(str(path))
                lines.append(f"mkdir -p {name}; mount --move {place} {name}")
        return "\n".join([*lines, 'exec "$@"'])


class User:
    """One of them."""

    def __init__(self, host: SharedHost, uid: int) -> None:
        self.host = host
        self.uid = uid
        self.home = host.directory / f"u{uid}"  # short: sockets lie in it
        self.home.mkdir(mode=0o700)
        os.chown(self.home, uid, uid)
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(vmkernel.__file__).parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "VMKERNEL_POOL_SIZE": "0",
        }
        (self.home / "run").mkdir(mode=0o700)
        os.chown(self.home / "run", uid, uid)

    def command(self, *words: str) -> list[str]:
        """A command line that runs as this user, in a namespace as `SharedHost.mounts` has it."""
        reuid = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]
        as_user = reuid if self.uid else []
        return ["unshare", "--mount", "sh", "-c", self.host.mounts(), "sh", *as_user, *words]

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Start a program of this user's, with pipes for all that it says and hears."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command(*words), env={**self.env, **env}, cwd=self.home,
            stdin=pipe, stdout=pipe, stderr=pipe, text=True,
        )  # fmt: skip

    def python(self, code: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run Python code as this user."""
        return subprocess.run(
            self.command(sys.executable, "-c", code, *words),
            env={**self.env, **env}, cwd=self.home, capture_output=True, text=True, timeout=110,
        )  # fmt: skip

    def cli(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the ``vmkernel`` command as this user."""
        return self.python(_MAIN, *words, **env)

    def json(self, *words: str, **env: str) -> Any:
        """What a command that shall succeed prints as JSON."""
        done = self.cli(*words, "--json", **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def missing_for_it() -> str:
    """What such a host needs and is not there; "" when all is."""
    if os.geteuid() != 0:
        return "needs root, to run as two other users"
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "overlay", "o", "-o", "lowerdir=/mnt:/etc", "/etc"],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"needs a mount namespace with an overlay ({tried.stderr.strip()})"
    if not reachable_by_others("/usr/bin/unshare"):
        return "needs a /usr that all may read"
    return ""
