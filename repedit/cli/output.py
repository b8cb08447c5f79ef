"""Values -> rich tables and JSON; what the command line shows.

Every text is shown as it is: nothing in a path, a name, an error or what a model writes is read as markup or obeyed by
the terminal. Standard output may be closed by its reader, such as `head`: what comes after is dropped, the work goes on.
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
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from repedit.escaping import for_terminal

_recording: ContextVar[list[dict[str, Any]] | None] = ContextVar("_recording", default=None)


class Output(Console):
    """A console that shows texts as they are, and keeps its lines where somebody asked for that."""

    cut_off = False
    """Whether its reader has closed standard output."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; a text has neither markup nor escape sequences. On standard output, keep what is words."""
        words = [Text(for_terminal(item, lines=True)) if isinstance(item, str) else item for item in objects]
        if objects and not self.stderr and all(isinstance(item, str) for item in objects):
            _record("line", text=" ".join(objects))
        super().print(*words, **options)

    def write(self, text: str) -> None:
        """Write a text for programs as it is."""
        try:
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Drop what is still to come; the file descriptor stays valid, so that Python can close it at its end."""
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
    """One table; numbers are right-aligned. `kind` says what it holds to who keeps it, see `recorded`."""
    _record(kind, title=title, columns=list(columns), rows=[[_words(cell) for cell in row] for row in rows])
    drawn = Table(title=_text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
        drawn.add_column(_text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(_text(cell) for cell in row))
    out.print(drawn)


def show_json(value: Any, *, indent: int | None = 2) -> None:
    """One JSON document on standard output; a number that is not finite is null. Without an indent it is one line."""
    plain = _plain(value)
    _record("json", value=plain)
    out.write(json.dumps(plain, indent=indent, sort_keys=indent is not None, allow_nan=False) + "\n")


def stage(text: str) -> None:
    """A line about what is being done, on standard error."""
    err.print(f".. {text}")


def comparison_rows(comparison: Any) -> list[list[Any]]:
    """One row a corpus: accuracy and perplexity before and after, the drop with its interval."""
    rows = []
    for name, before in comparison.base.items():
        after, found = comparison.edited[name], comparison.effect(name)
        rows.append([
            name, f"{before.top1:.1%}", f"{after.top1:.1%}", found.percentage,
            f"{before.perplexity:.1f}", f"{after.perplexity:.1f}", int(before.count.sum()),
        ])  # fmt: skip
    return rows


def percent(value: float) -> str:
    """A percentage or a difference of two, or that it is a division by nothing."""
    return "not defined" if value != value else f"{value:.1f}"


def effect_rows(effects: Any) -> list[list[str]]:
    """One row an edit: both drops with their intervals, and their difference."""
    return [[label, f.percentage, r.percentage, percent(f.drop - r.drop)] for label, (f, r) in effects.items()]


COMPARISON_COLUMNS = (
    "text", "next token right, before", "after", "relative drop (95 % interval)", "perplexity, before", "after", "tokens",
)  # fmt: skip


def comparison_json(comparison: Any) -> dict[str, Any]:
    """The same as plain values, with the generations."""
    found = {}
    for name, before in comparison.base.items():
        after, change = comparison.edited[name], comparison.effect(name)
        found[name] = {
            "top1": [before.top1, after.top1], "perplexity": [before.perplexity, after.perplexity],
            **change.plain(), "tokens": int(before.count.sum()),
        }  # fmt: skip
    texts = zip(comparison.prompts, comparison.base_text, comparison.edited_text, strict=True)
    return {"corpora": found, "generations": [{"prompt": p, "base": a, "edited": b} for p, a, b in texts]}


KNOWLEDGE_COLUMNS = ("domain", "", "right, before", "after (95 % interval)", "chance", "facts")


def knowledge_rows(found: Any, forgotten: Any) -> list[list[Any]]:
    """One row a domain: accuracy before and after, and what guessing would get."""
    rows = []
    for name, k in found.items():
        low, high = k.after.interval
        role = "forget" if name in forgotten else "keep"
        rows.append([
            name, role, f"{k.before.accuracy:.1%}", f"{k.after.accuracy:.1%} ({low:.1%} to {high:.1%})", f"{k.chance:.1%}",
            len(k.after.ids),
        ])  # fmt: skip
    return rows


def forgotten_json(found: Any) -> dict[str, Any]:
    """The second act of the demo as plain values."""
    rows = {**found.trained, "capitals, unseen phrasing": found.unseen}
    return {
        "facts": {name: {"before": k.before.accuracy, "after": k.after.accuracy, "interval": k.after.interval} for name, k in rows.items()},
        "generations": [{"prompt": p, "base": a, "edited": b} for p, a, b in zip(found.prompts, found.before, found.after, strict=True)],
        "certificate": {k: v for k, v in found.manifest.certificate.items() if k != "tensors"},
        "target": found.target,
    }  # fmt: skip


def show_generations(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """Each prompt with both continuations."""
    rows = [
        [prompt, old.strip() or "(nothing)", new.strip() or "(nothing)"]
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    table("What each model writes (greedy)", ("prompt", "original", "edited"), rows, "generations")


def show_beside(names: Sequence[str], writings: Iterable[Sequence[Any]]) -> Sequence[Any]:
    """Texts side by side as they grow, on a terminal; one after another when they are done, elsewhere. Returns the last ones."""
    last: Sequence[Any] = ()
    if not out.is_terminal:
        *_, last = writings
        for name, writing in zip(names, last, strict=True):
            out.print(f"{name}: {writing.text.strip() or '(nothing)'}", soft_wrap=True)
        return last
    with Live(console=out, auto_refresh=False, transient=True) as live:
        try:
            for last in writings:
                live.update(columns(names, [writing.text for writing in last], out.height - 6), refresh=True)
        except KeyboardInterrupt:  # ends what is being written, and keeps what is there
            if not last:
                raise
    out.print(columns(names, [writing.text for writing in last]))
    return last


def columns(names: Sequence[str], texts: Sequence[str], lines: int | None = None) -> Table:
    """A column a text; what all texts begin with is dim. The last lines alone, where a number of them is given."""
    width = max(10, out.width // len(texts) - 3)
    pairs = zip(*map(_words, texts), strict=False)
    same = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, pairs)) if len(texts) > 1 else 0
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=out.width)
    for name in names:
        drawn.add_column(_text(name), ratio=1)
    cells = []
    for text in texts:
        shown = _text(text)
        shown.stylize("dim", 0, same)
        rows = shown.wrap(out, width)
        cells.append(Text("\n").join(rows if lines is None else rows[-max(1, lines) :]))
    drawn.add_row(*cells)
    return drawn


def _words(cell: Any) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _text(cell: Any) -> Text:
    return Text(for_terminal(_words(cell), lines=True))


def _plain(value: Any) -> Any:
    """JSON values of the same content: keys and what JSON does not know as texts, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # a number of numpy or torch
        return _plain(value.item())
    return value if value is None or isinstance(value, str | int) else str(value)


def _record(kind: str, **content: object) -> None:
    items = _recording.get()
    if items is not None:
        items.append({"kind": kind, **content})
