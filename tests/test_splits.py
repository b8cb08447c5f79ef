"""Halves that share no entity, and invented people."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import repedit as rp
from repedit.data import Fact, Splits
from repedit.errors import ArgumentError, FractionError, NotEnoughRows, OverlapError

entities = st.lists(st.integers(0, 30), min_size=2, max_size=40).filter(lambda found: len(set(found)) > 1)


def _about(numbers):
    return tuple(
        Fact(id=f"{i}", entity=f"A{n}", prompt=f"{i}: the pet of A{n} is", answer="dog") for i, n in enumerate(numbers)
    )


def check_halves(items, seed):
    """The law: no entity on both sides, no fact lost, equal numbers of entities, whatever the order."""
    a, b = Splits.of(items, seed=seed), Splits.of(items[::-1], seed=seed)
    sides = [{f.entity for f in side} for side in (a.train, a.test)]
    assert not sides[0] & sides[1] and abs(len(sides[0]) - len(sides[1])) <= 1
    assert sorted(f.id for f in (*a.train, *a.test)) == sorted(f.id for f in items)
    assert {f.id for f in a.train} == {f.id for f in b.train}


@given(numbers=entities, seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_halves_share_no_entity_and_do_not_depend_on_the_order(numbers, seed):
    check_halves(_about(numbers), seed)


def test_halves_by_row_are_caught(monkeypatch):
    monkeypatch.setattr("repedit.data.fact_sets.entity_of", lambda f: f.id)
    with pytest.raises(AssertionError):
        check_halves(_about([*range(20), *range(20)]), 0)


def test_folds_swap_the_sides_and_the_fraction_counts_entities():
    items = rp.data.facts("capitals", retain="symbols")
    a, b = (Splits.of(items, fold=fold, train_fraction=0.8) for fold in (0, 1))
    assert (a.train, a.test) == (b.test, b.train) and a.retain == items.retain
    assert len(a.train) == round(0.8 * len(items)) and a.unrelated is a.holdout is None
    assert a.train != Splits.of(items, train_fraction=0.8, seed=1).train


def test_a_fixed_split_is_kept_with_its_entity():
    fixed = [replace(f, split={1: "T", 2: "V"}.get(i)) for i, f in enumerate(_about([1, 2, 3, 2, 4, 5]))]
    for seed in range(5):
        found = Splits.of(fixed, seed=seed)
        assert "1" in {f.id for f in found.train} and {"1", "3"} - {f.id for f in found.train} == set()
        assert "2" in {f.id for f in found.test}


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        (_about([1, 2]), {"train_fraction": 1.0}, FractionError, "train_fraction=1.0; give a fraction strictly between"),
        (_about([1, 2]), {"fold": 2}, ArgumentError, "fold=2; there are two, 0 and 1"),
        (_about([1, 1]), {}, NotEnoughRows, "1 entities give .* both sides need one"),
        (
            [replace(f, split=side) for f, side in zip(_about([1, 1, 2]), "TVT", strict=True)],
            {}, OverlapError, r"1 entities are fixed both in T and in V, such as \['a1'\]",
        ),
    ],
)  # fmt: skip
def test_halves_that_cannot_be_made_are_refused(items, options, error, message):
    with pytest.raises(error, match=message):
        Splits.of(items, **options)


@pytest.mark.parametrize(("people", "relations", "seed"), [(4, 1, 0), (40, 4, 0), (33, 6, 5), (240, 2, 1)])
def test_invented_facts_are_even_and_halved_by_person(people, relations, seed):
    found = rp.data.invented(people, relations, seed)
    sides = [{f.entity for f in side} for side in (found.forget, found.retain)]
    assert [len(side) for side in sides] == [people // 2, people - people // 2] and not sides[0] & sides[1]
    for part in rp.data.by_domain((*found.forget, *found.retain)).values():
        assert len(part) == people and len(rp.data.by_domain(found.forget)) == relations
        counts = Counter(f.answer for f in part)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(len(set(f.choices)) == 8 and len(f.paraphrases) >= 3 for f in part)
        assert all(f.entity in prompt for f in part for prompt in f.prompts)


def test_invented_facts_follow_the_seed():
    assert rp.data.invented().hash == rp.data.invented().hash != rp.data.invented(seed=1).hash
    assert rp.data.invented().name == "invented-40-4-0" and len(rp.data.invented()) == 80


@pytest.mark.parametrize("options", [{"people": 3}, {"people": 10_000}, {"relations": 0}, {"relations": 7}], ids=str)
def test_impossible_inventions_are_refused(options):
    with pytest.raises(ArgumentError, match="there can be 4 to 1536 people and 1 to 6 relations"):
        rp.data.invented(**options)
