"""Recipes with packages of one's own, really built from an index that the test makes, and started.

The Debian is that of the user's image `minimal`, so that a build takes some seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_client import Kernel

from local_index import LocalIndex
from prerequisites import missing
from vmkernel.errors import ImageError
from vmkernel.image.additions import Added
from vmkernel.image.derive import derive
from vmkernel.image.python import GuestPython, install_packages
from vmkernel.image.recipe import load_recipe
from vmkernel.image.reuse import note_built, pip_wheel_of, take_tree
from vmkernel.image.store import Image, find_image
from vmkernel.image.tools import Tools
from vmkernel.settings import Settings, load_settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

MAIN = "from vmkernel.cli.app import main; main()"
RAN = "ran-on-the-host"


class Place:
    """Images, recipes, an index: all of this module's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self.images.mkdir()
        self.recipes = directory / "config" / "vmkernel" / "recipes"
        self.index = LocalIndex(directory)
        self.env = {
            **{k: v for k, v in os.environ.items() if k != "XDG_CONFIG_HOME"},
            "VMKERNEL_IMAGES_DIR": str(self.images),
            "VMKERNEL_STATE_DIR": str(directory / "state"),
        }
        # The user's pip configuration lies where XDG_CONFIG_HOME led before the test run
        more = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.extra-index-url"],
            env=self.env, capture_output=True, text=True, check=False,
        ).stdout.strip()  # fmt: skip
        own = Path(os.environ.get("HOME", "/"), ".config/pip/pip.conf")
        if own.is_file():
            self.env.setdefault("PIP_CONFIG_FILE", str(own))
        indexes = [os.environ.get("PIP_EXTRA_INDEX_URL", more), self.index.url]
        self.env["PIP_EXTRA_INDEX_URL"] = " ".join(filter(None, indexes))
        self.env["XDG_CONFIG_HOME"] = str(directory / "config")

    def settings(self) -> Settings:
        return load_settings(environ=self.env)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, "image", *words], env=self.env, cwd=self.directory,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def output_of(process: subprocess.Popen[str], code: int) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, minimal_image: str) -> Iterator[Place]:
    if shutil.which("mkfs.erofs") is None:
        missing("mkfs.erofs is not installed")
    there = find_image(minimal_image, load_settings())
    place = Place(tmp_path_factory.mktemp("add"))
    (place.images / minimal_image).symlink_to(there.directory)
    note_built(there.directory, place.settings())
    index = place.index
    index.add("vmk-answer", "1.0", code="value = 41\n")
    index.add(
        "vmk-answer",
        "1.1",
        code="value = 42\n",
        requires=("vmk-part>=1",),
        # What site would run, at the start of any Python that sees it
        files={"vmk_answer.pth": f"import os; open({str(place.directory / RAN)!r}, 'w')\n"},
    )
    # Its files are there already when pip finds the fault, and it puts words into pip's mouth
    index.add(
        "vmk-half",
        "1.0",
        files={
            "vmk_half.pth": f"import os; open({str(place.directory / RAN)!r}, 'w')\n",
            "vmk_half-1.0.dist-info/entry_points.txt": "[console_scripts]\nx = vmk_half\n",
        },
        yanked="old\nERROR: No matching distribution found for vmk-half",
    )
    index.add("vmk-part", "1.0", code="part = 'yes'\n")
    index.add("vmk-low", "1", requires=("vmk-answer<1.1",))
    source = index.add_source("vmk-source", "1.0", f"open({str(place.directory / RAN)!r}, 'w')\n")
    index.add("vmk-builds", "1", requires=(f"vmk-source @ {source.as_uri()}",))
    yield place
    shutil.rmtree(place.directory, ignore_errors=True)


@pytest.fixture(scope="module")
def built(place: Place) -> Image:
    """An image with packages of the index."""
    (place.directory / "requirements.txt").write_text("# mine\nvmk-answer>=1  # the answer\n")
    process = place.start("build", "--from", "minimal", "--add", "requirements.txt",
                          "--preload", "vmk_part", "--name", "mine")  # fmt: skip
    output = process.communicate(timeout=300)[0]
    if "was not reached" in output:
        missing("this host's pip reaches no package index")
    assert process.returncode == 0, output
    assert "vmkernel install --recipe mine" in output
    if pip_wheel_of(find_image("minimal", place.settings())):
        assert "from the image 'minimal'" in output
    return find_image("mine", place.settings())


def test_an_image_with_packages_of_ones_own(place: Place, built: Image) -> None:
    assert built.recipe.preload == ("vmk_part",)
    assert "vmk-answer==1.1 --hash=sha256:" in built.requirements
    assert (place.recipes / "mine.lock").read_text() == built.requirements
    listed = json.loads(output_of(place.start("list", "--json"), 0))
    (mine,) = [found for found in listed["images"] if found["name"] == "mine"]
    assert mine["description"] == "minimal with vmk-answer"
    assert "image 'mine': whole" in output_of(place.start("verify", "mine"), 0)


def test_a_requirement_that_fails_says_why(
    place: Place, built: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    start = load_recipe("minimal")
    with Tools(tmp_path / "log") as tools:
        tree = take_tree(built, tmp_path, tools, place.settings())
        guest = GuestPython(tree.root)

        def failure(*wanted: str, lock: str = "") -> ImageError:
            origins = {text: f"reqs.txt line {n}" for n, text in enumerate(wanted, 1)}
            recipe = derive(start, "x", Added(requirements=dict.fromkeys(wanted, "")))
            with pytest.raises(ImageError) as caught:
                install_packages(guest, tree.root, recipe, tree.pip_wheel, tools,
                                 lambda fraction: None, lock=lock, origins=origins)  # fmt: skip
            assert caught.value.log_path == tmp_path / "log"
            return caught.value

        told = str(failure("vmk-answer>=1.1", "vmk-low"))
        assert "vmk-low 1 depends on vmk-answer<1.1 (reqs.txt line 2)" in told
        assert "vmk-answer>=1.1 is asked for (reqs.txt line 1)" in told
        told = str(failure("vmk-builds"))
        assert "(from vmk-builds) has to be built, which would run its code on the host" in told
        told = str(failure("vmk-source"))
        assert (
            "vmk-source (reqs.txt line 1) has no wheel, only its source (vmk-source-1.0.t" in told
        )
        told = str(failure("vmk-answer==7"))
        assert (
            "no version of vmk-answer fits 'vmk-answer==7' (reqs.txt line 1): there are 1." in told
        )
        assert "there is no package 'vmk-none'" in str(failure("vmk-none"))
        failure("vmk-half==1.0")
        assert list(guest.packages.glob("vmk_half.pth"))  # half installed, then pip was run again
        assert "--dry-run --no-deps vmk-half" in (tmp_path / "log").read_text()
        (guest.packages / "vmk_half.pth").unlink()
        digest = re.search(r"vmk-part==1.0 --hash=sha256:(.*)", built.requirements)
        assert digest is not None
        error = failure(lock=built.requirements.replace(digest[1], 64 * "0"))
        assert "another file than the lock says: vmk-part==1.0" in str(error)
        assert "--update" in error.hint
    assert not (place.directory / RAN).exists()


def test_it_is_built_again_from_what_was_kept(place: Place, built: Image) -> None:
    place.index.add("vmk-answer", "1.2", code="value = 43\n")  # which the lock does not have
    (place.directory / "requirements.txt").unlink()
    said = output_of(place.start("rm", "mine"), 0)
    assert f"Its recipe is kept: {place.recipes / 'mine.toml'}" in said
    assert "mine" in json.loads(output_of(place.start("list", "--json"), 0))["recipes_not_built"]
    output_of(place.start("build", "mine"), 0)
    again = find_image("mine", place.settings())
    assert again.digest == built.digest  # bit for bit
    assert again.requirements == built.requirements
    assert "there already" in output_of(place.start("build", "mine"), 0)


def test_a_kernel_has_the_packages(
    place: Place, built: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmkernel.cli.install import install_kernelspec

    monkeypatch.setenv("VMKERNEL_IMAGES_DIR", str(place.images))
    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    spec = install_kernelspec(kernels, options={"recipe": "mine"})
    content = json.loads((spec / "kernel.json").read_text())
    assert spec.name == "vmsandbox-mine"
    assert content["display_name"] == "Python (microVM, mine)"
    assert content["language"] == "python"
    kernel = Kernel(spec.name)
    try:
        cell = kernel.run(
            "import sys; print('vmk_part' in sys.modules)\n"
            "import vmk_answer, vmk_part; print(vmk_answer.value, vmk_part.part)"
        )
        assert cell.stdout == "True\n42 yes\n"
    finally:
        kernel.shut_down()
        shutil.rmtree(spec)
    assert not (place.directory / RAN).exists()
    left = {path.name for path in place.images.iterdir()}
    assert left == {"mine", "minimal", ".lock-mine"}
