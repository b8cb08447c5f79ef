"""Training all weights of a copy: gradient difference as a baseline of forgetting, and relearning as an attack on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from repedit.activations.forward import inputs_of
from repedit.auditing.attacks.weights import projections, round_matrices
from repedit.data import Batch, Batches, Fact
from repedit.fit.mrp_training import forget_loss, reference_log_probs, retain_losses
from repedit.models.subject import Subject, subject_of
from repedit.training.sampler import BatchSampler, label_mask, training_rows


def gradient_difference(
    lm: Subject,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    text: Batches,
    *,
    rate: float = 2e-5,
    steps: int = 90,
    batch_size: int = 8,
    seed: int = 0,
    until: Callable[[Subject], bool] = lambda _: False,
    every: int = 15,
) -> tuple[Subject, int]:
    """A copy of the model after AdamW steps on -min(CE_f, cap) + KL_r, the objective of MRP with all weights free.

    Returns it with the steps taken: training ends when `until` says so, asked every `every` steps.
    """
    student = trainable(lm)
    bad = BatchSampler(
        lm, training_rows(forget, "forget", demonstrations=3, seed=seed), batch_size, length=128, seed=seed
    )
    kept = [BatchSampler(lm, training_rows(retain, "retain", demonstrations=3, seed=seed), batch_size, length=128, seed=seed),
            BatchSampler(lm, text, 2, length=48, seed=seed)]  # fmt: skip
    loss_of = forget_loss(bad, lm, among="answers", cap=None)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    for step in range(steps):
        batches = [sampler.at(step) for sampler in kept]
        teachers = [reference_log_probs(lm, rows) for rows in batches]
        batch = bad.at(step)
        optimizer.zero_grad()
        loss, _ = loss_of(student.model(**inputs_of(batch)).logits, batch)
        for rows, teacher in zip(batches, teachers, strict=True):
            loss = loss + retain_losses(student, rows, teacher)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 and until(student):
            return student, step + 1
    return student, steps


def relearn(
    lm: Subject,
    train: Sequence[Fact],
    *,
    rate: float,
    steps: int,
    batch_size: int = 8,
    seed: int = 0,
    hooked: AbstractContextManager[None] | None = None,
    watch: Callable[[int, Subject], None] | None = None,
    embedding_rate: float | None = None,
) -> Subject:
    """A copy of the model, fine-tuned on the answers of some facts, all weights free, AdamW, 10 % warm-up.

    Args:
        hooked: hooks that are active on `lm` itself during training, which is then trained in place.
        watch: called after each step with its number, from 1.
        embedding_rate: of the input embeddings, where it is another one.
    """
    student = trainable(lm) if hooked is None else lm
    for p in student.model.parameters():
        p.requires_grad_(True)
    rows = BatchSampler(student, training_rows(train, "train"), batch_size, length=128, seed=seed)
    embeddings = student.model.get_input_embeddings().weight
    rates = [rate, rate if embedding_rate is None else embedding_rate]
    groups = [[p for p in student.model.parameters() if p is not embeddings], [embeddings]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=rate, weight_decay=0.0, fused=True)
    with hooked or nullcontext():
        for step in range(steps):
            for group, highest in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = highest * min(1.0, (step + 1) / (0.1 * steps))
            batch = rows.at(step)
            optimizer.zero_grad()
            answer_loss(student, batch).backward()
            torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
            optimizer.step()
            if watch is not None:
                watch(step + 1, student)
    return student


def answer_loss(lm: Subject, batch: Batch) -> Tensor:
    """Cross-entropy of the answers.

    Rows often share a wording, so their common prefix is read once, and only answers get logits: half the time, and the
    same loss and gradients up to rounding (tests/test_bench.py).
    """
    use = label_mask(batch)
    length = min(common_prefix(batch), int(use.any(0).int().argmax()) - 1)
    cache = None
    if length > 0:
        cache = lm.model.base_model(batch.input_ids[:1, :length], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(use))
    states = lm.model.base_model(
        batch.input_ids[:, length:], attention_mask=batch.attention_mask.long(), past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state  # fmt: skip
    logits = lm.model.get_output_embeddings()(states[:, :-1][use[:, length + 1 :]])
    return cross_entropy(logits, batch.input_ids[use])


def common_prefix(batch: Batch) -> int:
    """The number of first tokens that all rows have in common."""
    same = (batch.input_ids == batch.input_ids[:1]).all(0) & batch.attention_mask.all(0)
    return int(same.int().cumprod(0).sum())


def trainable(lm: Subject) -> Subject:
    """A copy whose weights may move."""
    model = copy.deepcopy(lm.model)
    for p in model.parameters():
        p.requires_grad_(True)
    return subject_of(model, lm.tokenizer)


def rounded(lm: Subject, bits: int) -> Subject:
    """A copy whose block matrices are stored in 8, 4 or 3 bits, as the audit rounds them: see `quantize`.

    Embeddings, head and norms are left alone.
    """
    student = trainable(lm)
    round_matrices(student, projections(student), f"int{bits}")
    return student
