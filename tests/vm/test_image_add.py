"""Recipes with packages of one's own, really built from an index that the test makes, and started.

The Debian is that of the user's image `minimal`, so that a build takes some seconds; the builds of
this module run at the same time, in processes of their own.
"""

from __future__ import annotations

import contextlib
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
from vmkernel.image.reuse import pip_wheel_of
from vmkernel.image.store import find_image
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
    index.add("vmk-part", "1.0", code="part = 'yes'\n")
    index.add("vmk-low", "1", requires=("vmk-answer<1.1",))
    source = index.add_source("vmk-source", "1.0", f"open({str(place.directory / RAN)!r}, 'w')\n")
    index.add("vmk-builds", "1", requires=(f"vmk-source @ {source.as_uri()}",))
    yield place
    shutil.rmtree(place.directory, ignore_errors=True)


@pytest.fixture(scope="module")
def built(place: Place) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The builds, all begun."""
    (place.directory / "requirements.txt").write_text("# mine\nvmk-answer>=1  # the answer\n")
    (place.directory / "low.txt").write_text("\nvmk-answer>=1.1\nvmk-low\n")
    add = ("build", "--from", "minimal", "--add")
    processes = {
        "mine": place.start(*add, "requirements.txt", "--preload", "vmk_part", "--name", "mine"),
        "conflict": place.start(*add, "low.txt", "--name", "conflict"),
        "builds": place.start(*add, "vmk-builds", "--name", "builds"),
    }
    yield processes
    for process in processes.values():
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        process.kill()


def test_an_image_with_packages_of_ones_own(
    place: Place, built: dict[str, subprocess.Popen[str]]
) -> None:
    output = output_of(built["mine"], 0)
    assert "vmkernel install --recipe mine" in output
    if pip_wheel_of(find_image("minimal", place.settings())):
        assert "from the image 'minimal'" in output
    image = find_image("mine", place.settings())
    assert image.recipe.preload == ("vmk_part",)
    assert "vmk-answer==1.1 --hash=sha256:" in image.requirements
    assert (place.recipes / "mine.lock").read_text() == image.requirements
    listed = json.loads(output_of(place.start("list", "--json"), 0))
    (mine,) = [found for found in listed["images"] if found["name"] == "mine"]
    assert mine["description"] == "minimal with vmk-answer"
    assert "image 'mine': whole" in output_of(place.start("verify", "mine"), 0)


def test_two_that_cannot_be_together(place: Place, built: dict[str, subprocess.Popen[str]]) -> None:
    output = output_of(built["conflict"], 1)
    assert "vmk-low 1 depends on vmk-answer<1.1 (low.txt line 3)" in output
    assert "vmk-answer>=1.1 is asked for (low.txt line 2)" in output
    assert f"Log: {place.directory}/state/image-conflict.log" in output
    assert not (place.recipes / "conflict.toml").exists()


def test_what_has_to_be_built_is_not_run_on_the_host(
    place: Place, built: dict[str, subprocess.Popen[str]]
) -> None:
    output = output_of(built["builds"], 1)
    assert "(from vmk-builds) has to be built, which would run its code on the host" in output


def test_it_is_built_again_from_what_was_kept(
    place: Place, built: dict[str, subprocess.Popen[str]]
) -> None:
    built["mine"].wait(300)
    before = find_image("mine", place.settings())
    place.index.add("vmk-answer", "1.2", code="value = 43\n")  # which the lock does not have
    (place.directory / "requirements.txt").unlink()
    said = output_of(place.start("rm", "mine"), 0)
    assert f"Its recipe is kept: {place.recipes / 'mine.toml'}" in said
    assert "mine" in json.loads(output_of(place.start("list", "--json"), 0))["recipes_not_built"]
    output_of(place.start("build", "mine"), 0)
    again = find_image("mine", place.settings())
    assert again.digest == before.digest  # bit for bit
    assert again.requirements == before.requirements
    assert "there already" in output_of(place.start("build", "mine"), 0)

    lock = place.recipes / "mine.lock"
    digest = re.search(r"vmk-part==1.0 --hash=sha256:(.*)", again.requirements)
    assert digest is not None
    lock.write_text(again.requirements.replace(digest[1], 64 * "0"))
    output = output_of(place.start("build", "mine"), 1)
    assert "another file than the lock says: vmk-part==1.0" in output
    assert "--update" in output
    lock.write_text(again.requirements)
    assert find_image("mine", place.settings()).digest == before.digest  # the old one stays


def test_a_kernel_has_the_packages(
    place: Place, built: dict[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
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
    assert left - {"mine", "minimal"} <= {
        f".lock-{name}" for name in ("mine", "conflict", "builds")
    }
