"""Text that somebody else wrote is shown as itself: any text, through every output, is read and never obeyed."""

from __future__ import annotations

import html
import re
import unicodedata
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib import cbook

from repedit.escaping import for_markdown, for_mathtext, for_plotly, for_terminal, for_yaml, shortened
from repedit.plot.canvas import canvas, label_text
from repedit.report.pages import ENVIRONMENT, svg

SIGNS = (
    "\x1b]52;c;cHduZWQ=\x07", "\x1b[2J", "\x9b31m", "\r", "\b", "\x00", "\u202e", "\u2066", "\ufeff", "\u2028", "\udc80", "\U000e0041",
    "[/]", "[bold red]", "[link=http://a.b]x[/link]", "<script>alert(1)</script>", "</style>", "<!--", "&amp;", '"', "'", "onclick=",
    "|", "`", "```", "**", "__", "[x](javascript:a)", "![x](http://a.b)", "http://a.b", "www.a.b", "# ", "- ", "1. ", "> ", "---", "===", "~~",
    "$", "$x$", "\\frac{$", "\\", "\\$", "_", "^", "%", "%{x}", "{", "}", "{x:", ": ", "- x", "'", "\n", "\n---\n", "\t", "  ", "\uffff", "é", "日本", "😀", "नि\u200dं",
)  # fmt: skip
"""What some output reads as its own."""
FOREIGN = st.lists(st.sampled_from(SIGNS) | st.text(max_size=3), max_size=8).map("".join)
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


@given(FOREIGN, st.booleans())
def test_a_terminal_gets_nothing_that_it_obeys(text, lines):
    shown = for_terminal(text, lines=lines)
    allowed = "\u200c\u200d" + ("\n\t" if lines else "")
    assert all(c in allowed or unicodedata.category(c) not in INVISIBLE for c in shown)
    assert for_terminal(shown, lines=lines) == shown


@given(st.text(st.characters(exclude_categories=INVISIBLE, exclude_characters="\ufffe\uffff")))
def test_what_can_be_seen_is_not_changed(text):
    assert for_terminal(text) == text


class Reader(HTMLParser):
    """The tags and the words of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.words = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


@given(FOREIGN)
def test_a_page_shows_the_words_and_gets_no_tag(text):
    template = ENVIRONMENT.from_string('<p title="{{ text }}">{{ text }}</p>')
    page = Reader(template.render(text=text))
    shown = for_terminal(text, lines=True)
    assert (page.tags, page.words) == ([("p", {"title": shown})], shown)


@given(FOREIGN)
@settings(max_examples=10, deadline=None)
def test_a_figure_of_a_page_shows_the_words_and_gets_no_tag(text):
    figure = canvas(2.0, 2.0)
    figure.text(0.5, 0.5, label_text(text))
    figure.set_label(text)
    page = Reader(str(svg(figure)))
    assert {tag for tag, _ in page.tags} <= {"svg", "g", "path", "defs", "text"}
    assert dict(page.tags[0][1])["aria-label"] == for_terminal(text, lines=True)
    assert page.words.strip("\u200a \n") == shortened(for_terminal(text), 60).strip("\u200a \n")


@given(FOREIGN)
def test_plotly_gets_no_tag_no_formula_and_no_template(text):
    shown = for_plotly(text)
    assert not re.search(r"[<>$]|%\{", shown) and as_plotly_shows(shown) == for_terminal(text)


def as_plotly_shows(text: str) -> str:
    """The text after plotly.js replaced the entities that it knows (svg_text_utils.convertEntities)."""
    named = {
        "mu": "\u03bc",
        "amp": "&",
        "lt": "<",
        "gt": ">",
        "nbsp": "\xa0",
        "times": "\xd7",
        "plusmn": "\xb1",
        "deg": "\xb0",
    }

    def character(match):
        name = match[1]
        return html.unescape(match[0]) if name[0] == "#" else named.get(name, match[0])

    return re.sub(r"&(#\d+|#x[\da-fA-F]+|[a-z]+);", character, text)


def test_an_entity_that_plotly_does_not_know_is_caught():
    assert as_plotly_shows(html.escape('"')) == "&quot;" != '"'


def spoken(source: str) -> tuple[list[str], str]:
    """Kinds of the parts of a Markdown text that are more than words, and the words."""
    parts = [
        t
        for token in MarkdownIt("gfm-like", {"linkify": False}).parse(source)
        for t in (token, *(token.children or ()))
    ]
    plain = ("paragraph_open", "paragraph_close", "inline", "text", "text_special")
    return [t.type for t in parts if t.type not in plain], "".join(t.content for t in parts if t.type == "text")


@given(FOREIGN)
@example("__a__ b__c_ _d")
def test_markdown_shows_the_words_and_gets_no_markup(text):
    assert spoken(for_markdown(text)) == ([], for_terminal(" ".join(text.split())))


@given(FOREIGN)
def test_a_cell_of_a_table_stays_one_cell(text):
    kinds, words = spoken(f"| a | b |\n| --- | --- |\n| {for_markdown(text)} | end |")
    assert kinds.count("td_open") == 2 and words == f"ab{for_terminal(' '.join(text.split()))}end"
    assert not [kind for kind in kinds if not kind.startswith(("table", "thead", "tbody", "tr", "th", "td"))]


@pytest.mark.parametrize("address", ["http://a.b/c", "HTTPS://a.b", "www.a.b"])
def test_a_bare_address_is_no_link(address):
    assert not re.search(r"(?i)https?://|www\.", for_markdown(address))


@given(FOREIGN, st.dictionaries(FOREIGN, FOREIGN | st.lists(FOREIGN), max_size=3))
def test_yaml_reads_back_as_it_was_and_ends_no_front_matter(text, values):
    held = {"name": text, "more": values}
    written = for_yaml(held)
    assert yaml.safe_load(written) == held
    assert not re.search(r"^(---|\.\.\.)", written, re.MULTILINE)


@pytest.mark.parametrize(
    "text", ["yes", "no", "null", "1e3", "0x1f", "1_000", "2024-01-01", "~", "", "a: b", "#x", "k1"]
)
def test_a_text_is_not_read_as_another_kind_of_value(text):
    assert yaml.safe_load(for_yaml({"a": text})) == {"a": text}
    assert text in ("k1",) or f'"{text}"' in for_yaml([text]) or f"'{text}'" in for_yaml([text])


@given(FOREIGN)
def test_matplotlib_sees_no_formula_and_drops_no_name(text):
    shown = for_mathtext(text)
    assert not cbook.is_math_text(shown) and not shown.startswith("_")
    assert shown.replace(r"\$", "$").removeprefix("\u200a") == for_terminal(text, lines=True).removeprefix("\u200a")


@given(FOREIGN, st.integers(4, 20))
def test_a_long_text_keeps_its_ends(text, most):
    short = shortened(text, most)
    assert len(short) <= most and (short == text or (short[0] == text[0] and short[-1] == text[-1] and "…" in short))
