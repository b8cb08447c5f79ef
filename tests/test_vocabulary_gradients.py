"""Gradients of embeddings and output matrices that are added in place: those of autograd, from step to step."""

from __future__ import annotations

import pytest
import torch

from repedit.training import optimizers
from repedit.training.optimizers import added_in_place, zero_gradients
from tests.tiny import FAMILIES, ids, tiny
from tests.tolerances import within


def gradients(model, steps, kept=()):
    """The gradients of each step, one after another."""
    parameters, found = [p.requires_grad_(True) for p in model.parameters()], []
    for seed in range(steps):
        zero_gradients(parameters, kept)
        model(input_ids=ids(seed=seed), use_cache=False).logits.log_softmax(-1)[:, :, 7].sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
    return torch.stack(found)


def check_in_place(model, expect=None):
    """The law: the gradients of two steps in a row are those that autograd makes."""
    expected = gradients(model, 2)
    for p in model.parameters():
        p.grad = None
    with added_in_place(model) as kept:
        found = gradients(model, 2, kept)
    assert expect is None or len(kept) == expect
    within(float((found - expected).norm() / expected.norm()), "gradient, float32")


def padding(model):
    """The model with one of its tokens as padding, whose embedding is not learned from inputs."""
    model.get_input_embeddings().padding_idx = int(ids()[0, 3])
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_place_are_those_of_autograd(family):
    with torch.enable_grad():
        check_in_place(tiny(family).model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_separate_matrices_and_padding(tied):
    with torch.enable_grad():
        check_in_place(padding(tiny("llama", tie_word_embeddings=tied).model), expect=1 if tied else 2)


BROKEN = {
    "padding is learned": lambda patch, model: patch.setattr(model.get_input_embeddings(), "padding_idx", None),
    "gradients pile up": lambda patch, model: patch.setitem(
        globals(), "zero_gradients", lambda parameters, kept=(): None if kept else zero_gradients(parameters)
    ),
    "half of the output gradient": lambda patch, model: patch.setattr(
        optimizers, "_gradient", lambda weight: _halved(weight)
    ),
}


def _halved(weight):
    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad / 2
    return weight.grad


@pytest.mark.parametrize("name", BROKEN)
def test_broken_gradients_are_caught(name, monkeypatch):
    model = padding(tiny("llama").model)
    with torch.enable_grad():
        expected = gradients(model, 2)
        for p in model.parameters():
            p.grad = None
        with added_in_place(model) as kept:
            BROKEN[name](monkeypatch, model)
            found = gradients(model, 2, kept)
    with pytest.raises(AssertionError):
        within(float((found - expected).norm() / expected.norm()), "gradient, float32")


def test_other_modules_and_untrained_ones_stay():
    model = tiny("llama").model.requires_grad_(False)
    with added_in_place(model) as kept:
        assert not kept
    with added_in_place(tiny("gemma").model.requires_grad_(True)) as kept:
        # The embeddings of Gemma scale what they give.
        assert len(kept) == 1
    with added_in_place(tiny("llama", dtype=torch.bfloat16).model.requires_grad_(True)) as kept:
        assert not kept
    assert "forward" not in vars(model.get_input_embeddings())
