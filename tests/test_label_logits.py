"""Logits of the labels alone: those of a pass that makes the logits of all positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from repedit.activations.forward import inputs_of
from repedit.data import Batch
from repedit.training.sampler import collate, label_logits, label_mask, logits_for
from tests.tiny import tiny
from tests.tolerances import close, within


def check_label_logits(subject, batch, labels, whole, read=logits_for):
    """The law: the logits of the labels are those of a pass that makes all logits, and so are the gradients."""
    full = label_logits(subject.model(**inputs_of(batch)).logits, labels)
    found = label_logits(read(subject, batch, labels, whole=whole), labels)
    close(found, full, "gradient, float32")
    trained = [p.requires_grad_(True) for p in subject.model.parameters()]
    pair = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(x.square().sum(), trained, allow_unused=True) if g is not None]
        )
        for x in (found, full)
    ]
    within(float((pair[0] - pair[1]).norm() / pair[1].norm()), "gradient, float32")


def batch_with_answers():
    rows = [Batch(torch.arange(3, 3 + n)[None], torch.ones(1, n, dtype=torch.bool), (str(n),)) for n in (5, 8, 6)]
    marks = [torch.arange(n)[None] >= n - 2 for n in (5, 8, 6)]
    return collate([replace(row, answer=answer) for row, answer in zip(rows, marks, strict=True)])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("place", [None, 0])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "cohere"])
def test_logits_of_labels_alone_are_those_of_all_positions(family, place, whole):
    batch = batch_with_answers()
    with torch.enable_grad():
        check_label_logits(tiny(family), batch, label_mask(batch, place), whole)
        running = replace(batch, answer=None)
        check_label_logits(tiny(family), running, label_mask(running), whole)


def test_logits_of_a_batch_without_labels_are_none():
    batch = replace(batch_with_answers(), answer=torch.zeros(3, 8, dtype=torch.bool))
    labels = label_mask(batch)
    assert label_logits(logits_for(tiny("llama"), batch, labels), labels).shape[0] == 0


def test_logits_of_shifted_labels_are_caught():
    batch = batch_with_answers()

    def shifted(subject, batch, labels, whole):
        return logits_for(subject, batch, labels.roll(-1, 1), whole=whole)

    with torch.enable_grad(), pytest.raises(AssertionError):
        check_label_logits(tiny("llama"), batch, label_mask(batch), False, shifted)
