"""Relearning under an ablation: what a copy of a model learns while outputs at some positions are held at other values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.arguments import checked
from repedit.data import Batch, Fact
from repedit.data.corpus import padded
from repedit.errors import NotFinite, check_positive, check_seed, check_whole
from repedit.hooks import Hook, check_differentiable, evaluating, installed
from repedit.metrics.facts import choice_tokens
from repedit.models.subject import Subject, subject_of
from repedit.training.optimizers import descend
from repedit.training.sampler import label_logits, label_mask, logits_for
from repedit.unlearning.sampling import cycled

Ablated = Callable[[Subject, Sequence[int], int], Sequence[Hook]]
"""(the copy, numbers of the facts in a batch, its width in tokens) -> hooks for that batch."""


@dataclass(frozen=True)
@checked
class Relearning:
    """Training of all weights on one half of the facts (T), in all wordings they carry; the other half is V.

    AdamW without weight decay on the cross-entropy of the answers, warm-up over the first tenth of the steps, gradients
    clipped to norm 1.

    Args:
        split: seed of the halves, by entity.
        seed: of the order of the rows.
    Raises:
        ArgumentError: if a number is out of range.
    """

    lr: float = 1e-4
    steps: int = 40
    batch_size: int = 8
    split: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_whole(steps=self.steps, batch_size=self.batch_size)
        check_seed(split=self.split, seed=self.seed)


@checked
@torch.enable_grad()
def relearned(subject: Subject, facts: Sequence[Fact], ablated: Ablated, relearning: Relearning) -> Subject:
    """A copy of the model that learned the answers of facts, with the hooks of `ablated` in every forward pass.

    Raises:
        NotFinite: if the loss is not finite.
        QuantizedModel, NoGradient: if the weights cannot be trained.
    """
    subject.check_unquantized("trained")
    check_differentiable(subject.model)
    model = copy.deepcopy(subject.model)
    student = subject_of(model, subject.tokenizer)
    for p in model.parameters():
        p.requires_grad_(True)
    rows = [_tokens(subject, fact) for fact in facts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=relearning.lr, weight_decay=0.0)

    def gradients(step: int) -> float:
        part = cycled("relearning", len(rows), relearning.batch_size, step - 1, relearning.seed)
        batch = _stacked([rows[i] for i in part], subject.device)
        with installed(model, ablated(student, part, batch.input_ids.shape[1])):
            loss = _loss(student, batch)
        optimizer.zero_grad()
        loss.backward()
        return float(loss.detach())

    def lr(step: int) -> float:
        return relearning.lr * min(1.0, step / (0.1 * relearning.steps))

    with evaluating(model):  # no dropout
        log = descend(list(model.parameters()), optimizer, gradients, relearning.steps, lr=lr)
    if log.diverged:
        raise NotFinite(f"relearning, {log.fault}; lower lr={relearning.lr}")
    return student


def _tokens(subject: Subject, fact: Fact) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the answer), as when choices are compared."""
    ids, answers = choice_tokens(subject.need_tokenizer(), fact, (*fact.choices, fact.answer))
    return ids, answers[-1]


def _stacked(rows: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Batch:
    """The rows as one batch, padded on the right, whose answers are marked."""
    ids, real = padded(prompt + answer for prompt, answer in rows)
    marks, _ = padded([False] * len(prompt) + [True] * len(answer) for prompt, answer in rows)
    names = tuple(map(str, range(len(rows))))
    return Batch(ids.to(device), real.to(device), names, answer=marks.bool().to(device))


def _loss(student: Subject, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy of the answer tokens."""
    labels = label_mask(batch)
    logits = label_logits(logits_for(student, batch, labels, whole=True), labels)
    return torch.nn.functional.cross_entropy(logits, batch.input_ids[labels])
