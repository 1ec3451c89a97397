"""What a person adds to a recipe: requirements, as he has them already.

`read` takes a requirement, a ``requirements.txt``, a ``pyproject.toml`` or a conda
``environment.yml`` and gives requirements (PEP 508) with the place where each was written: a recipe
holds nothing else. What cannot be one is refused by name, with file and line. Nothing of a package
is run, and no index is asked. Floor 2; only ``vmkernel image build --add`` imports it.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from vmkernel.errors import ImageError
from vmkernel.image.recipe import distribution_name

_DEEPEST = 10
"""Files that include files that include files."""
_MOST_FILES = 100
"""That are included."""
_LARGEST = 4 << 20
"""Bytes of a file."""

_INDEX_OPTIONS = frozenset(
    "-i --index-url --extra-index-url -f --find-links --no-index --trusted-host --proxy --cert "
    "--client-cert".split()
)
_TRUE_ALREADY = frozenset("--prefer-binary --only-binary --require-hashes --use-feature".split())
_URL = re.compile(r"(?:[a-z]+\+)?[a-z]+://|[a-z]+\+[a-z]+:|file:", re.IGNORECASE)
_PATH = re.compile(r"(?:\.{0,2}/|~|[A-Za-z]:\\)|.*\.(?:whl|zip|tar\.gz|tar\.bz2|tgz)$")


class Added(msgspec.Struct):
    """What was read, and what has to be said about it."""

    requirements: dict[str, str] = {}
    """Where each was written, by its text."""
    constraints: dict[str, str] = {}
    hashes: dict[str, list[str]] = {}
    """Of a distribution's files, by its normalised name: ``sha256:…``."""
    notes: list[str] = []
    included: int = 0
    """How many files of requirements were read."""

    def require(self, text: str, origin: str) -> None:
        """Add a requirement.  Raises ImageError: it is none."""
        self.requirements.setdefault(checked(text, origin), origin)

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.append(text)


def read(what: str, added: Added, python: str) -> None:
    """Read one ``--add`` into *added*; *python* is the guest's version, as in ``3.13``.

    Raises:
        ImageError: it cannot be read, or holds what is no requirement; tells file and line.
    """
    path, _, extras = what.partition("[") if what.endswith("]") else (what, "", "")
    if Path(path).suffix == ".toml":
        from vmkernel.image.projects import read_pyproject

        names = [word.strip() for word in extras.removesuffix("]").split(",") if word.strip()]
        read_pyproject(_home(path), names, added, python)
    elif Path(what).suffix in (".yml", ".yaml"):
        from vmkernel.image.projects import read_environment

        read_environment(_home(what), added, python)
    elif Path(what).suffix in (".txt", ".in"):
        _read_requirements(_home(what), added, 0, constraints=False)
    else:
        added.require(what, "--add")


def _home(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111 - "~nobody" stays as it is


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        # A FIFO must not keep us waiting
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            data = file.read(_LARGEST + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
        if data is None or len(data) > _LARGEST:
            why = "it is no ordinary file" if data is None else f"it has over {_LARGEST >> 20} MiB"
            raise ValueError(why)
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif isinstance(error, UnicodeDecodeError):
            reason = "it is not text (UTF-8)"
        raise ImageError(
            f"{path} cannot be read: {reason}",
            hint="--add takes a requirements.txt, a pyproject.toml, an environment.yml, "
            'or a requirement like "scikit-learn>=1.5"',
        ) from error


def refused(origin: str, what: str, why: str, hint: str = "") -> ImageError:
    """The error about something that no recipe can hold."""
    return ImageError(
        f"{without_password(origin)}: {without_password(what)!r} is refused: {why}",
        hint=hint or "leave it out",
    )


def checked(text: str, origin: str) -> str:
    """*text*, if it is a requirement that a recipe may hold.

    Raises:
        ImageError: it is not; says why.
    """
    text = " ".join(text.split())
    if _URL.match(text) or (_PATH.match(text) and " @ " not in text):
        raise refused(
            origin,
            text,
            "a path or URL has no version that could be found again in an index",
            "name the package and its version; put a wheel of yours into an index, or a "
            "directory that pip's configuration names (find-links)",
        )
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        reason = " ".join(str(error).partition("\n")[0].split())
        raise ImageError(
            f"{without_password(origin)}: {without_password(text)!r} is no requirement (PEP 508): "
            f"{reason}",
            hint='write it like name, name>=1.5,<2 or name[extra]==1.5; python_version>"3.9"',
        ) from error
    if why := unfit(requirement, text):
        raise refused(origin, text, why, "name a version in an index instead")
    return text


def unfit(requirement: Requirement, text: str) -> str:
    """Why a recipe cannot hold it, *text* as it is written; "" when it can.

    Of a URL only a wheel is taken: anything else would be built, which runs its code on the host.
    What pip reads from a file (constraints, locks) it splits at all that Unicode calls the end of
    a line, and fills in this host's variables: a URL could carry them away.
    """
    if not text.replace("\t", " ").isprintable():
        return "it has characters in it that cannot be seen"
    if "${" in text:
        return "a recipe has no variables of an environment in it"
    url = requirement.url or ""
    if url and not re.match(r"https://[^#?]+\.whl(?:[#?]|$)", url):
        return "a URL may be that of a wheel (https://….whl) only: nothing is built on the host"
    if "@" in url.partition("://")[2].partition("/")[0]:
        return "a recipe is no place for a password"
    return ""


def without_password(text: str) -> str:
    """*text* without what stands before the host's name in its URLs."""
    # To the last @, since a password may have one in it, or a /; /t/… is conda's way
    return re.sub(r"(?<=/t/)[^/\s]+", "…", re.sub(r"(?<=://)\S*@", "…@", text))


def _read_requirements(path: Path, added: Added, depth: int, *, constraints: bool) -> None:
    """A ``requirements.txt``, as pip's documentation describes the format."""
    added.included += 1
    if added.included > _MOST_FILES:
        raise ImageError(
            f"{path}: more than {_MOST_FILES} files are included", hint="put them into one"
        )
    if depth > _DEEPEST:
        raise ImageError(
            f"{path}: files include files include files, {depth} times",
            hint="does one include itself (-r)?",
        )
    begun = 0
    parts: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not parts:
            begun = number
        line = line.rstrip("\r")
        # As pip does: a comment goes before lines are joined
        line = re.sub(r"(^|\s+)#.*$", "", line)
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        text = "".join([*parts, line]).strip()
        parts = []
        if text:
            _read_line(path, f"{path} line {begun}", text, added, depth, constraints=constraints)
    if text := "".join(parts).strip():
        _read_line(path, f"{path} line {begun}", text, added, depth, constraints=constraints)


def _read_line(
    path: Path, origin: str, text: str, added: Added, depth: int, *, constraints: bool
) -> None:
    if "${" in text:
        raise refused(
            origin,
            text,
            "a recipe has no variables of an environment in it",
            "write what stands for it",
        )
    if text.startswith("-"):
        _read_option(path, origin, text, added, depth, constraints=constraints)
        return
    hashes = re.findall(r"\s--hash(?:=|\s+)(\S+)", text)
    text = re.sub(r"\s--hash(?:=|\s+)\S+", "", text)
    if option := re.search(r"\s(--?[A-Za-z][\w-]*)", text):
        raise refused(
            origin, option[1], "a recipe has requirements and no options of pip's", "leave it out"
        )
    text = checked(text, origin)
    if constraints:
        added.constraints.setdefault(text, origin)
    else:
        added.requirements.setdefault(text, origin)
    for found in hashes:
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", found):
            raise refused(origin, found, "of hashes, only sha256 is known")
        known = added.hashes.setdefault(distribution_name(text), [])
        if found not in known:
            known.append(found)


def _read_option(
    path: Path, origin: str, text: str, added: Added, depth: int, *, constraints: bool
) -> None:
    option, _, rest = (
        re.sub(r"^(-[a-z])(?=[^\s=-])", r"\1 ", text).replace("=", " ", 1).partition(" ")
    )
    rest = rest.strip()
    if option in ("-r", "--requirement", "-c", "--constraint"):
        if _URL.match(rest):
            raise refused(origin, text, "it is fetched from elsewhere each time")
        _read_requirements(
            path.parent / rest,
            added,
            depth + 1,
            constraints=constraints or option in ("-c", "--constraint"),
        )
    elif option in ("-e", "--editable"):
        raise refused(
            origin,
            text,
            "a project that is being written has to be built, and an image is read-only",
            "add its dependencies (its pyproject.toml), and let the workspace show its files",
        )
    elif option in _INDEX_OPTIONS:
        raise refused(
            origin,
            option,
            "where packages come from is this host's configuration, not a recipe's",
            "leave the line out; `pip config set global.extra-index-url …` says it for this host",
        )
    elif option in _TRUE_ALREADY:
        added.note(f"{origin}: {option} is left out: wheels only, and a lock with hashes, anyway")
    elif option in ("--no-binary", "--config-settings", "--global-option"):
        raise refused(origin, option, "packages are installed from wheels; nothing is compiled")
    elif option == "--pre":
        raise refused(
            origin,
            option,
            "it would hold for all packages",
            "name the version: foo>=2.0a0 takes pre-releases of foo",
        )
    else:
        raise refused(origin, option, "a recipe has requirements and no options of pip's")


def python_fits(spec: str, python: str, origin: str, added: Added) -> None:
    """Say so when *spec* (PEP 440) does not let the guest's *python* through."""
    try:
        fits = any(SpecifierSet(spec).contains(f"{python}.{micro}") for micro in range(40))
    except InvalidSpecifier:
        raise ImageError(
            f"{origin}: {spec!r} is no version of Python",
            hint='write it like ">=3.11"',
        ) from None
    if not fits:
        added.note(f"{origin} asks for Python {spec}: the guest's is {python}")


def as_table(value: Any, origin: str) -> dict[str, Any]:
    """*value* as a table of a file.  Raises ImageError: it is none."""
    if not isinstance(value, dict):
        raise ImageError(f"{origin} is no table", hint="correct the file")
    return value
