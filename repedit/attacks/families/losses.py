"""Texts to learn, batches of them, and the masked loss.

Padding weighs nothing, every item weighs the same, and what a step sees depends on the seed and its number alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.activations.passes import at_least_float32, batches_of, inputs_of
from repedit.data import Batch, as_batches
from repedit.errors import DataError
from repedit.hooks import evaluating
from repedit.models import Subject


class Example(NamedTuple):
    """The tokens of one text, and which of them are to be learned."""

    ids: list[int]
    learned: list[bool]


Draw = Callable[[int], Sequence[Example]]
"""The examples of a step, the first being 0."""


def examples(subject: Subject, source: Any, *, loss: str = "answer", max_tokens: int = 512) -> tuple[Example, ...]:
    """The texts of facts, rows, a corpus or strings, each without padding; text without answers is learned whole.

    Raises:
        DataError: if a row is longer than `max_tokens`, or has no token that another comes before.
    """
    found = []
    for batch in batches_of(subject, as_batches(source), length=max_tokens, batch_size=64):
        marked = batch.attention_mask if loss == "sequence" or batch.answer is None else batch.answer
        for name, ids, real, mark in zip(batch.document, batch.input_ids, batch.attention_mask, marked, strict=True):
            learned = [False, *mark[real].tolist()[1:]]
            if not any(learned):
                raise DataError(f"{name!r}: no token is learned, a first one follows nothing; give a longer text")
            found.append(Example(ids[real].tolist(), learned))
    return tuple(found)


def shuffled(items: Sequence[Example], size: int, seed: int) -> Draw:
    """Batches out of one order an epoch, without a break between epochs; never more than there are items.

    Texts of like length come together, so that little is padding.
    """
    count, size = len(items), min(size, len(items))

    @cache
    def order(epoch: int) -> list[int]:
        drawing = random.Random(f"{seed}:{epoch}")
        ranked = sorted(drawing.sample(range(count), count), key=lambda i: len(items[i].ids))
        # The first places complete the batch that the epoch before began, the last ones begin one.
        first = -epoch * count % size
        last = first + (count - first) // size * size
        whole = [ranked[i : i + size] for i in range(first, last, size)]
        drawing.shuffle(whole)
        return [*ranked[:first], *(i for batch in whole for i in batch), *ranked[last:]]

    def draw(step: int) -> Sequence[Example]:
        places = range(step * size, (step + 1) * size)
        return [items[order(place // count)[place % count]] for place in places]

    return draw


def in_turn(first: Draw, second: Draw, switch: int) -> Draw:
    """The first source before the step `switch`, the second from there on."""
    return lambda step: first(step) if step < switch else second(step - switch)


def padded(items: Sequence[Example], pad: int, *, left: bool = False, extra: int = 0) -> Batch:
    """The examples as one batch; `answer` marks what is learned."""
    width = max(len(item.ids) for item in items) + extra

    def fill(values: list[Any], blank: Any) -> list[Any]:
        rest = [blank] * (width - len(values))
        return rest + values if left else values + rest

    return Batch(
        input_ids=torch.tensor([fill(item.ids, pad) for item in items]),
        attention_mask=torch.tensor([fill([True] * len(item.ids), False) for item in items]),
        document=tuple(str(number) for number in range(len(items))),
        answer=torch.tensor([fill(item.learned, False) for item in items]),
    )


def stacked(subject: Subject, items: Sequence[Example]) -> Batch:
    """The examples as a batch for a model, padded on the left: answers then end together, and few logits are made."""
    return padded(items, padding(subject), left=True)


def masked_loss(subject: Subject, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy of the learned tokens in nats: mean over the tokens of an item, then over the items."""
    assert batch.answer is not None
    ids, mask, answer = (x.to(subject.device) for x in (batch.input_ids, batch.attention_mask, batch.answer))
    # Logits are made from the position before the first learned token on: of answers, few positions of many.
    first = max(1, int(answer.any(0).to(torch.uint8).argmax()))
    read = inputs_of(replace(batch, input_ids=ids, attention_mask=mask))
    logits = subject.model(**read, logits_to_keep=ids.shape[1] - first + 1).logits
    learned = answer[:, first:]
    picked = at_least_float32(logits[:, :-1][learned])
    each = nn.functional.cross_entropy(picked, ids[:, first:][learned], reduction="none")
    share = (learned / learned.sum(1, keepdim=True))[learned]
    return (each * share.to(each)).sum() / len(ids)


def mean_loss(subject: Subject, items: Sequence[Example], batch_size: int = 8) -> float:
    """The loss over all the items, without training."""
    parts = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    with torch.no_grad(), evaluating(subject.model):
        sums = [float(masked_loss(subject, stacked(subject, part))) * len(part) for part in parts]
    return sum(sums) / len(items)


def padding(subject: Subject) -> int:
    """The token that fills rows up; any does, as padding weighs nothing."""
    pad = subject.need_tokenizer().pad_token_id
    return 0 if pad is None else int(pad)
