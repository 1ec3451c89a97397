"""What pip says when requirements cannot be had, in words that name which and why.

pip speaks to who installs packages into his own Python; here it installs wheels only, for a guest.
Pure; the texts are pip 25's, and what is not recognised is passed on as it is. Floor 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vmkernel.image.recipe import distribution_name

BUILDS = "vmkernel: nothing is built on the host"
"""What pip is told when it starts a program (`image.python`)."""
_SHOWN = 8
"""Versions that are named at most; the newest."""

_UNREACHABLE = re.compile(
    r"(?:Failed to establish|ConnectionError|NameResolutionError|Max retries|"
    r"ReadTimeout|ConnectTimeout|Connection refused|SSLError|certificate verify failed)"
)
_CORRECT = "correct the requirement, where it was written or in the recipe (`python.requirements`)"
_WHEELS = "only wheels for the guest's Python are installed, nothing is compiled"


def missing_requirement(lines: Sequence[str]) -> str:
    """The requirement for which pip found nothing; "" when something else went wrong."""
    for line in lines:
        if found := re.match(
            r"ERROR: No matching distribution found for (.+?)(?: \(from .*)?$", line
        ):
            return found[1]
    return ""


def explain_failure(
    lines: Sequence[str],
    origins: Mapping[str, str] | None = None,
    search: Sequence[str] = (),
    python: str = "",
) -> tuple[str, str]:
    """What pip said went wrong, naming the requirement, and what to do about it.

    *origins*: where requirements were written, by their text. *search*: what pip says at length
    (``-vv``) about the one that is missing. *python*: the guest's version.
    """
    origins = origins or {}
    said = "\n".join(lines)
    if conflict := _conflict(lines, origins):
        return conflict, "loosen one of them, or leave one out"
    if BUILDS in said:
        return _has_to_be_built(lines, origins), f"require a version that has a wheel: {_WHEELS}"
    missing = missing_requirement(lines)
    if unreachable := _UNREACHABLE.search(said):
        what = f"no package index was asked for {missing}" if missing else _as_said(lines)
        return (
            f"{what}{_where(missing, lines, origins)} "
            f"(the package index was not reached: {unreachable[0]})",
            "check the network, and the host's pip configuration (`pip config list`)",
        )
    if missing:
        return _why_missing(missing, lines, search, python, origins)
    if "DO NOT MATCH THE HASHES" in said or "Hashes are required" in said:
        named = re.findall(r"^\s+(\S+.*?) from (?:https?|file)://", said, re.MULTILINE)
        return (
            f"the index has another file than the lock says: {', '.join(named) or 'see the log'}",
            "if that is right (a newer build of the same version), resolve anew with --update",
        )
    return _as_said(lines), f"{_CORRECT}; {_WHEELS}"


def _as_said(lines: Sequence[str]) -> str:
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return "; ".join(dict.fromkeys(errors)) or (lines[-1] if lines else "pip ended without a word")


def _why_missing(
    missing: str,
    lines: Sequence[str],
    search: Sequence[str],
    python: str,
    origins: Mapping[str, str],
) -> tuple[str, str]:
    where = _where(missing, lines, origins)
    name = _name(missing)
    said = "\n".join(lines)
    guest = f"the guest's Python {python}" if python else "the guest's Python"
    versions = re.search(r"\(from versions: ([^)]*)\)", said)
    there = [] if versions is None or versions[1] == "none" else versions[1].split(", ")
    needs = dict(re.findall(r"(\S+) Requires-Python ([^;\n]+?)(?=[;\n]|$)", said))
    if there:
        also = f"; {len(needs)} others are for another Python" if needs else ""
        return (
            f"no version of {name} fits {missing!r}{where}: there are {_newest(there)}{also}",
            _CORRECT,
        )
    if needs:
        version, wanted = list(needs.items())[-1]
        return (
            f"{name}{where} is not for {guest}: {name} {version} needs Python {wanted}",
            "choose a version for it, if there is one, or another package",
        )
    sources, tags = _seen(search)
    if tags:
        return (
            f"{name}{where} has no wheel for {guest} (x86-64 Linux): there are {_newest(tags)}",
            f"choose another version or package: {_WHEELS}",
        )
    if sources:
        return (
            f"{name}{where} has no wheel, only its source ({_newest(sources)})",
            f"choose another version or package, or put a wheel of it into an index: {_WHEELS}",
        )
    asked = f" (asked for: {missing})" if missing != name else ""
    return (
        f"there is no package {name!r}{where} in the index{asked}",
        f"is its name right? {_CORRECT}",
    )


def _seen(search: Sequence[str]) -> tuple[list[str], list[str]]:
    """What pip passed over: files of source, and wheels' tags."""
    sources, tags = [], []
    for line in search:
        if "No sources permitted" in line and (
            file := re.search(r"/([^/#\s]+)(?:#\S*)?(?: |$)", line)
        ):
            sources.append(file[1])
        elif found := re.search(r"none of the wheel's tags \(([^)]*)\)", line):
            tags.append(found[1].partition(",")[0])
    return list(dict.fromkeys(sources)), list(dict.fromkeys(tags))


def _conflict(lines: Sequence[str], origins: Mapping[str, str]) -> str:
    """The two that cannot be together, and who wants them."""
    try:
        begin = next(n for n, line in enumerate(lines) if line.startswith("The conflict is caused"))
    except StopIteration:
        return ""
    causes = []
    for line in lines[begin + 1 :]:
        if not line.startswith("    "):
            break
        text = line.strip()
        if asked := re.match(r"The user requested (?:\(constraint\) )?(.+)", text):
            causes.append(f"{asked[1]} is asked for{_origin(asked[1], origins)}")
        else:
            causes.append(text + _origin(text, origins))
    return f"these cannot be together: {'; '.join(causes[:6])}"


def _has_to_be_built(lines: Sequence[str], origins: Mapping[str, str]) -> str:
    begun = [line for line in lines if re.match(r"\s*(?:Processing|Collecting|Downloading) ", line)]
    what = re.sub(r"^\s*\w+ ", "", begun[-1]) if begun else "a package"
    return f"{what}{_origin(what, origins)} has to be built, which would run its code on the host"


def _where(missing: str, lines: Sequence[str], origins: Mapping[str, str]) -> str:
    if origin := _origin(missing, origins):
        return origin
    needed = re.search(
        rf"satisfies the requirement {re.escape(missing)} \(from (.+?)\) \(from versions",
        "\n".join(lines),
    )
    # "a>=1->b": who wants it comes first
    return f" (required by {needed[1].partition('->')[0]})" if needed else ""


def _origin(text: str, origins: Mapping[str, str]) -> str:
    if origin := origins.get(text):
        return f" ({origin})"
    found = [origin for known, origin in origins.items() if _name(known) == _name(text)]
    return f" ({found[0]})" if len(found) == 1 else ""


def _name(requirement: str) -> str:
    return distribution_name(requirement.strip())


def _newest(words: Sequence[str]) -> str:
    shown = ", ".join(words[-_SHOWN:])
    return f"…, {shown}" if len(words) > _SHOWN else shown
