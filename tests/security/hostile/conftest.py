"""A hostile image, its template, and the rig that attacks are run in."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# --import-mode=importlib does not make a test's own directory importable.
sys.path.insert(0, str(Path(__file__).parents[2] / "jupyter"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.image import make_image
from hostile.rig import Rig, spec
from kernel_client import Kernel

from vmhost import RunningVm, VmHost
from vmkernel.image import store
from vmkernel.settings import load_settings

KERNEL_INFO = {
    "status": "ok",
    "protocol_version": "5.4",
    "implementation": "hostile",
    "implementation_version": "1",
    "language_info": {
        "name": "python",
        "version": "3",
        "mimetype": "text/x-python",
        "file_extension": ".py",
    },
    "banner": "hostile",
    "help_links": [],
    "supported_features": ["kernel subshells"],
}


@pytest.fixture(scope="session")
def hostile_env(template: str, session_dir: Path) -> dict[str, str]:
    """The settings under which kernels run on the hostile image, of which there is a template."""
    images = session_dir / "hostile-images"
    source = store.find_image(template, load_settings())
    env = {
        "VMKERNEL_IMAGES_DIR": str(images),
        "VMKERNEL_RECIPE": make_image(source, images, KERNEL_INFO),
        "VMKERNEL_MEMORY": "256M",
        "VMKERNEL_SCRATCH_SIZE": "64M",
        "VMKERNEL_CONSOLE_LOG_SIZE": "1M",
    }

    async def start_one(host: VmHost) -> None:
        async with RunningVm(host.settings(**env)) as vm:
            assert await vm.run("echo") == "echo"

    asyncio.run(start_one(VmHost(session_dir)))
    return env


@pytest.fixture(scope="module")
def rig(hostile_env: dict[str, str], session_dir: Path) -> Iterator[Rig]:
    """Kernels to attack, on a host of their own, of which nothing may be left."""
    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    host = VmHost(session_dir)
    beside = Kernel(spec(kernels, "beside"), env=host.env)
    try:
        beside.run("1")
        rig = Rig(spec(kernels, "hostile"), host, hostile_env, beside)
        yield rig
        rig.close()
        print(rig.report())
        assert beside_qemu(beside) in host.qemus()
        assert host.slots().used == 1
    finally:
        beside.shut_down()
    assert not host.left()


def beside_qemu(kernel: Kernel) -> int:
    """The pid of a kernel's QEMU."""
    import psutil

    children = psutil.Process(kernel.pid).children(recursive=True)
    (qemu,) = [child for child in children if "qemu" in child.name()]
    return qemu.pid
