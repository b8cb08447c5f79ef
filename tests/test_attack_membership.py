"""The membership test: a model that was trained on one text and not on another is seen, and nothing is decided by it."""

from dataclasses import replace

import pytest
import torch

from repedit.auditing.attack import RAN, SKIPPED
from repedit.auditing.attacks.membership import membership, texts_of
from repedit.data import Corpus, Facts, Rows, Splits, invented
from repedit.data.corpus import Document
from repedit.errors import DataError, FractionError, NotFinite
from repedit.metrics.membership import SCORES, privleak
from tests.test_attack_weights import small

FACTS = invented(people=16, relations=1)
SPLITS = replace(Splits.of(FACTS), holdout=FACTS.retain)


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
    assert not attack.record.decides and found.status == RAN and found.settings == () and found.items == ()
    assert set(found.details["auc"]) == set(found.details["tpr_at_1_fpr"]) == set(SCORES)
    assert (found.details["members"], found.details["holdout"], found.details["cut"]) == (8, 8, 16)
    assert subject.fingerprint() == before


def test_without_holdout_it_is_skipped():
    found = membership()(small("llama"), replace(SPLITS, holdout=None))
    assert found.status == SKIPPED and found.reason == "needs holdout text never trained on"


@pytest.mark.parametrize("source", [
    FACTS, FACTS.forget, Rows(FACTS.forget), [f.text for f in FACTS.forget],
    Corpus(tuple(Document(f.id, f.text) for f in FACTS.forget)), Facts(FACTS.forget, FACTS.retain),
])  # fmt: skip
def test_holdout_is_whatever_holds_text(source):
    assert texts_of(source) == [fact.text for fact in FACTS.forget]


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: membership(share=0.0), FractionError, "share=0.0; give a fraction above 0 and at most 1"),
    (lambda: texts_of("one"), DataError, "holdout: found str; give facts, rows, a corpus or a list of texts"),
    (lambda: texts_of([]), DataError, "holdout: found nothing"),
    (lambda: texts_of([1, "a"]), DataError, "holdout: found int, str"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_score_that_is_not_finite_is_refused():
    subject = small("gpt2")
    with torch.no_grad():
        subject.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match="attack 'membership': the score 'loss' of text 0 is nan; load the model in"):
        membership()(subject, SPLITS)
