"""The choice of the accelerator by proof, with real guests: a /dev/kvm that lies is found out.

The machines of this project have such a device (DESIGN 5): QEMU aborts with ``-cpu host``, and
spins without a word with other CPU models. Where KVM works, these tests have nothing to show.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel_client import Kernel

from vmhost import Sampler, VmHost
from vmkernel.vm.accel import kvm_problem
from vmkernel.vm.qemu import find_qemu

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

StartKernel = Callable[..., Kernel]

PROMISED = 30.0
"""Seconds, at most, from the first start to a guest under TCG, with the template at hand."""


@pytest.fixture
def host(session_dir: Path, minimal_image: str) -> Iterator[VmHost]:
    """A host that knows nothing of its accelerator."""
    if problem := kvm_problem():
        pytest.skip(f"nothing to be deceived by: {problem}")
    host = VmHost(session_dir)
    (host.state_dir / "accelerator.json").unlink(missing_ok=True)
    yield host
    assert host.left() == []


@pytest.fixture
def start(host: VmHost) -> Iterator[StartKernel]:
    """``start(env)``: a kernel on that host; all are shut down at the end."""
    from vmkernel.cli.install import install_kernelspec

    kernels_dir = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    install_kernelspec(kernels_dir, name="vmsandbox-accelerator", options={})
    kernels: list[Kernel] = []

    def start(**env: str) -> Kernel:
        environ = {**host.env, "VMKERNEL_ACCELERATOR": "auto", **env}
        kernel = Kernel("vmsandbox-accelerator", env=environ)
        kernels.append(kernel)
        return kernel

    yield start
    for kernel in kernels:
        kernel.shut_down()


def make_template(host: VmHost, start: StartKernel) -> None:
    """See to it that there is one for TCG, without learning anything about KVM."""
    start(VMKERNEL_ACCELERATOR="tcg").run("", seconds=400)
    assert not (host.state_dir / "accelerator.json").exists()


def verdict_of(host: VmHost) -> dict[str, Any]:
    """The one verdict that is remembered; skips the test where KVM keeps its word."""
    (verdict,) = json.loads((host.state_dir / "accelerator.json").read_text()).values()
    if verdict["works"]:
        pytest.skip(f"KVM works here: {verdict['evidence']}")
    answer: dict[str, Any] = verdict
    return answer


def under_kvm(sampler: Sampler) -> int:
    """How many VMs were tried with KVM."""
    return sum("-accel kvm" in line for line in sampler.seen.values())


def doctor(host: VmHost, **env: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and the check of the accelerator."""
    done = host.cli("doctor", "--json", **{"VMKERNEL_ACCELERATOR": "auto", **env})
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    return done.returncode, checks["accelerator"]


def test_a_device_that_lies_is_found_out_once(host: VmHost, start: StartKernel) -> None:
    make_template(host, start)
    assert "not tried yet" in doctor(host)[1]["found"]
    began = time.monotonic()
    with Sampler(host) as first:
        kernel = start()
        assert kernel.run("6 * 7").result == "42"
    took = time.monotonic() - began
    verdict = verdict_of(host)
    assert took < PROMISED
    assert under_kvm(first) == 1
    assert "accelerator: tcg" in kernel.request("kernel_info_request").reply["banner"]

    with Sampler(host) as second:
        assert start().run("6 * 7").result == "42"
    assert under_kvm(second) == 0
    assert verdict_of(host) == verdict

    status, check = doctor(host)
    assert (status, check["state"]) == (0, "warning")
    assert verdict["evidence"].split("\n")[0] in check["found"]


def test_one_that_says_nothing_is_given_up_in_time(
    host: VmHost, start: StartKernel, tmp_path: Path
) -> None:
    """A guest that spins for ever: here that is what CPU models other than the host's do."""
    qemu = tmp_path / "qemu-system-x86_64"
    real = find_qemu("qemu-system-x86_64", os.environ["PATH"])
    qemu.write_text(
        "#!/bin/bash\n"
        'words=("$@")\n'
        'for i in "${!words[@]}"; do [[ ${words[i]} == host ]] && words[i]=qemu64; done\n'
        f'exec {real} "${{words[@]}}"\n'
    )
    qemu.chmod(0o755)
    make_template(host, start)
    began = time.monotonic()
    with Sampler(host) as sampler:
        assert start(VMKERNEL_QEMU=str(qemu)).run("6 * 7").result == "42"
    took = time.monotonic() - began
    verdict = verdict_of(host)
    if "within" in verdict["evidence"]:  # silence, and not an error: it may have been the load
        assert took > 15
        assert verdict["expires"] > time.time()
    assert took < PROMISED
    assert under_kvm(sampler) == 1


def test_kvm_that_was_demanded_is_refused_with_the_evidence(
    host: VmHost, start: StartKernel
) -> None:
    kernel = start(VMKERNEL_ACCELERATOR="kvm")
    cell = kernel.run("6 * 7")
    verdict = verdict_of(host)
    for _ in range(2):
        assert cell.error["ename"] == "VmBootError"
        assert "KVM was asked for and does not work" in cell.error["evalue"]
        assert verdict["evidence"].split("\n")[0] in cell.error["evalue"]
        assert "VMKERNEL_ACCELERATOR=auto" in cell.traceback
        assert kernel.request("kernel_info_request").status == "ok"
        with Sampler(host) as sampler:
            cell = kernel.run("6 * 7")
        assert not sampler.seen, "it is known by now"

    status, check = doctor(host, VMKERNEL_ACCELERATOR="kvm")
    assert (status, check["state"]) == (1, "missing")
    assert "KVM was asked for and does not work" in check["found"]
    assert "VMKERNEL_ACCELERATOR=auto" in check["remedy"]
