"""Text that people write, turned into what a setting holds: sizes, durations, names, paths.

Each parser takes what came from a TOML file (already typed) or from the environment (text) and
raises ``ValueError`` with a reason for people. Floor 1: knows nothing of settings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

_MIB_PER_UNIT = {"": 1, "M": 1, "MB": 1, "MIB": 1, "G": 1024, "GB": 1024, "GIB": 1024,
                 "T": 1024**2, "TB": 1024**2, "TIB": 1024**2}  # fmt: skip
_SECONDS_PER_UNIT = {"": 1, "S": 1, "M": 60, "H": 3600}


def parse_size(value: object) -> int:
    """MiB from ``2048``, ``"2048"``, ``"512M"``, ``"2G"``, ``"1.5 GiB"`` (units are binary).

    Raises:
        ValueError: not a size, or not a whole number of MiB.
    """
    number, unit = _number_and_unit(value, _MIB_PER_UNIT)
    mebibytes = number * unit
    if mebibytes != int(mebibytes):
        raise ValueError("not a whole number of MiB")
    return int(mebibytes)


def parse_seconds(value: object) -> float:
    """Seconds from ``90``, ``2.5``, ``"90s"``, ``"5m"``, ``"1h"``.

    Raises:
        ValueError: not a duration.
    """
    number, unit = _number_and_unit(value, _SECONDS_PER_UNIT)
    return number * unit


def _number_and_unit(value: object, units: Mapping[str, int]) -> tuple[float, int]:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("not a number")
    text = str(value).strip()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text[len(digits) :].upper()
    # float() alone would let "1_0" and "  1e9" through; nobody means those.
    if not digits or not set(digits.strip()) <= set("0123456789.") or unit not in units:
        raise ValueError("not a number with a known unit")
    return float(digits), units[unit]


def size(lowest: int, highest: int) -> Callable[[object], int]:
    """A parser of sizes from *lowest* to *highest* MiB."""

    def parse(value: object) -> int:
        return _in_range(parse_size(value), lowest, highest)

    return parse


def duration(value: object) -> float:
    """Seconds above 0."""
    seconds = parse_seconds(value)
    if not 0 < seconds < 1e9:
        raise ValueError("out of range")
    return seconds


def duration_between(lowest: float, highest: float) -> Callable[[object], float]:
    """A parser of times from *lowest* to *highest* seconds."""

    def parse(value: object) -> float:
        seconds = parse_seconds(value)
        if not lowest <= seconds <= highest:
            raise ValueError("out of range")
        return seconds

    return parse


def optional_duration(value: object) -> float | None:
    """Seconds from 0, or None for "none" and "never": no limit."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "never")):
        return None
    seconds = parse_seconds(value)
    if seconds >= 1e9:
        raise ValueError("out of range")
    return seconds


def optional_percent(value: object) -> int | None:
    """Per cent of one processor from 1 to 6400, ``50`` or ``"50%"``; None for "none"."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return None
    text = value.strip().removesuffix("%") if isinstance(value, str) else value
    return count(1, 6400)(text)


def count(lowest: int, highest: int) -> Callable[[object], int]:
    """A parser of whole numbers from *lowest* to *highest*."""

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError("not a whole number")
        if isinstance(value, str) and not value.strip().isdecimal():
            raise ValueError("not a whole number")
        return _in_range(int(value), lowest, highest)

    return parse


def optional_count(lowest: int, highest: int) -> Callable[[object], int | None]:
    """A parser of whole numbers from *lowest* to *highest*; None for "none": no limit."""

    def parse(value: object) -> int | None:
        if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
            return None
        return count(lowest, highest)(value)

    return parse


def optional_time(value: object) -> float | None:
    """Seconds above 0, or None for "none": no limit."""
    seconds = optional_duration(value)
    if seconds == 0:
        raise ValueError("out of range")
    return seconds


def _in_range(number: int, lowest: int, highest: int) -> int:
    if not lowest <= number <= highest:
        raise ValueError("out of range")
    return number


def choice(*choices: str) -> Callable[[object], str]:
    """A parser that lets only *choices* through; capitals do not matter."""

    def parse(value: object) -> str:
        text = value.strip().lower() if isinstance(value, str) else ""
        if text not in choices:
            raise ValueError("not one of the choices")
        return text

    return parse


def switch(value: object) -> str:
    """``"on"`` or ``"off"``; TOML's ``true`` and ``false`` are taken, too."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return choice("on", "off")(value)


def words(pattern: str) -> Callable[[object], tuple[str, ...]]:
    """A parser of lists, of TOML's or with commas or blanks; each word matches *pattern* whole."""

    def parse(value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        if not isinstance(value, list | tuple):
            raise ValueError("not a list")
        for word in value:
            if not isinstance(word, str) or not re.fullmatch(pattern, word):
                raise ValueError(f"not allowed: {word!r}")
        return tuple(dict.fromkeys(value))

    return parse


def networks(value: object) -> tuple[str, ...]:
    """A list of addresses and networks, ``192.0.2.7``, ``198.51.100.0/24``, ``2001:db8::/32``."""
    import ipaddress  # nobody needs it where there is no such list

    texts = words(r"[0-9A-Fa-f.:]+(?:/[0-9]{1,3})?")(value)
    for text in texts:
        ipaddress.ip_network(text)
    return texts


def recipe_name(value: object) -> str:
    """A recipe's name."""
    # The name becomes a directory's name: nothing that could leave images_dir.
    text = value.strip() if isinstance(value, str) else ""
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    if not text or not set(text) <= allowed or not text[0].isalnum() or len(text) > 64:
        raise ValueError("not a recipe's name")
    return text


def program(value: object) -> str:
    """A program on PATH, or the path of one; that it exists is found out when it is used."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("not a program's name")
    return value.strip()


def cluster_address(value: object) -> str:
    """``auto``, or where a cluster answers: ``host:port``, ``[IPv6 address]:port``."""
    text = value.strip() if isinstance(value, str) else ""
    if text.lower() == "auto":
        return "auto"
    match = re.fullmatch(r"(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", text)
    if not match or not 0 < int(match[1]) < 65536:
        raise ValueError("not an address with a port")
    return text


def optional_path(value: object) -> Path | None:
    """An absolute path, or None for "none"."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return None
    return absolute_path(value)


def absolute_path(value: object) -> Path:
    """An absolute path; a leading ``~`` is the home directory."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("not a path")
    path = Path(os.path.expanduser(value))  # noqa: PTH111 - Path.expanduser raises RuntimeError
    if not path.is_absolute():
        raise ValueError("not an absolute path")
    return path
