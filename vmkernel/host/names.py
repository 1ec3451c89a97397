"""What a VM may be called: its name, and whose and what for it is.

These words are shown in tables and logs, and a name is looked up where an id may stand as well.
Floor 4, under ``host.manager``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vmkernel.errors import SettingsError

MOST = {"name": 64, "tenant_id": 256, "task_id": 256}
"""The words that a VM may be given, and how many characters each may have."""
_LIKE_AN_ID = re.compile(r"vm-[0-9a-f]*")


def check_words(words: Mapping[str, object]) -> None:
    """Raise SettingsError for a word that may not be given to a VM; "" always may."""
    for what, word in words.items():
        if not isinstance(word, str):
            problem = f"it is no text but {type(word).__name__}"
        elif len(word) > MOST[what]:
            problem = f"it has {len(word)} characters, and {MOST[what]} are allowed"
        elif not word.isprintable():  # control characters, other line ends, halves of a character
            problem = "it has characters that cannot be shown"
        elif what == "name" and _LIKE_AN_ID.fullmatch(word):
            problem = "it looks like the id of another VM"
        else:
            continue
        shown = ascii(word) if len(ascii(word)) <= MOST[what] else f"{word!a:.40}…"
        raise SettingsError(
            f"{shown} cannot be a VM's {what}: {problem}",
            hint="choose another, or see which VMs there are: `vmkernel ps -a`",
        )
