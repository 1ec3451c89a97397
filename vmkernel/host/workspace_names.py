"""What of a workspace a guest does not see, and what it may not write: by name, at any depth.

*Hidden* is what opens doors: keys, tokens, passwords.  *Protected* is what a program of the host's
obeys when it finds it where it works: a version control system's hooks, an editor's tasks, Python's
caches and start-up files, Jupyter's configuration.  Both are rules about names, not about files
that happen to be there: what is not there yet cannot be made either.

A repository's configuration often has a token in the URL of a remote, so it is hidden by its place:
git reads a repository without one as one with the defaults, and its history is there.

The names are compared as the most forgiving file system would: without case, without what is
invisible, without dots and blanks at their ends.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import NamedTuple

from vmkernel.host.private_names import is_trap

_HIDDEN = re.compile(
    rb"\.(ssh|gnupg|aws|azure|kube|docker|password-store|gcloud|vault-token|boto|s3cfg|pgpass"
    rb"|my\.cnf|npmrc|yarnrc(\.yml)?|pypirc|netrc|git-credentials|htpasswd|secrets?"
    rb"|env|env\..*|jupyter|vmkernel)"
    rb"|_netrc|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|.*\.(pem|key|p12|pfx|kdbx|keytab|ppk)"
    rb"|kernel-.*\.json|(jp|nb)server-.*|(jupyter|notebook)_cookie_secret"
    rb"|(application_default_)?credentials(\.json)?|.*\.gpg",
    re.DOTALL,
)
_PROTECTED = re.compile(
    rb"git~[0-9]+"  # .git, as MS-DOS would call it
    rb"|.*\.git"  # bare repositories, and their configuration would be seen if they were moved
    rb"|head"  # a directory with a file HEAD is a repository, and its config names programs
    rb"|desktop\.ini|autorun\.inf",
    re.DOTALL,
)
_REPOSITORY = re.compile(rb".*\.git|git~[0-9]+|\.(hg|svn|bzr)", re.DOTALL)
_CONFIGURATION = re.compile(
    rb"config(\.worktree)?|creds"  # git, git-annex
    rb"|hgrc(-not-shared)?|auth|branch\.conf"  # Mercurial, Subversion, Breezy
)
"""What holds URLs and passwords in a repository, at any depth: of submodules, too."""
_BRANCHES = (b"refs", b"logs")
"""Where git's own names end, and a branch may have any."""
_COPY = re.compile(rb"(~|\.bak|\.orig|\.old|\.lock|\.sw[op])+$")
"""What editors, programs and people add to the name of a copy."""
_OURS = re.compile(rb"\.fuse_hidden[0-9a-f]{8,32}")
"""How libfuse calls a file that was removed while it is open."""


class _Judgement(NamedTuple):
    hidden: bool
    protected: bool
    repository: bool
    """Whether a directory of this name is taken for a repository"""
    configuration: bool
    """Whether it is hidden in a repository"""


def is_hidden(name: bytes) -> bool:
    """Whether a guest is to see nothing of this name."""
    return _judge(name).hidden


def is_hidden_place(place: tuple[bytes, ...]) -> bool:
    """Whether a guest is to see nothing of this path, name by name."""
    repository = -1
    for depth, name in enumerate(place):
        found = _judge(name)
        if found.hidden:
            return True
        if found.configuration and repository >= 0 and place[repository + 1] not in _BRANCHES:
            return True
        if found.repository:
            repository = depth
    return False


def is_protected(name: bytes) -> bool:
    """Whether a guest may write nothing of this name; what is hidden is protected, too."""
    return _judge(name).protected


@functools.lru_cache(4096)
def _judge(name: bytes) -> _Judgement:
    if _OURS.fullmatch(name):
        return _Judgement(False, False, False, False)
    plain = _plain(name)
    original = _COPY.sub(b"", plain)
    hidden = _HIDDEN.fullmatch(original) is not None
    return _Judgement(
        hidden,
        hidden or is_trap(plain) or _PROTECTED.fullmatch(plain) is not None,
        _REPOSITORY.fullmatch(plain) is not None,
        _CONFIGURATION.fullmatch(original) is not None,
    )


def _plain(name: bytes) -> bytes:
    if name.isascii():
        text = name.decode().lower()
    else:
        text = unicodedata.normalize("NFKC", name.decode("utf-8", "surrogateescape")).casefold()
        text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    stripped = text.rstrip(". ").partition(":")[0]  # NTFS: `.git::$INDEX_ALLOCATION`
    return (stripped or text).encode("utf-8", "surrogateescape")
