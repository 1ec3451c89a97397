"""The wall around QEMU: what hostile code that is master of its process can still do.

``broken_out.py`` runs in QEMU's place, started as QEMU is, with the same descriptors.  Each of its
attacks fails behind the wall; and goes well without, where this user may do such a thing at all, so
that the test can fail.  The real QEMU is looked at in ``test_wall_qemu.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prerequisites import missing

RIG = Path(__file__).with_name("wall_rig.py")
REPOSITORY = Path(__file__).parents[2]
SOMEBODY = 4242
Results = dict[str, tuple[bool, str]]

ATTACKS = re.findall(
    r"^@attack\ndef (\w+)", RIG.with_name("broken_out.py").read_text(), re.MULTILINE
)
# What only root could do in the first place
ROOTS = {
    "become_root", "load_bpf", "mount_something", "read_the_kernels_log", "read_the_passwords",
    "watch_performance", "write_a_sysctl", "write_the_ram",
}  # fmt: skip
# What only the filter stops: nothing of it leads to another process's or user's data
FILTERED = {
    "give_its_slot_back", "handle_page_faults", "keep_a_key", "leave_for_another_user_namespace",
    "make_memory_files", "open_a_netlink_socket", "send_a_datagram", "set_up_io_uring",
    "share_system_v_memory", "start_a_process", "take_another_slot",
}  # fmt: skip
# What the start of each QEMU sees to, behind the wall or not (tests/vm/test_qemu.py), or the kernel
EVER = {
    "find_more_descriptors", "find_words_in_the_environment", "leave_a_core_dump", "raise_a_limit"
}  # fmt: skip


@pytest.fixture(scope="module", params=["root", "somebody"])
def user(request: pytest.FixtureRequest) -> str:
    """Who starts VMs."""
    me = "root" if os.geteuid() == 0 else "somebody"
    if request.param != me and me != "root":
        pytest.skip("only root can become another user")
    return str(request.param)


@pytest.fixture(scope="module")
def results(user: str, session_dir: Path) -> dict[str, Results]:
    """Of all attacks, behind the wall and without."""
    if not Path("/usr/bin/bwrap").exists():
        missing("bubblewrap is not installed")
    session_dir.chmod(0o711)  # to be passed through
    found = {}
    for around in ("wall", "namespaces", "nothing"):
        place = session_dir / f"broken-{user}-{around}"
        place.mkdir()
        setuid = place / "setuid"
        if os.geteuid() == 0:
            shutil.copy("/usr/bin/id", setuid)
            setuid.chmod(0o4755)
        command = [sys.executable, str(RIG), str(place), str(setuid), around]
        if user == "somebody" and os.geteuid() == 0:
            os.chown(place, SOMEBODY, SOMEBODY)
            become = ["setpriv", f"--reuid={SOMEBODY}", f"--regid={SOMEBODY}", "--clear-groups"]
            command = [*become, *command]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.startswith("{"), (done.stdout, done.stderr)
        found[around] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("attack", ATTACKS)
def test_behind_the_wall_it_fails(results: dict[str, Results], attack: str) -> None:
    well, seen = results["wall"][attack]
    assert not well, seen


def test_the_namespaces_alone_keep_it_from_the_host(results: dict[str, Results]) -> None:
    """The filter is a layer over them, and no replacement."""
    can = {name: seen for name, (well, seen) in results["namespaces"].items() if well}
    assert can.keys() <= FILTERED, can


def test_without_the_wall_they_go_well(results: dict[str, Results], user: str) -> None:
    cannot = {name for name, (well, _) in results["nothing"].items() if not well}
    expected = EVER | (set() if user == "root" else ROOTS)
    if os.geteuid() != 0:
        expected |= {"run_a_setuid_program"}
    assert cannot <= expected, {name: results["nothing"][name] for name in cannot - expected}
    assert len(ATTACKS) - len(cannot) >= 40
