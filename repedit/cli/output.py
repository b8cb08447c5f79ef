"""What the command line shows: tables, texts and JSON on standard output, stages and errors on standard error.

Texts are shown literally: nothing in a path, a name, an error or the output of a model is read as markup or obeyed by
the terminal. If the reader of standard output closes it, as `head` does, further output is dropped and the work
continues.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from repedit.escaping import for_terminal

if TYPE_CHECKING:
    from repedit.activations.prediction import Effect
    from repedit.metrics.benchmarks import Comparison
    from repedit.metrics.facts import Knowledge
    from repedit.metrics.generation import Writing

_recording: ContextVar[list[dict[str, Any]] | None] = ContextVar("_recording", default=None)


class Output(Console):
    """A console that shows texts literally and outlives its reader."""

    cut_off = False
    """Whether the reader has closed standard output."""

    def print(self, *objects: object, **options: Any) -> None:
        """Print; texts have neither markup nor escape sequences. Texts on standard output are recorded, see `recorded`."""
        literal = [Text(for_terminal(item, lines=True)) if isinstance(item, str) else item for item in objects]
        if objects and not self.stderr and all(isinstance(item, str) for item in objects):
            _record("line", text=" ".join(map(str, objects)))
        super().print(*literal, **options)

    def write(self, text: str) -> None:
        """Write a text for programs, without formatting."""
        try:
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Drop further output; the file descriptor stays valid, so that Python can close it when it exits."""
        self.cut_off = self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# A pipe has no width of its own; 120 columns keep names whole.
out = Output(width=None if sys.stdout.isatty() else 120)
err = Output(stderr=True)


@contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """A list that receives what is shown on standard output meanwhile, as plain values: tables, generations, lines, JSON."""
    items: list[dict[str, Any]] = []
    token = _recording.set(items)
    try:
        yield items
    finally:
        _recording.reset(token)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "table") -> None:
    """Show a table with numbers aligned to the right; `kind` is its kind in a recording, see `recorded`."""
    _record(kind, title=title, columns=list(columns), rows=[[_cell(cell) for cell in row] for row in rows])
    if title:  # Rich wraps the title of a table at the width of the table
        out.print(Text(for_terminal(title, lines=True), style="table.title"))
    rich_table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
        rich_table.add_column(_text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        rich_table.add_row(*(_text(cell) for cell in row))
    out.print(rich_table)


def show_json(value: object, *, indent: int | None = 2) -> None:
    """Show one JSON document; numbers that are not finite are null. Without an indent it is one line."""
    plain = _json_values(value)
    _record("json", value=plain)
    out.write(json.dumps(plain, indent=indent, sort_keys=indent is not None, allow_nan=False) + "\n")


def show_files(paths: Iterable[object]) -> None:
    """Name the files that were written."""
    for path in paths:
        out.print(f"wrote {path}", soft_wrap=True)


def stage(text: str) -> None:
    """Show on standard error what is being done."""
    err.print(f".. {text}")


# --- Two models on the same texts, facts and prompts


KNOWLEDGE_COLUMNS = ("domain", "", "right, before", "after (95 % interval)", "chance", "facts")


def show_comparison(title: str, comparison: Comparison) -> None:
    """One row for each text, as on a page; the drops are recorded as numbers too."""
    from repedit.report.tables import comparison_table

    rows = comparison_table(comparison)
    table(title, rows.columns, rows.rows)
    record_effects({"edited": {name: comparison.effect(name) for name in comparison.base}})


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The same as plain values, with the generations."""
    corpora = {}
    for name, before in comparison.base.items():
        after = comparison.edited[name]
        corpora[name] = {
            "top1": [before.top1, after.top1], "perplexity": [before.perplexity, after.perplexity],
            **comparison.effect(name).plain(), "tokens": int(before.count.sum()),
        }  # fmt: skip
    generations = generations_json(comparison.prompts, comparison.base_text, comparison.edited_text)
    return {"corpora": corpora, "generations": generations}


def generations_json(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
    """Each prompt with both continuations."""
    return [{"prompt": p, "base": a, "edited": b} for p, a, b in zip(prompts, before, after, strict=True)]


def knowledge_rows(knowledge: Mapping[str, Knowledge], forget: Iterable[str]) -> list[list[Any]]:
    """One row for each domain, see `KNOWLEDGE_COLUMNS`; `forget` names the domains to forget."""
    forget, rows = set(forget), []
    for name, k in knowledge.items():
        low, high = k.after.interval
        after = f"{k.after.accuracy:.1%} ({low:.1%} to {high:.1%})"
        role = "forget" if name in forget else "keep"
        rows.append([name, role, f"{k.before.accuracy:.1%}", after, f"{k.chance:.1%}", len(k.after.ids)])
    return rows


def effect_rows(effects: Mapping[str, tuple[Effect, Effect]]) -> list[list[str]]:
    """One row for each edit: the drops on forget and retain with their intervals, and their difference."""
    return [[label, f.percentage, r.percentage, percent(f.drop - r.drop)] for label, (f, r) in effects.items()]


def record_effects(effects: Mapping[str, Mapping[str, Effect]]) -> None:
    """Add effects, by what was done and by set, to a recording as numbers, for the figures of a page; nothing is shown."""
    rows = [
        [name, of, *(None if math.isnan(v) else v for v in (effect.drop, effect.low, effect.high))]
        for name, by_set in effects.items()
        for of, effect in by_set.items()
    ]
    _record("effects", title="", columns=["edit", "set", "drop", "low", "high"], rows=rows)


def percent(value: float) -> str:
    """A percentage, or that it is not defined because it divides by zero."""
    return "not defined" if math.isnan(value) else f"{value:.1f}"


def show_generations(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """Show each prompt with both continuations."""
    rows = [
        [prompt, old.strip() or "(nothing)", new.strip() or "(nothing)"]
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    table("What each model writes (greedy)", ("prompt", "original", "edited"), rows, "generations")


def show_side_by_side(names: Sequence[str], writings: Iterable[Sequence[Writing]]) -> Sequence[Writing]:
    """Show texts side by side as they grow on a terminal, otherwise one after another when they are complete.

    Returns the complete texts.
    """
    last: Sequence[Writing] = ()
    if not out.is_terminal:
        *_, last = writings
        for name, writing in zip(names, last, strict=True):
            out.print(f"{name}: {writing.text.strip() or '(nothing)'}", soft_wrap=True)
        return last
    with Live(console=out, auto_refresh=False, transient=True) as live:
        try:
            for last in writings:
                live.update(side_by_side(names, [writing.text for writing in last], out.height - 6), refresh=True)
        except KeyboardInterrupt:  # ends the generation and keeps what was written
            if not last:
                raise
    out.print(side_by_side(names, [writing.text for writing in last]))
    return last


def side_by_side(names: Sequence[str], texts: Sequence[str], lines: int | None = None) -> Table:
    """One column for each text, their common prefix dimmed; only the last lines if a number of lines is given."""
    width = max(10, out.width // len(texts) - 3)
    pairs = zip(*map(_cell, texts), strict=False)
    common = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, pairs)) if len(texts) > 1 else 0
    rich_table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=out.width)
    cells = []
    for name, text in zip(names, texts, strict=True):
        rich_table.add_column(_text(name), ratio=1)
        literal = _text(text)
        literal.stylize("dim", 0, common)
        rows = literal.wrap(out, width)
        cells.append(Text("\n").join(rows if lines is None else rows[-max(1, lines) :]))
    rich_table.add_row(*cells)
    return rich_table


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _text(value: object) -> Text:
    return Text(for_terminal(_cell(value), lines=True))


def _json_values(value: object) -> Any:
    """JSON values of the same content: keys and values that JSON does not have as texts, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _json_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # a number of numpy or torch
        return _json_values(value.item())
    return value if value is None or isinstance(value, str | int) else str(value)


def _record(kind: str, **content: object) -> None:
    items = _recording.get()
    if items is not None:
        items.append({"kind": kind, **content})
