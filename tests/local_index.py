"""A package index that a test makes itself: a directory as PEP 503 says, reached by file://."""

from __future__ import annotations

import hashlib
import html
import io
import tarfile
import zipfile
from pathlib import Path


class LocalIndex:
    """Packages by name; ``url`` is what pip is to be told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "simple"
        self.directory.mkdir(parents=True)
        self.url = self.directory.as_uri()
        self._yanked: dict[str, str] = {}

    def add(
        self,
        name: str,
        version: str,
        *,
        requires: tuple[str, ...] = (),
        code: str = "",
        tag: str = "py3-none-any",
        requires_python: str = "",
        files: dict[str, str] | None = None,
        yanked: str = "",
    ) -> Path:
        """A wheel that has the module of this name in it."""
        module = name.replace("-", "_")
        info = f"{module}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        metadata += "".join(f"Requires-Dist: {text}\n" for text in requires)
        if requires_python:
            metadata += f"Requires-Python: {requires_python}\n"
        contents = {
            f"{module}.py": code or f"version = {version!r}\n",
            **(files or {}),
            f"{info}/METADATA": metadata,
            f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
            f"Tag: {tag}\n",
        }
        contents[f"{info}/RECORD"] = "".join(
            f"{path},,\n" for path in [*contents, f"{info}/RECORD"]
        )
        wheel = self._place(name) / f"{module}-{version}-{tag}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in contents.items():
                # One time for all: a wheel that is made again is the same
                archive.writestr(zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0)), text)
        self._yanked[wheel.name] = yanked
        self._list(name, requires_python)
        return wheel

    def add_source(self, name: str, version: str, setup: str) -> Path:
        """A source distribution, whose ``setup.py`` must never run."""
        path = self._place(name) / f"{name}-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for file, text in {
                "setup.py": setup,
                "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            }.items():
                entry = tarfile.TarInfo(f"{name}-{version}/{file}")
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
        self._list(name, "")
        return path

    def _place(self, name: str) -> Path:
        directory = self.directory / name.lower().replace("_", "-")
        directory.mkdir(exist_ok=True)
        return directory

    def _list(self, name: str, requires_python: str) -> None:
        place = self._place(name)
        needs = requires_python.replace("<", "&lt;").replace(">", "&gt;")
        attribute = f' data-requires-python="{needs}"' if needs else ""
        reasons = {
            file: f' data-yanked="{html.escape(reason)}"'
            for file, reason in self._yanked.items()
            if reason
        }
        links = [
            f'<a href="{path.name}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"'
            f"{attribute}{reasons.get(path.name, '')}>{path.name}</a><br>"
            for path in sorted(place.iterdir())
            if path.name != "index.html"
        ]
        page = "<!DOCTYPE html><html><body>" + "\n".join(links) + "</body></html>"
        (place / "index.html").write_text(page)
