"""Guests reach no host of their cluster: not the one they run on, nor what `network_deny` names.

Ray's and ZeroMQ's ports of a cluster listen on the hosts' addresses; who reaches Ray's runs code.
"""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prerequisites import missing
from vmkernel.errors import SettingsError
from vmkernel.network.dial import Dialer
from vmkernel.network.policy import Policy, RefusedError
from vmkernel.settings import load_settings

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    """What a VM's proxy answers on a host with public and private addresses, and a neighbour."""
    if shutil.which("ip") is None:
        missing("iproute2 is not installed")
    unshare = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        missing("this machine allows no network namespaces")
    script = str(Path(__file__).with_name("two_nodes.py"))
    done = subprocess.run(
        [*unshare, sys.executable, script], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_the_hosts_own_public_address_is_never_reached(found: dict[str, Any]) -> None:
    for name, answers in found.items():
        assert answers["203.0.114.1"] == 403, name
        assert answers["10.213.99.1"] == 403, name
        assert answers["arrived here"] == 0, name


def test_the_neighbour_would_be_reached_without_the_setting(found: dict[str, Any]) -> None:
    # Else the next test would show nothing
    assert found["open"]["203.0.114.2"] == 200
    assert found["open"]["10.213.99.2"] == 403
    assert found["allow"]["203.0.114.2"] == found["allow"]["10.213.99.2"] == 200
    assert found["allow"]["arrived"] >= 3


def test_the_neighbour_is_not_reached_with_it(found: dict[str, Any]) -> None:
    for name in ("open, denied", "allow, denied"):
        answers = found[name]
        reached = {key: answers[key] for key in ("203.0.114.2", "10.213.99.2", "mapped", "http")}
        assert set(reached.values()) == {403}, (name, reached)
        assert answers["arrived"] == 0, name


async def test_a_name_of_a_denied_address_is_refused() -> None:
    async def look_up(host: str, port: int) -> list[str]:
        return ["203.0.114.9"]

    dialer = Dialer(Policy("open", (), ["203.0.114.0/24"]), look_up)
    with pytest.raises(RefusedError, match="network_deny"):
        await dialer.connect("node.example", 6379)
    # Nor where a package index says that a file is there
    with pytest.raises(RefusedError, match="network_deny"):
        await dialer.connect_beside("index.example", "node.example", 80, "")


def test_no_form_of_a_denied_address() -> None:
    policy = Policy("allow", ["203.0.114.9:80"], ["203.0.114.9", "2001:4860::/32"])
    for text in ("203.0.114.9", "::ffff:203.0.114.9", "64:ff9b::203.0.114.9", "2001:4860::8888"):
        with pytest.raises(RefusedError, match="network_deny"):
            policy.judge_address(ipaddress.ip_address(text), 80)
    policy.judge_address(ipaddress.ip_address("203.0.114.10"), 80)


def test_an_entry_that_is_no_network_is_an_error_and_not_a_hole() -> None:
    for text in ("10.0.0.5/8", "node.example", "10.0.0.0/33", "10.0.0.1:6379", "*"):
        with pytest.raises(SettingsError, match="network_deny"):
            load_settings(options={"network_deny": text})
    settings = load_settings(options={"network_deny": "10.0.0.0/8, 2001:db8::/32"})
    assert settings.network_deny == ("10.0.0.0/8", "2001:db8::/32")
