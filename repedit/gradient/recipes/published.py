"""Whole systems as recipes: LLM Surgery, SURE, the SemEval-2025 Task 4 entries, task vectors.

Gradient methods mostly hide what they forget; attack the result with `rp.audit` before you believe it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from repedit.errors import UnknownName, check_names, nearest
from repedit.gradient import losses
from repedit.gradient.parameters import Lora, Parameters
from repedit.gradient.recipe import CHANGEABLE, Merged, Optimiser, Saliency, Term, UnlearnRecipe, made, settled
from repedit.gradient.recipes.basic import ga, ga_kl, grad_diff
from repedit.gradient.sampling import Phase, alternate, chunked, in_turn
from repedit.gradient.schedule import Record


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
