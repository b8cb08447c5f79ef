"""Feeding a corpus through a model: batches on its device, what its forward takes, the loss of its predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from repedit.data import Batch, Batches
from repedit.errors import check_whole, during
from repedit.models import Subject


def batches(
    subject: Subject, corpus: Batches, length: int, batch_size: int, progress: bool | None, label: str
) -> Iterator[Batch]:
    """The batches of a corpus on the subject's device, with a progress bar where the output is a terminal.

    Raises:
        ArgumentError: if the length or the batch size is no whole number of at least 1.
    """
    check_whole(length=length, batch_size=batch_size)
    tokenizer = subject.tokenizer if not hasattr(corpus, "documents") else subject.need_tokenizer()
    items = list(corpus.batches(tokenizer, length=length, batch_size=batch_size))
    for batch in tqdm(
        items, desc=f"{label} {corpus.name}", disable=None if progress is None else not progress, leave=False
    ):
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        yield replace(batch, **{name: v.to(subject.device) for name, v in values.items() if isinstance(v, Tensor)})


def inputs_of(batch: Batch) -> dict[str, Any]:
    """What the forward pass of a model takes for a batch.

    Positions are spelled out where a row is padded on the left: GPT-2 and GPT-Neo would count the padding.
    """
    mask = batch.attention_mask
    found = {"input_ids": batch.input_ids, "attention_mask": mask.long(), "use_cache": False}
    return found if bool(mask[:, 0].all()) else found | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def at_least_float32(x: Tensor) -> Tensor:
    """x, with half types widened: log-probabilities of bfloat16 are coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def loss_of(logits: Float[Tensor, "b t v"], batch: Batch, mask: Bool[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Summed negative log-likelihood, each token predicted from the position before it.

    The tokens are the answers where the batch marks them, else the counted ones.
    """
    use = batch.attention_mask[:, :-1] & (mask if batch.answer is None else batch.answer)[:, 1:]
    picked = at_least_float32(logits[:, :-1][use]).log_softmax(-1)
    return -picked.gather(1, batch.input_ids[:, 1:][use][:, None]).sum()


def named_batch(number: int) -> AbstractContextManager[None]:
    """Say which batch failed; nothing is skipped."""
    return during(f"batch {number}", f"in batch {number} of the corpus; no batch was skipped")
