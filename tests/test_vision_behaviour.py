"""What the recipes do to the digits of scikit-learn, against a model that never saw the forgotten class.

Bars were set on classes 8, 5, 0 and 3; the seeds and classes here are others.
"""

from __future__ import annotations

import logging
from functools import cache

import pytest

from repedit.vision import (
    Condense,
    Synthesize,
    Task,
    apply,
    buckets,
    class_splits,
    condensation,
    condense,
    digits,
    erase_class,
    finetune,
    mislabelled_splits,
    mnist5k,
    multi_gan,
    relabel,
    retrain,
    small_cnn,
    small_mlp,
    train,
    train_gans,
)
from repedit.vision.condensation import match_features
from tests.published_data import PUBLISHED

FAST = (6, 10)
SLOW = [(2, 11), (9, 12)]
CASES = [FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
every_case = pytest.mark.parametrize(("label", "seed"), CASES)


class Setting:
    """One class to forget, with the original model and the reference."""

    def __init__(self, label: int, seed: int) -> None:
        self.splits = class_splits(digits(), label, seed=seed)
        self.task, self.seed = Task(), seed
        both = self.splits.retain + self.splits.forget
        self.original = train(small_cnn(both, seed=seed), self.task, both, epochs=20, seed=seed)
        self.reference = retrain(lambda: small_cnn(both, seed=seed + 100), self.task, self.splits, seed=seed + 100)
        self.start, self.goal = self.points(self.original), self.points(self.reference)

    @property
    def given(self):
        return self.original, self.task, self.splits

    def points(self, model) -> dict[str, float]:
        """Accuracies in percent."""
        return {n: 100 * self.task.accuracy(model, self.splits.sets[n]) for n in ("retain", "forget", "test")}

    def after(self, delta) -> dict[str, float]:
        return self.points(apply(delta, self.original))


@cache
def setting(label: int, seed: int) -> Setting:
    return Setting(label, seed)


@every_case
def test_the_reference_does_not_know_the_class(label, seed):
    here = setting(label, seed)
    assert here.start["forget"] - here.goal["forget"] >= 60 and here.goal["test"] >= here.start["test"] - 10


def forgets(found, here, margin=4.0):
    """As the reference does: most of the class is lost, measured 85 to 95 points, and the others stay."""
    assert here.start["forget"] - found["forget"] >= 60, found
    for name in ("retain", "test"):
        assert found[name] >= here.goal[name] - margin, (name, found, here)


@every_case
def test_relabelling_forgets(label, seed):
    here = setting(label, seed)
    forgets(here.after(relabel(*here.given, seed=seed)), here)


@every_case
def test_condensing_forgets(label, seed):
    here = setting(label, seed)
    delta = condense(*here.given, seed=seed)
    assert delta.provenance["reduced"] == 90 and delta.provenance["dropped_from_remember"] == [label]
    forgets(here.after(delta), here)


@every_case
def test_remembering_the_forgotten_class_brings_it_back(label, seed, monkeypatch):
    here = setting(label, seed)
    monkeypatch.setattr(condensation, "remembered", lambda splits: (splits.remember, []))
    found = here.after(condense(*here.given, seed=seed))
    assert here.start["forget"] - found["forget"] < 40
    with pytest.raises(AssertionError):
        forgets(found, here)


@pytest.fixture(scope="module")
def gans():
    """Both generators of the fast case, trained once."""
    return train_gans(setting(*FAST).splits, seed=FAST[1])


@every_case
def test_multi_gan_forgets_about_as_much(label, seed, gans):
    here = setting(label, seed)
    delta = multi_gan(*here.given, gans=gans if (label, seed) == FAST else None, seed=seed)
    found = here.after(delta)
    assert found["forget"] <= 40 and found["test"] >= here.goal["test"] - 3
    plain = here.after(relabel(*here.given, seed=seed))
    ablation = delta.provenance["ablation"]
    assert ablation["synthetic"] == 0 and 100 * ablation["accuracy"]["forget"] == plain["forget"]


def test_drawn_images_that_teach_the_class_again_are_reported(gans, caplog):
    """After 300 steps the retain generator draws what the model takes for the forgotten class: 372 of 400 images here."""
    here = setting(*FAST)
    drawn = {w: Synthesize(w, 400, trained=gans[w])(*here.given, 0).sets[w].y[-400:] for w in gans}
    share = {which: float((y == FAST[0]).double().mean()) for which, y in drawn.items()}
    assert share["forget"] > 0.9 and share["retain"] > 0.5
    with caplog.at_level(logging.WARNING):
        made = multi_gan(*here.given, gans=gans, epochs=1).provenance
    assert "images drawn for retain have labels that retain lacks" in caplog.text
    assert made["drawn"]["retain"][str(FAST[0])] > 0.5 * sum(made["drawn"]["retain"].values())


@every_case
def test_erasing_keeps_what_is_retained(label, seed):
    here = setting(label, seed)
    found = here.after(erase_class(*here.given))
    assert here.start["forget"] - found["forget"] >= 25
    for name in ("retain", "test"):
        assert abs(found[name] - here.start[name]) <= 3, name


@every_case
def test_matching_features_lowers_its_loss(label, seed):
    here = setting(label, seed)
    ids = buckets(here.original, here.task, here.splits.retain, 10)
    _, losses = match_features(here.original, here.task, here.splits.retain, ids)
    assert float(losses[-1] / losses[0]) <= 0.6


def test_wrong_labels_are_learnt_by_heart_and_forgotten_by_the_reference():
    splits, task = mislabelled_splits(digits(), seed=10), Task()
    both = splits.retain + splits.forget
    original = train(small_mlp(both, seed=10), task, both, epochs=60, lr=2e-3, seed=10)
    reference = retrain(lambda: small_mlp(both, seed=110), task, splits, epochs=60, lr=2e-3, seed=110)
    assert task.accuracy(original, splits.forget) >= 0.85 and task.accuracy(reference, splits.forget) <= 0.05
    assert task.accuracy(reference, splits.test) > task.accuracy(original, splits.test)
    tuned = apply(finetune(original, task, splits, epochs=8, seed=10), original)
    assert 0.02 <= task.accuracy(tuned, splits.forget) <= 0.4


@pytest.mark.slow
@pytest.mark.parametrize("plan", [Condense(weights="simplex"), Condense(method="medoid"), Condense(method="inversion", epochs=30)], ids=repr)  # fmt: skip
def test_other_condensations_forget_too(plan):
    here = setting(*FAST)
    forgets(here.after(condense(*here.given, plan=plan, seed=FAST[1])), here, margin=6.0)


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is not there")
def test_a_class_of_mnist_is_forgotten():
    splits, task = class_splits(mnist5k(PUBLISHED / "mnist5k"), 4, train=1500, seed=10), Task()
    both = splits.retain + splits.forget
    original = train(small_cnn(both, width=8, seed=10), task, both, epochs=5, seed=10)
    assert task.accuracy(original, splits.forget) >= 0.9
    for delta in (relabel(original, task, splits, seed=10), condense(original, task, splits, seed=10)):
        edited = apply(delta, original)
        assert task.accuracy(edited, splits.forget) <= 0.05 and task.accuracy(edited, splits.test) >= 0.85
