"""MUSE: a model that learned a text continues it and gives it away, one that never saw it does neither."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import repedit as rp
from repedit.data import Row
from repedit.errors import ArgumentError, DataError, MetricError
from repedit.metrics import generation, muse
from repedit.metrics.collapse import Signs
from repedit.metrics.muse import knowledge_memorization, verbatim_memorization
from tests.test_attack_weights import small

TEXTS = ["the red fox ran over the cold hill", "seven old men sat in one small boat"]
OTHERS = ["a green bird sang by the warm lake", "three new cars stood at a large gate"]
ROWS = [Row("who ran?", "the fox", id="a"), Row("who sat?", "old men", id="b")]
SHOWN = [Row("who sang?", "a bird", id="c")]
EVERY = [*TEXTS, *(f"Question: {row.prompt}\nAnswer: {row.answer}\n\n" for row in ROWS)]
END = 2


@cache
def learned():
    """A tiny model that knows the texts and the questions by heart."""
    subject = small("llama")
    ids = [torch.tensor([[*subject.tokenizer(text)["input_ids"], END]]) for text in EVERY]
    optimiser = torch.optim.Adam(subject.model.parameters(), lr=1e-2)
    for _ in range(45):
        for row in ids:
            subject.model(input_ids=row, labels=row).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return subject


def check_verbatim() -> None:
    known, unknown = (verbatim_memorization(side, TEXTS, prefix=12, tokens=23) for side in (learned(), small("llama")))
    assert known.mean == 1 and unknown.mean < 0.1 and len(known.values) == 2
    assert known.references == tuple(text[12:35] for text in TEXTS) and known.outputs[0].startswith(TEXTS[0][12:])


def test_a_learned_text_is_continued():
    check_verbatim()


def test_continuing_the_wrong_place_is_caught(monkeypatch):
    plain = generation.generate
    monkeypatch.setattr(muse, "generate", lambda s, prompts, **o: plain(s, [p[:-4] for p in prompts], **o))
    with pytest.raises(AssertionError):
        check_verbatim()


def test_learned_answers_are_given_up_to_an_empty_line():
    known, unknown = (knowledge_memorization(side, ROWS, tokens=16) for side in (learned(), small("llama")))
    assert known.mean == 1 and known.outputs == ("the fox", "old men") and unknown.mean < 0.1


def test_examples_are_answered_first(monkeypatch):
    seen = []
    monkeypatch.setattr(
        muse, "generate", lambda s, prompts, **o: seen.extend(prompts) or ("the fox\n\nQuestion: x",) * 2
    )
    found = knowledge_memorization(small("llama"), ROWS, examples=SHOWN)
    assert seen[0] == "Question: who sang?\nAnswer: a bird\n\nQuestion: who ran?\nAnswer:"
    assert found.outputs == ("the fox", "the fox") and found.values.tolist() == [1, 0]


def evaluated(subject, **options):
    plain = rp.data.read(["some plain text to read"])
    return muse.evaluate(
        subject,
        texts=TEXTS,
        holdout=OTHERS,
        forget=ROWS[:1],
        retain=ROWS[1:],
        prefix=12,
        tokens=23,
        plain=plain,
        **options,
    )


def test_a_score_has_its_verdict_beside_it():
    known, random = evaluated(learned()), evaluated(small("llama"))
    assert known.membership_auc == 1 and known.privleak == -100 and known.verdict == "INCONCLUSIVE"
    assert known.judged(known).verdict == "NOT FORGOTTEN" and "PrivLeak -100.0 (AUC 1.000)" in str(known)
    assert str(known).splitlines()[-1] == "verdict INCONCLUSIVE: no original model to compare with"
    # Knows nothing any more, and writes alike whatever is asked.
    lost = replace(random, signs=replace(random.signs, repeated=0.9))
    assert lost.judged(replace(known, signs=Signs(retain=1.0, forget=1.0, perplexity=9.0))).verdict == "DESTROYED"
    assert set(known.scores) == {"member", "nonmember"} and len(known.scores["member"]) == 2


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda s: verbatim_memorization(s, TEXTS, prefix=0), ArgumentError, "prefix=0, tokens=128; give at least 1 token of each"),
    (lambda s: verbatim_memorization(s, TEXTS), DataError, "the text 'the red fox ran.*' ends within prefix=200 tokens; give longer"),
    (lambda s: verbatim_memorization(s, []), DataError, "there are no texts; give longer ones"),
    (lambda s: knowledge_memorization(s, []), DataError, "there are no questions; give at least one"),
    (lambda s: knowledge_memorization(s, ROWS, examples=ROWS[1:]), DataError, "row 'b' is answered in the examples; remove it"),
    (lambda s: evaluated(s, auc_reference=1.0), MetricError, "AUCs 0.5 and 1.0; give the first in"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(small("llama"))
