"""Gaps: every measure of an edited classifier minus the same measure of models retrained without the forget images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan

import numpy as np

from repedit.auditing.report import Gap
from repedit.errors import ArgumentError
from repedit.metrics.membership import Values, auc, auc_draws, percentiles, standard_error

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
