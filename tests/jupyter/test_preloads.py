"""What a recipe preloads is there before the first cell, and is otherwise as if it were not.

The datascience recipe preloads numpy, pandas and matplotlib.pyplot in the template. Most tests ask
the same of plain ipykernel, which has just imported them, and want the same answer; docs/recipes.md
tells what differs. That twins have random numbers of their own is in tests/security/test_twins.py.

A recipe of a user's own is made here from the small image's files: another recipe stands in its
manifest, so that a test costs a boot and not a build.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kernel_client import Kernel, StartKernel

from vmhost import RunningVm, VmHost
from vmkernel.errors import VmError
from vmkernel.image.store import MANIFEST, find_image
from vmkernel.settings import load_settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

IMPORTS = "import numpy, pandas, matplotlib.pyplot"
ADDED = ("PIL", "matplotlib", "mpl_toolkits", "numpy", "pandas")
"""What of the preloads sys.modules has; the rest of what they load is theirs, too."""


@pytest.fixture(scope="module")
def kernel(datascience_kernel: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    """A kernel on the datascience image; its first cell has yet to come."""
    with start_kernel(datascience_kernel) as kernel:
        kernel.run("", silent=True)  # a template's building is told in the first request's output
        yield kernel


@pytest.fixture(scope="module")
def plain(plain_spec: str, start_kernel: StartKernel) -> Iterator[Kernel]:
    """Plain ipykernel on the host."""
    # What MPLBACKEND says to the tests is not for it
    with start_kernel(plain_spec, env={"MPLBACKEND": ""}) as kernel:
        yield kernel


def printed(kernel: Kernel, code: str) -> str:
    """What the code prints, which ends well and says nothing on stderr."""
    cell = kernel.run(textwrap.dedent(code))
    assert cell.status == "ok", cell.traceback
    assert not cell.stderr
    return cell.stdout.strip()


def shown(kernel: Kernel, code: str) -> Any:
    """The value of the JSON text that the code prints."""
    return json.loads(printed(kernel, code))


# --- before anything is imported: the first test of the module, in both kernels ---


@pytest.mark.parametrize(
    "names",
    [
        "dir()",
        "list(globals())",
        "list(vars(__import__('__main__')))",
        "list(get_ipython().user_ns_hidden)",
        "get_ipython().run_line_magic('who_ls', '')",
    ],
)
def test_the_namespace_has_nothing_that_a_plain_one_has_not(
    kernel: Kernel, plain: Kernel, names: str
) -> None:
    code = f"print(__import__('json').dumps({names}))"
    ours, theirs = (
        {name for name in shown(one, code) if not re.fullmatch(r"_i?\d+", name)}  # a cell's: _i3
        for one in (kernel, plain)
    )
    assert ours - theirs == set()


def test_who_says_that_the_namespace_is_empty(kernel: Kernel) -> None:
    assert printed(kernel, "%who") == "Interactive namespace is empty."
    error = kernel.run("numpy").error
    assert error["ename"] == "NameError"


def test_they_are_loaded_before_any_import(kernel: Kernel) -> None:
    loaded = shown(kernel, "import json, sys; print(json.dumps(sorted(sys.modules)))")
    assert {"numpy", "pandas", "matplotlib.pyplot", *ADDED} <= set(loaded)


# --- import, reload, patch ---


def test_an_import_gives_the_module_that_is_loaded(kernel: Kernel) -> None:
    code = f"""
        import sys
        before = dict(sys.modules)
        {IMPORTS}
        from matplotlib import pyplot
        print(numpy is before["numpy"], pandas is before["pandas"],
              pyplot is before["matplotlib.pyplot"] is matplotlib.pyplot,
              len(sys.modules) - len(before))
    """
    assert printed(kernel, code) == "True True True 0"
    assert printed(kernel, "import pandas as pd; print(pd.Series([1, 2]).sum())") == "3"
    assert printed(kernel, "print(pandas.__spec__.origin, pandas.__loader__ is not None)").endswith(
        "pandas/__init__.py True"
    )


def test_a_module_can_be_reloaded(kernel: Kernel) -> None:
    code = """
        import importlib, pandas.io.clipboards, matplotlib.cbook
        for module in (pandas.io.clipboards, matplotlib.cbook):
            module.mine = 1
            old = module.__dict__["to_clipboard" if module is pandas.io.clipboards else "flatten"]
            again = importlib.reload(module)
            new = again.__dict__[old.__name__]
            print(again is module, module.mine, new is old)
    """
    assert printed(kernel, code) == "True 1 False\nTrue 1 False"


def test_a_module_can_be_taken_out_and_imported_afresh(kernel: Kernel) -> None:
    code = """
        import sys, matplotlib
        old = sys.modules.pop("matplotlib.cbook")
        import matplotlib.cbook
        print(matplotlib.cbook is not old, sys.modules["matplotlib.cbook"] is matplotlib.cbook)
        sys.modules["matplotlib.cbook"] = matplotlib.cbook = old
    """
    assert printed(kernel, code) == "True True"


def test_a_patch_is_seen_by_all_and_ends(kernel: Kernel) -> None:
    code = """
        from unittest import mock
        import pandas as pd
        with mock.patch.object(pd.DataFrame, "head", lambda self: "mine"):
            print(pd.DataFrame({"a": [1]}).head(), end=" ")
        print(len(pd.DataFrame({"a": [1]}).head()), end=" ")
        pd.mine = 7
        import pandas
        print(pandas.mine)
        del pd.mine
    """
    assert printed(kernel, code) == "mine 1 7"


def test_a_patch_is_gone_in_the_next_kernel(
    kernel: Kernel, datascience_kernel: str, start_kernel: StartKernel
) -> None:
    """Of which each has its own: nothing goes back to the template."""
    assert printed(kernel, "import numpy; numpy.pi = 3; print(numpy.pi)") == "3"
    with start_kernel(datascience_kernel) as other:
        assert printed(other, "import numpy; print(numpy.pi)") == "3.141592653589793"
        # and a new guest kernel in the same VM, forked from the same parent, is as new
        assert other.run("import os; os._exit(1)").status == "error"
        assert printed(other, f"{IMPORTS}; print(numpy.pi)") == "3.141592653589793"
    assert printed(kernel, "numpy.pi = 3.141592653589793; print(numpy.pi > 3.1)") == "True"


def test_autoreload(kernel: Kernel) -> None:
    """It looks at the preloads, too, and leaves them alone; one's own module is renewed."""
    write = "import pathlib; _ = pathlib.Path('mine_a.py').write_text('value = {}\\n')"
    printed(kernel, write.format(1))
    printed(kernel, "%load_ext autoreload\n%autoreload 2")
    before = shown(
        kernel,
        "import json, mine_a, pandas\nprint(json.dumps([mine_a.value, id(pandas.DataFrame)]))",
    )
    # A file's time has a grain, and autoreload compares times
    printed(kernel, write.format(2) + "; import os; os.utime('mine_a.py', (2e9, 2e9))")
    after = shown(kernel, "print(json.dumps([mine_a.value, id(pandas.DataFrame)]))")
    assert (before[0], after[0]) == (1, 2)
    assert before[1] == after[1]
    printed(kernel, "%autoreload 0")


# --- as if just imported ---


def test_pandas_has_its_defaults(kernel: Kernel, plain: Kernel) -> None:
    code = f"""
        {IMPORTS}
        import json
        options = pandas.describe_option(_print_desc=False)
        names = [line.split()[0] for line in options.splitlines() if line[:1].isalpha()]
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that are deprecated
            print(json.dumps({{name: repr(pandas.get_option(name)) for name in names}}))
    """
    ours, theirs = shown(kernel, code), shown(plain, code)
    assert len(ours) > 40
    for found in (ours, theirs):
        found["display.encoding"] = found["display.encoding"].upper()
    assert ours == theirs


def test_a_wide_frame_is_shown_as_in_a_plain_kernel(kernel: Kernel, plain: Kernel) -> None:
    """pandas asks at its import whether it is in a notebook, and in the template there is none."""
    code = "import pandas as pd; pd.DataFrame([range(50)] * 100)"
    for mime in ("text/plain", "text/html"):
        ours, theirs = (
            one.run(code).contents("execute_result")[0]["data"][mime] for one in (kernel, plain)
        )
        if mime == "text/plain":
            assert ours == theirs
        assert ours.count("<td>") == theirs.count("<td>")


@pytest.mark.parametrize(
    "what",
    [
        "numpy.get_printoptions()",
        "numpy.geterr()",
        "sorted(str(found) for found in __import__('warnings').filters)",
        "[sorted(__import__('logging').root.manager.loggerDict) != [],"
        " str(__import__('logging').root.handlers), __import__('logging').root.level]",
        "__import__('decimal').getcontext().prec",
        "[__import__('gc').isenabled(), __import__('sys').getrecursionlimit()]",
        "matplotlib.pyplot.get_fignums()",
        "sorted(set(get_ipython().events.callbacks))",
    ],
)
def test_it_is_as_after_an_import_in_a_plain_kernel(
    kernel: Kernel, plain: Kernel, what: str
) -> None:
    code = f"{IMPORTS}\nimport json, sys\nprint(json.dumps({what}))"
    assert shown(kernel, code) == shown(plain, code)


def test_warnings_are_shown_once_and_where_they_belong(kernel: Kernel, plain: Kernel) -> None:
    """That a module has warned in the template must not keep it from warning here."""
    code = """
        import numpy as np
        np.array([1.0]) / 0
        np.log(-1)
    """
    for one in (kernel, plain):
        said = one.run(textwrap.dedent(code)).stderr
        assert said.count("divide by zero") == said.count("invalid value") == 1, said


# --- matplotlib ---


def test_a_figure_is_displayed_inline(kernel: Kernel) -> None:
    # The tests' own environment names another backend, which a guest is given
    code = "import matplotlib; matplotlib.use('module://matplotlib_inline.backend_inline')"
    printed(kernel, code)
    cell = kernel.run(
        "import matplotlib.pyplot as plt\n"
        "fig, ax = plt.subplots()\nax.plot([3, 1, 2])\nax.set_title('Größe → ½ α')\nplt.show()"
    )
    assert cell.status == "ok"
    assert not cell.stderr  # no font is missing, no cache is built
    (picture,) = cell.contents("display_data")
    assert picture["data"]["image/png"].startswith("iVBOR")
    assert printed(kernel, "print(plt.get_fignums())") == "[]"


def test_inline_is_the_backend_without_a_word(
    datascience_kernel: str, start_kernel: StartKernel
) -> None:
    """In a kernel of its own: the front end says nothing of a backend, and a cell neither."""
    with start_kernel(datascience_kernel, env={"MPLBACKEND": ""}) as kernel:
        code = "import matplotlib; print(matplotlib.get_backend())"
        assert printed(kernel, code) in ("inline", "module://matplotlib_inline.backend_inline")
        cell = kernel.run("import matplotlib.pyplot as plt; plt.plot([1, 2])")
        assert next(iter(cell.contents("display_data")))["data"]["image/png"]
        assert not cell.stderr
        # its parameters are the defaults: the template's rehearsal has left nothing
        code = """
            import json, matplotlib as mpl
            print(json.dumps(sorted(name for name in mpl.rcParams
                  if mpl.rcParams[name] != mpl.rcParamsDefault[name])))
        """
        assert set(shown(kernel, code)) <= {"interactive", "backend"}


def test_fonts_are_known_without_a_search(kernel: Kernel) -> None:
    code = """
        import json, time
        from matplotlib import font_manager
        path = font_manager.findfont("DejaVu Sans", fallback_to_default=False)
        print(json.dumps([path, len(font_manager.fontManager.ttflist)]))
    """
    path, known = shown(kernel, code)
    assert path.endswith("DejaVuSans.ttf")
    assert known > 30


# --- a recipe of one's own ---


Recipes = Callable[..., VmHost]


@pytest.fixture
def recipe(session_dir: Path, minimal_image: str) -> Recipes:
    """``recipe(preload=[…])``: a host whose image "mine" is the small one, with that recipe."""
    small = find_image(minimal_image, load_settings())

    def make(**changes: Any) -> VmHost:
        host = VmHost(session_dir, own_cache=True)
        directory = host.directory / "images" / "mine"
        directory.mkdir(parents=True)
        for name in small.manifest.files:
            os.symlink(small.directory / name, directory / name)
        changed = msgspec.structs.replace(small.recipe, name="mine", **changes)
        manifest = msgspec.structs.replace(small.manifest, recipe=changed)
        (directory / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        host.env |= {
            "VMKERNEL_IMAGES_DIR": str(directory.parent),
            "VMKERNEL_RECIPE": "mine",
        }
        return host

    return make


async def _run(host: VmHost, code: str) -> Any:
    # With a network: its port is a clone's whose template was made by this very process
    async with RunningVm(host.settings(VMKERNEL_NETWORK="packages")) as vm:
        return await vm.run(code)


def test_a_recipe_of_ones_own_preloads(recipe: Recipes) -> None:
    host = recipe(preload=("fractions", "xml.dom.minidom"))
    code = "import sys; print([n in sys.modules for n in ('fractions', 'xml.dom.minidom', 'cgi')])"
    assert "[True, True, False]" in str(asyncio.run(_run(host, code)))


def test_a_preload_that_fails_is_named(recipe: Recipes) -> None:
    """Turtles need Tk, which the image has not: found by name, and not to be imported."""
    with pytest.raises(VmError) as caught:
        asyncio.run(_run(recipe(preload=("turtle",)), "1"))
    said = caught.value.explain()
    assert "turtle" in said
    assert "No module named" in said
    assert "preload" in said
