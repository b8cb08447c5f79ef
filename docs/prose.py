"""A docstring -> HTML: paragraphs, sections and code as they are written. Nothing in it is markup, so a * stays a *."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from itertools import pairwise

SECTIONS = ("Args", "Raises", "Warns", "Returns", "Yields", "Example", "Reference")
Linked = Callable[[str], str | None]
"""Where a name in back quotes is explained, if it is."""
_WRAP = 100


def rendered(text: str, linked: Linked) -> str:
    """The HTML of a docstring."""
    found: list[str] = []
    for title, lines in _sections(text.split("\n")):
        if title in ("Args", "Raises", "Warns"):
            body = _items(lines, linked, several=title != "Args")
        else:
            body = _blocks(lines, linked)
        found.append(f'<div class="section"><h5>{title}</h5>{body}</div>' if title else body)
    return "\n".join(found)


def inline(text: str, linked: Linked) -> str:
    """One piece of text, with code in back quotes, and links."""
    parts = re.split(r"`+([^`]+)`+", text)
    shown = [html.escape(part, quote=False) for part in parts[::2]]
    codes = [_code(part, linked) for part in parts[1::2]]
    return "".join(word for pair in zip(shown, [*codes, ""], strict=True) for word in pair)


def signature(text: str, linked: Linked) -> str:
    """A signature in which types that are explained somewhere are links."""
    parts = re.split(r"(\b[A-Z]\w+\b)", text)
    shown = [html.escape(part, quote=False) for part in parts]
    for i in range(1, len(parts), 2):
        place = linked(parts[i])
        shown[i] = shown[i] if place is None else f'<a href="{html.escape(place)}">{shown[i]}</a>'
    return "".join(shown)


def _code(text: str, linked: Linked) -> str:
    place, shown = linked(text), f"<code>{html.escape(text, quote=False)}</code>"
    return shown if place is None else f'<a href="{html.escape(place)}">{shown}</a>'


def _sections(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(title, its lines), the first one without a title."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        title, colon, rest = line.partition(":")
        if colon and title in SECTIONS:
            found.append((title, [rest.strip()] if rest.strip() else []))
        else:
            found[-1][1].append(line)
    return [(title, _dedented(own) if title else own) for title, own in found]


def _dedented(lines: list[str]) -> list[str]:
    """Without the indentation that all lines share; one that stands beside a title has none."""
    sizes = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    least = min((size for size in sizes if size), default=0)
    return [line[least:] if line.startswith(" " * least) else line for line in lines]


def _blocks(lines: list[str], linked: Linked) -> str:
    """Paragraphs; what is indented is code."""
    found: list[str] = []
    for block in re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip("\n")):
        rows = block.split("\n")
        if not block.strip():
            continue
        if rows[0].startswith("    "):
            found.append(f"<pre>{html.escape(chr(10).join(_dedented(rows)), quote=False)}</pre>")
        else:
            found.append(f"<p>{_joined(rows, linked)}</p>")
    return "\n".join(found)


def _joined(rows: list[str], linked: Linked) -> str:
    """The lines of a paragraph: a break that was there for width alone goes, one that says something stays."""
    text = rows[0]
    for before, row in pairwise(rows):
        first = row.split()[0] if row.split() else ""
        wrapped = len(before) + 1 + len(first) > _WRAP and not first.endswith(":")
        text += (" " if wrapped else "\n") + row.strip()
    return inline(text, linked).replace("\n", "<br>\n")


def _items(lines: list[str], linked: Linked, several: bool) -> str:
    """name: what it is; lines that are indented go on, and `several` may stand in one line, one sentence each."""
    items: list[list[str]] = []
    for line in lines:
        if line.startswith(" ") and items:
            items[-1].append(line.strip())
        elif line.strip():
            items.append([line.strip()])
    texts = [" ".join(item) for item in items]
    if several:
        texts = [part for text in texts for part in re.split(r"(?<=\.) (?=[A-Z]\w+(?:, [A-Z]\w+)*: )", text)]
    found = []
    for text in texts:
        name, colon, rest = text.partition(": ")
        if colon and re.fullmatch(r"[\w., *()]+", name):
            found.append(
                f"<dt>{', '.join(_code(part, linked) for part in name.split(', '))}</dt><dd>{inline(rest, linked)}</dd>"
            )
        else:
            found.append(f"<dd>{inline(text, linked)}</dd>")
    return f"<dl>{''.join(found)}</dl>"
