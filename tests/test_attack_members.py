"""Membership scores: known distributions, counted pairs, and a model that was trained on one text and not on another."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repedit.attacks.attack import RAN, SKIPPED
from repedit.attacks.families import members
from repedit.attacks.families.members import SCORES, auc, membership, privleak, scores, texts_of, tpr
from repedit.data import Corpus, Facts, Rows, Splits, invented
from repedit.data.corpus import Document
from repedit.errors import ArgumentError, DataError, FractionError, NotFinite
from tests.test_attack_weights import small

FACTS = invented(people=16, relations=1)
SPLITS = replace(Splits.of(FACTS), holdout=FACTS.retain)
numbers = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12).map(np.array)


@given(numbers, numbers)
@settings(deadline=None)
def test_the_auc_counts_pairs(pos, neg):
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in pos for n in neg]
    assert auc(pos, neg) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auc(pos, neg) + auc(neg, pos) == pytest.approx(1, abs=1e-12)


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
        "loss": np.mean(own), "zlib": np.mean(own) / len(zlib.compress(text.encode())),
        "min-k": np.mean(sorted(own)[:low]), "min-k++": np.mean(sorted(standard)[:low]),
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
    "the loss shifted by a token": ("_logs", lambda s, ids: tuple([x[1:] for x in part] for part in members_logs(s, ids))),
}  # fmt: skip
members_logs = members._logs


@pytest.mark.parametrize("name", BROKEN)
def test_broken_scores_are_caught(name, monkeypatch):
    part, broken = BROKEN[name]
    monkeypatch.setattr(members, part, broken)
    with pytest.raises(AssertionError):
        check_scores(small("llama"), TEXTS)


def test_a_model_that_learned_the_members_is_seen():
    subject = small("llama")
    before = membership()(subject, SPLITS)
    ids = [torch.tensor([subject.tokenizer(fact.text)["input_ids"]]) for fact in FACTS.forget]
    optimiser = torch.optim.Adam(subject.model.parameters(), lr=5e-3)
    for _ in range(8):
        for row in ids:
            subject.model(input_ids=row, labels=row).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    after = membership()(subject, SPLITS)
    assert before.details["auc"]["loss"] < 0.85 < 0.95 < after.details["auc"]["loss"]
    assert after.details["tpr_at_1_fpr"]["loss"] > before.details["tpr_at_1_fpr"]["loss"]
    assert privleak(after.details["auc"]["loss"], before.details["auc"]["loss"]) < -50


def test_it_shows_and_never_decides():
    subject = small("gpt2")
    before, attack = subject.fingerprint(), membership(length=20)
    found = attack(subject, SPLITS)
    assert not attack.decides and found.status == RAN and found.settings == () and found.items == ()
    assert set(found.details["auc"]) == set(found.details["tpr_at_1_fpr"]) == set(SCORES)
    assert (found.details["members"], found.details["holdout"], found.details["cut"]) == (8, 8, 16)
    assert subject.fingerprint() == before


def test_texts_are_cut_where_asked():
    subject = small("llama")
    whole, cut = (scores(subject, [TEXTS[1][:n]], length=length) for n, length in ((10, 512), (38, 10)))
    assert whole["loss"] == pytest.approx(cut["loss"]) and whole["min-k++"] == pytest.approx(cut["min-k++"])


def test_without_holdout_it_is_skipped():
    found = membership()(small("llama"), replace(SPLITS, holdout=None))
    assert found.status == SKIPPED and found.reason == "needs holdout text never trained on"


@pytest.mark.parametrize("source", [
    FACTS, FACTS.forget, Rows(FACTS.forget), [f.text for f in FACTS.forget],
    Corpus(tuple(Document(f.id, f.text) for f in FACTS.forget)), Facts(FACTS.forget, FACTS.retain),
])  # fmt: skip
def test_holdout_is_whatever_holds_text(source):
    assert texts_of(source) == [fact.text for fact in FACTS.forget]


@pytest.mark.parametrize("auc_pair", [(0.001, 0.47), (0.999, 0.53)])
def test_privleak_has_the_published_sign(auc_pair):
    # MUSE News: the target model -99.8, with members scoring lower; here they score higher.
    found = privleak(auc_pair[1], auc_pair[1]), privleak(0.999, 0.5)
    assert found[0] == 0 and found[1] == pytest.approx(-99.8, abs=0.01) and privleak(0.1, 0.5) == pytest.approx(80)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: membership(share=0.0), FractionError, "share=0.0; give a fraction above 0, at most 1"),
    (lambda: scores(small("llama"), TEXTS, length=1), ArgumentError, "length=1; a text needs at least 2 tokens"),
    (lambda: scores(small("llama"), []), DataError, "there are no texts to score; give at least one"),
    (lambda: scores(small("llama"), ["a"]), DataError, "the text 'a' has no token after its first"),
    (lambda: texts_of("one"), DataError, "holdout: found str; give facts, rows, a corpus or a list of texts"),
    (lambda: texts_of([]), DataError, "holdout: found nothing"),
    (lambda: texts_of([1, "a"]), DataError, "holdout: found int, str"),
    (lambda: auc(np.zeros(0), np.zeros(1)), DataError, "0 members and 1 others; give at least one of each"),
    (lambda: tpr(np.zeros(1), np.zeros(0)), DataError, "1 members and 0 others"),
    (lambda: privleak(0.5, 1.0), ArgumentError, r"AUCs 0.5 and 1.0; give the first in \[0, 1\]"),
    (lambda: privleak(1.5, 0.5), ArgumentError, "AUCs 1.5 and 0.5"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_score_that_is_not_finite_is_refused():
    subject = small("gpt2")
    with torch.no_grad():
        subject.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(
        NotFinite, match="attack 'membership': the score 'loss' of a text is not finite; load the model in"
    ):
        membership()(subject, SPLITS)
