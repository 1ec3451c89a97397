"""Recipes: what is read from them, and that each mistake names the file and the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmkernel.errors import ImageError
from vmkernel.image.recipe import distribution_name, load_recipe, recipe_names

WHOLE = """
name = "mine"
memory = "1.5G"
preload = ["numpy", "matplotlib.pyplot"]
[language]
display_name = "Mine"
[debian]
packages = ["libstdc++6", "less"]
[python]
requirements = ["ipykernel>=7", "MSGSPEC[toml] >= 0.19 ; python_version > '3'"]
prune = ["numpy/*/tests"]
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "mine.toml"
    path.write_text(text)
    return path


def test_own_recipes_are_found_by_name() -> None:
    assert {"datascience", "minimal"} <= set(recipe_names())
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_minimal_has_no_numpy_and_datascience_preloads_it() -> None:
    assert not any("numpy" in text for text in load_recipe("minimal").requirements())
    assert load_recipe("datascience").preload == ("numpy", "pandas", "matplotlib.pyplot")


def test_a_recipe_of_ones_own_is_read_by_path(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, WHOLE))
    assert recipe.memory == 1536
    assert recipe.debian.packages == ("libstdc++6", "less")
    assert recipe.language.display_name == "Mine"


def test_pyzmq_is_there_for_the_relay() -> None:
    for name in recipe_names():
        named = [distribution_name(text) for text in load_recipe(name).requirements()]
        assert named.count("pyzmq") == 1


def test_the_yardstick_is_made_of_the_same_files_as_minimal() -> None:
    assert load_recipe("relay").has_content_of(load_recipe("minimal"))
    assert not load_recipe("bash").has_content_of(load_recipe("minimal"))
    assert not load_recipe("datascience").has_content_of(load_recipe("minimal"))


def test_msgspec_is_always_there_and_once(tmp_path: Path) -> None:
    assert "msgspec" in load_recipe("minimal").requirements()
    recipe = load_recipe(write(tmp_path, WHOLE))
    assert sum(distribution_name(text) == "msgspec" for text in recipe.requirements()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('nmae = "x"', ["nmae"]),
        (WHOLE + "\n[debain]\npackages = []", ["debain"]),
        (WHOLE.replace("prune", "prunes"), ["python.prunes"]),
        (WHOLE.replace('"mine"', '"../mine"'), ["name", "../mine"]),
        (WHOLE.replace('"mine"', "7"), ["name", "str"]),
        (WHOLE.replace('"1.5G"', '"lots"'), ["memory", "lots"]),
        (WHOLE.replace('"1.5G"', '"1M"'), ["memory", "64M"]),
        (WHOLE.replace('"less"', '"less; rm -rf /"'), ["debian.packages"]),
        (WHOLE.replace('"less"', '"?narrow(x)"'), ["debian.packages"]),
        (WHOLE.replace('"ipykernel>=7"', '"ipykernel", "--index-url=http://x"'), ["python.req"]),
        (WHOLE.replace('"ipykernel>=7"', '"-r /etc/passwd"'), ["python.requirements"]),
        (WHOLE.replace('"ipykernel>=7", ', ""), ["ipykernel"]),
        (WHOLE.replace("numpy/*/tests", "../../../etc"), ["python.prune"]),
        (WHOLE.replace('"numpy",', '"numpy; import os",'), ["preload"]),
        (WHOLE.replace("memory", 'engine = "relay"\nmemory'), ["argv", "connection_file"]),
        (WHOLE.replace("memory", 'argv = ["x"]\nmemory'), ["argv", "relay"]),
        (WHOLE.replace("memory", 'wake_code = "1"\nmemory'), ["wake_code", "relay"]),
        (WHOLE.replace("memory", 'interrupt_mode = "shout"\nmemory'), ["interrupt_mode"]),
        (
            WHOLE.replace("memory", 'engine = "relay"\nargv = ["{connection_file}"]\nmemory'),
            ["preload", "python"],
        ),
        (WHOLE.replace("memory", 'engine = "ruby"\nmemory'), ["engine"]),
        (WHOLE.replace("]", ""), ["TOML"]),
    ],
)
def test_a_mistake_names_the_file_and_the_key(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ImageError) as caught:
        load_recipe(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert caught.value.hint


def test_a_missing_recipe_tells_which_there_are(tmp_path: Path) -> None:
    for name in ("nosuch", "", "..", ".lock"):
        with pytest.raises(ImageError) as caught:
            load_recipe(name)
        assert "minimal" in caught.value.hint
    with pytest.raises(ImageError, match="cannot be read"):
        load_recipe(tmp_path / "nosuch.toml")


def test_a_slip_in_a_placeholder_is_told(tmp_path: Path) -> None:
    text = """
    name = "mine"
    engine = "relay"
    argv = ["bash-kernel", "{connection_file}"]
    wake_code = "cd {cwd:sh} ${env} %s"
    """
    assert load_recipe(write(tmp_path, text % "{seed} {other}")).wake_code
    for slip in ("{cwd}", "{env:bash}", "{seed:sh}"):
        with pytest.raises(ImageError, match="wake_code.*" + slip):
            load_recipe(write(tmp_path, text % slip))


def test_a_relay_recipe_needs_no_ipykernel(tmp_path: Path) -> None:
    text = """
    name = "mine"
    engine = "relay"
    argv = ["bash-kernel", "{connection_file}"]
    """
    assert load_recipe(write(tmp_path, text)).argv[0] == "bash-kernel"
