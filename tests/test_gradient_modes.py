"""What is trained does not depend on whether the caller switched gradients off; under inference_mode it is refused."""

from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.data import Fact
from repedit.errors import NoGradient
from repedit.fit.gates import gates
from repedit.fit.mrp_training import train
from repedit.hashing import fingerprint, state
from repedit.metrics.relearning import Relearning, relearned
from repedit.models.subject import subject_of
from repedit.unlearning.masks import saliency
from tests.classifiers import original, request
from tests.saved_models import byte_tokenizer
from tests.test_vision_recipes import RECIPES
from tests.tiny import tiny

FORGET = rp.data.read([f"the quick brown fox {i} jumps" for i in range(8)], name="forget")
RETAIN = rp.data.read([f"a slow dog {i} sleeps on" for i in range(8)], name="retain")
FACTS = tuple(Fact(id=str(i), entity=f"n{i}", prompt=f"n{i} is", answer="odd", choices=("odd", "even")) for i in range(4))  # fmt: skip
RECIPE = rp.recipes.npo(steps=2)


def values(edit):
    """The tensors of an edit or a delta."""
    maps = getattr(edit, "maps", None)
    return dict(edit.tensors) if maps is None else {str(site): map_.as_matrix() for site, map_ in maps.items()}


TRAININGS = {
    "mrp": lambda lm: values(rp.mrp(lm, forget=FORGET, retain=RETAIN, sites="0.mlp.out", rank=1, config={"steps": 2}, progress=False)),
    "unlearn": lambda lm: values(rp.unlearn(lm, recipe=RECIPE, forget=FORGET, retain=RETAIN, progress=False)),
    "saliency": lambda lm: dict(saliency(lm, FORGET).tensors),
    "relearned": lambda lm: dict(relearned(lm, FACTS, lambda *_: (), Relearning(steps=2)).model.named_parameters()),
    "gates": lambda lm: values(gates(lm, FORGET, RETAIN, steps=8, lr=0.5, retain_weight=0.0, progress=False)),
    "gradients": lambda lm: {str(s): v.gxa_abs for s, v in rp.collect(lm, FORGET, gradients=True).items()},
}  # fmt: skip


@pytest.fixture
def lm():
    return replace(tiny("llama", vocab_size=260), tokenizer=byte_tokenizer())


def same_with_gradients_off(training, lm):
    """The law: a training gives the same tensors under no_grad."""
    expected = training(lm)
    with torch.no_grad():
        found = training(lm)
    assert expected and expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.parametrize("name", TRAININGS)
def test_a_caller_without_gradients_gets_the_same_training(name, lm):
    same_with_gradients_off(TRAININGS[name], lm)


def test_a_training_that_leaves_gradients_off_is_caught(lm, monkeypatch):
    monkeypatch.setattr("repedit.fit.mrp.train", train.__wrapped__)
    with pytest.raises(RuntimeError, match="does not require grad"):
        same_with_gradients_off(TRAININGS["mrp"], lm)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_under_inference_mode_is_refused(name, lm):
    with torch.inference_mode(), pytest.raises(NoGradient, match=r"under torch.inference_mode, .*; leave that context"):
        TRAININGS[name](lm)


@pytest.fixture
def unrecorded():
    """A model whose weights were made under inference_mode."""
    with torch.inference_mode():
        made = tiny("llama", vocab_size=260).model
        return subject_of(type(made)(made.config).eval(), byte_tokenizer())


@pytest.mark.parametrize("name", TRAININGS)
def test_weights_that_were_made_under_inference_mode_are_not_trained(name, unrecorded):
    with pytest.raises(NoGradient, match=r"was made under torch.inference_mode, .*; load the model outside"):
        TRAININGS[name](unrecorded)


def test_weights_that_were_made_under_inference_mode_are_measured(unrecorded):
    before, key = rp.collect(unrecorded, FORGET)["0.mlp.neurons"].abs, state(unrecorded.model)
    assert fingerprint(unrecorded.model) == unrecorded.fingerprint() and state(unrecorded.model) == key
    with torch.inference_mode():
        unrecorded.model.model.layers[0].mlp.up_proj.weight[:2] = (
            unrecorded.model.model.layers[0].mlp.up_proj.weight[:2].flip(0)
        )
    assert state(unrecorded.model) != key
    assert not torch.equal(before, rp.collect(unrecorded, FORGET)["0.mlp.neurons"].abs)


@pytest.mark.parametrize("name", ["finetune", "multi_gan", "condense", "scrub", "salun"])
def test_a_classifier_is_trained_whatever_the_caller_switched_off(name):
    splits = request()
    model, task = original(splits)
    same_with_gradients_off(lambda _: dict(RECIPES[name](model, task, splits, 0).tensors), None)
