"""The parts of a page as HTML: tables, values of any shape, headings. Every word is escaped here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from repedit.report.svg import element
from repedit.report.tables import Table, plain

OPEN = 14
"""Rows of a table that are shown at once; longer ones are folded, which print unfolds."""
MOST = 400
"""Rows of a diagnostic on the page; audit.json has the rest."""
NUMBER = re.compile(r"-?[\d,]+(\.\d+)?(e[+-]?\d+)?%?|n/a|\[.*\]\*?|")


def section(title: str, *inside: str, level: str = "h2") -> str:
    """A heading and what stands under it; nothing where there is nothing."""
    return element("section", element(level, text=title), *inside) if any(inside) else ""


def note(text: str) -> str:
    """A line in small letters."""
    return element("p", text=text, class_="note") if text else ""


def table(found: Table, caption: str = "") -> str:
    """A table that scrolls sideways where it is too wide; columns of numbers are set to the right."""
    if not found.rows:
        return note(found.note)
    kinds = [_kind([row[n] for row in found.rows]) for n in range(len(found.columns))]
    head = element(
        "tr", *(element("th", text=c, class_=k, scope="col") for c, k in zip(found.columns, kinds, strict=True))
    )
    body = [
        element("tr", *(element("td", text=cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in found.rows
    ]
    drawn = element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll")
    if caption and len(body) > OPEN:
        drawn = element("details", element("summary", text=f"{caption}: {len(body)} rows"), drawn)
    return drawn + note(found.note)


def listed(items: Sequence[str], kind: str) -> str:
    """A list of words."""
    return element("ul", *(element("li", text=item) for item in items), class_=kind) if items else ""


def values(found: Mapping[str, Any]) -> str:
    """Whatever a mapping holds: single values in one table, tables for what is deeper."""
    flat = [[str(key), plain(value)] for key, value in found.items() if _single(value)]
    parts = [table(Table(("what", "value"), flat))] if flat else []
    for key, value in found.items():
        if not _single(value):
            parts += [element("h3", text=str(key)), table(tabled(value), str(key))]
    return "".join(parts)


def tabled(value: Any) -> Table:
    """A mapping or a list as a table: mappings with the same keys become its columns."""
    pairs = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    rest = f"{len(pairs) - MOST} more rows are in audit.json." if len(pairs) > MOST else ""
    pairs = pairs[:MOST]
    first = pairs[0][1] if pairs else None
    if isinstance(first, Mapping) and all(isinstance(v, Mapping) and set(v) == set(first) for _, v in pairs):
        return Table(["", *map(str, first)], [[str(k), *(plain(v[name]) for name in first)] for k, v in pairs], rest)
    return Table(("", "value"), [[str(k), plain(v)] for k, v in pairs], rest)


def _single(value: Any) -> bool:
    """Whether a value stands in one cell: no mapping, and no list of lists or mappings."""
    if isinstance(value, Mapping):
        return False
    inner = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return len(inner) <= 12 and not any(isinstance(v, Mapping | list | tuple) for v in inner)


def _kind(cells: Sequence[str]) -> str:
    if all(NUMBER.fullmatch(cell) for cell in cells) and any(cells):
        return "number"
    return "long" if max(map(len, cells)) > 30 else "text"
