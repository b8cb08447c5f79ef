"""Laws of how a model runs in training: computing blocks again changes nothing, dropout is drawn from the seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.unlearning.parameters import Parameters
from repedit.unlearning.recipes import RECIPES
from tests.unlearning_cases import sides, subject

QUICK = {"steps": 2, "batch_size": 3, "lr": 1e-3, "progress": False}


def learned(family: str = "llama", name: str = "blur_npo", **options):
    """Two steps of a recipe."""
    recipe = replace(RECIPES[name](), parameters=Parameters(), length=64)
    return rp.unlearn(options.pop("model", None) or subject(family), recipe=recipe, **sides(), **(QUICK | options))


def same(first, second) -> bool:
    """Whether two deltas are equal to the bit."""
    return all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


@pytest.mark.parametrize(("family", "name"), [("llama", "rmu"), ("gpt2", "blur_npo")])
def test_computing_blocks_again_changes_nothing(family, name, monkeypatch):
    calls = []
    lm = subject(family)
    mlp = type(lm.model.get_submodule(lm.layout.block_paths[0]).mlp)
    honest = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: (calls.append(torch.is_grad_enabled()), honest(self, x))[1])
    plain = learned(family, name, model=lm)
    once, calls[:] = sum(calls), []
    again = learned(family, name, model=lm, gradient_checkpointing=True)
    assert set(plain.tensors) == set(again.tensors) and same(plain, again)
    # Above the layer that RMU reads nothing is computed again.
    assert once < sum(calls) <= 2 * once


def test_dropout_is_drawn_from_the_seed():
    first, second, none = (learned("gpt2", dropout=wanted) for wanted in (True, True, False))
    assert same(first, second) and not same(first, none)
    assert first.provenance["options"]["dropout"] is True and "dropout" not in none.provenance["options"]


def test_dropout_survives_computing_again():
    assert same(learned("gpt2", dropout=True), learned("gpt2", dropout=True, gradient_checkpointing=True))


def test_dropout_of_a_model_without_is_refused():
    with pytest.raises(rp.errors.ArgumentError, match=r"this model drops nothing \(attention_dropout=0.0\)"):
        learned(dropout=True)
