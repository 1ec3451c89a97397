"""The short way of a cell: the same messages, and the same state after it, as the long way."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from enginehost import Engine
from vmkernel.guest import express

CELLS = [
    "1+1", "x = 41", "x + 1", "_", "__", "Out", "In[-2:]", "print('a')", "print('a'); 2", "", "  ",
    "1;", "x = 1; x", "None", "'text'", "b'x'", "1.5", "True", "2j", "[1, 2]", "{'a': 1}",
    "1/0", "def f(:", "  1", "x = ", "raise SystemExit", "f(", "'", "return 1", "yield 1",
    "import sys; print('e', file=sys.stderr)", "for i in range(3): i", "if x: x", "x if x else 0",
    "lambda: 1", "x: int = 3", "__annotations__", "a, *b = 1, 2", "*b,", "print(1) or 5",
    "%pwd", "!echo out", "x?", "%%capture\n1", "# only a comment", "1 # comment",
    "@f\ndef g(): pass",
    "def f():\n    return 5\nf()", "class A: 'doc'", "A()", "del x", "x", "assert 0, 'why'",
    "from __future__ import annotations", "def g(a: nope): pass", "10**5000", "1 is 1", "'\\d'",
    "await __import__('asyncio').sleep(0) or 7", "async def h(): return 1", "await h()",
    "_i, _ii, _iii, _i1", "__import__('os').system('echo by the descriptor') and None",
    "import builtins; builtins._ = 3", "5", "del builtins._", "_ = 'mine'", "6", "_",
    "get_ipython().history_manager.outputs[8]", "display(1)", "display(1); 2", "input", "type(_oh)",
    "sys.stdout.write('no line end')", "get_ipython().set_next_input('next')", "match = 3", "match",
    "raise KeyboardInterrupt", "sys.last_value", "get_ipython().last_execution_succeeded", "ls",
    "get_ipython().last_execution_result.result",
    "[text for _, _, text in get_ipython().history_manager.get_range()][-3:]",
    "x = 1\n\n\ny = 2\n", "x = '''\n  a\n'''\nx", "\n\n1+1", ">>> 1+1", "In [1]: 1+1",
    "[ins]In [1]: 1",
    "é = 1", "é", "globals()['_exit_code']", "1 +\\\n1", "'In [1]: '", "print('%d' % 1)",
    "a = !echo x",
    "get_ipython().execution_count", "import this_is_not_there", "(1\n+ 1)", "1if 1else 2",
]  # fmt: skip
"""One after another in one kernel: later ones show what earlier ones left."""

HOOKED = [
    "ip = get_ipython(); seen = []",
    "def note(name): return lambda *a: seen.append((name, getattr(a[0], 'raw_cell', None) or "
    "getattr(getattr(a[0], 'info', None), 'raw_cell', None) if a else None))",
    "for name in ('pre_execute', 'pre_run_cell', 'post_execute', 'post_run_cell'): "
    "ip.events.register(name, note(name))",
    "1+1", "1/0", "seen", "import ast",
    "class Two(ast.NodeTransformer):\n"
    "    def visit_Constant(self, node):\n"
    "        return ast.copy_location(ast.Constant(2), node) if node.value == 3 else node",
    "ip.ast_transformers.append(Two())", "3", "del ip.ast_transformers[:]", "3",
    "ip.input_transformers_post.append(lambda lines: [s.replace('up', 'down') for s in lines])",
    "'up'", "del ip.input_transformers_post[:]", "'up'",
    "ip.ast_node_interactivity = 'all'", "1\n2", "y = 4", "ip.ast_node_interactivity = 'none'", "7",
    "ip.ast_node_interactivity = 'last_expr_or_assign'", "z = 8",
    "ip.ast_node_interactivity = 'last_expr'", "z = 9",
    "fmt = ip.display_formatter.formatters['text/html']",
    "fmt.for_type(int, lambda n: f'<b>{n}</b>')", "5", "fmt.pop(int)", "5",
    "plain = ip.display_formatter.formatters['text/plain']",
    "plain.for_type(int, lambda n, p, cycle: p.text('int'))", "5", "plain.pop(int)",
    "plain.pprint = False",
    "5", "plain.pprint = True",
    "ip.display_formatter.ipython_display_formatter.for_type(int, lambda n: print('own'))", "5",
    "ip.display_formatter.ipython_display_formatter.pop(int)",
    "usual = ip.run_code",
    "async def mine(*a, **k):\n    print('mine')\n    return await usual(*a, **k)",
    "ip.run_code = mine", "5", "del ip.run_code", "5",
    "import traitlets",
    "ip.observe(lambda change: seen.append(change['new']), 'execution_count')", "seen[:] = []",
    "'a'", "len(seen)",
    "ip.display_trap.hook", "import sys",
    "sys.stdout, out = __import__('io').StringIO(), sys.stdout",
    "print('lost')", "sys.stdout, lost = out, sys.stdout", "lost.getvalue()",
    "ip.displayhook.register_hook(lambda m: None)", "5", "ip.displayhook._hooks.clear()", "5",
    "ip.cache_size = 3", "1", "2", "3", "4",
    "%autocall 1", "str 5", "%autocall 0",
    "%macro -q again 5", "again",
]  # fmt: skip


CHOOSE = (
    "import os; _k = get_ipython().kernel; assert _k.express is not None; "
    "_k.express = _k.express if os.environ['SHORT'] else None"
)


def story(cells: list[str], *, short: bool) -> list[Any]:
    """What a kernel says to these cells."""
    engine = Engine()
    try:
        engine.wake(SHORT="1" if short else "")
        assert [m.msg_type for m in engine.run(CHOOSE)][-2] == "execute_reply"
        return [(code, told(engine.run(code))) for code in cells]
    finally:
        engine.close()


def told(messages: list[Any]) -> list[Any]:
    """Messages without what differs from run to run."""
    texts: list[Any] = []
    for message in messages:
        content = {key: value for key, value in message.content.items() if key != "engine_info"}
        text = json.dumps(content, sort_keys=True)
        text = re.sub(r"0x[0-9a-f]+|(?<=ipykernel_)\d+|[0-9.]+ [nµm\\u00b53bc]*s\b", "N", text)
        texts.append((message.channel, message.msg_type, text))
    return texts


@pytest.fixture(scope="module", params=[CELLS, HOOKED], ids=["cells", "hooks"])
def stories(request: pytest.FixtureRequest) -> tuple[list[Any], list[Any]]:
    return story(request.param, short=True), story(request.param, short=False)


def test_every_cell_says_the_same(stories: tuple[list[Any], list[Any]]) -> None:
    for short, usual in zip(*stories, strict=True):
        assert short == usual


def test_it_was_copied_from_the_ipython_that_is_here() -> None:
    """If not, the long way is taken: read what changed, then change the copy and KNOWN."""
    assert express.fingerprint() == express.KNOWN


def test_another_ipython_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express, "KNOWN", "another")
    assert express.find_express(None) is None
