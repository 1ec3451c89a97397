"""The guest's Python packages and bytecode, made on the host by the guest's own interpreter.

The guest's ``python3`` is a program of another Debian, but the same processor's: started through
the guest's own dynamic loader it runs on the host, as the user who builds, without a chroot. So
pip sees the guest's Python version, platform tags and markers, and the bytecode is the guest's.

No code of a package is run here: pip takes wheels only, which have no code to run at
installation, and may start no program, so that it cannot build anything either. Whatever starts
the interpreter after that does so without ``site`` (-S), which would execute the packages'
``.pth`` files. That code is what the VM is there to keep away from the host; for the same reason
nothing is imported to see whether it works.

(The other way, ``pip --target --platform --python-version``, takes the markers of the wrong
interpreter and puts scripts and data files in the wrong place.)
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vmkernel.errors import ImageError
from vmkernel.image.lock import make_lock
from vmkernel.image.pipwords import BUILDS, explain_failure, missing_requirement
from vmkernel.image.recipe import Recipe
from vmkernel.image.tools import ToolFailed, Tools

# Follows a dotted name through the directories of packages without importing any of them.
_FIND_MODULES = """
import sys
from importlib.machinery import BuiltinImporter, PathFinder
directory, *names = sys.argv[1:]
for name in names:
    path = [*sys.path, directory]
    for part in name.split("."):
        spec = PathFinder.find_spec(part, path) or BuiltinImporter.find_spec(part)
        if spec is None:
            sys.exit(f"no module {name}")
        path = spec.submodule_search_locations
        if path is None:  # no package: what it makes of itself (os.path) cannot be seen
            break
"""


# "Wheels only" is not heeded for a requirement that is a URL, also one of a wheel's own metadata:
# pip would build what is there, and so run it. A build, git and the rest are programs, which pip
# may not start; it expects that some cannot be. keyring is the user's own store of passwords.
_RUN_PIP = f"""
import sys
def watch(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        if event != "subprocess.Popen" or str(arguments[0]).rpartition("/")[2] != "keyring":
            raise PermissionError({BUILDS!r})
sys.addaudithook(watch)
from pip._internal.cli.main import main
sys.exit(main())
"""


class GuestPython:
    """The guest's interpreter, run on the host from the tree at *root*."""

    def __init__(self, root: Path) -> None:
        self._root = root
        python = (root / "usr/bin/python3").readlink().name
        self.version = python.removeprefix("python")
        """As in ``3.13``."""
        self.stdlib = root / "usr/lib" / python
        self.packages = root / "usr/local/lib" / python / "dist-packages"
        """Where pip installs, and where the guest's Python looks."""
        self._argv = [
            str(root / "lib64/ld-linux-x86-64.so.2"),
            "--inhibit-cache",
            "--library-path",
            str(root / "usr/lib/x86_64-linux-gnu"),
            str(root / "usr/bin" / python),
        ]

    def argv(self, *arguments: str | Path) -> list[str]:
        """The command that runs the interpreter with *arguments*."""
        return [*self._argv, *map(str, arguments)]

    def environment(self, **more: str) -> dict[str, str]:
        """The host's environment, fit for the guest's interpreter."""
        kept = {
            name: value
            for name, value in os.environ.items()
            # PYTHON*: the host's interpreter's affairs. The two of pip's would make it refuse, or
            # install elsewhere; the rest of PIP_* (index, certificates, cache, …) is honoured.
            if not name.startswith(("PYTHON", "LD_"))
            and name not in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON")
        }
        return {
            **kept,
            "LC_ALL": "C.UTF-8",
            "PYTHONHOME": str(self._root / "usr"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONNOUSERSITE": "1",
            "PYTHONHASHSEED": "0",
            "PIP_REQUIRE_VIRTUALENV": "0",
            **more,
        }

    def full_version(self) -> str:
        """As in ``3.13.5``.

        Raises:
            ImageError: the interpreter does not run on this host.
        """
        try:
            return subprocess.run(
                self.argv("-S", "-c", "import platform; print(platform.python_version())"),
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            raise ImageError(
                f"The guest's Python does not run on this host: {error}",
                hint="images are built on x86-64 Linux only",
            ) from error


def install_packages(
    python: GuestPython,
    root: Path,
    recipe: Recipe,
    pip_wheel: Path,
    tools: Tools,
    progress: Callable[[float], None],
    *,
    lock: str = "",
    origins: Mapping[str, str] | None = None,
) -> str:
    """Install the recipe's requirements, and pip itself, with the host's pip configuration.

    With *lock* exactly what it says. Returns the lock of what was installed. *origins* says for
    error messages where requirements were written.

    Raises:
        ImageError: a requirement could not be had; names it.
    """
    requirements = recipe.requirements()
    lines = 0

    def count(line: str) -> None:
        nonlocal lines
        if line.startswith(("Collecting ", "Processing ", "Downloading ", "Installing ")):
            lines += 1
            progress(min(1.0, lines / (12 * len(requirements))))

    environment = python.environment(PYTHONPATH=str(pip_wheel))
    # A virtual environment's own pip.conf belongs to "the host's pip configuration" as well, and
    # the guest's interpreter looks for it beside itself.
    own = Path(sys.prefix, "pip.conf")
    if own.is_file():
        environment.setdefault("PIP_CONFIG_FILE", str(own))
    report = root.parent / "pip.json"
    words: list[str | Path] = ["--no-compile", "--no-warn-script-location", "--report", report]
    if lock:
        locked = root.parent / "locked.txt"
        digest = hashlib.sha256(pip_wheel.read_bytes()).hexdigest()
        pip = f"pip @ {pip_wheel.as_uri()} --hash=sha256:{digest}\n"
        locked.write_text(lock + pip, encoding="utf-8")
        words += ["--require-hashes", "--no-deps", "-r", locked]
    else:
        words += [pip_wheel, *requirements]
        if recipe.python.constraints:
            constraints = root.parent / "constraints.txt"
            constraints.write_text("\n".join(recipe.python.constraints) + "\n", encoding="utf-8")
            words += ["-c", constraints]
    try:
        tools.run(_pip(python, *words), env=environment, on_line=count)
    except ToolFailed as error:
        said, search = error.lines, [""]
        if missing := missing_requirement(said):
            # What it passed over, which it tells only when asked. That line may have been a
            # package's: by now there may be some in the tree, whose .pth files `site` would run
            tools.run(
                _pip(python, "-vv", "--dry-run", "--no-deps", missing, site=False),
                env=environment,
                on_line=search.append,
                allow_failure=True,
            )
        what, hint = explain_failure(said, origins, search, python.version)
        raise ImageError(
            f"The Python packages could not be had: {what}", hint=hint, log_path=tools.log_path
        ) from error
    versions = make_lock(recipe, python.version, report)
    _tidy(python, root, recipe)
    return versions


def _pip(python: GuestPython, *words: str | Path, site: bool = True) -> list[str]:
    # With `site` pip sees Debian's Python packages
    return python.argv(
        *([] if site else ["-S"]), "-P", "-c", _RUN_PIP, "install", "--break-system-packages",
        "--no-user", "--no-input", "--only-binary=:all:", "--root-user-action=ignore",
        "--progress-bar=off", "--disable-pip-version-check", *words,
    )  # fmt: skip


def _tidy(python: GuestPython, root: Path, recipe: Recipe) -> None:
    """Make what pip wrote fit for the guest's paths, and the same wherever it was built."""
    bin_directory = root / "usr/local/bin"
    for script in bin_directory.iterdir():
        if script.is_file() and not script.is_symlink():
            content = script.read_bytes()
            script.write_bytes(guest_script(content, str(root)))
    # Where on the host pip's wheel lay concerns nobody.
    for record in python.packages.glob("pip-*.dist-info/direct_url.json"):
        record.unlink()
    # Of what was named to pip itself: of other packages with a lock than without one
    for mark in python.packages.glob("*.dist-info/REQUESTED"):
        mark.unlink()
    for record in python.packages.glob("*.dist-info/RECORD"):
        _renew_record(record, python.packages, bin_directory)
    for pattern in recipe.python.prune:
        for path in python.packages.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def guest_script(content: bytes, root: str) -> bytes:
    """A script that pip wrote for the interpreter below *root*, as it must be in the guest.

    Where the path is too long for a ``#!`` line, pip writes three lines that are shell and Python
    at once; they become one line as well.
    """
    content = re.sub(rb"\A#!/bin/sh\n'''exec' (\S+) \"\$0\" \"\$@\"\n' '''\n", rb"#!\1\n", content)
    return content.replace(root.encode(), b"")


def _renew_record(record: Path, packages: Path, bin_directory: Path) -> None:
    """Correct the checksums of changed scripts, and forget what is gone, in a RECORD (PEP 376)."""
    rows = []
    with record.open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            path = Path(os.path.normpath(packages / row[0]))
            if row[1] and path.parent == bin_directory and path.is_file():
                content = path.read_bytes()
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
                row = [row[0], f"sha256={digest.decode().rstrip('=')}", str(len(content))]
            if path.name not in ("direct_url.json", "REQUESTED") or path.is_file():
                rows.append(row)
    with record.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def check_preloads(python: GuestPython, recipe: Recipe, tools: Tools) -> None:
    """Find what the recipe preloads in the tree: a slip is told now, not at a VM's boot.

    Raises:
        ImageError: a module of ``preload`` is not in the image; names it.
    """
    try:
        tools.run(
            python.argv("-S", "-c", _FIND_MODULES, python.packages, *recipe.preload),
            env=python.environment(),
        )
    except ToolFailed as error:
        raise ImageError(
            f"The image has {error.lines[-1] if error.lines else 'not what is preloaded'}, "
            "which the recipe preloads.",
            hint="correct `preload` or `python.requirements` in the recipe",
            log_path=tools.log_path,
        ) from error


def compile_commands(
    python: GuestPython, root: Path, directories: Sequence[Path]
) -> list[list[str]]:
    """Commands that compile the modules in *directories*, together, for the guest's paths.

    Hash-based and unchecked bytecode (PEP 552): the image gives every file the same time stamp,
    and nothing in it changes. A package may ship a template that is no valid Python, so their
    exit codes mean nothing.
    """
    count = max(1, min(len(os.sched_getaffinity(0)), 4, len(directories)))
    return [
        python.argv(
            "-S", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash",
            "-s", root, "-p", "/", *directories[start::count],
        )
        for start in range(count)
    ]  # fmt: skip


def distributions(python: GuestPython) -> list[str]:
    """``name==version`` of every Python distribution that pip installed, sorted."""
    found = []
    for metadata in python.packages.glob("*.dist-info/METADATA"):
        head = metadata.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
        fields = dict(re.findall(r"^(Name|Version): *(\S+)", head, re.MULTILINE))
        found.append(f"{fields.get('Name', '?')}=={fields.get('Version', '?')}")
    return sorted(found, key=str.lower)
