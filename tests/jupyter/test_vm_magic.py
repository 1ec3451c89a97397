"""``%vm`` and the banner: a notebook sees which machine it runs in, and nothing it should not."""

import json
import re
from pathlib import Path

import pytest
from kernel_client import Kernel

from vmkernel.host.registry import Registry
from vmkernel.settings import load_settings

pytestmark = pytest.mark.vm


def facts(text: str) -> dict[str, str]:
    """The lines of ``%vm info`` by name."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())


@pytest.mark.parametrize("line", ["%vm", "%vm info"])
def test_vm_shows_what_this_machine_is(kernel: Kernel, line: str) -> None:
    shown = facts(kernel.run(line).stdout)
    assert shown["recipe"] == "minimal"
    assert shown["memory"] == "512 MiB"
    assert shown["accelerator"] in ("kvm", "tcg")
    assert shown["workspace"].startswith("none")
    assert shown["network"] == "none"
    slot, limit = re.fullmatch(r"(\d+) of (\d+)", shown["slot"]).groups()  # type: ignore[union-attr]
    assert 0 <= int(slot) < int(limit) == load_settings().max_concurrent_vms
    assert shown["VM"] == kernel.run("import socket; print(socket.gethostname())").stdout.strip()
    with Registry(load_settings()) as registry:
        assert registry.get(shown["VM"]).slot == int(slot)


def test_the_age_grows(kernel: Kernel) -> None:
    def age() -> int:
        return int(facts(kernel.run("%vm").stdout)["age"].removesuffix(" s"))

    first = age()
    kernel.run("import time; time.sleep(2)")
    assert 2 <= age() - first < 60


def test_help_lists_the_commands(kernel: Kernel) -> None:
    shown = kernel.run("%vm help").stdout
    assert "%vm info" in shown


def test_an_unknown_command_names_those_there_are(kernel: Kernel) -> None:
    cell = kernel.run("%vm fly")
    assert "there is no command 'fly'" in cell.stderr
    assert "info" in cell.stderr


def test_vm_answers_in_a_thread_and_in_the_middle_of_output(kernel: Kernel) -> None:
    cell = kernel.run(
        "import threading\nprint('before')\n"
        "t = threading.Thread(target=get_ipython().run_line_magic, args=('vm', 'help'))\n"
        "t.start(); t.join()\nprint('after')"
    )
    before, _, rest = cell.stdout.partition("%vm")
    assert before == "before\n"
    assert rest.endswith("after\n")


def test_no_magic_tells_the_connections_key(kernel: Kernel) -> None:
    key = Path(kernel.manager.connection_file).read_text()
    assert json.loads(key)["key"]
    for line in ("%connect_info", "%qtconsole", "%vm", "%vm info"):
        cell = kernel.run(line)
        said = cell.stdout + cell.stderr
        assert json.loads(key)["key"] not in said
        assert "jupyter console --existing" in said or line.startswith("%vm")


def test_the_banner_names_the_machine(kernel: Kernel) -> None:
    banner = kernel.request("kernel_info_request").reply["banner"]
    assert "microVM" in banner
    assert "recipe: minimal" in banner
    assert "memory: 512 MiB" in banner
