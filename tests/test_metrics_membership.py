"""Membership scores against reading each text alone, AUC against counted pairs and scikit-learn, PrivLeak by its signs."""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from repedit.errors import ArgumentError, DataError, FractionError, MetricError, NotFinite, UnknownName
from repedit.metrics import membership
from repedit.metrics.membership import SCORES, auc, privleak, scores, tpr
from tests.test_attack_weights import small

numbers = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12).map(np.array)


@given(numbers, numbers)
@settings(deadline=None)
def test_the_auc_counts_pairs(pos, neg):
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in pos for n in neg]
    assert auc(pos, neg) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auc(pos, neg) + auc(neg, pos) == pytest.approx(1, abs=1e-12)


@given(numbers, numbers)
@settings(deadline=None)
def test_the_auc_is_that_of_scikit_learn_ties_and_all(pos, neg):
    known = roc_auc_score([1] * len(pos) + [0] * len(neg), np.concatenate((pos, neg)))
    assert auc(pos, neg) == pytest.approx(known, abs=1e-12)


def test_an_auc_that_ignores_ties_is_caught():
    pos, neg = np.array([1.0, 1.0, 2.0]), np.array([1.0, 0.0])
    assert auc(pos, neg) == pytest.approx(5 / 6) == roc_auc_score([1, 1, 1, 0, 0], [1, 1, 2, 1, 0])
    assert np.mean([p > n for p in pos for n in neg]) == 4 / 6 and auc(np.ones(7), np.ones(9)) == 0.5


@given(numbers, numbers, st.floats(0.0, 0.99))
@settings(deadline=None)
def test_the_true_positive_rate_is_the_best_within_the_false_alarms(pos, neg, fpr):
    allowed = [float((pos > t).mean()) for t in (*neg, *pos) if (neg > t).mean() <= fpr]
    assert tpr(pos, neg, fpr) == max(allowed)


def plainly(subject, text: str, share: float) -> dict[str, float]:
    """The scores of one text, read alone, token by token."""
    ids = subject.tokenizer(text)["input_ids"]
    with torch.no_grad():
        logs = subject.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    own, standard = [], []
    for row, token in zip(logs, ids[1:], strict=False):
        mean = float((row.exp() * row).sum())
        spread = float((row.exp() * row**2).sum() - mean**2) ** 0.5
        own.append(float(row[token]))
        standard.append((own[-1] - mean) / spread)
    low = int(share * len(own))
    return {
        "loss": np.mean(own), "zlib": np.sum(own) / len(zlib.compress(text.encode())),
        "min_k": np.mean(sorted(own)[:low]), "min_k++": np.mean(sorted(standard)[:low]),
    }  # fmt: skip


def check_scores(subject, texts, share=0.4) -> None:
    found = scores(subject, texts, share=share)
    for i, text in enumerate(texts):
        expected = plainly(subject, text, share)
        assert {s: found[s][i] for s in SCORES} == pytest.approx(expected, rel=1e-4), text


TEXTS = ["a short one", "another text, which is a little longer", "abcdefghijk", "abcdefghijl", "no no no no no no"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_scores_are_those_of_reading_each_text_alone(family, share):
    check_scores(small(family), TEXTS, share)


BROKEN = {
    "the highest instead of the lowest": ("_lowest", lambda v, share: float(np.sort(v)[-max(1, int(share * len(v))) :].mean())),
    "bytes that are not compressed": ("zlib", SimpleNamespace(compress=lambda data: data)),
    "the loss shifted by a token": ("_standardized", lambda logits, tokens: tuple(x[1:] for x in standardized(logits, tokens))),
}  # fmt: skip
standardized = membership._standardized


@pytest.mark.parametrize("name", BROKEN)
def test_broken_scores_are_caught(name, monkeypatch):
    part, broken = BROKEN[name]
    monkeypatch.setattr(membership, part, broken)
    with pytest.raises(AssertionError):
        check_scores(small("llama"), TEXTS)


def test_texts_are_cut_where_asked():
    subject = small("llama")
    whole, cut = (scores(subject, [TEXTS[1][:n]], length=length) for n, length in ((10, 512), (38, 10)))
    assert whole["loss"] == pytest.approx(cut["loss"]) and whole["min_k++"] == pytest.approx(cut["min_k++"])


def test_min_k_plus_by_hand():
    """The model gives 1/2, 1/4, 1/4 and then 1/4, 1/4, 1/2; the text takes the first token both times."""
    chance = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], dtype=torch.float64)
    plain, standard = membership._standardized(chance.log(), torch.tensor([0, 0]))
    # A drawn token has log-probability -log 2 or -2 log 2, each half the time: one deviation above the mean, or below.
    assert plain == pytest.approx(np.log([0.5, 0.25])) and standard == pytest.approx([1, -1])


def test_a_score_against_a_reference_is_a_difference():
    found = scores(small("llama"), TEXTS, ("min_k",), small("gpt2"))
    sides = [scores(small(family), TEXTS, ("loss",))["loss"] for family in ("llama", "gpt2")]
    assert set(found) == {"min_k", "reference"} and found["reference"] == pytest.approx(sides[0] - sides[1])
    assert scores(small("llama"), TEXTS, reference=small("llama"))["reference"] == pytest.approx(0)


def test_privleak_has_the_published_sign():
    # MUSE News: the target model -99.8, with members scoring lower; here they score higher.
    assert privleak(0.999, 0.5) == pytest.approx(-99.8, abs=0.01) and privleak(0.1, 0.5) == pytest.approx(80)
    assert privleak(0.47, 0.47) == privleak(0.53, 0.53) == 0


@given(st.floats(0, 1), st.floats(0, 0.99))
def test_privleak_is_that_of_muse_where_members_score_lower(found, reference):
    other, gold = 1 - found, 1 - reference
    assert privleak(found, reference) == pytest.approx(100 * (other - gold) / gold, abs=1e-9)
    assert privleak(reference, reference) == 0 and privleak(1.0) == -100 and privleak(0.0) == 100


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: scores(small("llama"), TEXTS, length=1), ArgumentError, "length=1; a text needs at least 2 tokens"),
    (lambda: scores(small("llama"), []), DataError, "there are no texts to score; give at least one"),
    (lambda: scores(small("llama"), ["a"]), DataError, "the text 'a' has no token after its first"),
    (lambda: auc(np.zeros(0), np.zeros(1)), MetricError, "0 members and 1 others; give at least one of each"),
    (lambda: tpr(np.zeros(1), np.zeros(0)), MetricError, "1 members and 0 others"),
    (lambda: privleak(0.5, 1.0), MetricError, r"AUCs 0.5 and 1.0; give the first in \[0, 1\]"),
    (lambda: privleak(1.5, 0.5), MetricError, "AUCs 1.5 and 0.5"),
    (lambda: scores(small("llama"), TEXTS, ("min-k",)), UnknownName, "no membership score is called 'min-k'; did you mean 'min_k'"),
    (lambda: scores(small("llama"), TEXTS, share=1.5), FractionError, "share=1.5; give a fraction above 0"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_score_that_is_not_finite_is_refused():
    subject = small("gpt2")
    with torch.no_grad():
        subject.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match="the score 'loss' of text 0 is nan; load the model in float32"):
        scores(subject, TEXTS)
