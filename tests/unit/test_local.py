"""What the wrapper says of a kernel before it has ever seen one."""

from __future__ import annotations

import msgspec

from vmkernel.image.recipe import load_recipe
from vmkernel.image.store import FORMAT, Manifest
from vmkernel.kernel.local import kernel_info


def manifest(recipe: str) -> Manifest:
    return Manifest(
        format=FORMAT, recipe=load_recipe(recipe), kernel_release="6.12", python_version="3.13.5",
        debian_suite="trixie", created="2026-01-01T00:00:00+00:00", files={},
    )  # fmt: skip


def test_the_language_is_the_recipes_before_the_first_template() -> None:
    info = kernel_info(None, manifest("bash"), "facts")
    assert info["language_info"] == {
        "name": "bash", "version": "", "mimetype": "text/x-sh", "file_extension": ".sh",
        "pygments_lexer": "bash", "codemirror_mode": "shell",
    }  # fmt: skip
    assert info["banner"].startswith("bash\nvmkernel ")
    assert (info["help_links"], info["supported_features"]) == ([], [])
    msgspec.json.encode(info)


def test_python_is_told_with_its_version() -> None:
    info = kernel_info(None, manifest("minimal"), "facts")
    assert info["language_info"]["version"] == "3.13.5"
    assert info["banner"].startswith("Python 3.13.5\n")
    assert kernel_info(None, None, "facts")["language_info"]["name"] == "python"


def test_what_the_kernel_itself_said_counts() -> None:
    said = {"status": "ok", "language_info": {"name": "R"}, "supported_features": ["x"]}
    info = kernel_info(said, manifest("bash"), "facts")
    assert info["language_info"] == {"name": "R"}
    assert info["banner"].startswith("R\n")
    assert info["supported_features"] == ["x"]
