"""Text that somebody else wrote (paths, names of tensors, corpora and attacks, what models write), shown as itself.

Whoever shows such text passes it through the function of the output it goes to. A reader then sees every character, and
none acts: no escape sequence moves a cursor, no markup makes a link, no character reverses the line. JSON needs none of
these: it is written with `json.dumps`, which escapes what it must.
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any

_MARKDOWN = re.compile(
    r"[\\`*\[\]<>|#~&$]|(?<!\w)_|_(?!\w)|(?<=\w):(?=//)|(?<!\w):(?=[\w+-]+:)|(?<=\bwww)\.", re.IGNORECASE
)
"""What Markdown would read as its own, tables and bare addresses included; an underscore inside a word is none."""
_MARKDOWN_START = re.compile(r"^(\d{1,9})([.)])(?=\s|$)|^([-+])(?=\s|$)|^([-=])(?=\4*$)")
"""What would begin a list or underline a heading at the beginning of a line."""
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/ -]*[A-Za-z0-9]")
"""Texts that every reader of YAML takes for texts without quotes, but for words such as "yes", which are quoted."""
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_JOINERS = "\u200c\u200d"
"""Invisible characters that Persian, Hindi and emoji cannot be written without; they join letters and do nothing else."""


_NONCHARACTERS = "\ufffe\uffff"
"""What no XML may hold, SVG included."""


def for_terminal(text: object, *, lines: bool = False) -> str:
    r"""The text without anything a terminal obeys: what cannot be seen is written as in Python, "\x1b" for an escape.

    Control characters, invisible formatting (bidirectional overrides, byte order marks, tags), lone surrogates and line
    separators are replaced; every other character stays.

    Args:
        lines: leave line feeds and tabs as they are, for text of several lines. A carriage return before a line feed goes.
    """
    words = str(text).replace("\r\n", "\n") if lines else str(text)
    if words.isascii() and words.isprintable():
        return words
    return "".join(c if _harmless(c) or (lines and c in "\n\t") else _escape(c) for c in words)


def for_plotly(text: object) -> str:
    """The text as plotly shows it: plotly reads tags, and sets what stands between dollar signs as TeX."""
    return html.escape(for_terminal(text)).replace("$", "&#36;").replace("%{", "&#37;{")


def for_markdown(text: object) -> str:
    """The text as one line of Markdown, such as a paragraph, an item of a list or a cell of a table."""
    line = for_terminal(" ".join(str(text).split()))
    line = _MARKDOWN.sub(lambda m: _ENTITIES.get(m[0], "\\" + m[0]), line)
    return _MARKDOWN_START.sub(lambda m: f"{m[1]}\\{m[2]}" if m[1] else f"\\{m[0]}", line)


def for_mathtext(text: object) -> str:
    r"""The text as a label of matplotlib, which sets what stands between dollar signs as TeX: "$5 to $6" -> r"\$5 to \$6".

    Matplotlib leaves a label out of the legend if it begins with an underscore; a hair space is put before such a name.
    """
    words = for_terminal(text, lines=True).replace("$", r"\$")
    return f"\u200a{words}" if words.startswith("_") else words


def for_yaml(value: Any) -> str:
    """A mapping, a list or a text as YAML that reads back as the same value, whatever the texts in it hold.

    Lines of block style with a line feed at the end; keys keep their order. A text stays on one line, in double quotes
    unless it is plain words.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def scalar(dumper: yaml.SafeDumper, text: str) -> Any:
        style = None if _PLAIN.fullmatch(text) else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, scalar)
    # No alias for a value that stands in two places: a reader of a card may not know them.
    Dumper.ignore_aliases = lambda self, data: True
    options = {"allow_unicode": True, "sort_keys": False, "default_flow_style": False, "width": float("inf")}
    return str(yaml.dump(value, Dumper=Dumper, **options))


def shortened(text: object, most: int = 60) -> str:
    """The text, or its beginning and end around an ellipsis where it has more than `most` characters."""
    words = str(text)
    if len(words) <= most:
        return words
    end = (most - 1) // 3
    return f"{words[: most - 1 - end]}…{words[len(words) - end :]}"


def _harmless(character: str) -> bool:
    if character in _JOINERS:
        return True
    return character not in _NONCHARACTERS and unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
