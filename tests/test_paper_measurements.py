"""The measurements behind docs/papers.md ask what they say: sets are disjoint, controls match, nothing is padded into a loss."""

import pytest
import torch

from bench import lume, lume_figure, sure, surgery
from bench.lume_figure import PUBLISHED, bars
from repedit.unlearning.parameters import Mask


def _are_apart(sets):
    entities = [{fact.entity for fact in part} for part in (sets.forget, sets.outdated, sets.test["capitals"])]
    assert not entities[0] & entities[1] and not entities[2] & (entities[0] | entities[1])
    trained = {fact.id for fact in sets.train}
    assert not trained & {fact.id for part in sets.test.values() for fact in part}
    assert not trained & {fact.id for fact in (*sets.forget, *sets.outdated)}


def test_what_surgery_forgets_updates_and_keeps_is_apart():
    sets = surgery.Sets.of(0)
    _are_apart(sets)
    assert len(sets.forget) == len(sets.outdated) == len(sets.update) == surgery.COUNT
    # The update set asks the prompts of the outdated one, which is how the recipe finds them.
    assert [fact.prompt for fact in sets.update] == [fact.prompt for fact in sets.outdated]


def test_a_set_that_is_scored_and_trained_on_is_caught():
    sets = surgery.Sets.of(0)
    sets.test["capitals"] = sets.train[:4]
    with pytest.raises(AssertionError):
        _are_apart(sets)


def test_an_updated_fact_offers_the_true_answer_and_other_invented_ones():
    old = surgery.Sets.of(1).outdated
    new = surgery.updated(old, 1)
    invented = {fact.answer for fact in new}
    assert len(invented) == len(new) and not invented & {fact.answer for fact in old}
    for before, after in zip(old, new, strict=True):
        assert before.answer in after.choices and len(after.choices) == 8
        assert set(after.choices) - {before.answer} <= invented


def test_a_random_mask_has_as_many_rows_in_every_tensor_as_that_of_sure():
    chosen = Mask({"a": torch.arange(40).view(40, 1) < 7, "b": torch.arange(30) < 2})
    shuffled = sure.random_rows(chosen, 0)
    assert {n: int(m.sum()) for n, m in shuffled.tensors.items()} == {"a": 7, "b": 2}
    assert not torch.equal(shuffled.tensors["a"], chosen.tensors["a"])


def test_what_rounding_leaves_is_compared_with_the_original_after_the_same_rounding():
    original = {"measured": {"full": {"forget": 0.725, "chance": 0.125}, "int4": {"forget": 0.525, "chance": 0.125}}}
    row = {"measured": {"full": {"forget": 0.125}, "int4": {"forget": 0.325}}}
    assert sure.retained(row, original, "full") == pytest.approx((0.125 / 0.725, 0.0))
    assert sure.retained(row, original, "int4") == pytest.approx((0.325 / 0.725, 0.5))


def test_batches_hold_every_sequence_once_and_padding_has_no_weight():
    sequences = [([i] * (1 + i % 7), [1.0] * (1 + i % 7)) for i in range(1, 40)]
    batches = list(lume.batched(sequences, 24, "0"))
    assert sorted(part for batch in batches for part in batch) == sorted(sequences)
    assert all(len(batch) == 1 or max(len(ids) for ids, _ in batch) * len(batch) <= 24 for batch in batches)
    ids, weights = lume.padded([([5, 6], [0.1, 1.0]), ([7], [1.0])], 0)
    assert ids.tolist() == [[5, 6], [7, 0]] and torch.equal(weights, torch.tensor([[0.1, 1.0], [1.0, 0.0]]))


def test_a_bar_is_the_mean_over_seeds_and_the_published_parts_give_the_reported_score():
    row = {"name": "ga", "task aggregate": 0.0, "membership": 0.9, "mmlu": 0.25, "verdict": "DESTROYED", "retain": 0.1}
    shown = bars([row, row | {"membership": 0.7}])
    assert (
        shown[-1][0] == "here: ga" and shown[-1][1] == pytest.approx((0.0, 0.8, 0.25)) and "DESTROYED" in shown[-1][2]
    )
    assert round(sum(PUBLISHED["Cyber for AI, 7B"]) / 3, 3) == lume_figure.CLAIMED
