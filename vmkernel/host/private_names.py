"""Names that stay where they are: what no guest is given, and what no guest may bring.

Both lists are for copies that a notebook's code asks for (`%vm put`, `%vm get`), which is not
trusted.  They know names only; where the directories of vmkernel and Jupyter lie is the caller's.
"""

from __future__ import annotations

import re

_PRIVATE = re.compile(
    rb"\..*"  # .ssh, .aws, .netrc, .env, .config, …
    rb"|kernel-.*\.json|(jp|nb)server-.*|jupyter_cookie_secret|notebook_cookie_secret"
    rb"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|.*\.(pem|key|p12|pfx|kdbx|keytab|ppk|gpg)"
    rb"|credentials(\.json)?|application_default_credentials\.json",
    re.IGNORECASE | re.DOTALL,
)
# What a program of the host's obeys when it finds it in a directory that it works in.
_TRAP = re.compile(
    rb"\..*"  # .git with its hooks, .bashrc, .vscode, .jupyter, .ipynb_checkpoints, …
    rb"|__pycache__|.*\.(pth|pyc|pyo|desktop)|(site|user)customize(\.py)?"
    rb"|(jupyter|ipython|nb)[a-z_]*config\.(py|json)|kernel-.*\.json|jupyter_cookie_secret",
    re.IGNORECASE | re.DOTALL,
)


def is_private(name: bytes) -> bool:
    """Whether what has this name is not for a guest: secrets, and what leads to them."""
    return _PRIVATE.fullmatch(name) is not None


def is_trap(name: bytes) -> bool:
    """Whether a guest may not give this name to something on the host."""
    return _TRAP.fullmatch(name) is not None
