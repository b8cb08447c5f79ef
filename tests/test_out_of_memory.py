"""Where memory does not suffice, less is read at a time, and the numbers are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repedit.activations.forward import is_out_of_memory, retry_with_smaller_batch
from repedit.auditing.attacks import tuning
from repedit.auditing.attacks.tuning import Example, Tuning, tune
from repedit.errors import TooLarge
from repedit.metrics import facts as metrics
from repedit.metrics.facts import facts_accuracy
from tests.teachable_models import blank, facts, pupil

pytestmark = pytest.mark.numeric


ITEMS = [Example([3, 9, 4, 7, 5][: 3 + i % 3], [False] * (2 + i % 3) + [True]) for i in range(8)]


@pytest.fixture
def by_rows(monkeypatch):
    """Texts are read as rows, not as trees."""
    for module in (tuning, metrics):
        monkeypatch.setattr(module, "tree_capacity", lambda subject: 0)


def starving(subject, rows: int, monkeypatch, size=len) -> list[int]:
    """Let a forward pass of more than so many rows fail as a CPU does; the rows of those that did not."""
    inner, read = subject.model.forward, []

    def forward(*args, **options):
        if size(options["input_ids"]) > rows:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        read.append(size(options["input_ids"]))
        return inner(*args, **options)

    monkeypatch.setattr(subject.model, "forward", forward)
    return read


def trained(subject, **options) -> tuple[torch.Tensor, tuple[float, ...]]:
    plan = Tuning(1e-2, steps=3, optimizer="sgd", **options)
    log = tune(subject, lambda step: ITEMS, plan, at=(), measure=lambda step: None)
    return nn.utils.parameters_to_vector(subject.model.parameters()).detach(), log.losses


def check_training_is_the_same(monkeypatch) -> None:
    whole, losses = trained(blank("llama"))
    subject = blank("llama")
    read = starving(subject, 3, monkeypatch)
    weights, less = trained(subject)
    assert set(read) == {2} and len(read) == 3 * 4  # the size that worked is kept
    assert_close(weights, whole, rtol=1e-5, atol=1e-7)
    assert less == pytest.approx(losses, rel=1e-5)


def test_training_in_parts_is_the_same_training(by_rows, monkeypatch):
    check_training_is_the_same(monkeypatch)


def test_gradients_of_the_last_part_alone_are_caught(by_rows, monkeypatch):
    whole = tuning.masked_loss

    def forgetful(subject, batch):
        for p in subject.model.parameters():
            p.grad = None
        return whole(subject, batch)

    monkeypatch.setattr(tuning, "masked_loss", forgetful)
    with pytest.raises(AssertionError):
        check_training_is_the_same(monkeypatch)


def test_questions_are_asked_in_smaller_trees(monkeypatch):
    subject = pupil()
    whole = facts_accuracy(subject, facts(0, 12))
    read = starving(subject, 45, monkeypatch, size=torch.numel)
    less = facts_accuracy(subject, facts(0, 12))
    assert (less.correct == whole.correct).all() and less.graded == pytest.approx(whole.graded, rel=1e-5)
    assert len(read) > 1 and max(read) <= 45


def test_questions_are_asked_in_smaller_batches(by_rows, monkeypatch):
    subject = pupil()
    whole = facts_accuracy(subject, facts(0, 12))
    read = starving(subject, 40, monkeypatch)
    less = facts_accuracy(subject, facts(0, 12))
    assert (less.correct == whole.correct).all() and less.graded == pytest.approx(whole.graded, rel=1e-5)
    assert max(read) <= 40
    with pytest.raises(RuntimeError, match="allocate memory"):
        facts_accuracy(subject, facts(0, 12), batch_size=12) if starving(subject, 0, monkeypatch) == [] else None


def test_only_a_lack_of_memory_is_tried_again():
    tried = []

    def run(size):
        tried.append(size)
        raise ValueError("nonsense")

    with pytest.raises(ValueError, match="nonsense"):
        retry_with_smaller_batch(run, 8)
    assert tried == [8]
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(TooLarge("by our own rule")) and not is_out_of_memory(RuntimeError("another"))


def test_the_smallest_size_that_fails_raises():
    tried = []

    def run(size):
        tried.append(size)
        raise MemoryError

    with pytest.raises(MemoryError):
        retry_with_smaller_batch(run, 12)
    assert tried == [12, 6, 3, 1]
