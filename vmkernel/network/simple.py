"""Pages of package indexes: read (HTML of PEP 503, JSON of PEP 691), and made anew for the guest.

A page is never rewritten: what it names is taken out of it, typed and bounded, and another one is
made of that.
"""

from __future__ import annotations

import html
import re
import urllib.parse
from html.parser import HTMLParser
from typing import Any

import msgspec

JSON_TYPE = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON_TYPE}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
MOST_FILES = 200_000
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!~-]{0,254}\Z")
_SUFFIXES = (".whl", ".tar.gz", ".zip", ".tar.bz2", ".tar.xz", ".tgz", ".egg")
_HASHES = frozenset(("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "blake2b_256"))
_DIGEST = re.compile(r"[0-9A-Fa-f]{1,128}\Z")


class File(msgspec.Struct, rename="kebab", omit_defaults=True):
    """One file of a project, as JSON has it."""

    filename: str
    url: str
    hashes: dict[str, str] = {}
    requires_python: str | None = None
    core_metadata: bool | dict[str, str] = False
    dist_info_metadata: bool | dict[str, str] = False
    yanked: bool | str = False
    size: int | None = None
    upload_time: str | None = None


class _Page(msgspec.Struct):
    files: list[File]


class _Made(msgspec.Struct, omit_defaults=True):
    name: str
    files: list[dict[str, Any]]
    meta: dict[str, str] = {}


class PageError(Exception):
    """This is no page of an index."""


def project_name(text: str) -> str:
    """Normal form of a project's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", text).lower()


def is_file_name(text: str) -> bool:
    """Whether it is the name of a wheel or a source archive."""
    return bool(_FILE.match(text)) and text.endswith(_SUFFIXES)


def read_page(body: bytes, content_type: str, base: str) -> list[File]:
    """The files that a page at the URL ``base`` names, their URLs absolute.  Raises PageError."""
    if "json" in content_type:
        try:
            files = msgspec.json.decode(body, type=_Page).files
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PageError(f"a page that is none: {error}") from None
    else:
        parser = _Links()
        try:
            parser.feed(body.decode("utf-8", "replace"))
            parser.close()
        except (ValueError, AssertionError, RecursionError) as error:
            raise PageError(f"a page that is none: {error}") from None
        base = urllib.parse.urljoin(base, parser.base)
        files = parser.files
    found = []
    for file in files[:MOST_FILES]:
        try:
            file.url = urllib.parse.urljoin(base, file.url)
        except ValueError:
            continue
        if is_file_name(file.filename):
            file.hashes = _checked(file.hashes)
            found.append(file)
    return found


class _Links(HTMLParser):
    """The anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.files: list[File] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One that begins."""
        values = {name: value or "" for name, value in attrs}
        if tag == "base" and not self.base:
            self.base = values.get("href", "")
        if tag != "a" or not values.get("href") or len(self.files) >= MOST_FILES:
            return
        url, fragment = urllib.parse.urldefrag(values["href"])
        path = urllib.parse.urlsplit(url).path
        kind, _, digest = fragment.partition("&")[0].partition("=")
        self.files.append(
            File(
                filename=urllib.parse.unquote(path.rpartition("/")[2]),
                url=url,
                hashes={kind: digest} if digest else {},
                requires_python=values.get("data-requires-python") or None,
                core_metadata=_metadata(
                    values.get("data-core-metadata", values.get("data-dist-info-metadata", ""))
                ),
                yanked=(values["data-yanked"] or True) if "data-yanked" in values else False,
            )
        )


def _metadata(text: str) -> bool | dict[str, str]:
    kind, _, digest = text.partition("=")
    return {kind: digest} if digest else text.lower() == "true"


def _checked(hashes: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in hashes.items() if k in _HASHES and _DIGEST.match(v)}


def make_json(name: str, files: list[File]) -> bytes:
    """A page in JSON."""
    entries = []
    for file in files:
        entry = msgspec.to_builtins(file)
        entry.setdefault("hashes", {})
        entries.append(entry)
    return msgspec.json.encode(_Made(name, entries, {"api-version": "1.0"}))


def make_html(name: str, files: list[File]) -> bytes:
    """A page in HTML."""
    lines = ["<!DOCTYPE html><html><head>",
             '<meta name="pypi:repository-version" content="1.0"></head><body>']  # fmt: skip
    for file in files:
        kind = "sha256" if "sha256" in file.hashes else next(iter(file.hashes), "")
        url = f"{file.url}#{kind}={file.hashes[kind]}" if kind else file.url
        more = ""
        if file.requires_python:
            more += f' data-requires-python="{html.escape(file.requires_python)}"'
        if file.core_metadata:
            told = file.core_metadata
            text = "true" if told is True else "=".join(next(iter(told.items()), ("", "")))
            more += f' data-core-metadata="{html.escape(text)}"'
        if file.yanked is not False:
            reason = file.yanked if isinstance(file.yanked, str) else ""
            more += f' data-yanked="{html.escape(reason)}"'
        lines.append(f'<a href="{html.escape(url)}"{more}>{html.escape(file.filename)}</a><br>')
    lines.append("</body></html>")
    return "\n".join(lines).encode()
