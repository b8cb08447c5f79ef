"""What steps showed while they ran, as they showed it: tables, generations side by side, lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repedit.report.runs.gathering import RunReport
from repedit.report.sections import element, note, table, values
from repedit.report.tables import Table


def items(run: RunReport, *verbs: str) -> list[str]:
    """Everything the steps with these verbs showed, under a heading a step."""
    parts, heading = list[str](), 0
    for stage, item in run.shown(*verbs):
        if stage.number != heading:
            heading = stage.number
            parts.append(element("h3", text=f"Step {stage.number}, {stage.verb}"))
        parts.append(_item(item))
    return parts


def first_tables(run: RunReport, *verbs: str) -> list[str]:
    """The first table that each of the steps with these verbs showed: what a reader asks for first."""
    found = dict[int, str]()
    for stage, item in run.shown(*verbs):
        if item["kind"] == "table" and stage.number not in found:
            found[stage.number] = element("p", text=f"Step {stage.number}: {item['title']}", class_="caption")
            found[stage.number] += table(Table(item["columns"], item["rows"]))
    return list(found.values())


def _item(item: Mapping[str, Any]) -> str:
    kind = item["kind"]
    if kind == "line":
        return note(item["text"])
    if kind == "json":
        return values(item["value"] if isinstance(item["value"], Mapping) else {"found": item["value"]})
    if kind == "generations":
        return element("p", text=item["title"], class_="caption") + beside(item["columns"], item["rows"])
    caption = element("p", text=item["title"], class_="caption") if item["title"] else ""
    return caption + table(Table(item["columns"], item["rows"]), item["title"])


def beside(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Each prompt with what every model wrote, side by side; one below the other where there is no room."""
    parts = []
    for prompt, *texts in rows:
        sides = [
            element("figure", element("figcaption", text=name), element("pre", text=text))
            for name, text in zip(columns[1:], texts, strict=True)
        ]
        first = element("pre", text=prompt, class_="prompt")
        parts.append(element("div", first, element("div", *sides, class_="sides"), class_="answer"))
    return "".join(parts)
