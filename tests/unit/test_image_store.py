"""The store: finding, listing, verifying and removing images, here made of small files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from vmkernel.errors import ImageError
from vmkernel.image import builder, placing
from vmkernel.image.recipe import load_recipe
from vmkernel.image.store import (
    FILES,
    FORMAT,
    FileRecord,
    Manifest,
    find_image,
    list_images,
    remove_image,
    verify_image,
)
from vmkernel.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(environ={"HOME": str(tmp_path)}, system_config=tmp_path / "none")


def put_image(directory: Path, name: str = "minimal", **changes: object) -> Path:
    """An image of small files, as the builder would leave it."""
    directory.mkdir(parents=True)
    files = {}
    for file in FILES:
        content = f"content of {file}".encode()
        (directory / file).write_bytes(content)
        files[file] = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = Manifest(
        format=FORMAT, recipe=load_recipe(name), kernel_release="6.12", python_version="3.13.5",
        debian_suite="trixie", created="2026-01-01T00:00:00+00:00", files=files,
    )  # fmt: skip
    manifest = msgspec.structs.replace(manifest, **changes)
    (directory / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return directory


def test_an_image_is_found_with_its_recipe(settings: Settings) -> None:
    put_image(settings.images_dir / "minimal")
    image = find_image("minimal", settings)
    assert image.recipe == load_recipe("minimal")
    assert image.rootfs.read_bytes() == b"content of rootfs.erofs"
    assert len(image.digest) == 64
    assert image.size == sum(len(f"content of {file}") for file in FILES)


def test_equal_images_have_equal_digests_whenever_they_were_built(settings: Settings) -> None:
    put_image(settings.images_dir / "minimal")
    first = find_image("minimal", settings).digest
    remove_image("minimal", settings)
    put_image(settings.images_dir / "minimal", created="2027-01-01T00:00:00+00:00")
    assert find_image("minimal", settings).digest == first


def test_a_missing_image_says_how_to_build_it(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        find_image("minimal", settings)
    assert "vmkernel image build minimal" in caught.value.hint
    path = tmp_path / "own.toml"
    path.write_text('name = "own"\n[python]\nrequirements = ["ipykernel"]\n')
    with pytest.raises(ImageError) as caught:
        find_image(str(path), settings)
    assert f"vmkernel image build {path}" in caught.value.hint
    assert "'own'" in str(caught.value)


def test_finding_looks_at_sizes(settings: Settings) -> None:
    directory = put_image(settings.images_dir / "minimal")
    with (directory / "vmlinuz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ImageError, match="vmlinuz has 19 bytes instead of 18"):
        find_image("minimal", settings)
    (directory / "vmlinuz").unlink()
    with pytest.raises(ImageError, match="vmlinuz cannot be read"):
        find_image("minimal", settings)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}'])
def test_a_damaged_manifest_is_an_image_error(settings: Settings, content: bytes) -> None:
    directory = put_image(settings.images_dir / "minimal")
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        find_image("minimal", settings)
    assert "--force" in caught.value.hint


def test_an_image_of_another_format_is_refused(settings: Settings) -> None:
    put_image(settings.images_dir / "minimal", format=FORMAT + 1)
    with pytest.raises(ImageError, match=f"format {FORMAT + 1}"):
        find_image("minimal", settings)


def test_verify_names_the_file_with_a_flipped_bit(settings: Settings) -> None:
    directory = put_image(settings.images_dir / "minimal")
    seen: list[float] = []
    verify_image("minimal", settings, progress=lambda file, fraction: seen.append(fraction))
    assert seen[-1] == 1.0
    path = directory / "initrd.base"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    find_image("minimal", settings)  # cheap, so it cannot see it
    with pytest.raises(ImageError, match=r"initrd\.base has changed"):
        verify_image("minimal", settings)


def test_list_shows_damaged_ones_and_hides_what_is_under_way(settings: Settings) -> None:
    assert list_images(settings) == []
    put_image(settings.images_dir / "minimal")
    put_image(settings.images_dir / "broken")
    (settings.images_dir / "broken/rootfs.erofs").unlink()
    put_image(settings.images_dir / ".tmp-other-1")
    found = dict(list_images(settings))
    assert found.keys() == {"minimal", "broken"}
    assert isinstance(found["broken"], ImageError)


def test_remove(settings: Settings) -> None:
    directory = put_image(settings.images_dir / "minimal")
    remove_image("minimal", settings)
    assert not directory.exists()
    assert [path.name for path in settings.images_dir.iterdir()] == [".lock-minimal"]
    for name in ("minimal", "../x", ".", ".lock-minimal", ""):
        with pytest.raises(ImageError):
            remove_image(name, settings)
    assert settings.images_dir.is_dir()


def test_the_lock_is_let_go_of_when_its_holder_dies(settings: Settings) -> None:
    settings.images_dir.mkdir(parents=True)
    code = (
        "import sys, time\n"
        "from vmkernel.image.placing import image_lock\n"
        "from vmkernel.settings import load_settings\n"
        "lock = image_lock('x', load_settings())\n"
        "lock.__enter__()\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "VMKERNEL_IMAGES_DIR": str(settings.images_dir)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waiting = threading.Event()
        got = threading.Event()

        def take() -> None:
            with placing.image_lock("x", settings, waiting=waiting.set):
                got.set()

        thread = threading.Thread(target=take)
        thread.start()
        assert waiting.wait(5)
        assert not got.is_set()
        holder.kill()
        thread.join(10)
        assert got.is_set()


def test_putting_in_place_replaces_an_old_image_in_one_step(tmp_path: Path) -> None:
    final = tmp_path / "minimal"
    for number in range(3):
        new = tmp_path / "new"
        new.mkdir()
        (new / "number").write_text(str(number))
        placing.put_in_place(new, final)
        assert (final / "number").read_text() == str(number)
        if new.exists():  # the old one, exchanged
            (new / "number").unlink()
            new.rmdir()


def test_sweeping_takes_only_leftovers_of_this_name(settings: Settings) -> None:
    settings.images_dir.mkdir(parents=True)
    for name in (".tmp-a-12", ".tmp-a-34-removed", ".tmp-a-b-12", "a", ".lock-a"):
        (settings.images_dir / name / "x").mkdir(parents=True)
    placing.sweep("a", settings)
    left = {path.name for path in settings.images_dir.iterdir()}
    assert left == {".tmp-a-b-12", "a", ".lock-a"}


def test_an_image_of_this_very_recipe_is_not_built_again(settings: Settings) -> None:
    put_image(settings.images_dir / "minimal")
    phases: list[str] = []
    recipe = load_recipe("minimal")
    builder.build_image(recipe, settings, progress=lambda phase, fraction: phases.append(phase))
    assert phases == []
    other = msgspec.structs.replace(recipe, description="another")
    assert builder._existing(other, settings) is None


def test_recipes_of_the_same_content_share_their_files(settings: Settings) -> None:
    put_image(settings.images_dir / "minimal")
    image = builder.build_image(load_recipe("relay"), settings)
    assert image.recipe.engine == "relay"
    assert image.digest == find_image("minimal", settings).digest
    for file in FILES:
        assert (image.directory / file).samefile(settings.images_dir / "minimal" / file)
    verify_image("relay", settings)
    remove_image("minimal", settings)
    verify_image("relay", settings)
    assert {path.name for path in settings.images_dir.iterdir()} == {
        "relay", ".lock-minimal", ".lock-relay",
    }  # fmt: skip


def test_an_unwritable_directory_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = load_settings(environ={"VMKERNEL_IMAGES_DIR": str(tmp_path / "file/images")})
    with pytest.raises(ImageError) as caught:
        builder.build_image(load_recipe("minimal"), settings)
    assert str(tmp_path / "file/images") in str(caught.value)
    assert "VMKERNEL_IMAGES_DIR" in caught.value.hint


def test_finding_an_image_imports_nothing_heavy() -> None:
    code = (
        "import sys, vmkernel.image.store\n"
        "heavy = {'subprocess', 'asyncio', 'click', 'tomllib', 'shutil', 'psutil', 'lzma'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    plain = "import sys; import msgspec, hashlib; print(*sorted({'shutil'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    base = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) <= set(base.stdout.split())
