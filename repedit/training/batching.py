"""Batches of rows: padding, the labels a loss is about, and the logits that predict them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.activations.forward import at_least_float32
from repedit.data import Batch


def collate(rows: Sequence[Batch]) -> Batch:
    """Single rows as one batch, padded on the right.

    Running text among rows with answers is trained on as a whole, as it is on its own, and marks no entity.
    """
    width = max(row.input_ids.shape[1] for row in rows)
    if any(row.answer is not None for row in rows):
        rows = [row if row.answer is not None else replace(row, answer=row.attention_mask) for row in rows]
    if any(row.entity is not None for row in rows):
        rows = [row if row.entity is not None else replace(row, entity=row.attention_mask & False) for row in rows]

    def padded(name: str) -> Tensor:
        # The padding token is never looked at: 0 is in every vocabulary.
        return torch.cat([torch.nn.functional.pad(getattr(r, name), (0, width - r.input_ids.shape[1])) for r in rows])

    tensors = {name: padded(name) for name in _tensor_fields(rows[0])}
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


def label_logits(logits: Float[Tensor, "b t v"], labels: Bool[Tensor, "b t"]) -> Float[Tensor, "n v"]:
    """The logits that predict the labels, in at least float32."""
    return at_least_float32(logits[:, :-1][labels[:, 1:]])


def answer_ids(batch: Batch) -> list[tuple[int, ...]]:
    """The token ids of the answer of each row; empty where none are marked."""
    if batch.answer is None:
        return [()] * len(batch.document)
    return [tuple(ids[mask].tolist()) for ids, mask in zip(batch.input_ids, batch.answer, strict=True)]


def _tensor_fields(batch: Batch) -> list[str]:
    return [field.name for field in fields(batch) if isinstance(getattr(batch, field.name), Tensor)]
