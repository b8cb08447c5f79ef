"""Rows, each a prompt with an answer, and batches of rows that mark the tokens of the answers.

Prompt and answer are tokenized as one text. The answer begins at the first token that differs from those of the prompt
alone: a token merged across the boundary belongs to the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from repedit.data.corpus import Batch, Batches, Corpus, Document, padded
from repedit.data.encoding import Encoded, Tokenizer, encoded_choices, entity_end, prompt_with_answer
from repedit.errors import ArgumentError, DataError
from repedit.io.text import check_text


@dataclass(frozen=True)
class Row:
    """A prompt and the answer that should follow it.

    Raises:
        DataError: if a field is not a text.
    """

    prompt: str
    answer: str
    id: str
    alternative: str | None = None
    """Another answer, for preference losses."""
    entity: str = ""
    """What the row is about, as written in the prompt; empty if there is no entity."""

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "answer", "entity"):
            check_text(getattr(self, name), f"row {self.id!r}: the {name}")
        if self.alternative is not None:
            check_text(self.alternative, f"row {self.id!r}: the alternative")

    @property
    def text(self) -> str:
        """Prompt and answer as one text."""
        return prompt_with_answer(self.prompt, self.answer)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in the given order; their batches mark the answers and the entities."""

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

    def batches(self, tokenizer: Tokenizer | None, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]:
        """The rows in order, padded on the right, with `answer` and `entity` masks; nothing is truncated.

        Each row starts with the beginning-of-sequence token if the tokenizer adds one.

        Raises:
            DataError: if a row is longer than `length` tokens, or its answer has no token of its own.
            ArgumentError: if there is no tokenizer, or the batch size is below 1.
        """
        if tokenizer is None or batch_size < 1:
            raise ArgumentError(
                f"rows {self.name!r}: batch_size={batch_size}, tokenizer {type(tokenizer).__name__}; rows are text, so "
                "the model needs a tokenizer, and a batch at least 1 row"
            )
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        for i in range(0, len(self.items), batch_size):
            part = self.items[i : i + batch_size]
            texts = [text for (text,) in encoded_choices(tokenizer, [(row.prompt, (row.answer,)) for row in part])]
            for row, (ids, start) in zip(part, texts, strict=True):
                if len(ids) > length:
                    raise DataError(f"row {row.id!r} has {len(ids)} tokens, length={length}; raise length")
                if len(ids) == start:
                    raise DataError(f"row {row.id!r}: the answer {row.answer!r} has no token of its own; give another")
            ends = [entity_end(tokenizer, row.prompt, row.entity) for row in part]
            yield _batch_of_rows(part, texts, ends, pad)


TextSource = Batches | Iterable[str] | Iterable[Row] | Row
"""What holds text: a Corpus, Tokens, Rows or Facts; several rows or facts, or one; several strings."""


def as_batches(source: TextSource, *, name: str = "rows") -> Batches:
    """The batches of whatever holds text.

    Raises:
        DataError: if the source is none of these, mixes them, or is empty.
    """
    if isinstance(source, Batches):
        return source
    items: list[object] = list(source) if isinstance(source, Iterable) and not isinstance(source, str) else [source]
    rows = [item for item in items if isinstance(item, Row)]
    texts = [item for item in items if isinstance(item, str)]
    if items and len(rows) == len(items):
        return Rows(tuple(rows), name)
    if items and len(texts) == len(items) and not isinstance(source, str):
        return Corpus(tuple(Document(str(i), text) for i, text in enumerate(texts)), name)
    kinds = sorted({type(item).__name__ for item in items})
    raise DataError(
        f"{name!r} holds {', '.join(kinds) or 'nothing'}; give a corpus, rows, facts or a list of strings "
        "(a file is read with repedit.data.read or repedit.data.facts)"
    )


def check_ids(items: Sequence[Row], where: str) -> None:
    """Refuse rows with the same id.

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


def _batch_of_rows(rows: Sequence[Row], texts: Sequence[Encoded], ends: Sequence[int | None], pad: int) -> Batch:
    input_ids, mask = padded((ids for ids, _ in texts), pad)
    position = torch.arange(mask.shape[1])
    start = torch.tensor([[start] for _, start in texts])
    end = torch.tensor([[-1 if end is None else end] for end in ends])
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        document=tuple(row.id for row in rows),
        answer=(position >= start) & mask,
        entity=position == end,
    )
