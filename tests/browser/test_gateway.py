"""JupyterLab on a hub, a stock Jupyter Server as gateway, kernels on a VM host that Ray chooses.

Three network namespaces; Chromium runs in the hub's, and gets nowhere else by itself.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, Notebook, chromium, chromium_path
from lab_server import LabServer
from playwright.sync_api import expect

from netcluster import SUBNET, NetCluster, why_not
from prerequisites import missing
from vmhost import seconds_until

pytestmark = [
    pytest.mark.browser, pytest.mark.vm, pytest.mark.cluster, pytest.mark.timeout(400)
]  # fmt: skip

GATEWAY_PORT = 8888
SPEC = "vmsandbox-ray"


@pytest.fixture(scope="module")
def cluster(session_dir: Path, kernel_name: str) -> Iterator[NetCluster]:
    """A gateway and one VM host, with the image that plots need."""
    from vmkernel.cli.install import install_kernelspec

    if reason := why_not():
        missing(f"no cluster in namespaces: {reason}")
    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    install_kernelspec(kernels, name=SPEC, options={}, on_hosts=kernel_name)
    # The kernelspec's own recipe and memory hold
    env = {"VMKERNEL_RECIPE": "", "VMKERNEL_MEMORY": ""}
    with NetCluster(session_dir, [2], **env) as cluster:
        yield cluster
    assert not cluster.left()


@pytest.fixture(scope="module")
def gateway(cluster: NetCluster, session_dir: Path) -> Iterator[str]:
    """A stock Jupyter Server on the node without slots; its token."""
    token = secrets.token_hex(16)
    root = session_dir / "gateway"
    root.mkdir()
    env = {"VMKERNEL_CLUSTER_ADDRESS": cluster.address, "JUPYTER_TOKEN": token}
    log = session_dir / "gateway.log"
    with log.open("wb") as output:
        server = cluster.gateway.popen(
            sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root",
            f"--ServerApp.ip={SUBNET}.1", f"--ServerApp.port={GATEWAY_PORT}",
            f"--ServerApp.root_dir={root}", "--ServerApp.terminals_enabled=False",
            "--ServerApp.allow_remote_access=True",
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=root, env=env,
        )  # fmt: skip
    probe = f"exec 3<>/dev/tcp/{SUBNET}.1/{GATEWAY_PORT}"
    try:
        listens = lambda: cluster.hub.run("bash", "-c", probe).returncode == 0  # noqa: E731
        assert seconds_until(listens, 60) < 60, log.read_text()
        yield token
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
        print(log.read_text(errors="replace")[-4000:])  # shown when a test failed


@pytest.fixture(scope="module")
def lab(
    cluster: NetCluster, gateway: str, session_dir: Path, request: pytest.FixtureRequest
) -> Iterator[Lab]:
    """JupyterLab on the hub, whose kernels are the gateway's."""
    path = chromium_path()
    if path is None:
        missing("there is no Chromium: script/setup --browser")
    root = session_dir / "hub"
    root.mkdir()
    # Playwright speaks with it over pipes; all that Chromium connects to is on the hub
    wrapper = root.parent / "chromium-on-hub"
    wrapper.write_text(f'#!/bin/sh\nexec ip netns exec {cluster.hub.namespace} {path} "$@"\n')
    wrapper.chmod(0o700)
    server = LabServer(
        root, session_dir / "hub.log", command=cluster.hub.command,
        options=[f"--gateway-url=http://{SUBNET}.1:{GATEWAY_PORT}",
                 f"--GatewayClient.auth_token={gateway}"],
    )  # fmt: skip
    try:
        with chromium(str(wrapper)) as browser:
            yield Lab(browser.new_page(viewport={"width": 1280, "height": 900}), server)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def module_notebook(lab: Lab) -> Iterator[Notebook]:
    """A notebook on the cluster."""
    notebook = lab.open_notebook("elsewhere.ipynb", SPEC)
    yield notebook
    lab.close_notebook()


def test_a_notebook_runs_on_a_host_that_the_browser_does_not_know(
    lab: Lab, notebook: Notebook, cluster: NetCluster
):
    cell = notebook.run(
        "import matplotlib.pyplot as plt\n"
        "plt.figure(figsize=(5, 2)); plt.plot([1, 4, 9, 16]); print('drawn')"
    )
    picture = cell.box.locator("img[src^='data:image/png']")
    assert picture.evaluate("img => img.decode().then(() => img.naturalWidth)") > 200
    assert "drawn" in cell.text
    (host,) = cluster.hosts
    assert host.vms.slots().used == 1
    assert cluster.gateway.vms.qemus() == []


def test_it_is_interrupted_and_restarted(lab: Lab, notebook: Notebook, cluster: NetCluster):
    busy = notebook.start("import time\nkept = 1\ntime.sleep(300)")
    expect(busy.prompt).to_have_text("[*]:")
    lab.page.wait_for_timeout(1000)
    notebook.panel.press("Escape")
    lab.command("notebook:interrupt-kernel")
    assert "KeyboardInterrupt" in busy.finish().text
    assert notebook.run("kept").text == "1"
    restart = lab.page.evaluate_handle(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"
    )
    restart.dispose()
    notebook.wait_idle()
    assert notebook.run("'kept' in globals()").text == "False"
    (host,) = cluster.hosts
    assert host.vms.slots().used == 1


def test_input_asks_in_the_browser(notebook: Notebook):
    cell = notebook.start("print('hello', input('who? '))")
    box = cell.box.locator(".jp-Stdin-input")
    box.fill("world")
    box.press("Enter")
    assert "hello world" in cell.finish().text
