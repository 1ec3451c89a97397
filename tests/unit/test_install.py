"""Kernelspecs: what is written, where, and what is refused; and the wheel that brings it all."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager

import vmkernel
from vmkernel.cli.install import (
    install_kernelspec,
    installed_kernelspecs,
    is_ours,
    uninstall_kernelspec,
)
from vmkernel.errors import SettingsError, VmError

ROOT = Path(__file__).parents[2]
LAUNCHER = str(Path(vmkernel.__file__).absolute().parent / "pool" / "launcher.py")


def _spec(directory: Path) -> dict:
    return json.loads((directory / "kernel.json").read_text())


def test_a_kernelspec_starts_this_python_and_says_only_what_was_given(tmp_path):
    target = install_kernelspec(tmp_path)
    assert target == tmp_path / "vmsandbox"
    assert _spec(target) == {
        "argv": [sys.executable, "-S", "-P", LAUNCHER, "-f", "{connection_file}"],
        "display_name": "Python (microVM)",
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {"debugger": True, "supported_encryption": ["curve"]},
    }


def test_a_kernel_of_a_cluster_is_jupyters_provisioners(tmp_path):
    target = install_kernelspec(tmp_path, options={"recipe": "bash"}, on_hosts="vmsandbox")
    assert target == tmp_path / "vmsandbox-ray-bash"
    spec = _spec(target)
    assert spec["display_name"] == "Bash (microVM, cluster)"
    assert spec["interrupt_mode"] == "message"
    assert spec["metadata"]["supported_encryption"] == ["curve"]
    assert spec["metadata"]["kernel_provisioner"] == {
        "provisioner_name": "vmkernel-ray",
        "config": {"kernel_name": "vmsandbox", "options": {"recipe": "bash"}},
    }
    target = install_kernelspec(tmp_path, options={"cluster_wait": "5m"}, on_hosts="mine")
    assert (target.name, is_ours(target)) == ("vmsandbox-ray", True)
    assert _spec(target)["display_name"] == "Python (microVM, cluster)"
    with pytest.raises(SettingsError, match="cluster_address"):
        install_kernelspec(tmp_path, options={"cluster_address": "head"}, on_hosts="mine")
    # Where the provisioner is ignored, the command line says so
    argv = [str(tmp_path / "c.json") if word.startswith("{") else word for word in spec["argv"]]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "kernel provisioner 'vmkernel-ray'" in done.stderr
    assert "What to do: use it from Jupyter" in done.stderr


def test_another_recipe_brings_its_name_and_language(tmp_path):
    target = install_kernelspec(tmp_path, options={"recipe": "bash"})
    assert target == tmp_path / "vmsandbox-bash"
    spec = _spec(target)
    assert spec["argv"][6:] == ["--recipe=bash"]
    assert (spec["display_name"], spec["language"]) == ("Bash (microVM)", "bash")
    assert spec["interrupt_mode"] == "message"  # the wrapper's; the guest's kernel gets its own
    assert spec["metadata"]["debugger"] is False


def test_the_command_follows_the_recipe_as_well(tmp_path):
    def installed(*words: str) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", "from vmkernel.cli.app import main; main()", "install",
             "--prefix", tmp_path, *words],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return Path(done.stdout.rpartition(" in ")[2].strip())

    target = installed("--recipe", "bash")
    assert target == tmp_path / "share/jupyter/kernels/vmsandbox-bash"
    assert installed("--recipe=bash", "--name=shell", "--display-name=Sh").name == "shell"
    assert _spec(target.with_name("shell"))["display_name"] == "Sh"
    assert _spec(target.with_name("shell"))["language"] == "bash"
    assert installed("--recipe=datascience").name == installed().name == "vmsandbox"
    assert installed("--recipe=no-image-yet").name == "vmsandbox-no-image-yet"


def test_options_become_the_command_line(tmp_path):
    options = {"memory": "4G", "vcpus": "2", "queue_timeout": "5m"}
    target = install_kernelspec(tmp_path, name="big", display_name="Größer", options=options)
    spec = _spec(target)
    assert spec["argv"][6:] == ["--memory=4G", "--vcpus=2", "--queue-timeout=5m"]
    assert spec["display_name"] == "Größer"


def test_modules_beside_the_notebook_do_not_run_on_the_host(tmp_path):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for name in ("vmkernel", "msgspec", "asyncio", "zmq", "logging", "signal"):
        (notebooks / f"{name}.py").write_text("open('ran on the host', 'w').close()\n")
    argv = _spec(install_kernelspec(tmp_path / "kernels"))["argv"]
    argv[argv.index("{connection_file}")] = str(notebooks / "no such connection file")
    done = subprocess.run(argv, cwd=notebooks, capture_output=True, text=True, timeout=60)
    assert "cannot be used" in done.stderr
    assert not (notebooks / "ran on the host").exists()


def test_jupyter_finds_it_with_its_logos(tmp_path):
    target = install_kernelspec(Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels", name="found")
    try:
        spec = KernelSpecManager().get_kernel_spec("found")
        assert Path(spec.resource_dir) == target
        for size in (32, 64):
            png = (target / f"logo-{size}x{size}.png").read_bytes()
            # PNG's header: signature, IHDR, then width and height, big-endian.
            assert png[:8] == b"\x89PNG\r\n\x1a\n"
            assert struct.unpack(">II", png[16:24]) == (size, size)
        assert (target / "logo-svg.svg").read_text().startswith("<svg")
        assert installed_kernelspecs()["found"] == target
    finally:
        uninstall_kernelspec("found")
    assert "found" not in installed_kernelspecs()


def test_installing_again_replaces_and_leaves_nothing_between(tmp_path):
    install_kernelspec(tmp_path, options={"memory": "1G"})
    install_kernelspec(tmp_path, options={"memory": "2G"})
    assert _spec(tmp_path / "vmsandbox")["argv"][6:] == ["--memory=2G"]
    assert [path.name for path in tmp_path.iterdir()] == ["vmsandbox"]


def test_a_wrong_option_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SettingsError, match="'memory' is 'lots'"):
        install_kernelspec(tmp_path / "kernels", options={"memory": "lots"})
    with pytest.raises(SettingsError, match="no setting 'memroy'"):
        install_kernelspec(tmp_path / "kernels", options={"memroy": "1G"})
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "Capitals", "spa ce", "x" * 101])
def test_a_wrong_name_is_refused(tmp_path, name):
    with pytest.raises(SettingsError, match="cannot be a kernel's name"):
        install_kernelspec(tmp_path, name=name)


def test_another_kernel_is_neither_replaced_nor_removed(tmp_path):
    other = tmp_path / "python3"
    other.mkdir()
    (other / "kernel.json").write_text('{"argv": ["python3", "-m", "ipykernel_launcher"]}')
    with pytest.raises(VmError, match="another kernel"):
        install_kernelspec(tmp_path, name="python3")
    with pytest.raises(VmError, match="no kernelspec 'python3' of vmkernel"):
        uninstall_kernelspec("python3", tmp_path)
    assert (other / "kernel.json").exists()


def test_uninstalling_what_is_not_there_says_what_is(tmp_path):
    install_kernelspec(Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels", name="there")
    try:
        with pytest.raises(VmError, match="no kernelspec 'nowhere'") as caught:
            uninstall_kernelspec("nowhere")
        assert "there (" in caught.value.hint
    finally:
        uninstall_kernelspec("there")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a directory nobody can write")
def test_a_place_that_cannot_be_written_is_a_clear_error():
    with pytest.raises(VmError, match="cannot be written") as caught:
        install_kernelspec(Path("/proc/vmkernel/kernels"))
    assert "--user" in caught.value.hint


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel, built from this checkout without a network."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, ROOT],
        check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_brings_recipes_and_kernelspec_and_works(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert "vmkernel/_resources/kernelspec/kernel.json" in names
    assert "vmkernel/_resources/images/minimal.toml" in names
    assert not [name for name in names if name.startswith("tests/")]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index",
         "--target", tmp_path / "site", wheel],
        check=True, timeout=100,
    )  # fmt: skip
    # -S -I would also drop the dependencies; a path in front of the editable install suffices.
    done = subprocess.run(
        [sys.executable, "-c",
         "import vmkernel, sys\n"
         "from vmkernel.resources import resource_dir\n"
         "from vmkernel.cli.app import main\n"
         "print(resource_dir('images'))\n"
         f"main(['install', '--prefix', {str(tmp_path / 'prefix')!r}])"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site" / "vmkernel"))
    installed = tmp_path / "prefix" / "share" / "jupyter" / "kernels" / "vmsandbox"
    assert (installed / "logo-svg.svg").exists()
