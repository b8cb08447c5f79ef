"""Rows to train on, in an order that depends on the seed and the step alone, and the batches they are collated into."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.activations.forward import at_least_float32, batches_of, inputs_of
from repedit.data import (
    Batch,
    Batches,
    Document,
    Fact,
    Facts,
    Row,
    Rows,
    TextSource,
    as_batches,
    by_domain,
    with_paraphrases,
)
from repedit.data.generated import with_demonstrations
from repedit.errors import DataError, OverlapError
from repedit.models.subject import Subject

# --- Batches of rows: padding, the labels a loss is about, and the logits that predict them


def collate(rows: Sequence[Batch]) -> Batch:
    """Single rows as one batch, padded on the right.

    Running text among rows with answers is trained on as a whole, as it is on its own, and marks no entity.
    """
    width = max(row.input_ids.shape[1] for row in rows)
    if any(row.answer is not None for row in rows):
        rows = [row if row.answer is not None else replace(row, answer=row.attention_mask) for row in rows]
    if any(row.entity is not None for row in rows):
        rows = [row if row.entity is not None else replace(row, entity=row.attention_mask & False) for row in rows]

    def column(name: str) -> Tensor:
        # The padding token is never looked at: 0 is in every vocabulary.
        return torch.cat([torch.nn.functional.pad(getattr(r, name), (0, width - r.input_ids.shape[1])) for r in rows])

    tensors = {name: column(name) for name in _tensor_fields(rows[0])}
    return replace(rows[0], document=tuple(row.document[0] for row in rows), **tensors)


def single_rows(batch: Batch, device: torch.device) -> list[Batch]:
    """The rows of a batch one by one, without padding, on a device."""
    rows = []
    for i, name in enumerate(batch.document):
        real = batch.attention_mask[i].nonzero()[:, 0]
        columns = slice(int(real[0]), int(real[-1]) + 1)
        tensors = {field: getattr(batch, field)[i : i + 1, columns].to(device) for field in _tensor_fields(batch)}
        rows.append(replace(batch, document=(name,), **tensors))
    return rows


def label_mask(batch: Batch, place: int | None = None) -> Bool[Tensor, "b t"]:
    """True on the tokens a loss is about: the answers, or all but the first token of rows that mark none.

    Args:
        place: only the answer token of this index, the first being 0; None for all of them.
    """
    mask = batch.attention_mask if batch.answer is None else batch.answer & batch.attention_mask
    if place is not None and batch.answer is not None:
        mask = mask & (mask.cumsum(1) == place + 1)
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:] & batch.attention_mask[:, :-1]], 1)


def label_logits(logits: Float[Tensor, "b s v"], labels: Bool[Tensor, "b t"]) -> Float[Tensor, "n v"]:
    """The logits that predict the labels, in at least float32; the logits of all positions, or those of `logits_for`."""
    columns = slice(1, None) if logits.shape[1] == labels.shape[1] else _label_columns(labels)
    return at_least_float32(logits[:, : labels[:, columns].shape[1]][labels[:, columns]])


def logits_for(
    subject: Subject, batch: Batch, labels: Bool[Tensor, "b t"], *, whole: bool = False
) -> Float[Tensor, "b s v"]:
    """The logits of the positions before the first label to before the last one, which `label_logits` takes.

    The output matrix costs a fifth of a small model's pass; answers are few positions of many.

    Args:
        whole: also read what stands at the last label and behind it, which predicts none: hooks may look at it.
    """
    columns = _label_columns(labels)
    last = labels.shape[1] if whole else columns.stop - 1
    read = Batch(batch.input_ids[:, :last], batch.attention_mask[:, :last], batch.document)
    logits = subject.model(**inputs_of(read), logits_to_keep=last - columns.start + 1).logits
    return logits[:, : columns.stop - columns.start]


def _label_columns(labels: Bool[Tensor, "b t"]) -> slice:
    """From the first column with a label to the last one; the second column where there is none."""
    columns = labels.any(0).nonzero()[:, 0].tolist() or [1]
    return slice(columns[0], columns[-1] + 1)


def answer_ids(batch: Batch) -> list[tuple[int, ...]]:
    """The token ids of the answer of each row; empty where none are marked."""
    if batch.answer is None:
        return [()] * len(batch.document)
    return [tuple(ids[mask].tolist()) for ids, mask in zip(batch.input_ids, batch.answer, strict=True)]


def _tensor_fields(batch: Batch) -> list[str]:
    return [field.name for field in fields(batch) if isinstance(getattr(batch, field.name), Tensor)]


# --- The rows to train on, and the order in which steps see them: it depends on the seed and the step alone


def training_rows(source: TextSource, name: str, *, demonstrations: int = 0, seed: int = 0) -> Batches:
    """The source as batches; facts bring every phrasing they carry.

    Args:
        demonstrations: also ask each fact after this many others of its domain, in a list without words; 0 for not.
    Raises:
        DataError: if it is empty or of an unknown kind.
    """
    items: TextSource = source.forget if isinstance(source, Facts) else source
    if not isinstance(items, Batches | str) and isinstance(items, Iterable):
        rows = tuple(items)
        items = cast(TextSource, rows)
        facts = [row for row in rows if isinstance(row, Fact)]
        if facts and len(facts) == len(rows):
            lists: tuple[Fact, ...] = ()
            if demonstrations:
                shown = [fact for part in by_domain(facts).values() if len(part) > demonstrations for fact in part]
                lists = with_demonstrations(shown, count=demonstrations, seed=seed)
            items = (*with_paraphrases(facts), *lists)
    return as_batches(items, name=name)


def split_by_entity(forget: Batches, retain: Batches) -> tuple[Batches | None, Batches | None]:
    """The retain rows about entities of the forget set, and the other ones; None for a side without rows.

    Forgetting first harms what else a model knows of an entity, so training draws from both sides alike.
    """
    if not isinstance(forget, Rows) or not isinstance(retain, Rows):
        return None, retain
    entities = {row.entity for row in forget.items if row.entity}
    near = tuple(row for row in retain.items if row.entity in entities)
    other = tuple(row for row in retain.items if row.entity not in entities)
    return (
        Rows(near, f"{retain.name}, near") if near else None,
        Rows(other, f"{retain.name}, other") if other else None,
    )


def check_disjoint(subject: Subject, forget: Batches, retain: Batches, *, length: int = 128) -> None:
    """Refuse sets that share rows: the same text, or the same tokens apart from special ones at the ends.

    Args:
        length: longest chunk of running text, as it is trained on.
    Raises:
        OverlapError: with the number of shared rows, and the first of them.
    """
    forget_texts, retain_texts = _texts(forget), _texts(retain)
    shared = [text for text in forget_texts if text in retain_texts]
    if not shared and not (forget_texts and retain_texts):
        # Tokens have no text, so the other side is compared in tokens too.
        forget_rows, retain_rows = (_token_rows(subject, corpus, length) for corpus in (forget, retain))
        shared = [name for ids, name in forget_rows.items() if ids in retain_rows]
    if shared or forget.hash == retain.hash:
        first = f", the first is {shared[0][:80]!r}" if shared else ""
        raise OverlapError(
            f"forget ({forget.name!r}) and retain ({retain.name!r}) share {len(shared) or 'all'} rows{first}; the same rows "
            "cannot be both forgotten and retained"
        )


class BatchSampler:
    """Batches of rows of similar length, drawn without replacement in epochs."""

    def __init__(self, subject: Subject, corpus: Batches, batch_size: int, *, length: int, seed: int) -> None:
        batches = batches_of(subject, corpus, length=length, batch_size=64)
        self.rows = [row for batch in batches for row in single_rows(batch, subject.device)]
        if not self.rows:
            raise DataError(f"{corpus.name!r} gives no rows; nothing can be trained on it")
        self.name, self.batch_size, self.seed = corpus.name, min(batch_size, len(self.rows)), seed
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        epoch, place = divmod(step, self.steps_for(1))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return collate([self.rows[i] for i in self._epoch[1][place]])

    def steps_for(self, epochs: int) -> int:
        """Steps that see every row this many times."""
        return epochs * -(-len(self.rows) // self.batch_size)

    def _batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch: of every eight batches' worth of shuffled rows, those of similar length together."""
        rng = random.Random(f"{self.seed}:{self.name}:{epoch}")
        order = list(range(len(self.rows)))
        rng.shuffle(order)
        window, epoch_batches = 8 * self.batch_size, []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda i: self.rows[i].input_ids.shape[1])
            batches = [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
            rng.shuffle(batches)
            epoch_batches += batches
        return epoch_batches


def _texts(corpus: Batches) -> dict[str, None]:
    """The texts of a corpus, rows or facts; none of a corpus of tokens."""
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
