"""What the recipes do to tiny models that were taught facts about invented people."""

from __future__ import annotations

from dataclasses import replace

import pytest

import repedit as rp
from repedit.unlearning import losses
from repedit.unlearning.parameters import Parameters
from tests import taught_models

QUICK = {"steps": 60, "batch_size": 16, "lr": 1e-3, "progress": False}


def trained(recipe, seed=0, **options):
    lm, facts = taught_models.original(seed), taught_models.facts(seed)
    return rp.unlearn(lm, recipe=recipe, forget=facts.forget, retain=facts.retain, **(QUICK | options))


def outcome(recipe, seed=0, asked=None, **options):
    """(delta, share of forget facts right, share of retain facts right), the right answer among sixteen."""
    facts, delta = taught_models.facts(seed), trained(recipe, seed, **options)
    edited = rp.apply(delta, taught_models.original(seed))
    return delta, *(rp.facts_accuracy(edited, part[:asked]).accuracy for part in (facts.forget, facts.retain))


def test_the_facts_are_known_before():
    lm, facts = taught_models.original(), taught_models.facts()
    assert all(rp.facts_accuracy(lm, part).accuracy >= 0.99 for part in (facts.forget, facts.retain))


def test_blur_forgets_and_retains():
    """The original knows both sides; the bars over seeds are those of test_recipes_over_seeds."""
    _, forget, retain = outcome(rp.recipes.blur_npo(), asked=60)
    assert retain - forget > 0.4


def test_ascent_alone_collapses_and_is_stopped():
    delta = trained(rp.recipes.ga())
    assert delta.provenance["stopped"]["rule"] == "collapse" and len(delta.log) < QUICK["steps"]
    assert "retain NLL rose from" in delta.provenance["stopped"]["reason"]


@pytest.mark.slow
def test_sure_moves_a_tenth():
    delta, forget, retain = outcome(rp.recipes.sure(rp.recipes.npo_gdr()), lr=3e-3)
    mask = delta.provenance["options"]["parameters"]["mask"]
    assert mask["chosen"] <= 0.1 * mask["units"] + 1 and forget <= 0.40 and retain >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["grad_diff", "npo_gdr", "npo_klr", "wga", "blur_npo", "blur_ga"])
def test_recipes_over_seeds(name, seed):
    _, forget, retain = outcome(getattr(rp.recipes, name)(), seed)
    assert forget <= 0.30 and retain >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_surgery_replaces(seed):
    facts = taught_models.facts(seed)
    half = facts.forget[::2]
    update = [
        replace(f, id=f"new {f.id}", answer=f.choices[(f.choices.index(f.answer) + 1) % len(f.choices)]) for f in half
    ]
    lm = taught_models.original(seed)
    delta = rp.unlearn(lm, recipe=rp.recipes.surgery(), forget=facts.forget, retain=facts.retain, update=update,
                       **(QUICK | {"steps": 150}))  # fmt: skip
    edited = rp.apply(delta, lm)
    new, old, kept = (rp.facts_accuracy(edited, part).accuracy for part in (update, facts.forget, facts.retain))
    assert new >= 0.95 and old <= 0.30 and kept >= 0.95


@pytest.mark.slow
def test_projection_makes_steering_forget():
    """Where the gradients oppose each other, RMU keeps and BLUR-RMU forgets."""
    options = {"layer": 1, "coefficient": 20.0, "alpha": 100.0, "parameters": Parameters("0-1", ("mlp.out",))}
    plain, forget, _ = outcome(rp.recipes.rmu(**options), steps=120)
    _, projected, _ = outcome(rp.recipes.blur_rmu(**options), steps=120)
    found = [
        r["cosine"] for r in plain.log if r["cosine"] is not None
    ]  # at the start nothing has moved that must be held
    # Measured, seed 0: .442 right after RMU, .308 under BLUR, mean cosine -.63.
    assert sum(found) / len(found) < -0.5 and projected <= forget - 0.1


def test_the_divergence_starts_at_zero():
    """At the first step the model is its own reference."""
    delta = trained(rp.recipes.npo_klr(), steps=2)
    assert abs(delta.log[0]["losses"]["kl retain"]) < 1e-5 < delta.log[1]["losses"]["kl retain"]
    assert delta.log[0]["losses"]["npo forget"] == pytest.approx(
        losses.npo().options["beta"] ** -1 * 2 * 0.693147, rel=1e-4
    )
