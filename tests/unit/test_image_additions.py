"""What people have in their files becomes requirements, or is refused with file and line."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmkernel.errors import ImageError
from vmkernel.image.additions import Added, read
from vmkernel.image.derive import derive, recipe_toml, save
from vmkernel.image.lock import answers, check_lock, make_lock
from vmkernel.image.pipwords import explain_failure, missing_requirement
from vmkernel.image.recipe import Python, Recipe, load_recipe, user_recipe_names
from vmkernel.image.reuse import find_donor, note_built
from vmkernel.image.store import FILES, FORMAT, FileRecord, Manifest
from vmkernel.settings import load_settings

SHA, OTHER = "sha256:" + 64 * "a", "sha256:" + 64 * "b"


def reading(path: Path, text: str, what: str = "") -> Added:
    path.write_text(text)
    added = Added()
    read(f"{path}{what}", added, "3.13")
    return added


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "requirements.txt"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return tmp_path / "pyproject.toml"


@pytest.fixture
def conda(tmp_path: Path) -> Path:
    return tmp_path / "environment.yml"


# --- requirements.txt ---


def test_requirements_with_all_that_people_write(file: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "base.in").write_text("six\n-c ../limits.txt\n")
    (tmp_path / "limits.txt").write_text("urllib3<3\n")
    added = reading(
        file,
        "\ufeff# mine\n\nnumpy>=2,<3  # numbers\n"
        "requests[socks] == 2.32.* ; python_version > '3.9'\n"
        "scipy \\\n   >=1.14 \\\n  # said between\n-r more/base.in\r\n--constraint=limits.txt\n"
        f"pinned==1.0 --hash={SHA} \\\n  --hash={OTHER}\n--prefer-binary\n"
        "wheel @ https://files.example/w-1-py3-none-any.whl\nlast",
    )
    assert list(added.requirements) == [
        "numpy>=2,<3", "requests[socks] == 2.32.* ; python_version > '3.9'",
        "scipy >=1.14", "six", "pinned==1.0",
        "wheel @ https://files.example/w-1-py3-none-any.whl", "last",
    ]  # fmt: skip
    assert added.requirements["numpy>=2,<3"] == f"{file} line 3"
    assert added.requirements["six"].endswith("base.in line 1")
    assert list(added.constraints) == ["urllib3<3"]
    assert added.hashes == {"pinned": [SHA, OTHER]}
    assert "--prefer-binary is left out" in added.notes[0]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("numpy=<2", "is no requirement (PEP 508)"),
        ("foo bar", "is no requirement (PEP 508)"),
        ("-e .", "has to be built"),
        ("--editable=git+https://h/x", "has to be built"),
        ("-i https://u:geheim@index.example/simple", "this host's configuration"),
        ("--extra-index-url=https://x", "this host's configuration"),
        ("--no-binary :all:", "nothing is compiled"),
        ("--pre", "name the version"),
        ("--unheard-of", "no options"),
        ("foo==1 --config-settings a=b", "'--config-settings' is refused"),
        (f"foo==1 --hash=md5:{'a' * 32}", "only sha256"),
        ("./local", "a path or URL"),
        ("../x/foo-1-py3-none-any.whl", "a path or URL"),
        ("/abs/foo.whl", "a path or URL"),
        ("https://u:geheim@h.example/foo-1-py3-none-any.whl", "a path or URL"),
        ("git+ssh://git@h.example/foo", "a path or URL"),
        ("foo @ git+https://h.example/foo", "a wheel (https://….whl) only"),
        ("foo @ https://h.example/foo-1.tar.gz", "a wheel (https://….whl) only"),
        ("foo @ file:///x/foo-1-py3-none-any.whl", "a wheel (https://….whl) only"),
        ("foo @ https://u:geheim@h.example/f.whl", "no place for a password"),
        ("foo==${VERSION}", "no variables"),
        ("-r requirements.txt", "does one include itself"),
        ("-r none.txt", "cannot be read: No such file"),
        ("-r https://h.example/r.txt", "fetched from elsewhere"),
    ],
)
def test_what_no_recipe_can_hold(file: Path, line: str, why: str) -> None:
    with pytest.raises(ImageError) as caught:
        reading(file, f"numpy\n{line}\n")
    assert why in caught.value.explain()
    if "include" not in why and "No such" not in why:
        assert f"{file} line 2: " in str(caught.value)
    assert "geheim" not in caught.value.explain()


def test_one_requirement_and_what_is_none(tmp_path: Path) -> None:
    added = Added()
    for what in ("scikit-learn>=1.5", "foo[bar,baz]", "a; python_version<'4'"):
        read(what, added, "3.13")
    assert list(added.requirements) == [
        "scikit-learn>=1.5",
        "foo[bar,baz]",
        "a; python_version<'4'",
    ]
    refused = {"no such": "PEP 508", "./x": "a path", "x.toml": "No such file"}
    refused |= {str(tmp_path / name): "No such file" for name in ("a.txt", "b.yml")}
    for what, why in refused.items():
        with pytest.raises(ImageError, match=why):
            read(what, added, "3.13")


@given(st.text(max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_file_is_read_or_refused(text: str) -> None:
    path = Path(os.environ["TMPDIR"]) / "any.txt"
    path.write_text(text, encoding="utf-8", errors="replace")
    added = Added()
    try:
        read(str(path), added, "3.13")
    except ImageError as error:
        message = str(error)
    else:
        message = str(path)
        # What was taken is what a recipe's file can hold
        recipe = derive(Recipe(name="b"), "x", added)
        assert tomllib.loads(recipe_toml(recipe)).get("python", {}).get("requirements", []) == list(
            recipe.python.requirements
        )
    assert str(path) in message


# --- pyproject.toml ---

PROJECT = """
[project]
name = "My_Project"
requires-python = ">=3.99"
dependencies = ["numpy>=2", "attrs"]
[project.optional-dependencies]
plot = ["matplotlib"]
all = ["my-project[plot]", "tqdm"]
[dependency-groups]
dev = ["pytest", {include-group = "Docs"}]
docs = ["sphinx"]
"""


def test_a_project_with_extras_and_groups(project: Path) -> None:
    added = reading(project, PROJECT)
    assert list(added.requirements) == ["numpy>=2", "attrs"]
    assert added.notes == [f"{project} asks for Python >=3.99: the guest's is 3.13"]
    assert list(reading(project, PROJECT, "[ALL]").requirements)[2:] == ["matplotlib", "tqdm"]
    both = reading(project, PROJECT, "[plot, dev]").requirements
    assert list(both)[2:] == ["matplotlib", "pytest", "sphinx"]
    assert both["sphinx"] == f"{project} (dependency-groups.Docs)"


@pytest.mark.parametrize(
    ("text", "what", "why"),
    [
        ("[tool.poetry.dependencies]\nnumpy='^2'", "", "Poetry's own format"),
        ("[build-system]\nrequires=[]", "", "no table [project]"),
        ("[project]\nname='x'\ndynamic=['dependencies']", "", "dynamic"),
        ("[project]\nname='x'\ndependencies=['a=<1']", "", "PEP 508"),
        ("[project]\nname='x'\ndependencies=['a @ file:///x']", "", "refused"),
        ("[project]\nname='x'\ndependencies={a=1}", "", "no list"),
        ("[project]\nname='x'\nrequires-python='new'", "", "no version of Python"),
        (PROJECT, "[none]", "no extra and no group 'none'"),
        ("[project", "", "not valid TOML"),
    ],
)
def test_projects_that_are_refused(project: Path, text: str, what: str, why: str) -> None:
    with pytest.raises(ImageError) as caught:
        reading(project, text, what)
    assert why in str(caught.value)
    assert str(project) in str(caught.value)


# --- conda ---


def test_an_environment_of_conda(conda: Path) -> None:
    added = reading(
        conda,
        "name: x\nchannels: [conda-forge]\nvariables: {A: b}\ndependencies:\n"
        "  - python=3.11\n  - numpy=1.26\n  - scipy==1.14.1\n  - pandas>=2,<3\n"
        "  - conda-forge::polars 1.2.*\n  - requests=2.31.0=py311_0\n  - attrs 23.1\n  - pytorch\n"
        "  - seaborn=*\n  - pip\n  - pip:\n    - tqdm>=4\n    - rich\n",
    )
    assert list(added.requirements) == [
        "numpy==1.26.*", "scipy==1.14.1", "pandas>=2,<3", "polars==1.2.*", "requests==2.31.0",
        "attrs==23.1", "torch", "seaborn", "tqdm>=4", "rich",
    ]  # fmt: skip
    notes = "\n".join(added.notes)
    for said in ("channels are left out", "variables are left out", "asks for Python ==3.11.*",
                 "builds (py311_0 and such) are left out", "pytorch is torch here"):  # fmt: skip
        assert notes.count(said) == 1, said
    assert reading(conda, "dependencies: [python=3.13]").notes == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dependencies: [numpy, cudatoolkit=11, libgcc-ng, r-base]",
         "not packages of a Python index, by their names: cudatoolkit=11, libgcc-ng, r-base"),
        ("dependencies: ['numpy>=1|2']", "no “or”"),
        ("dependencies: ['numpy[version=1]']", "only NAME"),
        ("dependencies:\n  - pip:\n    - -e .", "is refused"),
        ("dependencies: numpy", "no list of `dependencies`"),
        ("- a", "is no table"),
        ("dependencies: [3]", "is no dependency"),
        ("a: [b\nc", "line 2 is not valid YAML"),
        ("a: !!python/object/apply:os.system ['touch /tmp/never']", "is not valid YAML"),
    ],
)  # fmt: skip
def test_environments_that_are_refused(conda: Path, text: str, why: str) -> None:
    with pytest.raises(ImageError) as caught:
        reading(conda, text)
    assert why in str(caught.value)
    assert str(conda) in str(caught.value)


# --- the recipe that comes of it ---


@pytest.fixture
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "vmkernel" / "recipes"


def test_a_recipe_from_another_comes_back_from_its_file(own_config: Path) -> None:
    added = Added(
        requirements={"tqdm": "x", "six; python_version>'3'": "y"},
        constraints={"urllib3<3": "z"},
        hashes={"six": [SHA]},
    )
    for base in ("datascience", "minimal", "bash", "relay"):
        start = load_recipe(base)
        preload = ["tqdm.auto"] if start.engine == "python" else []
        recipe = derive(start, "mine", added, debian=["graphviz"], preload=preload)
        assert recipe.python.requirements == (*start.python.requirements, *added.requirements)
        assert recipe.debian.packages[-1] == "graphviz"
        assert recipe.description == f"{base} with tqdm, six, graphviz"
        path = save(recipe, "# lock\n")
        assert path == own_config / "mine.toml"
        assert load_recipe("mine") == recipe
        assert path.with_suffix(".lock").read_text() == "# lock\n"
    assert user_recipe_names() == ["mine"]
    assert (own_config / "mine.toml~").exists()  # what stood there before
    shown = derive(load_recipe("minimal"), "mine", Added()).language.display_name
    assert shown == "Python (microVM, mine)"


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("minimal", {}, "vmkernel's own"),
        ("../x", {}, "cannot be a recipe's name"),
        ("x", {"debian": ["-o=x"]}, "--apt"),
        ("x", {"debian": ["./x.deb"]}, "--apt"),
        ("x", {"preload": ["os; import"]}, "--preload"),
    ],
)
def test_recipes_that_cannot_be_made(name: str, more: dict[str, list[str]], why: str) -> None:
    with pytest.raises(ImageError) as caught:
        derive(load_recipe("minimal"), name, Added(), **more)
    assert why in caught.value.explain()


def test_a_preload_is_for_python_only() -> None:
    with pytest.raises(ImageError, match="for Python"):
        derive(load_recipe("bash"), "x", Added(), preload=["os"])


@given(st.text(min_size=1).filter(lambda text: "\n" not in text))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_from_toml(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    recipe = Recipe(name="x", description=text, engine="relay", argv=(text,), env={text: text})
    read_back = tomllib.loads(recipe_toml(recipe))
    assert (read_back["description"], read_back["argv"]) == (text, [text])
    assert read_back["env"] == {text: text}


def test_a_recipe_with_what_pip_would_build_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    for requirement, why in {
        "foo @ git+https://h/x": "nothing is built",
        "foo=<1": "PEP 508",
    }.items():
        path.write_text(f'name = "bad"\n[python]\nrequirements = ["ipykernel", "{requirement}"]\n')
        with pytest.raises(ImageError, match=why):
            load_recipe(path)


# --- locks ---


def installed(name: str, digest: str) -> dict[str, Any]:
    """As pip's report has it."""
    archive = {"hashes": {"sha256": digest.removeprefix("sha256:")}}
    return {
        "metadata": {"name": name, "version": "1.17"},
        "download_info": {"url": f"https://h/{name}.whl", "archive_info": archive},
        "is_direct": False,
    }


def test_a_lock_is_of_its_requirements_only(tmp_path: Path) -> None:
    report = tmp_path / "pip.json"
    report.write_text(json.dumps({"install": [installed("Six", SHA), installed("pip", OTHER)]}))
    recipe = Recipe(name="x", python=Python(requirements=("six",), hashes={"six": (SHA,)}))
    lock = make_lock(recipe, "3.13", report)
    assert lock.splitlines()[2:] == [f"Six==1.17 --hash={SHA}"]
    assert answers(lock, recipe, "3.13")
    check_lock(lock)
    check_lock(lock + f"foo @ https://h/foo-1-py3-none-any.whl --hash={SHA}\n")
    for line in ("--index-url https://h", "-e .", "foo", "foo==1", f"foo==1 --hash={SHA} -i x",
                 f"foo @ file:///x --hash={SHA}", f"foo==1 \\\n--hash={SHA}"):  # fmt: skip
        with pytest.raises(ImageError, match="line 4"):
            check_lock(f"{lock}{line}\n")
    assert not answers(lock, recipe, "3.14")
    assert not answers(lock, Recipe(name="x", python=Python(requirements=("six>1",))), "3.13")
    other = Recipe(
        name="x", python=Python(requirements=("six",), hashes={"six": (SHA[:-1] + "b",)})
    )
    with pytest.raises(ImageError, match=r"Six 1\.17 has a hash that is not among those asked for"):
        make_lock(other, "3.13", report)


HIDDEN = [
    "foo @ https://h/${HOME}/foo-1-py3-none-any.whl",
    "foo @ https://h/foo-1-py3-none-any.whl?\u2028--index-url=https://h/",
    "foo; extra == '\x0c--index-url https://h/'",
]


@pytest.mark.parametrize("requirement", HIDDEN)
@pytest.mark.parametrize("key", ["requirements", "constraints"])
def test_what_pip_would_make_something_else_of_is_in_no_recipe(
    tmp_path: Path, key: str, requirement: str
) -> None:
    """pip fills in ${HOME} and breaks lines in each file that it reads: out goes a token."""
    python = {"requirements": ["ipykernel"], "constraints": []}
    python[key].append(requirement)
    path = tmp_path / "bad.toml"
    path.write_text(
        'name = "bad"\n[python]\n'
        + "".join(f"{name} = {json.dumps(value)}\n" for name, value in python.items())
    )
    with pytest.raises(ImageError, match=r"no variables|cannot be seen"):
        load_recipe(path)


@pytest.mark.parametrize(
    "url",
    ["https://h/${HOME}/foo-1-py3-none-any.whl", "https://u:pw@h/foo-1-py3-none-any.whl",
     "https://h/foo-1.tar.gz"],
)  # fmt: skip
def test_a_lock_has_wheels_only_and_no_variables(tmp_path: Path, url: str) -> None:
    recipe = Recipe(name="x", python=Python(requirements=("six",)))
    with pytest.raises(ImageError, match="line 1"):
        check_lock(f"foo @ {url} --hash={SHA}\n")
    item = installed("foo", SHA)
    item["download_info"]["url"] = url
    report = tmp_path / "pip.json"
    report.write_text(json.dumps({"install": [item | {"is_direct": True}]}))
    with pytest.raises(ImageError, match="line 3"):  # what a package requires by itself
        make_lock(recipe, "3.13", report)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "foo @ https://u:s3cret@h/x.whl ; bad"),
        ("a.txt", "foo @ https://u:p@s3cret@h/x.whl"),
        ("a.txt", "https://u:s3/s3cret@h/x.whl"),
        ("a.yml", "dependencies:\n- pip:\n  - --extra-index-url https://u:s3cret@h/\n"),
        ("a.yml", "dependencies:\n- https://u:s3cret@h/pkg.conda\n"),
        ("a.yml", "dependencies:\n- https://u:s3cret@h/c::numpy=x|y\n"),
        ("a.yml", "dependencies:\n- https://h/t/s3cret/c::libfoo\n"),
        ("a.toml", '[project]\ndependencies = [{url = "https://u:s3cret@h/"}]\n'),
    ],
)
def test_a_password_is_in_no_message(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ImageError) as caught:
        read(str(tmp_path / name), Added(), "3.13")
    assert "s3cret" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yml", "dependencies: [2001-99-99]"),
        ("a.yml", "[" * 20_000),
        ("a.yml", "a: &a [b]\ndependencies: [*a]"),
        ("a.yml", f"dependencies: [{'9' * 6000}]"),
        ("a.toml", "a = " + "[" * 20_000),
        ("a.toml", "a = " + "9" * 6000),
        ("a.toml", "tool = 1"),
        ("a.txt", "x" * (5 << 20)),
        ("a.txt", "-r a.txt\n" * 2),
    ],
)
def test_a_file_that_is_made_to_hurt(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ImageError):
        read(str(tmp_path / name), Added(), "3.13")


def test_files_that_include_many_are_counted(tmp_path: Path) -> None:
    for number in range(9):  # 20 to the power of 8, were they all read
        (tmp_path / f"{number}.txt").write_text(f"-r {number + 1}.txt\n" * 20)
    (tmp_path / "9.txt").write_text("six\n")
    with pytest.raises(ImageError, match="files are included"):
        read(str(tmp_path / "0.txt"), Added(), "3.13")


def test_places_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    for what in (str(tmp_path / "fifo.txt"), "~nobody-is-called-so/a.txt", "\0.txt"):
        with pytest.raises(ImageError, match="cannot be read"):
            read(what, Added(), "3.13")


# --- what pip says ---

NO_FIT = [
    "ERROR: Could not find a version that satisfies the requirement foo==9 "
    "(from versions: 1.0, 2.0)",
    "ERROR: No matching distribution found for foo==9",
]
NONE = [line.replace("1.0, 2.0", "none") for line in NO_FIT]


@pytest.mark.parametrize(
    ("lines", "search", "words"),
    [
        (NO_FIT, [], ["no version of foo fits 'foo==9' (reqs line 3): there are 1.0, 2.0"]),
        (NONE, [], ["there is no package 'foo'"]),
        (NONE,
         ["  Skipping link: No sources permitted for foo: https://h/foo-1.0.tar.gz#sha256=a (from"],
         ["foo (reqs line 3) has no wheel, only its source (foo-1.0.tar.gz)"]),
        (NONE,
         ["  Skipping link: none of the wheel's tags (cp39-cp39-linux) are compatible (run pip"],
         ["no wheel for the guest's Python 3.13 (x86-64 Linux): there are cp39-cp39-linux"]),
        (["ERROR: Ignored the following versions that require a different python version: "
          "3.0 Requires-Python >=3.99", *NONE],
         [], ["is not for the guest's Python 3.13: foo 3.0 needs Python >=3.99"]),
        (["The conflict is caused by:", "    The user requested foo==9",
          "    bar 1 depends on foo<2", "", "To fix this"],
         [], ["foo==9 is asked for (reqs line 3); bar 1 depends on foo<2"]),
        (["Collecting baz (from bar)", "PermissionError: vmkernel: nothing is built on the host"],
         [], ["baz (from bar) has to be built"]),
        (["ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
          "    foo==9 from https://h/foo-9.whl#sha256=b:"], [], ["than the lock says: foo==9"]),
        (["WARNING: Retrying ... NameResolutionError(x)", *NO_FIT], [], ["was not reached"]),
        (["what nobody knows"], [], ["what nobody knows"]),
    ],
)  # fmt: skip
def test_what_pip_says_is_boiled_down(
    lines: list[str], search: list[str], words: list[str]
) -> None:
    what, hint = explain_failure(lines, {"foo==9": "reqs line 3"}, search, "3.13")
    for word in words:
        assert word in what
    assert hint


def test_who_required_what_is_missing() -> None:
    said = [
        "ERROR: Could not find a version that satisfies the requirement gone (from a->b>=1) "
        "(from versions: none)",
        "ERROR: No matching distribution found for gone",
    ]
    assert missing_requirement(said) == "gone"
    assert "(required by a)" in explain_failure(said)[0]


def test_only_an_image_that_was_built_here_is_taken_apart(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "VMKERNEL_IMAGES_DIR": str(tmp_path / "images")}
    own = load_settings(environ=environ)
    recipe = load_recipe("minimal")
    directory = own.images_dir / "given"
    directory.mkdir(parents=True)
    files = [*FILES, "pip-25.1.1-py3-none-any.whl"]
    for name in files:
        (directory / name).write_bytes(b"x")
    manifest = Manifest(
        format=FORMAT, recipe=recipe, kernel_release="6", python_version="3.13.5",
        debian_suite="trixie", created="2026",
        files=dict.fromkeys(files, FileRecord(size=1, sha256="")),
    )  # fmt: skip
    (directory / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    assert find_donor(recipe, own) is None  # it came from elsewhere
    note_built(directory, own)
    found = find_donor(recipe, own)
    assert found is not None or shutil.which("fsck.erofs") is None
    other = msgspec.structs.replace(manifest, created="2027")
    (directory / "manifest.json").write_bytes(msgspec.json.encode(other))
    assert find_donor(recipe, own) is None  # another in its place
