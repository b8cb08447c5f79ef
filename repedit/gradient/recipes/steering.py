"""RMU: the residual stream of the forget set is steered to a random direction, that of the retain set is held.

Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it.
"""

from __future__ import annotations

from typing import Any

from repedit.gradient import losses
from repedit.gradient.combine import Combiner, weighted_sum
from repedit.gradient.parameters import Parameters
from repedit.gradient.recipe import Term, UnlearnRecipe, made
from repedit.gradient.sampling import round_robin


def rmu(*, layer: int | None = None, coefficient: float = 6.5, alpha: float = 1200.0, **changes: Any) -> UnlearnRecipe:
    """||h - c u||^2 / d (forget) + alpha ||h - h_start||^2 / d (retain), h after `layer`. It mostly hides: run `rp.audit`.

    Trains what writes mlp.out in the three layers that end at `layer`; topics alternate step by step.

    Args:
        layer: None for 0.22 of the depth, which is 7 of 32.
    """
    return steered("rmu", layer, coefficient, False, weighted_sum(1.0, alpha), changes)


def adaptive_rmu(
    *, layer: int | None = None, coefficient: float = 5.0, alpha: float = 900.0, **changes: Any
) -> UnlearnRecipe:
    """RMU with c = coefficient x mean norm of h over the first forget batch of a topic. It mostly hides: run `rp.audit`.

    Published for layers 24-26 of 32 with coefficient 5, for layers 12-14 of 16 with 3.
    """
    return steered("adaptive_rmu", layer, coefficient, True, weighted_sum(1.0, alpha), changes)


def steered(
    name: str, layer: int | None, coefficient: float, adaptive: bool, combiner: Combiner, changes: Any
) -> UnlearnRecipe:
    """RMU under any combiner."""
    terms = (Term(losses.rmu_forget(layer, coefficient, adaptive), "forget"), Term(losses.rmu_retain(layer), "retain"))
    trained = "3 ending at 0.22" if layer is None else f"{max(0, layer - 2)}-{layer}"
    return made(
        name, terms, changes, combiner=combiner, sampler=round_robin(), parameters=Parameters(trained, ("mlp.out",)), lr=5e-5,
        steps=150, batch_size=4, length=512, formula="steer(forget) + alpha hold(retain)",
        source="Li et al. 2024, arXiv:2403.03218",
    )  # fmt: skip
