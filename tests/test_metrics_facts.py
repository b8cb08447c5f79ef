"""How well a model knows answers: on hand-made logits, and against reading each row alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from repedit.data import Fact, Facts, Row, Rows
from repedit.errors import ArgumentError, DataError, NotFinite
from repedit.metrics import answers
from repedit.metrics.answers import (
    answer_nll,
    answer_probability,
    exact_memorization,
    extraction_strength,
    share,
    strength,
)
from repedit.metrics.collapse import perplexity
from tests.test_attack_weights import small

ROWS = Rows(tuple(
    Row(prompt, answer, id=str(i))
    for i, (prompt, answer) in enumerate([("the sky is", "blue"), ("two and two make", "four, or so"), ("a", "b")])
))  # fmt: skip
END = 2


def alone(subject, row, end: bool):
    """(log-probability, whether it is the largest) of each token of an answer, the row read by itself."""
    before = list(subject.tokenizer(row.prompt)["input_ids"])
    ids = list(subject.tokenizer(f"{row.prompt} {row.answer}")["input_ids"]) + [END] * end
    with torch.no_grad():
        logs = subject.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    own = [(float(logs[i - 1, ids[i]]), int(logs[i - 1].argmax()) == ids[i]) for i in range(len(before), len(ids))]
    return zip(*own, strict=True)


def check_nll(subject, end: bool = True) -> None:
    found = answer_nll(subject, ROWS, count_end=end, batch_size=2)
    for i, row in enumerate(ROWS.items):
        logs, _ = alone(subject, row, end)
        assert found.sum[i] == pytest.approx(-sum(logs), rel=1e-4) and found.count[i] == len(row.answer) + 1 + end
    assert answer_probability(found).values == pytest.approx(np.exp(-found.sum / found.count))
    assert answer_probability(found).ids == ("0", "1", "2")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("end", [True, False])
def test_an_answer_is_scored_as_it_is_alone(family, end):
    check_nll(small(family), end)


plain_reading, plain_inputs = answers.reading, answers.inputs_of
BROKEN = {
    "the position of the token itself": ("reading", lambda z, y: plain_reading(z.roll(-1, 0), y)),
    "the last token left out": ("reading", lambda z, y: plain_reading(z[:-1], y[:-1])),
    "log-probabilities that are not normalised": ("reading", lambda z, y: replace(
        plain_reading(z, y), logs=z.gather(1, y[:, None])[:, 0].double().numpy())),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_score_is_caught(name, monkeypatch):
    monkeypatch.setattr(answers, *BROKEN[name])
    with pytest.raises(AssertionError):
        check_nll(small("llama"))


def test_hand_logits():
    # Right, wrong, a tie, right; the most likely token of row 1 is 2.
    logits = torch.tensor([[0.0, 3, 0], [0, 1, 2], [1, 1, 0], [5, 0, 0]])
    found = answers.reading(logits, torch.tensor([1, 1, 0, 0]))
    assert found.hits.tolist() == [True, False, False, True]
    assert found.logs[0] == pytest.approx(3 - math.log(2 + math.e**3))


@pytest.mark.parametrize(("hits", "memorised", "extracted"), [
    ([1, 1, 1, 1], 1, 1), ([0, 1, 1, 1], 0.75, 0.75), ([1, 1, 0, 1], 0.75, 0.25), ([1, 1, 1, 0], 0.75, 0), ([0], 0, 0),
])  # fmt: skip
def test_memorization_on_hand_made_hits(hits, memorised, extracted):
    seen = np.array(hits, dtype=bool)
    assert (share(seen), strength(seen)) == (memorised, extracted)


def learned(subject, rows, steps=35):
    optimiser = torch.optim.Adam(subject.model.parameters(), lr=1e-2)
    for _ in range(steps):
        for row in rows.items:
            ids = torch.tensor([[*subject.tokenizer(row.text)["input_ids"], END]])
            subject.model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return subject


def test_a_model_that_learned_the_rows_knows_them_by_heart():
    subject = small("llama")
    before = exact_memorization(subject, ROWS).mean, extraction_strength(subject, ROWS).mean
    learned(subject, ROWS)
    after = exact_memorization(subject, ROWS, count_end=True), extraction_strength(subject, ROWS, count_end=True)
    assert max(before) < 0.2 and after[0].mean == after[1].mean == 1
    assert answer_probability(answer_nll(subject, ROWS)).mean > 0.8 and "of 3 rows" in repr(after[0])


def test_facts_and_rows_are_one_thing():
    items = tuple(Fact(id=row.id, prompt=row.prompt, answer=row.answer) for row in ROWS.items)
    found = [answer_nll(small("gpt2"), source).sum.tolist() for source in (ROWS, ROWS.items, items, Facts(items))]
    assert found[0] == found[1] == found[2] == found[3]


def test_perplexity_of_texts():
    subject = small("gpt2")
    found = perplexity(subject, ["abcdef", "gh"], window=16)
    with torch.no_grad():
        ids = [torch.tensor([subject.tokenizer(text)["input_ids"]]) for text in ("abcdef", "gh")]
        nll = [float(subject.model(input_ids=i, labels=i).loss) * (i.shape[1] - 1) for i in ids]
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / (5 + 1)), rel=1e-4) and len(found.loss) == 2


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda s: answer_nll(s, []), DataError, "there are no rows to score; give at least one"),
    (lambda s: answer_nll(s, ROWS, batch_size=0), ArgumentError, "batch_size=0; give at least 1 row"),
    (lambda s: answer_nll(s, [Row("", "b", id="r")]), DataError, "row 'r': no token before the prompt's end"),
    (lambda s: answer_nll(s, [Row("a" * 300, "b", id="r")]), DataError, "row 'r' has 303 tokens, the model reads 256"),
    (lambda s: answer_nll(replace(s, tokenizer=None), ROWS), ArgumentError, "this needs a tokenizer"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(small("llama"))


def test_an_end_token_is_needed_where_it_counts():
    subject = small("llama")
    subject.tokenizer.eos_token = None
    with pytest.raises(
        ArgumentError, match="the tokenizer has no end-of-sequence token to count; pass count_end=False"
    ):
        answer_nll(subject, ROWS)
    assert answer_nll(subject, ROWS, count_end=False).count.tolist() == [5, 12, 2]


def test_a_score_that_is_not_finite_is_refused():
    subject = small("gpt2")
    with torch.no_grad():
        subject.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match="row '0': a log-probability is not finite; load the model in float32"):
        answer_nll(subject, ROWS)
