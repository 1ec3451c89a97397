"""A recipe of the user's own: another one, and what he adds to it; kept as a file of his.

``~/.config/vmkernel/recipes/NAME.toml`` is such a recipe and ``NAME.lock`` its versions; both are
written only when the image is there. They are text, and his to edit, to copy and to put under
version control. Floor 2, under ``vmkernel image build --add``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from vmkernel.errors import ImageError
from vmkernel.image.additions import Added
from vmkernel.image.recipe import Recipe, recipe_names, user_recipes_dir
from vmkernel.values import recipe_name

_HEAD = """\
# Written by `vmkernel image build --name {name}`, and yours to edit; the lock beside it has the
# versions. `vmkernel image build {name}` builds it again, `--update` with newer versions.
"""


def derive(
    base: Recipe,
    name: str,
    added: Added,
    *,
    debian: Sequence[str] = (),
    preload: Sequence[str] = (),
) -> Recipe:
    """*base* with the additions, under another name.

    Raises:
        ImageError: the name, or an addition, is not allowed.
    """
    try:
        recipe_name(name)
    except ValueError as error:
        raise ImageError(
            f"{name!r} cannot be a recipe's name",
            hint="use small letters, digits, '.', '_' and '-', a letter or digit first",
        ) from error
    if name in recipe_names():
        raise ImageError(
            f"{name!r} is a recipe of vmkernel's own", hint="choose another name (--name)"
        )
    if preload and base.engine != "python":
        raise ImageError(
            f"--preload is for Python, and {base.name!r} has another kernel", hint="leave it out"
        )
    python = base.python
    language = base.language
    hashes = {key: (*python.hashes.get(key, ()), *found) for key, found in added.hashes.items()}
    recipe = msgspec.structs.replace(
        base,
        name=name,
        description=_describe(base, added, debian),
        preload=_joined(base.preload, preload),
        language=msgspec.structs.replace(
            language, display_name=_display_name(language.display_name, base.name, name)
        ),
        debian=msgspec.structs.replace(base.debian, packages=_joined(base.debian.packages, debian)),
        python=msgspec.structs.replace(
            python,
            requirements=_joined(python.requirements, added.requirements),
            constraints=_joined(python.constraints, added.constraints),
            hashes={**python.hashes, **hashes},
        ),
    )
    try:  # the names of packages and modules have a form
        return msgspec.convert(msgspec.to_builtins(recipe), Recipe)
    except msgspec.ValidationError as error:
        raise ImageError(
            f"an addition is not allowed: {error}",
            hint="--apt takes the name of a Debian package, --preload that of a module",
        ) from error


def _joined(first: Sequence[str], second: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*first, *second]))


def _describe(base: Recipe, added: Added, debian: Sequence[str]) -> str:
    names = [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in added.requirements]
    names += debian
    said = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{base.name} with {said or 'nothing more'}"


def _display_name(shown: str, base: str, name: str) -> str:
    """``Python (microVM)`` becomes ``Python (microVM, mine)``."""
    stem = re.sub(rf",\s*{re.escape(base)}\)$", ")", shown)
    return re.sub(r"\)$", f", {name})", stem) if stem.endswith(")") else f"{stem} ({name})"


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as the text of a file that `load_recipe` reads back the same."""
    values = msgspec.to_builtins(recipe)
    if recipe.memory is not None:
        values["memory"] = f"{recipe.memory}M"
    defaults = msgspec.to_builtins(Recipe(name=""))
    plain, tables = [], []
    for key, value in values.items():
        if value == defaults.get(key):
            continue
        if isinstance(value, dict):
            tables += _table(key, value, defaults.get(key, {}))
        else:
            plain.append(f"{key} = {_toml(value)}")
    return "\n".join([*plain, *tables]) + "\n"


def _table(name: str, values: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    plain = [
        f"{_key(key)} = {_toml(value)}"
        for key, value in values.items()
        if not isinstance(value, dict) and value != defaults.get(key)
    ]
    nested = [
        line
        for key, value in values.items()
        if isinstance(value, dict) and value
        for line in _table(f"{name}.{_key(key)}", value, {})
    ]
    return ["", f"[{name}]", *plain, *nested] if plain else nested


def _key(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else _toml(text)


def _toml(value: Any) -> str:
    if isinstance(value, str):
        # TOML's basic strings are JSON's, but for a character (DEL) that must be escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        items = [_toml(item) for item in value]
        if sum(map(len, items)) < 70:
            return f"[{', '.join(items)}]"
        return "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    return json.dumps(value)


def save(recipe: Recipe, lock: str) -> Path:
    """Keep the recipe and its lock among the user's; one that was there becomes ``NAME.toml~``.

    Raises:
        ImageError: it cannot be written.
    """
    path = user_recipes_dir() / f"{recipe.name}.toml"
    text = _HEAD.format(name=recipe.name) + recipe_toml(recipe)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() != text.encode():
                path.replace(path.with_suffix(".toml~"))
        write_beside(path, text)
        write_beside(path.with_suffix(".lock"), lock)
    except OSError as error:
        raise ImageError(
            f"The recipe cannot be kept in {path}: {error.strerror or error}",
            hint="make that directory writable; the image is there, and has the recipe in it",
        ) from error
    return path


def write_beside(path: Path, text: str) -> None:
    """Write a file in one step.  Raises OSError."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
