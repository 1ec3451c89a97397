"""A Linux kernel of the user's own for the guest: one that fits boots, any other is refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmhost import RunningVm, VmHost
from vmkernel.errors import ImageError
from vmkernel.host.start import spec_for
from vmkernel.image.store import Image, find_image
from vmkernel.vm.guestkernel import release_of

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.fixture
def host(session_dir: Path, minimal_image: str) -> Iterator[VmHost]:
    """A host of the test's own."""
    host = VmHost(session_dir)
    yield host
    assert host.left() == []


@pytest.fixture
def image(host: VmHost) -> Image:
    """The small image."""
    return find_image("minimal", host.settings())


async def test_a_kernel_that_fits_boots_and_has_a_template_of_its_own(
    host: VmHost, image: Image, tmp_path: Path
) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(image.kernel.read_bytes() + b"another one")
    settings = host.settings(VMKERNEL_KERNEL_PATH=str(kernel))
    usual = spec_for(host.settings(), "tcg").key()
    assert spec_for(settings, "tcg").key() != usual
    async with RunningVm(settings) as vm:
        release = await vm.run("import os; print(os.uname().release)")
        assert release == f"{image.manifest.kernel_release}\n"
        assert vm.start.template is not None
        directory = vm.start.template.directory
        assert directory.name != usual
    for file in directory.iterdir():  # nobody else will ever want it
        file.unlink()
    directory.rmdir()


def test_its_content_makes_the_template_and_not_its_name(
    host: VmHost, image: Image, tmp_path: Path
) -> None:
    def key(path: Path) -> str:
        return spec_for(host.settings(VMKERNEL_KERNEL_PATH=str(path)), "tcg").key()

    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(image.kernel.read_bytes())
    other.write_bytes(image.kernel.read_bytes())
    before = key(one)
    assert before == key(other) == key(one)
    with one.open("ab") as file:
        file.write(b"1")
    assert key(one) != before
    one.write_bytes(image.kernel.read_bytes())
    os.utime(one, ns=(1, 1))
    assert key(one) == before


@pytest.mark.parametrize("kind", ["missing", "directory", "text", "empty", "another release"])
def test_what_cannot_be_booted_is_refused_with_a_reason(
    host: VmHost, image: Image, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "vmlinuz"
    if kind == "directory":
        path.mkdir()
    elif kind in ("text", "empty"):
        path.write_text("no kernel\n" * (kind == "text"))
    elif kind == "another release":
        data = bytearray(image.kernel.read_bytes())
        (place,) = struct.unpack_from("<H", data, 0x20E)
        data[0x200 + place] ^= 1
        path.write_bytes(data)
        assert release_of(bytes(data)) not in ("", image.manifest.kernel_release)
    with pytest.raises(ImageError) as caught:
        spec_for(host.settings(VMKERNEL_KERNEL_PATH=str(path)), "tcg")
    assert str(path) in str(caught.value)
    assert "kernel_path" in caught.value.hint


def test_the_images_kernel_is_of_the_release_that_its_manifest_tells(image: Image) -> None:
    assert release_of(image.kernel.read_bytes()) == image.manifest.kernel_release
