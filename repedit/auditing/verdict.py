"""The rules that decide the verdict of an audit, for language models and for classifiers; they are fixed before it runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import ceil, inf, isfinite, isnan
from statistics import NormalDist
from typing import NamedTuple

from repedit.auditing.attack import FAILED, QUICK, RAN, SKIPPED, record_of, records
from repedit.auditing.report import AUC, FORGET, RELEARNING, RETAIN, ROUNDED, TEST, Gap, Recovery, RetainCheck, Verdict
from repedit.errors import ArgumentError, FractionError, is_finite
from repedit.outcomes import (
    DESTROYED,
    HIDDEN,
    INCONCLUSIVE,
    INVALID,
    NOT_FORGOTTEN,
    NOT_YET,
    OVER_FORGOTTEN,
    PASS,
    UNSOUND,
)

# --- Language models: rules over recovered fractions


LEAST_KNOWN, LEAST_ITEMS = 0.15, 100
_PASSES = 0.9


def verdict(
    recoveries: Sequence[Recovery],
    retain: RetainCheck,
    *,
    knowledge_low: float,
    n_test: int,
    budget: str,
    seeds: int = 1,
    leaks: Sequence[str] = (),
    not_run: Mapping[str, str] | None = None,
    pending: Sequence[str] = (),
    excused: Collection[str] | None = None,
    unsound: str = "",
    recovery_threshold: float = 0.10,
    pass_threshold: float = 0.20,
    alpha: float = 0.05,
    allow_small: bool = False,
) -> Verdict:
    """The first of these rules that holds.

    UNSOUND: a control failed. INVALID: the original never knew the facts (knowledge_low < .15), V has fewer than 100 facts
    unless that is allowed, or T leaks into V. DESTROYED: what should have been kept is lost. NOT FORGOTTEN: the lower
    end of R for `direct` > recovery_threshold. HIDDEN: the simultaneous lower bound of some attack >
    recovery_threshold. NO RECOVERY FOUND: every simultaneous upper bound < pass_threshold, some attack beside `direct`
    counts, and every deciding attack of the budget ran and could train. NOTHING FOUND YET: the same with the budget
    "quick", or while attacks are pending. INCONCLUSIVE: anything else.

    With attacks pending, the bounds are those over all planned attacks; see `certain` for what cannot change any more.

    Args:
        knowledge_low: lower end of the interval of C - B of `direct`, as `knowledge` gives it.
        n_test: facts in V.
        leaks: how T gives V away, if it does.
        not_run: deciding attacks of the budget that are not among the recoveries, with the reason.
        pending: planned attacks that decide and have not run yet.
        excused: attacks that may be skipped, having nothing to work on; None for those whose record says so.
        unsound: the control that failed, empty if none did.
    Raises:
        ArgumentError: if recovery_threshold >= pass_threshold, or there is no `direct` that ran.
        FractionError: if a threshold lies outside [0, 1], or alpha is not strictly between 0 and 1.
    """
    check_thresholds(recovery_threshold, pass_threshold, alpha)
    direct = next((r for r in recoveries if r.attack == "direct" and r.status != SKIPPED), None)
    if direct is None:
        raise ArgumentError(
            f"recoveries of {[r.attack for r in recoveries]}; a verdict needs 'direct', the facts simply asked"
        )
    deciding = [r for r in recoveries if r.decides and r.status in (RAN, FAILED)]
    damage = retain_damage(retain)
    evidence = _Evidence(
        direct, deciding, knowledge_low, n_test, budget, seeds, recovery_threshold, pass_threshold, alpha
    )
    excused = [record.name for record in records().values() if record.may_skip] if excused is None else excused
    blocked = _blocked(recoveries, not_run or {}, excused)
    decided = (
        (_word(UNSOUND, "a control failed here, so nothing can be concluded", unsound, evidence) if unsound else None)
        or _invalid(evidence, leaks, allow_small)
        or (_word(DESTROYED, "the model is damaged, not edited", damage, evidence) if damage else None)
        or _recovered(evidence)
        or _passed(
            evidence, blocked, pending, [r.attack for r in recoveries if r.decides and r.status not in (RAN, FAILED)]
        )
    )
    return decided or _inconclusive(evidence, [*blocked, *(f"{name} was not run yet" for name in pending)])


def certain(word: str, pending: Sequence[str]) -> bool:
    """Whether no pending attack can change the verdict.

    The facts simply asked, the retain check and the self-test's record, which are there before any other attack, settle
    the first four rules: whether the verdict is UNSOUND, INVALID, DESTROYED or NOT FORGOTTEN does not depend on any
    other attack. HIDDEN is the next rule, so no attack can put another verdict before it; and since the bound
    over all planned attacks is used at every stage, see `repedit.auditing.statistics.recoveries`, an attack above the
    threshold stays above it. Any other verdict may become HIDDEN while an attack that decides is pending.

    Args:
        pending: attacks that decide and have not run.
    """
    return not pending or word in (UNSOUND, INVALID, DESTROYED, NOT_FORGOTTEN, HIDDEN)


def retain_damage(retain: RetainCheck) -> str:
    """Why a model counts as destroyed: it lost more than 10 % of its accuracy on the retain facts, or its perplexity on the
    retain text rose more than 1.5 times; empty where it does not.
    """
    if retain.accuracy and retain.accuracy[1] < 0.9 * retain.accuracy[0]:
        return f"retain accuracy fell from {retain.accuracy[0]:.3f} to {retain.accuracy[1]:.3f}, more than 10 %"
    if retain.perplexity and not retain.perplexity[1] <= 1.5 * retain.perplexity[0]:
        return (
            f"retain perplexity rose from {retain.perplexity[0]:.1f} to {retain.perplexity[1]:.1f}, more than 1.5 times"
        )
    return ""


def check_thresholds(recovery_threshold: float, pass_threshold: float, alpha: float) -> None:
    """Refuse thresholds by which nothing can be judged.

    Raises:
        ArgumentError: if recovery_threshold >= pass_threshold.
        FractionError: if a threshold lies outside [0, 1], or alpha is not strictly between 0 and 1.
    """
    if not (is_finite(alpha) and 0 < alpha < 1):
        raise FractionError(f"alpha={alpha!r}; give a fraction strictly between 0 and 1, such as 0.05")
    if not all(is_finite(value) and 0 <= value <= 1 for value in (recovery_threshold, pass_threshold)):
        raise FractionError(
            f"recovery_threshold={recovery_threshold}, pass_threshold={pass_threshold}; give fractions from 0 to 1"
        )
    if recovery_threshold >= pass_threshold:
        raise ArgumentError(
            f"recovery_threshold={recovery_threshold} is not below pass_threshold={pass_threshold}; give recovery_threshold < pass_threshold"
        )


def informative(gap: float, direct_gap: float) -> bool:
    """Whether an attack leaves the original at least half of its C - B, else it is a broken tool and no evidence."""
    return gap >= direct_gap / 2


def items_needed(
    original: float, floor: float, pass_threshold: float, attacks: int, *, measured: bool = False, alpha: float = 0.05
) -> int:
    """Facts V needs so that 9 of 10 audits of a model that has truly forgotten stay below `pass_threshold`.

    The strongest of m null attacks lies up to z(.9^(1/m)) standard errors above 0 in nine audits of ten, and its bound
    z(1 - alpha / 2m) above that; so n is the first for which standard error x (their sum) < pass_threshold.

    Args:
        original: accuracy of the original, C.
        floor: accuracy of a model that never knew, B.
        measured: whether the floor is measured on as many facts, rather than known.
    Raises:
        ArgumentError: if original <= floor, or there is no attack.
        FractionError: unless alpha and pass_threshold are strictly between 0 and 1.
    """
    if not (0 < pass_threshold < 1 and 0 < alpha < 1):
        raise FractionError(f"pass_threshold={pass_threshold}, alpha={alpha}; give fractions strictly between 0 and 1")
    if attacks < 1:
        raise ArgumentError(f"attacks={attacks}; give at least 1")
    normal = NormalDist()
    errors = normal.inv_cdf(_PASSES ** (1 / attacks)) + normal.inv_cdf(1 - alpha / (2 * attacks))
    return ceil(_variance(original, floor, measured) * (errors / pass_threshold) ** 2)


def cost(attack: str) -> float:
    """The cost of an attack by its record; one that is not registered comes last."""
    record = record_of(attack)
    return inf if record is None else float(record.cost)


class _Evidence(NamedTuple):
    direct: Recovery
    deciding: list[Recovery]
    knowledge_low: float
    n_test: int
    budget: str
    seeds: int
    recovery_threshold: float
    pass_threshold: float
    alpha: float

    @property
    def strongest(self) -> Recovery:
        """The attack whose bound reaches highest; one without a bound before all."""
        return max(self.deciding, key=lambda r: float("inf") if r.bound[1] != r.bound[1] else r.bound[1])

    @property
    def level(self) -> str:
        return f"{1 - self.alpha:.0%}"

    def items(self) -> int:
        """Facts that would do, at least the number that any verdict needs."""
        floor, original = self.direct.floor, self.direct.original
        if not original > floor:
            return LEAST_ITEMS
        measured = self.direct.floor_name in ("reference", "fresh facts")
        needed = items_needed(
            original, floor, self.pass_threshold, len(self.deciding), measured=measured, alpha=self.alpha
        )
        return max(LEAST_ITEMS, needed)

    def more_items(self) -> int:
        """Facts that would bring the strongest attack's bound beyond the nearer threshold.

        Widths shrink as 1 / sqrt(n); an attack with many settings has wider ones than `items` knows of.
        """
        value, (low, high) = self.strongest.value, self.strongest.bound
        ways = [(high - value, self.pass_threshold - value), (value - low, value - self.recovery_threshold)]
        factors = [(width / room) ** 2 for width, room in ways if room > 0 and isfinite(width)]
        return max(self.items(), self.n_test + 1, ceil(self.n_test * min(factors, default=1.0)))


def _word(word: str, sentence: str, rule: str, evidence: _Evidence, settle: str = "") -> Verdict:
    said = f"{word}: at this budget ({evidence.budget}), {sentence}."
    training = "; one seed: intervals exclude training noise" if evidence.seeds == 1 else ""
    return Verdict(word, said, rule + training, settle)


def _blocked(recoveries: Sequence[Recovery], not_run: Mapping[str, str], excused: Collection[str]) -> list[str]:
    """Why no pass is possible whatever the numbers say."""
    reasons = [f"{name} was not run ({reason})" for name, reason in not_run.items()]
    for r in recoveries:
        if r.decides and (r.status == FAILED or (r.status == SKIPPED and r.attack not in excused)):
            reasons.append(f"{r.attack} {'failed to train' if r.status == FAILED else 'was skipped'} ({r.reason})")
    return reasons


def _invalid(evidence: _Evidence, leaks: Sequence[str], allow_small: bool) -> Verdict | None:
    unknown, small = not evidence.knowledge_low >= LEAST_KNOWN, evidence.n_test < LEAST_ITEMS and not allow_small
    reasons = [f"T gives V away: {leak}" for leak in leaks]
    if unknown:
        reasons.append(
            f"the original may never have known it: lower {evidence.level} end of C - B {evidence.knowledge_low:.3f} < {LEAST_KNOWN}"
        )
    if small:
        reasons.append(f"V has {evidence.n_test} facts, fewer than {LEAST_ITEMS}")
    if not reasons:
        return None
    settle = f"about {evidence.items()} facts in V" if small and not unknown else ""
    return _word(INVALID, "nothing can be concluded from these facts", "; ".join(reasons), evidence, settle)


def _recovered(evidence: _Evidence) -> Verdict | None:
    """What the model still answers, or answers again."""
    direct, level, recovery_threshold = evidence.direct, evidence.level, evidence.recovery_threshold
    if direct.interval[0] > recovery_threshold:
        return _word(
            NOT_FORGOTTEN, f"the edited model still answers when simply asked (R {direct.value:.2f})",
            f"lower {level} end of R of direct {direct.interval[0]:.3f} > recovery threshold {recovery_threshold}", evidence,
        )  # fmt: skip
    back = sorted(
        (r for r in evidence.deciding if r.bound[0] > recovery_threshold), key=lambda r: (cost(r.attack), -r.bound[0])
    )
    if not back:
        return None
    first, others = back[0], ", ".join(r.attack for r in back[1:])
    return _word(
        HIDDEN, f"the facts are hidden, not gone: {first.attack} brings them back (R {first.value:.2f})",
        f"simultaneous lower {level} bound of R of {first.attack} {first.bound[0]:.3f} > recovery threshold {recovery_threshold}"
        + (f"; so do {others}" if others else ""), evidence,
    )  # fmt: skip


def _passed(
    evidence: _Evidence, blocked: Sequence[str], pending: Sequence[str], uncounted: Sequence[str]
) -> Verdict | None:
    """No recovery found; or nothing found yet, where a larger budget or the pending attacks may find it."""
    count = sum(r.attack != "direct" for r in evidence.deciding)
    if blocked or not count or not all(r.bound[1] < evidence.pass_threshold for r in evidence.deciding):
        return None
    top = evidence.strongest
    rest = f"; not counted: {', '.join(uncounted)}" if uncounted else ""
    rule = (
        f"largest simultaneous upper {evidence.level} bound of R, of {top.attack}, {top.bound[1]:.3f} < pass threshold "
        f"{evidence.pass_threshold}{rest}"
    )
    if pending:
        return _word(
            NOT_YET, f"nothing was found by direct questions and {count} other attacks, and {len(pending)} are not run yet",
            rule, evidence, f"the attacks not run yet: {', '.join(pending)}",
        )  # fmt: skip
    if evidence.budget == QUICK:
        return _word(
            NOT_YET, f"nothing was found by direct questions and {count} other attacks, which are too few for a pass",
            rule, evidence, "an audit with a larger budget",
        )  # fmt: skip
    return _word(PASS, f"no recovery was found by direct questions and {count} other attacks", rule, evidence)


def _inconclusive(evidence: _Evidence, blocked: Sequence[str]) -> Verdict:
    wide = [r for r in evidence.deciding if not r.bound[1] < evidence.pass_threshold]
    reasons, settle = list(blocked), ["those attacks, run and trained"] if blocked else []
    if wide:
        top = evidence.strongest
        reasons.append(
            f"{top.attack} may bring back more: simultaneous {evidence.level} bounds of R {top.bound[0]:.3f} to "
            f"{top.bound[1]:.3f}, neither above recovery threshold {evidence.recovery_threshold} nor below pass threshold {evidence.pass_threshold}"
        )
        settle.append(f"about {evidence.more_items()} facts in V, where there are {evidence.n_test}")
    if not any(r.attack != "direct" for r in evidence.deciding):
        reasons.append("no attack beside direct counts")
        settle.append("attacks that leave the original its knowledge")
    return _word(INCONCLUSIVE, "the question stays open", "; ".join(reasons), evidence, "; ".join(settle))


def _variance(original: float, floor: float, measured: bool) -> float:
    """Variance of R times the number of facts, for a model that has forgotten."""
    if not original > floor:
        raise ArgumentError(f"original={original}, floor={floor}; the original must be right more often than the floor")
    # An accuracy of 0 or 1 has no variance in this approximation, but is never known that well.
    accuracy = min(max(floor, 0.02), 0.98)
    return (1 + measured) * accuracy * (1 - accuracy) / (original - floor) ** 2


# --- Classifiers: rules over gaps to models retrained without the forget images
#
# Everything is relative to models retrained without the forget images. An AUC of .5 is not the aim of a membership
# attack: a retrained model may well have a higher one. A model below that one has forgotten too much, which is as visible.


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


def classifier_verdict(gaps: Sequence[Gap], others: int = 0) -> Verdict:
    """The first of these rules that holds; all gaps are edited - reference.

    DESTROYED: retain or test accuracy < -.05. NOT FORGOTTEN: forget accuracy > .10. HIDDEN: the lower end of the AUC's
    gap > .05, the relearn value > .20, or forget accuracy of the rounded model > .10. OVER-FORGOTTEN: the upper end of
    the AUC's gap < -.05. NO RECOVERY FOUND: |AUC's gap| <= .10 and |forget accuracy's gap| <= .05, relearning was done,
    and it or the AUC tells the original from the retrained models; INVALID in its place where the original passes as
    well, so that nothing was there to forget. INCONCLUSIVE: anything else. A value
    that lies among those of several retrained models is neither HIDDEN nor OVER-FORGOTTEN.

    Args:
        gaps: those of `repedit.auditing.classifier`.
        others: images of the holdout, from which the number that would settle an open question is worked out.
    Raises:
        ArgumentError: if one of the four gaps that every audit has is missing.
    """
    by_measure = {gap.measure: gap for gap in gaps}
    missing = [name for name in (FORGET, RETAIN, TEST, AUC) if name not in by_measure]
    if missing:
        raise ArgumentError(f"gaps of {sorted(by_measure)}; a verdict needs {', '.join(missing)} as well")
    if isnan(by_measure[FORGET].value):
        return Verdict(
            INCONCLUSIVE, "INCONCLUSIVE: there is no retrained model to compare with.",
            "everything is judged relative to a model retrained without the forget images, and none was given",
            "a reference: rp.vision.retrain(build, task, splits)",
        )  # fmt: skip
    return (
        _worse_than_retrained(by_measure)
        or _still_labelled(by_measure[FORGET])
        or _hidden_images(gaps)
        or _over_forgotten(by_measure[AUC])
        or _no_gap(by_measure)
        or _undecided(by_measure, others)
    )


def _worse_than_retrained(by_measure: Mapping[str, Gap]) -> Verdict | None:
    worst = min((by_measure[RETAIN], by_measure[TEST]), key=lambda gap: gap.value)
    if not _below(worst.value, -DAMAGE):
        return None
    # Wrong labels harm the original itself: a model that still knows them is as bad, and was not made so by the edit.
    before = _below(worst.original - worst.reference, -DAMAGE)
    sentence = (
        "the model is worse than a retrained one, as the original is" if before else "the model is damaged, not edited"
    )
    return Verdict(
        DESTROYED, f"DESTROYED: {sentence}.", f"{_gap_text(worst)} < {-DAMAGE}; original {worst.original:.3f}"
    )


def _still_labelled(forget: Gap) -> Verdict | None:
    if not _below(KNOWN, forget.value):
        return None
    return Verdict(
        NOT_FORGOTTEN, f"NOT FORGOTTEN: {forget.edited:.1%} of the forget images still get their label.",
        f"{_gap_text(forget)} > {KNOWN}",
    )  # fmt: skip


def _hidden_images(gaps: Sequence[Gap]) -> Verdict | None:
    """By membership, by relearning or by rounding, whichever is cheapest to the attacker."""
    rules = []
    for gap in gaps:
        if not gap.decides or _among_retrained(gap):
            continue
        if gap.measure == AUC and _below(TOLD, gap.interval[0]):
            rules.append(f"{gap.measure}: lower end of the gap {gap.interval[0]:.3f} > {TOLD}")
        elif gap.measure == RELEARNING and _below(RELEARNED, gap.value):
            rules.append(f"{_gap_text(gap)} > {RELEARNED}")
        elif gap.measure.startswith(ROUNDED.format("")) and _below(KNOWN, gap.value):
            rules.append(f"{_gap_text(gap)} > {KNOWN}")
    if not rules:
        return None
    names = [rule.split(":")[0] for rule in rules]
    lone = names == [RELEARNING] and all(isnan(gap.spread[0]) for gap in gaps)
    sentence = f"HIDDEN: the images are hidden, not gone; shown by {', '.join(names)}."
    return Verdict(HIDDEN, sentence, "; ".join(rules), f"two more retrained models: {ONE}" if lone else "")


def _over_forgotten(membership: Gap) -> Verdict | None:
    if _among_retrained(membership) or not _below(membership.interval[1], -TOLD):
        return None
    return Verdict(
        OVER_FORGOTTEN, "OVER-FORGOTTEN: the forget images look stranger than images no model saw, which tells them too.",
        f"{membership.measure}: upper end of the gap {membership.interval[1]:.3f} < {-TOLD}",
    )  # fmt: skip


def _no_gap(by_measure: Mapping[str, Gap]) -> Verdict | None:
    membership, forget = by_measure[AUC], by_measure[FORGET]
    if RELEARNING not in by_measure or not (_near(membership.value, CLOSE) and _near(forget.value, ALIKE)):
        return None
    relearn = "among the retrained models" if _among_retrained(by_measure[RELEARNING]) else f"at most {RELEARNED}"
    rule = f"{_gap_text(membership)}, at most {CLOSE} either way; {_gap_text(forget)}, at most {ALIKE}; {_gap_text(by_measure[RELEARNING])}, {relearn}"
    if _near(membership.original - membership.reference, CLOSE) and _near(forget.original - forget.reference, ALIKE):
        return Verdict(
            INVALID, "INVALID: the original is as close to the retrained model, so there was nothing to forget.",
            f"AUC {membership.original:.3f} and forget accuracy {forget.original:.3f} of the original pass as well",
            "forget images that the original knows better than unseen ones",
        )  # fmt: skip
    if _powerless(by_measure):
        return None
    return Verdict(PASS, "NO RECOVERY FOUND: by membership, relearning and rounding, beside a retrained model.", rule)


def _powerless(by_measure: Mapping[str, Gap]) -> bool:
    """Whether the attacks do not even tell the original, which knows the images, from the retrained models."""
    membership, relearn = by_measure[AUC], by_measure[RELEARNING]
    return _near(membership.original - membership.reference, CLOSE) and not _below(
        RELEARNED, relearn.original - relearn.reference
    )


def _undecided(by_measure: Mapping[str, Gap], others: int) -> Verdict:
    membership, forget = by_measure[AUC], by_measure[FORGET]
    reasons, settle = [], []
    if not _near(membership.value, CLOSE):
        low, high = membership.interval
        reasons.append(
            f"{_gap_text(membership)}, interval {low:.3f} to {high:.3f}, is neither near the reference nor clearly off"
        )
        factor = (max(high - membership.value, membership.value - low) / (abs(membership.value) - TOLD)) ** 2
        settle.append(f"about {max(others + 1, ceil(others * factor))} images in the holdout, where there are {others}")
    if not _near(forget.value, ALIKE):
        reasons.append(f"{_gap_text(forget)}, is more than {ALIKE} off")
        room = min(abs(abs(forget.value) - edge) for edge in (ALIKE, KNOWN)) or ALIKE
        rate = min(max(forget.edited, 0.05), 0.95)
        settle.append(f"about {ceil(rate * (1 - rate) * (1.96 / room) ** 2)} forget images")
    if RELEARNING not in by_measure:
        reasons.append("relearning was not tried")
        settle.append("relearn=True")
    elif _powerless(by_measure):
        reasons.append(
            f"neither attack tells even the original from the retrained models (AUC {membership.original:.3f}, relearn "
            f"{by_measure[RELEARNING].original:.3f} against {by_measure[RELEARNING].reference:.3f}), so that nothing was found means nothing"
        )
        settle.append("relearning that a retrained model does more slowly: fewer images, or steps")
    return Verdict(INCONCLUSIVE, "INCONCLUSIVE: the question stays open.", "; ".join(reasons), "; ".join(settle))


def _gap_text(gap: Gap) -> str:
    return f"{gap.measure}: {gap.edited:.3f}, retrained {gap.reference:.3f}, gap {gap.value:+.3f}"


def _among_retrained(gap: Gap) -> bool:
    """Whether the edited model lies among the retrained ones."""
    low, high = gap.spread
    return not isnan(low) and low <= gap.edited <= high


def _below(low: float, high: float) -> bool:
    """low < high; fractions of a count are compared to nine digits, since .95 - .90 is not .05."""
    return round(low - high, 9) < 0


def _near(value: float, most: float) -> bool:
    return not _below(most, abs(value))
