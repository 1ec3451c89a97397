"""jupyter_kernel_test, the protocol's own suite, with everything in it that ipykernel passes."""

from __future__ import annotations

import jupyter_kernel_test
import pytest

# ruff: noqa: RUF012, PT009  (the suite's own style: a unittest class with plain attributes)
pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.fixture(scope="class", autouse=True)
def spec(small_spec: str, request: pytest.FixtureRequest) -> None:
    assert request.cls is not None
    request.cls.kernel_name = small_spec


class TestKernel(jupyter_kernel_test.KernelTests):
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; sys.stderr.write('oh')"
    completion_samples = [
        {"text": "zi", "matches": {"zip"}},
        {"text": "import itertool", "matches": {"itertools"}},
    ]
    complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"]
    incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2"]
    invalid_code_samples = ["import = 7q"]
    code_page_something = "zip?"
    code_generate_error = "raise"
    code_execute_result = [
        {"code": "1+2+3", "result": "6"},
        {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"},
    ]
    code_display_data = [
        {"code": "from IPython.display import HTML, display; display(HTML('<b>b</b>'))",
         "mime": "text/html"},
        {"code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))",
         "mime": "text/latex"},
    ]  # fmt: skip
    # "1?2*" finds "1+2+3"
    code_history_pattern = "1?2*"
    supported_history_operations = ("tail", "range", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"

    def test_this_is_ours(self) -> None:
        """The suite's default is ipykernel: it must not be that which passed."""
        self.kc.kernel_info()
        reply = self.kc.get_shell_msg(timeout=60)
        self.assertEqual(reply["content"]["implementation"], "vmsandbox")


class TestWelcome(jupyter_kernel_test.IopubWelcomeTests):
    support_iopub_welcome = True

    def test_this_is_ours(self) -> None:
        self.assertEqual(self.km.kernel_name, "vmsandbox-small")
