"""Run ipykernel's own released tests against a kernel of ours.

    python tests/jupyter/ipykernel_suite.py --kernel vmsandbox [--all] [FILE …] [-- PYTEST-OPTION …]

Its source distribution, of the version that is in the image, is fetched by pip into a temporary
directory; nothing of it is kept. The tests start the kernel ``python3``, so a kernelspec of that
name which is the given kernel's shadows the real one. What is left out, and why, is in `LEFT_OUT`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager

from vmkernel.settings import load_settings

FILES = ("test_message_spec.py", "test_async.py", "test_kernel.py")
"""What is run when nothing is named."""

ALL = (*FILES, "test_subshells.py", "test_subshell_wedge.py", "test_debugger.py",
       "test_eventloop.py")  # fmt: skip
"""Every file of the suite that starts a kernel by its name: ``--all``, minutes under emulation."""

LEFT_OUT = {
    "test_kernel.py::test_save_history": "lets the kernel write a file into the test's directory",
    "test_kernel.py::test_print_to_correct_cell_from_thread[none]": (
        "a race between a thread's display() and the next cell: under load lost once in five"
    ),
    "test_kernel.py::test_matplotlib_inline_on_import": "asks for what is not in the small image",
}
"""Tests that a kernel in a machine of its own cannot pass, with the reason."""

# The suite's own options make every warning of every library an error, and allow half a minute.
PYTEST_INI = """
[pytest]
asyncio_mode = auto
timeout = 300
timeout_method = signal
asyncio_default_fixture_loop_scope = function
markers = flaky
"""

# The suite asks for the option of a plugin that is not needed.
CONFTEST = """
def pytest_addoption(parser):
    try:
        parser.addoption("--cov", default=None)
    except ValueError:
        pass  # the plugin is there
"""

# By the same functions as theirs: with the real python3 everything would pass, and prove nothing.
IS_OURS = """
from .utils import start_new_kernel


def test_the_kernel_is_the_one_that_was_meant():
    manager, client = start_new_kernel()
    try:
        reply = client.kernel_info(reply=True, timeout=60)
        assert reply["content"]["implementation"] == {implementation!r}
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
"""


class NoSourcesError(Exception):
    """The source distribution could not be had."""


def image_version(recipe: str = "minimal", package: str = "ipykernel") -> str:
    """The version of *package* in an image, by its list of what is in it."""
    lock = load_settings().images_dir / recipe / "lock.txt"
    found = re.search(rf"^{re.escape(package)}==(\S+)$", lock.read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(f"{lock} does not name {package}")
    return found[1]


def fetch(directory: Path, version: str, package: str = "ipykernel") -> Path:
    """Unpack the tests of a source distribution into *directory*; returns where they are.

    Raises:
        NoSourcesError: pip did not get it.
    """
    requirement = f"{package}=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               f"--no-binary={package}", f"--dest={directory}", requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    archives = sorted(directory.glob("*.tar.gz"))
    if done.returncode or not archives:
        raise NoSourcesError(f"pip could not fetch the sources of {requirement}: {done.stderr}")
    with tarfile.open(archives[0]) as archive:
        # The tests alone: the package itself beside them would be imported instead of what is
        # installed.
        for member in archive.getmembers():
            inner = Path(member.name).parts[1:]
            if inner[:1] == ("tests",):
                member.name = str(Path(*inner))
                archive.extract(member, directory, filter="data")
    return directory / "tests"


def shadow(kernel: str, directory: Path) -> None:
    """Make *kernel* known as python3 below *directory*, a path of JUPYTER_PATH."""
    source = KernelSpecManager().get_kernel_spec(kernel).resource_dir
    shutil.copytree(source, directory / "kernels" / "python3")


def run(
    kernel: str,
    sources: Path,
    files: Sequence[str] = FILES,
    options: Sequence[str] = (),
    implementation: str = "vmsandbox",
) -> subprocess.CompletedProcess[str]:
    """Run the tests in *files* on *kernel*; stdout is pytest's report.

    *sources*: what `fetch` returned.  *implementation*: the kernel's, as its kernel_info has it.
    """
    settings = load_settings()
    directory = sources.parent
    with tempfile.TemporaryDirectory(dir=directory) as share:
        shadow(kernel, Path(share))
        (Path(share) / "ipython" / "profile_default").mkdir(parents=True)  # a test looks for one
        (directory / "pytest.ini").write_text(PYTEST_INI)
        (directory / "conftest.py").write_text(CONFTEST)
        (sources / "test_ours.py").write_text(IS_OURS.format(implementation=implementation))
        left_out = (f"--deselect=tests/{test}" for test in LEFT_OUT)
        paths = (f"tests/{file}" for file in ("test_ours.py", *files))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-ra"]
        command += [*left_out, *paths, *options]
        environment = {
            **os.environ,
            "JUPYTER_PATH": share,
            "IPYTHONDIR": f"{share}/ipython",
            # The suite may give its kernels another home: they find images and templates.
            "VMKERNEL_IMAGES_DIR": str(settings.images_dir),
            "VMKERNEL_CACHE_DIR": str(settings.cache_dir),
            "VMKERNEL_STATE_DIR": str(settings.state_dir),
        }
        for name in ("PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS", "MPLBACKEND"):
            environment.pop(name, None)
        return subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
        )


def main() -> int:
    """The command line; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kernel", default="vmsandbox", help="the kernelspec to be tested")
    parser.add_argument("--implementation", default="vmsandbox", help="as its kernel_info says")
    parser.add_argument("--all", action="store_true", help=f"run {', '.join(ALL)}")
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"instead of {', '.join(FILES)}")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:cut])
    files = arguments.files or (ALL if arguments.all else FILES)
    with tempfile.TemporaryDirectory(prefix="vmk-suite-") as directory:
        sources = fetch(Path(directory), image_version())
        options = words[cut + 1 :]
        done = run(arguments.kernel, sources, files, options, arguments.implementation)
    print(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
