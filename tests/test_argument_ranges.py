"""Numbers that cannot be meant are refused where they enter the library, before anything is read, trained or written."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest

import repedit as rp
from repedit.auditing.api import audit
from repedit.errors import ArgumentError, DataError, RankError, check_positive, check_seed, check_whole, given, nearest
from repedit.fit import Regression
from repedit.fit.mrp import mrp
from repedit.metrics.generation import stream
from repedit.neurons.pruning import PruningOptions
from repedit.unlearning import combiners, losses, sampling, schedule
from repedit.unlearning.parameters import Lora, Parameters
from repedit.unlearning.recipe import OptimizerConfig
from repedit.unlearning.recipes import by_name
from tests.tiny import tiny
from tests.unlearning_cases import sides, subject

NAN, INF = float("nan"), float("inf")
COUNT: tuple[Any, ...] = (0, -1)
RATE: tuple[Any, ...] = (0.0, -1e-4, NAN, INF)
prune = partial(PruningOptions, fraction=0.1)
unlearn = lambda **more: rp.unlearn(subject(), recipe=by_name("ga"), **sides(), **more)  # noqa: E731
train = lambda **more: mrp(tiny("llama"), forget=(), retain=(), config=more)  # noqa: E731
values = lambda **more: rp.fit.overwrite(tiny("llama"), (), **more)  # noqa: E731
attack = lambda **more: audit("nowhere", original="nowhere", facts=(), **more)  # noqa: E731
DOORS: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
    "recipe steps": (partial(by_name, "npo"), "steps", COUNT),
    "recipe batch": (partial(by_name, "small:npo"), "batch_size", COUNT),
    "recipe length": (partial(by_name, "npo"), "length", (1, *COUNT)),
    "recipe lr": (partial(by_name, "small:npo"), "lr", RATE),
    "recipe epochs": (partial(by_name, "npo"), "epochs", RATE),
    "recipe scale": (partial(by_name, "npo"), "scale", (0.0, NAN, INF)),
    "beta": (partial(by_name, "npo"), "beta", RATE),
    "cap": (partial(by_name, "ga"), "cap", RATE),
    "percentile": (partial(by_name, "sure:npo"), "percentile", (-1.0, 101.0, NAN)),
    "micro-batch": (unlearn, "micro_batch", COUNT),
    "clip": (unlearn, "clip", RATE),
    "seed": (unlearn, "seed", (-1, 2**63)),
    "epochs": (unlearn, "epochs", RATE),
    "lora": (Lora, "rank", COUNT),
    "layers": (Parameters, "layers", ("", " ")),
    "modules": (Parameters, "modules", (("",),)),
    "pattern": (Parameters, "pattern", ("(",)),
    "decay": (OptimizerConfig, "weight_decay", (-1.0, NAN)),
    "betas": (OptimizerConfig, "betas", ((0.9, 1.0), (NAN, 0.9))),
    "warm-up": (schedule.Schedule, "warmup", (-1.0, NAN, INF)),
    "rule": (schedule.steps, "n", COUNT),
    "ratio": (sampling.paired, "ratio", RATE),
    "gamma": (combiners.weighted_sum, "gamma", RATE),
    "cache": (losses.kl, "cache", COUNT),
    "prune steps": (prune, "steps", COUNT),
    "prune tokens": (prune, "tokens", (-5, *COUNT)),
    "prune batch": (prune, "batch_size", COUNT),
    "prune control": (prune, "control", (-1,)),
    "prune drop": (prune, "max_retain_drop", (NAN, INF)),
    "prune fraction": (PruningOptions, "fraction", (-0.1, 1.1, NAN, None)),
    "prune cap": (prune, "cap_per_layer", (-0.1, NAN)),
    "prune seed": (prune, "seed", (-1, 2**64)),
    "mrp steps": (train, "steps", COUNT),
    "mrp rate": (train, "lr", RATE),
    "mrp batch": (train, "batch_size", COUNT),
    "mrp seed": (train, "seed", (-1,)),
    "overwrite lam": (values, "lam", RATE),
    "overwrite budget": (values, "retain_budget", RATE),
    "overwrite others": (values, "others_weight", RATE),
    "overwrite rank": (values, "keep_rank", COUNT),
    "overwrite seed": (values, "seed", (-1,)),
    "regression steps": (Regression, "steps", COUNT),
    "regression rows": (Regression, "retain_rows", COUNT),
    "regression rate": (Regression, "lr", RATE),
    "regression beta": (Regression, "beta", RATE),
    "regression vocabulary": (Regression, "vocabulary", (-1,)),
    "audit steps": (attack, "steps", (7, *COUNT)),
    "audit draws": (attack, "draws", COUNT),
    "audit rates": (attack, "scale_lrs", RATE),
    "audit seeds": (attack, "seeds", ((), (-1,), (0, 0))),
    "bins": (lambda **more: rp.peaks(tiny("llama"), rp.data.prose(), rp.Edit({}), **more), "bins", COUNT),
    "width of activity": (rp.Activity.zeros, "width", COUNT),
    "width of moments": (rp.Moments, "width", COUNT),
    "width of labels": (partial(rp.CrossMoments, 3), "other", COUNT),
    "wrong choices": (partial(rp.data.with_choices, ()), "count", (1, *COUNT)),
    "order of choices": (partial(rp.data.with_choices, ()), "seed", (-1, 2**63)),
    "random width": (partial(rp.fit.random_basis, rank=1, seed=0), "d", COUNT),
    "random seed": (partial(rp.fit.random_basis, 4, rank=1), "seed", (-1, 2**63)),
    "energy": (partial(rp.fit.spectra, rp.Moments(2), rp.Moments(2)), "energy", (-0.1, 1.1, NAN)),
    "rank of a series": (partial(rp.ContinualMRP, tiny("llama")), "rank", COUNT),
    "mrp weight": (train, "kl_weight", (-1.0, NAN, INF)),
    "mrp retain weight": (train, "retain_weight", (-1.0, NAN, INF)),
    "layers of a figure": (partial(rp.plot.pruned_per_layer, rp.Edit({})), "layers", COUNT),
    "condensed buckets": (rp.vision.Condense, "k", COUNT),
    "condensed rate": (rp.vision.Condense, "lr", RATE),
    "gan latent": (rp.vision.GanConfig, "latent", COUNT),
    "gan rate": (rp.vision.GanConfig, "lr", RATE),
    "words": (lambda **more: stream(tiny("llama"), [5], **more), "max_new_tokens", COUNT),
    "temperature": (lambda **more: stream(tiny("llama"), [5], **more), "temperature", (-1.0, NAN, INF)),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_a_number_that_cannot_be_meant_is_refused(door):
    call, name, values = DOORS[door]
    for value in values:
        with pytest.raises(ArgumentError, match=rf"{name}|prune everything|fraction is needed"):
            call(**{name: value})


NEEDED = (
    "lora", "rule", "ratio", "gamma", "prune steps", "prune tokens", "prune batch", "prune control", "overwrite others",
    "regression steps", "regression rows", "regression rate", "regression beta", "regression vocabulary", "audit steps", "audit draws",
    "audit rates",
)  # fmt: skip
"""Doors with a number that cannot be left out."""


@pytest.mark.parametrize("door", NEEDED)
@pytest.mark.usefixtures("unchecked")
def test_none_is_no_number(door):
    call, name, _ = DOORS[door]
    with pytest.raises(ArgumentError, match=rf"{name}(=None|: None was given)"):
        call(**{name: None})


def test_a_recipe_refuses_none_where_it_has_no_meaning():
    with pytest.raises(ArgumentError, match=r"beta=None; give a value, or omit it for 0\.1"):
        by_name("npo", beta=None)


@pytest.mark.parametrize("given", [None, "capitals", 3, [3], rp.data.prose()], ids=repr)
@pytest.mark.usefixtures("unchecked")
def test_what_is_not_facts_is_refused(given):
    with pytest.raises(DataError, match=r"facts.* was given where .*; .*repedit\.data\.facts\(name\)"):
        rp.facts_accuracy(tiny("llama"), given)


def test_names_of_attacks_are_a_list():
    with pytest.raises(ArgumentError, match="attacks='direct': a str was given where a list of str or None is needed"):
        attack(attacks="direct")


@pytest.mark.parametrize("option", ["limit_tokens", "batch_size", "length"])
@pytest.mark.parametrize("verb", [rp.collect, rp.predictions], ids=["collect", "predictions"])
def test_a_pass_over_a_text_refuses_them(verb, option):
    for value in (-5, *COUNT):
        with pytest.raises(ArgumentError, match=rf"{option}=.*; give at least 1, a whole number"):
            verb(tiny("llama"), rp.data.prose(), **{option: value})


def test_ranks_are_whole_and_above_zero():
    facts = rp.data.facts("capitals")
    for rank in (0, -1):
        with pytest.raises(RankError, match=rf"rank {rank} was asked for"):
            mrp(subject(), forget=facts.forget[:8], retain=facts.retain[:8], rank=rank, method="random")


@pytest.mark.parametrize("value", [0, 1.5, NAN, True, "3"])
def test_what_is_no_number_is_none(value):
    """The hook of these tests checks types as well, so the checks are asked themselves."""
    for check in (check_whole, check_seed) if value != 0 else (check_whole, check_positive):
        with pytest.raises(ArgumentError, match=r"n=.*; give"):
            check(n=value)


def test_what_can_be_meant_passes():
    check_whole(0, a=0, c=3, **given(b=None))
    check_seed(a=0, b=2**63 - 1)
    assert by_name("small:npo", steps=1, lr=1e-9).steps == 1


def test_steps_and_epochs_are_one_choice():
    with pytest.raises(ArgumentError, match=r"steps=3, epochs=2\.0; give one of them"):
        by_name("npo", steps=3, epochs=2.0)
    with pytest.raises(ArgumentError, match=r"steps=3, epochs=2\.0; give one of them"):
        unlearn(steps=3, epochs=2.0)


@pytest.mark.parametrize("name", ["small:npo_klr", "surgery", "rmu", "small:sure:wga", "cyber_for_ai:ga"])
def test_an_option_wins_over_a_preset(name):
    """Also number of epochs over a preset number of steps."""
    options = {"lr": 0.5, "batch_size": 3, "length": 17}
    plain, changed = by_name(name), by_name(name, **options, steps=2)
    assert [getattr(changed, key) for key in (*options, "steps")] == [*options.values(), 2]
    assert all(getattr(plain, key) != value for key, value in options.items())
    assert by_name(name, epochs=2.0).steps is None and by_name(name, epochs=2.0).epochs == 2.0
    assert by_name(name, parameters=Parameters("1")).parameters.layers == "1"


def test_a_preset_that_wins_would_be_caught(monkeypatch):
    import repedit.unlearning.recipes as published

    monkeypatch.setattr(published, "resolved_fields", lambda settings, changes: settings)
    assert by_name("small:npo_klr", lr=0.5).lr == 5e-4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "^there are none$"),
        (("abs",), r"^did you mean 'abs'\?$"),
        (("mean", "std"), "^valid names: mean, std$"),
        (range(1000, 1050), "^valid names: 1000, .*, 1039 and 10 more$"),
    ],
)
def test_the_names_that_are_offered(names, message):
    assert re.search(message, nearest("abz", names))


def test_all_names_stand_beside_the_nearest_if_asked():
    assert nearest("abz", ["abs", "std"], every=True) == "did you mean 'abs'? All: abs, std"


@pytest.mark.parametrize("check", [check_whole, check_seed, check_positive], ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "value", [10**400, 10**5000, "9" * 10**6], ids=["beyond floats", "beyond texts", "a long text"]
)
def test_a_huge_value_is_refused_in_few_words(check, value):
    with pytest.raises(ArgumentError, match=r"^n=.{1,80}; give") as caught:
        check(n=value)
    assert len(str(caught.value)) < 200
