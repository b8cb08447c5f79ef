"""What MRP does to a model that was taught facts: they go, the others stay, and a random projection does neither."""

from __future__ import annotations

import pytest

import repedit as rp
from repedit.auditing.attack import ask
from tests.taught_models import world

RANK = 16
"""A quarter of the width of the taught models."""


def accuracies(seed: int, method: str) -> tuple[float, float]:
    """(forget, retain) after projecting a taught model at the outputs of both MLPs; 1 and 1 before."""
    made = world(seed)
    edit = rp.mrp(
        made.original, forget=made.facts.forget, retain=made.facts.retain, sites="*.mlp.out", rank=RANK, method=method,
        text=None, config={"steps": 200, "shown": 0, "seed": seed}, progress=False,
    )  # fmt: skip
    edited = rp.apply(edit, made.original)
    forget, retain = (ask(edited, part[:60]).accuracy for part in (made.facts.forget, made.facts.retain))
    return forget, retain


def forgets(found: list[tuple[float, float]]) -> None:
    """The law, on the mean over seeds."""
    forget, retain = (sum(values) / len(found) for values in zip(*found, strict=True))
    assert forget <= 0.60 and retain >= 0.95


def gap(found: list[tuple[float, float]]) -> float:
    """How many more of the facts to retain than of those to forget are right."""
    return sum(retain - forget for forget, retain in found) / len(found)


def test_what_is_trained_forgets_and_a_random_projection_of_the_same_rank_does_not():
    """The bars over seeds are those of the slow test."""
    trained, blind = accuracies(0, "mrp"), accuracies(0, "random")
    assert gap([blind]) < gap([trained]) / 3 and trained[1] > trained[0] + 0.2
    with pytest.raises(AssertionError):
        forgets([blind])


@pytest.mark.slow
def test_taught_facts_are_forgotten_over_seeds():
    trained = [accuracies(seed, "mrp") for seed in range(3)]
    blind = [accuracies(seed, "random") for seed in range(3)]
    forgets(trained)
    assert gap(blind) < gap(trained) / 3
