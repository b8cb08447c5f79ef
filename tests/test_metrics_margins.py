"""Scores of an image from its logits: closed forms, finite where probabilities round to 0 and 1; KLOM by its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repedit.errors import MetricError, NotEnoughRows, ShapeError
from repedit.metrics import membership
from repedit.metrics.membership import confidence, entropy, klom, margin, modified_entropy

P = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]], dtype=torch.float64)
Y = torch.tensor([0, 1])


def by_hand() -> list[float]:
    """The sum of the definition, term by term."""
    log = np.log
    return [
        -(0.5 * log(0.5) + 0.25 * log(0.75) + 0.25 * log(0.75)),
        -(0.875 * log(0.125) + 0.125 * log(0.875) + 0.75 * log(0.25)),
    ]


def check_modified_entropy(score) -> None:
    """The score of two examples of three classes is the sum of the definition."""
    values = score(P.log(), Y)
    assert values.shape == Y.shape and values.tolist() == pytest.approx(by_hand(), abs=1e-12)


def test_modified_entropy_is_its_closed_form():
    check_modified_entropy(modified_entropy)
    random = torch.randn(40, 7, dtype=torch.float64), torch.arange(40) % 7
    p = random[0].softmax(-1)
    own = p.gather(1, random[1][:, None])[:, 0]
    terms = (p * torch.log1p(-p)).scatter(1, random[1][:, None], 0.0).sum(1)
    torch.testing.assert_close(modified_entropy(*random), -(1 - own) * own.log() - terms, atol=1e-12, rtol=0)


@pytest.mark.parametrize("wrong", [
    lambda p, y: -(1 - p[:, y]) * p[:, y].log(),
    lambda p, y: -(1 - p[range(len(y)), y]) * p[range(len(y)), y].log() - (p * p.log()).sum(1),
], ids=["whole columns", "log p for log(1 - p)"])  # fmt: skip
def test_the_slips_of_published_code_are_caught(wrong):
    with pytest.raises(AssertionError):
        check_modified_entropy(lambda logits, labels: wrong(logits.softmax(-1), labels))


@pytest.mark.parametrize("score", [modified_entropy, margin])
def test_scores_stay_finite_where_probabilities_are_0_and_1(score):
    logits = torch.tensor([[2000.0, -2000.0, 0.0], [0.0, 0.0, 3000.0], [40.0, 40.0, -1e4]])
    for label in range(3):
        assert torch.isfinite(score(logits, torch.full((3,), label))).all()
    assert modified_entropy(logits, torch.tensor([0, 2, 1]))[:2].tolist() == [0, 0]
    assert torch.softmax(logits, -1).min() == 0 and torch.softmax(logits, -1).max() == 1


def test_a_certain_mistake_has_the_entropy_of_a_certain_hit_and_not_its_modified_one():
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    assert entropy(logits)[0] == entropy(logits)[1] and confidence(logits)[0] == confidence(logits)[1]
    hit, mistake = modified_entropy(logits, torch.tensor([0, 1]))
    assert hit < 1e-2 and mistake > 9


def test_the_margin_is_the_logit_of_the_label():
    logits = torch.randn(30, 5, dtype=torch.float64)
    y = torch.arange(30) % 5
    p = logits.softmax(-1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(margin(logits, y), torch.log(p / (1 - p)), atol=1e-10, rtol=0)
    torch.testing.assert_close(entropy(P.log()), -(P * P.log()).sum(1))
    assert confidence(P.log()).tolist() == pytest.approx([0.5, 0.75])


def check_klom(found) -> None:
    """Nothing between a family and itself, little between two of one kind, much where one is shifted; row by row."""
    rng = np.random.default_rng(0)
    same = rng.normal(3, 1, (200, 4))
    assert found(same, same) == pytest.approx(0, abs=1e-12)
    other = rng.normal(3, 1, (200, 4)) + np.array([0, 0, 6, 0])
    values = found(other, same)
    assert (values[[0, 1, 3]] < 0.3).all() and values[2] > 3
    # All of one family in one bin, all of the other in another: p = 1 + 1e-5 and q = 1e-5, over 1 + 20e-5.
    apart = found(np.zeros((5, 1)), np.ones((5, 1)))
    assert apart[0] == pytest.approx((np.log(1.00001) - np.log(1e-5)) / 1.0002, abs=1e-3)
    assert (found(np.full((5, 1), 1e9), np.full((5, 1), 100.0)) == 0).all()


def test_klom_by_its_limits():
    check_klom(klom)


@pytest.mark.parametrize(("name", "value"), [("FLOOR", 0.05), ("CLIP", 1e12), ("BINS", 1)])
def test_broken_klom_is_caught(name, value, monkeypatch):
    monkeypatch.setattr(membership, name, value)
    with pytest.raises(AssertionError):
        check_klom(klom)


TWO = torch.zeros(2, 3)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: entropy(torch.tensor([[0.0, 1.0], [np.nan, 1.0]])), MetricError, "logits of 1 examples are not finite, rows 1"),
    (lambda: confidence(torch.zeros(3, 1)), MetricError, "logits of 1 class; there must be at least two"),
    (lambda: modified_entropy(TWO, torch.tensor([0, 3])), MetricError, "label 3 in row 1; the logits have classes 0 to 2"),
    (lambda: margin(TWO, torch.tensor([0, -1])), MetricError, "label -1 in row 1"),
    (lambda: klom(np.zeros((5, 2)), np.zeros((5, 3))), ShapeError, "2 and 3 examples; give margins of the same"),
    (lambda: klom(np.zeros((4, 2)), np.zeros((9, 2))), NotEnoughRows, "4 edited and 9 retrained models; a histogram of margins needs 5"),
    (lambda: klom(np.full((5, 2), np.nan), np.zeros((5, 2))), MetricError, "a margin is NaN"),
])  # fmt: skip
def test_what_makes_no_score_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
