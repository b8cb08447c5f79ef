"""The extension of griffe that shows docstrings as they are written."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object

from docs.reference import literal


class LiteralDocstrings(Extension):
    """Escape what Markdown would read as markup, outside of code, in every docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of an object before its sections are parsed."""
        if obj.docstring:
            obj.docstring.value = "\n".join(_line(line) for line in obj.docstring.value.split("\n"))


def _line(line: str) -> str:
    """A line; one of an indented formula is code already."""
    return literal(line)
