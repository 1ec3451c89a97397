"""Settings: each source, their order, and what a wrong value says."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkernel.errors import SettingsError
from vmkernel.settings import (
    FIELDS,
    Settings,
    dump_settings,
    ensure_private_dir,
    load_settings,
    load_settings_with_sources,
    restore_settings,
)
from vmkernel.values import parse_seconds, parse_size

ENV = {"HOME": "/home/someone"}


@pytest.fixture
def load(tmp_path: Path):
    """``load(system=…, user=…, overrides=…, **environ)`` with files of the test's own."""

    def load(system: str = "", user: str = "", overrides: dict | None = None, **environ: str):
        (tmp_path / "vmkernel").mkdir(exist_ok=True)
        (tmp_path / "system.toml").write_text(system)
        (tmp_path / "vmkernel" / "config.toml").write_text(user)
        return load_settings_with_sources(
            overrides,
            {**ENV, "XDG_CONFIG_HOME": str(tmp_path), **environ},
            system_config=tmp_path / "system.toml",
        )

    return load


def test_defaults():
    settings = load_settings(environ=ENV, system_config=Path("/nonexistent/config.toml"))
    assert settings.recipe == "datascience"
    assert settings.memory == 2048
    assert settings.queue_timeout is None
    assert settings.images_dir == Path("/home/someone/.local/share/vmkernel/images")
    assert settings.cache_dir == Path("/home/someone/.cache/vmkernel")
    assert settings.state_dir == Path("/home/someone/.local/state/vmkernel")
    assert settings.runtime_dir == Path(f"/tmp/vmkernel-{os.getuid()}")
    assert settings.semaphore_file == settings.runtime_dir / "slots"
    assert settings.history == "on"
    assert settings.history_file == settings.state_dir / "history.sqlite"
    assert 2 <= settings.max_concurrent_vms <= 256


def test_every_setting_is_described_and_typed():
    assert set(FIELDS) == set(Settings.__struct_fields__) == set(get_type_hints(Settings))
    for field in FIELDS.values():
        assert field.allowed
        assert field.meaning.endswith(".")


def test_each_source_wins_over_the_one_before(load):
    sources: list[tuple[dict, int, str]] = [
        ({"system": "memory = 1000"}, 1000, "system.toml, key 'memory'"),
        ({"user": 'memory = "2G"'}, 2048, "config.toml, key 'memory'"),
        ({"overrides": {"memory": "3G"}}, 3072, "kernelspec option --memory"),
        ({"VMKERNEL_MEMORY": "4096"}, 4096, "environment variable VMKERNEL_MEMORY"),
    ]
    given_so_far: dict = {}
    for source, value, name in sources:
        given_so_far |= source
        loaded = load(**given_so_far)
        assert loaded.settings.memory == value
        assert loaded.sources["memory"].endswith(name)
    assert "vcpus" not in loaded.sources


def test_an_empty_environment_variable_counts_as_unset(load):
    assert load(VMKERNEL_MEMORY="").settings.memory == 2048


def test_xdg_directories_and_home(load):
    settings = load(
        XDG_DATA_HOME="/data",
        XDG_RUNTIME_DIR="/run/user/7",
        XDG_CACHE_HOME="relative/is/ignored",
        VMKERNEL_STATE_DIR="~/state",
    ).settings
    assert settings.images_dir == Path("/data/vmkernel/images")
    assert settings.semaphore_file == Path("/run/user/7/vmkernel/slots")
    assert settings.cache_dir == Path("/home/someone/.cache/vmkernel")
    assert settings.state_dir == Path("~/state").expanduser()


def test_a_semaphore_file_may_lie_elsewhere(load):
    settings = load(system='semaphore_file = "/var/lib/vmkernel/slots"').settings
    assert settings.semaphore_file == Path("/var/lib/vmkernel/slots")


@pytest.mark.parametrize(
    "name", ["semaphore_file", "database_file", "history_file", "runtime_dir", "base_images_dir"]
)
def test_a_lock_without_a_value_that_the_environment_decides_is_refused(load, name):
    # The default would follow VMKERNEL_RUNTIME_DIR or XDG_RUNTIME_DIR, and nothing be locked
    with pytest.raises(SettingsError, match="has no value in that file"):
        load(system=f'locked = ["{name}"]')
    loaded = load(system=f'{name} = "/srv/place"\nlocked = ["{name}"]', XDG_RUNTIME_DIR="/tmp/mine")
    field = name.removeprefix("base_")
    assert getattr(loaded.settings, field) == Path("/srv/place")
    assert load(system='locked = ["network"]').settings.network == "none"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", "2X"), ("memory", "63M"), ("memory", "-1"), ("memory", "1.0001G"),
        ("memory", "nan"), ("memory", "1e3"), ("memory", "9999T"), ("memory", "1 2"),
        ("vcpus", "0"), ("vcpus", "1.5"), ("vcpus", "two"), ("vcpus", "1_0"),
        ("scratch_size", "G"),
        ("accelerator", "hvf"),
        ("outputs", "unsafe"), ("outputs", "all"),
        ("max_concurrent_vms", "0"), ("max_concurrent_boots", "-3"),
        ("semaphore_file", "slots"), ("images_dir", "./images"),
        ("queue_timeout", "soon"), ("start_timeout", "0"), ("boot_timeout", "-1s"),
        ("console_log_size", "0"),
        ("qemu", " "),
        ("recipe", "../etc"), ("recipe", "UPPER"), ("recipe", "."), ("recipe", "a" * 65),
        ("cluster_address", "head"), ("cluster_address", "head:0"), ("cluster_address", "a:99999"),
        ("cluster_address", "ray://head:10001"), ("cluster_address", "a b:1"),
        ("cluster_wait", "soon"), ("cluster_lease", "1"), ("cluster_lease", "none"),
        ("log_level", "loud"),
        ("history", "maybe"), ("history_file", "history.sqlite"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_the_setting_its_source_and_what_is_allowed(load, name, value):
    variable = f"VMKERNEL_{name.upper()}"
    with pytest.raises(SettingsError) as caught:
        load(**{variable: value})
    message = str(caught.value)
    assert repr(name) in message
    assert repr(value) in message
    assert f"environment variable {variable}" in message
    assert FIELDS[name].allowed in message
    assert variable in caught.value.hint


@pytest.mark.parametrize(
    "text", ["memory = true", "memory = [1]", "vcpus = 2.0", "recipe = 7", "qemu = {a = 1}"]
)
def test_a_wrong_type_in_a_file_names_the_file(load, tmp_path, text):
    with pytest.raises(SettingsError, match=r"config\.toml, key"):
        load(user=text)


def test_an_unknown_name_is_an_error_with_a_guess(load):
    with pytest.raises(SettingsError, match=r"no setting 'memroy'.*Did you mean 'memory'\?"):
        load(user="memroy = 1")
    with pytest.raises(SettingsError, match=r"VMKERNEL_MAX_VMS.*max_vms_per_user"):
        load(VMKERNEL_MAX_VMS="2")
    with pytest.raises(SettingsError, match="no setting 'xyzzy'"):
        load(overrides={"xyzzy": "1"})


def test_files_that_cannot_be_read(load, tmp_path):
    with pytest.raises(SettingsError, match=r"system\.toml is not valid TOML.*line 1"):
        load(system="memory = \nvcpus = 1")
    (tmp_path / "vmkernel").mkdir(exist_ok=True)
    (tmp_path / "vmkernel" / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(environ={**ENV, "XDG_CONFIG_HOME": str(tmp_path)})
    (tmp_path / "directory.toml").mkdir()
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(environ=ENV, system_config=tmp_path / "directory.toml")


def test_values_handed_in_by_a_program_are_checked_too(tmp_path):
    assert Settings(runtime_dir=tmp_path).semaphore_file == tmp_path / "slots"
    with pytest.raises(SettingsError, match="'vcpus' is 0"):
        Settings(vcpus=0)
    with pytest.raises(SettingsError, match="'runtime_dir'"):
        Settings(runtime_dir=Path("relative"))


@pytest.mark.parametrize(
    ("text", "mebibytes"),
    [("2048", 2048), (2048, 2048), ("512M", 512), ("2G", 2048), ("2 GiB", 2048), ("1.5gb", 1536),
     (0.5, None), ("1T", 1024**2), (True, None), (None, None), ("", None), ("M", None),
     ("0x10", None)],
)  # fmt: skip
def test_sizes(text, mebibytes):
    if mebibytes is None:
        with pytest.raises(ValueError, match="not a"):
            parse_size(text)
    else:
        assert parse_size(text) == mebibytes


def test_a_switch(load):
    assert load(user="history = false").settings.history == "off"
    assert load(user='history = "off"', VMKERNEL_HISTORY="On").settings.history == "on"
    assert load(overrides={"history": "off"}).settings.history == "off"


def test_where_a_cluster_answers(load):
    for text in ("ray-head:6379", "10.0.0.1:6379", "[fd00::1]:6379", "head.example.org:1"):
        assert load(VMKERNEL_CLUSTER_ADDRESS=f" {text} ").settings.cluster_address == text
    assert load(user='cluster_address = "Auto"').settings.cluster_address == "auto"


def test_durations(load):
    assert [parse_seconds(text) for text in ("90", "90s", "2.5", "5m", "1 h", 0)] == [
        90, 90, 2.5, 300, 3600, 0,
    ]  # fmt: skip
    assert load(user='queue_timeout = "none"').settings.queue_timeout is None
    assert load(user="queue_timeout = 0").settings.queue_timeout == 0


@given(st.sampled_from(sorted(FIELDS)), st.text(max_size=20) | st.integers() | st.floats())
def test_any_value_is_either_taken_or_a_settings_error(name, value):
    text = str(value)
    if "\0" in text or any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        return
    try:
        load_settings({name: text}, ENV, system_config=Path("/nonexistent/config.toml"))
    except SettingsError as error:
        assert error.hint  # noqa: PT017 - any other exception must fail the test


def test_private_directory(tmp_path):
    wanted = tmp_path / "a" / "b"
    assert ensure_private_dir(wanted) == wanted
    assert stat.S_IMODE(wanted.stat().st_mode) == 0o700
    assert ensure_private_dir(wanted) == wanted


def test_a_directory_that_is_not_private_is_refused(tmp_path):
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o750)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch()
    for path, why in ((loose, "0750"), (link, "a link"), (dangling, "a link|cannot be made"),
                      (file, "no directory|cannot be made")):  # fmt: skip
        with pytest.raises(SettingsError, match=why) as caught:
            ensure_private_dir(path)
        assert "VMKERNEL_RUNTIME_DIR" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_a_directory_of_another_user_is_refused(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 12345, 12345)
    with pytest.raises(SettingsError, match="user id 12345"):
        ensure_private_dir(theirs)


def test_the_reference_page_is_up_to_date():
    from vmkernel.cli.settings import settings_page

    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == settings_page(), "vmkernel settings --markdown > docs/settings.md"


def test_base_images_dir_is_another_name_of_images_dir(tmp_path: Path) -> None:
    settings = Settings(base_images_dir=tmp_path)
    assert settings.images_dir == tmp_path
    other = msgspec.structs.replace(settings, images_dir=tmp_path / "other")
    assert other.images_dir == tmp_path / "other"
    environ = {"VMKERNEL_BASE_IMAGES_DIR": str(tmp_path)}
    assert load_settings(environ=environ).images_dir == tmp_path
    assert restore_settings(dump_settings(settings)) == settings


def test_a_path_that_may_be_missing() -> None:
    assert Settings(kernel_path=None).kernel_path is None
    assert load_settings(environ={"VMKERNEL_KERNEL_PATH": "none"}).kernel_path is None
    with pytest.raises(SettingsError):
        load_settings(environ={"VMKERNEL_KERNEL_PATH": "vmlinuz"})
