"""The kernel process's command line: ours is read, what front ends append for IPython is borne."""

from pathlib import Path

import pytest

from vmkernel.errors import VmError
from vmkernel.kernel.launch import parse_arguments


def test_settings_and_the_connection_file():
    path, overrides, options = parse_arguments(["-f", "/k.json", "--memory=4G", "--debug"])
    assert path == Path("/k.json")
    assert overrides == {"memory": "4G", "log-level": "debug"}
    assert options == []


@pytest.mark.parametrize(
    "appended",
    [
        ["--HistoryManager.hist_file=:memory:"],
        ["--profile-dir", "/x"],
        ["--quiet"],
        ["--quiet", "--profile-dir", "/x", "--IPKernelApp.matplotlib=inline"],
    ],
)
def test_what_front_ends_append_is_kept_apart(appended):
    path, overrides, options = parse_arguments([*appended, "-f", "/k.json"])
    assert (path, overrides) == (Path("/k.json"), {})
    assert options == [word for word in appended if word.startswith("--")]


@pytest.mark.parametrize(
    "words", [[], ["notebook.ipynb", "-f", "/k.json"], ["-x", "-f", "/k.json"]]
)
def test_a_mistake_is_explained(words):
    with pytest.raises(VmError, match=r"argument|connection file"):
        parse_arguments(words)
