"""The table of closed forms, and the choice between what they find."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from repedit.edit import Edit
from repedit.errors import ArgumentError, NotFinite
from repedit.fit import closed_form, discriminant
from repedit.maps import LowRank

FITS: Mapping[str, Callable[..., LowRank]] = {
    "residual_pca": closed_form.residual_pca,
    "cpca": closed_form.cpca,
    "gen_eig": closed_form.gen_eig,
    "oblique": closed_form.oblique,
    "leace": discriminant.leace,
    "lda": discriminant.lda,
    "mean_difference": discriminant.mean_difference,
    "grad_pca": closed_form.grad_pca,
    "random": closed_form.random_basis,
}
"""Every closed form by name; each returns a `LowRank`."""
NEEDS: Mapping[str, str] = {
    "leace": "moments, and cross moments with labels",
    "grad_pca": "forget and retain cross moments with gradients",
    "random": "a width and a seed",
}
"""What a fit is given where it is not (forget, retain) moments."""


def choose(candidates: Mapping[str, Edit], score: Callable[[Edit], Any]) -> tuple[str, Edit]:
    """The candidate with the highest score, by name; the first of equals.

    Score them by what the edited model does on a validation split: energies are a poor judge of what a direction means
    to the network.

    Raises:
        ArgumentError: if there is no candidate. NotFinite: if a score is NaN.
    """
    if not candidates:
        raise ArgumentError("there is no candidate to choose from; give at least one edit")
    scores = {name: float(score(edit)) for name, edit in candidates.items()}
    for name, value in scores.items():
        if math.isnan(value):
            raise NotFinite(f"the score of {name!r} is NaN")
    best = max(scores, key=lambda name: scores[name])
    return best, candidates[best]
