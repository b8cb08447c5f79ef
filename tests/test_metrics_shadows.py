"""LiRA against the normal densities written out, on drawn scores and on tiny models that are trained for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from repedit.auditing.attacks.tuning import Tuning, examples, shuffled, tune
from repedit.errors import ArgumentError, NotEnoughRows, NotFinite, ShapeError
from repedit.metrics.membership import auc, lira, scores
from tests.teachable_models import blank

RNG = np.random.default_rng(0)


def drawn(texts: int, models: int, gap: float = 1.0):
    """Texts that differ in how likely they are; having seen one raises its score by the gap."""
    ease, seen = RNG.normal(0, 3, texts), np.arange(models)[:, None] % 2 == np.arange(texts) % 2
    shadows = ease + gap * seen + RNG.normal(0, 0.5, (models, texts))
    member = np.arange(texts) % 3 == 0
    return ease + gap * member + RNG.normal(0, 0.5, texts), shadows, seen, member


def test_it_is_the_ratio_of_the_two_densities():
    target, shadows, seen, _ = drawn(12, 40)
    found = lira(target, shadows, seen, pooled=False)
    for i, value in enumerate(found):
        logs = [norm.logpdf(target[i], side.mean(), side.std(ddof=1)) for side in (shadows[seen[:, i], i], shadows[~seen[:, i], i])]  # fmt: skip
        assert value == pytest.approx(logs[0] - logs[1], rel=1e-9)


def check_beats_the_score_alone(ratio) -> None:
    target, shadows, seen, member = drawn(600, 8)
    plain = auc(target[member], target[~member])
    found = ratio(target, shadows, seen)
    assert plain < 0.65 and auc(found[member], found[~member]) > 0.85


def test_what_a_text_is_like_without_being_seen_is_taken_out():
    check_beats_the_score_alone(lira)


def test_shadow_models_on_the_wrong_side_are_caught():
    with pytest.raises(AssertionError):
        check_beats_the_score_alone(lambda target, shadows, seen: lira(target, shadows, ~seen))


def test_few_shadow_models_share_one_deviation():
    target, shadows, seen, _ = drawn(30, 8)
    assert (lira(target, shadows, seen) == lira(target, shadows, seen, pooled=True)).all()
    assert not (lira(target, shadows, seen) == lira(target, shadows, seen, pooled=False)).all()
    many = drawn(30, 40)[:3]
    assert (lira(*many) == lira(*many, pooled=False)).all()


def test_texts_that_tiny_models_were_trained_on_are_found():
    texts = ["".join(chr(97 + (7 * i * i + j * (i + 3)) % 26) for j in range(10)) for i in range(16)]
    seen = np.array([[(i >> (m // 2) & 1) == m % 2 for i in range(16)] for m in range(8)])
    member = np.arange(16) % 3 == 0
    rows = [_trained(texts, chosen) for chosen in [member, *seen]]
    found = lira(rows[0], np.array(rows[1:]), seen)
    assert auc(found[member], found[~member]) > 0.9


def _trained(texts: list[str], chosen: np.ndarray) -> np.ndarray:
    subject = blank("llama")
    items = examples(subject, [text for text, take in zip(texts, chosen, strict=True) if take], loss="sequence")
    with torch.enable_grad():
        tune(subject, shuffled(items, 8, 0), Tuning(1e-2, steps=30), at=(), measure=lambda step: None)
    return scores(subject, texts, ("loss",))["loss"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, s, n: (t[:3], s, n), ShapeError, r"scores of \(3,\) texts, shadow scores \(8, 6\), seen \(8, 6\)"),
        (lambda t, s, n: (t * np.inf, s, n), NotFinite, "a score is not finite"),
        (lambda t, s, n: (t, s, np.ones_like(n)), NotEnoughRows, "a text has 0 shadow models on one side"),
        (lambda t, s, n: (t[:0], s[:, :0], n[:, :0]), ArgumentError, "there is no text"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        lira(*change(*drawn(6, 8)[:3]))
