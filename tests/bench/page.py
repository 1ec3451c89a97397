"""What a run found, put into docs/performance.md: tables between two marks, plots beside."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "performance.md"
IMPORTS = "## Imports"
"""From here on the report is too much for the page."""
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def update(measured: Path, plots: Iterable[Path]) -> None:
    """Copy the plots as ``performance-NAME.png``, and what stands beside *measured* as Markdown."""
    for plot in plots:
        name = plot.stem.removeprefix(f"{measured.stem}-")
        shutil.copyfile(plot, DOCS / f"performance-{name}.png")
    table = measured.with_suffix(".md").read_text().partition(IMPORTS)[0].strip()
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} has lost its marks"
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
