"""Rows to train on, in an order that depends on the seed and the step alone, so that a resumed run sees the same ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from repedit.activations.forward import batches_of
from repedit.data import Batch, Batches, Document, Fact, Facts, Rows, as_batches, by_domain, with_paraphrases
from repedit.data.generated import with_demonstrations
from repedit.data.rows import Row
from repedit.errors import DataError, OverlapError
from repedit.models.subject import Subject


def training_rows(source: Any, name: str, *, shown: int = 0, seed: int = 0) -> Batches:
    """The source as batches; facts bring every phrasing they carry.

    Args:
        shown: also ask each fact after this many others of its domain, in a list without words; 0 for not.
    Raises:
        DataError: if it is empty or of an unknown kind.
    """
    items = source.forget if isinstance(source, Facts) else source
    if not isinstance(items, Batches | str) and isinstance(items, Iterable):
        items = tuple(items)
        if items and all(isinstance(item, Fact) for item in items):
            plain = [part for part in by_domain(items).values() if len(part) > shown]
            lists = (
                with_demonstrations([fact for part in plain for fact in part], count=shown, seed=seed) if shown else ()
            )
            items = (*with_paraphrases(items), *lists)
    return as_batches(items, name=name)


def neighbours(forget: Batches, retain: Batches) -> tuple[Batches | None, Batches | None]:
    """The retain rows about entities of the forget set, and the other ones; None for a side with no rows.

    What else a model knows of an entity is what forgetting harms first, so training draws from both sides alike.
    """
    if not isinstance(forget, Rows) or not isinstance(retain, Rows):
        return None, retain
    entities = {row.entity for row in forget.items if row.entity}
    sides = [tuple(row for row in retain.items if (row.entity in entities) == near) for near in (True, False)]
    near, rest = (
        Rows(items, f"{retain.name}, {name}") if items else None
        for items, name in zip(sides, ("near", "other"), strict=True)
    )
    return near, rest


def check_disjoint(subject: Subject, forget: Batches, retain: Batches, *, length: int = 128) -> None:
    """Refuse sets that share rows: one text, or one row of tokens, special ones at its ends apart.

    Args:
        length: longest chunk of running text, as it is trained on.
    Raises:
        OverlapError: with the number of shared rows, and the first of them.
    """
    mine, theirs = _texts(forget), _texts(retain)
    both = [text for text in mine if text in theirs]
    if not both and not (mine and theirs):
        # Tokens have no text, so the other side is compared in tokens too.
        rows = [_token_rows(subject, corpus, length) for corpus in (forget, retain)]
        both = [name for ids, name in rows[0].items() if ids in rows[1]]
    if both or forget.hash == retain.hash:
        first = f", the first is {both[0][:80]!r}" if both else ""
        raise OverlapError(
            f"forget ({forget.name!r}) and retain ({retain.name!r}) share {len(both) or 'all'} rows{first}; nothing can be "
            "forgotten and kept at once"
        )


class Sampler:
    """Rows of a corpus in batches of about one length, drawn without replacement in epochs."""

    def __init__(self, subject: Subject, corpus: Batches, size: int, *, length: int, seed: int) -> None:
        found = batches_of(subject, corpus, length=length, batch_size=64)
        self.rows = [row for batch in found for row in _single(batch, subject.device)]
        if not self.rows:
            raise DataError(f"{corpus.name!r} gives no rows; nothing can be trained on it")
        self.name, self.size, self.seed = corpus.name, min(size, len(self.rows)), seed
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        epoch, place = divmod(step, self.steps_of(1))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._ordered(epoch))
        return collated([self.rows[i] for i in self._epoch[1][place]])

    def steps_of(self, epochs: int) -> int:
        """Steps that see every row this many times."""
        return epochs * -(-len(self.rows) // self.size)

    def _ordered(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch: of every eight batches' worth of shuffled rows, those of one length together."""
        rng = random.Random(f"{self.seed}:{self.name}:{epoch}")
        order = list(range(len(self.rows)))
        rng.shuffle(order)
        window, found = 8 * self.size, []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda i: self.rows[i].input_ids.shape[1])
            batches = [part[i : i + self.size] for i in range(0, len(part), self.size)]
            rng.shuffle(batches)
            found += batches
        return found


def collated(rows: Sequence[Batch]) -> Batch:
    """Single rows as one batch, padded on the right.

    Running text among answered rows is trained on as a whole, as it is alone; it marks no entity.
    """
    width = max(row.input_ids.shape[1] for row in rows)
    if any(row.answer is not None for row in rows):
        rows = [row if row.answer is not None else replace(row, answer=row.attention_mask) for row in rows]
    if any(row.entity is not None for row in rows):
        rows = [row if row.entity is not None else replace(row, entity=row.attention_mask & False) for row in rows]
    names = [f.name for f in fields(Batch) if isinstance(getattr(rows[0], f.name), Tensor)]
    # The token that fills the padding is never looked at: 0 is in every vocabulary.
    joined = {n: torch.cat([torch.nn.functional.pad(getattr(r, n), (0, width - r.input_ids.shape[1])) for r in rows]) for n in names}  # fmt: skip
    return replace(rows[0], document=tuple(row.document[0] for row in rows), **joined)


def _single(batch: Batch, device: torch.device) -> list[Batch]:
    found = []
    for i, name in enumerate(batch.document):
        at = batch.attention_mask[i].nonzero()[:, 0]
        cut = slice(int(at[0]), int(at[-1]) + 1)
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        parts = {n: v[i : i + 1, cut].to(device) for n, v in values.items() if isinstance(v, Tensor)}
        found.append(replace(batch, document=(name,), **parts))
    return found


def _texts(corpus: Batches) -> dict[str, None]:
    """The texts of a corpus, rows or facts; none of what is made of tokens."""
    items = getattr(corpus, "items", getattr(corpus, "documents", getattr(corpus, "forget", ())))
    return dict.fromkeys(item.text for item in items if isinstance(item, Row | Document) and item.text.strip())


def _token_rows(subject: Subject, corpus: Batches, length: int) -> dict[tuple[int, ...], str]:
    """The name of each row by its token ids, without special ones at its ends."""
    special = set(getattr(subject.tokenizer, "all_special_ids", ()))
    rows: dict[tuple[int, ...], str] = {}
    for batch in batches_of(subject, corpus, length=length, batch_size=64):
        for name, row, mask in zip(batch.document, batch.input_ids, batch.attention_mask, strict=True):
            ids = row[mask].tolist()
            while ids and ids[-1] in special:
                ids.pop()
            start = next((i for i, token in enumerate(ids) if token not in special), len(ids))
            rows.setdefault(tuple(ids[start:]), name)
    rows.pop((), None)
    return rows
