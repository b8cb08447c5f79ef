"""rp.audit_classifier: attack an unlearned image classifier, and compare it with models that never saw the forget images.

A classifier is cheap to train, so there is what a language model rarely has: a reference that was retrained without the
forget images. Everything is judged by the gap to it, in both directions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from repedit.arguments import checked
from repedit.auditing.attack import Finding
from repedit.auditing.image_attacks import RELEARN, SCHEMES, klom, membership, relearned, rounding, shadows, sides
from repedit.auditing.image_attacks import relearn as relearning
from repedit.auditing.report import AUC, FORGET, RELEARNING, RETAIN, ROUNDED, TEST, Gap, Report, RetainCheck
from repedit.auditing.verdict import MARGINS, ONE, classifier_verdict
from repedit.errors import ArgumentError, BadReference, during
from repedit.hashing import module_fingerprint, package_versions
from repedit.metrics.membership import Values, auc, auc_draws, percentiles, standard_error
from repedit.vision.data import ImageSplits, Task
from repedit.vision.training import trained_on

__all__ = ["audit_classifier", "audit_classifiers", "klom", "membership", "relearning", "rounding", "shadows"]

DRAWS = 1000
EVIDENCE = "statistical evidence, not certified deletion: what these attacks do not find may still be there"
UNTRIED = {
    "shadow models": "trains eight models more; repedit.auditing.classifier.shadows does it",
    "inversion of the classifier": "no attack here rebuilds images from the weights",
}


@checked
def audit_classifier(
    edited: nn.Module,
    original: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    reference: nn.Module | None = None,
    references: Sequence[nn.Module] = (),
    relearn: bool = True,
    seed: int = 0,
) -> Report:
    """Attack an edited classifier by membership, relearning and rounding, and say how far it is from a retrained one.

    Every number of the report is a gap, edited less retrained, and 0 is the aim: a model that never saw the forget
    images gives them whatever accuracy and whatever membership score it gives. No model is changed.

    Args:
        splits: those of the request; forget images are the members, holdout images what they are told from.
        reference: trained on the retain images alone, as `rp.vision.retrain` does; without one nothing is concluded.
        references: further retrained models, best two or more: the median counts, and what lies among them is no
            finding.
        relearn: also fine-tune every model on half of the forget set; no pass is possible without.
    Raises:
        BadReference: if a reference saw forget images, or is the edited or original model itself.
        ArgumentError: if the splits are those of a data plan. UnknownName, ShapeError, ArgumentError: if the task does
            not describe a model.
        MetricError: if an output of a model is not finite. TrainingError: if relearning diverges.
    """
    models = {"edited": edited}
    return audit_classifiers(
        models, original, task, splits, reference=reference, references=references, relearn=relearn, seed=seed
    )["edited"]


def audit_classifiers(
    edited: Mapping[str, nn.Module],
    original: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    reference: nn.Module | None = None,
    references: Sequence[nn.Module] = (),
    relearn: bool = True,
    seed: int = 0,
) -> dict[str, Report]:
    """The same for several edited models of one original, by name; the original and the references are attacked once.

    Raises:
        As `audit_classifier`.
    """
    retrained = [model for model in (reference, *references) if model is not None]
    for model in edited.values():
        _check_models(model, original, task, splits, retrained)

    def attacked(role: str, model: nn.Module) -> _Attacked:
        with during(f"the {role} model", f"in the audit of the {role} classifier, seed {seed}"):
            return _attacked(model, task, splits, relearn, seed)

    others = {"original": [attacked("original", original)], "reference": [attacked("reference", m) for m in retrained]}
    return {
        name: _report({"edited": [attacked("edited", model)], **others}, task, splits, relearn, seed)
        for name, model in edited.items()
    }


class _Attacked(NamedTuple):
    """One model after all attacks."""

    findings: tuple[Finding, ...]
    measured: Measured
    fingerprint: str


def _report(
    attacked: Mapping[str, list[_Attacked]], task: Task, splits: ImageSplits, relearn: bool, seed: int
) -> Report:
    values = {role: [model.measured for model in models] for role, models in attacked.items()}
    compared = gaps(values["edited"][0], values["original"][0], values["reference"], draws=DRAWS, seed=seed)
    findings = {
        role: tuple(f for model in models for f in model.findings) for role, models in attacked.items() if models
    }
    return Report(
        verdict=classifier_verdict(compared, len(splits.holdout)), recoveries=(), retain=RetainCheck(), gaps=compared, findings=findings,
        not_run=UNTRIED if relearn else {RELEARN: "relearn=False", **UNTRIED}, heuristics={},
        context={
            "kind": "classifier", "seeds": [seed], "draws": DRAWS, "notes": _notes(compared, len(values["reference"])),
            "margins": MARGINS, "sets": {name: len(images) for name, images in splits.sets.items()}, "feature": task.module,
            "hashes": {role: [model.fingerprint for model in models] for role, models in attacked.items()},
            "versions": package_versions("numpy"), "machine": platform.machine(),
            "seconds": sum(f.seconds for findings in findings.values() for f in findings),
        },
    )  # fmt: skip


def _check_models(
    edited: nn.Module, original: nn.Module, task: Task, splits: ImageSplits, references: Sequence[nn.Module]
) -> None:
    if splits.plans:
        raise ArgumentError(
            f"these splits were made by {', '.join(splits.plans)}; audit with the splits of the request, before any data plan"
        )
    for model in (edited, original, *references):
        task.check(model, splits.forget)
    forget = set(splits.forget.index.tolist())
    others = {module_fingerprint(edited): "edited", module_fingerprint(original): "original"}
    for number, model in enumerate(references):
        shared = len(forget & trained_on(model))
        if shared:
            raise BadReference(
                f"reference {number} was trained on {shared} of {len(forget)} forget images (by its recorded indices); give a "
                "model trained on retain alone: rp.vision.retrain(build, task, splits)"
            )
        same = others.get(module_fingerprint(model))
        if same:
            raise BadReference(
                f"reference {number} is the {same} model itself; give one that was trained without the forget images"
            )


def _attacked(model: nn.Module, task: Task, splits: ImageSplits, relearn: bool, seed: int) -> _Attacked:
    findings = [membership(model, task, splits, seed=seed)]
    if relearn:
        findings.append(relearning(model, task, splits, seed=seed))
    findings += [rounding(model, task, splits, scheme, seed=seed) for scheme in SCHEMES]
    return _Attacked(tuple(findings), _measured(model, task, splits, findings), module_fingerprint(model))


def _measured(model: nn.Module, task: Task, splits: ImageSplits, findings: Sequence[Finding]) -> Measured:
    by_name = {finding.attack: finding for finding in findings}
    members, others = sides(by_name["membership"])
    learnt = by_name.get(RELEARN)
    relearning: dict[str, Any] = {} if learnt is None else {"relearned": relearned(learnt)}
    forget, retain, test = (task.accuracy(model, images) for images in (splits.forget, splits.retain, splits.test))
    return Measured(
        forget, retain, test, members, others,
        rounded={s: (float(by_name[s].correct.mean()), float(by_name[s].details["test"])) for s in SCHEMES},
        sizes={"retain": len(splits.retain), "test": len(splits.test), "V": len(learnt.items) if learnt else 0}, **relearning,
    )  # fmt: skip


def _notes(compared: Sequence[Gap], references: int) -> list[str]:
    """What a reader must know of these numbers."""
    by_measure: Mapping[str, Gap] = {gap.measure: gap for gap in compared}
    notes = [EVIDENCE]
    if references == 1:
        notes.append(f"one retrained model; {ONE}")
    membership_gap = by_measure[AUC]
    if not isnan(membership_gap.reference) and abs(membership_gap.reference - 0.5) > 2 * membership_gap.error:
        notes.append(
            f"the retrained model itself is told apart (AUC {membership_gap.reference:.2f}), so .5 is not the aim here"
        )
    return notes


# --- Gaps: every measure of an edited classifier minus the same measure of models retrained without the forget images


TOLERATED = 0.05
"""Test accuracy that rounding may cost; a model that it breaks is no evidence."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured on one classifier."""

    forget: float
    retain: float
    test: float
    """Accuracies, as fractions."""
    members: Values
    """Scores of the forget images, higher for members: -loss."""
    others: Values
    """Of the holdout."""
    relearned: Values = field(default_factory=lambda: np.zeros(0))
    """Accuracy on V after each epoch of relearning; empty where that was not done."""
    rounded: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """(forget, test) accuracy once the weights are stored in few bits, by scheme."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Images of retain, test and V."""


def gaps(
    edited: Measured, original: Measured, references: Sequence[Measured] = (), *, draws: int = 1000, seed: int = 0
) -> tuple[Gap, ...]:
    """Every measure of the edited model beside that of the original and the median of the retrained ones.

    Without a reference the gaps are NaN.

    Raises:
        MetricError: if a score is not finite or a side is empty. ArgumentError: if the models scored different images,
            or were relearned or rounded differently.
    """
    models = (edited, original, *references)
    _check_alike(models)
    sizes = edited.sizes
    measures = [
        _gap(FORGET, [m.forget for m in models], members=_images(len(edited.members), "forget")),
        _gap(RETAIN, [m.retain for m in models], members=_images(sizes.get("retain"), "retain")),
        _gap(TEST, [m.test for m in models], members=_images(sizes.get("test"), "test")),
        _membership_gap(models, draws, seed),
    ]
    if len(edited.relearned):
        values = [float(m.relearned.mean()) for m in models]
        measures.append(_gap(RELEARNING, values, members=_images(sizes.get("V"), "other forget")))
    return (*measures, *(_rounded(scheme, models) for scheme in edited.rounded))


def _gap(measure: str, values: Sequence[float], **more: object) -> Gap:
    """Of the values of edited, original and every reference."""
    edited, original, *references = values
    if not references:
        return Gap(measure, edited, original, **more)  # type: ignore[arg-type]
    base = float(np.median(references))
    spread = (min(references), max(references)) if len(references) > 1 else (nan, nan)
    return Gap(measure, edited, original, base, edited - base, spread=spread, **more)  # type: ignore[arg-type]


def _rounded(scheme: str, models: Sequence[Measured]) -> Gap:
    """Forget accuracy once rounded; it decides only where rounding leaves every model its test accuracy."""
    whole = all(m.rounded[scheme][1] >= m.test - TOLERATED for m in (models[0], *models[2:]))
    members = _images(len(models[0].members), "forget")
    return _gap(ROUNDED.format(scheme), [m.rounded[scheme][0] for m in models], members=members, decides=whole)


def _membership_gap(models: Sequence[Measured], draws: int, seed: int) -> Gap:
    values = [auc(m.members, m.others) for m in models]
    counts = len(models[0].members), len(models[0].others)
    more = {
        "error": standard_error(values[0], *counts),
        "members": _images(counts[0], "forget"), "others": _images(counts[1], "holdout"),
    }  # fmt: skip
    if len(models) > 2:
        compared = [models[0], *models[2:]]
        drawn = auc_draws(
            np.stack([m.members for m in compared]), np.stack([m.others for m in compared]), draws=draws, seed=seed
        )
        more["interval"] = percentiles(drawn[0] - np.median(drawn[1:], 0))
    return _gap(AUC, values, **more)


def _check_alike(models: Sequence[Measured]) -> None:
    kinds = {(len(m.members), len(m.others), len(m.relearned), tuple(m.rounded)) for m in models}
    if len(kinds) > 1:
        raise ArgumentError(
            f"the models were measured differently: {sorted(kinds)} forget and holdout images, epochs and schemes; measure all alike"
        )


def _images(count: int | None, of: str) -> str:
    return f"{of} images" if count is None else f"{count} {of} images"
