"""The house keeps its floors: who may import whom, and how little a start imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_a_floor_imports_only_floors_below_it():
    done = _run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout


def _modules_after(statement: str) -> set[str]:
    done = _run(sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules, sep='\\n')")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "vmkernel.settings", "vmkernel.host.capacity", "vmkernel.host.registry",
        "vmkernel.host.start", "vmkernel.vm.template", "vmkernel.image.store",
    ],
)  # fmt: skip
def test_the_start_path_imports_nothing_heavy(module):
    heavy = {
        "IPython", "click", "importlib.metadata", "ipykernel", "jsonschema", "jupyter_client",
        "jupyter_core", "psutil", "pydantic", "sqlite3", "tornado", "traitlets",
    }  # fmt: skip
    assert not heavy & _modules_after(f"import {module}")


def test_help_and_version_import_no_subcommand():
    loaded = _modules_after(
        "import contextlib\n"
        "from vmkernel.cli.app import main\n"
        "for words in (['--help'], ['--version']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):\n"
        "        main(words)"
    )
    ours = {name for name in loaded if name.startswith("vmkernel.")}
    assert ours == {"vmkernel.cli", "vmkernel.cli.app", "vmkernel.errors"}


def test_an_import_reads_no_configuration():
    """What importing the package opens: code, and nothing of the user's."""
    done = _run(
        sys.executable, "-c",
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, a: opened.append(str(a[0])) if event == 'open' else None)\n"
        "import vmkernel.settings, vmkernel.host.start, vmkernel.cli.app\n"
        "print(*opened, sep='\\n')",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    strange = [
        path for path in done.stdout.split() if "/.config/" in path or path.endswith(".toml")
    ]
    assert not strange


def test_every_module_says_what_it_is():
    import ast

    for path in sorted((ROOT / "vmkernel").rglob("*.py")):
        text = path.read_text()
        if not text.strip():
            pytest.fail(f"{path} is empty: not even a docstring")
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
