"""The variables that a guest is given: by name, from a file, and which it cannot be given."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmkernel import environment
from vmkernel.environment import LARGEST_FILE, Variables, in_words, parse, plain, read_file
from vmkernel.errors import SettingsError
from vmkernel.pool import handover
from vmkernel.settings import Settings

SECRET = "s3cr3t-value"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secrets"
    path.write_text(f"TOKEN={SECRET}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A=1\nB = 2 \n\n# C=3\n  export\tD=4", {"A": "1", "B": "2", "D": "4"}),
        ("A=", {"A": ""}),
        ("A= # nothing", {"A": ""}),
        ("A=#1", {"A": ""}),
        ("A=a#b c  # said", {"A": "a#b c"}),
        ("A='a # b'", {"A": "a # b"}),
        (r"A='a\nb\'", {"A": "a\\nb\\"}),
        (r'A="a\nb \"c\" \\ \$d \e" # said', {"A": 'a\nb "c" \\ $d \\e'}),
        ("A=a=b==", {"A": "a=b=="}),
        ("A=$HOME/${X}", {"A": "$HOME/${X}"}),
        ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
        ("A=1\nA=2", {"A": "2"}),
        ("A=ü€", {"A": "ü€"}),
        ("", {}),
    ],
)
def test_a_file_of_variables(text: str, found: dict[str, str]) -> None:
    assert parse(text) == found


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (SECRET, "line 2 is not NAME=value"),
        (f"1A={SECRET}", "line 2: what stands before the = is not a variable's name"),
        (f"{SECRET} {SECRET}=x", "line 2: what stands before the = is not"),
        (f"A='{SECRET}", "line 2 (A): the quote is not closed in this line"),
        (f'A="{SECRET}\\"', "line 2 (A): the quote is not closed in this line"),
        (f"A='{SECRET}'{SECRET}", "line 2 (A): something stands after the closing quote"),
        (f"LD_PRELOAD={SECRET}", "line 2: LD_PRELOAD cannot be given to a guest: it is the guest"),
        (
            f"https_proxy={SECRET}",
            "line 2: https_proxy cannot be given to a guest: the setting `ne",
        ),
        (f"A={SECRET}\0", "it is not text"),
    ],
)
def test_a_mistake_names_the_line_and_never_the_value(file: Path, line: str, why: str) -> None:
    file.write_text(f"GOOD={SECRET}\n{line}\n")
    with pytest.raises(SettingsError) as caught:
        read_file(file)
    assert why in str(caught.value)
    assert str(file) in str(caught.value)
    assert SECRET not in caught.value.explain()
    assert SECRET not in repr(caught.value.__cause__)
    assert caught.value.__cause__ is None  # whose words could quote it


def test_bytes_that_are_no_text(file: Path) -> None:
    file.write_bytes(b"A=" + SECRET.encode() + b"\xff\n")
    with pytest.raises(SettingsError, match="not text") as caught:
        read_file(file)
    assert caught.value.__context__ is None or SECRET not in repr(caught.value.__context__)


VALUES = st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]))


@given(st.dictionaries(st.from_regex(r"[A-Z][a-z0-9]{0,8}_X", fullmatch=True), VALUES))
@example({"A_X": "'"})
@settings(max_examples=60, deadline=None)
def test_what_is_quoted_comes_back(variables: dict[str, str]) -> None:
    for quote in ('"', "'"):
        lines = []
        for name, value in variables.items():
            if quote == '"':
                value = value.replace("\\", "\\\\").replace('"', '\\"')
            elif "'" in value:
                continue
            lines.append(f"{name}={quote}{value}{quote}")
        if quote == '"':
            assert parse("\n".join(lines)) == variables
        else:
            assert parse("\n".join(lines)).items() <= variables.items()


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_taken_or_told_by_its_line(text: str) -> None:
    try:
        found = parse(text)
    except ValueError as error:
        message = str(error)
    else:
        message = "line"
        assert all("\n" not in name for name in found)
    assert message.startswith(("line", "it is not text"))


def test_a_shell_reads_the_same(tmp_path: Path) -> None:
    text = 'export A=\'x # y\'\nB="a\\"b\\$c\\\\"\nC=plain#word # said\n# D=1\n'
    (tmp_path / "f").write_text(text)
    said = subprocess.run(
        ["sh", "-c", f"set -a; . {shlex.quote(str(tmp_path / 'f'))}; env -0"],
        capture_output=True, text=True, check=True, env={},
    ).stdout  # fmt: skip
    by_shell = dict(item.split("=", 1) for item in said.split("\0") if item)
    assert parse(text).items() <= by_shell.items()
    assert len(parse(text)) == 3


def test_the_file_is_its_owners_alone(file: Path, tmp_path: Path) -> None:
    assert read_file(file) == {"TOKEN": SECRET}
    for mode in (0o604, 0o602, 0o606, 0o660 if os.geteuid() == 0 else 0o640):
        file.chmod(mode)
        with pytest.raises(SettingsError, match=f"mode {mode:04o}") as caught:
            read_file(file)
        assert caught.value.hint == f"chmod 600 {file}"
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    assert read_file(tmp_path / "link") == {"TOKEN": SECRET}
    os.mkfifo(tmp_path / "fifo", 0o600)
    for odd in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(SettingsError, match="no ordinary file"):
            read_file(odd)
    with pytest.raises(SettingsError, match="No such file"):
        read_file(tmp_path / "none")
    file.write_bytes(b"A=" + b"x" * LARGEST_FILE)
    with pytest.raises(SettingsError, match="more than 256 KiB"):
        read_file(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_not_taken(file: Path) -> None:
    os.chown(file, 12345, 12345)
    with pytest.raises(SettingsError, match="belongs to user id 12345"):
        read_file(file)


def test_what_is_given(file: Path) -> None:
    found, missing = environment.given(
        ("A", "TOKEN", "GONE"), file, {"A": "1", "B": "2", "TOKEN": "mine"}
    )
    assert found == {"A": "1", "TOKEN": "mine"}
    assert missing == ["GONE"]
    assert environment.given(("TOKEN",), file, {}) == ({"TOKEN": SECRET}, [])
    for value in ("x" * (64 << 10), "\1" * (11 << 10)):  # which is sent as \u0001
        with pytest.raises(SettingsError, match="more than 64 KiB"):
            environment.given(("A",), None, {"A": value})


def test_a_value_that_is_no_text_is_told_by_its_name_alone() -> None:
    with pytest.raises(SettingsError, match=r"TOKEN .* is not text") as caught:
        environment.given(["TOKEN"], None, {"TOKEN": os.fsdecode(b"s3cret\xff")})
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "s3cret" not in repr(caught.value)


def test_values_are_in_nothing_that_is_shown(file: Path) -> None:
    found = read_file(file)
    assert SECRET not in f"{found!r} {found} {[found]}"
    assert SECRET not in repr(found | {"A": "1"}) or type(found | {}) is dict
    assert isinstance(found, Variables)
    words = in_words(("TOKEN", "GONE"), None, {"TOKEN": SECRET})
    assert words == "TOKEN, GONE (not set)"
    assert in_words(("TOKEN",), file, {}) == f"TOKEN, those of {file}"
    assert in_words((), None, {}) == ""


@pytest.mark.parametrize(
    "name",
    "PATH HOME LD_PRELOAD LD_LIBRARY_PATH PYTHONPATH PYTHONHOME http_proxy HTTPS_PROXY no_proxy "
    "PIP_INDEX_URL SSL_CERT_FILE VMKERNEL_ENV BASH_ENV IFS TMPDIR XDG_RUNTIME_DIR A-B A=x".split(),
)
def test_names_that_a_guest_cannot_be_given(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(env=("API_KEY", name))
    assert repr(name.partition("=")[0]) in str(caught.value)


def test_a_value_in_the_setting_is_not_told() -> None:
    from vmkernel.settings import load_settings

    with pytest.raises(SettingsError) as caught:
        load_settings({}, {"VMKERNEL_ENV": f"TOKEN={SECRET}", "HOME": "/"})
    assert SECRET not in caught.value.explain()
    assert load_settings({}, {"VMKERNEL_ENV": "A, B_2 A", "HOME": "/"}).env == ("A", "B_2")


def test_launcher_and_vmkernel_know_the_same_plain_variables() -> None:
    assert {name.decode() for name in handover.PLAIN} == environment.PLAIN
    assert tuple(p.decode() for p in handover.PLAIN_PREFIXES) == environment.PLAIN_PREFIXES
    environ = {"PATH": "/bin", "LC_ALL": "C", "API_KEY": SECRET, "XDG_X": "1"}
    assert plain(environ) == {"PATH": "/bin", "LC_ALL": "C", "XDG_X": "1"}
