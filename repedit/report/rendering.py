"""HTML pages from templates, with figures of matplotlib as inline SVG.

A page is one file that needs no network and no script. The templates are in `templates/`; every value that they write
is escaped once, by jinja2, and invisible characters are shown as in `repedit.escaping.for_terminal`.
"""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from repedit.auditing.report import Report
from repedit.escaping import for_terminal
from repedit.outcomes import INCONCLUSIVE, NOT_YET, PASS
from repedit.plot.canvas import NEUTRAL, SERIES
from repedit.report import tables

PAGE_WIDTH, PHONE_WIDTH = 8.6, 4.2
"""Inches of a figure as wide as a page; at these widths no text is smaller than 10 pixels on a screen."""
_COLORS = {
    "#000000": "ink", "#ffffff": "paper", "#b0b0b0": "rule", "#bdbdbd": "rule", "#d0d0d0": "hatch", NEUTRAL: "faint",
    **{color.lower(): f"series-{n}" for n, color in enumerate(SERIES)},
}  # fmt: skip
"""Colours of figures and the variables of style.css in their place, which differ between light, dark and print."""


def _visible(value: object) -> object:
    return value if isinstance(value, Markup) else for_terminal(value, lines=True)


def tone(report: Report) -> str:
    """The style of a verdict: "good", "open" or "bad"."""
    return {PASS: "good", NOT_YET: "open", INCONCLUSIVE: "open"}.get(report.verdict.word, "bad")


ENVIRONMENT = Environment(
    loader=PackageLoader("repedit.report"), autoescape=True, undefined=StrictUndefined, finalize=_visible,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
ENVIRONMENT.globals |= {"tables": tables, "tone": tone}


def render(template: str, **values: object) -> str:
    """The text of a page."""
    return ENVIRONMENT.get_template(f"{template}.html.jinja2").render(**values)


def svg(figure: Figure) -> Markup:
    """The figure as an SVG element in the colours of the page; the label of the figure is its text for screen readers.

    The output depends on the figure alone. Texts stay texts, in the font of the page. Identifiers are those that
    something refers to; they differ between figures that differ.
    """
    buffer, label = io.StringIO(), str(figure.get_label())
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{figure.get_figwidth()} {label}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "style")):  # matplotlib's style would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        styles = [element.attrib.pop("style", "")]
        # A pattern has its colour in an attribute, where not every reader takes a variable.
        styles += [f"{name}: {element.attrib.pop(name)}" for name in ("fill", "stroke") if name in element.attrib]
        style = re.sub(r"font-family: [^;]*;? ?", "", "; ".join(filter(None, styles)))
        if style:
            element.set("style", re.sub(r"#[0-9a-f]{6}(?![\w-])", _variable, style))
    values = (value for element in root.iter() for name, value in element.attrib.items() if name != "id")
    referenced = {name for value in values for name in re.findall(r"#([\w-]+)", value)}
    for element in root.iter():
        if element.get("id") not in referenced:
            element.attrib.pop("id", None)
    width = float(root.get("viewBox", "").split()[2])
    root.attrib = {
        "viewBox": root.get("viewBox", ""), "role": "img", "aria-label": for_terminal(label, lines=True),
        "style": f"max-width: {1.6 * width:.0f}px",
    }  # fmt: skip
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _variable(color: re.Match[str]) -> str:
    return f"var(--{_COLORS[color[0]]})" if color[0] in _COLORS else color[0]
