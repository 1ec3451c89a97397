"""Which package indexes pip is configured for on this host, read as pip reads it.

https://pip.pypa.io/en/stable/topics/configuration: global, user and site files, each over the one
before, ``PIP_CONFIG_FILE``, then the environment; section ``[install]`` over ``[global]``.  Not
asked of pip itself, which takes half a second and need not be there (uv makes environments
without). Passwords come from the index's URL or from ``netrc``; pip's keyrings are not asked.
"""

from __future__ import annotations

import configparser
import os
import sys
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

DEFAULT_INDEX = "https://pypi.org/simple"
_KEYS = frozenset(
    "index-url extra-index-url find-links no-index cert client-cert trusted-host proxy".split()
)
_BUNDLES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
_SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


class Index(msgspec.Struct, frozen=True):
    """A package index, or a page or directory of links."""

    url: str
    """Without a name or password; ``file:`` for a directory of this host"""
    user: str = ""
    password: str = ""
    links: bool = False
    """Whether it is one of ``find-links``: one page or directory for all projects"""

    def __repr__(self) -> str:
        return f"<Index {self.url}>"


class PipConfig(msgspec.Struct, frozen=True):
    """What of pip's configuration counts here."""

    indexes: tuple[Index, ...] = ()
    cert: str = ""
    """A bundle of certificate authorities, "" for those of the system"""
    client_cert: str = ""
    trusted_hosts: tuple[str, ...] = ()
    proxy: str = ""
    problems: tuple[str, ...] = ()
    """What of it could not be understood, in words"""

    def __repr__(self) -> str:  # a password in the proxy's URL is nobody's business
        return f"<PipConfig {self.indexes}>"


def read_config(environ: Mapping[str, str] | None = None) -> PipConfig:
    """The configuration in force for this process's user."""
    environ = os.environ if environ is None else environ
    values: dict[str, str] = {}
    for section in ("global", "install"):
        for path in _files(environ):
            values.update(_section(path, section))
    for name, value in environ.items():
        key = name.removeprefix("PIP_").lower().replace("_", "-")
        if name.startswith("PIP_") and key in _KEYS and value:
            values[key] = value
    indexes: list[Index] = []
    problems: list[str] = []
    netrc = _netrc(environ)
    urls: list[tuple[str, bool]] = []
    if values.get("no-index", "").lower() not in ("1", "true", "yes", "on"):
        urls.append((values.get("index-url") or DEFAULT_INDEX, False))
        urls += [(url, False) for url in values.get("extra-index-url", "").split()]
    urls += [(url, True) for url in values.get("find-links", "").split()]
    for url, links in dict.fromkeys(urls):
        try:
            indexes.append(_index(url, netrc, links=links))
        except (ValueError, RuntimeError, OSError):  # it may hold a password: it is not repeated
            kind = "find-links" if links else "an index"
            problems.append(f"pip's configuration on the host names {kind} whose URL is none")
    cert = values.get("cert") or next((environ[name] for name in _BUNDLES if environ.get(name)), "")
    return PipConfig(
        indexes=tuple(indexes),
        cert=cert,
        client_cert=values.get("client-cert", ""),
        trusted_hosts=tuple(values.get("trusted-host", "").split()),
        proxy=values.get("proxy", ""),
        problems=tuple(problems),
    )


def host_bundle(environ: Mapping[str, str] | None = None) -> str:
    """The file of the certificate authorities that this host trusts, "" when none is known."""
    config = read_config(environ)
    return next((path for path in (config.cert, *_SYSTEM_BUNDLES) if os.path.isfile(path)), "")  # noqa: PTH113


def directory_of(index: Index) -> Path:
    """The directory of a ``file:`` index."""
    path = Path(urllib.parse.unquote(urllib.parse.urlsplit(index.url).path))
    return path.parent if index.links and path.suffix in (".html", ".htm") else path


def roots_of(index: Index) -> Path:
    """Below what its files have to lie: see `network.packages`."""
    directory = directory_of(index)
    if not index.links and directory.name == "simple" and len(directory.parts) > 2:
        directory = directory.parent
    return directory.resolve()


def _files(environ: Mapping[str, str]) -> list[Path]:
    home = Path(environ.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111
    own = environ.get("PIP_CONFIG_FILE", "")
    if own == os.devnull:
        return []
    places = (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
    system = [Path(each, "pip", "pip.conf") for each in places if each]
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config", "pip", "pip.conf")
    files = [*system, Path("/etc/pip.conf"), home / ".pip" / "pip.conf", user,
             Path(sys.prefix, "pip.conf")]  # fmt: skip
    return [*files, Path(own)] if own else files


def _section(path: Path, section: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
        items = parser.items(section)
    except (OSError, UnicodeDecodeError, configparser.Error):  # pip itself says so, when it is run
        return {}
    keys = ((name.lower().replace("_", "-").removeprefix("--"), value) for name, value in items)
    return {key: value for key, value in keys if key in _KEYS}


def _netrc(environ: Mapping[str, str]) -> Mapping[str, tuple[str, str]]:
    import netrc

    home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111
    path = environ.get("NETRC") or os.path.join(home, ".netrc")  # noqa: PTH118
    with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
        hosts = netrc.netrc(path).hosts
        return {host: (login or "", password or "") for host, (login, _, password) in hosts.items()}
    return {}


def _index(url: str, netrc: Mapping[str, tuple[str, str]], *, links: bool = False) -> Index:
    """Raises ValueError, RuntimeError for what is no URL and no path."""
    if "://" not in url and not url.startswith("file:"):
        return Index(Path(url).expanduser().absolute().as_uri(), links=links)
    parts = urllib.parse.urlsplit(url)
    _ = parts.port  # a number, or a ValueError
    if parts.scheme == "file":
        return Index(url, links=links)
    user = urllib.parse.unquote(parts.username or "")
    password = urllib.parse.unquote(parts.password or "")
    if not user:
        user, password = netrc.get(parts.hostname or "", ("", password))
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    return Index(urllib.parse.urlunsplit(bare), user, password, links)
