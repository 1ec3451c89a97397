"""What every test stands on: a private place on the host, images, kernelspecs, and clean-up.

The session's sockets, records, logs, semaphore file, Jupyter and IPython directories lie in one
directory of its own, so that tests and the user's VMs do not meet. Images and memory templates
are the user's: they are immutable and named by their content, and building them is what costs.

With ``CI=true`` a missing prerequisite is a failure, otherwise a skip.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

import leftovers
from prerequisites import missing
from vmkernel.settings import Settings, load_settings

WaitUntil = Callable[..., None]

_SESSION_DIR = pytest.StashKey[Path]()
_LEFT = pytest.StashKey[list[str]]()
# What a person may rightly set from outside for a whole test run.
_KEPT = {"VMKERNEL_IMAGES_DIR", "VMKERNEL_CACHE_DIR", "VMKERNEL_QEMU", "VMKERNEL_ACCELERATOR"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full``: the counts that an issue promises, where the suite runs fewer."""
    parser.addoption("--full", action="store_true", help="stress tests in full (about an hour)")


def pytest_configure(config: pytest.Config) -> None:
    """Turn the environment to the session's own directory, before any test module is imported."""
    # A short path: a Unix socket's path has 107 bytes at most. Its parent is not pytest's own
    # temporary directory, which is kept for looking into afterwards.
    session_dir = Path(tempfile.mkdtemp(prefix="vmk-test-", dir="/tmp"))
    config.stash[_SESSION_DIR] = session_dir
    for name in list(os.environ):
        if name.startswith("VMKERNEL_") and name not in _KEPT:
            del os.environ[name]
    # The templates are the user's, under a name of the session's: a QEMU has nothing else in its
    # command line that would tell whose it is, should one be left behind.
    cache_dir = load_settings().cache_dir
    cache_dir.mkdir(parents=True, exist_ok=True)
    (session_dir / "cache").symlink_to(cache_dir)
    (session_dir / "config").mkdir()  # Chromium would make it unreadable for other users' tests
    # What the kernels and libraries under test leave in a temporary directory ends with the session
    (session_dir / "tmp").mkdir(mode=0o1777)
    (session_dir / "tmp").chmod(0o1777)
    tempfile.tempdir = None  # ours was looked up already
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/tmp")  # tmp_path outlives a failed test
    os.environ.update(
        TMPDIR=str(session_dir / "tmp"),
        VMKERNEL_CACHE_DIR=str(session_dir / "cache"),
        VMKERNEL_RUNTIME_DIR=str(session_dir / "run"),
        VMKERNEL_STATE_DIR=str(session_dir / "state"),
        VMKERNEL_POOL_SIZE="0",  # the pool has tests of its own
        VMKERNEL_WORKSPACE="none",  # so has the workspace; the rest write where they are
        XDG_CONFIG_HOME=str(session_dir / "config"),
        JUPYTER_CONFIG_DIR=str(session_dir / "jupyter" / "config"),
        JUPYTER_DATA_DIR=str(session_dir / "jupyter" / "data"),
        JUPYTER_RUNTIME_DIR=str(session_dir / "jupyter" / "runtime"),
        JUPYTER_PLATFORM_DIRS="1",
        # Else a kernelspec of the same name in .venv (the demo's) would hide the session's.
        JUPYTER_PREFER_ENV_PATH="0",
        IPYTHONDIR=str(session_dir / "ipython"),
        MPLBACKEND="agg",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A session that leaves something behind has failed, whatever its tests say."""
    left = session.config.stash.setdefault(_LEFT, [])
    left += leftovers.find(session.config.stash[_SESSION_DIR])
    if hasattr(session.config, "workeroutput"):  # one of several processes of pytest-xdist
        session.config.workeroutput["left"] = left
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A process of pytest-xdist has ended; without a word of its own if it died."""
    said = getattr(node, "workeroutput", {"left": [f"a test process died: {error}"]})
    node.config.stash.setdefault(_LEFT, []).extend(said["left"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left behind."""
    left = terminalreporter.config.stash.get(_LEFT, [])
    if left:
        terminalreporter.section("left behind", sep="=", red=True)
        for line in left:
            terminalreporter.line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what was left behind, by process id, and remove the session's directory."""
    session_dir = config.stash.get(_SESSION_DIR, None)
    if session_dir is None:
        return
    for process in leftovers.processes_of(session_dir):
        process.kill()
    leftovers.remove_networks(session_dir)
    shutil.rmtree(session_dir, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failed VM test what the VM and QEMU said: every log written during the test."""
    report = yield
    if call.when == "call" and report.failed:
        for path in _logs_since(Path(os.environ["VMKERNEL_STATE_DIR"]), call.start):
            text = path.read_text(errors="replace").splitlines()
            report.sections.append((f"{path} (last lines)", "\n".join(text[-40:])))
    return report


def _logs_since(state_dir: Path, moment: float) -> list[Path]:
    logs = [path for path in state_dir.rglob("*.log") if path.is_file()]
    return sorted(path for path in logs if path.stat().st_mtime >= moment and path.stat().st_size)


@pytest.fixture(scope="session")
def session_dir(pytestconfig: pytest.Config) -> Path:
    """The session's own directory."""
    return pytestconfig.stash[_SESSION_DIR]


@pytest.fixture
def rounds(pytestconfig: pytest.Config) -> Callable[..., int]:
    """``rounds(quick=20, full=200)``: how often to do what is done many times."""

    def choose(*, quick: int, full: int) -> int:
        return full if pytestconfig.getoption("--full") else quick

    return choose


@pytest.fixture
def settings() -> Settings:
    """The settings that a kernel started by the test has: defaults in the session's directory."""
    return load_settings()


def _image(recipe: str) -> str:
    directory = load_settings().images_dir / recipe
    if not (directory / "manifest.json").is_file():
        missing(f"there is no image {recipe!r}: vmkernel image build {recipe}")
    return recipe


@pytest.fixture(scope="session")
def minimal_image() -> str:
    """The name of the small image, which is there."""
    return _image("minimal")


@pytest.fixture(scope="session")
def template(minimal_image: str, session_dir: Path) -> str:
    """The name of the small image, of which there is a template, too.

    Building one has tests of its own.
    """
    from vmhost import RunningVm, VmHost

    async def start_one(host: VmHost) -> None:
        async with RunningVm(host.settings()):
            pass

    host = VmHost(session_dir)
    asyncio.run(start_one(host))
    host.share_facts()
    return minimal_image


@pytest.fixture(scope="session")
def datascience_image() -> str:
    """The name of the image with numpy, pandas and matplotlib, which is there."""
    return _image("datascience")


@pytest.fixture(scope="session")
def relay_image() -> str:
    """The name of the image with an unmodified ipykernel behind the relay, which is there."""
    return _image("relay")


@pytest.fixture(scope="session")
def bash_image() -> str:
    """The name of the image with a bash kernel, which is there."""
    return _image("bash")


def _kernelspec(name: str, recipe: str, memory: str = "1G") -> str:
    from vmkernel.cli.install import install_kernelspec

    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    # A gigabyte is plenty for tests and halves what a template takes on disk.
    install_kernelspec(kernels, name=name, options={"recipe": recipe, "memory": memory})
    return name


@pytest.fixture(scope="session")
def minimal_kernel(minimal_image: str) -> str:
    """The name of an installed kernelspec on the small image."""
    return _kernelspec("vmsandbox-minimal", minimal_image)


@pytest.fixture(scope="session")
def datascience_kernel(datascience_image: str) -> str:
    """The name of an installed kernelspec on the image with numpy and friends."""
    return _kernelspec("vmsandbox", datascience_image)


@pytest.fixture(scope="session")
def relay_kernel(relay_image: str) -> str:
    """The name of an installed kernelspec of an unmodified ipykernel: the yardstick."""
    # Two processes hold what a cell shows, where the Python engine is one
    return _kernelspec("vmsandbox-relay", relay_image, "1G")


@pytest.fixture(scope="session")
def bash_kernel(bash_image: str) -> str:
    """The name of an installed kernelspec of a bash kernel."""
    return _kernelspec("vmsandbox-bash", bash_image, "512M")


@pytest.fixture
def wait_until() -> WaitUntil:
    """``wait_until(condition, seconds, what)``: poll until it is true, or fail the test."""

    def wait(condition: Callable[[], object], seconds: float = 5.0, what: str = "") -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds:g} s: {what or condition}")
            time.sleep(0.01)

    return wait
