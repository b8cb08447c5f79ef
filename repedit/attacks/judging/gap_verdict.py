"""From gaps to a verdict on a classifier.

Everything is relative to models retrained without the forget images. A membership attack that scores .5 is not the aim:
a retrained model may well be told apart, and a model below it has forgotten too much, which shows as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, isnan

from repedit.attacks.judging.evidence import (
    DESTROYED,
    HIDDEN,
    INCONCLUSIVE,
    INVALID,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
    PASS,
    Gap,
    Verdict,
)
from repedit.attacks.judging.gaps import AUC, FORGET, RELEARN, RETAIN, ROUNDED, TEST
from repedit.errors import ArgumentError

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
        elif gap.measure == RELEARN and _below(RELEARNED, gap.value):
            rules.append(f"{_words(gap)} > {RELEARNED}")
        elif gap.measure.startswith(ROUNDED.format("")) and _below(KNOWN, gap.value):
            rules.append(f"{_words(gap)} > {KNOWN}")
    if not rules:
        return None
    names = [rule.split(":")[0] for rule in rules]
    lone = names == [RELEARN] and all(isnan(gap.spread[0]) for gap in found)
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
    if RELEARN not in known or not (_near(told.value, CLOSE) and _near(forget.value, ALIKE)):
        return None
    relearn = "among the retrained models" if _within(known[RELEARN]) else f"at most {RELEARNED}"
    rule = f"{_words(told)}, at most {CLOSE} either way; {_words(forget)}, at most {ALIKE}; {_words(known[RELEARN])}, {relearn}"
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
    told, relearn = known[AUC], known[RELEARN]
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
    if RELEARN not in known:
        reasons.append("relearning was not tried")
        settle.append("relearn=True")
    elif _powerless(known):
        reasons.append(
            f"neither attack tells even the original from the retrained models (AUC {told.original:.3f}, relearn "
            f"{known[RELEARN].original:.3f} against {known[RELEARN].reference:.3f}), so that nothing was found means nothing"
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
