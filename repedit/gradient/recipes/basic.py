"""The field's baselines: a loss on the forget set, with or without one on the retain set.

Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it. Defaults are the
budget of SemEval-2025 Task 4: lr 1e-5, 10 epochs, batch 32. Every function takes the fields of a recipe as changes.
"""

from __future__ import annotations

from typing import Any

from repedit.gradient import losses
from repedit.gradient.combine import weighted_sum
from repedit.gradient.recipe import Term, UnlearnRecipe, made


def ga(*, cap: float | None = None, **changes: Any) -> UnlearnRecipe:
    """Gradient ascent: -NLL(forget). It has no minimum and ruins a model that trains on; it mostly hides: `rp.audit`."""
    terms = (Term(losses.negative_nll(cap), "forget"),)
    return made("ga", terms, changes, formula="-NLL(forget)", source="Yao et al. 2023, arXiv:2310.10683")


def grad_diff(*, gamma: float = 1.0, alpha: float = 1.0, cap: float | None = None, **changes: Any) -> UnlearnRecipe:
    """Gradient difference: -gamma NLL(forget) + alpha NLL(retain). It mostly hides what it forgets: run `rp.audit`."""
    terms = (Term(losses.negative_nll(cap), "forget"), Term(losses.nll(), "retain"))
    return made(
        "grad_diff", terms, changes, combiner=weighted_sum(gamma, alpha), formula="-NLL(forget) + NLL(retain)",
        source="Liu et al. 2022, arXiv:2203.12817",
    )  # fmt: skip


def ga_kl(*, gamma: float = 1.0, alpha: float = 1.0, cap: float | None = None, **changes: Any) -> UnlearnRecipe:
    """-gamma NLL(forget) + alpha KL(start || model)(retain). It mostly hides what it forgets: run `rp.audit`."""
    terms = (Term(losses.negative_nll(cap), "forget"), Term(losses.kl(), "retain"))
    return made(
        "ga_kl", terms, changes, combiner=weighted_sum(gamma, alpha), formula="-NLL(forget) + KL(retain)",
        source="Maini et al. 2024, arXiv:2401.06121",
    )  # fmt: skip


def npo(*, beta: float = 0.1, **changes: Any) -> UnlearnRecipe:
    """Negative preference optimisation alone: NPO(forget). It mostly hides what it forgets: run `rp.audit`."""
    return _preference("npo", losses.npo(beta), None, changes, "NPO(forget)")


def npo_gdr(*, beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0, **changes: Any) -> UnlearnRecipe:
    """gamma NPO(forget) + alpha NLL(retain). It mostly hides what it forgets: run `rp.audit`."""
    options = {"combiner": weighted_sum(gamma, alpha)} | changes
    return _preference("npo_gdr", losses.npo(beta), losses.nll(), options, "NPO(forget) + NLL(retain)")


def npo_klr(*, beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0, **changes: Any) -> UnlearnRecipe:
    """gamma NPO(forget) + alpha KL(start || model)(retain). It mostly hides what it forgets: run `rp.audit`."""
    options = {"combiner": weighted_sum(gamma, alpha)} | changes
    return _preference("npo_klr", losses.npo(beta), losses.kl(), options, "NPO(forget) + KL(retain)")


def dpo(*, beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0, **changes: Any) -> UnlearnRecipe:
    """gamma DPO(forget, alternative answers) + alpha NLL(retain); rows carry `alternative`. It mostly hides: `rp.audit`."""
    options = {"combiner": weighted_sum(gamma, alpha)} | changes
    return _preference("dpo", losses.dpo(beta), losses.nll(), options, "DPO(alternative over forget) + NLL(retain)")


def sim_npo(
    *, beta: float = 4.5, delta: float = 0.0, gamma: float = 0.125, alpha: float = 1.0, **changes: Any
) -> UnlearnRecipe:
    """gamma SimNPO(forget) + alpha NLL(retain), without a reference. It mostly hides what it forgets: run `rp.audit`."""
    terms = (Term(losses.sim_npo(beta, delta), "forget"), Term(losses.nll(), "retain"))
    return made(
        "sim_npo", terms, changes, combiner=weighted_sum(gamma, alpha), formula="gamma SimNPO(forget) + alpha NLL(retain)",
        source="Fan et al. 2024, arXiv:2410.07163",
    )  # fmt: skip


def wga(*, beta: float = 1.0, gamma: float = 1.0, alpha: float = 1.0, **changes: Any) -> UnlearnRecipe:
    """gamma WGA(forget) + alpha NLL(retain); alpha 0 drops the second. It mostly hides what it forgets: run `rp.audit`."""
    return _weighted("wga", losses.wga(beta), gamma, alpha, changes, "WGA(forget) + NLL(retain)", epochs=5.0)


def satimp(
    *, beta1: float = 5.0, beta2: float = 1.0, gamma: float = 0.1, alpha: float = 1.0, **changes: Any
) -> UnlearnRecipe:
    """gamma SatImp(forget) + alpha NLL(retain); alpha 0 drops the second. It mostly hides: run `rp.audit`."""
    return _weighted("satimp", losses.satimp(beta1, beta2), gamma, alpha, changes, "SatImp(forget) + NLL(retain)")


def undial(*, beta: float = 10.0, gamma: float = 1.0, alpha: float = 0.0, **changes: Any) -> UnlearnRecipe:
    """gamma UNDIAL(forget) + alpha NLL(retain); alpha 0, the default, drops the second. It mostly hides: `rp.audit`."""
    return _weighted("undial", losses.undial(beta), gamma, alpha, changes, "UNDIAL(forget)", lr=1e-4)


def _preference(name: str, loss: losses.Loss, kept: losses.Loss | None, changes: Any, formula: str) -> UnlearnRecipe:
    terms = (Term(loss, "forget"), *(() if kept is None else (Term(kept, "retain"),)))
    return made(name, terms, changes, formula=formula, source="Zhang et al. 2024, arXiv:2404.05868")


def _weighted(
    name: str, loss: losses.Loss, gamma: float, alpha: float, changes: Any, formula: str, **defaults: Any
) -> UnlearnRecipe:
    terms = (Term(loss, "forget"), *((Term(losses.nll(), "retain"),) if alpha else ()))
    combiner = weighted_sum(gamma, alpha or 1.0)
    return made(name, terms, changes, combiner=combiner, formula=formula, source="open-unlearning", **defaults)
