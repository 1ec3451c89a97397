"""Who may be reached: names and addresses against the setting `network`.  Pure, but for `is_own`.

A destination is judged three times: as it was written (`parse_target`), as a name or address on the
list (`Policy.judge`), and by each address that its name has, before the very address is connected
to (`Policy.judge_address`).  What is not understood is refused.

"Public" is what neither belongs to this host nor to a network that only some can reach: an
`ipaddress` address that is global and nothing special, seen through the forms in which IPv6 carries
an IPv4 address.  All else needs an entry that names the address or its network literally.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Literal

import msgspec

Mode = Literal["none", "packages", "allow", "open"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Host = str | Address

GATEWAY = "packages.vmkernel"
"""The name by which the guest reaches the package index: it exists in the proxy only."""
USUAL_PORTS = (80, 443)
"""Of an entry that names none."""
CLOSED_PORTS = frozenset((25,))
"""Not for `open`: nobody's notebook delivers mail by itself, and its host would be blamed."""

_NAME = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*"
                   r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z")  # fmt: skip
_NUMERIC = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\Z")
_PORT = re.compile(r"[0-9]{1,5}\Z")
_NAT64 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48")))
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")


class RefusedError(Exception):
    """The guest may not reach that; the text says why."""


class ClosedError(RefusedError):
    """And the settings could open it."""


class Rule(msgspec.Struct, frozen=True):
    """One entry of `network_allow`."""

    text: str
    name: str = ""
    """"" when it names addresses"""
    below: bool = False
    """Whether it is the names below that one (``*.name``)"""
    network: Network | None = None
    port: int | None = None

    def has_port(self, port: int) -> bool:
        """Whether it opens this port."""
        return port == self.port if self.port is not None else port in USUAL_PORTS

    def has_name(self, name: str) -> bool:
        """Whether it opens hosts of this name."""
        return name.endswith(f".{self.name}") if self.below else name == self.name

    def has_address(self, address: Address) -> bool:
        """Whether it names this address, by itself or as one of a network."""
        return self.network is not None and address in self.network


def parse_rule(text: str) -> Rule:
    """An entry of `network_allow`.  Raises ValueError, which says what is wrong with it."""
    if "://" in text:
        raise ValueError(f"{text!r}: write the host only, without http:// and path")
    host, port = _split_port(text)
    if "/" in host:
        try:
            return Rule(text, network=ipaddress.ip_network(host.strip("[]")), port=port)
        except ValueError as error:
            words = f"{error}; of a URL write the host only, without path"
            raise ValueError(f"{text!r} is no network: {words}") from None
    below = host.startswith("*.")
    try:
        found = parse_host(host[2:] if below else host)
    except RefusedError as error:
        raise ValueError(f"{text!r}: {error}") from None
    if not isinstance(found, str):
        if below:
            raise ValueError(f"{text!r}: an address has no names below it")
        if found in _THIS_NETWORK:
            raise ValueError(f"{text!r}: {found} is no address of a host; write it in full")
        return Rule(text, network=ipaddress.ip_network(found), port=port)
    if below and "." not in found:
        raise ValueError(f"{text!r}: a whole top-level domain; `network = open` is what opens all")
    if is_local_name(found):
        raise ValueError(f"{text!r}: this name is never looked up; write 127.0.0.1:{port or 80}")
    return Rule(text, name=found, below=below, port=port)


def _split_port(text: str) -> tuple[str, int | None]:
    try:
        bare = str(ipaddress.ip_network(text))  # an IPv6 address without brackets
    except ValueError:
        pass
    else:
        address = bare.partition("/")[0]
        return text if "/" in text else f"[{address}]" if ":" in address else address, None
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        return text, None
    return host, parse_port(port)


def parse_port(text: str) -> int:
    """A port's number.  Raises ValueError."""
    if not _PORT.match(text) or not 1 <= int(text) <= 65535:
        raise ValueError(f"{text!r} is no port")
    return int(text)


def parse_target(text: str, default_port: int | None = None) -> tuple[Host, int]:
    """``host:port`` as a proxy's client writes it.  Raises RefusedError."""
    match = re.fullmatch(r"(\[[^\[\]@/?#\\\s]*\]|[^\[\]:@/?#\\\s]+)(?::([0-9]*))?", text)
    if match is None:
        raise RefusedError("this is no host and port")
    host, port = match.groups()
    if not port:
        if default_port is None:
            raise RefusedError("it names no port")
        return parse_host(host), default_port
    try:
        return parse_host(host), parse_port(port)
    except ValueError as error:
        raise RefusedError(str(error)) from None


def parse_host(text: str) -> Host:
    """A host's name in lower case and without the last dot, or its address.

    An IPv4 address is known in all the forms in which the C library knows one (``127.1``,
    ``0x7f000001``, ``2130706433``, ``017700000001``).  Raises RefusedError.
    """
    if text.startswith("["):
        try:
            if "%" in text:
                raise ValueError
            return ipaddress.IPv6Address(text.removeprefix("[").removesuffix("]"))
        except ValueError:
            raise RefusedError("this is no IPv6 address") from None
    name = text.lower().removesuffix(".")
    if not name.isascii():
        raise RefusedError("write an international name in its ASCII form (xn--…)")
    if not _NAME.match(name):
        raise RefusedError("this is no host's name")
    if _NUMERIC.match(name.rpartition(".")[2]):  # as in the WHATWG's URL standard
        try:
            return ipaddress.IPv4Address(socket.inet_aton(name))
        except OSError:
            raise RefusedError("this is no IPv4 address") from None
    return name


def embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, where it does; else itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if any(address in network for network in _NAT64):
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def address_problem(address: Address) -> str:
    """Why this address is not public; "" when it is."""
    address = embedded(address)
    if isinstance(address, ipaddress.IPv6Address):
        if address.sixtofour is not None or address.teredo is not None or address in _COMPATIBLE:
            if address.is_loopback:
                return "a loopback address"
            return "an address that stands for another one"
        if address.is_site_local:
            return "an address of a private network"
    if address.is_loopback:
        return "a loopback address"
    if address.is_link_local:
        return "a link-local address"
    if address.is_unspecified or address.is_multicast:
        return "no address of a single host"
    if not address.is_global or address.is_reserved:
        return "an address of a private network"
    if is_own(address):
        return "an address of this host"
    return ""


def is_own(address: Address) -> bool:
    """Whether packets to this address would stay on this host.

    Linux then sends them from that address itself, or from a loopback one.  Nothing is sent.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            source = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:  # it cannot be reached at all
        return False
    return source == address or source.is_loopback


def is_local_name(host: str) -> bool:
    """Whether it is this machine's name for itself (RFC 6761)."""
    return host == "localhost" or host.endswith(".localhost")


class Policy:
    """What the settings `network` and `network_allow` open, but for what `network_deny` closes."""

    def __init__(self, mode: Mode, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> None:
        """Raises ValueError for an entry that is none."""
        self.mode = mode
        self.rules = [parse_rule(text) for text in allow] if mode == "allow" else []
        self.denied = [ipaddress.ip_network(text) for text in deny]

    def judge(self, host: Host, port: int) -> None:
        """Whether this may be looked up at all.  Raises RefusedError."""
        if isinstance(host, str):
            if is_local_name(host):
                raise RefusedError("a name of this machine itself")
            known = any(rule.has_name(host) and rule.has_port(port) for rule in self.rules)
        else:
            known = self._names(host, port)
        if self.mode == "open":
            if port in CLOSED_PORTS:
                raise RefusedError(f"port {port} is closed to all VMs")
        elif not known:
            raise ClosedError(
                "it is not in network_allow"
                if self.mode == "allow"
                else f"the setting network is {self.mode!r}"
            )
        if not isinstance(host, str):
            self.judge_address(host, port)

    def has_written(self, host: Host, port: int) -> bool:
        """Whether an entry is this very name."""
        if not isinstance(host, str):
            return False
        return any(not r.below and r.has_name(host) and r.has_port(port) for r in self.rules)

    def judge_address(self, address: Address, port: int) -> None:
        """Whether this address, which a permitted name has, may be connected to.

        Raises RefusedError.
        """
        self.judge_denied(address)
        problem = address_problem(address)
        if problem and not self._names(embedded(address), port, literally=True):
            raise RefusedError(f"{address} is {problem}")

    def judge_denied(self, address: Address) -> None:
        """Whether `network_deny` has this address, in whatever form.  Raises RefusedError."""
        if any(each in network for each in (address, embedded(address)) for network in self.denied):
            raise RefusedError(f"{address} is in network_deny")

    def _names(self, address: Address, port: int, *, literally: bool = False) -> bool:
        """Whether an entry has it; ``literally``: and means an address that is not public.

        A network that is not private as a whole (``0.0.0.0/0``) names no private address, and what
        belongs to this host alone is named by nothing but itself, with its port.
        """
        for rule in self.rules:
            if not (rule.has_port(port) and rule.has_address(address)):
                continue
            if not literally:
                return True
            assert rule.network is not None
            if address.is_unspecified or address.is_multicast:
                continue
            if rule.network.num_addresses == 1:
                if rule.port is not None or not is_only_here(address):
                    return True
            elif rule.network.is_private and not is_only_here(address):
                return True
        return False


def is_only_here(address: Address) -> bool:
    """Whether it is of this host, or of the wire that it hangs on: metadata services are."""
    address = embedded(address)
    if address.is_loopback or address.is_link_local or address.is_unspecified:
        return True
    return address.is_multicast or is_own(address)
