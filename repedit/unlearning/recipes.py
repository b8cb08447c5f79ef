"""The field's baselines: a loss on the forget set, with or without one on the retain set.

Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it. Defaults are the
budget of SemEval-2025 Task 4: lr 1e-5, 10 epochs, batch 32. Every function takes the fields of a recipe as changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from repedit.errors import ArgumentError, UnknownName, check_finite_numbers, check_names, nearest
from repedit.unlearning import combiners, losses, recipe
from repedit.unlearning.combiners import Combiner, weighted_sum
from repedit.unlearning.parameters import Lora, Parameters
from repedit.unlearning.recipe import CHANGEABLE, Merged, Optimiser, Saliency, Term, UnlearnRecipe, made, settled
from repedit.unlearning.sampling import Phase, alternate, chunked, in_turn, round_robin
from repedit.unlearning.schedule import Record, Schedule

# --- The field's baselines: a loss on the forget set, with or without one on the retain set
#
# Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it. Defaults are the
# budget of SemEval-2025 Task 4: lr 1e-5, 10 epochs, batch 32. Every function takes the fields of a recipe as changes.


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


# --- RMU: the residual stream of the forget set is steered to a random direction, that of the retain set is held
#
# Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it.


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


# --- BLUR: any pair of losses, the retain gradient projected on the complement of the forget gradient
#
# Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it. The published
# claims that BLUR beats its base were not confirmed by others: with gamma 1 forgetting has priority and costs retention.


_SOURCE = "arXiv:2506.08164"


def blur(
    forget: losses.Loss, retain: losses.Loss, *, gamma: float = 1.0, alpha: float = 1.0, when: str = "always",
    scope: str = "global", role_first: str = "forget", name: str = "blur", **changes: Any,
) -> UnlearnRecipe:  # fmt: skip
    """G = gamma g_f + alpha (g_r - c g_f) for any two losses; see `combine.blur`. It mostly hides: run `rp.audit`."""
    return made(
        name, (Term(forget, "forget"), Term(retain, "retain")), changes,
        combiner=combiners.blur(gamma, alpha, when, scope, role_first), formula=f"blur({forget.name}, {retain.name})",
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
    return steered("blur_rmu", layer, coefficient, False, combiners.blur(gamma, alpha), changes)


def normalised_difference(*, cap: float | None = None, **changes: Any) -> UnlearnRecipe:
    """g_f / |g_f| + g_r / |g_r| of -NLL(forget) and NLL(retain). It mostly hides what it forgets: run `rp.audit`."""
    terms = (Term(losses.negative_nll(cap), "forget"), Term(losses.nll(), "retain"))
    formula = "g_f / |g_f| + g_r / |g_r|"
    return made(
        "normalised_difference",
        terms,
        changes,
        combiner=combiners.norm_diff(),
        formula=formula,
        source="open-unlearning",
    )


def primal_dual(*, epsilon: float = 0.1, eta: float = 1.0, warmup_epochs: float = 5.0, **changes: Any) -> UnlearnRecipe:
    """Logit margin (forget) + lambda NLL(retain), lambda rising while NLL > epsilon. It mostly hides: run `rp.audit`."""
    terms = (Term(losses.logit_margin(), "forget"), Term(losses.nll(), "retain"))
    combiner = combiners.primal_dual(epsilon, eta, warmup_epochs)
    return made(
        "primal_dual",
        terms,
        changes,
        combiner=combiner,
        formula="margin(forget) + lambda NLL(retain)",
        source="open-unlearning",
    )


# --- Whole systems as recipes: LLM Surgery, SURE, the SemEval-2025 Task 4 entries, task vectors
#
# Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it.


def surgery(
    *, forget: float = 0.1, outdated: float = 0.1, update: float = 2.0, retain: float = 0.5, **changes: Any
) -> UnlearnRecipe:
    """LLM Surgery: forget, replace and keep at once. It mostly hides what it forgets: run `rp.audit`.

    0.1 (-NLL)(forget) + 0.1 (-NLL)(outdated) + 2 NLL(update) + 0.5 CE(start, model)(retain); outdated are the forget rows
    whose prompt also stands in the update set.
    """
    terms = (
        Term(losses.negative_nll(), "forget", forget),
        Term(losses.negative_nll(), "outdated", outdated),
        Term(losses.nll(), "update", update),
        Term(losses.cross_entropy_to_reference(), "retain", retain),
    )
    return made(
        "surgery", terms, changes, lr=2e-4, steps=120, optimiser=Optimiser(weight_decay=0.01, betas=(0.9, 0.95)),
        formula=".1 -NLL(forget) + .1 -NLL(outdated) + 2 NLL(update) + .5 CE_ref(retain)", source="arXiv:2409.13054",
    )  # fmt: skip


def sure(
    inner: UnlearnRecipe,
    *,
    percentile: float = 90.0,
    unit: str = "row",
    loss: losses.Loss | None = None,
    lr: float | None = None,
) -> UnlearnRecipe:
    """Any recipe on the units whose forget gradient is largest, against recovery by quantisation. Run `rp.audit`.

    Args:
        percentile: 90, 95 and 99 were used.
        lr: larger than that of `inner`; the paper goes to 1e-4.
    """
    options = Saliency(percentile, unit, loss or losses.nll())
    return replace(
        inner,
        name=f"sure({inner.name})",
        saliency=options,
        lr=inner.lr if lr is None else lr,
        source=f"arXiv:2410.16454 over {inner.source}",
    )


CYBER = ("ga", "grad_diff", "ga_kl", "alternating", "selected_layers")


def cyber_for_ai(variant: str = "grad_diff", **changes: Any) -> UnlearnRecipe:
    """Global weight modification as in Cyber for AI at SemEval-2025 Task 4; a reconstruction. Run `rp.audit`.

    The paper's list of variants is not available. These change all weights, but for "selected_layers" (the last 8).
    """
    _known(variant, CYBER)
    if variant == "alternating":
        terms = (Term(losses.negative_nll(), "forget"), Term(losses.nll(), "retain"))
        found = made(
            "grad_diff",
            terms,
            changes,
            sampler=in_turn("forget", "retain"),
            formula="-NLL(forget), NLL(retain) in turn",
        )
    elif variant == "selected_layers":
        found = grad_diff(**({"parameters": Parameters("last 8")} | changes))
    else:
        found = {"ga": ga, "grad_diff": grad_diff, "ga_kl": ga_kl}[variant](**changes)
    return replace(found, name=f"cyber_for_ai({variant})", source="arXiv:2503.04795, reconstructed")


def ails_ntua(variant: str = "sugd", **changes: Any) -> UnlearnRecipe:
    """The winner of SemEval-2025 Task 4. It mostly hides what it forgets: run `rp.audit`.

    "sugd": forget rows chunk by chunk, each followed by its retain rows, -1 and +0.5 x mean NLL a row, batch 1, last 8
    layers. "agad": ascent on a chunk of 64, annealing on a quarter of the retain set, in the end on all of it, by LoRA.
    """
    _known(variant, ("sugd", "agad"))
    source = "AILS-NTUA at SemEval-2025 Task 4 (iraklis07/llm-unlearning)"
    if variant == "sugd":
        terms = (Term(losses.signed_nll(-1.0), "forget"), Term(losses.signed_nll(0.5), "retain"))
        return made(
            "ails_ntua(sugd)", terms, changes, sampler=chunked(32, 7, 7), parameters=Parameters("last 8"), lr=1e-5, epochs=1.0,
            batch_size=1, formula="-NLL(forget) or +.5 NLL(retain), a row a step", source=source,
        )  # fmt: skip
    phases = (Phase("forget", 3.0, 5e-5), Phase("retain", 1.0, share=0.25), Phase("retain", 1.0, final=True))
    return made(
        "ails_ntua(agad)", (Term(losses.negative_nll(), "forget"), Term(losses.nll(), "retain")), changes,
        sampler=alternate(*phases, chunk=64), parameters=Parameters(lora=Lora(16, 32)), lr=5e-5, epochs=1.0, batch_size=8,
        formula="-NLL(forget chunk), then NLL(retain)", source=source,
    )  # fmt: skip


def zju_merge(**changes: Any) -> Merged:
    """Two LoRA runs of NPO + KL + NLL with other weights, merged by TIES. It mostly hides: run `rp.audit`."""
    defaults: dict[str, Any] = {"parameters": Parameters(lora=Lora(32, 64)), "lr": 1e-4, "epochs": 5.0}
    parts = []
    for number, (forget, kl, nll) in enumerate(((0.4, 0.4, 0.2), (0.3, 0.3, 0.4))):
        terms = (
            Term(losses.npo(), "forget", forget),
            Term(losses.kl(), "retain", kl),
            Term(losses.nll(), "retain", nll),
        )
        formula = f"{forget} NPO + {kl} KL + {nll} NLL"
        parts.append(made(f"zju_merge, part {number}", terms, changes, **(defaults | {"formula": formula})))
    formula = "TIES(.4 NPO + .4 KL + .2 NLL, .3 NPO + .3 KL + .4 NLL)"
    return Merged("zju_merge", tuple(parts), (1.0, 1.0), 0.8, formula, "ZJUKLAB at SemEval-2025 Task 4")


def multiplier(**changes: Any) -> UnlearnRecipe:
    """-NLL(forget) + m NLL(retain), m rising with the retain loss; MLPs of layers 0-5. It mostly hides: run `rp.audit`.

    m = 1.2 while L_r is at most its mean over the first epoch, else 0.3 x 6^(L_r - mean) + 0.8 rounded to 0.1, in [1.2, 2.3].
    """
    terms = (Term(losses.negative_nll(), "forget"), Term(losses.nll(), "retain", rising))
    return made(
        "multiplier", terms, changes, parameters=Parameters("0-5", pattern=r"\.mlp\."), lr=1.5e-5, batch_size=120, epochs=8.0,
        formula="-NLL(forget) + m NLL(retain)", source="SHA256 at SemEval-2025 Task 4",
    )  # fmt: skip


def rising(_step: int, log: Sequence[Record]) -> float:
    """The multiplier m of the retain loss, from the log."""
    first = [r["nll"]["retain"] for r in log if r["epoch"] < 1 and "retain" in r["nll"]]
    if not log or log[-1]["epoch"] < 1 or not first:
        return 1.2
    excess = log[-1]["nll"]["retain"] - sum(first) / len(first)
    return 1.2 if excess <= 0 else min(2.3, max(1.2, round(0.3 * 6 ** min(excess, 9.0) + 0.8, 1)))


def task_vector(scale: float = 1.0, **changes: Any) -> UnlearnRecipe:
    """Fine-tune on the forget set and go the other way: -scale x difference. It mostly hides: run `rp.audit`."""
    return made(
        "task_vector", (Term(losses.nll(), "forget"),), changes, epochs=5.0, lr=1e-5, scale=-scale, stop=(),
        formula="-scale x (fine-tuned on forget - start)", source="Ilharco et al. 2022, arXiv:2212.04089",
    )  # fmt: skip


def small(recipe: UnlearnRecipe, **changes: Any) -> UnlearnRecipe:
    """The recipe with settings for SmolLM2-135M on a CPU: what writes mlp.out in layers 20-29, 60 steps of 8 rows at 5e-4.

    Rate and steps were chosen on the capitals with NPO, by what the training half of the other facts kept. A recipe about
    hidden states of a layer trains what it would: the last layers do not reach them. Every field of a recipe can be given,
    and wins over these settings.
    """
    check_names(f"small({recipe.name})", changes, CHANGEABLE)
    settings: dict[str, Any] = {"batch_size": 8, "length": 64, "lr": 5e-4, "steps": 60}
    if not any("hidden" in term.loss.needs for term in recipe.terms):
        settings["parameters"] = Parameters("20-29", ("mlp.out",))
    return replace(recipe, **settled(settings, changes))


def _known(variant: str, valid: tuple[str, ...]) -> None:
    if variant not in valid:
        raise UnknownName(f"variant={variant!r}; {nearest(variant, valid)}")


# --- Recipes of gradient unlearning, each an expression over losses, combiners, samplers and filters
#
# None of them promises removal: the published attacks say that gradient methods mostly hide. Run `rp.audit`.


RECIPES: dict[str, Callable[..., UnlearnRecipe | Merged]] = {
    f.__name__: f
    for f in (
        ga, grad_diff, ga_kl, npo, npo_gdr, npo_klr, dpo, sim_npo, wga, satimp, undial, rmu, adaptive_rmu, blur_npo, blur_ga,
        blur_rmu, normalised_difference, primal_dual, surgery, cyber_for_ai, ails_ntua, zju_merge, multiplier, task_vector,
    )
}  # fmt: skip
"""Every recipe that needs no other recipe or loss to be built from."""

SURE = ("percentile", "unit")
"""The options of `sure` in the name of a recipe, besides those of the recipe it goes over."""


def named(name: str, /, **options: Any) -> UnlearnRecipe | Merged:
    """A recipe by name: "blur_npo", "ails_ntua:agad" with a variant, "sure:npo_gdr" and "small:blur_npo" over another.

    An option wins over the settings of `small`, these over the defaults of the recipe.

    Raises:
        UnknownName: if there is no such recipe, variant or option, with the nearest names.
        ArgumentError: if an option is out of range.
    """
    head, _, rest = name.partition(":")
    if head in ("sure", "small") and rest:
        mine = {name: options[name] for name in SURE if head == "sure" and name in options}
        inner = named(rest, **{name: value for name, value in options.items() if name not in mine})
        if not isinstance(inner, UnlearnRecipe):
            raise UnknownName(f"{head} goes over one training, {rest!r} merges several; name another recipe")
        changes = {name: value for name, value in options.items() if name in CHANGEABLE}
        return sure(inner, **mine) if head == "sure" else small(inner, **changes)
    if head not in RECIPES:
        raise UnknownName(f"no recipe is called {head!r}; {nearest(head, RECIPES)}")
    parameters = inspect.signature(RECIPES[head]).parameters
    own = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    check_names(f"recipe {name!r}", options, [*own, *CHANGEABLE])
    for option in (option for option in own if option in options):
        if str(parameters[option].annotation).startswith(("float", "int")):
            check_finite_numbers(**{option: options[option]})
        if options[option] is None and parameters[option].default is not None:
            raise ArgumentError(f"{option}=None; give a value, or leave it out for {parameters[option].default!r}")
    if rest and "variant" not in parameters:
        raise UnknownName(f"recipe {head!r} has no variants, and {rest!r} was asked for; name {head!r} alone")
    return RECIPES[head](rest, **options) if rest else RECIPES[head](**options)


def read(path: str | Path) -> UnlearnRecipe:
    """The recipe in a TOML file, which mirrors the dataclass and may start from a named one; see `repedit.unlearning.recipe`.

    Raises:
        DataError: if the file cannot be read. UnknownName: if a key or name is unknown, with the nearest.
        ArgumentError: if a value is missing or out of range.
    """
    return recipe.read(path, named)
