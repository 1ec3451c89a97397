"""Takes the pictures of docs/frontends.md: JupyterLab with the kernel vmsandbox, as tests drive it.

The second half of script/screenshots. Nothing of the user's is touched but images and templates.
"""

from __future__ import annotations

import json
import os
import tempfile
from io import BytesIO
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
SIZE = {"width": 1000, "height": 640}
COLOURS = 96
"""Enough for a page of text and a plot, and a fifth of the bytes."""

PLOT = """\
import numpy as np, matplotlib.pyplot as plt
from ipywidgets import interact

@interact(waves=(1, 9))
def draw(waves=3):
    x = np.linspace(0, 2 * np.pi, 500)
    plt.figure(figsize=(6.4, 2))
    plt.plot(x, np.sin(waves * x))
    plt.show()"""
GUEST = """\
import platform, os
platform.node(), platform.release(), os.cpu_count()"""
FUNCTION = """\
def area(width, height):
    product = width * height
    product += 1
    return product

print(area(6, 7))"""


CSV = """\
import pandas as pd
visitors = pd.read_csv("visitors.csv").pivot(index="year", columns="city")["visitors"]
visitors.plot(figsize=(4.6, 2.1), title="visitors.csv");"""
RESULT = """\
growth = visitors.pct_change().dropna().round(3)
growth.to_csv("growth.csv")"""
DATA = "city,year,visitors\n" + "".join(
    f"{city},{year},{first * grows ** (year - 2018):.0f}\n"
    for city, first, grows in (("Athens", 310, 1.07), ("Oslo", 260, 1.02), ("Turin", 180, 1.12))
    for year in range(2018, 2026)
)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="vmkernel-screenshots-") as directory:
        os.environ.update(
            JUPYTER_CONFIG_DIR=f"{directory}/config",
            JUPYTER_DATA_DIR=f"{directory}/data",
            JUPYTER_RUNTIME_DIR=f"{directory}/runtime",
            JUPYTER_PLATFORM_DIRS="1",
            JUPYTER_PREFER_ENV_PATH="0",
            IPYTHONDIR=f"{directory}/ipython",
        )
        take(Path(directory))


def take(directory: Path) -> None:
    """All pictures, with a server in *directory*."""
    from lab import PATIENCE, Debugger, Lab, chromium, chromium_path
    from lab_server import LabServer
    from playwright.sync_api import expect

    from vmkernel.cli.install import install_kernelspec

    install_kernelspec(directory / "data" / "kernels", options={"recipe": "datascience"})
    spec = directory / "data" / "kernels" / "vmsandbox" / "kernel.json"
    spec.write_text(
        json.dumps({**json.loads(spec.read_text()), "env": {"VMKERNEL_WORKSPACE": "rw"}})
    )
    (directory / "notebooks" / "trips").mkdir(parents=True)
    (directory / "notebooks" / "trips" / "visitors.csv").write_text(DATA)
    (directory / "notebooks" / "holidays.csv").write_text("day\n" * 3000)
    server = LabServer(directory / "notebooks", directory / "lab.log")
    path = chromium_path()
    assert path, "there is no Chromium: script/setup --browser"
    try:
        with chromium(path) as browser:
            lab = Lab(browser.new_page(viewport=SIZE), server)
            expect(lab.launcher_card("vmsandbox", "Python (microVM)")).to_be_visible()
            picture(lab, "lab-launcher.png")

            notebook = lab.open_notebook("waves.ipynb", "vmsandbox")
            lab.command("application:toggle-left-area")
            first = notebook.start(GUEST)
            # The first start of all builds a template.
            expect(first.outputs).to_have_count(1, timeout=4 * PATIENCE * 1000)
            cell = notebook.run(PLOT)
            expect(cell.box.locator("img[src^='data:image/png']")).to_have_count(1)
            before = cell.box.locator("img").get_attribute("src")
            cell.box.locator(".noUi-handle").press("ArrowRight")
            expect(cell.box.locator("img")).not_to_have_attribute("src", before or "")
            notebook.wait_idle()
            picture(lab, "lab-notebook.png")
            lab.close_notebook()

            files(lab)

            notebook = lab.open_notebook("area.ipynb", "vmsandbox")
            debugger = Debugger(lab, notebook)
            debugger.switch_on()
            cell = notebook.add(FUNCTION)
            debugger.set_breakpoint(cell, line=3)
            cell.run()
            expect(debugger.variable("product")).to_have_text("42")
            expect(debugger.frames.first).to_be_visible()
            picture(lab, "lab-debugger.png")
            debugger.do("continue")
            cell.finish()
    finally:
        server.stop()


def files(lab) -> None:
    """A cell has read a CSV and written another, which the file browser shows."""
    from playwright.sync_api import expect

    lab.command("application:toggle-left-area")
    lab.command("filebrowser:go-to-path", path="trips")
    notebook = lab.open_notebook("trips/visitors.ipynb", "vmsandbox")
    cell = notebook.run(CSV)
    expect(cell.box.locator("img[src^='data:image/png']")).to_have_count(1)
    notebook.run(RESULT)
    cell = notebook.start("%vm put ../holidays.csv /tmp/")
    expect(cell.box.locator(".jp-Stdin-input")).to_be_visible()
    lab.command("filebrowser:refresh")
    item = lab.page.locator("#filebrowser .jp-DirListing-item").filter(has_text="growth.csv")
    expect(item).to_be_visible()
    picture(lab, "lab-files.png")
    cell.box.locator(".jp-Stdin-input").press("Enter")
    cell.finish()
    lab.close_notebook()
    lab.command("application:toggle-left-area")


def picture(lab, name: str) -> None:
    """What is on the screen, into docs/."""
    from PIL import Image

    lab.page.mouse.move(0, 0)  # no button lights up under it
    shot = Image.open(BytesIO(lab.page.screenshot())).convert("RGB")
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)
    print(f"docs/{name}: {(DOCS / name).stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
