"""Prompts with answers: rows that say which of their tokens a loss or a score is about.

A row is tokenised as one text, prompt and answer together, so it reads as the model would meet it. The answer begins
at the first token that the prompt alone does not share: a token merged across the boundary belongs to the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from repedit.data.corpus import Batch, Batches, Corpus, Document
from repedit.data.encoding import Encoded, encoded, entity_end, joined
from repedit.errors import ArgumentError, DataError
from repedit.io.text import check_text


@dataclass(frozen=True)
class Row:
    """A prompt and the answer that should follow it.

    Raises:
        DataError: if a field is no text.
    """

    prompt: str
    answer: str
    id: str
    alternative: str | None = None
    """Another answer, for losses that prefer one to the other."""
    entity: str = ""
    """What the row is about, as it is written in the prompt; empty where there is no such thing."""

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "answer", "entity"):
            check_text(getattr(self, name), f"row {self.id!r}: the {name}")
        if self.alternative is not None:
            check_text(self.alternative, f"row {self.id!r}: the alternative")

    @property
    def text(self) -> str:
        """Prompt and answer as one text."""
        return joined(self.prompt, self.answer)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in the order given; every batch says where the answers and the entities are."""

    items: tuple[Row, ...]
    name: str = "rows"

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError(f"rows {self.name!r} are empty; give at least one")
        check_ids(self.items, f"rows {self.name!r}")
        blank = next((row.id for row in self.items if not row.answer.strip()), None)
        if blank is not None:
            raise DataError(f"rows {self.name!r}: row {blank!r} has no answer; give one")

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Rows({self.name!r}, {len(self)} rows)"

    @cached_property
    def hash(self) -> str:
        """sha256 over every field of every row, in order."""
        return row_hash(self.items)

    def batches(self, tokenizer: Any, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]:
        """The rows in order, padded on the right, with `answer` and `entity` masks; nothing is cut.

        The beginning-of-sequence token is put before each row where the tokenizer adds one by itself.

        Raises:
            DataError: if a row is longer than `length` tokens, or its answer has no token of its own.
            ArgumentError: if there is no tokenizer, or the batch size is below 1.
        """
        if tokenizer is None or batch_size < 1:
            raise ArgumentError(
                f"rows {self.name!r}: batch_size={batch_size}, tokenizer {type(tokenizer).__name__}; rows are text, so "
                "the model needs a tokenizer, and a batch at least 1 row"
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        for i in range(0, len(self.items), batch_size):
            part = self.items[i : i + batch_size]
            found = [encoded(tokenizer, row.prompt, row.answer) for row in part]
            for row, (ids, start) in zip(part, found, strict=True):
                if len(ids) > length:
                    raise DataError(f"row {row.id!r} has {len(ids)} tokens, length={length}; raise length")
                if len(ids) == start:
                    raise DataError(f"row {row.id!r}: the answer {row.answer!r} has no token of its own; give another")
            ends = [entity_end(tokenizer, row.prompt, row.entity) for row in part]
            yield _padded(part, found, ends, pad)


def as_batches(source: Any, *, name: str = "rows") -> Batches:
    """Whatever holds text, as something that gives batches: a Corpus, Tokens, Rows, Facts, rows or facts, strings.

    Raises:
        DataError: if the source is none of these, mixes them, or is empty.
    """
    if isinstance(source, Batches):
        return source
    items = list(source) if isinstance(source, Iterable) and not isinstance(source, str) else [source]
    if items and all(isinstance(item, Row) for item in items):
        return Rows(tuple(items), name)
    if items and all(isinstance(item, str) for item in items) and not isinstance(source, str):
        return Corpus(tuple(Document(str(i), text) for i, text in enumerate(items)), name)
    kinds = sorted({type(item).__name__ for item in items})
    raise DataError(
        f"{name!r}: found {', '.join(kinds) or 'nothing'}; give a corpus, rows, facts or a list of strings "
        "(a file is read with repedit.data.read or repedit.data.facts)"
    )


def check_ids(items: Sequence[Row], where: str) -> None:
    """Refuse rows of which two have one id.

    Raises:
        DataError: with the id.
    """
    seen: set[str] = set()
    for row in items:
        if row.id in seen:
            raise DataError(f"{where}: the id {row.id!r} appears twice; ids must differ")
        seen.add(row.id)


def row_hash(items: Sequence[Row]) -> str:
    """sha256 over every field of every row, in order."""
    digest = hashlib.sha256()
    for row in items:
        digest.update(json.dumps(asdict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _padded(rows: Sequence[Row], found: Sequence[Encoded], ends: Sequence[int | None], pad: int) -> Batch:
    width = max(len(ids) for ids, _ in found)
    place = torch.arange(width)
    size = torch.tensor([[len(ids)] for ids, _ in found])
    start = torch.tensor([[start] for _, start in found])
    end = torch.tensor([[-1 if end is None else end] for end in ends])
    return Batch(
        input_ids=torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in found]),
        attention_mask=place < size,
        document=tuple(row.id for row in rows),
        answer=(place >= start) & (place < size),
        entity=place == end,
    )
