"""A JupyterLab server, Chromium, and a page: one of each for a module's tests.

With KERNEL_UNDER_TEST=plain the same tests run against plain ipykernel: what they expect of ours
is what a user of JupyterLab sees there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

# --import-mode=importlib does not make a test's own directory importable.
sys.path.insert(0, str(Path(__file__).parent))

from lab import Lab, Notebook, chromium, chromium_path
from lab_server import LabServer
from playwright.sync_api import Browser

from prerequisites import missing

TEMPLATE_PATIENCE = 240
_LAB = pytest.StashKey[Lab]()


@pytest.fixture(scope="session")
def kernel_name(request: pytest.FixtureRequest) -> str:
    """The kernelspec under test, with numpy, matplotlib, pandas and ipywidgets behind it."""
    if os.environ.get("KERNEL_UNDER_TEST") == "plain":
        from ipykernel.kernelspec import install

        install(user=True, kernel_name="plain", display_name="Plain")
        return "plain"
    name = str(request.getfixturevalue("datascience_kernel"))
    # Once, so that the template is there: a test's patience is not for that.
    manager, client = start_new_kernel(kernel_name=name, startup_timeout=TEMPLATE_PATIENCE)
    try:
        client.execute_interactive("1", timeout=TEMPLATE_PATIENCE)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    return name


@pytest.fixture(scope="session")
def server(kernel_name: str, session_dir: Path) -> Iterator[LabServer]:
    """A JupyterLab server for all of tests/browser."""
    root = session_dir / "lab"
    root.mkdir()
    server = LabServer(root, session_dir / "lab.log")
    try:
        yield server
    finally:
        server.stop()


# Not for the session: while playwright's is open, its event loop counts as running, and no test
# with a loop of its own could run.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    path = chromium_path()
    if path is None:
        missing("there is no Chromium: script/setup --browser")
    with chromium(path) as browser:
        yield browser


@pytest.fixture(scope="module")
def lab(browser: Browser, server: LabServer, request: pytest.FixtureRequest) -> Lab:
    """JupyterLab with its launcher in front."""
    lab = Lab(browser.new_page(viewport={"width": 1280, "height": 900}), server)
    request.node.stash[_LAB] = lab
    return lab


@pytest.fixture(scope="module")
def module_notebook(
    lab: Lab, kernel_name: str, request: pytest.FixtureRequest
) -> Iterator[Notebook]:
    """An empty notebook on the kernel under test, shared by the module's tests."""
    notebook = lab.open_notebook(f"{request.path.stem}.ipynb", kernel_name)
    yield notebook
    lab.close_notebook()


@pytest.fixture
def notebook(lab: Lab, module_notebook: Notebook) -> Notebook:
    """The module's notebook, its kernel idle: also after a test that failed half-way."""
    lab.calm_down()
    return module_notebook


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failed test what was on the screen."""
    report = yield
    module = item.getparent(pytest.Module)
    if report.failed and module and (lab := module.stash.get(_LAB, None)):
        picture = Path(item.config.rootpath, "test-output", f"{module.path.stem}-{item.name}.png")
        picture.parent.mkdir(exist_ok=True)
        lab.page.screenshot(path=picture)
        report.sections.append(("the screen", str(picture)))
        report.sections.append(("the page's console", "\n".join(lab.errors)))
        log = lab.server.log.read_text(errors="replace").splitlines()
        report.sections.append(("JupyterLab's log (last lines)", "\n".join(log[-30:])))
    return report
