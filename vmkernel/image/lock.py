"""The versions of an image's Python packages, with the hashes of their wheels.

pip tells what it installed (``--report``), which becomes a file in the format of requirements: one
that pip reads again and installs nothing else from (``--require-hashes``). Its second line says of
which requirements and which Python it is the answer. Floor 2.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from vmkernel.errors import ImageError
from vmkernel.image.additions import unfit
from vmkernel.image.recipe import Recipe, distribution_name

_HEAD = "# The Python packages of a vmkernel image: versions, and hashes of their wheels\n"
_FOR = "# for "
_LINE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(?:==[A-Za-z0-9.!+_-]+| @ https://[^\s\\]+)"
    r" --hash=sha256:[0-9a-f]{64}"
)


def question(recipe: Recipe, python: str) -> str:
    """A hash of what decides the versions: requirements, constraints, the guest's Python."""
    decides = [recipe.requirements(), recipe.python.constraints, python]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def make_lock(recipe: Recipe, python: str, report: Path) -> str:
    """The lock of what pip reported to have installed.

    Raises:
        ImageError: a wheel is none of those that the recipe allows, or has no hash.
    """
    content: dict[str, Any] = json.loads(report.read_bytes())
    lines = []
    for item in content["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        url = item["download_info"]["url"]
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", "")
        if distribution_name(name) == "pip":
            continue  # Debian's, which each build brings
        allowed = recipe.python.hashes.get(distribution_name(name))
        if allowed is not None and f"sha256:{digest}" not in allowed:
            raise ImageError(
                f"The wheel of {name} {version} has a hash that is not among those asked for "
                f"(sha256:{digest}).",
                hint="was the file exchanged in the index? Or correct the hash where it came from",
            )
        if not digest:
            raise ImageError(f"pip tells no hash of {name} {version}", hint="update vmkernel")
        what = f"{name} @ {url}" if item.get("is_direct") else f"{name}=={version}"
        lines.append(f"{what} --hash=sha256:{digest}\n")
    lock = f"{_HEAD}{_FOR}{question(recipe, python)}\n" + "".join(sorted(lines, key=str.lower))
    check_lock(lock)  # what a package requires need not be what a recipe may
    return lock


def check_lock(lock: str) -> None:
    """See that there is nothing in it but versions: pip would obey options, too.

    Raises:
        ImageError: there is; names the line.
    """
    for number, line in enumerate(lock.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        text = line.partition(" --hash=")[0]
        if not _LINE.fullmatch(line) or unfit(Requirement(text), text):
            raise ImageError(
                f"The lock has a mistake in line {number}: it is neither NAME==VERSION nor "
                "NAME @ https://….whl, with --hash=sha256:…",
                hint="correct it, or choose versions anew with --update",
            )


def answers(lock: str, recipe: Recipe, python: str) -> bool:
    """Whether *lock* is of this recipe's requirements, for this Python."""
    return lock.startswith(f"{_HEAD}{_FOR}{question(recipe, python)}\n")
