"""Where the guest's Debian packages come from: the host's own apt configuration, read.

A host that is Debian itself names its mirrors in its sources; they serve the guest's release too.
On any other host (Ubuntu, …) the mirrors are of no use and mmdebstrap's built-in default is taken;
proxies, certificates and retries of apt's configuration apply on both.
Formats: ``man 5 sources.list`` (one-line and deb822), ``man 5 apt.conf``.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import msgspec

DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# The suites that host sources of Debian's main archive are listed under, besides the codename.
_RELEASE_NAMES = {"stable", "oldstable", "oldoldstable", "testing", "unstable", "sid"}

# What of the host's apt configuration concerns reaching a mirror. Nothing that weakens the check
# of signatures is taken over.
_NETWORK_OPTION = re.compile(
    r"Acquire::(?:(?:http|https|ftp|tor)(?:::.+)?|Retries|ForceIPv[46]"
    r"|Check-Valid-Until|Check-Date|(?:Max|Min)-ValidTime|Max-FutureTime)",
    re.IGNORECASE,
)


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of apt's sources, binary packages only."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""


class Mirrors(msgspec.Struct, frozen=True, kw_only=True):
    """A mirror of Debian's main archive, and one of its security updates (or None)."""

    main: str
    security: str | None = None


def host_mirrors(etc: Path = Path("/etc")) -> Mirrors | None:
    """The mirrors that this host uses, if it is a Debian; None if it is not, or names none."""
    release = _os_release(etc / "os-release")
    if release.get("ID") != "debian":
        return None
    sources: list[Source] = []
    apt = etc / "apt"
    for path in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if path.suffix == ".sources":
            sources += parse_deb822(text)
        elif path.suffix == ".list":
            sources += parse_one_line(text)
    return choose_mirrors(sources, release.get("VERSION_CODENAME", ""))


def parse_one_line(text: str) -> list[Source]:
    """The entries of a ``.list`` file: ``deb [options] URI suite component…``."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(
            r"\s*deb\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<rest>.*)",
            line.split("#", 1)[0],
        )
        if match is None:
            continue
        options = dict(
            word.partition("=")[::2] for word in (match["options"] or "").lower().split()
        )
        found.append(
            Source(
                uris=(match["uri"],),
                suites=(match["suite"],),
                components=tuple(match["rest"].split()),
                signed_by=options.get("signed-by", ""),
            )
        )
    return found


def parse_deb822(text: str) -> list[Source]:
    """The entries of a ``.sources`` file: stanzas of ``Field: value`` lines."""
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "0", "off")
        if enabled and "deb" in fields.get("types", "").split() and "uris" in fields:
            found.append(
                Source(
                    uris=tuple(fields["uris"].split()),
                    suites=tuple(fields.get("suites", "").split()),
                    components=tuple(fields.get("components", "").split()),
                    signed_by=fields.get("signed-by", ""),
                )
            )
    return found


def choose_mirrors(sources: Sequence[Source], codename: str) -> Mirrors | None:
    """Which of a Debian host's sources are Debian's own archive.

    Other publishers use Debian's suite names too (``deb https://example.org/x bookworm main``).
    Debian's archive is told from them by its keyring, and by also serving the updates suite.
    """
    releases = _RELEASE_NAMES | ({codename} if codename else set())
    ours = [
        (uri, source.suites)
        for source in sources
        if "main" in source.components and _signed_by_debian(source.signed_by)
        for uri in source.uris
        if not uri.startswith("cdrom:")
    ]
    main = [uri for uri, suites in ours if releases.intersection(suites)]
    updates = {uri for uri, suites in ours if any(suite.endswith("-updates") for suite in suites)}
    security = [
        uri
        for uri, suites in ours
        if any(suite.endswith(("-security", "/updates")) for suite in suites)
    ]
    main.sort(key=lambda uri: uri not in updates)  # stable: first of the file otherwise
    if not main:
        return None
    return Mirrors(main=main[0], security=security[0] if security else None)


def source_lines(mirrors: Mirrors, suite: str) -> list[str]:
    """One-line sources for the guest's *suite*, as mmdebstrap takes them."""
    signed = f"[signed-by={DEBIAN_KEYRING}] " if DEBIAN_KEYRING.exists() else ""
    lines = [f"deb {signed}{mirrors.main} {name} main" for name in (suite, f"{suite}-updates")]
    if mirrors.security:
        lines.append(f"deb {signed}{mirrors.security} {suite}-security main")
    return lines


def without_credentials(uri: str) -> str:
    """*uri* without user name and password, fit for the guest's eyes and for logs."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def host_network_options() -> list[str]:
    """The host's apt options that concern reaching a mirror, as ``Name "value"``.

    Empty on a host without apt.
    """
    try:
        dump = subprocess.run(
            ["apt-config", "dump"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return network_options(dump.splitlines())


def network_options(dump: Iterable[str]) -> list[str]:
    """The lines of ``apt-config dump`` that concern reaching a mirror and have a value."""
    found = []
    for line in dump:
        match = re.fullmatch(r'(\S+) "(.+)";', line.strip())
        if match and _NETWORK_OPTION.fullmatch(match[1]):
            found.append(f'{match[1]} "{match[2]}"')
    return found


def _signed_by_debian(signed_by: str) -> bool:
    return not signed_by or all("debian-archive" in word for word in signed_by.split())


def _os_release(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, equals, value = line.partition("=")
        if equals and not name.startswith("#"):
            try:
                words = shlex.split(value)
            except ValueError:
                continue
            found[name.strip()] = words[0] if words else ""
    return found
