"""rp.audit_classifier: attack an unlearned image classifier, and compare all of it with models that never saw the forget images."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from math import ceil, isnan, nan
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from repedit.auditing.attack import Finding
from repedit.auditing.attacks.images import RELEARN as RELEARN
from repedit.auditing.attacks.images import SCHEMES, klom, membership, relearned, rounding, shadows, sides
from repedit.auditing.attacks.images import relearn as relearning
from repedit.auditing.report import (
    DESTROYED,
    HIDDEN,
    INCONCLUSIVE,
    INVALID,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
    PASS,
    Gap,
    Report,
    RetainCheck,
    Verdict,
)
from repedit.errors import ArgumentError, BadReference, during
from repedit.hashing import module_fingerprint
from repedit.metrics.membership import Values, auc, auc_draws, percentiles, standard_error
from repedit.vision.data import ImageSplits, Task
from repedit.vision.training import trained_on

# --- From what was measured on classifiers to gaps: edited less retrained, measure by measure


FORGET, RETAIN, TEST, AUC, RELEARNING = (
    "forget accuracy",
    "retain accuracy",
    "test accuracy",
    "AUC of the loss",
    "relearn",
)
ROUNDED = "forget accuracy, {}"
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
    found = [
        _gap(FORGET, [m.forget for m in models], members=_images(len(edited.members), "forget")),
        _gap(RETAIN, [m.retain for m in models], members=_images(sizes.get("retain"), "retain")),
        _gap(TEST, [m.test for m in models], members=_images(sizes.get("test"), "test")),
        _told(models, draws, seed),
    ]
    if len(edited.relearned):
        values = [float(m.relearned.mean()) for m in models]
        found.append(_gap(RELEARNING, values, members=_images(sizes.get("V"), "other forget")))
    return (*found, *(_rounded(scheme, models) for scheme in edited.rounded))


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


def _told(models: Sequence[Measured], draws: int, seed: int) -> Gap:
    values = [auc(m.members, m.others) for m in models]
    counts = len(models[0].members), len(models[0].others)
    more = {
        "error": standard_error(values[0], *counts),
        "members": _images(counts[0], "forget"), "others": _images(counts[1], "holdout"),
    }  # fmt: skip
    if len(models) > 2:
        kept = [models[0], *models[2:]]
        drawn = auc_draws(
            np.stack([m.members for m in kept]), np.stack([m.others for m in kept]), draws=draws, seed=seed
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


# --- From gaps to a verdict on a classifier
#
# Everything is relative to models retrained without the forget images. A membership attack that scores .5 is not the aim:
# a retrained model may well be told apart, and a model below it has forgotten too much, which shows as much.


DAMAGE, KNOWN, TOLD, RELEARNED, CLOSE, ALIKE = 0.05, 0.10, 0.05, 0.20, 0.10, 0.05
"""Accuracy lost; forget accuracy too high; bound of the AUC; relearn value; AUC and forget accuracy of a pass."""
MARGINS = {
    "retain or test accuracy lost": DAMAGE, "forget accuracy": KNOWN, "AUC, bound": TOLD, "relearn value": RELEARNED,
    "AUC of a pass": CLOSE, "forget accuracy of a pass": ALIKE,
}  # fmt: skip
"""The same by name, for a report."""
# Digits, four classes, five retrainings each: 10 and 12 of 80 ordered pairs lie more than .20 apart, in two draws of T.
# With two and their mean one in ten does; with three and their median 0 and 1 of 40, and every relabelled and condensed
# model still does.
ONE = "with one, the relearn values of two retrainings lie more than 0.20 apart in one case of eight"
"""Why a relearn value wants several retrained models; measured on digits, one class forgotten."""


def verdict(found: Sequence[Gap], others: int = 0) -> Verdict:
    """The first of these rules that holds; all gaps are edited - reference.

    DESTROYED: retain or test accuracy < -.05. NOT FORGOTTEN: forget accuracy > .10. HIDDEN: the lower end of the AUC's
    gap > .05, the relearn value > .20, or forget accuracy of the rounded model > .10. OVER-FORGOTTEN: the upper end of
    the AUC's gap < -.05. NO RECOVERY FOUND: |AUC's gap| <= .10 and |forget accuracy's gap| <= .05, relearning was done,
    and it or the AUC tells the original from the retrained models; INVALID in its place where the original passes as
    well, so that nothing was there to forget. INCONCLUSIVE: anything else. A value that lies among those of several retrained models is neither HIDDEN nor OVER-FORGOTTEN.

    Args:
        found: what `gaps` gives.
        others: images of the holdout, from which the number that would settle an open question is worked out.
    Raises:
        ArgumentError: if one of the four gaps that every audit has is missing.
    """
    known = {gap.measure: gap for gap in found}
    missing = [name for name in (FORGET, RETAIN, TEST, AUC) if name not in known]
    if missing:
        raise ArgumentError(f"gaps of {sorted(known)}; a verdict needs {', '.join(missing)} as well")
    if isnan(known[FORGET].value):
        return Verdict(
            INCONCLUSIVE, "INCONCLUSIVE: there is no retrained model to compare with.",
            "everything is judged relative to a model retrained without the forget images, and none was given",
            "a reference: rp.vision.retrain(build, task, splits)",
        )  # fmt: skip
    return (
        _destroyed(known)
        or _known(known[FORGET])
        or _hidden(found)
        or _over(known[AUC])
        or _passed(known)
        or _open(known, others)
    )


def _destroyed(known: Mapping[str, Gap]) -> Verdict | None:
    worst = min((known[RETAIN], known[TEST]), key=lambda gap: gap.value)
    if not _below(worst.value, -DAMAGE):
        return None
    # Wrong labels harm the original itself: a model that still knows them is as bad, and was not made so by the edit.
    before = _below(worst.original - worst.reference, -DAMAGE)
    sentence = (
        "the model is worse than a retrained one, as the original is" if before else "the model is damaged, not edited"
    )
    return Verdict(DESTROYED, f"DESTROYED: {sentence}.", f"{_words(worst)} < {-DAMAGE}; original {worst.original:.3f}")


def _known(forget: Gap) -> Verdict | None:
    if not _below(KNOWN, forget.value):
        return None
    return Verdict(
        NOT_FORGOTTEN, f"NOT FORGOTTEN: {forget.edited:.1%} of the forget images still get their label.",
        f"{_words(forget)} > {KNOWN}",
    )  # fmt: skip


def _hidden(found: Sequence[Gap]) -> Verdict | None:
    """By membership, by relearning or by rounding, whichever is cheapest to the attacker."""
    rules = []
    for gap in found:
        if not gap.decides or _within(gap):
            continue
        if gap.measure == AUC and _below(TOLD, gap.interval[0]):
            rules.append(f"{gap.measure}: lower end of the gap {gap.interval[0]:.3f} > {TOLD}")
        elif gap.measure == RELEARNING and _below(RELEARNED, gap.value):
            rules.append(f"{_words(gap)} > {RELEARNED}")
        elif gap.measure.startswith(ROUNDED.format("")) and _below(KNOWN, gap.value):
            rules.append(f"{_words(gap)} > {KNOWN}")
    if not rules:
        return None
    names = [rule.split(":")[0] for rule in rules]
    lone = names == [RELEARNING] and all(isnan(gap.spread[0]) for gap in found)
    sentence = f"HIDDEN: the images are hidden, not gone; shown by {', '.join(names)}."
    return Verdict(HIDDEN, sentence, "; ".join(rules), f"two more retrained models: {ONE}" if lone else "")


def _over(told: Gap) -> Verdict | None:
    if _within(told) or not _below(told.interval[1], -TOLD):
        return None
    return Verdict(
        OVER_FORGOTTEN, "OVER-FORGOTTEN: the forget images look stranger than images no model saw, which tells them too.",
        f"{told.measure}: upper end of the gap {told.interval[1]:.3f} < {-TOLD}",
    )  # fmt: skip


def _passed(known: Mapping[str, Gap]) -> Verdict | None:
    told, forget = known[AUC], known[FORGET]
    if RELEARNING not in known or not (_near(told.value, CLOSE) and _near(forget.value, ALIKE)):
        return None
    relearn = "among the retrained models" if _within(known[RELEARNING]) else f"at most {RELEARNED}"
    rule = f"{_words(told)}, at most {CLOSE} either way; {_words(forget)}, at most {ALIKE}; {_words(known[RELEARNING])}, {relearn}"
    if _near(told.original - told.reference, CLOSE) and _near(forget.original - forget.reference, ALIKE):
        return Verdict(
            INVALID, "INVALID: the original is as close to the retrained model, so there was nothing to forget.",
            f"AUC {told.original:.3f} and forget accuracy {forget.original:.3f} of the original pass as well",
            "forget images that the original knows better than unseen ones",
        )  # fmt: skip
    if _powerless(known):
        return None
    return Verdict(PASS, "NO RECOVERY FOUND: by membership, relearning and rounding, beside a retrained model.", rule)


def _powerless(known: Mapping[str, Gap]) -> bool:
    """Whether the attacks do not even tell the original, which knows the images, from the retrained models."""
    told, relearn = known[AUC], known[RELEARNING]
    return _near(told.original - told.reference, CLOSE) and not _below(RELEARNED, relearn.original - relearn.reference)


def _open(known: Mapping[str, Gap], others: int) -> Verdict:
    told, forget = known[AUC], known[FORGET]
    reasons, settle = [], []
    if not _near(told.value, CLOSE):
        low, high = told.interval
        reasons.append(
            f"{_words(told)}, interval {low:.3f} to {high:.3f}, is neither near the reference nor clearly off"
        )
        factor = (max(high - told.value, told.value - low) / (abs(told.value) - TOLD)) ** 2
        settle.append(f"about {max(others + 1, ceil(others * factor))} images in the holdout, where there are {others}")
    if not _near(forget.value, ALIKE):
        reasons.append(f"{_words(forget)}, is more than {ALIKE} off")
        room = min(abs(abs(forget.value) - edge) for edge in (ALIKE, KNOWN)) or ALIKE
        rate = min(max(forget.edited, 0.05), 0.95)
        settle.append(f"about {ceil(rate * (1 - rate) * (1.96 / room) ** 2)} forget images")
    if RELEARNING not in known:
        reasons.append("relearning was not tried")
        settle.append("relearn=True")
    elif _powerless(known):
        reasons.append(
            f"neither attack tells even the original from the retrained models (AUC {told.original:.3f}, relearn "
            f"{known[RELEARNING].original:.3f} against {known[RELEARNING].reference:.3f}), so that nothing was found means nothing"
        )
        settle.append("relearning that a retrained model does more slowly: fewer images, or steps")
    return Verdict(INCONCLUSIVE, "INCONCLUSIVE: the question stays open.", "; ".join(reasons), "; ".join(settle))


def _words(gap: Gap) -> str:
    return f"{gap.measure}: {gap.edited:.3f}, retrained {gap.reference:.3f}, gap {gap.value:+.3f}"


def _within(gap: Gap) -> bool:
    """Whether the edited model lies among the retrained ones."""
    low, high = gap.spread
    return not isnan(low) and low <= gap.edited <= high


def _below(low: float, high: float) -> bool:
    """low < high; fractions of a count are compared to nine digits, since .95 - .90 is not .05."""
    return round(low - high, 9) < 0


def _near(value: float, most: float) -> bool:
    return not _below(most, abs(value))


# --- rp.audit_classifier: attack an unlearned image classifier, and compare all of it with models that never saw the images
#
# A classifier is cheap to train, so there is what a language model never has: a reference that was retrained without the
# forget images. Everything is judged by the gap to it, in both directions.


DRAWS = 1000
EVIDENCE = "statistical evidence, not certified deletion: what these attacks do not find may still be there"
UNTRIED = {
    "shadow models": "trains eight models more; repedit.auditing.classifier.shadows does it",
    "inversion of the classifier": "no attack here rebuilds images from the weights",
}


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
        references: further retrained models, best two or more: the median counts, and what lies among them is no finding.
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
        _check(model, original, task, splits, retrained)

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


def _report(held: Mapping[str, list[_Attacked]], task: Task, splits: ImageSplits, relearn: bool, seed: int) -> Report:
    values = {role: [one.measured for one in ones] for role, ones in held.items()}
    compared = gaps(values["edited"][0], values["original"][0], values["reference"], draws=DRAWS, seed=seed)
    findings = {role: tuple(f for one in ones for f in one.findings) for role, ones in held.items() if ones}
    return Report(
        verdict=verdict(compared, len(splits.holdout)), recoveries=(), retain=RetainCheck(), gaps=compared, findings=findings,
        not_run=UNTRIED if relearn else {RELEARN: "relearn=False", **UNTRIED}, heuristics={},
        context={
            "kind": "classifier", "seeds": [seed], "draws": DRAWS, "notes": _notes(compared, len(values["reference"])),
            "margins": MARGINS, "sets": {name: len(images) for name, images in splits.sets.items()}, "feature": task.module,
            "hashes": {role: [one.fingerprint for one in ones] for role, ones in held.items()},
            "versions": {name: version(name) for name in ("repedit", "torch", "numpy")}, "machine": platform.machine(),
            "seconds": sum(f.seconds for found in findings.values() for f in found),
        },
    )  # fmt: skip


def _check(
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
    found = [membership(model, task, splits, seed=seed)]
    if relearn:
        found.append(relearning(model, task, splits, seed=seed))
    found += [rounding(model, task, splits, scheme, seed=seed) for scheme in SCHEMES]
    return _Attacked(tuple(found), _measured(model, task, splits, found), module_fingerprint(model))


def _measured(model: nn.Module, task: Task, splits: ImageSplits, found: Sequence[Finding]) -> Measured:
    by_name = {finding.attack: finding for finding in found}
    members, others = sides(by_name["membership"])
    learnt = by_name.get(RELEARN)
    more: dict[str, Any] = {} if learnt is None else {"relearned": relearned(learnt)}
    forget, retain, test = (task.accuracy(model, images) for images in (splits.forget, splits.retain, splits.test))
    return Measured(
        forget, retain, test, members, others,
        rounded={s: (float(by_name[s].correct.mean()), float(by_name[s].details["test"])) for s in SCHEMES},
        sizes={"retain": len(splits.retain), "test": len(splits.test), "V": len(learnt.items) if learnt else 0}, **more,
    )  # fmt: skip


def _notes(found: Sequence[Gap], references: int) -> list[str]:
    """What a reader must know of these numbers."""
    known: Mapping[str, Gap] = {gap.measure: gap for gap in found}
    notes = [EVIDENCE]
    if references == 1:
        notes.append(f"one retrained model; {ONE}")
    told = known[AUC]
    if not isnan(told.reference) and abs(told.reference - 0.5) > 2 * told.error:
        notes.append(f"the retrained model itself is told apart (AUC {told.reference:.2f}), so .5 is not the aim here")
    return notes


__all__ = ["audit_classifier", "audit_classifiers", "klom", "membership", "relearning", "rounding", "shadows"]
