"""What the real libraries display survives the policy: pandas, its Styler, matplotlib, IPython."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from vmkernel.kernel.policy.bundle import clean


def kept(mime: str, value: Any) -> tuple[Any, list[str]]:
    data, _, removed = clean({mime: value}, {})
    return data.get(mime), removed


@pytest.fixture(scope="module")
def pandas() -> Any:
    import pandas as pd

    return pd


def test_pandas_tables_pass_byte_for_byte(pandas: Any) -> None:
    frame = pandas.DataFrame(
        {"a": [1.5, None], "<b>": ["x & y", "<script>alert(1)</script>"], "$x$": [1, 2]}
    )
    for html in (
        frame._repr_html_(),
        frame.to_html(classes="table", border=0, render_links=False),
        frame.groupby("a").agg(list)._repr_html_(),
        pandas.DataFrame(index=pandas.MultiIndex.from_product([[1, 2], [3]]))._repr_html_(),
    ):
        assert kept("text/html", html) == (html, [])


def test_a_styler_keeps_its_colours(pandas: Any) -> None:
    frame = pandas.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    styler = (
        frame.style.highlight_max(color="#ffcc00")
        .bar(color="#abcdef")
        .set_caption("caption")
        .format("{:.2f}")
        .set_table_styles([{"selector": "th:hover", "props": [("background-color", "red")]}])
    )
    html, removed = kept("text/html", styler.to_html())
    assert html is not None
    assert removed == []
    for wanted in ("#ffcc00", "linear-gradient(90deg, #abcdef", "caption", "3.00", "th:hover"):
        assert wanted in html
    # Each rule's selector is still there, and so is each cell that it names
    names = set(re.findall(r"#(T_\w+)", html))
    assert names
    assert all(f'id="{name}"' in html for name in names)


@pytest.fixture(scope="module")
def figure() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([1, 2, 3], label="a & b", linestyle="--")
    axes.imshow([[1, 2], [3, 4]])
    axes.fill_between([0, 1], [0, 1], alpha=0.5, hatch="/")
    axes.set_title("$x^2$ <title>")
    axes.legend()
    return figure


def test_a_figure_in_svg_is_drawn_alike(figure: Any) -> None:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    svg, removed = kept("image/svg+xml", out.getvalue())
    assert removed == []
    assert drawn(svg) == drawn(out.getvalue())
    assert "stroke-linejoin: round" in svg


def drawn(svg: str) -> list[Any]:
    """Every element that is drawn, in order, with what it is drawn by."""
    found = []
    for element in ET.fromstring(svg).iter():
        name = element.tag.rpartition("}")[2]
        if "www.w3.org/2000/svg" not in element.tag or name in ("metadata", "style"):
            continue
        attributes = {
            key.rpartition("}")[2]: re.sub(r"[\s;]+", "", value)
            for key, value in element.attrib.items()
        }
        found.append((name, attributes, (element.text or "").strip()))
    return found


def test_a_figure_in_png_passes(figure: Any) -> None:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    png = base64.b64encode(out.getvalue()).decode()
    assert kept("image/png", png) == (png, [])
    assert kept("image/png", base64.encodebytes(out.getvalue()).decode())[1] == []


def test_displays_of_ipython() -> None:
    from IPython import display

    wave = display.Audio(data=b"RIFF" + bytes(100), rate=8000, embed=True)._repr_html_()
    assert kept("text/html", wave)[0].count("data:audio/wav;base64,") == 1
    film = display.Video(data=b"mp4", embed=True, mimetype="video/mp4")._repr_html_()
    assert 'src="data:video/mp4;base64,' in kept("text/html", film)[0]
    code = display.Code("print('<b>')", language="python")._repr_html_()
    html, removed = kept("text/html", code)
    assert removed == []
    assert "highlight" in html
    assert "&lt;b&gt;" in html
    link = display.FileLink("pyproject.toml")._repr_html_()
    assert "href=" in kept("text/html", link)[0]
    bar = display.ProgressBar(10)._repr_html_()
    assert "<progress" in kept("text/html", bar)[0]
    tube = display.YouTubeVideo("x")._repr_html_()
    html, removed = kept("text/html", tube)
    assert "iframe" not in html
    assert removed == ["frames and embedded documents"]
