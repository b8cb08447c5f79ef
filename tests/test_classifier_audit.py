"""The audit of a classifier on tiny networks: what each attack measures, what the report holds, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

import repedit as rp
from repedit.auditing import classifier
from repedit.auditing import image_attacks as image_relearning
from repedit.auditing import image_attacks as image_rounding
from repedit.auditing import image_attacks as image_shadows
from repedit.auditing.classifier import audit_classifiers, klom
from repedit.auditing.image_attacks import (
    SCORES,
    coarse,
    halves,
    membership,
    relearn,
    relearned,
    rounding,
    shadows,
    sides,
)
from repedit.auditing.report import AUC, FORGET, RELEARNING, Report
from repedit.errors import ArgumentError, BadReference, MetricError, NotEnoughRows, TrainingError, UnknownName
from repedit.outcomes import HIDDEN, INCONCLUSIVE, NOT_FORGOTTEN, PASS
from repedit.report import compare_reports, markdown, page, redacted, schema, write
from repedit.vision import ImageSplits, Relabel, Task, apply, relabel, retrain, small_cnn, train
from repedit.vision.editing import tensors_of
from tests.classifiers import normed, request

TRAINED = {"epochs": 20, "lr": 5e-3}


class Made(NamedTuple):
    splits: ImageSplits
    model: nn.Module
    task: Task
    references: tuple[nn.Module, ...]
    edited: nn.Module


def network(splits: ImageSplits, seed: int) -> nn.Module:
    return small_cnn(splits.retain, width=6, hidden=24, labels=splits.labels, seed=seed)


@cache
def made() -> Made:
    """A class forgotten by relabelling, and three models that never saw it."""
    splits = request(n=400, train=200)
    task = Task.of(network(splits, 1), splits.retain)
    model = train(network(splits, 1), task, splits.retain + splits.forget, **TRAINED)
    others = (retrain(lambda s=s: network(splits, s), task, splits, seed=s, **TRAINED) for s in (5, 6, 7))
    edited = apply(relabel(model, task, splits, epochs=6, lr=5e-3), model)
    return Made(splits, model, task, tuple(others), edited)


@cache
def report() -> Report:
    m = made()
    return rp.audit_classifier(
        m.edited, m.model, m.task, m.splits, reference=m.references[0], references=m.references[1:]
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tensors_of(model).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


# What each attack measures.


def check_membership(found, model, task, splits) -> None:
    """Scores and answers of each image, read alone."""
    images = splits.forget + splits.holdout
    for i in (0, len(splits.forget) - 1, len(splits.forget), len(images) - 1):
        with torch.no_grad():
            p = copy.deepcopy(model).eval()(images[torch.tensor([i])].x).double().softmax(1)[0]
        y = int(images.y[i])
        values = {"loss": p[y].log(), "confidence": p.max(), "entropy": (p * p.log()).sum()}
        for name, value in values.items():
            assert found.graded[SCORES.index(name), i] == pytest.approx(float(value), abs=1e-5), name
        assert (found.correct[:, i] == (int(p.argmax()) == y)).all()
    assert found.items[0] == f"forget {int(images.index[0])}" and found.items[-1] == f"holdout {int(images.index[-1])}"
    member, other = sides(found)
    assert len(member) == len(splits.forget) and len(other) == len(splits.holdout)


def test_membership_scores_every_image_in_eval_mode():
    m = made()
    check_membership(membership(m.model, m.task, m.splits), m.model, m.task, m.splits)
    net = normed()
    task = Task.of(net, m.splits.retain)
    assert net.training
    check_membership(membership(net, task, m.splits), net, task, m.splits)
    assert net.training


def test_membership_in_train_mode_is_caught(monkeypatch):
    net, splits = normed(), made().splits
    task = Task.of(net, splits.retain)
    monkeypatch.setattr(Task, "logits", lambda self, model, images: model.train()(images.x).detach())
    with pytest.raises(AssertionError):
        check_membership(membership(net, task, splits), net, task, splits)


def check_relearning(splits: ImageSplits, trained_on: list[torch.Tensor], found) -> None:
    """Nothing of V is trained on, all of T is, with twice as many retain images; the same in every epoch."""
    asked = {int(item.split()[1]) for item in found.items}
    forget = set(splits.forget.index.tolist())
    for index in trained_on:
        seen = set(index.tolist())
        assert not seen & asked and forget - asked <= seen
        assert len(seen & set(splits.retain.index.tolist())) == min(2 * len(forget - asked), len(splits.retain))
    assert len(trained_on) == 10 and found.settings[0] == "epoch=0" and found.settings[-1] == "epoch=10"


def recorded(monkeypatch) -> list[torch.Tensor]:
    """The images every epoch of relearning is given."""
    seen: list[torch.Tensor] = []
    plain = image_relearning.descend

    def descend(model, optimiser, images, **options):
        seen.append(images.index)
        return plain(model, optimiser, images, **options)

    monkeypatch.setattr(image_relearning, "descend", descend)
    return seen


def test_relearning_trains_on_half_and_asks_the_other(monkeypatch):
    m, seen = made(), recorded(monkeypatch)
    before = state(m.edited)
    found = relearn(m.edited, m.task, m.splits)
    check_relearning(m.splits, seen, found)
    assert same(before, state(m.edited)) and 0 < (found.train_accuracy or 0) <= 1
    assert relearned(found) == pytest.approx(found.correct[1:].mean(1)) and len(relearned(found)) == 10


def test_relearning_on_what_it_asks_is_caught(monkeypatch):
    m, seen = made(), recorded(monkeypatch)
    monkeypatch.setattr(image_relearning, "halves", lambda forget, seed: (forget, halves(forget, seed)[1]))
    with pytest.raises(AssertionError):
        check_relearning(m.splits, seen, relearn(m.edited, m.task, m.splits))


def test_no_more_than_64_images_are_relearnt_and_the_rest_is_asked():
    whole = rp.vision.digits()[slice(0, 300)]
    train_on, asked = halves(whole, 0)
    assert (len(train_on), len(asked)) == (64, 236) and not set(train_on.index.tolist()) & set(asked.index.tolist())
    assert [len(part) for part in halves(whole[slice(0, 9)], 0)] == [4, 5]


def test_relearning_depends_on_its_seed_alone():
    m = made()
    first, again, other = (relearn(m.edited, m.task, m.splits, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.graded, again.graded) and first.items == again.items != other.items


def check_coarse(model: nn.Module, scheme: str, steps: int) -> None:
    """Every row of a weight lies on `steps` multiples of its own step either way, and no further from where it was than half."""
    rounded = coarse(model, scheme)
    for name, old in model.named_parameters():
        new = rounded.get_parameter(name)
        if old.ndim == 1:
            assert torch.equal(old, new), name
            continue
        for before, after in zip(old.detach().flatten(1), new.detach().flatten(1), strict=True):
            step = before.abs().max() / steps
            torch.testing.assert_close((after / step).round(), after / step, atol=1e-4, rtol=0)
            assert (after - before).abs().max() <= step / 2 + 1e-6


@pytest.mark.parametrize(("scheme", "steps"), [("int8", 127), ("int4", 7)])
def test_rounding_has_one_step_an_output_channel(scheme, steps):
    before = state(made().model)
    check_coarse(made().model, scheme, steps)
    assert same(before, state(made().model))


def test_rounding_with_one_step_for_all_channels_is_caught(monkeypatch):
    plain = image_rounding.fake_quantize
    monkeypatch.setattr(image_rounding, "fake_quantize", lambda rows, scheme, group: plain(rows.reshape(1, -1), scheme, rows.numel()).reshape(rows.shape))  # fmt: skip
    with pytest.raises(AssertionError):
        check_coarse(made().model, "int4", 7)


def test_a_rounded_model_is_asked_and_told_apart_again():
    m = made()
    found = rounding(m.model, m.task, m.splits, "int8")
    copied = coarse(m.model, "int8")
    assert found.correct.mean() == pytest.approx(m.task.accuracy(copied, m.splits.forget))
    assert found.details["auc"] == pytest.approx(membership(copied, m.task, m.splits).details["auc"]["loss"], abs=1e-12)


def test_each_image_is_in_half_of_the_shadow_models():
    for count, models in ((101, 8), (40, 4)):
        seen = torch.stack([torch.isin(torch.arange(count), half) for half in image_shadows._halves(count, models, 0)])
        assert (seen.sum(0) == models // 2).all()


@pytest.mark.slow
def test_shadow_models_find_what_was_learnt_by_heart(monkeypatch):
    """The larger network, trained long on few images whose labels are wrong, is told from one that never saw them."""
    splits = wrong()
    build = lambda: small_cnn(splits.retain, width=12, hidden=48, labels=4, seed=3)  # noqa: E731
    task = Task.of(build(), splits.retain)
    model = train(build(), task, splits.retain + splits.forget, epochs=40, lr=5e-3)
    options = {"models": 6, "epochs": 40, "lr": 5e-3, "fprs": (0.1,)}
    found = shadows(model, task, splits, build, **options)
    clean = shadows(train(build(), task, splits.retain, epochs=40, lr=5e-3), task, splits, build, **options)
    assert found.details["auc"] > 0.8 > 0.65 > clean.details["auc"] > 0.35 and found.details["kind"] == "online"
    assert found.details["tpr"]["0.1"] > clean.details["tpr"]["0.1"]
    # With the memberships of the shadow models mixed up nothing is found.
    plain = image_shadows.lira
    monkeypatch.setattr(image_shadows, "lira", lambda target, shadow, seen: plain(target, shadow, ~seen))
    assert shadows(model, task, splits, build, **options).details["auc"] < 0.5


def wrong() -> ImageSplits:
    """Forty forget images with wrong labels, and a holdout with wrong labels."""
    return rp.vision.mislabelled_splits(request(n=400).retain + request(n=400).test, 0.4, train=100, remember=0)


def test_few_shadow_models_never_see_what_is_asked(monkeypatch):
    m, seen = made(), []
    plain = image_shadows.train
    monkeypatch.setattr(image_shadows, "train", lambda model, task, images, **o: seen.append(set(images.index.tolist())) or plain(model, task, images, **o))  # fmt: skip
    found = shadows(m.model, m.task, m.splits, lambda: network(m.splits, 9), models=2, epochs=1, fprs=(0.2,))
    assert found.details["kind"] == "offline" and not any(s & set(m.splits.forget.index.tolist()) for s in seen)


@pytest.mark.slow
def test_klom_of_retrained_models_is_small_and_of_the_original_large():
    m = made()
    more = [retrain(lambda s=s: network(m.splits, s), m.task, m.splits, seed=s, **TRAINED) for s in range(20, 30)]
    near, far = (
        klom(more[:5], more[5:], m.task, m.splits.forget),
        klom([m.model] * 5, more[5:], m.task, m.splits.forget),
    )
    assert near.mean() < 0.8 * far.mean() and len(near) == len(m.splits.forget)


# What the audit makes of them.


def test_the_report_holds_every_model_and_every_gap():
    found = report()
    assert {role: len(held) for role, held in found.findings.items()} == {"edited": 4, "original": 4, "reference": 12}
    gaps = {gap.measure: gap for gap in found.gaps}
    m = made()
    assert gaps[FORGET].original == m.task.accuracy(m.model, m.splits.forget) > 0.9
    assert (
        gaps[FORGET].reference == 0
        and gaps[RELEARNING].spread[0] <= gaps[RELEARNING].reference <= gaps[RELEARNING].spread[1]
    )
    assert gaps[AUC].others == f"{len(m.splits.holdout)} holdout images"
    assert found.context["notes"][0].startswith("statistical evidence, not certified deletion")
    assert found.finding("reference", "relearn") is not None and found.verdict.word in (HIDDEN, PASS)


def test_the_original_is_not_forgotten_and_a_further_retraining_passes():
    m = made()
    found = audit_classifiers({"original": m.model, "again": m.references[2]}, m.model, m.task, m.splits, references=m.references[:2])  # fmt: skip
    assert found["original"].verdict.word == NOT_FORGOTTEN and found["again"].verdict.word == PASS


def test_the_same_seed_gives_the_same_report_and_nothing_else_is_touched():
    m = made()
    report()
    before = [state(model) for model in (m.edited, m.model, *m.references)]
    torch.manual_seed(3)
    numbers = torch.get_rng_state()
    again = rp.audit_classifier(m.edited, m.model, m.task, m.splits, references=m.references)
    assert timeless(again) == timeless(report()) and torch.equal(numbers, torch.get_rng_state())
    assert all(same(*pair) for pair in zip(before, map(state, (m.edited, m.model, *m.references)), strict=True))


def timeless(found: Report) -> str:
    """The report without its times."""
    held = json.loads(found.to_json())
    del held["context"]["seconds"]
    for finding in (f for rows in held["findings"].values() for f in rows):
        del finding["seconds"]
    return json.dumps(held, sort_keys=True)


def test_without_a_reference_the_columns_are_empty_and_nothing_is_concluded():
    m = made()
    found = rp.audit_classifier(m.edited, m.model, m.task, m.splits, relearn=False)
    assert found.verdict.word == INCONCLUSIVE and "reference" not in found.findings and np.isnan(found.gaps[0].value)
    assert found.not_run["relearn"] == "relearn=False" and "n/a" in markdown(found)
    assert Report.from_json(found.to_json()).to_json() == found.to_json()


def test_a_report_is_saved_read_and_shown_like_any_other(tmp_path):
    found = report()
    names = [path.name for path in write(found, tmp_path)]
    assert names == ["audit.json", "audit.md", "audit.html", "gap.png", "membership.png"]
    assert (
        Report.load(tmp_path).to_json() == found.to_json()
        and Report.load(tmp_path).gaps[0].spread == found.gaps[0].spread
    )
    jsonschema.validate(json.loads(found.to_json()), schema())
    for text in (page(found), markdown(found)):
        assert all(
            word in text
            for word in (found.verdict.word, AUC, "Gap to the retrained model", "holdout images", "Relearning")
        )
        assert "recovered fraction" not in text and "No retain set" not in text
    assert markdown(found).count("epoch") == 0 and "What each attack brings back" not in page(found)
    assert f"forget {int(made().splits.forget.index[0])}" not in redacted(found).to_json()


def test_reports_written_before_there_were_gaps_are_still_read():
    held = json.loads(report().to_json())
    del held["gaps"]
    assert Report.from_json(json.dumps(held)).gaps == ()


def test_audits_of_classifiers_are_not_put_among_those_of_language_models():
    with pytest.raises(ArgumentError, match=r"'a', 'b': audits of classifiers are compared by rp.plot.gap"):
        compare_reports({"a": report(), "b": report()})


def audited(**changed):
    m = made()
    options = {
        "edited": m.edited,
        "original": m.model,
        "task": m.task,
        "splits": m.splits,
        "reference": m.references[0],
    }
    return rp.audit_classifier(**{**options, **changed})


def broken(value: float) -> nn.Module:
    """The edited model with one weight replaced."""
    model = copy.deepcopy(made().edited)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = value
    return model


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: audited(reference=made().model), BadReference, r"reference 0 was trained on \d+ of \d+ forget images \(by its recorded indices\)"),
    (lambda: audited(references=[made().references[0], made().edited]), BadReference, "reference 2 was trained on"),
    (lambda: audited(edited=made().references[0]), BadReference, "reference 0 is the edited model itself"),
    (lambda: audited(splits=Relabel()(made().model, made().task, made().splits, 0)), ArgumentError, "made by Relabel.*before any data plan"),
    (lambda: audited(edited=broken(float("nan"))), MetricError, "the edited model: logits of .* are not finite"),
    (lambda: audited(task=Task("nothing")), UnknownName, "no module 'nothing'"),
    (lambda: audited(splits=replace(made().splits, labels=9)), ArgumentError, "the original model: the model has 4 outputs, the splits have labels=9"),
    (lambda: klom([], [made().model] * 5, made().task, made().splits.forget), NotEnoughRows, "0 edited and 5 retrained models"),
    (lambda: halves(made().splits.forget[torch.arange(3)], 0), NotEnoughRows, "3 forget images; relearning needs two to train on"),
    (lambda: relearn(made().edited, made().task, made().splits, epochs=0), ArgumentError, "epochs=0; give at least 1"),
    (lambda: relearn(broken(1e38), made().task, made().splits, lr=1e30), (TrainingError, MetricError), "loss is|not finite"),
    (lambda: rounding(made().edited, made().task, made().splits, "int5"), UnknownName, "int5"),
    (lambda: shadows(made().edited, made().task, made().splits, lambda: network(made().splits, 1), models=5), ArgumentError, "models=5; give an even number"),
    (lambda: shadows(made().edited, made().task, made().splits, lambda: network(made().splits, 1), models=2, epochs=1), MetricError, "non-members resolve fpr >="),
])  # fmt: skip
def test_what_cannot_be_audited_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_public_names_are_there():
    assert rp.audit_classifier is classifier.audit_classifier and set(classifier.__all__) <= set(dir(classifier))
