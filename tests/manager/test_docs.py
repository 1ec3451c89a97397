"""docs/manager.md is whole, and its examples do what it says."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import vmkernel
from vmhost import VmHost

PAGE = Path(__file__).parents[2] / "docs" / "manager.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.vm
async def test_the_examples_run_one_after_another(
    host: VmHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in host.env.items():
        monkeypatch.setenv(name, value)
    assert len(EXAMPLES) >= 5
    names: dict[str, Any] = {}
    for number, example in enumerate(EXAMPLES):
        code = compile(
            example, f"example {number + 1}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        running = eval(code, names)
        if running is not None:
            await running
    assert host.left() == []
    assert host.records() == []


def public_members(thing: type) -> list[str]:
    """What a user may call or read on it, inherited from a class of ours included."""
    return [name for name in vars(thing) if not name.startswith("_")]


@pytest.mark.parametrize("name", vmkernel.__all__)
def test_each_public_name_and_its_members_are_on_the_page(name: str) -> None:
    text = PAGE.read_text()
    thing = getattr(vmkernel, name)
    assert re.search(rf"`{name}\b", text), name
    assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
    if name == "Settings":  # has a page of its own, made from the settings
        return
    members = public_members(thing) if inspect.isclass(thing) else []
    missing = [member for member in members if not re.search(rf"`[^`\n]*\b{member}\b", text)]
    assert not missing, f"{name}: {missing}"
    for member in members:
        found = inspect.getattr_static(thing, member)
        if inspect.isfunction(found) or isinstance(found, property):
            assert inspect.getdoc(found), f"{name}.{member} has no docstring"


def test_each_public_name_is_type_checked_in_use() -> None:
    used = (PAGE.parents[1] / "tests" / "typing" / "api.py").read_text()
    assert not [name for name in vmkernel.__all__ if not re.search(rf"\b{name}\b", used)]


def test_the_page_names_no_error_that_there_is_not() -> None:
    named = set(
        re.findall(
            r"`((?:Vm|Settings|Image|Template|Registry|Protocol)\w*Error)`", PAGE.read_text()
        )
    )
    public = {name: getattr(vmkernel, name) for name in vmkernel.__all__}
    errors = {name for name, thing in public.items() if inspect.isclass(thing)}
    assert named == {name for name in errors if issubclass(public[name], Exception)}


def test_what_the_page_says_of_signatures_is_so() -> None:
    """Each parameter of a public method is named in the line of the page that is about it."""
    text = PAGE.read_text()
    for thing, method in [
        (vmkernel.Scheduler, "run"),
        (vmkernel.SchedulerConfig, "__init__"),
        (vmkernel.VmManager, "create_vm"),
        (vmkernel.VmManager, "start_vm"),
        (vmkernel.VmManager, "stop_vm"),
        (vmkernel.VmManager, "list_vms"),
        (vmkernel.VmHandle, "run"),
    ]:
        shown = "SchedulerConfig" if method == "__init__" else method
        calls = re.findall(rf"{shown}\((?!\))(.*?)\)`", text, re.DOTALL)
        parameters = set(inspect.signature(getattr(thing, method)).parameters) - {"self"}
        assert any(parameters <= set(re.findall(r"\w+", call)) for call in calls), (method, calls)
