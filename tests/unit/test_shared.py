"""Many users on one host: whose slots count, what is locked, and from where things are taken."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmkernel import shared
from vmkernel.errors import ImageError, SettingsError, VmCapacityError
from vmkernel.host.capacity import OF_A_USER, QueuePosition, Semaphore
from vmkernel.host.openings import in_a_line, in_short, openings
from vmkernel.host.sharing import differences
from vmkernel.host.start import Label
from vmkernel.image.store import FILES, FORMAT, Manifest, find_image, is_shared, list_images
from vmkernel.settings import (
    Settings,
    check_locked,
    load_settings,
    load_settings_with_sources,
    locked_settings,
)
from vmkernel.vm.tsc import host_tsc_khz

ANN, BOB = 70001, 70002


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slots"


def of_user(path: Path, uid: int, limit: int, host: int = 4) -> Semaphore:
    own = Semaphore(path, limit, what=OF_A_USER, setting="max_vms_per_user", user=uid)
    return Semaphore(path, host, within=own)


def taken(semaphore: Semaphore) -> Any:
    slot = semaphore.acquire_nowait()
    assert slot is not None
    return slot


# --- so many VMs for each user ---


def test_a_users_limit_is_his_alone_and_counts_over_processes(path: Path) -> None:
    ann, same_ann, bob = of_user(path, ANN, 2), of_user(path, ANN, 2), of_user(path, BOB, 2)
    slots = [taken(ann), taken(same_ann)]
    assert ann.acquire_nowait() is None
    assert same_ann.acquire_nowait() is None
    assert ann.statistics() == (4, 2, 0, 0), "two are free, and she may have none"
    assert bob.statistics() == (4, 2, 2, 0)
    slots += [taken(bob), taken(bob)]
    assert [slot.index for slot in slots] == [0, 1, 2, 3]
    slots[0].release()
    taken(ann)


def test_one_descriptor_carries_both_locks(path: Path) -> None:
    ann = of_user(path, ANN, 1)
    slot = taken(ann)
    copy = os.dup(slot.fd)  # as QEMU inherits it
    slot.handed_over()
    assert ann.within is not None
    assert ann.within.statistics().used == 1
    os.close(copy)
    assert ann.statistics() == (4, 0, 1, 0)
    assert ann.within.statistics().used == 0


def test_a_full_host_costs_nobody_a_slot_of_his_own(path: Path) -> None:
    ann, bob = of_user(path, ANN, 3, host=1), of_user(path, BOB, 3, host=1)
    slot = taken(bob)
    assert ann.acquire_nowait() is None
    assert ann.within is not None
    assert ann.within.statistics().used == 0
    slot.release()
    taken(ann)


async def test_who_waits_at_his_own_limit_keeps_nobody_else_waiting(path: Path) -> None:
    ann, bob = of_user(path, ANN, 1), of_user(path, BOB, 1)
    slot = taken(ann)
    told: list[QueuePosition] = []
    waiting = asyncio.create_task(ann.acquire(on_wait=told.append))
    while not told:
        await asyncio.sleep(0.005)
    assert told[0].text == (
        "your limit of 1 VM is reached (max_vms_per_user): waiting until one of them ends"
    )
    assert ann.statistics().waiting == 1, "her pool is to give way"
    assert bob.statistics().waiting == 0
    taken(bob).release()
    slot.release()
    (await waiting).release()


async def test_the_error_says_whose_limit_it_is(path: Path) -> None:
    ann = of_user(path, ANN, 2)
    slots = [taken(ann), taken(ann)]
    with pytest.raises(VmCapacityError, match=r"your limit of 2 VMs .*max_vms_per_user") as caught:
        await ann.acquire(timeout=0)
    assert "vmkernel ps" in caught.value.hint
    for slot in slots:
        slot.release()


async def test_the_time_to_wait_is_one_for_both_queues(path: Path) -> None:
    ann, bob = of_user(path, ANN, 1, host=1), of_user(path, BOB, 1, host=1)
    slot = taken(bob)
    with pytest.raises(VmCapacityError, match="max_concurrent_vms is 1"):
        await ann.acquire(timeout=0.05)
    assert ann.within is not None
    assert ann.within.statistics() == (1, 0, 1, 0)
    slot.release()


async def test_a_semaphore_file_that_was_replaced_meanwhile(path: Path) -> None:
    ann, bob = of_user(path, ANN, 1, host=1), of_user(path, BOB, 1, host=1)
    slot = taken(bob)
    waiting = asyncio.create_task(ann.acquire())
    while not ann.statistics().waiting:
        await asyncio.sleep(0.005)
    path.unlink()
    slot.release()
    hers = await waiting
    fresh = of_user(path, ANN, 1, host=1)
    assert fresh.statistics() == (1, 1, 0, 0)
    assert fresh.within is not None
    assert fresh.within.statistics().used == 1
    hers.release()


# --- settings that users may not change ---


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(system: str, user: str = "", **more: Any) -> Settings:
        (tmp_path / "vmkernel").mkdir(exist_ok=True)
        (tmp_path / "system.toml").write_text(system)
        (tmp_path / "vmkernel" / "config.toml").write_text(user)
        environ = {"HOME": "/", "XDG_CONFIG_HOME": str(tmp_path), **more.pop("environ", {})}
        return load_settings_with_sources(
            environ=environ, system_config=tmp_path / "system.toml", **more
        ).settings

    return load


@pytest.mark.parametrize(
    "change",
    [
        {"user": 'network = "open"'},
        {"overrides": {"network": "open"}},
        {"environ": {"VMKERNEL_NETWORK": "open"}},
        {"options": {"network": "open"}},
        {"given": {"network": "open"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_locked_setting_is_changed_by_no_source(load: Any, change: dict, tmp_path: Path) -> None:
    for system in ('locked = ["network"]', 'locked = ["network"]\nnetwork = "packages"'):
        with pytest.raises(SettingsError, match="'network' may not be changed") as caught:
            load(system, **change)
        assert str(tmp_path / "system.toml") in caught.value.message
    assert load("", **change).network == "open"


def test_a_locked_setting_may_be_said_again_and_the_administrator_sets_it(load: Any) -> None:
    system = 'locked = ["memory", "base_images_dir"]\nmemory = "1G"\nimages_dir = "/i"'
    assert load(system, user="memory = 1024", environ={"VMKERNEL_IMAGES_DIR": "/i"}).memory == 1024
    for environ in ({"VMKERNEL_BASE_IMAGES_DIR": "/o"}, {"VMKERNEL_IMAGES_DIR": "/o"}):
        with pytest.raises(SettingsError, match="images_dir"):
            load(system, environ=environ)


@pytest.mark.parametrize("wrong", ['"network"', "3", "[3]", '["netwrok"]'])
def test_a_list_of_locked_settings_that_is_none(load: Any, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="locked") as caught:
        load(f"locked = {wrong}")
    assert caught.value.hint
    (tmp_path / "good.toml").write_text('locked = ["network"]')
    assert locked_settings(tmp_path / "good.toml") == {"network"}


def test_only_the_administrator_locks(load: Any) -> None:
    with pytest.raises(SettingsError, match="no setting 'locked'"):
        load("", user='locked = ["network"]')


def test_what_a_program_made_itself_keeps_to_what_is_locked(tmp_path: Path) -> None:
    system = tmp_path / "system.toml"
    check_locked(Settings(network="open"), system)
    system.write_text('locked = ["network", "memory", "recipe"]\nrecipe = "bash"')
    check_locked(Settings(recipe="bash", memory=700), system)  # a recipe's own memory
    for wrong in (Settings(recipe="bash", network="open"), Settings(recipe="minimal")):
        with pytest.raises(SettingsError, match="the administrator has locked it"):
            check_locked(wrong, system)
    system.write_text('locked = ["memory"]\nmemory = "1G"')
    with pytest.raises(SettingsError, match="it is 1024"):
        check_locked(Settings(memory=2048), system)


# --- what may be taken from where ---


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "store"
    (place / "images").mkdir(parents=True)
    for path in (place, place / "images"):
        path.chmod(0o755)
    return place


def test_a_place_that_only_we_can_change_is_trusted(place: Path) -> None:
    assert shared.distrust(place) == ""
    assert "No such file" in shared.distrust(place / "nothing")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_place_that_others_may_write_to_is_not(place: Path, mode: int) -> None:
    place.chmod(mode)
    assert "others may write" in shared.distrust(place)
    # In a directory like /tmp nobody can put another one in its place
    assert bool(shared.distrust(place / "images")) is (mode != 0o1777)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_a_place_of_another_user_or_below_one_is_not(place: Path) -> None:
    os.chown(place, ANN, ANN)
    assert f"user id {ANN}" in shared.distrust(place)
    assert f"user id {ANN}" in shared.distrust(place / "images")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a link of another user")
def test_nor_is_a_link_that_somebody_else_could_turn(place: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(place)
    assert shared.distrust(link) == ""
    assert shared.distrust(link / "images") == ""
    os.lchown(link, ANN, ANN)
    assert f"user id {ANN}" in shared.distrust(link)
    assert f"user id {ANN}" in shared.distrust(link / "images")


def put_image(directory: Path, release: str) -> None:
    directory.mkdir(parents=True)
    for name in FILES:
        (directory / name).touch()
    manifest = {
        "format": FORMAT, "recipe": {"name": directory.name}, "kernel_release": release,
        "python_version": "3.13.5", "debian_suite": "trixie", "created": "2026-11-22T00:00:00",
        "files": {name: {"size": 0, "sha256": ""} for name in FILES},
    }  # fmt: skip
    content = msgspec.json.encode(msgspec.convert(manifest, Manifest))
    (directory / "manifest.json").write_bytes(content)


def test_ones_own_image_comes_before_the_administrators(place: Path, tmp_path: Path) -> None:
    settings = Settings(images_dir=tmp_path / "own", shared_dir=place)
    put_image(place / "images" / "both", "shared")
    put_image(place / "images" / "theirs", "shared")
    put_image(tmp_path / "own" / "both", "own")
    put_image(tmp_path / "own" / "mine", "own")
    listed = list_images(settings)
    assert [name for name, _ in listed] == ["both", "mine", "theirs"]
    found = {name: find_image(name, settings) for name, _ in listed}
    releases = {name: image.manifest.kernel_release for name, image in found.items()}
    assert releases == {"both": "own", "mine": "own", "theirs": "shared"}
    assert is_shared(found["theirs"], settings)
    assert not is_shared(found["both"], settings)


def test_no_image_is_taken_from_a_place_that_others_may_write_to(
    place: Path, tmp_path: Path
) -> None:
    settings = Settings(images_dir=tmp_path / "own", shared_dir=place)
    put_image(place / "images" / "theirs", "shared")
    assert find_image("theirs", settings).directory == place / "images" / "theirs"
    (place / "images").chmod(0o777)
    assert list_images(settings) == []
    with pytest.raises(ImageError, match="others may write to"):
        find_image("theirs", settings)


def test_an_image_or_file_that_others_may_write_to_is_not_taken(
    place: Path, tmp_path: Path
) -> None:
    settings = Settings(images_dir=tmp_path / "own", shared_dir=place)
    put_image(place / "images" / "theirs", "shared")
    rootfs = place / "images" / "theirs" / "rootfs.erofs"
    rootfs.chmod(0o666)
    with pytest.raises(ImageError, match=r"others may write to rootfs\.erofs"):
        find_image("theirs", settings)
    rootfs.chmod(0o644)
    find_image("theirs", settings)
    rootfs.parent.chmod(0o777)
    with pytest.raises(ImageError, match="There is no image 'theirs'"):
        find_image("theirs", settings)


def test_all_users_agree_on_the_clocks_frequency(tmp_path: Path) -> None:
    ours = host_tsc_khz(tmp_path / "own")
    place = tmp_path / "shared"
    place.mkdir()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def told(khz: int, boot_id: str) -> int:
        (place / "host.json").write_text(f'{{"tsc": {{"khz": {khz}, "boot_id": "{boot_id}"}}}}')
        return host_tsc_khz(tmp_path / "own", place)

    assert told(ours + 5, boot) == ours + 5
    assert told(ours + 5, "an earlier one") == ours + 5, "a measurement's last digits"
    assert told(ours * 2, "another machine's") == ours
    assert told(0, boot) == ours


def test_a_difference_is_told_in_words() -> None:
    made = {"qemu": "7.2", "guest": "a", "format": 2}
    assert differences(made, made) == ""
    assert differences(made, {**made, "qemu": "8"}) == "another version of QEMU"
    assert differences(made, {"guest": "b", "format": 3}) == "another version of vmkernel"


def test_settings_without_a_store_look_nowhere_else(tmp_path: Path) -> None:
    settings = load_settings(environ={"HOME": str(tmp_path)}, system_config=tmp_path / "none")
    assert settings.shared_dir is None
    assert shared.shared_images(settings) is None
    with pytest.raises(ImageError, match=r"no image 'x' in \S+/images\.$"):
        find_image("x", settings)


# --- what is open, in words ---


def test_what_is_open_is_told_by_name_and_never_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.path.realpath(tmp_path)
    monkeypatch.setenv("TOKEN", "hush")
    settings = Settings(
        workspace="rw", network="allow", network_allow=("a.org", "b.org:22"), env=("TOKEN", "GONE")
    )
    found = openings(settings, Label("kernel", directory=here))
    assert found == {
        "workspace": f"rw {here}",
        "network": "allow (packages, a.org, b.org:22)",
        "environment": "TOKEN, GONE (not set)",
        "files": "ask",
    }
    assert in_a_line(found).endswith(", files: ask, variables: TOKEN, GONE (not set)")
    assert in_short(found) == "rw,allow,env"
    # A program's VM has a workspace only where its directory is named
    program = openings(settings, Label(vm_id="vm-00000001", env={"B": "hush", "A": ""}))
    assert (program["workspace"], program["environment"]) == ("none", "A, B")
    named = msgspec.structs.replace(settings, workspace_dir=tmp_path)
    assert openings(named, Label(vm_id="vm-00000001"))["workspace"] == f"rw {here}"
    gone = msgspec.structs.replace(settings, workspace_dir=tmp_path / "gone")
    assert openings(gone, Label())["workspace"].startswith("none: ")
    assert in_short(openings(gone, Label())) == "allow,env"


def test_nothing_is_open_where_all_is_closed() -> None:
    found = openings(Settings(workspace="none", files="off"), Label("kernel"))
    assert in_short(found) == "-"
    assert in_short(dict.fromkeys(found, "")) == "?", "another user's, or an older vmkernel's"
    assert in_a_line(found) == "workspace: none, network: none, files: off"
