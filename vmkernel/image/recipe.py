"""What a guest is made of: a recipe, read from a small TOML file.

Recipes of the project lie in ``images/`` and are named by their file, and so are the user's in
``~/.config/vmkernel/recipes``; any other is named by its path. `image.builder` makes an image of a
recipe, the image's manifest keeps the recipe, and `vm.template` reads preloads and memory from
there. Floor 2.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from vmkernel.errors import ImageError
from vmkernel.resources import resource_dir
from vmkernel.settings import default_dir
from vmkernel.values import parse_size, recipe_name

Engine = Literal["python", "relay"]

# Debian policy 5.6.1. mmdebstrap would take more (apt patterns, paths of .deb files): a recipe
# that names a package by its name can be locked and repeated.
DebianPackage = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]
# A requirement (PEP 508) and no option of pip's: "-r", "--index-url" and such belong to pip's own
# configuration, not into a file that may come from somebody else.
Requirement = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][^\r\n]*$")]
ModuleName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
# Below site-packages, no way out of it.
PrunePattern = Annotated[str, msgspec.Meta(pattern=r"^(?!.*\.\.)[A-Za-z0-9_][\w./*?-]*$")]

# What `wake_code` may have filled in (vmkernel.guest.relay), and what looks like it. A shell's
# ${env} does not.
_PLACEHOLDERS = {"{seed}", "{entropy}", "{cwd:json}", "{cwd:sh}", "{env:json}", "{env:string}",
                 "{env:sh}"}  # fmt: skip
_LIKE_PLACEHOLDER = re.compile(r"(?<!\$)\{(?:seed|entropy|cwd|env)(?::\w*)?\}")

# What every guest needs for the agent and either engine (vmkernel.guest) to run in it.
_ALWAYS_REQUIRED = ("msgspec", "pyzmq")


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the recipe's file: a key that nobody knows is an error, not a wish unheard."""


class Language(_Strict, frozen=True, kw_only=True):
    """How a front end shows the kernel, also before the kernel itself can tell.

    Apart from *display_name*, as in ``language_info`` of a ``kernel_info_reply``; *name* is also
    the kernelspec's ``language``.
    """

    name: str = "python"
    display_name: str = "Python (microVM)"
    mimetype: str = "text/plain"
    file_extension: str = ".txt"
    pygments_lexer: str = ""
    codemirror_mode: str = ""


class Debian(_Strict, frozen=True, kw_only=True):
    """Packages of the distribution, besides those that every image has."""

    packages: tuple[DebianPackage, ...] = ()


class Python(_Strict, frozen=True, kw_only=True):
    """Python distributions, installed by pip from wheels."""

    requirements: tuple[Requirement, ...] = ()
    constraints: tuple[Requirement, ...] = ()
    """Which versions may be taken of what is required by others, as pip's ``-c``."""
    hashes: dict[str, tuple[str, ...]] = {}
    """By a distribution's name (as PEP 503 spells it): those of its files that may be taken."""
    prune: tuple[PrunePattern, ...] = ()
    """Glob patterns below the directory of installed packages: what is left out of the image."""


class Recipe(_Strict, frozen=True, kw_only=True):
    """One recipe."""

    name: str
    description: str = ""
    engine: Engine = "python"
    """``python``: IPython in the guest's own process. ``relay``: *argv*, an unmodified kernel."""
    argv: tuple[str, ...] = ()
    """Only for ``relay``: the kernel's command, with ``{connection_file}`` in it."""
    env: dict[str, str] = {}
    """Only for ``relay``: variables that the kernel gets besides those of the guest."""
    transport: Literal["ipc", "tcp"] = "ipc"
    """Only for ``relay``: ``tcp``, on the guest's loopback, for a kernel without ``ipc``."""
    interrupt_mode: Literal["signal", "message"] = "signal"
    """Only for ``relay``: how the kernel wants to be interrupted, as in its own kernelspec."""
    wake_code: str = ""
    """Only for ``relay``: what makes a kernel that ran in the memory template differ from its
    twins, in the kernel's language; run silently in each clone, before any request is served. It
    must succeed. Placeholders, which are replaced by values made for each clone:

    * ``{seed}``: a random number from 0 to 2³¹ − 1;
    * ``{entropy}``: 512 random bits, as hexadecimal digits;
    * ``{cwd:json}``, ``{cwd:sh}``: the working directory, quoted: as JSON, or for a shell;
    * ``{env:json}``: variables of the environment, as a JSON object; ``{env:string}``: that
      object's text, quoted as JSON once more; ``{env:sh}``: quoted words ``NAME=value`` for a
      shell (none: nothing).

    A recipe without it is not kept warm: its kernel is started in each clone, which takes the
    time that it takes, and starts with the right directory and environment."""
    preload: tuple[ModuleName, ...] = ()
    """Modules imported in the memory template: free for every kernel after."""
    memory: int | None = None
    """MiB that a VM of this image gets when no setting says otherwise."""
    language: Language = Language()
    debian: Debian = Debian()
    python: Python = Python()

    def requirements(self) -> tuple[str, ...]:
        """What pip is to install: the recipe's requirements and what every guest needs."""
        named = {distribution_name(text) for text in self.python.requirements}
        return self.python.requirements + tuple(n for n in _ALWAYS_REQUIRED if n not in named)

    def has_content_of(self, other: Recipe) -> bool:
        """Whether an image of *other* is one of this recipe, too: the same files are in both."""
        return (
            self.requirements() == other.requirements()
            and self.python.constraints == other.python.constraints
            and self.python.hashes == other.python.hashes
            and self.python.prune == other.python.prune
            and self.debian == other.debian
            and set(self.preload) <= set(other.preload)  # which were found there
        )


def distribution_name(requirement: str) -> str:
    """The normalised name (PEP 503) that a requirement such as ``"Foo_Bar[x]>=1"`` begins with."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    return re.sub(r"[-_.]+", "-", match[0] if match else requirement).lower()


def recipe_names() -> list[str]:
    """The names of the project's own recipes, sorted."""
    return sorted(path.stem for path in resource_dir("images").glob("*.toml"))


def user_recipes_dir() -> Path:
    """Where the user's recipes lie: ``NAME.toml``, and the lock of each beside it."""
    return default_dir("config_dir", os.environ) / "recipes"


def user_recipe_names() -> list[str]:
    """The names of the user's recipes, sorted; those that hide none of the project's."""
    names = {path.stem for path in user_recipes_dir().glob("*.toml")}
    return sorted(names - set(recipe_names()))


def recipe_path(name_or_path: str | Path) -> Path:
    """The file of a recipe.

    Raises:
        ImageError: no recipe has this name.
    """
    text = str(name_or_path)
    if is_recipe_path(text):
        return Path(text).expanduser()
    # The name came from a person: "../x" is no name, so it cannot leave the directory.
    if text in recipe_names():
        return resource_dir("images") / f"{text}.toml"
    if text in user_recipe_names():
        return user_recipes_dir() / f"{text}.toml"
    raise ImageError(
        f"There is no recipe {text!r}.",
        hint=f"the recipes are: {', '.join([*recipe_names(), *user_recipe_names()])}; "
        "for one of your own give its file: ./NAME.toml",
    )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of this name, the project's or the user's, or in the TOML file at this path.

    Text with a ``/`` in it, or ending in ``.toml``, is a path.

    Raises:
        ImageError: there is no such recipe, or its file has a mistake; names file and key.
    """
    text = str(name_or_path)
    path = recipe_path(text)
    recipe = _read(path)
    if not is_recipe_path(text) and recipe.name != text:
        raise _mistake(path, f"the name is {recipe.name!r}, not that of its file")
    return recipe


def is_recipe_path(text: str) -> bool:
    """Whether *text* means a recipe's file, not its name."""
    return "/" in text or text.endswith(".toml")


def _read(path: Path) -> Recipe:
    import tomllib  # the kernel's start path imports this module, and never reads TOML by it

    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(
            f"The recipe {path} cannot be read: {error}",
            hint="give the path of a readable text file (UTF-8)",
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise _mistake(path, f"it is not valid TOML: {error}") from error
    try:
        if "memory" in content:
            content["memory"] = parse_size(content["memory"])
    except ValueError as error:
        raise _mistake(path, f"`memory` is {content['memory']!r}: {error}") from error
    try:
        recipe = msgspec.convert(content, Recipe)
    except msgspec.ValidationError as error:
        raise _mistake(path, _in_words(str(error))) from error
    check_recipe(recipe, path)
    return recipe


def check_recipe(recipe: Recipe, path: Path) -> None:
    """See that a recipe, which *path* has, is sound in all that no type says.

    Raises:
        ImageError: it is not; names file and key.
    """
    try:
        recipe_name(recipe.name)
    except ValueError as error:
        raise _mistake(
            path,
            f"`name` is {recipe.name!r}; allowed are lower-case letters, digits, '.', '_', '-'",
        ) from error
    if recipe.memory is not None and not 64 <= recipe.memory <= 1024**2:
        raise _mistake(path, f"`memory` is {recipe.memory} MiB; allowed are 64M to 1T")
    _check_requirements(recipe, path)
    if recipe.engine == "relay" and not any("{connection_file}" in word for word in recipe.argv):
        raise _mistake(path, '`engine = "relay"` needs `argv` with "{connection_file}" in it')
    for found in _LIKE_PLACEHOLDER.findall(recipe.wake_code):
        if found not in _PLACEHOLDERS:
            known = ", ".join(sorted(_PLACEHOLDERS))
            raise _mistake(path, f"`wake_code` has {found} in it; there are {known}")
    if recipe.engine == "relay" and recipe.preload:
        raise _mistake(path, '`preload` is only for `engine = "python"`')
    if recipe.engine == "python":
        for key in ("argv", "env", "transport", "interrupt_mode", "wake_code"):
            if getattr(recipe, key) != getattr(_PLAIN, key):
                raise _mistake(path, f'`{key}` is only for `engine = "relay"`')
        named = {distribution_name(text) for text in recipe.python.requirements}
        if "ipykernel" not in named:
            raise _mistake(path, "`python.requirements` lacks ipykernel, the engine's base")


def _check_requirements(recipe: Recipe, path: Path) -> None:
    from packaging.requirements import InvalidRequirement, Requirement

    from vmkernel.image.additions import unfit, without_password

    for text in (*recipe.python.requirements, *recipe.python.constraints):
        try:
            why = unfit(Requirement(text), text)
        except InvalidRequirement as error:
            why = "no requirement (PEP 508): " + " ".join(str(error).partition("\n")[0].split())
        if why:
            raise _mistake(path, f"`python` has {without_password(text)!r}: {why}")
    for name, hashes in recipe.python.hashes.items():
        for found in hashes:
            if not re.fullmatch(r"sha256:[0-9a-f]{64}", found) or distribution_name(name) != name:
                raise _mistake(path, f"`python.hashes` has {name} = {found!r}, not sha256:…")


_PLAIN = Recipe(name="plain")


def _in_words(error: str) -> str:
    # msgspec: "Object contains unknown field `x` - at `$.python`"
    unknown = re.fullmatch(r"Object contains unknown field `(.+?)`(?: - at `\$\.?(.*)`)?", error)
    if unknown:
        table = f"{unknown[2]}." if unknown[2] else ""
        return f"there is no key `{table}{unknown[1]}`"
    return error.replace("`$.", "`").replace("Object missing required field", "it lacks the key")


def _mistake(path: Path, what: str) -> ImageError:
    return ImageError(
        f"The recipe {path} has a mistake: {what}.",
        hint="correct the file; images/datascience.toml is an example of every part",
    )
