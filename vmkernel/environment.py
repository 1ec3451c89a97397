"""Environment variables: which a guest may be given, which a process of ours may keep.

A guest gets variables by name (setting ``env``) or from a file (``env_file``); they may be secrets.
So a value is never in a message of ours, and a process that has no use for them has none of them:
`plain` is what it gets.  Floor 1; imported on the way of a start, so next to nothing is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from vmkernel.errors import SettingsError

LARGEST_FILE = 256 << 10
"""Bytes of an ``env_file``."""
LARGEST_ALL = 64 << 10
"""Bytes of all that a guest is given: it lies in a socket's buffer before its QEMU reads any."""
NAME = "[A-Za-z_][A-Za-z0-9_]*"

# What a process of ours needs of an environment: programs, places, words, our own settings.
PLAIN = frozenset("PATH HOME USER LOGNAME SHELL LANG TMPDIR DBUS_SESSION_BUS_ADDRESS".split())
PLAIN_PREFIXES = ("VMKERNEL_", "XDG_", "LC_", "PYTHON", "LD_")

# The guest's own: who it is and where its programs and libraries are.  The host's values mean
# nothing there, and others would keep its kernel from starting again after it died.
_OF_THE_GUEST = frozenset(
    "PATH HOME USER LOGNAME SHELL PWD OLDPWD HOSTNAME TMPDIR TEMP TMP IFS ENV BASH_ENV SHELLOPTS "
    "BASHOPTS TERMINFO GLIBC_TUNABLES LOCPATH NLSPATH GCONV_PATH DBUS_SESSION_BUS_ADDRESS".split()
)
_PREFIXES_OF_THE_GUEST = ("LD_", "PYTHON", "VMKERNEL_", "XDG_", "MALLOC_", "BASH_FUNC_")
# Decided by the setting `network`: a proxy, an index, the certificates to trust
_OF_THE_NETWORK = frozenset(
    "HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR "
    "REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO RES_OPTIONS LOCALDOMAIN HOSTALIASES".split()
)
_PREFIXES_OF_THE_NETWORK = ("PIP_", "UV_")

# By which pip on this host finds its index, and whatever runs here the outside
_OUTWARD = frozenset(
    "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE "
    "CURL_CA_BUNDLE NETRC XDG_CONFIG_HOME XDG_CONFIG_DIRS RES_OPTIONS LOCALDOMAIN".split()
)

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$", "'": "'"}


class Variables(dict[str, str]):
    """Variables with their values, which no traceback and no log gets to see."""

    def __repr__(self) -> str:
        return f"<{len(self)} variables>"

    __str__ = __repr__


def plain(environ: Mapping[str, str]) -> dict[str, str]:
    """What a process that is not the guest's may have: a token of one kernel is no other's."""
    return {
        name: value
        for name, value in environ.items()
        if name in PLAIN or name.startswith(PLAIN_PREFIXES)
    }


def outward(environ: Mapping[str, str]) -> dict[str, str]:
    """What the owner of a VM needs besides, to reach the network for it (`host.network`)."""
    return {
        name: value
        for name, value in environ.items()
        if name.upper() in _OUTWARD or name.startswith("PIP_")
    }


def why_refused(name: str) -> str:
    """Why a guest cannot be given a variable of this name; "" when it can."""
    if not re.fullmatch(NAME, name):
        return "not a variable's name (letters, digits and _)"
    if name in _OF_THE_GUEST or name.startswith(_PREFIXES_OF_THE_GUEST):
        return "it is the guest's own; a cell may set it (os.environ)"
    if name.upper() in _OF_THE_NETWORK or name.startswith(_PREFIXES_OF_THE_NETWORK):
        return "the setting `network` decides it; a cell may set it (os.environ)"
    return ""


def variable_names(value: object) -> tuple[str, ...]:
    """The parser of the setting ``env``: names, as a list or with commas or blanks.

    Raises:
        ValueError: one is no name, or not allowed.
    """
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if not isinstance(value, list | tuple):
        raise ValueError("not a list")
    for name in value:
        if isinstance(name, str) and "=" in name:  # whose value is nobody's business
            raise ValueError(f"{name.partition('=')[0]!r} has a value: only names are allowed")
        why = why_refused(name) if isinstance(name, str) else "not a name"
        if why:
            raise ValueError(f"{name!r} cannot be given to a guest: {why}")
    return tuple(dict.fromkeys(value))


def given(
    names: Iterable[str], file: Path | None, environ: Mapping[str, str]
) -> tuple[Variables, list[str]]:
    """The variables that a guest is given, and the names of those that are not set here.

    What *names* finds in *environ* comes before the file's.

    Raises:
        SettingsError: the file or a value cannot be taken, or all is too long.
    """
    variables = read_file(file) if file is not None else Variables()
    missing = []
    for name in names:
        if name in environ:
            variables[name] = _as_text(name, environ[name])
        elif name not in variables:
            missing.append(name)
    import msgspec  # not on the way of every start; as it will be sent

    if len(msgspec.json.encode(dict(variables))) > LARGEST_ALL:
        raise SettingsError(
            f"The variables for the guest have more than {LARGEST_ALL >> 10} KiB",
            hint="give it a file (docs/files.md) instead of the longest",
        )
    return variables, missing


def _as_text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:  # which has the value in it
        raise SettingsError(
            f"The variable {name} (setting `env`) cannot be given to a guest: "
            "its value is not text (UTF-8)",
            hint="set it anew, or take its name out of `env`",
        ) from None
    return value


def in_words(names: Iterable[str], file: Path | None, environ: Mapping[str, str]) -> str:
    """What a guest is given, for a person: names, never values; "" for nothing."""
    words = [name if name in environ or file else f"{name} (not set)" for name in names]
    if file is not None:
        words.append(f"those of {file}")
    return ", ".join(words)


def read_file(path: Path) -> Variables:
    """The variables of an ``env_file``.

    Raises:
        SettingsError: it cannot be read, is open to others, or has a mistake: tells the line,
            and never what is in it.
    """
    try:
        # A FIFO must not keep a kernel waiting
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check(path, os.fstat(descriptor))
            data = b""
            while len(data) <= LARGEST_FILE and (part := os.read(descriptor, 1 << 16)):
                data += part
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SettingsError(
            f"The file of variables {path} cannot be read: {error.strerror or error}",
            hint="correct `env_file`, or make the file",
        ) from error
    if len(data) > LARGEST_FILE:
        raise SettingsError(
            f"The file of variables {path} has more than {LARGEST_FILE >> 10} KiB",
            hint="is it the right file? It is to hold lines of NAME=value",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:  # whose words quote what is in the file
        text = "\0"
    try:
        return parse(text)
    except ValueError as error:
        raise SettingsError(
            f"The file of variables {path} has a mistake: {error}",
            hint='write lines of NAME=value, in quotes where need be: NAME="a b"',
        ) from None


def _check(path: Path, status: os.stat_result) -> None:
    import stat

    mode = stat.S_IMODE(status.st_mode)
    # An administrator may let a group read what he wrote
    open_to = 0o007 | (0o020 if status.st_uid == 0 else 0o070)
    if not stat.S_ISREG(status.st_mode):
        problem, hint = "it is no ordinary file", "name a file of NAME=value lines"
    elif status.st_uid not in (0, os.geteuid()):
        problem = f"it belongs to user id {status.st_uid}, not to you ({os.geteuid()})"
        hint = f"make a copy of your own: install -m 600 {path} ANOTHER"
    elif mode & open_to:
        problem = f"others may read or change it (mode {mode:04o}, wanted 0600)"
        hint = f"chmod 600 {path}"
    else:
        return
    raise SettingsError(f"The file of variables {path} is not taken: {problem}", hint=hint)


def parse(text: str) -> Variables:
    """The variables of lines ``NAME=value``; later ones win.

    Empty lines and those that begin with ``#`` say nothing; ``export`` before a name is allowed.
    A value may stand in single quotes (as it is) or in double ones (with ``\\n``, ``\\t``, ``\\"``,
    ``\\\\``, ``\\$``); without quotes, it ends where `` #`` begins. Nothing is replaced in it.

    Raises:
        ValueError: with the line's number, and nothing that was in it but a name.
    """
    if "\0" in text:
        raise ValueError("it is not text (UTF-8)")
    variables = Variables()
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name = re.sub(r"^export\s+", "", name).rstrip()
        if not equals:  # it may be the rest of a secret
            raise ValueError(f"line {number} is not NAME=value")
        if not re.fullmatch(NAME, name):
            raise ValueError(f"line {number}: what stands before the = is not a variable's name")
        why = why_refused(name)
        if why:
            raise ValueError(f"line {number}: {name} cannot be given to a guest: {why}")
        try:
            variables[name] = _value(value.strip())
        except ValueError as error:
            raise ValueError(f"line {number} ({name}): {error}") from None
    return variables


def _value(text: str) -> str:
    quote = text[:1]
    if quote not in ("'", '"'):
        return re.split(r"(?:^|\s)#", text, maxsplit=1)[0].rstrip()
    value = ""
    rest = iter(range(1, len(text)))
    for place in rest:
        character = text[place]
        if character == quote:
            if re.fullmatch(r"\s*(?:#.*)?", text[place + 1 :]):
                return value
            raise ValueError("something stands after the closing quote")
        if character == "\\" and quote == '"':
            following = text[place + 1 : place + 2]
            # Any other backslash is one, as in a shell
            if following in _ESCAPES:
                value += _ESCAPES[following]
                next(rest)
                continue
        value += character
    raise ValueError("the quote is not closed in this line")
