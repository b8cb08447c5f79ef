"""Every public function with a seed refuses one that no generator takes, before it trains or draws anything."""

from __future__ import annotations

from functools import cache

import pytest

import repedit as rp
from repedit.data import Splits
from repedit.data.generated import cloze
from repedit.errors import ArgumentError
from repedit.vision import recipes, small_cnn, small_mlp, train
from repedit.vision.condensation import buckets, invert
from repedit.vision.data import class_splits, mislabelled_splits, random_splits
from tests.classifiers import drawn, original, request


@cache
def case():
    splits = request(n=60, train=40, remember=8)
    return splits, *original(splits, epochs=1)


def images():
    return case()[0].retain


def trained(function, **more):
    splits, model, task = case()
    return lambda seed: function(model, task, splits, seed=seed, **more)


DRAWING = {
    "facts": lambda seed: rp.data.facts("capitals", seed=seed),
    "invented": lambda seed: rp.data.invented(seed=seed),
    "cloze": lambda seed: cloze(rp.data.prose(), 8, seed=seed),
    "splits": lambda seed: Splits.of(rp.data.facts("capitals"), seed=seed),
    "halves": lambda seed: rp.data.prose().halves(seed),
    "excerpts": lambda seed: rp.data.prose().excerpts(2, seed=seed),
    "code": lambda seed: rp.data.code(seed=seed),
    "small_cnn": lambda seed: small_cnn(images(), seed=seed),
    "small_mlp": lambda seed: small_mlp(images(), seed=seed),
    "class_splits": lambda seed: class_splits(drawn(), 1, train=40, remember=8, seed=seed),
    "random_splits": lambda seed: random_splits(drawn(), train=40, remember=8, seed=seed),
    "mislabelled_splits": lambda seed: mislabelled_splits(drawn(), train=40, remember=8, seed=seed),
    "train": lambda seed: train(case()[1], case()[2], images(), epochs=1, seed=seed),
    "buckets": lambda seed: buckets(case()[1], case()[2], images(), 2, seed=seed),
    "invert": lambda seed: invert(case()[1], images(), buckets(case()[1], case()[2], images(), 2), epochs=1, seed=seed),
    "train_gan": lambda seed: recipes.train_gan(images(), recipes.GanConfig(steps=1), seed=seed),
    **{
        name: lambda seed, name=name: trained(getattr(recipes, name))(seed)
        for name in ("finetune", "ascend", "relabel", "scrub", "salun")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.usefixtures("unchecked")
def test_a_seed_that_no_generator_takes_is_refused(name):
    for seed in (-1, 1.5, None, 2**63):
        with pytest.raises(
            ArgumentError,
            match=r"seed=.*; give a whole number from 0 to 2\^63 - 1|seed.* given where a whole number is needed",
        ):
            DRAWING[name](seed)


@pytest.mark.parametrize("name", ["facts", "halves", "small_cnn", "buckets", "class_splits"])
def test_the_largest_seed_is_taken(name):
    DRAWING[name](2**63 - 1)


@pytest.mark.parametrize("option", ["count", "characters"])
def test_excerpts_have_a_number_and_a_length(option):
    for value in (0, -2):
        with pytest.raises(ArgumentError, match=rf"{option}=.*; give at least 1, a whole number"):
            rp.data.prose().excerpts(**{"count": 2, option: value})
