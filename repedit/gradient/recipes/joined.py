"""BLUR: any pair of losses, the retain gradient projected on the complement of the forget gradient.

Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it. The published
claims that BLUR beats its base were not confirmed by others: with gamma 1 forgetting has priority and costs retention.
"""

from __future__ import annotations

from typing import Any

from repedit.gradient import combine, losses
from repedit.gradient.recipe import Optimiser, Term, UnlearnRecipe, made
from repedit.gradient.recipes.steering import steered
from repedit.gradient.schedule import Schedule

_SOURCE = "arXiv:2506.08164"


def blur(
    forget: losses.Loss, retain: losses.Loss, *, gamma: float = 1.0, alpha: float = 1.0, when: str = "always",
    scope: str = "global", role_first: str = "forget", name: str = "blur", **changes: Any,
) -> UnlearnRecipe:  # fmt: skip
    """G = gamma g_f + alpha (g_r - c g_f) for any two losses; see `combine.blur`. It mostly hides: run `rp.audit`."""
    return made(
        name, (Term(forget, "forget"), Term(retain, "retain")), changes,
        combiner=combine.blur(gamma, alpha, when, scope, role_first), formula=f"blur({forget.name}, {retain.name})",
        source=_SOURCE,
    )  # fmt: skip


def blur_npo(*, beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0, **changes: Any) -> UnlearnRecipe:
    """NPO(forget) and NLL(retain) under BLUR, as on TOFU: beta .1, lr 1e-5, decay .01, warm-up 1 epoch. Run `rp.audit`.

    On MUSE: lr 2.5e-5 (News) or 1e-5 (Books), 10 epochs, batch 32, length 2048, constant lr.
    """
    defaults: dict[str, Any] = {"optimiser": Optimiser(weight_decay=0.01), "schedule": Schedule(warmup=0.1)}
    return blur(losses.npo(beta), losses.nll(), gamma=gamma, alpha=alpha, name="blur_npo", **(defaults | changes))


def blur_ga(*, cap: float | None = None, gamma: float = 1.0, alpha: float = 1.0, **changes: Any) -> UnlearnRecipe:
    """-NLL(forget) and NLL(retain) under BLUR. It mostly hides what it forgets: run `rp.audit`."""
    return blur(losses.negative_nll(cap), losses.nll(), gamma=gamma, alpha=alpha, name="blur_ga", **changes)


def blur_rmu(
    *, layer: int | None = None, coefficient: float = 6.5, gamma: float = 1.0, alpha: float = 800.0, **changes: Any
) -> UnlearnRecipe:
    """RMU under BLUR, as on WMDP: lr 5e-5, 150 batches of 4, length 512. It mostly hides what it forgets: run `rp.audit`."""
    return steered("blur_rmu", layer, coefficient, False, combine.blur(gamma, alpha), changes)


def normalised_difference(*, cap: float | None = None, **changes: Any) -> UnlearnRecipe:
    """g_f / |g_f| + g_r / |g_r| of -NLL(forget) and NLL(retain). It mostly hides what it forgets: run `rp.audit`."""
    terms = (Term(losses.negative_nll(cap), "forget"), Term(losses.nll(), "retain"))
    formula = "g_f / |g_f| + g_r / |g_r|"
    return made(
        "normalised_difference", terms, changes, combiner=combine.norm_diff(), formula=formula, source="open-unlearning"
    )


def primal_dual(*, epsilon: float = 0.1, eta: float = 1.0, warmup_epochs: float = 5.0, **changes: Any) -> UnlearnRecipe:
    """Logit margin (forget) + lambda NLL(retain), lambda rising while NLL > epsilon. It mostly hides: run `rp.audit`."""
    terms = (Term(losses.logit_margin(), "forget"), Term(losses.nll(), "retain"))
    combiner = combine.primal_dual(epsilon, eta, warmup_epochs)
    return made(
        "primal_dual",
        terms,
        changes,
        combiner=combiner,
        formula="margin(forget) + lambda NLL(retain)",
        source="open-unlearning",
    )
