"""Forward passes over a corpus: batches on the device of the model, smaller ones when memory runs out, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from repedit.data import Batch, Batches, Corpus, Facts, Rows
from repedit.errors import DataError, RepeditError, check_whole, during
from repedit.models.subject import Subject

T = TypeVar("T")

# --- Smaller batches when memory runs out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine ran out of memory; errors that repedit raises itself do not count."""
    if isinstance(error, RepeditError):
        return False
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def retry_with_smaller_batch(run: Callable[[int], T], size: int) -> tuple[T, int]:
    """(run(size), size), where the size is halved until memory suffices.

    Raises:
        Exception: the error of `run`, if memory does not suffice for a size of 1 either or the error is another one.
    """
    while True:
        try:
            return run(size), size
        except (MemoryError, RuntimeError) as error:
            if size <= 1 or not is_out_of_memory(error):
                raise
        size //= 2


# --- Feeding a corpus to a model


def batches(
    subject: Subject, corpus: Batches, length: int, batch_size: int, progress: bool | None, label: str
) -> Iterator[Batch]:
    """The batches of a corpus on the device of the model, with a progress bar if the output is a terminal.

    Raises:
        ArgumentError: if the length or the batch size is not an integer of at least 1.
    """
    check_whole(length=length, batch_size=batch_size)
    items = list(batches_of(subject, corpus, length=length, batch_size=batch_size))
    for batch in tqdm(
        items, desc=f"{label} {corpus.name}", disable=None if progress is None else not progress, leave=False
    ):
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        yield replace(batch, **{name: v.to(subject.device) for name, v in values.items() if isinstance(v, Tensor)})


def batches_of(subject: Subject, corpus: Batches, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]:
    """The batches of a corpus in the tokens of a model, each checked before it is used.

    Raises:
        ArgumentError: if the corpus is text and the model has no tokenizer.
        DataError: if a token id or position is out of the model's range, with the document or row.
    """
    tokenizer = subject.need_tokenizer() if isinstance(corpus, Corpus | Rows | Facts) else subject.tokenizer
    for batch in corpus.batches(tokenizer, length=length, batch_size=batch_size):
        ids, mask = batch.input_ids, batch.attention_mask
        unpadded_left = not ids.numel() or bool(mask[:, 0].all())
        for row, name in enumerate(batch.document):
            # Padding on the right takes up positions, on the left none; both kinds go through the embedding.
            size = ids.shape[1] if unpadded_left else int(mask[row].sum())
            check_ids(subject, ids[row].tolist(), f"corpus {corpus.name!r}, row {name!r}", size=size)
        yield batch


def check_ids(subject: Subject, ids: Sequence[int], where: str, *, size: int | None = None) -> None:
    """Refuse token ids without an embedding, and sequences longer than the model has positions.

    Args:
        size: number of positions taken; the number of ids when None.
    Raises:
        DataError: with the first such id and its index, or both lengths.
    """
    table, limit = subject.model.get_input_embeddings(), max_positions(subject)
    rows = getattr(table, "num_embeddings", None) or table.weight.shape[0]
    if ids and not (min(ids) >= 0 and max(ids) < rows):
        at = next(i for i, token in enumerate(ids) if not 0 <= token < rows)
        raise DataError(
            f"{where}: token {at} has the id {ids[at]}, the model has embeddings for 0 to {rows - 1}; give the tokenizer that "
            "belongs to the model, or resize its embeddings (model.resize_token_embeddings)"
        )
    size = len(ids) if size is None else size
    if limit is not None and size > limit:
        raise DataError(
            f"{where} has {size} tokens, the model has {limit} positions; shorten it, or give a lower length"
        )


def max_positions(subject: Subject) -> int | None:
    """Number of positions of the model; None where positions are computed, as rotary ones are."""
    config = subject.model.config.get_text_config()
    if getattr(config, "rope_parameters", None):
        return None
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def inputs_of(batch: Batch) -> dict[str, Any]:
    """The arguments of a model's forward pass for a batch.

    Position ids are given where a row is padded on the left: GPT-2 and GPT-Neo would count the padding.
    """
    mask = batch.attention_mask
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask.long(), "use_cache": False}
    return inputs if bool(mask[:, 0].all()) else inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def at_least_float32(x: Tensor) -> Tensor:
    """x, with half-precision types widened: log-probabilities in bfloat16 are coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def loss_of(logits: Float[Tensor, "b t v"], batch: Batch, mask: Bool[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Summed negative log-likelihood, each token predicted from the position before it.

    The tokens are the answers if the batch marks them, and the counted tokens otherwise.
    """
    use = batch.attention_mask[:, :-1] & (mask if batch.answer is None else batch.answer)[:, 1:]
    picked = at_least_float32(logits[:, :-1][use]).log_softmax(-1)
    return -picked.gather(1, batch.input_ids[:, 1:][use][:, None]).sum()


def note_batch_on_error(number: int) -> AbstractContextManager[None]:
    """Add the number of the batch to an error; no batch is skipped."""
    return during(f"batch {number}", f"in batch {number} of the corpus; no batch was skipped")
