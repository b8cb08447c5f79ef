"""What forgetting and its audit do on digits: a class, and wrong labels that only memory can explain.

The seeds and classes are none that the margins were proposed on. A fast run has one of each, the slow ones three; five are in
bench/results/vision-digits-*.json. One bar moved: a relearn value beside one retrained model, or the mean of two, calls every
eighth or tenth retraining hidden (two retrainings of one class differ by up to .57), so a class is judged beside the median of
three. The others hold as they were proposed; where they were met by far the measured numbers stand beside them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import nn

from repedit import vision
from repedit.auditing.classifier import audit_classifiers
from repedit.auditing.report import AUC, FORGET, RELEARNING, RETAIN, TEST, Gap, Report
from repedit.demo import RECIPES, SETTINGS, Setting
from repedit.outcomes import HIDDEN, PASS

SLOW: Any = pytest.mark.slow
CLASSES = [(20, 6), pytest.param(21, 1, marks=SLOW), pytest.param(22, 9, marks=SLOW)]
SEEDS = [20, pytest.param(21, marks=SLOW), pytest.param(22, marks=SLOW)]
AGAIN = "retrained again"


class Trained(NamedTuple):
    splits: vision.ImageSplits
    task: vision.Task
    original: nn.Module
    references: tuple[nn.Module, ...]
    again: nn.Module
    setting: Setting


@cache
def trained(seed: int, label: int | None) -> Trained:
    """The original, retrained models and one more as a control; for a class the small CNN, for wrong labels the MLP.

    Three retrained models where a class is forgotten: with two the control of (20, 6) was called hidden, by relearning.
    """
    data = vision.digits()
    setting = SETTINGS["digits"]["mislabelled" if label is None else "class"]
    splits = (
        vision.mislabelled_splits(data, seed=seed) if label is None else vision.class_splits(data, label, seed=seed)
    )
    task, options = vision.Task(), {"epochs": setting.epochs, "lr": setting.lr}
    model = vision.train(setting.build(data, seed=seed), task, splits.retain + splits.forget, seed=seed, **options)
    others = [
        vision.retrain(lambda s=s: setting.build(data, seed=s), task, splits, seed=s, **options)
        for s in range(1000 * seed, 1000 * seed + (3 if label is None else 4))
    ]
    return Trained(splits, task, model, tuple(others[:-1]), others[-1], setting)


@cache
def edited(seed: int, label: int | None, recipe: str) -> nn.Module:
    t = trained(seed, label)
    return vision.apply(RECIPES[recipe](t.original, t.task, t.splits, t.setting, seed), t.original)


@cache
def audits(seed: int, label: int | None, *recipes: str) -> dict[str, Report]:
    """The control, and every recipe."""
    t = trained(seed, label)
    models = {AGAIN: t.again} | {recipe: edited(seed, label, recipe) for recipe in recipes}
    return audit_classifiers(models, t.original, t.task, t.splits, references=t.references, seed=seed)


def gaps(report: Report) -> dict[str, Gap]:
    return {gap.measure: gap for gap in report.gaps}


@pytest.mark.parametrize(("seed", "label"), CLASSES)
def test_an_original_knows_the_class_and_a_retrained_model_never_says_it(seed, label):
    t = trained(seed, label)
    assert t.task.accuracy(t.original, t.splits.forget) >= 0.9
    for model in (*t.references, t.again):
        assert t.task.accuracy(model, t.splits.forget) == 0 and t.task.accuracy(model, t.splits.test) >= 0.9


@pytest.mark.parametrize("recipe", ["relabel", "condense"])
@pytest.mark.parametrize(("seed", "label"), CLASSES)
def test_relabelling_and_condensation_forget_a_class_and_keep_the_others(seed, label, recipe):
    found = gaps(audits(seed, label, "relabel", "condense")[recipe])
    assert found[FORGET].edited <= 0.05 and found[RETAIN].value >= -0.04 and found[TEST].value >= -0.04


def relearnt(report: Report, role: str) -> list[float]:
    """The share of V that is right, averaged over the epochs of relearning, model by model."""
    return [float(f.correct[1:].mean()) for f in report.findings[role] if f.attack == RELEARNING]


@pytest.mark.parametrize("recipe", ["relabel", "condense"])
@pytest.mark.parametrize(("seed", "label"), CLASSES)
def test_the_class_comes_back_before_any_retrained_model_learns_it(seed, label, recipe):
    found = audits(seed, label, "relabel", "condense")[recipe]
    assert found.verdict.word == HIDDEN and RELEARNING in found.verdict.sentence
    # Measured on (20, 6) and (21, 1): .89 to .98 right, retrained models .03 to .75, their median .08 to .66; the CPU moves
    # these by .003. An epoch, as a count, moves by one.
    again, others = relearnt(found, "edited")[0], relearnt(found, "reference")
    assert again > max(others) and again - np.median(others) >= 0.1


@pytest.mark.parametrize(("seed", "label"), [*CLASSES, (20, None)])
def test_one_more_retrained_model_passes(seed, label):
    recipes = ("relabel", "condense") if label is not None else ("finetune", "ascend", "relabel")
    assert audits(seed, label, *recipes)[AGAIN].verdict.word == PASS


EVERY = [pytest.param(20, 6, marks=SLOW), *CLASSES[1:]]


@pytest.mark.parametrize(("seed", "label"), EVERY)
def test_synthetic_images_do_no_harm_and_no_good(seed, label):
    # Forget 0 on five classes, as relabelling without them; 0 to 25.4 % on the four classes of the proposal.
    found = gaps(audits(seed, label, "multi_gan", "erase_class", "finetune")["multi_gan"])
    assert found[FORGET].edited <= 0.4 and found[TEST].value >= -0.03


@pytest.mark.parametrize(("seed", "label"), EVERY)
def test_an_erased_class_leaves_the_others_as_they_were(seed, label):
    found = gaps(audits(seed, label, "multi_gan", "erase_class", "finetune")["erase_class"])
    assert all(abs(found[name].edited - found[name].original) <= 0.03 for name in (RETAIN, TEST))
    # It fell by 92 to 100 points on five classes.
    assert found[FORGET].original - found[FORGET].edited >= 0.25


@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_labels_are_told_from_unseen_ones_by_the_original_alone(seed):
    for found in audits(seed, None, "finetune", "ascend", "relabel").values():
        told = gaps(found)[AUC]
        assert told.original >= 0.97 and all(0.38 <= value <= 0.62 for value in told.spread)


@pytest.mark.parametrize("recipe", ["finetune", "ascend", "relabel"])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_cheap_recipe_passes_on_wrong_labels(seed, recipe):
    found = audits(seed, None, "finetune", "ascend", "relabel")[recipe]
    assert gaps(found)[AUC].edited > 0.8 and found.verdict.word != PASS


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["multi_gan", "condense", "scrub", "salun"])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_costlier_recipe_passes_on_wrong_labels_either(seed, recipe):
    assert audits(seed, None, "multi_gan", "condense", "scrub", "salun")[recipe].verdict.word != PASS
