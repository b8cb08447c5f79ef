"""Escaping of foreign text: paths, names of tensors, corpora and attacks, and what models write.

Pass such text through the function of the output that shows it. Every character then stays readable and none acts: no
escape sequence moves a cursor, no markup makes a link, no character reverses the line. HTML is escaped by the templates of
`repedit.report`, and JSON by `json.dumps`.
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any

_MARKDOWN = re.compile(
    r"[\\`*\[\]<>|#~&$]|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)|(?<!\w):(?=[\w+-]+:)|(?<=\bwww)\.", re.IGNORECASE
)
"""Markdown syntax, including tables and bare addresses; a single underscore inside a word is not syntax."""
_MARKDOWN_START = re.compile(r"^(\d{1,9})([.)])(?=\s|$)|^([-+])(?=\s|$)|^([-=])(?=\4*$)")
"""What starts a list or underlines a heading at the beginning of a line."""
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/ -]*[A-Za-z0-9]")
"""Texts that YAML reads as texts without quotes; the dumper quotes exceptions such as "yes"."""
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_JOINERS = "\u200c\u200d"
"""Invisible characters that Persian, Hindi and emoji need; they only join letters."""
_NONCHARACTERS = "\ufffe\uffff"
"""Characters that XML, and so SVG, must not contain."""


def for_terminal(text: object, *, lines: bool = False) -> str:
    r"""The text with every invisible character written as in Python, such as "\x1b" for an escape.

    Control characters, invisible formatting (bidirectional overrides, byte order marks, tags), lone surrogates, line
    separators and noncharacters are replaced; every other character stays.

    Args:
        lines: keep line feeds and tabs, for text of several lines; a carriage return before a line feed is dropped.
    """
    string = str(text).replace("\r\n", "\n") if lines else str(text)
    if string.isascii() and string.isprintable():
        return string
    return "".join(c if _harmless(c) or (lines and c in "\n\t") else _escape(c) for c in string)


def for_plotly(text: object) -> str:
    """The text for plotly, which interprets tags and sets text between dollar signs as TeX.

    Quotes stay: plotly knows few named entities, and &quot; is not among them.
    """
    return html.escape(for_terminal(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def for_markdown(text: object) -> str:
    """The text as one line of Markdown: a paragraph, a list item or a table cell."""
    line = for_terminal(" ".join(str(text).split()))
    line = _MARKDOWN.sub(lambda m: _ENTITIES.get(m[0], "\\" + m[0]), line)
    return _MARKDOWN_START.sub(lambda m: f"{m[1]}\\{m[2]}" if m[1] else f"\\{m[0]}", line)


def for_mathtext(text: object) -> str:
    r"""The text for a label of matplotlib, which sets text between dollar signs as TeX: "$5 to $6" -> r"\$5 to \$6".

    Matplotlib omits labels that begin with an underscore from legends; they get a hair space in front.
    """
    string = for_terminal(text, lines=True).replace("$", r"\$")
    return f"\u200a{string}" if string.startswith("_") else string


def for_yaml(value: object) -> str:
    """A value as block-style YAML that reads back as the same value, whatever texts it contains.

    The result ends with a line feed and keeps the order of keys. A text stays on one line, in double quotes unless it is
    plain words.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def scalar(dumper: yaml.SafeDumper, text: str) -> Any:
        style = None if _PLAIN.fullmatch(text) else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, scalar)
    # A value that occurs twice is written twice: readers of model cards may not support aliases.
    Dumper.ignore_aliases = lambda self, data: True
    options = {"allow_unicode": True, "sort_keys": False, "default_flow_style": False, "width": float("inf")}
    return str(yaml.dump(value, Dumper=Dumper, **options))


def shortened(text: object, most: int = 60) -> str:
    """The text, or its beginning and end around an ellipsis where it has more than `most` characters."""
    string = str(text)
    if len(string) <= most:
        return string
    end = (most - 1) // 3
    return f"{string[: most - 1 - end]}…{string[len(string) - end :]}"


def _harmless(character: str) -> bool:
    if character in _JOINERS:
        return True
    return character not in _NONCHARACTERS and unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
