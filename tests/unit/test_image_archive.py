"""Copying images between hosts: one stream, checked to the last bit, that no sender can abuse."""

from __future__ import annotations

import hashlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmkernel.errors import ImageError
from vmkernel.image import archive, store
from vmkernel.image.archive import export_image, import_image
from vmkernel.image.recipe import load_recipe
from vmkernel.settings import Settings, load_settings

PIP = "pip-25.1.1-py3-none-any.whl"
SPARSE = (b"begin" + bytes(5 << 16))[: 4 << 16] + bytes(7 << 16) + b"end"
CONTENT = {
    store.ROOTFS: SPARSE,
    store.KERNEL: b"k" * 512,
    store.INITRD: b"",
    store.LOCK: b"a 1\nb 2\n",
    store.REQUIREMENTS: b"x==1\n",
    PIP: b"w" * 1000,
}


def settings_in(home: Path) -> Settings:
    home.mkdir(exist_ok=True)
    return load_settings(environ={"HOME": str(home)}, system_config=home / "none")


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    """A host with an image."""
    settings = settings_in(tmp_path / "here")
    put_image(settings, CONTENT)
    return settings


@pytest.fixture
def there(tmp_path: Path) -> Settings:
    """A host without one."""
    return settings_in(tmp_path / "there")


def put_image(settings: Settings, content: dict[str, bytes], **changes: Any) -> None:
    directory = settings.images_dir / "minimal"
    directory.mkdir(parents=True)
    files = {}
    for name, data in content.items():
        (directory / name).write_bytes(data)
        files[name] = store.FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = store.Manifest(
        format=store.FORMAT, recipe=load_recipe("minimal"), kernel_release="6.12",
        python_version="3.13.5", debian_suite="trixie", created="2026-01-01T00:00:00+00:00",
        files=files,
    )  # fmt: skip
    manifest = msgspec.structs.replace(manifest, **changes)
    (directory / store.MANIFEST).write_bytes(msgspec.json.encode(manifest))


def exported(settings: Settings) -> bytes:
    target = io.BytesIO()
    export_image("minimal", settings, target)
    return target.getvalue()


def made_by_hand(manifest: dict[str, Any], files: dict[str, bytes] | None = None) -> bytes:
    """An archive that is right in itself, with any manifest: what an attacker can make."""
    content = msgspec.json.encode(manifest)
    checksum = hashlib.sha256(content).hexdigest()
    line = f"vmkernel image archive 1 sha256 {checksum} size {len(content):08d}\n"
    members = [("vmkernel-image", line.encode()), (store.MANIFEST, content)]
    members += (files or CONTENT).items()
    return b"".join(
        archive._header(name, len(data)) + data + bytes(-len(data) % 512) for name, data in members
    ) + bytes(1024)


def manifest_of(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(
        (settings.images_dir / "minimal" / store.MANIFEST).read_bytes()
    )
    return found


def refused(data: bytes, settings: Settings, **options: Any) -> ImageError:
    """Importing fails, says what to do, and leaves nothing but the lock's file."""
    with pytest.raises(ImageError) as caught:
        import_image(io.BytesIO(data), settings, **options)
    assert left_in(settings) == []
    return caught.value


def left_in(settings: Settings) -> list[str]:
    if not settings.images_dir.exists():
        return []
    names = {path.name for path in settings.images_dir.iterdir()}
    return sorted(names - {".lock-minimal"})


def test_an_image_arrives_as_it_was(here: Settings, there: Settings) -> None:
    shown: list[tuple[str, float]] = []
    data = exported(here)
    done = import_image(io.BytesIO(data), there, progress=lambda *now: shown.append(now))
    assert done.is_new
    source, copy = here.images_dir / "minimal", there.images_dir / "minimal"
    assert sorted(os.listdir(copy)) == sorted(os.listdir(source))
    for name in os.listdir(source):
        assert (copy / name).read_bytes() == (source / name).read_bytes()
        assert (copy / name).stat().st_mode & 0o777 == 0o644
    store.verify_image("minimal", there)
    assert done.checksum == hashlib.sha256((copy / store.MANIFEST).read_bytes()).hexdigest()
    assert shown[-1][1] == 1.0
    assert [now for _, now in shown] == sorted(now for _, now in shown)
    # Zeros take no room on the disk
    assert (copy / store.ROOTFS).stat().st_blocks * 512 < len(SPARSE) / 2
    assert exported(there) == data


def test_an_archive_is_a_tar_file_that_people_can_look_into(here: Settings) -> None:
    with tarfile.open(fileobj=io.BytesIO(exported(here))) as tar:
        assert tar.getnames() == ["vmkernel-image", store.MANIFEST, *CONTENT]
        rootfs = tar.extractfile(store.ROOTFS)
        assert rootfs is not None
        assert rootfs.read() == SPARSE


def test_no_bit_can_change_unnoticed(tmp_path: Path, there: Settings) -> None:
    here = settings_in(tmp_path / "small")
    put_image(here, {**CONTENT, store.ROOTFS: b"r" * 600})
    data = exported(here)
    for place in range(random.randrange(13), len(data), 13):
        changed = bytearray(data)
        changed[place] ^= 1 << random.randrange(8)
        with pytest.raises(ImageError):
            import_image(io.BytesIO(changed), there)
    assert left_in(there) == []
    import_image(io.BytesIO(data), there)


def test_an_archive_that_is_cut_off_leaves_nothing(here: Settings, there: Settings) -> None:
    data = exported(here)
    for size in (0, 1, 511, 512, 700, 5000, len(data) // 2, len(data) - 1024, len(data) - 1):
        error = refused(data[:size], there)
        assert f"ends after {size} bytes" in error.message
        assert error.hint


def test_something_behind_the_end_is_refused(here: Settings, there: Settings) -> None:
    assert "follows" in refused(exported(here) + b"x", there).message


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "a/b", "..", ".", "manifest.json", "", "rootfs.erofs\0", "evil",
     "pip-/../../x.whl", "pip-\n.whl"],
)  # fmt: skip
def test_no_file_gets_a_name_of_the_senders_choice(
    here: Settings, there: Settings, tmp_path: Path, name: str
) -> None:
    manifest = manifest_of(here)
    manifest["files"][name] = {"size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    short = name.replace("\0", "").replace("\n", "")[:90]
    before = sorted(tmp_path.rglob("*"))
    error = refused(made_by_hand(manifest, {**CONTENT, short or "x": b"evil"}), there)
    assert "no image has a file" in error.message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../minimal", "/tmp/x", ".hidden", "a/b", "", "A", "x" * 65])
def test_no_directory_gets_a_name_of_the_senders_choice(
    here: Settings, there: Settings, tmp_path: Path, name: str
) -> None:
    manifest = manifest_of(here)
    manifest["recipe"]["name"] = name
    before = sorted(tmp_path.rglob("*"))
    assert "`name`" in refused(made_by_hand(manifest), there).message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("files", store.ROOTFS, "size"), -1),
        (("files", store.ROOTFS, "size"), 65 << 30),
        (("files", store.ROOTFS, "size"), 1 << 70),
        (("files", store.ROOTFS, "sha256"), "x"),
        (("format",), 99),
        (("kernel_release",), "6.12\x1b[2J"),
        (("python_version",), "../3"),
        (("created",), "yesterday"),
        (("recipe", "python", "requirements"), ["ipykernel", "--index-url=http://evil"]),
        (("recipe", "evil"), 1),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    here: Settings, there: Settings, path: tuple[str, ...], value: Any
) -> None:
    manifest = manifest_of(here)
    table = manifest
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    refused(made_by_hand(manifest), there)


def test_links_and_other_tar_files_are_refused(here: Settings, there: Settings) -> None:
    manifest = (here.images_dir / "minimal" / store.MANIFEST).read_bytes()
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
                 tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE):  # fmt: skip
        data = bytearray(exported(here))
        place = data.index(b"vmlinuz\0")
        evil = tarfile.TarInfo("vmlinuz")
        evil.size, evil.type, evil.linkname = 512, kind, "/etc/passwd"
        data[place : place + 512] = evil.tobuf(tarfile.GNU_FORMAT)
        assert "header of vmlinuz" in refused(bytes(data), there).message
    usual = io.BytesIO()
    with tarfile.open(fileobj=usual, mode="w") as tar:
        member = tarfile.TarInfo(store.MANIFEST)
        member.size = len(manifest)
        tar.addfile(member, io.BytesIO(manifest))
    assert "no archive of an image" in refused(usual.getvalue(), there).message


def test_a_compressed_archive_says_how_to_unpack_it(here: Settings, there: Settings) -> None:
    import gzip
    import lzma

    assert "gzip -dc FILE |" in refused(gzip.compress(exported(here)), there).hint
    assert "xz -dc FILE |" in refused(lzma.compress(exported(here)), there).hint
    assert "no archive" in refused(random.randbytes(2000), there).message


def test_another_checksum_than_asked_for(here: Settings, there: Settings) -> None:
    data = exported(here)
    found = hashlib.sha256((here.images_dir / "minimal" / store.MANIFEST).read_bytes()).hexdigest()
    assert found in refused(data, there, checksum="0" * 64).message
    assert import_image(io.BytesIO(data), there, checksum=found).checksum == found


def test_another_image_is_replaced_only_when_told_so(
    here: Settings, there: Settings, tmp_path: Path
) -> None:
    assert import_image(io.BytesIO(exported(here)), there).is_new
    assert not import_image(io.BytesIO(exported(here)), there).is_new
    newer = settings_in(tmp_path / "newer")
    put_image(newer, {**CONTENT, store.KERNEL: b"another"})
    data = exported(newer)
    with pytest.raises(ImageError, match="another image") as caught:
        import_image(io.BytesIO(data), there)
    assert "--force" in caught.value.hint
    assert (there.images_dir / "minimal" / store.KERNEL).read_bytes() == CONTENT[store.KERNEL]
    with pytest.raises(ImageError):  # and a damaged one replaces nothing
        import_image(io.BytesIO(data[:-1]), there, force=True)
    assert (there.images_dir / "minimal" / store.KERNEL).read_bytes() == CONTENT[store.KERNEL]
    assert import_image(io.BytesIO(data), there, force=True).is_new
    assert (there.images_dir / "minimal" / store.KERNEL).read_bytes() == b"another"
    assert left_in(there) == ["minimal"]


def test_one_that_is_there_and_damaged_is_told_and_mended(here: Settings, there: Settings) -> None:
    import_image(io.BytesIO(exported(here)), there)
    (there.images_dir / "minimal" / store.KERNEL).unlink()
    with pytest.raises(ImageError, match="another image"):
        import_image(io.BytesIO(exported(here)), there)
    import_image(io.BytesIO(exported(here)), there, force=True)
    store.verify_image("minimal", there)


def test_a_damaged_image_is_not_exported_as_a_whole_one(here: Settings, there: Settings) -> None:
    path = here.images_dir / "minimal" / store.KERNEL
    path.write_bytes(b"K" + path.read_bytes()[1:])
    target = io.BytesIO()
    with pytest.raises(ImageError, match="vmlinuz"):
        export_image("minimal", here, target)
    refused(target.getvalue(), there)


def test_no_space(here: Settings, there: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Said at the beginning, of an image that cannot fit …
    manifest = manifest_of(here)
    manifest["files"][store.ROOTFS]["size"] = 63 << 30
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1 << 30))  # type: ignore[attr-defined]
    error = refused(made_by_hand(manifest), there)
    assert "1024 MiB" in error.message
    assert "VMKERNEL_IMAGES_DIR" in error.hint
    monkeypatch.undo()
    # … and when the disk (here: this process's limit) is full on the way.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    data = exported(here)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        error = refused(data, there)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "no more room" in error.message


# --- the command ---


def command(home: Path, *arguments: str) -> list[str]:
    main = "from vmkernel.cli.app import main; main()"
    return ["env", f"HOME={home}", sys.executable, "-c", main, "image", *arguments]


def run(home: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    words = command(home, *arguments)
    return subprocess.run(words, capture_output=True, timeout=60, check=False, **more)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands' images are those of their HOME."""
    for name in ("VMKERNEL_IMAGES_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("clean")
def test_from_host_to_host_by_a_file(here: Settings, there: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = run(tmp_path / "here", "export", "minimal", cwd=out)
    assert done.returncode == 0, done.stderr
    checksum = done.stdout.decode().split("checksum ")[1].strip()
    assert os.listdir(out) == ["minimal.vmimage"]
    file = str(out / "minimal.vmimage")
    assert run(tmp_path / "there", "import", file, "--checksum", "12").returncode == 2
    wrong = run(tmp_path / "there", "import", file, "--checksum", "1" * 64)
    assert wrong.returncode == 1
    assert b"another image" in wrong.stderr
    done = run(tmp_path / "there", "import", file, "--checksum", checksum)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines()[-1] == f"checksum {checksum}"
    store.verify_image("minimal", there)
    again = run(tmp_path / "there", "import", file)
    assert again.returncode == 0
    assert b"is there already" in again.stdout


@pytest.mark.usefixtures("clean")
def test_from_host_to_host_by_a_pipe(here: Settings, there: Settings, tmp_path: Path) -> None:
    with subprocess.Popen(
        command(tmp_path / "here", "export", "minimal", "-"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as sender:  # fmt: skip
        done = run(tmp_path / "there", "import", "-", stdin=sender.stdout)
        assert done.returncode == 0, done.stderr
        _, words = sender.communicate(timeout=30)
        assert sender.returncode == 0
    assert words.decode().splitlines()[-1] == done.stdout.decode().splitlines()[-1]
    store.verify_image("minimal", there)


@pytest.mark.usefixtures("clean")
def test_an_export_that_fails_leaves_no_file(here: Settings, tmp_path: Path) -> None:
    file = tmp_path / "out/minimal.vmimage"
    assert run(tmp_path / "here", "export", "minimal", str(file)).returncode == 1
    file.parent.mkdir()
    file.write_text("older")
    path = here.images_dir / "minimal" / store.KERNEL
    path.write_bytes(b"K" + path.read_bytes()[1:])
    done = run(tmp_path / "here", "export", "minimal", str(file))
    assert done.returncode == 1
    assert b"vmlinuz" in done.stderr
    assert file.read_text() == "older"
    assert os.listdir(file.parent) == ["minimal.vmimage"]
    # Nobody reads it
    done = run(tmp_path / "here", "export", "minimal", "/dev/full")
    assert done.returncode == 1
    assert b"No space left" in done.stderr


@pytest.mark.usefixtures("clean")
def test_an_import_that_is_ended_leaves_nothing(
    here: Settings, there: Settings, tmp_path: Path
) -> None:
    data = exported(here)
    with subprocess.Popen(
        command(tmp_path / "there", "import", "-"), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as receiver:
        assert receiver.stdin is not None
        receiver.stdin.write(data[:400_000])
        receiver.stdin.flush()
        deadline = time.monotonic() + 20
        while not any(name.startswith(".tmp-") for name in left_in(there)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        receiver.terminate()
        assert receiver.wait(20) == 143
    assert left_in(there) == []
