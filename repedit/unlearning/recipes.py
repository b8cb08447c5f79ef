"""The recipes of the field by name, each an expression over losses, combiners, samplers and filters.

None of them promises removal: gradient methods mostly hide what they forget. Run `rp.audit` on the result. Every function
takes the fields of `UnlearnRecipe` as keyword arguments. Unless a recipe states otherwise, defaults are the budget of
SemEval-2025 Task 4: lr 1e-5, 10 epochs, batch size 32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, Unpack, cast, get_args, get_type_hints

from repedit.arguments import checked
from repedit.errors import (
    ArgumentError,
    UnknownName,
    check_choice,
    check_finite_numbers,
    check_names,
    check_whole,
    nearest,
)
from repedit.unlearning import combiners, losses
from repedit.unlearning.combiners import Combiner, unit_forget, weighted_sum
from repedit.unlearning.forget_gradient import Agreement, CommonPart, Fork, LeadingDirections, SharpnessAware
from repedit.unlearning.losses import Loss
from repedit.unlearning.noise import Noise
from repedit.unlearning.parameters import Lora, Parameters, parse_layers
from repedit.unlearning.recipe import (
    RECIPE_FIELDS,
    AnyRecipe,
    Changes,
    MergedRecipe,
    OptimizerConfig,
    Saliency,
    Stage,
    StagedRecipe,
    Term,
    UnlearnRecipe,
    build_recipe,
    recipe_from_file,
    resolved_fields,
)
from repedit.unlearning.sampling import Exchange, Phase, alternate, chunked, in_turn, round_robin
from repedit.unlearning.schedule import Record, Schedule, loss_above

_R = TypeVar("_R", bound=Callable[..., AnyRecipe])
RECIPES: dict[str, Callable[..., AnyRecipe]] = {}
"""Recipes by name that need no other recipe or loss as an argument."""


@checked
def register_recipe(recipe: _R) -> _R:
    """Enter a recipe into `RECIPES` under its own name, so that `by_name`, recipe files and the CLI know it."""
    RECIPES[recipe.__name__] = recipe
    return recipe


_OUTER_OPTIONS: Mapping[str, tuple[str, ...]] = {"sure": ("percentile", "unit"), "sam": ("rho",), "small": ()}
"""Recipes over another, and their own options."""


@checked
def by_name(name: str, /, **options: object) -> AnyRecipe:
    """A recipe by name: "blur_npo", "ails_ntua:agad" with a variant, "sure:npo_gdr" or "small:sam:npo_gdr" over others.

    Options win over the settings of `small`, and these over the defaults of the recipe.

    Args:
        options: keyword arguments of the recipe, and fields of `UnlearnRecipe`.
    Raises:
        UnknownName: if there is no such recipe, variant or option, with the nearest names.
        ArgumentError: if an option is out of range.
    """
    head, _, rest = name.partition(":")
    if head in _OUTER_OPTIONS and rest:
        own = {key: value for key, value in options.items() if key in _OUTER_OPTIONS[head]}
        inner = by_name(rest, **{key: value for key, value in options.items() if key not in own})
        if not isinstance(inner, UnlearnRecipe):
            raise UnknownName(f"{head} modifies a single training, {rest!r} consists of several; name another recipe")
        if head != "small":
            outer: Callable[..., UnlearnRecipe] = sure if head == "sure" else sam
            return outer(inner, **own)
        return small(inner, **cast(Changes, {key: v for key, v in options.items() if key in RECIPE_FIELDS}))
    if head not in RECIPES:
        raise UnknownName(f"no recipe is called {head!r}; {nearest(head, RECIPES)}")
    parameters = inspect.signature(RECIPES[head]).parameters
    keywords = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    check_names(f"recipe {name!r}", options, [*keywords, *RECIPE_FIELDS])
    hints = get_type_hints(RECIPES[head])
    for key in (key for key in keywords if key in options):
        kinds, value = {hints[key], *get_args(hints[key])}, options[key]
        if value is not None and {float, int} & kinds:
            check_finite_numbers(**{key: value})
        if (
            value is not None and int in kinds and float not in kinds
        ):  # a command line does not know which numbers are whole
            whole = int(value) if isinstance(value, float) and value.is_integer() else cast("int | None", value)
            check_whole(0, **{key: whole})
            options[key] = whole
        elif str in kinds and isinstance(value, float):  # nor which are texts, such as layer 1
            options[key] = f"{value:g}"
        if options[key] is None and parameters[key].default is not None:
            raise ArgumentError(f"{key}=None; give a value, or omit it for {parameters[key].default!r}")
    if rest and "variant" not in parameters:
        raise UnknownName(f"recipe {head!r} has no variants, and {rest!r} was given; name {head!r} alone")
    return RECIPES[head](rest, **options) if rest else RECIPES[head](**options)


@checked
def read(path: str | Path) -> UnlearnRecipe | StagedRecipe:
    """The recipe in a TOML file, whose keys are those of `UnlearnRecipe`; it may start from a named recipe.

    A file that starts from a recipe of several trainings gives its options, and keys that apply to its own trainings.

    Raises:
        DataError: if the file cannot be read. UnknownName: if a key or name is unknown, with the nearest.
        ArgumentError: if a value is missing or out of range.
    """
    return recipe_from_file(path, by_name)


# --- Baselines: a loss on the forget set, with or without one on the retain set


@register_recipe
@checked
def ga(*, cap: float | None = None, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """Gradient ascent: -NLL(forget). It has no minimum and ruins a model that trains on; it mostly hides: `rp.audit`."""
    terms = (Term(losses.negative_nll(cap), "forget"),)
    return build_recipe("ga", terms, changes, formula="-NLL(forget)", source="Yao et al. 2023, arXiv:2310.10683")


@register_recipe
@checked
def grad_diff(
    *, gamma: float = 1.0, alpha: float = 1.0, cap: float | None = None, **changes: Unpack[Changes]
) -> UnlearnRecipe:
    """Gradient difference: -gamma NLL(forget) + alpha NLL(retain). It mostly hides what it forgets: run `rp.audit`."""
    terms = (Term(losses.negative_nll(cap), "forget"), Term(losses.nll(), "retain"))
    return build_recipe(
        "grad_diff", terms, changes, combiner=weighted_sum(gamma, alpha), formula="-NLL(forget) + NLL(retain)",
        source="Liu et al. 2022, arXiv:2203.12817",
    )  # fmt: skip


@register_recipe
@checked
def ga_kl(
    *, gamma: float = 1.0, alpha: float = 1.0, cap: float | None = None, **changes: Unpack[Changes]
) -> UnlearnRecipe:
    """-gamma NLL(forget) + alpha KL(start || model)(retain). It mostly hides what it forgets: run `rp.audit`."""
    terms = (Term(losses.negative_nll(cap), "forget"), Term(losses.kl(), "retain"))
    return build_recipe(
        "ga_kl", terms, changes, combiner=weighted_sum(gamma, alpha), formula="-NLL(forget) + KL(retain)",
        source="Maini et al. 2024, arXiv:2401.06121",
    )  # fmt: skip


@register_recipe
@checked
def npo(*, beta: float = 0.1, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """Negative preference optimization alone: NPO(forget). It mostly hides what it forgets: run `rp.audit`."""
    return _preference("npo", losses.npo(beta), None, weighted_sum(), "NPO(forget)", changes)


@register_recipe
@checked
def npo_gdr(*, beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """gamma NPO(forget) + alpha NLL(retain). It mostly hides what it forgets: run `rp.audit`."""
    combiner, formula = weighted_sum(gamma, alpha), "NPO(forget) + NLL(retain)"
    return _preference("npo_gdr", losses.npo(beta), losses.nll(), combiner, formula, changes)


@register_recipe
@checked
def npo_klr(*, beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """gamma NPO(forget) + alpha KL(start || model)(retain). It mostly hides what it forgets: run `rp.audit`."""
    combiner, formula = weighted_sum(gamma, alpha), "NPO(forget) + KL(retain)"
    return _preference("npo_klr", losses.npo(beta), losses.kl(), combiner, formula, changes)


@register_recipe
@checked
def dpo(*, beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """gamma DPO(forget, alternative answers) + alpha NLL(retain); rows carry `alternative`. It mostly hides: `rp.audit`."""
    combiner, formula = weighted_sum(gamma, alpha), "DPO(alternative over forget) + NLL(retain)"
    return _preference("dpo", losses.dpo(beta), losses.nll(), combiner, formula, changes)


@register_recipe
@checked
def sim_npo(
    *, beta: float = 4.5, delta: float = 0.0, gamma: float = 0.125, alpha: float = 1.0, **changes: Unpack[Changes]
) -> UnlearnRecipe:
    """gamma SimNPO(forget) + alpha NLL(retain), without a reference. It mostly hides what it forgets: run `rp.audit`."""
    terms = (Term(losses.sim_npo(beta, delta), "forget"), Term(losses.nll(), "retain"))
    return build_recipe(
        "sim_npo", terms, changes, combiner=weighted_sum(gamma, alpha), formula="gamma SimNPO(forget) + alpha NLL(retain)",
        source="Fan et al. 2024, arXiv:2410.07163",
    )  # fmt: skip


@register_recipe
@checked
def wga(*, beta: float = 1.0, gamma: float = 1.0, alpha: float = 1.0, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """gamma WGA(forget) + alpha NLL(retain); alpha 0 drops the second. It mostly hides what it forgets: run `rp.audit`."""
    return _weighted("wga", losses.wga(beta), gamma, alpha, changes, formula="WGA(forget) + NLL(retain)", epochs=5.0)


@register_recipe
@checked
def satimp(
    *, beta1: float = 5.0, beta2: float = 1.0, gamma: float = 0.1, alpha: float = 1.0, **changes: Unpack[Changes]
) -> UnlearnRecipe:
    """gamma SatImp(forget) + alpha NLL(retain); alpha 0 drops the second. It mostly hides: run `rp.audit`."""
    return _weighted(
        "satimp", losses.satimp(beta1, beta2), gamma, alpha, changes, formula="SatImp(forget) + NLL(retain)"
    )


@register_recipe
@checked
def undial(*, beta: float = 10.0, gamma: float = 1.0, alpha: float = 0.0, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """gamma UNDIAL(forget) + alpha NLL(retain); alpha 0, the default, drops the second. It mostly hides: `rp.audit`."""
    return _weighted("undial", losses.undial(beta), gamma, alpha, changes, formula="UNDIAL(forget)", lr=1e-4)


def _preference(
    name: str, loss: Loss, retain: Loss | None, combiner: Combiner, formula: str, changes: Changes
) -> UnlearnRecipe:
    terms = (Term(loss, "forget"), *(() if retain is None else (Term(retain, "retain"),)))
    source = "Zhang et al. 2024, arXiv:2404.05868"
    return build_recipe(name, terms, changes, combiner=combiner, formula=formula, source=source)


def _weighted(
    name: str, loss: Loss, gamma: float, alpha: float, changes: Changes, **defaults: Unpack[Changes]
) -> UnlearnRecipe:
    terms = (Term(loss, "forget"), *((Term(losses.nll(), "retain"),) if alpha else ()))
    defaults |= {"combiner": weighted_sum(gamma, alpha or 1.0), "source": "open-unlearning"}
    return build_recipe(name, terms, changes, **defaults)


# --- RMU: the residual stream of the forget set is steered to a random direction, that of the retain set is kept


@register_recipe
@checked
def rmu(
    *, layer: int | None = None, coefficient: float = 6.5, alpha: float = 1200.0, **changes: Unpack[Changes]
) -> UnlearnRecipe:
    """||h - c u||^2 / d (forget) + alpha ||h - h_start||^2 / d (retain), h after `layer`. It mostly hides: run `rp.audit`.

    Trains what writes mlp.out in the three layers that end at `layer`; topics alternate step by step.

    Args:
        layer: None for 0.22 of the depth, which is 7 of 32.
    """
    return _rmu("rmu", layer, coefficient, False, weighted_sum(1.0, alpha), changes)


@register_recipe
@checked
def adaptive_rmu(
    *, layer: int | None = None, coefficient: float = 5.0, alpha: float = 900.0, **changes: Unpack[Changes]
) -> UnlearnRecipe:
    """RMU with c = coefficient x mean norm of h over the first forget batch of a topic. It mostly hides: run `rp.audit`.

    Published for layers 24-26 of 32 with coefficient 5, for layers 12-14 of 16 with 3.
    """
    return _rmu("adaptive_rmu", layer, coefficient, True, weighted_sum(1.0, alpha), changes)


def _rmu(
    name: str, layer: int | None, coefficient: float, adaptive: bool, combiner: Combiner, changes: Changes
) -> UnlearnRecipe:
    terms = (Term(losses.rmu_forget(layer, coefficient, adaptive), "forget"), Term(losses.rmu_retain(layer), "retain"))
    layers = "3 ending at 0.22" if layer is None else f"{max(0, layer - 2)}-{layer}"
    return build_recipe(
        name, terms, changes, combiner=combiner, sampler=round_robin(), parameters=Parameters(layers, ("mlp.out",)), lr=5e-5,
        steps=150, batch_size=4, length=512, formula="steer(forget) + alpha hold(retain)",
        source="Li et al. 2024, arXiv:2403.03218",
    )  # fmt: skip


# --- BLUR: any two losses, the retain gradient projected on the complement of the forget gradient
#
# The published claims that BLUR beats its base were not confirmed by others: with gamma 1 forgetting has priority and costs
# retention.


@checked
def blur(
    forget: Loss, retain: Loss, *, gamma: float = 1.0, alpha: float = 1.0, when: str = "always", scope: str = "global",
    role_first: str = "forget", name: str = "blur", **changes: Unpack[Changes],
) -> UnlearnRecipe:  # fmt: skip
    """G = gamma g_f + alpha (g_r - c g_f) for any two losses; see `combiners.blur`. It mostly hides: run `rp.audit`."""
    return build_recipe(
        name, (Term(forget, "forget"), Term(retain, "retain")), changes,
        combiner=combiners.blur(gamma, alpha, when, scope, role_first), formula=f"blur({forget.name}, {retain.name})",
        source="arXiv:2506.08164",
    )  # fmt: skip


@register_recipe
@checked
def blur_npo(*, beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """NPO(forget) and NLL(retain) under BLUR, as on TOFU: beta .1, lr 1e-5, decay .01, warm-up 1 epoch. Run `rp.audit`.

    On MUSE: lr 2.5e-5 (News) or 1e-5 (Books), 10 epochs, batch size 32, length 2048, constant lr.
    """
    defaults: Changes = {"optimizer": OptimizerConfig(weight_decay=0.01), "schedule": Schedule(warmup=0.1)}
    return blur(losses.npo(beta), losses.nll(), gamma=gamma, alpha=alpha, name="blur_npo", **(defaults | changes))


@register_recipe
@checked
def blur_ga(
    *, cap: float | None = None, gamma: float = 1.0, alpha: float = 1.0, **changes: Unpack[Changes]
) -> UnlearnRecipe:
    """-NLL(forget) and NLL(retain) under BLUR. It mostly hides what it forgets: run `rp.audit`."""
    return blur(losses.negative_nll(cap), losses.nll(), gamma=gamma, alpha=alpha, name="blur_ga", **changes)


@register_recipe
@checked
def blur_rmu(
    *,
    layer: int | None = None,
    coefficient: float = 6.5,
    gamma: float = 1.0,
    alpha: float = 800.0,
    **changes: Unpack[Changes],
) -> UnlearnRecipe:
    """RMU under BLUR, as on WMDP: lr 5e-5, 150 batches of 4, length 512. It mostly hides what it forgets: run `rp.audit`."""
    return _rmu("blur_rmu", layer, coefficient, False, combiners.blur(gamma, alpha), changes)


@register_recipe
@checked
def normalised_difference(*, cap: float | None = None, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """g_f / |g_f| + g_r / |g_r| of -NLL(forget) and NLL(retain). It mostly hides what it forgets: run `rp.audit`."""
    terms = (Term(losses.negative_nll(cap), "forget"), Term(losses.nll(), "retain"))
    return build_recipe(
        "normalised_difference", terms, changes, combiner=combiners.norm_diff(), formula="g_f / |g_f| + g_r / |g_r|",
        source="open-unlearning",
    )  # fmt: skip


@register_recipe
@checked
def primal_dual(
    *, epsilon: float = 0.1, eta: float = 1.0, warmup_epochs: float = 5.0, **changes: Unpack[Changes]
) -> UnlearnRecipe:
    """Logit margin (forget) + lambda NLL(retain), lambda rising while NLL > epsilon. It mostly hides: run `rp.audit`."""
    return build_recipe(
        "primal_dual", (Term(losses.logit_margin(), "forget"), Term(losses.nll(), "retain")), changes,
        combiner=combiners.primal_dual(epsilon, eta, warmup_epochs), formula="margin(forget) + lambda NLL(retain)",
        source="open-unlearning",
    )  # fmt: skip


# --- Whole systems: LLM Surgery, SURE, the entries of SemEval-2025 Task 4, task vectors


@register_recipe
@checked
def surgery(
    *, forget: float = 0.1, outdated: float = 0.1, update: float = 2.0, retain: float = 0.5, **changes: Unpack[Changes]
) -> UnlearnRecipe:
    """LLM Surgery: forget, replace and keep at once. It mostly hides what it forgets: run `rp.audit`.

    0.1 (-NLL)(forget) + 0.1 (-NLL)(outdated) + 2 NLL(update) + 0.5 CE(start, model)(retain); outdated are the forget rows
    whose prompt is also in the update set.
    """
    terms = (
        Term(losses.negative_nll(), "forget", forget), Term(losses.negative_nll(), "outdated", outdated),
        Term(losses.nll(), "update", update), Term(losses.cross_entropy_to_reference(), "retain", retain),
    )  # fmt: skip
    return build_recipe(
        "surgery", terms, changes, lr=2e-4, steps=120, optimizer=OptimizerConfig(weight_decay=0.01, betas=(0.9, 0.95)),
        formula=".1 -NLL(forget) + .1 -NLL(outdated) + 2 NLL(update) + .5 CE_ref(retain)", source="arXiv:2409.13054",
    )  # fmt: skip


@checked
def sure(
    inner: UnlearnRecipe,
    *,
    percentile: float = 90.0,
    unit: str = "row",
    loss: Loss | None = None,
    lr: float | None = None,
) -> UnlearnRecipe:
    """Any recipe on the units with the largest forget gradient, against recovery by quantisation. Run `rp.audit`.

    Args:
        percentile: the paper uses 90, 95 and 99.
        lr: larger than that of `inner`; the paper goes to 1e-4.
    """
    return replace(
        inner, name=f"sure({inner.name})", saliency=Saliency(percentile, unit, loss or losses.nll()),
        lr=inner.lr if lr is None else lr, source=f"arXiv:2410.16454 over {inner.source}",
    )  # fmt: skip


@register_recipe
@checked
def cyber_for_ai(variant: str = "grad_diff", **changes: Unpack[Changes]) -> UnlearnRecipe:
    """Global weight modification as in Cyber for AI at SemEval-2025 Task 4; a reconstruction. Run `rp.audit`.

    The paper's list of variants is not available. These change all weights, except "selected_layers" (the last 8).
    """
    check_choice(("ga", "grad_diff", "ga_kl", "alternating", "selected_layers"), variant=variant)
    if variant == "alternating":
        recipe = build_recipe(
            "grad_diff", (Term(losses.negative_nll(), "forget"), Term(losses.nll(), "retain")), changes,
            sampler=in_turn("forget", "retain"), formula="-NLL(forget), NLL(retain) in turn",
        )  # fmt: skip
    elif variant == "selected_layers":
        last: Changes = {"parameters": Parameters("last 8")}
        recipe = grad_diff(**(last | changes))
    else:
        recipe = {"ga": ga, "grad_diff": grad_diff, "ga_kl": ga_kl}[variant](**changes)
    return replace(recipe, name=f"cyber_for_ai({variant})", source="arXiv:2503.04795, reconstructed")


@register_recipe
@checked
def ails_ntua(variant: str = "sugd", **changes: Unpack[Changes]) -> UnlearnRecipe:
    """The winner of SemEval-2025 Task 4. It mostly hides what it forgets: run `rp.audit`.

    "sugd": forget rows chunk by chunk, each followed by its retain rows, -1 and +0.5 x mean NLL a row, batch size 1, last 8
    layers. "agad": ascent on a chunk of 64, annealing on a quarter of the retain set, at the end on all of it, by LoRA.
    """
    check_choice(("sugd", "agad"), variant=variant)
    source = "AILS-NTUA at SemEval-2025 Task 4 (iraklis07/llm-unlearning)"
    if variant == "sugd":
        terms = (Term(losses.signed_nll(-1.0), "forget"), Term(losses.signed_nll(0.5), "retain"))
        return build_recipe(
            "ails_ntua(sugd)", terms, changes, sampler=chunked(32, 7, 7), parameters=Parameters("last 8"), lr=1e-5, epochs=1.0,
            batch_size=1, formula="-NLL(forget) or +.5 NLL(retain), a row a step", source=source,
        )  # fmt: skip
    phases = (Phase("forget", 3.0, 5e-5), Phase("retain", 1.0, share=0.25), Phase("retain", 1.0, final=True))
    return build_recipe(
        "ails_ntua(agad)", (Term(losses.negative_nll(), "forget"), Term(losses.nll(), "retain")), changes,
        sampler=alternate(*phases, chunk=64), parameters=Parameters(lora=Lora(16, 32)), lr=5e-5, epochs=1.0, batch_size=8,
        formula="-NLL(forget chunk), then NLL(retain)", source=source,
    )  # fmt: skip


@register_recipe
@checked
def zju_merge(**changes: Unpack[Changes]) -> MergedRecipe:
    """Two LoRA runs of NPO + KL + NLL with different weights, merged by TIES. It mostly hides: run `rp.audit`."""
    parts = []
    for number, (forget, kl, nll) in enumerate(((0.4, 0.4, 0.2), (0.3, 0.3, 0.4))):
        terms = (
            Term(losses.npo(), "forget", forget), Term(losses.kl(), "retain", kl), Term(losses.nll(), "retain", nll),
        )  # fmt: skip
        part = build_recipe(
            f"zju_merge, part {number}", terms, changes, parameters=Parameters(lora=Lora(32, 64)), lr=1e-4, epochs=5.0,
            formula=f"{forget} NPO + {kl} KL + {nll} NLL",
        )  # fmt: skip
        parts.append(part)
    formula = "TIES(.4 NPO + .4 KL + .2 NLL, .3 NPO + .3 KL + .4 NLL)"
    return MergedRecipe("zju_merge", tuple(parts), (1.0, 1.0), 0.8, formula, "ZJUKLAB at SemEval-2025 Task 4")


@register_recipe
@checked
def multiplier(**changes: Unpack[Changes]) -> UnlearnRecipe:
    """-NLL(forget) + m NLL(retain), m rising with the retain loss; MLPs of layers 0-5. It mostly hides: run `rp.audit`.

    m = 1.2 while L_r is at most its mean over the first epoch, else 0.3 x 6^(L_r - mean) + 0.8 rounded to 0.1, in [1.2, 2.3].
    """
    terms = (Term(losses.negative_nll(), "forget"), Term(losses.nll(), "retain", rising))
    return build_recipe(
        "multiplier", terms, changes, parameters=Parameters("0-5", pattern=r"\.mlp\."), lr=1.5e-5, batch_size=120, epochs=8.0,
        formula="-NLL(forget) + m NLL(retain)", source="SHA256 at SemEval-2025 Task 4",
    )  # fmt: skip


@checked
def rising(_step: int, log: Sequence[Record]) -> float:
    """The multiplier m of the retain loss, from the log."""
    first = [r["nll"]["retain"] for r in log if r["epoch"] < 1 and "retain" in r["nll"]]
    if not log or log[-1]["epoch"] < 1 or not first:
        return 1.2
    excess = log[-1]["nll"]["retain"] - sum(first) / len(first)
    return 1.2 if excess <= 0 else min(2.3, max(1.2, round(0.3 * 6 ** min(excess, 9.0) + 0.8, 1)))


@register_recipe
@checked
def task_vector(**changes: Unpack[Changes]) -> UnlearnRecipe:
    """Fine-tune on the forget set and subtract `scale` (1) times the difference. It mostly hides: run `rp.audit`."""
    scale = changes.pop("scale", 1.0)
    check_finite_numbers(scale=scale)
    return build_recipe(
        "task_vector", (Term(losses.nll(), "forget"),), changes, epochs=5.0, lr=1e-5, scale=-scale, stop=(),
        formula="-scale x (fine-tuned on forget - start)", source="Ilharco et al. 2022, arXiv:2212.04089",
    )  # fmt: skip


# --- Recipes against relearning: another forget gradient, for any losses
#
# Sources and defects of their published code that are not reproduced here (read at the commits named):
# - CIR (filyp/unlearning c97ec223, 740ac29b) removes the mean and the principal components one after the other. The
#   components are those of centred vectors and not orthogonal to the mean, which the later removals bring back.
# - RepSelect (filyp/RepSelect 02927c88) takes one gradient at the start and repeats it, although the abstract says
#   before each update; `svd_lowrank` draws from the global generator and iterates twice.
# - MUDMAN (filyp/MUDMAN 5630e91d) moves the fork in place between the two backward passes of one graph, so the forget
#   gradient mixes activations of the old weights with the new weights. Fork and unlearning see the same batch, and the
#   gradient is normalised before it is masked, so the length of a step depends on the share of entries that remain. The
#   script src/MUDMAN.py passes an argument that its function does not have.
# - SAM (OPTML-Group/Unlearn-Smooth, MUSE/baselines, as copied in hustmx721/MUtyl c88b5f58) adds the perturbation and
#   subtracts it again, which in finite precision does not restore the weights; the list of gradients skips parameters
#   without one and is then paired with all parameters; the NPO loss is that of raw logits over all positions; a gradient of
#   zero is divided by its norm; steps of gradient accumulation overwrite each other.


@checked
def sam(inner: UnlearnRecipe, *, rho: float = 0.01) -> UnlearnRecipe:
    """Any recipe with its forget gradient taken at theta + rho g / |g|, so that what it reaches is flat. Run `rp.audit`.

    See `SharpnessAware`; a step needs one more forward and backward pass of the forget rows and one more copy of what is
    trained. The losses in the log are those at theta.

    Args:
        rho: 0.01, as in the code of the source.
    """
    adversary = SharpnessAware(rho)
    return replace(
        inner, name=f"sam({inner.name})", adversary=adversary, source=f"arXiv:2502.05374 over {inner.source}"
    )


@register_recipe
@checked
def cir(
    *, activations: int = 23, gradients: int = 35, cap: float | None = None, gamma: float = 1.0, alpha: float = 0.01,
    **changes: Unpack[Changes],
) -> UnlearnRecipe:  # fmt: skip
    """-NLL(forget) without what its tokens share, by steps of equal length, + KL(retain). Run `rp.audit`.

    The mean and the principal components of inputs and output gradients of every matrix are removed (`CommonPart`). By SGD,
    because Adam's preconditioning would bring removed directions back. Published for gate, up and down of layers 6 to 11 of
    16, step length 0.2 and retain rate 3e-4 on another loss, which pushes MLP outputs away from their start; losses, step
    length and depth here are ours.
    """
    return build_recipe(
        "cir", (Term(losses.negative_nll(cap), "forget"), Term(losses.kl(), "retain")), changes,
        combiner=unit_forget(gamma, alpha), gradient_filter=CommonPart(activations, gradients),
        parameters=Parameters("6 ending at 0.7", ("mlp.in", "mlp.out")), optimizer=OptimizerConfig("sgd"), lr=0.2, epochs=5.0,
        formula="P (-NLL(forget)) / |.| + alpha KL(retain)", source="Sondej and Yang 2025, arXiv:2509.11816",
    )  # fmt: skip


@register_recipe
@checked
def rep_select(
    *, components: int = 64, relearn_steps: int = 20, relearn_lr: float = 0.01, cap: float | None = None,
    gamma: float = 1.0, alpha: float = 0.01, **changes: Unpack[Changes],
) -> UnlearnRecipe:  # fmt: skip
    """-NLL(forget) at relearned weights, leading directions of its gradient reduced, + KL(retain). Run `rp.audit`.

    Every 20 steps a copy relearns the forget set; at the copy the gradient of the whole set is decomposed, and its leading
    singular directions are divided by their singular values (`LeadingDirections`). The paper relearns with a LoRA adapter at
    0.01 for one epoch, takes the gradient once and removes 512 directions of models of width 2,048 and more; the copy, its
    repetition, the retain term, the unit length of steps and 64 directions are ours.
    """
    return build_recipe(
        "rep_select", (Term(losses.negative_nll(cap), "forget"), Term(losses.kl(), "retain")), changes,
        combiner=unit_forget(gamma, alpha), gradient_filter=LeadingDirections(components, every=20),
        adversary=Fork(every=20, steps=relearn_steps, lr=relearn_lr, held_out=False),
        parameters=Parameters(modules=("mlp.in", "mlp.out")), optimizer=OptimizerConfig("sgd"), lr=0.05, epochs=5.0,
        formula="R (-NLL(forget) at a fork) / |.| + alpha KL(retain)", source="Sondej et al. 2026, arXiv:2606.17168",
    )  # fmt: skip


@register_recipe
@checked
def mudman(
    *, every: int = 10, relearn_steps: int = 5, relearn_lr: float = 1e-3, momentum: float = 0.9, gamma: float = 1.0,
    alpha: float = 0.01, **changes: Unpack[Changes],
) -> UnlearnRecipe:  # fmt: skip
    """Forget gradient at a fork that relearned other facts, where its sign is that of the retain gradient. Run `rp.audit`.

    -H(forget) at a `Fork`, masked by `Agreement` and then divided by its norm, + alpha NLL(retain); by SGD. As in the
    published code: lr 0.1, retain rate 0.001, momentum 0.9, the fork's lr 0.001, entropy loss. There a fork lasts 32 steps and
    relearns the rows that are then unlearned; a new one every 10 steps, and halves, are ours.
    """
    return build_recipe(
        "mudman", (Term(losses.negative_entropy(), "forget"), Term(losses.nll(), "retain")), changes,
        combiner=unit_forget(gamma, alpha), adversary=Fork(every, relearn_steps, relearn_lr), agreement=Agreement(momentum),
        parameters=Parameters(modules=("mlp.in", "mlp.out")), optimizer=OptimizerConfig("sgd"), lr=0.1, steps=100,
        batch_size=16, formula="mask(-H(forget) at a fork) / |.| + alpha NLL(retain)",
        source="Sondej et al. 2025, arXiv:2506.12484",
    )  # fmt: skip


# --- Recipes against relearning: other weights
#
# Defects of published code that are not reproduced here (read at the commits named):
# - KUnBR (llmgfffffff/Beyond-Superficial-Forgetting-KUnBR 4b27b56d) trains blocks in their order, three epochs each, and is
#   called with 18 epochs, so the last two of eight blocks are never trained; no density is computed. The batch of retain
#   rows is i x (a random number) modulo their count: the first step always sees batch 0, no seed is set. The number of
#   layers is written as 32, the optimizer starts again at every exchange, and dropout is on.
# - UNDO (AddieFoote/distillation-robustify-unlearning bdfe271f): the argument `seed` of the corruption is not used; vectors such
#   as gains of norms get no noise and are shrunk with the rest; the default scale of the noise in `serum` is 0; weights are
#   bfloat16 under AdamW, which rounds small updates away.


@register_recipe
@checked
def localized(
    *, layers: str = "0-11", alpha: float = 1.0, reverse: bool = True, template: str | None = None,
    **changes: Unpack[Changes],
) -> UnlearnRecipe:  # fmt: skip
    """NLL of another subject's answer + alpha KL(start, model)(retain), in the MLPs of layers that look up. Run `rp.audit`.

    Every fact gets the answer of another fact of its domain, in all wordings and in the reverse form (`Exchange`); only gate,
    up and down of `layers` are trained. The paper injects false answers in the layers where attributes are looked up; layers
    0-11 (of 30), 1e-4 and 125 steps of 16 rows were measured on SmolLM2-135M, and the reverse form is ours.

    Args:
        reverse, template: see `Exchange`.
    Reference: Guo et al. 2024, arXiv:2410.12949 (localisation of fact lookup).
    """
    return build_recipe(
        "localized", (Term(losses.nll(), "exchanged"), Term(losses.kl(), "retain")), changes,
        combiner=weighted_sum(1.0, alpha), parameters=Parameters(layers, ("mlp.in", "mlp.out")), lr=1e-4, steps=125,
        batch_size=16, exchange=Exchange(reverse, template), formula="NLL(another subject's answer) + alpha KL(retain)",
        source="Guo et al. 2024, arXiv:2410.12949",
    )  # fmt: skip


@register_recipe
@checked
def block_by_block(
    *, layers: str = "all", size: int = 3, rounds: int = 3, until: float = 6.0, repair_steps: int = 40,
    **changes: Unpack[Changes],
) -> StagedRecipe:  # fmt: skip
    """Every block of layers forgets by itself inside the original network; then all are put together. Run `rp.audit`.

    -NLL(forget) + NLL(retain), so that no late layer can cover for the others. A later round goes on from the block's own
    weights, the rest of the network being the original again. At the end KL(original, model)(retain) trains all of
    `layers`; this repair may bring back what was forgotten, so compare with repair_steps=0. The paper selects blocks by the
    density of knowledge; its code, and this recipe, train all that are given. Its settings are blocks of 4 of 32 layers, 3
    rounds and Lion at 2e-7; blocks of 3, `until`, 20 steps of AdamW at 1e-4 and the repair are ours. Changes apply to blocks.

    Args:
        size: layers in a block.
        until: a training of a block ends when the NLL of a step's forget rows exceeds this many nats.
        repair_steps: 0 for no repair.
    Reference: Guo et al. 2025, arXiv:2511.11667 (KUnBR).
    """
    check_whole(size=size, rounds=rounds)
    check_whole(0, repair_steps=repair_steps)
    terms = (Term(losses.negative_nll(), "forget"), Term(losses.nll(), "retain"))
    defaults: Changes = {"lr": 1e-4, "steps": 20, "batch_size": 16}
    block = build_recipe("block_by_block", terms, changes, **defaults)
    block = replace(block, stop=(*block.stop, loss_above("forget", until)), source="arXiv:2511.11667")
    own = ("steps", "epochs", "combiner")
    repair_changes = cast(Changes, {key: value for key, value in changes.items() if key not in own})
    repair = build_recipe(
        "repair", (Term(losses.kl(), "retain"),), repair_changes, **(defaults | {"steps": max(1, repair_steps)})
    )

    def stages(depth: int) -> tuple[Stage, ...]:
        chosen = tuple(range(depth)) if layers == "all" else parse_layers(layers, depth)
        blocks = [",".join(map(str, chosen[i : i + size])) for i in range(0, len(chosen), size)]
        count, planned = len(blocks), list[Stage]()
        for number in range(rounds):
            for i, part in enumerate(blocks):
                recipe = replace(block, parameters=replace(block.parameters, layers=part))
                planned.append(Stage(recipe, tuple(range(i, number * count, count))))
        if repair_steps:
            whole = replace(repair, parameters=replace(repair.parameters, layers=",".join(map(str, chosen))))
            planned.append(Stage(whole, tuple(range(len(planned))), compares_with_original=True))
        return tuple(planned)

    options = {"layers": layers, "size": size, "rounds": rounds, "until": until, "repair_steps": repair_steps}
    formula = "-NLL(forget) + NLL(retain) block by block, then KL(retain)"
    return StagedRecipe("block_by_block", stages, options, formula, "Guo et al. 2025, arXiv:2511.11667")


@register_recipe
@checked
def undo(
    *, inner: str = "npo_gdr", layers: str = "0-11", shrink: float = 0.5, noise_scale: float = 0.1,
    **changes: Unpack[Changes],
) -> StagedRecipe:  # fmt: skip
    """A recipe; then its weights are shrunk, noised and distilled from the model that it gave. Run `rp.audit`.

    Only what writes mlp.out in `layers` is damaged, and only in the span of the forget set's keys (`Noise`);
    KL(edited model, model)(retain) trains the same tensors. Give running text among the retain sets too, without what is to be
    forgotten. The paper damages and distils all weights on the pretraining data; noise scale 0.1 is from its code; the span,
    shrink, layers, 1e-4 and 100 steps are ours. Changes apply to the distillation.

    Args:
        inner: the name of the recipe that unlearns first, such as "small:npo_gdr".
    Reference: Lee et al. 2025, arXiv:2506.06278.
    """
    first = by_name(inner)
    if not isinstance(first, UnlearnRecipe):
        raise UnknownName(f"undo follows a single training, {inner!r} has several; name another recipe")
    second = build_recipe(
        "distillation", (Term(losses.kl(), "retain"),), changes, parameters=Parameters(layers, ("mlp.out",)),
        noise=Noise(shrink, noise_scale), lr=1e-4, steps=100, batch_size=16, formula="KL(edited, model)(retain)",
    )  # fmt: skip
    options = {"inner": first.plain(), "layers": layers, "shrink": shrink, "noise_scale": noise_scale}
    formula = f"{first.formula}; noise; KL(edited, model)(retain)"
    source = f"Lee et al. 2025, arXiv:2506.06278 over {first.source}"
    return StagedRecipe("undo", lambda depth: (Stage(first), Stage(second, (0,))), options, formula, source)


@register_recipe
@checked
def layered(*, inner: str = "npo_gdr", folds: int = 3, **changes: Unpack[Changes]) -> StagedRecipe:
    """A recipe on a growing part of the forget set, while the rest of it is still retained. Run `rp.audit`.

    Stage i of k forgets the first i folds of facts and retains the others with the retain set, so that what hides one fold
    differs from what hides the next, and relearning one does not bring back those before it. The protection is one-sided:
    the last fold has none. Changes apply to every stage; 3 folds are ours.

    Args:
        inner: the name of the recipe, such as "small:npo_gdr".
    Reference: Qian et al. 2025, arXiv:2505.09500 (stage i of k unlearns the first i folds and retains the others).
    """
    check_whole(2, folds=folds)
    recipe = by_name(inner, **changes)
    if not isinstance(recipe, UnlearnRecipe):
        raise UnknownName(f"layered repeats a single training, {inner!r} has several; name another recipe")
    if "retain" not in recipe.roles:
        raise ArgumentError(
            f"layered retains the later folds, and recipe {inner!r} retains nothing; name another recipe"
        )
    stages = tuple(Stage(recipe, tuple(range(i)), folds=(i + 1, folds)) for i in range(folds))
    options = {"inner": recipe.plain(), "folds": folds}
    source = f"Qian et al. 2025, arXiv:2505.09500 over {recipe.source}"
    return StagedRecipe("layered", lambda depth: stages, options, f"{recipe.formula} on 1, 2, ... folds", source)


@checked
def small(recipe: UnlearnRecipe, **changes: Unpack[Changes]) -> UnlearnRecipe:
    """The recipe with settings for SmolLM2-135M on a CPU: what writes mlp.out in layers 20-29, 60 steps of 8 rows at 5e-4.

    Learning rate and steps were chosen on the capitals with NPO, by what the training half of the other facts kept. A
    recipe about the hidden states of a layer keeps its own parameters, as the last layers do not reach them, and so does one
    that exchanges answers; one whose steps have a length of their own (`unit_forget`) keeps its parameters and learning rate.
    Every field of a recipe can be given, and wins over these settings.
    """
    check_names(f"small({recipe.name})", changes, RECIPE_FIELDS)
    settings: Changes = {"batch_size": 8, "length": 64, "lr": 5e-4, "steps": 60}
    if recipe.combiner.name == "unit_forget":
        del settings["lr"]
    elif not any("hidden" in term.loss.needs or term.role == "exchanged" for term in recipe.terms):
        settings["parameters"] = Parameters("20-29", ("mlp.out",))
    return replace(recipe, **resolved_fields(settings, changes))
