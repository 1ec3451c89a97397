# A notebook of ordinary work, a cell after each "# %%" line. test_notebook_equals_plain.py runs it
# on plain ipykernel and in a microVM and compares the outputs, so a cell shows nothing that differs
# from one run to the next (times, addresses), and nothing that differs between Python versions.
# ruff: noqa

# %%
import asyncio
import os
import subprocess
import sys
import threading

import numpy as np
import pandas as pd

rng = np.random.default_rng(2024)

# %%
frame = pd.DataFrame(
    {
        "day": pd.date_range("2026-01-01", periods=12, freq="D"),
        "city": ["Bern", "Oslo", "Rome"] * 4,
        "celsius": rng.normal(10, 5, 12).round(2),
    }
)
frame

# %%
frame.describe()

# %%
frame.groupby("city")["celsius"].agg(["mean", "min", "max"]).round(3)

# %%
frame.pivot_table(index="day", columns="city", values="celsius").head(4)

# %%
frame.info()

# %%
frame.style.highlight_max(subset=["celsius"]).set_uuid("fixed")

# %%
np.linspace(0, 1, 5).reshape(-1, 1) @ np.ones((1, 3))

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(3, 2))
frame.groupby("city")["celsius"].mean().plot.bar(ax=ax, title="mean")
plt.tight_layout()

# %%
plt.plot([1, 4, 9])
plt.show()
print("after the figure")
fig, ax = plt.subplots(figsize=(2, 1))
_ = ax.scatter(rng.random(20), rng.random(20))

# %%
for n in range(3):
    print("line", n)
"the value"

# %%
print("to stdout")
print("to stderr", file=sys.stderr)
print("to stdout again")

# %%
def depth(n):
    if n == 0:
        raise ValueError("the bottom")
    return depth(n - 1)


depth(2)

# %%
{}["missing"]

# %%
this is not python

# %%
try:
    1 / 0
except ZeroDivisionError as error:
    raise RuntimeError("wrapped") from error

# %%
import warnings

warnings.simplefilter("always")
assert 1 + 1 == 3, "arithmetic"

# %%
for n in range(50_000):
    print(n, "x" * 30)

# %%
print("y" * 1_000_000)

# %%
subprocess.run(["echo", "from a child"], check=True)
subprocess.run("echo to its stderr >&2; exit 3", shell=True).returncode

# %%
!echo shell $((6 * 7))

# %%
lines = !printf 'one\ntwo\n'
lines

# %%
%%bash
for word in a b; do echo "bash $word"; done
echo "and stderr" >&2

# %%
%%capture captured
print("kept back")
42

# %%
captured.stdout, len(captured.outputs)

# %%
%%writefile note.txt
written by a magic

# %%
with open("note.txt") as file:
    text = file.read()
os.remove("note.txt")
text

# %%
%env VMKERNEL_NOTEBOOK=yes

# %%
os.environ["VMKERNEL_NOTEBOOK"], !echo $VMKERNEL_NOTEBOOK

# %%
results = []


def work(n):
    results.append(n * n)
    print("worker", n)


for n in range(3):
    thread = threading.Thread(target=work, args=(n,))
    thread.start()
    thread.join()
results

# %%
async def later(n):
    await asyncio.sleep(0.01 * n)
    return n


await asyncio.gather(later(3), later(1), later(2))

# %%
task = asyncio.create_task(later(1))

# %%
await task

# %%
from IPython.display import HTML, JSON, Image, Latex, Markdown, clear_output, display, update_display

display(Markdown("**bold**"), HTML("<i>html</i>"), Latex("$x^2$"), JSON({"a": [1, 2]}))

# %%
shown = display("first", display_id="an-id")
update_display("second", display_id="an-id")

# %%
for n in range(3):
    clear_output(wait=True)
    print("progress", n)

# %%
class Rich:
    def _repr_html_(self):
        return "<b>rich</b>"

    def _repr_png_(self):
        return b"\x89PNG\r\n\x1a\n"

    def __repr__(self):
        return "plain"


Rich()

# %%
_, __, _oh.keys() == Out.keys(), In[1][:14]

# %%
from dataclasses import dataclass


@dataclass
class Point:
    x: int
    y: int


{"point": Point(1, 2), "set": {3, 1, 2}, "nested": [[1] * 12 for _ in range(4)]}

# %%
import multiprocessing as mp


def square(n):
    return n * n


with mp.get_context("fork").Pool(2) as pool:
    squares = pool.map(square, range(5))
squares

# %%
import re, json, math, collections, itertools, statistics, decimal, fractions, textwrap

json.dumps({"π": round(math.pi, 6)}, ensure_ascii=False), collections.Counter("banana"), statistics.median([3, 1, 2])

# %%
len.__doc__.splitlines()[0], sum(itertools.islice(itertools.count(), 10)), decimal.Decimal("0.1") * 3

# %%
print("🐍 ünïcödé", "日本語", "\x1b[31mred\x1b[0m", "bar\rover", sep="\n")

# %%
%%timeit -n1 -r1 -q
pass

# %%
%who_ls function

# %%
get_ipython().__class__.__name__, get_ipython().execution_count
