"""What the owner of a VM and its proxy say to each other.

The orders lie in sealed memory that the proxy inherits (they may hold the index's password: no
command line, no environment).  News come back by a socket, a line of JSON each; the proxy meets
hostile input, so its owner decodes them strictly, and bounds how many it hears.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from vmkernel.network.pipconfig import PipConfig

MOST_LINE = 4096
ShortStr = Annotated[str, msgspec.Meta(max_length=1024)]


class Orders(msgspec.Struct):
    """What a proxy is to do."""

    mode: Literal["packages", "allow", "open"]
    allow: tuple[str, ...]
    marker: bytes
    pip: PipConfig
    environment: dict[str, str]
    """Variables by which this host reaches the outside itself: proxies, certificates"""
    deny: tuple[str, ...] = ()


class News(msgspec.Struct, forbid_unknown_fields=True):
    """Something that its owner is to know.

    ``closed``: the guest may not, by the settings; ``refused``: nor by any others; ``failed``: it
    may, and it did not work; ``broken``: the guest broke the multiplexer's rules, and has no
    network any more.
    """

    kind: Literal["closed", "refused", "failed", "broken"]
    where: ShortStr
    why: ShortStr
    left_out: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    """News before this that were too many to be told"""


encode = msgspec.json.encode
decode_orders = msgspec.json.Decoder(Orders).decode
decode_news = msgspec.json.Decoder(News).decode
