"""Predictions equal a naive loop; effects compare the same texts only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repedit as rp
from repedit.activations.prediction import Predictions, drop, effect
from repedit.data.corpus import tokens
from repedit.errors import FingerprintError, NotEnoughRows, NotFinite
from tests.edits import mask
from tests.tiny import ids, tiny

pytestmark = pytest.mark.numeric


def _naive(subject, x, skip=()):
    """(count, hits, hits10, loss) of one row, token by token."""
    with torch.no_grad():
        logits = subject.model(input_ids=x[None]).logits[0].double()
    rows = [(scores, int(target)) for scores, target in zip(logits, x[1:], strict=False) if int(target) not in skip]
    places = [int((scores > scores[target]).sum()) for scores, target in rows]
    loss = -sum(float(scores.log_softmax(0)[target]) for scores, target in rows)
    return len(rows), sum(p < 1 for p in places), sum(p < 10 for p in places), loss


def _batch(x, lengths):
    mask = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
    return {"input_ids": x.where(mask, 0), "attention_mask": mask.long()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("skip", [None, {4, 7, 12}], ids=["all", "skip"])
def test_predictions_equal_a_naive_loop(family, skip):
    subject, lengths, x = tiny(family), (11, 7, 2), ids()
    found = rp.predictions(subject, tokens([_batch(x, lengths), {"input_ids": ids(2, 5, 1)}]), skip=skip)
    rows = [row[:n] for row, n in zip(x, lengths, strict=True)] + list(ids(2, 5, 1))
    count, hits, hits10, loss = zip(*(_naive(subject, row, skip or ()) for row in rows), strict=True)
    assert found.ids == ("0.0", "0.1", "0.2", "1.0", "1.1")
    assert (tuple(found.count), tuple(found.hits), tuple(found.hits10)) == (count, hits, hits10)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    assert found.top1 == sum(hits) / sum(count) and found.top10 == sum(hits10) / sum(count)
    assert found.perplexity == pytest.approx(np.exp(sum(loss) / sum(count)), rel=1e-5)


def test_ties_count_against_the_model():
    subject = tiny("llama")
    with torch.no_grad():
        subject.model.get_input_embeddings().weight.fill_(0.0)
    found = rp.predictions(subject, tokens([{"input_ids": ids()}]))
    assert found.top1 == found.top10 == 0.0
    assert found.mean_loss == pytest.approx(np.log(61), rel=1e-6)


def test_an_edit_is_active_while_predicting():
    subject, corpus = tiny("llama"), tokens([{"input_ids": ids()}])
    edit = mask(subject, "1.mlp.neurons")
    hooked, rewritten = rp.predictions(subject, corpus, edit=edit), rp.predictions(rp.apply(edit, subject), corpus)
    np.testing.assert_allclose(hooked.loss, rewritten.loss, rtol=1e-5)
    assert abs(hooked.mean_loss - rp.predictions(subject, corpus).mean_loss) > 1e-3


@pytest.mark.parametrize(("limit", "chunks"), [(1, 3), (30, 3), (31, 6), (None, 9)])
def test_limit_tokens_stops_after_the_batch_that_reaches_it(limit, chunks):
    corpus = tokens([{"input_ids": ids(seed=seed)} for seed in range(3)])
    assert len(rp.predictions(tiny("llama"), corpus, limit_tokens=limit).ids) == chunks


def test_nothing_to_predict_is_refused():
    with pytest.raises(NotEnoughRows, match="corpus 'tokens' holds no token with a next token to predict; give longer"):
        rp.predictions(tiny("llama"), tokens([{"input_ids": torch.tensor([[3], [4]])}]))


def test_a_loss_that_is_not_finite_names_batch_and_document():
    subject = tiny("llama")
    with torch.no_grad():
        subject.model.model.norm.weight[0] = torch.inf
    with pytest.raises(NotFinite, match=r"batch 0: the loss of document '0.0' is nan; load the model in float32"):
        rp.predictions(subject, tokens([{"input_ids": ids()}]))


def _hand(hits, count=10, loss=1.0, names="abcdef"):
    """Predictions with given hits by chunk."""
    hits = np.array(hits)
    count = np.full(len(hits), count)
    return Predictions(tuple(names[: len(hits)]), count, hits, np.minimum(hits + 2, count), loss * count)


def test_the_effect_is_the_relative_drop_of_top1_and_the_loss_rise():
    found = effect(_hand([8, 4, 4]), _hand([4, 2, 2], loss=1.75))
    assert (found.drop, found.loss_rise) == (50.0, 0.75)
    assert found.low == found.high == pytest.approx(50.0)
    assert drop(_hand([8, 4, 4]), _hand([8, 4, 4])) == 0.0
    assert np.isnan(drop(_hand([0, 0]), _hand([1, 0])))


def test_no_percentage_of_a_division_by_nothing():
    nothing = effect(_hand([0, 0]), _hand([1, 0]))
    assert str(nothing).startswith("drop not defined: nothing was right before the edit, loss")
    assert nothing.plain() == {"drop_percent": None, "interval": None}
    rare = effect(_hand([1, 0, 0]), _hand([0, 0, 0]))
    assert rare.percentage == "100.0 % (interval not defined: too little was right before the edit)"
    assert rare.plain() == {"drop_percent": 100.0, "interval": None}
    usual = effect(_hand([8, 4]), _hand([4, 2]))
    assert usual.percentage == "50.0 % (50.0 to 50.0)" and usual.plain()["interval"] == [50.0, 50.0]


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(0, 10)), min_size=2, max_size=6), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_the_interval_resamples_chunks_in_pairs(rows, seed):
    before, after = zip(*rows, strict=True)
    found = effect(_hand(before), _hand(after), seed=seed, resamples=40)
    draws = np.random.default_rng(seed).integers(0, len(rows), (40, len(rows)))
    drops = [100 * (1 - sum(after[i] for i in draw) / sum(before[i] for i in draw)) for draw in draws]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drops, [0.025, 0.975])))
    assert found == effect(_hand(before), _hand(after), seed=seed, resamples=40)


@pytest.mark.parametrize("function", [drop, effect])
@pytest.mark.parametrize(
    "other", [_hand([1, 2, 3]), _hand([1, 2], names="xyz"), _hand([1, 2], count=9)], ids=["longer", "names", "counts"]
)
def test_predictions_of_different_texts_are_not_compared(function, other):
    with pytest.raises(
        FingerprintError, match=r"of different texts: 2 and \d chunks, 20 and \d+ tokens; evaluate both on"
    ):
        function(_hand([1, 2]), other)


@pytest.mark.filterwarnings("error")
def test_a_perplexity_beyond_all_numbers_is_infinite():
    one = np.array([2])
    assert Predictions(("a",), one, one, one, np.array([2000.0])).perplexity == np.inf
