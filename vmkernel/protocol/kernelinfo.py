"""What a guest kernel may say of itself: the content of its ``kernel_info_reply``.

The template's maker keeps it, and every front end is served it from then on, long before there is a
VM.  Front ends and nbconvert act on it: links become a menu, ``file_extension`` the end of a file's
name on the host, ``nbconvert_exporter`` a module to import.  So it has a shape and a size, and what
no front end knows is left out.

Source: https://jupyter-client.readthedocs.io/en/stable/messaging.html, "Kernel info".
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from vmkernel.errors import ProtocolError

Word = Annotated[str, msgspec.Meta(max_length=256)]
Plain = Annotated[str, msgspec.Meta(pattern=r"^[\w .+#/*-]{0,128}\Z")]
Extension = Annotated[str, msgspec.Meta(pattern=r"^(\.[A-Za-z0-9_+-]{1,31})?\Z")]
Exporter = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{0,64}\Z")]
Url = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"^https?://")]


class CodeMirrorMode(msgspec.Struct, omit_defaults=True):
    """A mode of CodeMirror with its options."""

    name: Plain
    version: Annotated[int, msgspec.Meta(ge=0, le=1000)] | Plain | msgspec.UnsetType = msgspec.UNSET


class LanguageInfo(msgspec.Struct, omit_defaults=True):
    """The language of the kernel."""

    name: Plain
    version: Word = ""
    mimetype: Plain = ""
    file_extension: Extension = ""
    pygments_lexer: Plain | msgspec.UnsetType = msgspec.UNSET
    codemirror_mode: CodeMirrorMode | Plain | msgspec.UnsetType = msgspec.UNSET
    nbconvert_exporter: Exporter | msgspec.UnsetType = msgspec.UNSET


class HelpLink(msgspec.Struct):
    """An entry of the front end's menu "Help"."""

    text: Word
    url: Url


class KernelInfo(msgspec.Struct, omit_defaults=True):
    """What is kept of a kernel's answer."""

    language_info: LanguageInfo
    status: Plain = ""
    implementation: Plain = ""
    implementation_version: Word = ""
    protocol_version: Plain = ""
    banner: Annotated[str, msgspec.Meta(max_length=16384)] = ""
    help_links: Annotated[list[HelpLink], msgspec.Meta(max_length=64)] = []
    supported_features: Annotated[list[Plain], msgspec.Meta(max_length=64)] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    debugger: bool | msgspec.UnsetType = msgspec.UNSET


def checked(info: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a ``kernel_info``.  Raises ProtocolError when it is not of this shape."""
    try:
        known = msgspec.convert(info, KernelInfo)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ProtocolError(
            f"the guest kernel describes itself in a way that no front end understands: {error}",
            hint="the image's kernel is at fault: correct its recipe and build it again",
        ) from error
    kept: dict[str, Any] = msgspec.to_builtins(known)
    return kept
