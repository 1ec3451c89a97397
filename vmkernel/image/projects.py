"""Requirements out of a ``pyproject.toml`` (PEP 621, PEP 735) or conda's ``environment.yml``.

conda's packages are not those of a Python index: names that are the same, or well known, are taken
over; those that can be none are named. Floor 2, under `image.additions`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from vmkernel.errors import ImageError
from vmkernel.image.additions import (
    Added,
    as_table,
    python_fits,
    read_text,
    refused,
    without_password,
)
from vmkernel.image.recipe import distribution_name


def read_pyproject(path: Path, extras: list[str], added: Added, python: str) -> None:
    """The project's dependencies; *extras* are optional ones, or groups, by name.

    Raises:
        ImageError: see `additions.read`.
    """
    import tomllib

    try:
        content = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # of which TOMLDecodeError is one
        raise ImageError(f"{path} is not valid TOML: {error}", hint="correct the file") from error
    groups = as_table(content.get("dependency-groups", {}), f"{path}: dependency-groups")
    if "project" not in content and not (extras and groups):
        how = "" if "poetry" not in as_table(content.get("tool", {}), f"{path}: tool") else (
            ": this is Poetry's own format (`poetry export` writes a requirements.txt)"
        )  # fmt: skip
        raise ImageError(
            f"{path} has no table [project]{how}",
            hint="PEP 621 says what stands in it: dependencies = [ … ]",
        )
    project = as_table(content.get("project", {}), f"{path}: project")
    dynamic = project.get("dynamic", [])
    if isinstance(dynamic, list) and "dependencies" in dynamic:
        raise ImageError(
            f"{path}: its dependencies are dynamic: only building the project would tell them",
            hint="write them into a requirements.txt",
        )
    if spec := project.get("requires-python"):
        python_fits(str(spec), python, str(path), added)
    optional = {
        distribution_name(name): items
        for name, items in as_table(project.get("optional-dependencies", {}), str(path)).items()
    }
    named = {distribution_name(name): items for name, items in groups.items()}
    own = distribution_name(str(project.get("name", "-")))
    seen: set[str] = set()

    def take(items: Any, where: str) -> None:
        if not isinstance(items, list):
            raise ImageError(f"{path}: {where} is no list", hint="correct the file")
        for item in items:
            if isinstance(item, dict) and isinstance(item.get("include-group"), str):
                take_extra(item["include-group"])
                continue
            if not isinstance(item, str):
                shown = without_password(f"{item!r:.200}")
                raise ImageError(f"{path}: {where} has {shown}", hint="correct the file")
            try:
                requirement = Requirement(item)
            except InvalidRequirement:
                requirement = None  # told below
            if requirement is not None and distribution_name(requirement.name) == own:
                for extra in sorted(requirement.extras):
                    take_extra(extra)
            else:
                added.require(item, f"{path} ({where})")

    def take_extra(name: str) -> None:
        key = distribution_name(name)
        if key in seen:
            return
        seen.add(key)
        if key in optional:
            take(optional[key], f"optional-dependencies.{name}")
        elif key in named:
            take(named[key], f"dependency-groups.{name}")
        else:
            there = ", ".join(sorted([*optional, *named])) or "none"
            raise ImageError(
                f"{path} has no extra and no group {name!r}", hint=f"there are: {there}"
            )

    take(project.get("dependencies", []), "dependencies")
    for extra in extras:
        take_extra(extra)


# What conda-forge calls otherwise than a Python index.
_OTHER_NAMES = {
    "pytorch": "torch", "pytorch-cpu": "torch", "matplotlib-base": "matplotlib",
    "opencv": "opencv-python-headless", "py-opencv": "opencv-python-headless",
    "pytables": "tables", "msgpack-python": "msgpack", "python-graphviz": "graphviz",
    "seaborn-base": "seaborn", "dask-core": "dask", "ipython-base": "ipython",
    "py-xgboost": "xgboost", "py-xgboost-cpu": "xgboost",
    "tensorflow-base": "tensorflow", "pyarrow-core": "pyarrow", "fonts-anaconda": "",
    "python-kaleido": "kaleido", "brotli-python": "brotli", "pysocks": "PySocks",
}  # fmt: skip
_NO_PYTHON = frozenset(
    "anaconda bzip2 ca-certificates cairo cmake compilers cpp-compiler cuda-nvcc cudatoolkit cudnn "
    "curl cxx-compiler c-compiler expat ffmpeg fontconfig fortran-compiler freetype gcc gdal-core "
    "git gmp graphviz gxx hdf5 icu intel-openmp java-jdk jpeg krb5 ld_impl_linux-64 llvm-openmp "
    "make mamba conda mkl nccl ncurses ninja-base nodejs nomkl openblas openjdk openmpi openssl "
    "pandoc perl pkg-config proj qt qt-main r r-base readline ruby rust sqlite tbb tk unixodbc "
    "wget xz yaml zeromq zlib zstd".split()
)
_NO_PYTHON_PREFIXES = ("lib", "r-", "_", "xorg-", "gcc_", "gxx_", "binutils", "cuda-", "font-ttf-")
_PYTHON_AFTER_ALL = frozenset("libcst librosa libclang liblinear-official libsass".split())
_NOT_NEEDED = frozenset("pip setuptools wheel python_abi nb_conda_kernels ipykernel-base".split())
_MATCH = re.compile(
    r"(?:(?P<channel>[\w./:-]+)::)?(?P<name>[A-Za-z0-9_][\w.-]*)\s*(?P<version>[^\[\]]*)"
)


def read_environment(path: Path, added: Added, python: str) -> None:
    """The dependencies of a conda environment, as requirements.

    Raises:
        ImageError: see `additions.read`; names what is no package of a Python index.
    """
    import yaml  # only who has such a file pays for the parser

    try:
        text = read_text(path)
        # Lists of lists of one list are small in the file only
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("aliases (*name) are not understood here")
        content = yaml.safe_load(text)
    except (ValueError, RecursionError) as error:  # of a date that is none, and such
        raise ImageError(f"{path} is not taken: {error}", hint="correct the file") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", "") or "it cannot be parsed"
        raise ImageError(
            f"{path}{line} is not valid YAML: {problem}", hint="correct the file"
        ) from error
    content = as_table(content, str(path))
    if not isinstance(content.get("dependencies"), list):
        raise ImageError(
            f"{path} has no list of `dependencies`", hint="is it a conda environment.yml?"
        )
    if content.get("channels"):
        added.note(f"{path}: channels are left out: wheels come from pip's index")
    if content.get("variables"):
        added.note(f"{path}: variables are left out: the setting `env_file` gives them to a guest")
    no_python = []
    for item in content["dependencies"]:
        if isinstance(item, dict) and set(item) == {"pip"} and isinstance(item["pip"], list):
            for text in item["pip"]:
                origin = f"{path} (pip)"
                if str(text).startswith("-"):
                    option = re.split(r"[\s=]", str(text), maxsplit=1)[0]
                    raise refused(origin, option, "a recipe has no options of pip's")
                added.require(str(text), origin)
        elif not isinstance(item, str):
            shown = without_password(f"{item!r:.200}")
            raise ImageError(f"{path}: {shown} is no dependency", hint="correct the file")
        elif not _take(item, path, added, python):
            no_python.append(item)
    if no_python:
        raise ImageError(
            f"{path}: not packages of a Python index, by their names: "
            f"{without_password(', '.join(no_python))}",
            hint="leave them out; libraries come with the wheels, and programs from Debian "
            "(--apt NAME). An environment.yml that was written by hand, or by "
            "`conda env export --from-history`, has few of them",
        )


def _take(item: str, path: Path, added: Added, python: str) -> bool:
    """Take one dependency over; whether it can be a Python package."""
    found = _MATCH.fullmatch(item.strip())
    if found is None:
        raise refused(f"{path}", item, "only NAME, NAME=VERSION and NAME>=VERSION are understood")
    name = found["name"].lower()
    spec = _specifier(found["version"].strip(), item, path, added)
    if found["channel"]:
        added.note(f"{path}: channels are left out: wheels come from pip's index")
    if name == "python":
        if spec:
            python_fits(spec, python, str(path), added)
        return True
    if name in _NOT_NEEDED:
        return True
    if (name in _NO_PYTHON or name.startswith(_NO_PYTHON_PREFIXES)) and (
        name not in _PYTHON_AFTER_ALL
    ):
        return False
    other = _OTHER_NAMES.get(name, name)
    if other != name:
        added.note(f"{path}: {name} is {other or 'left out'} here")
    if other:
        added.require(other + spec, f"{path} ({item})")
    return True


def _specifier(version: str, item: str, path: Path, added: Added) -> str:
    """conda's match specification as a version specifier (PEP 440)."""
    if not version or version == "*":
        return ""
    if "|" in version:
        raise refused(str(path), item, "a requirement knows no “or” (|) of versions")
    if version.count("=") == 2 and (parts := re.fullmatch(r"=([^=<>!~,]+)=([^=]+)", version)):
        added.note(f"{path}: builds ({parts[2]} and such) are left out: a wheel has none")
        version = f"=={parts[1]}"
    fuzzy = re.fullmatch(r"=?\s*([0-9][\w.!]*?)(\.?\*)?", version)
    if fuzzy:
        # "numpy=1.26" is 1.26 and all that begins with "1.26."; "numpy 1.26" is conda's, too
        exact = not version.startswith("=") and not fuzzy[2]
        return f"=={fuzzy[1]}" if exact else f"=={fuzzy[1]}.*"
    if version in ("=*", "==*"):
        return ""
    return re.sub(r"\s+", "", version)
