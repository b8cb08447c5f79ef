"""Training all weights of a copy: gradient difference as a baseline of forgetting, and relearning as an attack on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import cross_entropy

from repedit.activations.forward import inputs_of
from repedit.auditing.attacks.weights import projections, round_matrices
from repedit.data import Batches, Fact
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
) -> Subject:
    """A copy of the model, fine-tuned on the answers of some facts, all weights free, AdamW, 10 % warm-up.

    Args:
        hooked: hooks that are active on `lm` itself during training, which is then trained in place.
    """
    student = trainable(lm) if hooked is None else lm
    for p in student.model.parameters():
        p.requires_grad_(True)
    rows = BatchSampler(student, training_rows(train, "train"), batch_size, length=128, seed=seed)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    with hooked or nullcontext():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / (0.1 * steps))
            batch = rows.at(step)
            optimizer.zero_grad()
            logits, use = student.model(**inputs_of(batch)).logits, label_mask(batch)
            cross_entropy(logits[:, :-1][use[:, 1:]], batch.input_ids[use]).backward()
            torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
            optimizer.step()
    return student


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
