"""What the wrapper answers by itself, without asking the guest.

``kernel_info`` always (a front end connects at once, while the VM is still on its way), the
connection's data, and modest answers to what an editor asks while there is no guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmkernel import __version__
from vmkernel.errors import VmError
from vmkernel.protocol.messages import PROTOCOL_VERSION
from vmkernel.text import plain_text

if TYPE_CHECKING:
    from vmkernel.image.store import Manifest

HELP_LINKS = [
    {"text": "Python Reference", "url": "https://docs.python.org/3"},
    {"text": "IPython Reference", "url": "https://ipython.readthedocs.io/en/stable/"},
]

# Answers to requests that cannot wait for a VM: an empty one is better than a stuck editor.
WITHOUT_GUEST: dict[str, dict[str, Any]] = {
    "history_request": {"status": "ok", "history": []},
    "complete_request": {
        "status": "ok", "matches": [], "cursor_start": 0, "cursor_end": 0, "metadata": {},
    },
    "inspect_request": {"status": "ok", "found": False, "data": {}, "metadata": {}},
    "is_complete_request": {"status": "unknown"},
    "comm_info_request": {"status": "ok", "comms": {}},
}  # fmt: skip


def without_guest(msg_type: str, content: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request of a type in WITHOUT_GUEST."""
    reply = dict(WITHOUT_GUEST[msg_type])
    if msg_type == "complete_request":
        reply["cursor_start"] = reply["cursor_end"] = content.get("cursor_pos", 0)
    return reply


def kernel_info(
    guest_info: dict[str, Any] | None, manifest: Manifest | None, facts: str
) -> dict[str, Any]:
    """The content of a ``kernel_info_reply``.

    ``guest_info`` is what the guest kernel said when the template was saved, None before the
    first one was built; ``manifest`` is the image's, None when there is no image; ``facts`` is one
    line about this kernel's VM.
    """
    info = guest_info or _expected_info(manifest)
    language = info.get("language_info")
    name = language.get("name", "") if isinstance(language, dict) else ""
    banner = plain_text(str(info.get("banner") or name)).rstrip()  # consoles print it
    return {
        **info,
        "protocol_version": PROTOCOL_VERSION,
        "banner": f"{banner}\nvmkernel {__version__}: every cell runs in a microVM. {facts}\n",
        "supported_features": info.get("supported_features", []),
    }


def _expected_info(manifest: Manifest | None) -> dict[str, Any]:
    """What the guest kernel will say, as far as its image tells."""
    info = {
        "status": "ok",
        "implementation": "vmsandbox",
        "implementation_version": __version__,
    }
    if manifest is not None and manifest.recipe.language.name != "python":
        language = manifest.recipe.language
        known = {
            "name": language.name,
            "version": "",
            "mimetype": language.mimetype,
            "file_extension": language.file_extension,
            "pygments_lexer": language.pygments_lexer,
            "codemirror_mode": language.codemirror_mode,
        }
        required = ("name", "version", "mimetype", "file_extension")
        said = {key: value for key, value in known.items() if value or key in required}
        return {**info, "language_info": said, "help_links": []}
    python = manifest.python_version if manifest is not None else ""
    return {
        **info,
        "banner": f"Python {python}",
        "language_info": {
            "name": "python",
            "version": python,
            "mimetype": "text/x-python",
            "codemirror_mode": {"name": "ipython", "version": 3},
            "pygments_lexer": "ipython3",
            "nbconvert_exporter": "python",
            "file_extension": ".py",
        },
        "help_links": HELP_LINKS,
        "supported_features": ["kernel subshells", "debugger"],
    }


def error_content(name: str, value: str, lines: list[str]) -> dict[str, Any]:
    """The content of an ``error`` message; ``lines`` become its traceback."""
    return {"ename": name, "evalue": value, "traceback": lines}


def unknown_subshell(subshell_id: str) -> dict[str, Any]:
    """The reply to a request for a subshell that is not there (or not any more)."""
    reason = f"Unknown subshell_id {subshell_id!r}"
    return {**error_content("UnknownSubshellError", reason, []), "status": "error"}


def explain(error: VmError) -> dict[str, Any]:
    """A VmError as the content of an ``error`` message.

    It may quote what a guest said (last words, its console): a terminal is to obey none of that.
    """
    from vmkernel.text import plain_text

    message, hint = plain_text(error.message), plain_text(error.hint)
    lines = [f"\x1b[31m{type(error).__name__}\x1b[39m: {message}"]
    if hint:
        lines.append(f"\x1b[32mWhat to do:\x1b[39m {hint}")
    if error.log_path:
        lines.append(f"Log: {error.log_path}")
    return error_content(type(error).__name__, message, lines)


def interrupted(*, sent: bool = False) -> dict[str, Any]:
    """The error of a cell that was interrupted before it reached a guest, or at its very edge."""
    reason = "interrupted while waiting for a VM; the cell did not run"
    if sent:
        reason = "interrupted as the cell began or ended; it may have run"
    line = f"\x1b[31mKeyboardInterrupt\x1b[39m: {reason}"
    return error_content("KeyboardInterrupt", reason, [line])
