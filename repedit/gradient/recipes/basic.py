"""The field's baselines: ascent and preference losses on the forget set, with or without a retain loss.

Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it.
"""

from __future__ import annotations

from typing import Any

from repedit.gradient.losses import negative_nll, nll, npo
from repedit.gradient.recipe import Term, UnlearnRecipe


def ga(**changes: Any) -> UnlearnRecipe:
    """Gradient ascent: -NLL(forget)."""
    return UnlearnRecipe("ga", (Term(negative_nll(), "forget"),), formula="-NLL(forget)", **changes)


def grad_diff(**changes: Any) -> UnlearnRecipe:
    """-NLL(forget) + NLL(retain)."""
    return UnlearnRecipe("grad_diff", (Term(negative_nll(), "forget"), Term(nll(), "retain")), **changes)


def npo_gdr(**changes: Any) -> UnlearnRecipe:
    """NPO(forget) + NLL(retain)."""
    return UnlearnRecipe("npo_gdr", (Term(npo(), "forget"), Term(nll(), "retain")), **changes)
