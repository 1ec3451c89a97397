"""Takes the pictures of docs/frontends.md: JupyterLab with the kernel vmsandbox, as tests drive it.

The second half of script/screenshots. Nothing of the user's is touched but images and templates.
"""

from __future__ import annotations

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
    (directory / "notebooks").mkdir()
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


def picture(lab, name: str) -> None:
    """What is on the screen, into docs/."""
    from PIL import Image

    lab.page.mouse.move(0, 0)  # no button lights up under it
    shot = Image.open(BytesIO(lab.page.screenshot())).convert("RGB")
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)
    print(f"docs/{name}: {(DOCS / name).stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
